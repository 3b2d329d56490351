//! A pod's interface counters, read inside its network namespace.

use orlop_proto::cri;

use super::value;
use crate::network::{INTERFACE, netns_path};
use crate::runtime::Runtime;
use crate::store::Sandbox;
use crate::streaming::netns;

/// One direction of an interface, since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Flow {
    pub bytes: u64,
    pub packets: u64,
    pub errors: u64,
    pub dropped: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Counters {
    pub name: String,
    pub received: Flow,
    pub sent: Flow,
}

/// Rows of `/proc/net/dev`, without loopback.
fn parse(text: &str) -> Vec<Counters> {
    text.lines()
        .filter_map(|l| l.split_once(':'))
        .filter_map(|(name, numbers)| {
            let n: Vec<u64> = numbers.split_whitespace().filter_map(|f| f.parse().ok()).collect();
            let flow = |at: usize| {
                let f = n.get(at..at + 4)?;
                Some(Flow { bytes: f[0], packets: f[1], errors: f[2], dropped: f[3] })
            };
            Some(Counters { name: name.trim().to_owned(), received: flow(0)?, sent: flow(8)? })
        })
        .filter(|i| i.name != "lo")
        .collect()
}

fn shown(c: &Counters) -> cri::NetworkInterfaceUsage {
    cri::NetworkInterfaceUsage {
        name: c.name.clone(),
        rx_bytes: value(c.received.bytes),
        rx_errors: value(c.received.errors),
        tx_bytes: value(c.sent.bytes),
        tx_errors: value(c.sent.errors),
    }
}

impl Runtime {
    /// `None` when the pod has no network of its own any more.
    pub(super) async fn network_counters(&self, sandbox: &Sandbox) -> Option<Vec<Counters>> {
        let pin = netns_path(&self.config.sandbox_run_dir(&sandbox.id));
        let text = netns::inside(pin, || std::fs::read_to_string("/proc/thread-self/net/dev")).await.ok()?;
        Some(parse(&text))
    }

    pub(crate) async fn network_usage(&self, sandbox: &Sandbox, now: i64) -> Option<cri::NetworkUsage> {
        let counters = self.network_counters(sandbox).await?;
        let main = counters.iter().find(|i| i.name == INTERFACE).map(shown);
        let interfaces = counters.iter().filter(|i| i.name != INTERFACE).map(shown).collect();
        Some(cri::NetworkUsage { timestamp: now, default_interface: main, interfaces })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters() {
        let text = "Inter-| Receive | Transmit\n face |bytes packets|bytes\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 10 2 3 6 0 0 0 0 20 4 5 7 0 0 0 0\n";
        let want = Counters {
            name: "eth0".into(),
            received: Flow { bytes: 10, packets: 2, errors: 3, dropped: 6 },
            sent: Flow { bytes: 20, packets: 4, errors: 5, dropped: 7 },
        };
        assert_eq!(parse(text), [want]);
    }
}
