//! `orlop up`: control plane and node in one process; with `--detach` in the background, with progress until it serves.

use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Node as NodeObject;
use kube::Api;
use orlop_base::durable::{self, DirLock, Sync};
use orlop_base::supervise::TaskGroup;

use crate::Failure;
use crate::args::UpArgs;
use crate::node::Node;

const DRAIN: Duration = Duration::from_secs(10);

/// Holds the process id while `orlop up` runs.
pub fn pid_file(args: &UpArgs) -> PathBuf {
    args.node.run_dir.join("up/pid")
}

/// There once every part of this run has started.
fn started_file(args: &UpArgs) -> PathBuf {
    args.node.run_dir.join("up/started")
}

pub fn lock_dir(args: &UpArgs) -> PathBuf {
    args.node.run_dir.join("up")
}

pub async fn run(args: UpArgs) -> Result<(), Failure> {
    let _lock = match DirLock::take(&lock_dir(&args)) {
        Err(durable::Error::Locked { .. }) => {
            let pid = std::fs::read_to_string(pid_file(&args)).unwrap_or_default();
            return Err(format!("runs already (process {}); `orlop down` stops it", pid.trim()).into());
        }
        other => other?,
    };
    crate::check::refuse_if_missing()?;
    match std::fs::remove_file(started_file(&args)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
        _ => {}
    }
    durable::write_atomic(
        &pid_file(&args),
        std::process::id().to_string().as_bytes(),
        0o644,
        Sync::PageCache,
    )?;
    let stop = crate::shutdown::on_signal()?;
    let tasks = TaskGroup::new(&stop);
    if let Err(e) = start(&args, &tasks).await {
        tasks.stop_token().cancel();
        return Err(tasks.run_until_stopped(DRAIN).await.err().map_or(e, Into::into));
    }
    durable::write_atomic(&started_file(&args), b"", 0o644, Sync::PageCache)?;
    tracing::info!("cluster is up");
    Ok(tasks.run_until_stopped(DRAIN).await?)
}

async fn start(args: &UpArgs, tasks: &TaskGroup) -> Result<(), Failure> {
    let server = crate::server::config(&args.server);
    let mut node = Node::new(
        &args.node,
        &args.server.data_dir,
        &args.server.cluster_domain,
        &[args.server.cluster_cidr],
    )?;
    node.check()?;
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
    let node = Node::new(
        &args.node,
        &args.server.data_dir,
        &args.server.cluster_domain,
        &[args.server.cluster_cidr],
    )?
    .name;
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
    let mut child = command.spawn()?;
    let deadline = Instant::now() + Duration::from_secs(args.wait);
    let mut progress = Progress::default();
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
            return Err(format!(
                "not ready after {} s ({}); it goes on in the background, see {}",
                args.wait,
                state.describe(),
                args.log_file.display()
            )
            .into());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn pid_of(args: &UpArgs) -> Option<u32> {
    std::fs::read_to_string(pid_file(args)).ok()?.trim().parse().ok()
}

/// The line that a failed start ends with.
fn last_error(log: &Path, from: u64) -> String {
    let lines = || {
        let mut f = File::open(log).ok()?;
        f.seek(SeekFrom::Start(from)).ok()?;
        BufReader::new(f).lines().map_while(Result::ok).filter(|l| l.starts_with("orlop: ")).last()
    };
    match lines() {
        Some(l) => l.trim_start_matches("orlop: ").to_owned(),
        None => format!("see {}", log.display()),
    }
}

#[derive(Default, PartialEq)]
struct State {
    api: bool,
    node: Option<String>,
    /// Deployments: (name, available, wanted).
    deployments: Vec<(String, i32, i32)>,
    manifests: usize,
}

impl State {
    fn is_done(&self) -> bool {
        let ready = self.deployments.iter().all(|(_, a, w)| a >= w);
        self.api && self.node.is_some() && self.deployments.len() >= self.manifests && ready
    }

    fn describe(&self) -> String {
        if !self.api {
            return "API server".into();
        }
        let Some(node) = &self.node else { return "node".into() };
        let waiting: Vec<String> = self
            .deployments
            .iter()
            .filter(|(_, a, w)| a < w)
            .map(|(n, a, w)| format!("{n} {a}/{w}"))
            .collect();
        if waiting.is_empty() { format!("manifests on {node}") } else { waiting.join(", ") }
    }
}

#[derive(Default)]
struct Progress {
    shown: String,
}

impl Progress {
    fn show(&mut self, s: &State) -> Result<(), Failure> {
        let text = if s.is_done() { "ready".to_owned() } else { format!("waiting for: {}", s.describe()) };
        if text != self.shown {
            crate::say(format_args!("orlop: {text}"))?;
            self.shown = text;
        }
        Ok(())
    }
}

/// How many Deployments the manifests name.
fn deployments_in(dir: &Path) -> usize {
    let is_manifest = |p: &PathBuf| p.extension().is_some_and(|x| x == "yaml" || x == "yml" || x == "json");
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).filter(is_manifest);
    let kinds = |t: String| t.lines().filter(|l| l.trim() == "kind: Deployment").count();
    files.filter_map(|p| std::fs::read_to_string(p).ok()).map(kinds).sum()
}

async fn look(args: &UpArgs, node: &str) -> State {
    let dir = args.server.manifests.clone().unwrap_or_else(|| args.server.data_dir.join("server/manifests"));
    let mut state = State { manifests: deployments_in(&dir), ..Default::default() };
    let Ok(client) = orlop_client::client_from_kubeconfig(&args.server.write_kubeconfig).await else {
        return state;
    };
    let nodes: Api<NodeObject> = Api::all(client.clone());
    let Ok(Ok(found)) = tokio::time::timeout(Duration::from_secs(2), nodes.get_opt(node)).await else {
        return state;
    };
    state.api = true;
    // What an earlier run wrote of the node says nothing before this run's agent has registered it.
    if !started_file(args).exists() {
        return state;
    }
    let is_ready = |n: &NodeObject| {
        let conditions = n.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default();
        conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True")
    };
    state.node = found.filter(is_ready).and_then(|n| n.metadata.name);
    let deployments: Api<Deployment> = Api::all(client);
    if let Ok(list) = deployments.list(&Default::default()).await {
        for d in list.items {
            let wanted = d.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
            let available = d.status.as_ref().and_then(|s| s.available_replicas).unwrap_or(0);
            let name = d.metadata.name.unwrap_or_default();
            state.deployments.push((name, available, wanted));
        }
    }
    state
}
