//! Logging set-up and the process's metrics registry.

use std::sync::Mutex;

use prometheus_client::registry::Registry;
use tracing_subscriber::EnvFilter;

/// Sends logs to standard error, filtered by `ORLOP_LOG` (else `default`, such as "info").
pub fn init(default: &str) {
    let filter = EnvFilter::try_from_env("ORLOP_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    // A second call (tests) keeps the first subscriber.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .try_init();
}

/// Metrics of one daemon. Each daemon owns one, so that several run in one process without sharing names.
#[derive(Default)]
pub struct Metrics {
    registry: Mutex<Registry>,
}

impl Metrics {
    /// Registers metrics under their full upstream names.
    pub fn register(&self, with: impl FnOnce(&mut Registry)) {
        with(&mut self.registry.lock().unwrap_or_else(|e| e.into_inner()));
    }

    /// The OpenMetrics text exposition.
    pub fn encode(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = prometheus_client::encoding::text::encode(
            &mut out,
            &self.registry.lock().unwrap_or_else(|e| e.into_inner()),
        );
        out
    }
}

/// An error and its causes on one line, each cause once.
pub fn chain(e: &(dyn std::error::Error + 'static)) -> String {
    let mut text = e.to_string();
    let mut source = e.source();
    while let Some(s) = source {
        let s_text = s.to_string();
        if !text.contains(&s_text) {
            text.push_str(": ");
            text.push_str(&s_text);
        }
        source = s.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct E(&'static str, #[source] Option<Box<E>>);

    #[test]
    fn a_chain_says_each_cause_once() {
        let cause = || Some(Box::new(E("b failed", Some(Box::new(E("no such file", None))))));
        assert_eq!(chain(&E("a failed", cause())), "a failed: b failed: no such file");
        // An error that shows its causes itself.
        assert_eq!(chain(&E("a: b failed: no such file", cause())), "a: b failed: no such file");
    }
}
