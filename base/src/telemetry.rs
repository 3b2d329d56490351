//! Logging set-up and the process's metrics registry.

use std::sync::Mutex;

use prometheus_client::registry::{Metric, Registry};
use tracing_subscriber::EnvFilter;

/// Sends logs to standard error, filtered by `ORLOP_LOG` (else `default`, such as "info"). A filter that does not parse is
/// named in a warning, and `default` applies.
pub fn init(default: &str) {
    let asked = std::env::var("ORLOP_LOG").ok().map(EnvFilter::try_new);
    let (filter, refused) = match asked {
        Some(Ok(filter)) => (filter, None),
        Some(Err(e)) => (EnvFilter::new(default), Some(e)),
        None => (EnvFilter::new(default), None),
    };
    // A second call (tests) keeps the first subscriber.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        // It would tell of them by a panic when standard error cannot be written, as when it leads to a full disk.
        .log_internal_errors(false)
        .try_init();
    if let Some(e) = refused {
        tracing::warn!("ORLOP_LOG is not a filter: {e}");
    }
}

/// Metrics of one daemon. Each daemon owns one, so that several run in one process without sharing names.
#[derive(Default)]
pub struct Metrics {
    registry: Mutex<Registry>,
}

impl Metrics {
    /// Shows a metric under this name and gives it back. The encoder appends `_total` to the names of counters.
    pub fn add<M: Metric + Clone>(&self, name: impl Into<String>, help: impl Into<String>, metric: M) -> M {
        self.registry.lock().unwrap_or_else(|e| e.into_inner()).register(name, help, metric.clone());
        metric
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

/// An error and its causes on one line, each cause once. Of a parser's message that draws an excerpt the first line stays.
pub fn chain(e: &(dyn std::error::Error + 'static)) -> String {
    let line =
        |e: &dyn std::error::Error| e.to_string().lines().next().unwrap_or_default().trim_end().to_owned();
    let mut text = line(e);
    let mut source = e.source();
    while let Some(s) = source {
        let s_text = line(s);
        // Some errors name their cause themselves, and with it that one's cause.
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
    enum Nested {
        #[error("not JSON\n  |\n1 | {{")]
        Leaf,
        #[error("the file is broken")]
        Broken(#[source] Box<Nested>),
        #[error("no network: {}", chain(.0))]
        Told(#[source] Box<Nested>),
    }

    #[test]
    fn each_cause_is_said_once() {
        let broken = Nested::Broken(Nested::Leaf.into());
        assert_eq!(chain(&broken), "the file is broken: not JSON");
        assert_eq!(chain(&Nested::Told(broken.into())), "no network: the file is broken: not JSON");
    }
}
