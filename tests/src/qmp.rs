//! The few QMP commands that a test gives to a driver VM's QEMU.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// How long QEMU may take to answer: it answers at once unless the machine is very busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// A QMP session past its greeting.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    /// Events that came while an answer was awaited.
    events: VecDeque<Value>,
}

/// Most events that are kept: more than a machine has between two looks at them.
const EVENTS_KEPT: usize = 64;

impl Qmp {
    /// Takes over a fresh connection from QEMU and leaves negotiation mode.
    ///
    /// # Errors
    /// If QEMU does not speak QMP.
    pub fn greet(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qmp = Self { reader: BufReader::new(stream), events: VecDeque::new() };
        let greeting = qmp.message()?;
        if greeting.get("QMP").is_none() {
            bail!("no QMP greeting but {greeting}");
        }
        qmp.execute("qmp_capabilities")?;
        Ok(qmp)
    }

    /// Runs a command without arguments and returns what it returns.
    ///
    /// # Errors
    /// If QEMU refuses the command or goes away.
    pub fn execute(&mut self, command: &str) -> Result<Value> {
        self.execute_with(command, &json!({}))
    }

    /// Runs a command and returns what it returns.
    ///
    /// # Errors
    /// If QEMU refuses the command or goes away.
    pub fn execute_with(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.reader.get_mut().write_all(line.as_bytes()).with_context(|| format!("cannot send {command}"))?;
        loop {
            let mut message = self.message().with_context(|| format!("no answer to {command}"))?;
            if let Some(error) = message.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
            if self.events.len() == EVENTS_KEPT {
                self.events.pop_front();
            }
            self.events.push_back(message);
        }
    }

    /// Waits for the first event, since the last one that was waited for, of which `pick` makes something. `pick` gets its
    /// name and its data.
    ///
    /// # Errors
    /// If QEMU says nothing at all for a minute, or goes away.
    pub fn await_event<T>(&mut self, mut pick: impl FnMut(&str, &Value) -> Option<T>) -> Result<T> {
        loop {
            let message = match self.events.pop_front() {
                Some(message) => message,
                None => self.message().context("no such event")?,
            };
            let name = message.get("event").and_then(Value::as_str).unwrap_or_default();
            if let Some(value) = pick(name, message.get("data").unwrap_or(&Value::Null)) {
                return Ok(value);
            }
        }
    }

    fn message(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line).context("cannot read from QMP")? == 0 {
            bail!("QEMU closed the QMP connection");
        }
        serde_json::from_str(&line).with_context(|| format!("QMP says {line:?}"))
    }
}
