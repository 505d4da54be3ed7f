//! Account of what a back-end asks the front-end, and the other way round, beside the device's work: each question has a number,
//! so that everybody can tell whether it has come, and how often.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use vvu_protocol::message::Iotlb;

/// What has become of a question.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Question {
    pub(crate) arrivals: u32,
    /// What the one who was asked has answered.
    pub(crate) answer: Option<u64>,
}

#[derive(Debug, Default)]
pub(crate) struct Questions {
    asked: RefCell<BTreeMap<u64, Question>>,
    last: Cell<u64>,
    /// There is a front-end that hears questions.
    pub(crate) heard: Cell<bool>,
    /// The front-end gives answers on its back channel.
    pub(crate) answers: Cell<bool>,
}

impl Questions {
    /// A new question, as an IOTLB message of this kind.
    pub(crate) fn ask(&self, kind: u8) -> Iotlb {
        let number = self.last.get() + 1;
        self.last.set(number);
        self.asked.borrow_mut().insert(number, Question::default());
        Iotlb { iova: number << 12, size: 4096, user_address: number, permission: 3, kind }
    }

    /// A question has come. Answers how often it has by now.
    pub(crate) fn arrives(&self, message: &Iotlb) -> u32 {
        let mut asked = self.asked.borrow_mut();
        let question = asked.get_mut(&message.user_address).expect("what comes was asked");
        assert_eq!((message.iova, message.permission), (message.user_address << 12, 3), "{message:?}");
        question.arrivals += 1;
        question.arrivals
    }

    /// The one who was asked answers.
    pub(crate) fn answers(&self, message: &Iotlb, answer: u64) {
        self.asked.borrow_mut().entry(message.user_address).or_default().answer = Some(answer);
    }

    pub(crate) fn of(&self, message: &Iotlb) -> Question {
        self.asked.borrow()[&message.user_address]
    }
}
