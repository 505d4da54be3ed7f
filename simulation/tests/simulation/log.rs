//! What bridge, agent and the simulated parts say, the last lines of it, and the state of the bridge's life as it says it.
//! All of it belongs to the thread that plays the schedule.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt::{self, Write};
use std::panic::PanicHookInfo;
use std::rc::Rc;
use std::sync::Once;

use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Lines that are kept.
const LINES_MAX: usize = 400;

/// Where the bridge's life says what became of it.
const LIFE: &str = "vvu_bridge::life";

#[derive(Debug, Default)]
struct Journal {
    start: Option<Instant>,
    lines: VecDeque<String>,
    life: String,
    /// How often the life changed.
    changes: u64,
    changed: Rc<Notify>,
    failure: Option<String>,
}

thread_local! {
    static JOURNAL: RefCell<Journal> = RefCell::default();
}

/// Begins anew. From now on a panic of this thread, wherever it is, is a failure of the schedule.
pub(crate) fn begin() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| std::panic::set_hook(Box::new(note_panic)));
    JOURNAL.with_borrow_mut(|journal| {
        let life = vvu_bridge::life::Life::new().to_string();
        *journal = Journal { start: Some(Instant::now()), life, ..Journal::default() };
    });
}

fn note_panic(info: &PanicHookInfo<'_>) {
    eprintln!("{info}");
    fail(&info.to_string());
}

/// The first panic since the beginning.
pub(crate) fn failure() -> Option<String> {
    JOURNAL.with_borrow(|journal| journal.failure.clone())
}

/// The schedule has failed.
pub(crate) fn fail(text: &str) {
    note(text);
    JOURNAL.with_borrow_mut(|journal| {
        journal.failure.get_or_insert_with(|| text.to_owned());
    });
}

/// State of the bridge's life, in its own words, and how often it has changed.
pub(crate) fn life() -> (String, u64) {
    JOURNAL.with_borrow(|journal| (journal.life.clone(), journal.changes))
}

/// Waits until the life changes again.
pub(crate) async fn life_changes() {
    let changed = JOURNAL.with_borrow(|journal| Rc::clone(&journal.changed));
    changed.notified().await;
}

/// The last lines.
pub(crate) fn lines() -> Vec<String> {
    JOURNAL.with_borrow(|journal| journal.lines.iter().cloned().collect())
}

/// Adds a line.
pub(crate) fn note(text: &str) {
    JOURNAL.with_borrow_mut(|journal| {
        let time = journal.start.map(|start| start.elapsed()).unwrap_or_default();
        if journal.failure.is_some() {
            return;
        }
        if journal.lines.len() == LINES_MAX {
            journal.lines.pop_front();
        }
        journal.lines.push_back(format!("{:12.6} {text}", time.as_secs_f64()));
    });
}

/// Takes the log of bridge and agent.
#[derive(Debug)]
pub(crate) struct Lines;

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= Level::DEBUG && metadata.target().starts_with("vvu_")
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        let target = event.metadata().target();
        if target == LIFE
            && let Some((_, after)) = text.message.split_once(" -> ")
        {
            JOURNAL.with_borrow_mut(|journal| {
                after.clone_into(&mut journal.life);
                journal.changes += 1;
                journal.changed.notify_waiters();
            });
        }
        note(&format!("  {target}: {}{}", text.message, text.fields));
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let written = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
        written.expect("a string takes everything");
    }
}
