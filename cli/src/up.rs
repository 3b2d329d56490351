//! `orlop up`: control plane and node in one process; with `--detach` in the background, with progress until it serves.

use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;
use orlop_base::durable::{self, DirLock, Sync};
use orlop_base::supervise::TaskGroup;

use crate::Failure;
use crate::args::UpArgs;
use crate::node::Node;
use crate::progress::{Progress, State, look, trouble};

const DRAIN: Duration = Duration::from_secs(10);

/// Holds the process id while `orlop up` runs.
pub fn pid_file(args: &UpArgs) -> PathBuf {
    args.node.run_dir.join("up/pid")
}

/// There once every part of this run has started.
pub fn started_file(args: &UpArgs) -> PathBuf {
    args.node.run_dir.join("up/started")
}

pub fn lock_dir(args: &UpArgs) -> PathBuf {
    args.node.run_dir.join("up")
}

fn node(args: &UpArgs) -> Result<Node, Failure> {
    let server = &args.server;
    let node = Node::new(&args.node, &server.data_dir, &server.cluster_domain, &[server.cluster_cidr])?;
    Ok(Node { is_whole_cluster: true, ..node })
}

pub async fn run(args: UpArgs) -> Result<(), Failure> {
    // What is refused here has made nothing yet.
    crate::check::refuse_if_missing()?;
    let node = node(&args)?;
    node.check()?;
    let _lock = match DirLock::take(&lock_dir(&args)).await {
        Err(durable::Error::Locked { .. }) => {
            let pid = std::fs::read_to_string(pid_file(&args)).unwrap_or_default();
            return Err(format!("runs already (process {}); `orlop down` stops it", pid.trim()).into());
        }
        other => other?,
    };
    // Before anything else: who finds the lock taken signals the process that is named here.
    durable::write_atomic(
        &pid_file(&args),
        std::process::id().to_string().as_bytes(),
        0o644,
        Sync::PageCache,
    )?;
    match std::fs::remove_file(started_file(&args)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
        _ => {}
    }
    let stop = crate::shutdown::on_signal()?;
    let tasks = TaskGroup::new(&stop);
    if let Err(e) = start(&args, node, &tasks).await {
        tasks.stop_token().cancel();
        return Err(tasks.run_until_stopped(DRAIN).await.err().map_or(e, Into::into));
    }
    durable::write_atomic(&started_file(&args), b"", 0o644, Sync::PageCache)?;
    tracing::info!("cluster is up");
    Ok(tasks.run_until_stopped(DRAIN).await?)
}

async fn start(args: &UpArgs, mut node: Node, tasks: &TaskGroup) -> Result<(), Failure> {
    let server = crate::server::config(&args.server);
    if args.node.node_ips.is_empty() {
        node.ips = vec![server.advertise_address];
    }
    // A node that cannot be is refused before a control plane is made.
    node.agent_config(None)?;
    let pki = crate::server::start(&args.server, tasks).await?;
    let credentials = node.credentials(&pki, &server, args.server.listen.port())?;
    node.start(&credentials, tasks).await
}

/// Starts this program again in the background and watches until the node and the manifests' Deployments are ready.
pub fn detach(args: &UpArgs) -> Result<(), Failure> {
    let node = node(args)?.name;
    let mut log =
        File::options().create(true).append(true).open(&args.log_file).map_err(|e| {
            format!("cannot open {}: {e}; choose another --log-file", args.log_file.display())
        })?;
    let from = log.seek(SeekFrom::End(0))?;
    let own_args: Vec<_> = std::env::args_os().skip(1).filter(|a| a != "--detach").collect();
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(own_args)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        // A process group of its own, so that Ctrl-C at the terminal does not reach it.
        .process_group(0);
    let began = Timestamp::now();
    let mut child = command.spawn()?;
    let deadline = Instant::now() + Duration::from_secs(args.wait);
    let mut progress = Progress::default();
    progress.show(&State::default())?;
    loop {
        if let Some(status) = child.try_wait()? {
            return Err(format!("did not start ({status}): {}", last_error(&args.log_file, from)).into());
        }
        let state = match pid_of(args) == Some(child.id()) {
            true => crate::runtime()?.block_on(look(args, &node)),
            // Another `orlop up` may serve; this one will say so.
            false => State::default(),
        };
        progress.show(&state)?;
        if state.is_done() {
            return Ok(());
        }
        if Instant::now() > deadline {
            let said = crate::runtime()?.block_on(trouble(args, &node, &state, began));
            let why = said.or_else(|| last_line(&args.log_file, from, is_complaint)).unwrap_or_default();
            return Err(not_ready(args, &state, &why).into());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn pid_of(args: &UpArgs) -> Option<u32> {
    std::fs::read_to_string(pid_file(args)).ok()?.trim().parse().ok()
}

/// What a wait that was too long ends with: what is missing, why, and what to do.
fn not_ready(args: &UpArgs, state: &State, why: &str) -> String {
    let colon = if why.is_empty() { "" } else { ": " };
    format!(
        "not ready after {} s, waiting for {}{colon}{why}; it goes on in the background: {} and `kubectl get events -A` with {} tell more, `orlop down` stops it",
        args.wait,
        state.describe(),
        args.log_file.display(),
        args.server.write_kubeconfig.display()
    )
}

/// The last line of the log, from an offset on, that `wanted` takes.
fn last_line(log: &Path, from: u64, wanted: impl Fn(&str) -> bool) -> Option<String> {
    let mut f = File::open(log).ok()?;
    f.seek(SeekFrom::Start(from)).ok()?;
    BufReader::new(f).lines().map_while(Result::ok).filter(|l| wanted(l)).last()
}

fn is_complaint(line: &str) -> bool {
    line.contains(" WARN ") || line.contains(" ERROR ")
}

/// The line that a failed start ends with.
fn last_error(log: &Path, from: u64) -> String {
    match last_line(log, from, |l| l.starts_with("orlop: ")) {
        Some(l) => l.trim_start_matches("orlop: ").to_owned(),
        None => format!("see {}", log.display()),
    }
}
