//! A pod's interface counters, read inside its network namespace.

use orlop_proto::cri;

use super::value;
use crate::network::{INTERFACE, netns_path};
use crate::runtime::Runtime;
use crate::store::Sandbox;
use crate::streaming::netns;

/// Rows of `/proc/net/dev`, without loopback.
fn parse(text: &str) -> Vec<cri::NetworkInterfaceUsage> {
    text.lines()
        .filter_map(|l| l.split_once(':'))
        .filter_map(|(name, numbers)| {
            let n: Vec<u64> = numbers.split_whitespace().filter_map(|f| f.parse().ok()).collect();
            Some(cri::NetworkInterfaceUsage {
                name: name.trim().to_owned(),
                rx_bytes: value(*n.first()?),
                rx_errors: value(*n.get(2)?),
                tx_bytes: value(*n.get(8)?),
                tx_errors: value(*n.get(10)?),
            })
        })
        .filter(|i| i.name != "lo")
        .collect()
}

impl Runtime {
    pub(crate) async fn network_usage(&self, sandbox: &Sandbox, now: i64) -> Option<cri::NetworkUsage> {
        let pin = netns_path(&self.config.sandbox_run_dir(&sandbox.id));
        let text = netns::inside(pin, || std::fs::read_to_string("/proc/thread-self/net/dev")).await.ok()?;
        let mut interfaces = parse(&text);
        let main = interfaces.iter().position(|i| i.name == INTERFACE).map(|at| interfaces.remove(at));
        Some(cri::NetworkUsage { timestamp: now, default_interface: main, interfaces })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters() {
        let text = "Inter-| Receive | Transmit\n face |bytes packets|bytes\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 10 2 3 0 0 0 0 0 20 4 5 0 0 0 0 0\n";
        let rows = parse(text);
        assert_eq!(rows.len(), 1);
        let r = &rows[0];
        let n = |v: &Option<cri::UInt64Value>| v.as_ref().map(|v| v.value);
        assert_eq!(
            (r.name.as_str(), n(&r.rx_bytes), n(&r.rx_errors), n(&r.tx_bytes), n(&r.tx_errors)),
            ("eth0", Some(10), Some(3), Some(20), Some(5))
        );
    }
}
