//! `orlop-monitor`: one small single-threaded process per pod that owns the pod's namespaces and containers and outlives every daemon.
//!
//! Usage: `orlop-monitor --dir DIR` becomes a daemon that serves `DIR/monitor.sock` (proto/monitor.proto); the starter's process ends with 0
//! once it listens. `orlop-monitor --spare ROOM` waits for a server that started it to name the folder; ROOM is any text that is as long.
//! `orlop-monitor --cleanup --dir DIR [--cgroup PATH]...` takes back what a monitor that is gone has left, and ends
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
mod title;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Debug, PartialEq)]
enum Task {
    Serve(PathBuf),
    /// Serve a folder that is not known yet.
    Wait,
    CleanUp {
        dir: PathBuf,
        groups: Vec<String>,
    },
}

const USAGE: &str = "usage: orlop-monitor --dir DIR            serve DIR/monitor.sock in the background
       orlop-monitor --spare ROOM         the same, for a server that names DIR on standard input later
       orlop-monitor --cleanup --dir DIR [--cgroup PATH]...
                                          take back what a dead monitor left, and end these cgroups
       orlop-monitor --version";

fn parse(args: impl Iterator<Item = String>) -> Result<Task, String> {
    let mut dir = None;
    let mut cleanup = false;
    let mut spare = false;
    let mut groups = Vec::new();
    let mut args = args;
    while let Some(a) = args.next() {
        match a.as_str() {
            "--dir" => dir = args.next().map(PathBuf::from),
            "--spare" => spare = args.next().is_some(),
            "--cleanup" => cleanup = true,
            "--cgroup" => groups.extend(args.next()),
            "--version" => return Err(format!("orlop-monitor {}", env!("CARGO_PKG_VERSION"))),
            _ => return Err(format!("unknown argument {a:?}\n{USAGE}")),
        }
    }
    if !cleanup && !groups.is_empty() {
        return Err(format!("--cgroup goes with --cleanup only\n{USAGE}"));
    }
    let dir = match (dir, spare) {
        (Some(dir), false) => dir,
        (None, true) if !cleanup => return Ok(Task::Wait),
        (_, true) => return Err(format!("--spare goes with nothing else\n{USAGE}")),
        (None, false) => return Err(format!("--dir is missing\n{USAGE}")),
    };
    check_dir(&dir)?;
    Ok(if cleanup { Task::CleanUp { dir, groups } } else { Task::Serve(dir) })
}

fn check_dir(dir: &Path) -> Result<(), String> {
    match dir.is_absolute() {
        true => Ok(()),
        false => Err(format!("--dir {} is not absolute", dir.display())),
    }
}

fn main() -> ExitCode {
    let task = match parse(std::env::args().skip(1)) {
        Ok(task) => task,
        Err(text) if text.starts_with("orlop-monitor ") => {
            println!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(text) => {
            eprintln!("orlop-monitor: {text}");
            return ExitCode::FAILURE;
        }
    };
    if let Task::CleanUp { dir, groups } = &task {
        return match cleanup::run(dir, groups) {
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
    let dir = match task {
        Task::Serve(dir) => Ok(Some(dir)),
        _ => wait_for_folder(&starter),
    };
    let started = match dir {
        // Nobody needs it any more.
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(dir)) => setup::start(&dir).map(|monitor| (dir, monitor)).map_err(|e| e.to_string()),
        Err(text) => Err(text),
    };
    let (dir, mut monitor) = match started {
        Ok(started) => started,
        Err(text) => {
            starter.failed(&text);
            return ExitCode::FAILURE;
        }
    };
    starter.ready();
    let result = monitor.run();
    if let Err(e) = &result {
        monitor.note(&format!("the event loop failed: {e}"));
    }
    setup::leave(&dir);
    if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The folder, once the server knows it, which is then to be seen in the process's arguments; `None` when that has ended.
fn wait_for_folder(starter: &daemon::Starter) -> Result<Option<PathBuf>, String> {
    let Some(dir) = starter.folder().map_err(|e| format!("no folder: {e}"))? else { return Ok(None) };
    check_dir(&dir)?;
    title::serve(&dir).map_err(|e| format!("cannot show its folder: {e}"))?;
    Ok(Some(dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments() {
        let p = |a: &[&str]| parse(a.iter().map(|s| s.to_string()));
        let clean_up = |groups: &[&str]| Task::CleanUp {
            dir: "/a".into(),
            groups: groups.iter().map(|g| g.to_string()).collect(),
        };
        assert_eq!(p(&["--dir", "/a"]), Ok(Task::Serve("/a".into())));
        assert_eq!(p(&["--spare", "   "]), Ok(Task::Wait));
        assert_eq!(p(&["--cleanup", "--dir", "/a"]), Ok(clean_up(&[])));
        assert_eq!(p(&["--cleanup", "--dir", "/a", "--cgroup", "/b"]), Ok(clean_up(&["/b"])));
        let wrong: [&[&str]; 8] = [
            &["--dir", "/a", "--cgroup", "/b"],
            &[],
            &["--dir"],
            &["--dir", "a"],
            &["x"],
            &["--spare"],
            &["--spare", " ", "--dir", "/a"],
            &["--spare", " ", "--cleanup"],
        ];
        for args in wrong {
            assert!(p(args).is_err(), "{args:?}");
        }
    }
}
