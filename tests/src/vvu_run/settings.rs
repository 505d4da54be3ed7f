//! What an operator changes while a device runs, and what its back-end says.

use anyhow::Result;
use serde_json::Value;

use super::{ApplianceLine, END_PATIENCE, VvuRun, event};

impl VvuRun {
    /// `vvu link`: the state of a port's link, `up` or `down`.
    ///
    /// # Errors
    /// If the command fails.
    pub fn set_link(&self, port: u8, state: &str) -> Result<()> {
        self.command::<Value>("link", &[state, "--port", &port.to_string()]).map(drop)
    }

    /// `vvu filter`: a port's options, `--macs` and `--vlans`, each with its value.
    ///
    /// # Errors
    /// If the command fails.
    pub fn set_filter(&self, port: u8, options: &[&str]) -> Result<()> {
        let port = port.to_string();
        self.command::<Value>("filter", &[&["--port", &port], options].concat()).map(drop)
    }

    /// `vvu limit`: a port's options, `--iops` and `--bandwidth`, each with its value.
    ///
    /// # Errors
    /// If the command fails.
    pub fn set_limit(&self, port: u8, options: &[&str]) -> Result<()> {
        let port = port.to_string();
        self.command::<Value>("limit", &[&["--port", &port], options].concat()).map(drop)
    }

    /// Waits for a further line of the appliance's console that has all of these texts.
    ///
    /// # Errors
    /// If the run ends first, or [`END_PATIENCE`] runs out.
    pub fn await_console(&mut self, texts: &[&str]) -> Result<String> {
        self.vvu.await_line(&format!("line with {texts:?}"), END_PATIENCE, |line| {
            let line = event::<ApplianceLine>(line, "appliance-log")?.line;
            texts.iter().all(|text| line.contains(text)).then_some(line)
        })
    }
}
