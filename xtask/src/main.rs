//! Chores of the developers: `edges` checks who depends on whom and that pure modules are pure; `bench` measures.

mod bench;
mod edges;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check the layering of the crates and the purity of decision modules
    Edges,
    /// Measure latency and memory of a cluster of its own
    Bench {
        /// Pods that are started one after another
        #[arg(long, default_value_t = 20)]
        pods: usize,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Edges => edges::check(),
        Command::Bench { pods } => bench::run(pods),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("xtask: {e}");
            ExitCode::FAILURE
        }
    }
}
