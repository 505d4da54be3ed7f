//! What a back-end has counted, as it says itself. Pure.
//!
//! The back-end is in the appliance and not to be trusted: of its answer only numbers with plain names are taken, and no more
//! than a status has room for.

use std::collections::BTreeMap;

use serde_json::Value;

/// Counters by name.
pub(crate) type Counters = BTreeMap<String, u64>;

/// Most counters of a port.
const MAX_COUNTERS: usize = 48;

/// Longest name of a counter in bytes.
const MAX_NAME_LEN: usize = 32;

/// The counters of a device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct AllCounters {
    /// Of each port, in their order.
    pub(crate) ports: Vec<Counters>,
    /// Of the uplink of a switch.
    pub(crate) uplink: Option<Counters>,
}

impl AllCounters {
    /// Reads the answer to a query: that of a switch, or that of a disk, which counts as one port.
    pub(crate) fn read(answer: &Value) -> Self {
        let counters = |of: &Value| of.get("counters").map(numbers).unwrap_or_default();
        match answer.get("ports").and_then(Value::as_array) {
            Some(ports) => Self {
                ports: ports.iter().map(counters).collect(),
                uplink: answer.get("uplink").filter(|uplink| uplink.is_object()).map(numbers),
            },
            None => {
                let total = answer.get("counters").and_then(|counters| counters.get("total"));
                Self { ports: vec![total.map(numbers).unwrap_or_default()], uplink: None }
            }
        }
    }
}

fn numbers(of: &Value) -> Counters {
    let plain = |name: &str| {
        let fits = (1..=MAX_NAME_LEN).contains(&name.len());
        fits && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
    };
    let fields = of.as_object().into_iter().flatten();
    let counters =
        fields.filter(|(name, _)| plain(name)).filter_map(|(name, value)| Some((name.clone(), value.as_u64()?)));
    counters.take(MAX_COUNTERS).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn counters(of: &[(&str, u64)]) -> Counters {
        of.iter().map(|(name, number)| ((*name).to_owned(), *number)).collect()
    }

    #[test]
    fn a_switch_counts_by_port_and_a_disk_in_sum() {
        let switch = json!({
            "ports": [{ "mac": "52:54:00:00:00:01", "counters": { "tx_packets": 3 } }, { "counters": {} }],
            "uplink": { "rx_bytes": u64::MAX },
        });
        let expected = AllCounters {
            ports: vec![counters(&[("tx_packets", 3)]), Counters::new()],
            uplink: Some(counters(&[("rx_bytes", u64::MAX)])),
        };
        assert_eq!(AllCounters::read(&switch), expected);
        let alone = json!({ "ports": [], "uplink": null });
        assert_eq!(AllCounters::read(&alone), AllCounters::default());
        let disk = json!({ "limits": {}, "counters": { "total": { "reads": 7 }, "queues": [{ "reads": 7 }] } });
        assert_eq!(AllCounters::read(&disk).ports, [counters(&[("reads", 7)])]);
    }

    #[test]
    fn nothing_but_plain_numbers_is_taken() {
        let nonsense = json!({
            "counters": { "total": { "ok": 1, "Upper": 1, "esc\u{1b}": 1, "": 1, "negative": -1, "text": "1", "x".repeat(33): 1 } },
        });
        assert_eq!(AllCounters::read(&nonsense).ports, [counters(&[("ok", 1)])]);
        let many: serde_json::Map<_, _> = (0..1000).map(|number| (format!("c{number}"), json!(number))).collect();
        assert_eq!(AllCounters::read(&json!({ "counters": { "total": many } })).ports[0].len(), MAX_COUNTERS);
        for shapeless in [json!(null), json!([]), json!({ "counters": 7 }), json!({ "ports": [7, null], "uplink": 7 })]
        {
            let read = AllCounters::read(&shapeless);
            assert!(read.ports.iter().all(Counters::is_empty) && read.uplink.is_none(), "{read:?}");
        }
    }
}
