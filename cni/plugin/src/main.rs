//! The CNI plugin of Orlop: a veth pair with host routes for each pod, and the addresses of the node's podCIDR.
//! Called by a container runtime for each pod, so it starts fast: one thread, no runtime, blocking netlink.

mod cmd;
mod conf;
mod conntrack;
mod error;
mod ipam;
mod links;
mod nat;
mod netfilter;
mod netlink;
mod nft;
mod removal;
mod wire;

use std::io::{Read, Write};
use std::process::ExitCode;

use cmd::Env;
use conf::Conf;
use error::Error;
use orlop_cni_types::{Command, SpecVersion};
use serde_json::Value;

fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

fn main() -> ExitCode {
    let mut version = SpecVersion::V1_1_0;
    let (output, code) = match serve(&mut version) {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(value)) => (value, ExitCode::SUCCESS),
        Err(e) => (serde_json::to_value(e.to_result(version)).unwrap_or_default(), ExitCode::FAILURE),
    };
    // A runtime that does not listen learns from the exit code.
    let written = writeln!(std::io::stdout(), "{output}");
    if written.is_ok() { code } else { ExitCode::FAILURE }
}

/// `version` becomes the one that the runtime speaks as soon as that is known.
fn serve(version: &mut SpecVersion) -> Result<Option<Value>, Error> {
    let command = Command::parse(&env("CNI_COMMAND")).ok_or(Error::Environment("CNI_COMMAND"))?;
    if command == Command::Version {
        return Ok(Some(cmd::version()));
    }
    let mut input = Vec::new();
    std::io::stdin().lock().read_to_end(&mut input).map_err(Error::Stdin)?;
    let conf = Conf::parse(&input)?;
    *version = conf.version;
    let env = Env {
        container_id: env("CNI_CONTAINERID"),
        netns: env("CNI_NETNS").into(),
        ifname: env("CNI_IFNAME"),
        args: env("CNI_ARGS"),
    };
    cmd::run(command, &env, &conf)
}
