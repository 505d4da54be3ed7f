//! Runs with several ports: a switch, whose settings change while it runs.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::stage::{Run, Stage, UNTIL_SIGTERM, Watched, last_reply};

/// A switch with two ports, the first known by the name of the stage's socket.
fn switch() -> Run {
    let mut run = Stage::set("listen,wait", UNTIL_SIGTERM).start_class("switch", |stage| {
        let port = |name: &str| format!("--port={}", stage.path(name).display());
        vec![port("disk.sock") + ",queues=2", port("second.sock") + ",iops=50,macs=52:54:00:00:00:01"]
    });
    run.console_is_up(1);
    for port in [1, 0] {
        run.announce_at(port, "X_VVU_APPLIANCE_ACTIVE=1\nREADY=1");
    }
    run
}

/// Plays the back-end at the control channel: answers one request with `answer` and returns it.
fn answer_one(listener: &UnixListener, answer: &str) -> Value {
    let (mut stream, _) = listener.accept().unwrap();
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).unwrap();
    stream.write_all(format!("{answer}\n").as_bytes()).unwrap();
    serde_json::from_str(&line).unwrap()
}

#[test]
fn each_port_has_a_bridge_and_only_the_dead_one_comes_back() {
    let mut run = switch();
    let ready = run.event("ready");
    assert_eq!((&ready["ports"][1]["queues"], ready["ports"].as_array().unwrap().len()), (&1.into(), 2));
    assert_eq!(ready["vmms"][3]["port"], 1, "three VMMs for each port");
    let before = run.holdings();
    let ports = run.status()["ports"].clone();
    let qemu = Watched::open(&ready["pids"]["qemu"]);
    Watched::open(&ports[1]["bridge"]).kill();
    let lost = run.event("bridge-lost");
    let reason = "the bridge of port 1 ended (signal: 9 (SIGKILL)), its appliance VM was killed";
    assert_eq!((&lost["reason"], &lost["restart"]), (&reason.into(), &true.into()));
    run.console_is_up(2);
    assert!(qemu.has_ended(), "the old appliance VM still maps driver VMs' memory");
    run.announce_at(1, "X_VVU_APPLIANCE_ACTIVE=1\nX_VVU_PAUSE_US=3000");
    run.announce_at(0, "X_VVU_APPLIANCE_LOST=1");
    run.announce_at(0, "X_VVU_APPLIANCE_ACTIVE=2\nX_VVU_PAUSE_US=7000");
    assert_eq!(run.event("restarted")["what"], "bridge");
    let active = run.event("active");
    assert_eq!((&active["appliance"], &active["pause_us"]), (&2.into(), &7000.into()), "the longest pause");
    let now = run.status()["ports"].clone();
    assert_eq!(now[0]["bridge"], ports[0]["bridge"], "the first bridge keeps its front-end");
    assert_ne!(now[1]["bridge"], ports[1]["bridge"]);
    UnixStream::connect(run.path("second.sock")).unwrap();
    run.await_holdings(&before);
    run.signal(Signal::TERM);
    let (_, order) = run.finish(0);
    assert_eq!(order, "qemu bridge bridge");
}

#[test]
fn a_change_that_the_back_end_agrees_to_is_kept_for_the_next_appliance() {
    let mut run = switch();
    let qemu = run.event("ready")["pids"]["qemu"].clone();
    let listener = UnixListener::bind(run.private("ch0-1.sock")).unwrap();
    let limit = run.operator("limit", &["--port", "1", "--bandwidth", "1M", "--json"]).spawn().unwrap();
    let request = answer_one(&listener, r#"{"return":{}}"#);
    let limits = json!({ "port": 1, "operations_per_second": 50, "bytes_per_second": 1 << 20 });
    assert_eq!(request, json!({ "set-limits": limits }));
    let changed = last_reply(&limit.wait_with_output().unwrap(), 0);
    assert_eq!((&changed["reply"], &changed["settings"]["link"]), (&"changed".into(), &true.into()));

    let link = run.operator("link", &["down", "--port", "1"]).spawn().unwrap();
    assert_eq!(answer_one(&listener, r#"{"return":{}}"#), json!({ "set-link": { "port": 1, "up": false } }));
    let text = String::from_utf8(link.wait_with_output().unwrap().stdout).unwrap();
    assert_eq!(text, "port 1: operations 50/s, bandwidth 1M/s, link down, macs 52:54:00:00:00:01, vlans any\n");

    let filter = run.operator("filter", &["--macs", "any", "--port", "1", "--json"]).spawn().unwrap();
    answer_one(&listener, r#"{"error":"not today"}"#);
    let refused = last_reply(&filter.wait_with_output().unwrap(), 1);
    assert_eq!(refused["message"], "nothing was changed: the back-end refuses: not today");

    Watched::open(&qemu).kill();
    run.console_is_up(2);
    let config: Value = serde_json::from_slice(&std::fs::read(run.private("appliance.json")).unwrap()).unwrap();
    let port = &config["back_ends"][0]["device"]["ports"][1];
    assert_eq!((&port["link"], &port["limits"]["bytes_per_second"]), (&false.into(), &(1 << 20).into()));
    assert_eq!(port["filter"]["macs"][0], "52:54:00:00:00:01", "what was refused is not kept");
    run.signal(Signal::TERM);
    run.finish(0);
}

#[test]
fn the_status_has_what_the_back_end_has_counted() {
    let mut run = switch();
    run.event("ready");
    let status = |more: &[&str]| run.operator("status", more).spawn().unwrap();
    let without = last_reply(&status(&["--json"]).wait_with_output().unwrap(), 0);
    let why = without["counters_missing"].as_str().unwrap();
    assert!(why.contains("cannot be connected to"), "{why}");
    assert!(without["ports"][0].get("counters").is_none(), "{without}");

    let listener = UnixListener::bind(run.private("ch0-1.sock")).unwrap();
    let counted = r#"{"return":{"ports":[{"counters":{"tx_packets":3}},{"counters":{"rx_filtered":4,"tx_bytes":0}}],"uplink":{"rx_bytes":5}}}"#;
    let asking = status(&["--json"]);
    assert_eq!(answer_one(&listener, counted), json!({ "query": {} }));
    let with = last_reply(&asking.wait_with_output().unwrap(), 0);
    let counters = (&with["ports"][0]["counters"], &with["ports"][1]["counters"], &with["uplink_counters"]);
    let expected =
        (&json!({ "tx_packets": 3 }), &json!({ "rx_filtered": 4, "tx_bytes": 0 }), &json!({ "rx_bytes": 5 }));
    assert_eq!(counters, expected);

    let asking = status(&[]);
    answer_one(&listener, counted);
    let text = String::from_utf8(asking.wait_with_output().unwrap().stdout).unwrap();
    for line in ["counters   tx_packets 3\n", "counters   rx_filtered 4\n", "uplink     rx_bytes 5\n"] {
        assert!(text.contains(line), "{text}");
    }
    run.signal(Signal::TERM);
    run.finish(0);
}

#[test]
fn a_change_that_does_not_fit_never_reaches_the_appliance() {
    let mut run = switch();
    run.event("ready");
    let refusal = |verb: &str, more: &[&str]| {
        let output = run.operator(verb, more).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refusal("link", &["up", "--port", "2"]).contains("no port 2"));
    assert!(refusal("resize", &["4M"]).contains("a device of class net has no size"));
    let line = refusal("limit", &["--iops", "1"]);
    assert!(line.contains("the appliance VM's channel cannot be connected to"), "{line}");
    run.signal(Signal::TERM);
    run.finish(0);
}
