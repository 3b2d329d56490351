//! Chores of the developers: `bench` measures; `descriptions` takes over upstream's words for the fields of the API.
//! `tests/edges.rs` checks who depends on whom and that pure modules are pure.

mod bench;
mod descriptions;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Collect the descriptions of API types from k8s-openapi's sources
    Descriptions {
        /// Only compare with what is checked in
        #[arg(long)]
        check: bool,
    },
    /// Measure latency and memory of a cluster of its own
    Bench {
        /// Pods that are started one after another
        #[arg(long, default_value_t = 20)]
        pods: usize,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Descriptions { check } => descriptions::run(check),
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
