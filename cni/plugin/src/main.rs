//! The plugin as a program, for runtimes that start one for each pod: one thread, no runtime, blocking netlink.

use std::io::{Read, Write};
use std::process::ExitCode;
use std::time::Duration;

use orlop_cni::{Error, Host, serve};
use orlop_cni_types::{Answer, Call, Command, SpecVersion};

/// Whoever has the record of addresses takes well below a millisecond; one that was stopped with it may take for ever.
const PATIENCE: Duration = Duration::from_secs(50);

fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

fn main() -> ExitCode {
    let answer = match read() {
        Ok(call) => serve(&call, Host::Ends),
        Err(e) => Answer { result: Err(e.to_result(SpecVersion::V1_1_0)), notes: Vec::new() },
    };
    for note in answer.notes {
        eprintln!("{note}");
    }
    let (output, code) = match answer.result {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(value)) => (value, ExitCode::SUCCESS),
        Err(e) => (serde_json::to_value(e).unwrap_or_default(), ExitCode::FAILURE),
    };
    // A runtime that does not listen learns from the exit code.
    let written = writeln!(std::io::stdout(), "{output}");
    if written.is_ok() { code } else { ExitCode::FAILURE }
}

fn read() -> Result<Call, Error> {
    let command = Command::parse(&env("CNI_COMMAND")).ok_or(Error::Environment("CNI_COMMAND"))?;
    let mut conf = Vec::new();
    if command != Command::Version {
        std::io::stdin().lock().read_to_end(&mut conf).map_err(Error::Stdin)?;
    }
    Ok(Call {
        command,
        container_id: env("CNI_CONTAINERID"),
        netns: env("CNI_NETNS").into(),
        ifname: env("CNI_IFNAME"),
        args: env("CNI_ARGS"),
        conf,
        limit: PATIENCE,
    })
}
