//! The control queue: its thread takes the driver's commands and carries them out (virtio 1.3, section 5.1.6.5).

use std::sync::Arc;

use vvu_back_end::{Chain, Ring, Segment, Service};

use crate::bell::Bell;
use crate::driver_data::{Cursor, MemoryWatch};
use crate::driver_state::MAX_COMMAND_LEN;
use crate::fault::{Condition, Fault};
use crate::port::{MAX_INDIRECT_CHAIN, Port};
use crate::waiting::Waiting;

/// The device's answers.
const OK: u8 = 0;
const ERR: u8 = 1;

struct Worker<'a> {
    port: &'a Port,
    service: &'a Service<'a>,
    bell: Bell,
    /// None until it could be opened.
    ring: Option<Ring>,
    chain: Chain,
    command: Vec<u8>,
    watch: MemoryWatch,
}

/// Serves the ring until it is stopped, on the queue's thread.
pub(crate) fn serve(port: &Port, service: &Service<'_>) {
    let Some(bell) = port.new_bell() else { return };
    let mut worker = Worker {
        port,
        service,
        bell,
        ring: None,
        chain: Chain::new(MAX_INDIRECT_CHAIN),
        command: Vec::new(),
        watch: MemoryWatch::new(),
    };
    worker.run();
    if let Some(ring) = &worker.ring {
        service.save_position(ring);
    }
    worker.bell.finish();
}

impl Worker<'_> {
    fn run(&mut self) {
        let mut waiting = Waiting::new(self.service);
        let mut condition = Condition::Working;
        while !self.service.should_stop() {
            if condition == Condition::Working {
                condition = match self.work() {
                    Ok(()) => Condition::Working,
                    Err(fault) => self.pause_or_break(fault),
                };
            }
            let events = waiting.wait(&mut self.bell, None);
            if events.kicked {
                self.port.counters.kicks.count();
            }
            if events.woken {
                if waiting.follow(self.service, self.ring.as_mut()) {
                    self.signal();
                }
                if condition == Condition::Waiting {
                    condition = Condition::Working;
                }
            }
        }
    }

    /// Takes commands until there are no more.
    fn work(&mut self) -> Result<(), Fault> {
        match &mut self.ring {
            Some(ring) => ring.place()?,
            None => {
                let ring = self.service.open_ring()?;
                self.port.start_control(ring.next_avail());
                self.ring = Some(ring);
            }
        }
        loop {
            let Some(ring) = &mut self.ring else { return Ok(()) };
            let count = ring.available()?;
            self.watch.check(ring.view().memory())?;
            for _ in 0..count {
                self.take_command()?;
            }
            self.service.resume();
            let Some(ring) = &mut self.ring else { return Ok(()) };
            let is_more = ring.listen()?;
            if ring.publish()? {
                self.signal();
            }
            if !is_more || self.service.should_stop() {
                return Ok(());
            }
        }
    }

    fn take_command(&mut self) -> Result<(), Fault> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        let head = ring.peek()?;
        ring.walk(head, &mut self.chain)?;
        let Some(answer) = self.chain.writable.first() else { return Err(Fault::Direction { head }) };
        let answer = Segment { len: 1, ..*answer };
        ring.take(head);
        let memory = Arc::clone(ring.view().memory());
        // One byte more than is allowed, to know that there are more.
        self.command.resize(MAX_COMMAND_LEN + 1, 0);
        let len = Cursor::new(&memory, &self.chain.readable).read(&mut self.command)?;
        self.watch.check(&memory)?;
        let command = self.command.get(..len.min(MAX_COMMAND_LEN)).unwrap_or_default();
        self.port.counters.commands.count();
        let done = len <= MAX_COMMAND_LEN && carry_out(self.port, command);
        Cursor::new(&memory, &[answer]).write(&[if done { OK } else { ERR }])?;
        ring.view().mark_written(answer);
        Ok(ring.put_used(head, answer.len)?)
    }

    fn signal(&mut self) {
        self.port.signal_driver(self.service, &mut self.bell);
    }

    fn pause_or_break(&mut self, fault: Fault) -> Condition {
        if let Some(ring) = self.ring.as_mut().filter(|ring| ring.is_placed())
            && matches!(ring.publish(), Ok(true))
        {
            self.signal();
        }
        match fault {
            Fault::Ring(error) => self.port.pause_or_break(error, self.service, &mut self.bell),
            fault => {
                self.port.break_ring(&fault, self.service, &mut self.bell);
                Condition::Broken
            }
        }
    }
}

fn carry_out(port: &Port, command: &[u8]) -> bool {
    let negotiated = port.negotiated();
    port.change_driver(|driver| driver.apply(command, negotiated))
}
