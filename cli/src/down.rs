//! `orlop down`: ends what `orlop up` started and takes back everything but the data folder.

use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use orlop_base::durable::DirLock;

use crate::Failure;
use crate::args::UpArgs;
use crate::node::Node;

/// How long the daemon gets to end before it is killed.
const PATIENCE: Duration = Duration::from_secs(20);

pub async fn run(args: UpArgs) -> Result<(), Failure> {
    stop_daemon(&args)?;
    let node = Node::new(
        &args.node,
        &args.server.data_dir,
        &args.server.cluster_domain,
        &[args.server.cluster_cidr],
    )?;
    let mut first: Option<Failure> = None;
    let mut note = |what: &str, r: Result<(), Failure>| {
        if let Err(e) = r {
            eprintln!("orlop: could not take back {what}: {}", orlop_base::telemetry::chain(&*e));
            first.get_or_insert(e);
        }
    };
    if args.node.container_runtime_endpoint.is_none() {
        note("the pods", async { Ok(orlop_cri::purge(node.cri_config()?).await?) }.await);
    }
    note("the agent's folders", async { Ok(orlop_agent::purge(&node.agent_config(None)?).await?) }.await);
    note("the service datapath", (|| Ok(orlop_proxy::purge(&node.proxy_config(Path::new("")))?))());
    note("the DNS link", async { Ok(orlop_dns::purge(&args.node.dns_link).await?) }.await);
    for path in [node.conflist(), args.server.write_kubeconfig.clone(), args.log_file.clone()] {
        note("a file", remove_file(&path));
    }
    note("the run folder", remove_dir(&args.node.run_dir));
    // Folders that only held our files; those with anything else in them stay.
    let (kubeconfig, cni) = (args.server.write_kubeconfig.parent(), &args.node.cni_conf_dir);
    let nri = args.node.runtime.nri_socket.parent();
    for dir in [kubeconfig, Some(cni.as_path()), cni.parent(), nri].into_iter().flatten() {
        let _ = std::fs::remove_dir(dir);
    }
    match first {
        Some(_) => {
            Err("not everything could be taken back; mend what is named above and run it again".into())
        }
        None => Ok(()),
    }
}

fn stop_daemon(args: &UpArgs) -> Result<(), Failure> {
    let running = || DirLock::try_take(&crate::up::lock_dir(args)).is_err();
    if !running() {
        return Ok(());
    }
    let text = std::fs::read_to_string(crate::up::pid_file(args)).unwrap_or_default();
    let pid: i32 = text.trim().parse().map_err(|_| {
        format!("{} names no process; stop `orlop up` by hand", crate::up::pid_file(args).display())
    })?;
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let start = Instant::now();
        match kill(Pid::from_raw(pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(e) => return Err(format!("cannot stop process {pid}: {e}").into()),
        }
        while running() && start.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(50));
        }
        if !running() {
            return Ok(());
        }
    }
    Err(format!("process {pid} does not end; stop it by hand").into())
}

fn remove_file(path: &Path) -> Result<(), Failure> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(format!("{}: {e}", path.display()).into()),
        _ => Ok(()),
    }
}

fn remove_dir(path: &Path) -> Result<(), Failure> {
    match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(format!("{}: {e}", path.display()).into()),
        _ => Ok(()),
    }
}
