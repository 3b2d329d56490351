//! The agent alone, for trying it by hand:
//! `agent NODE CRI_SOCKET ROOT_DIR [KUBECONFIG]`; everything it writes lies below ROOT_DIR.

use std::path::PathBuf;

use orlop_agent::Config;
use orlop_base::supervise::Ready;
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    orlop_base::telemetry::init("info");
    let args: Vec<String> = std::env::args().collect();
    let [_, node, socket, root, rest @ ..] = args.as_slice() else {
        return Err("usage: agent NODE CRI_SOCKET ROOT_DIR [KUBECONFIG]".into());
    };
    let root = PathBuf::from(root);
    let mut config = Config::new(node.as_str(), rest.first().map(PathBuf::from));
    config.cri_socket = PathBuf::from(socket);
    config.root_dir = root.join("kubelet");
    config.pod_logs_dir = root.join("pod-logs");
    config.container_logs_dir = root.join("container-logs");
    config.static_pod_dir = Some(root.join("manifests"));
    config.kubelet.cgroup_root = format!("/orlop-{node}");
    config.listen.set_port(rest.get(1).and_then(|p| p.parse().ok()).unwrap_or(10250));
    let stop = CancellationToken::new();
    let signal = stop.clone();
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let run = orlop_agent::run(config, Ready::default(), stop);
    tokio::pin!(run);
    loop {
        tokio::select! {
            r = &mut run => return r.map_err(Into::into),
            _ = tokio::signal::ctrl_c() => signal.cancel(),
            _ = terminate.recv() => signal.cancel(),
        }
    }
}
