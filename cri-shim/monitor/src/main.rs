//! `orlop-monitor`: one small single-threaded process per pod that owns the pod's namespaces and containers and outlives every daemon.
//!
//! Usage: `orlop-monitor --dir DIR` becomes a daemon that serves `DIR/monitor.sock` (proto/monitor.proto); the starter's process ends with 0
//! once it listens. `orlop-monitor --cleanup --dir DIR [--cgroup PATH]...` takes back what a monitor that is gone has left, and ends
//! these cgroups.
//!
//! Static release build: `RUSTFLAGS="-C target-feature=+crt-static" cargo build --release -p orlop-monitor --target x86_64-unknown-linux-gnu`.

mod cleanup;
mod conn;
mod container;
mod daemon;
mod exec;
mod frame;
#[cfg(test)]
mod fuzz;
mod init;
mod io;
mod journal;
mod log;
mod monitor;
mod netdev;
mod oom;
mod outcomes;
mod poll;
mod requests;
mod sandbox;
mod seal;
mod setup;

use std::path::PathBuf;
use std::process::ExitCode;

struct Args {
    dir: PathBuf,
    cleanup: bool,
    groups: Vec<String>,
}

const USAGE: &str = "usage: orlop-monitor --dir DIR            serve DIR/monitor.sock in the background
       orlop-monitor --cleanup --dir DIR [--cgroup PATH]...
                                          take back what a dead monitor left, and end these cgroups
       orlop-monitor --version";

fn parse(args: impl Iterator<Item = String>) -> Result<Args, String> {
    let mut dir = None;
    let mut cleanup = false;
    let mut groups = Vec::new();
    let mut args = args;
    while let Some(a) = args.next() {
        match a.as_str() {
            "--dir" => dir = args.next().map(PathBuf::from),
            "--cleanup" => cleanup = true,
            "--cgroup" => groups.extend(args.next()),
            "--version" => return Err(format!("orlop-monitor {}", env!("CARGO_PKG_VERSION"))),
            _ => return Err(format!("unknown argument {a:?}\n{USAGE}")),
        }
    }
    let dir = dir.ok_or_else(|| format!("--dir is missing\n{USAGE}"))?;
    if !dir.is_absolute() {
        return Err(format!("--dir {} is not absolute", dir.display()));
    }
    if !cleanup && !groups.is_empty() {
        return Err(format!("--cgroup goes with --cleanup only\n{USAGE}"));
    }
    Ok(Args { dir, cleanup, groups })
}

fn main() -> ExitCode {
    let args = match parse(std::env::args().skip(1)) {
        Ok(a) => a,
        Err(text) if text.starts_with("orlop-monitor ") => {
            println!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(text) => {
            eprintln!("orlop-monitor: {text}");
            return ExitCode::FAILURE;
        }
    };
    if args.cleanup {
        return match cleanup::run(&args.dir, &args.groups) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => {
                eprintln!("orlop-monitor: {e}");
                ExitCode::FAILURE
            }
        };
    }
    if let Err(e) = seal::run_sealed() {
        eprintln!("orlop-monitor: cannot protect its program file: {e}");
        return ExitCode::FAILURE;
    }
    let starter = match daemon::daemonise() {
        Ok(s) => s,
        Err(e) => {
            eprintln!("orlop-monitor: cannot become a daemon: {e}");
            return ExitCode::FAILURE;
        }
    };
    let mut monitor = match setup::start(&args.dir) {
        Ok(m) => m,
        Err(e) => {
            starter.failed(&e.to_string());
            return ExitCode::FAILURE;
        }
    };
    starter.ready();
    let result = monitor.run();
    if let Err(e) = &result {
        monitor.note(&format!("the event loop failed: {e}"));
    }
    setup::leave(&args.dir);
    if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments() {
        let p = |a: &[&str]| parse(a.iter().map(|s| s.to_string())).map(|a| (a.dir, a.cleanup));
        assert_eq!(p(&["--dir", "/a"]), Ok(("/a".into(), false)));
        assert_eq!(p(&["--cleanup", "--dir", "/a", "--cgroup", "/b"]), Ok(("/a".into(), true)));
        assert!(p(&["--dir", "/a", "--cgroup", "/b"]).is_err());
        assert!(
            p(&[]).is_err() && p(&["--dir"]).is_err() && p(&["--dir", "a"]).is_err() && p(&["x"]).is_err()
        );
    }
}
