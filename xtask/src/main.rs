//! Chores of the developers: `bench` measures; `descriptions` takes over upstream's words for the fields of the API.
//! `tests/edges.rs` checks who depends on whom and that pure modules are pure.

mod bench;
mod descriptions;

use std::process::ExitCode;

use clap::builder::PossibleValuesParser;
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
    /// Measure latency and memory, beside what Orlop replaces where that is installed
    Bench {
        /// Only these sections
        #[arg(long, value_delimiter = ',', value_name = "SECTION", value_parser = PossibleValuesParser::new(bench::names()))]
        only: Vec<String>,
        #[command(flatten)]
        options: bench::Options,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Descriptions { check } => descriptions::run(check),
        Command::Bench { only, options } => bench::run(&only, &options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("xtask: {e}");
            ExitCode::FAILURE
        }
    }
}
