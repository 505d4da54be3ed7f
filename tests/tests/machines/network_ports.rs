//! A switch with as many ports as an appliance VM can have device sets.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vvu_tests::testbed::machine_test;
use vvu_tests::vvu_run::VvuRun;

/// Most device sets of an appliance VM.
const PORTS: usize = 8;

/// Path: eight control, window and doorbell devices in one machine, all started; then what the back-end has counted for each
/// port, as the operator asks for it.
#[test]
fn a_switch_has_eight_ports() -> Result<()> {
    machine_test("a_switch_has_eight_ports", |testbed| {
        let mut options: Vec<_> = (0..PORTS)
            .map(|port| format!("--port={}", testbed.socket(&format!("port{port}.sock")).display()))
            .collect();
        options.push("--window=1G".to_owned());
        let run = VvuRun::start_class(testbed, "switch", "switch", &options)?;
        let ports = run.status()?.ports;
        ensure!(ports.len() == PORTS, "{ports:?}");
        for port in &ports {
            let of_port = |name: &str| port.get(name).with_context(|| format!("there are no {name}: {port}"));
            ensure!(of_port("text")? == "ready for a front-end", "{port}");
            ensure!(of_port("counters")?.get("tx_packets") == Some(&Value::from(0)), "{port}");
            ensure!(of_port("settings")?.get("link") == Some(&Value::from(true)), "{port}");
        }
        run.stop().map(drop)
    })
}
