//! `orlop`: one binary, several roles. This crate parses arguments and wires the parts; it decides nothing else.

mod args;
mod check;
mod datapath;
mod down;
mod image;
mod node;
mod progress;
mod server;
mod shutdown;
mod up;
mod values;

use std::fmt::Display;
use std::io::{ErrorKind, Write};
use std::pin::Pin;
use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command, ProxyArgs};

/// An error as the user sees it: one line that says what, where and what to do.
type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return refuse(&e),
    };
    if let Err(e) = orlop_base::failpoint::init_from_env() {
        eprintln!("orlop: {e}");
        return ExitCode::FAILURE;
    }
    // Both ring and another provider may be linked in; one has to be chosen before the first handshake.
    let _ = rustls::crypto::ring::default_provider().install_default();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("orlop: {}", orlop_base::telemetry::chain(&*e));
            ExitCode::FAILURE
        }
    }
}

/// Help goes out as it is, a mistake on one line as every other error.
fn refuse(e: &clap::Error) -> ExitCode {
    if !e.use_stderr() || e.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        e.exit();
    }
    eprintln!("orlop: {}", args::on_one_line(&e.render().to_string()));
    ExitCode::from(2)
}

/// Prints a line. That nobody reads any more (`orlop check | head -1`) is no error.
fn say(line: impl Display) -> Result<(), Failure> {
    match writeln!(std::io::stdout(), "{line}") {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

/// For commands that make or take back parts of a node.
fn need_root() -> Result<(), Failure> {
    match nix::unistd::geteuid().is_root() {
        true => Ok(()),
        false => Err("not root; a node needs root for namespaces, mounts and BPF".into()),
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    if let Command::Up(_) | Command::Down(_) | Command::Agent(_) | Command::Cri(_) | Command::Proxy(_) =
        cli.command
    {
        need_root()?;
    }
    let daemon = |future: Pin<Box<dyn Future<Output = Result<(), Failure>>>>| {
        // A broken connection is logged by those who use it, with what it means to them.
        orlop_base::telemetry::init("info,kube_client::client::builder=off,kube_runtime::watcher=off");
        // A node has more connections, watches and pods than the usual soft limit has files.
        if let Err(e) = orlop_base::descriptors::raise() {
            tracing::warn!(error = %e, "cannot raise the limit of open files");
        }
        runtime()?.block_on(async {
            tokio::select! {
                ended = future => ended,
                never = orlop_base::memory::give_back_at_rest() => match never {},
            }
        })
    };
    match cli.command {
        Command::Up(a) if a.detach => up::detach(&a),
        Command::Up(a) => daemon(Box::pin(up::run(*a))),
        Command::Down(a) => {
            orlop_base::telemetry::init("warn");
            runtime()?.block_on(down::run(*a))
        }
        Command::Server(a) => daemon(Box::pin(server::run(a))),
        Command::Agent(a) => daemon(Box::pin(node::run(*a))),
        Command::Cri(a) => daemon(Box::pin(node::run_cri(a))),
        Command::Proxy(ProxyArgs { command: Some(c), .. }) => {
            orlop_base::telemetry::init("warn");
            node::ask_proxy(c)
        }
        Command::Proxy(a) => daemon(Box::pin(node::run_proxy(a))),
        Command::Image(c) => {
            orlop_base::telemetry::init("warn");
            runtime()?.block_on(image::run(c))
        }
        Command::Check => check::run(),
        Command::Kubeconfig { path } => {
            let text = std::fs::read_to_string(&path).map_err(|e| {
                format!("cannot read {}: {e}; is the server up, and are you root?", path.display())
            })?;
            say(text.trim_end())
        }
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    let cores = std::thread::available_parallelism().map_or(2, |n| n.get());
    Ok(tokio::runtime::Builder::new_multi_thread()
        // More threads than this cost memory and gain nothing for what these daemons do.
        .worker_threads(cores.clamp(2, 8))
        .thread_stack_size(1 << 20)
        .enable_all()
        .build()?)
}
