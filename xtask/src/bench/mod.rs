//! `make bench`: figures of Orlop, beside those of what it replaces, taken in the same run on the same machine. One file a section.
//! Absolute figures move with the machine; the ratios are what counts.

mod containers;
mod cri;
mod images;
mod memory;
mod node;
mod pods;
mod process;
mod proxy;
mod table;

use table::Table;

type Result<T = ()> = std::result::Result<T, String>;

/// Sizes. The defaults are those of `make bench`; tests run sections in small.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Pods that are started one after another
    #[arg(long, default_value_t = 30)]
    pub pods: usize,

    /// Pods that are there while memory is weighed
    #[arg(long, default_value_t = 50)]
    pub held: usize,

    /// Pods that are started at once
    #[arg(long, default_value_t = 100)]
    pub burst: usize,

    /// Containers that are made to measure one
    #[arg(long, default_value_t = 30)]
    pub containers: usize,

    /// Numbers of Services beside which the proxy is measured, each more than the one before
    #[arg(long, value_delimiter = ',', default_values_t = [100, 5000, 10_000])]
    pub services: Vec<usize>,

    /// Pulls that are measured
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,

    /// Files in each of the pulled image's ten layers
    #[arg(long, default_value_t = 500)]
    pub files: usize,

    /// Seconds that a cluster gets to settle before its memory is read
    #[arg(long, default_value_t = 10)]
    pub settle: u64,
}

/// One part of the bench: sets up what it needs, measures, takes it back.
struct Section {
    name: &'static str,
    run: fn(&Options) -> Result<Vec<Table>>,
}

/// In the order in which they run.
const SECTIONS: &[Section] = &[
    Section { name: "pods", run: pods::run },
    Section { name: "memory", run: memory::run },
    Section { name: "containers", run: containers::run },
    Section { name: "proxy", run: proxy::run },
    Section { name: "cri", run: cri::run },
    Section { name: "images", run: images::run },
];

/// What `--only` accepts.
pub fn names() -> Vec<&'static str> {
    SECTIONS.iter().map(|s| s.name).collect()
}

/// Runs the sections named, or all; a section that fails does not keep the others from running.
pub fn run(only: &[String], options: &Options) -> Result {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let chosen = SECTIONS.iter().filter(|s| only.is_empty() || only.iter().any(|o| o == s.name));
    let mut failed = Vec::new();
    for section in chosen {
        match (section.run)(options) {
            Ok(tables) => tables.iter().for_each(|t| println!("{t}")),
            Err(e) => failed.push(format!("{}: {e}", section.name)),
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(failed.join("; ")) }
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// Runs a section's asynchronous part.
fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Runtime::new().map_err(text)?.block_on(work)
}
