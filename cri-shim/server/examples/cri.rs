//! Runs the CRI server alone: `cri --root DIR --monitor FILE [--cni-conf DIR] [--cni-bin DIR]...
//! [--certs-dir DIR] [--cdi-dir DIR] [--nri-socket SOCK] [--nri-plugin-dir DIR] [--nri-config-dir DIR] [--nri-request-timeout MILLISECONDS] [--cgroup-parent PATH] [--criu FILE] [--runtime-handler NAME=PROGRAM]... [--cni-timeout SECONDS] [--streaming-idle-timeout SECONDS] [--import ARCHIVE] [--purge]`. Everything is below the root folder; the socket is DIR/cri.sock.

use std::path::PathBuf;
use std::time::Duration;

use orlop_base::supervise::Ready;
use orlop_cri::Config;
use tokio_util::sync::CancellationToken;

struct Asked {
    config: Config,
    purge: bool,
    import: Option<PathBuf>,
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Asked, String> {
    let mut root = None;
    let mut config = Config::default();
    let mut purge = false;
    let mut import = None;
    let mut cni_bin_dirs = Vec::new();
    while let Some(flag) = args.next() {
        if flag == "--purge" {
            purge = true;
            continue;
        }
        let value = args.next().ok_or_else(|| format!("{flag} needs a value"))?;
        match flag.as_str() {
            "--root" => root = Some(PathBuf::from(value)),
            "--import" => import = Some(value.into()),
            "--monitor" => config.monitor = value.into(),
            "--criu" => config.criu = Some(value.into()),
            "--cni-conf" => config.cni_conf_dir = value.into(),
            "--cni-bin" => cni_bin_dirs.push(value.into()),
            "--cni-timeout" => {
                let seconds = value.parse().map_err(|_| format!("{value} is no number of seconds"))?;
                config.cni_timeout = Duration::from_secs(seconds);
            }
            "--streaming-idle-timeout" => {
                let seconds = value.parse().map_err(|_| format!("{value} is no number of seconds"))?;
                config.streaming_idle_timeout = Duration::from_secs(seconds);
            }
            "--certs-dir" => config.images.certs_dir = Some(value.into()),
            "--cdi-dir" => config.cdi_spec_dirs = vec![value.into()],
            "--nri-socket" => config.nri.get_or_insert_with(orlop_cri::nri_defaults).socket = value.into(),
            "--nri-plugin-dir" => {
                config.nri.get_or_insert_with(orlop_cri::nri_defaults).plugin_dir = value.into()
            }
            "--nri-config-dir" => {
                config.nri.get_or_insert_with(orlop_cri::nri_defaults).config_dir = value.into()
            }
            "--nri-request-timeout" => {
                let millis = value.parse().map_err(|_| format!("{value} is no number of milliseconds"))?;
                config.nri.get_or_insert_with(orlop_cri::nri_defaults).request_timeout =
                    Duration::from_millis(millis);
            }
            "--runtime-handler" => {
                let orlop_cri::Handler(name, runtime) = value.parse()?;
                config.runtimes.insert(name, runtime);
            }
            "--cgroup-parent" => config.default_cgroup_parent = value,
            other => return Err(format!("unknown flag {other}")),
        }
    }
    let root = root.ok_or("--root is missing")?;
    config.listen = root.join("cri.sock");
    config.state_dir = root.join("state");
    config.run_dir = root.join("run");
    config.images_dir = root.join("images");
    config.cni_cache_dir = root.join("cni");
    config.cni_neighbours.registry = Some(root.join("networks"));
    if !cni_bin_dirs.is_empty() {
        config.cni_bin_dirs = cni_bin_dirs;
    }
    Ok(Asked { config, purge, import })
}

#[tokio::main]
async fn main() {
    orlop_base::telemetry::init("info");
    let failed = |text: String| -> ! {
        eprintln!("cri: {text}");
        std::process::exit(1)
    };
    if let Err(e) = orlop_base::failpoint::init_from_env() {
        failed(e);
    }
    if let Err(e) = orlop_base::descriptors::raise() {
        failed(format!("cannot raise the limit of open files: {e}"));
    }
    let Asked { config, purge, import } = parse(std::env::args().skip(1)).unwrap_or_else(|e| failed(e));
    if let Some(archive) = import {
        let imported = async {
            let store = orlop_images::ImageStore::open(&config.images_dir, config.images.clone()).await?;
            let imported = store.import(&archive, None).await;
            store.close(std::time::Duration::from_secs(60)).await;
            imported
        };
        match imported.await {
            Ok(images) => images.iter().for_each(|i| println!("{} {:?}", i.id, i.repo_tags)),
            Err(e) => failed(orlop_base::telemetry::chain(&e)),
        }
        return;
    }
    let done = if purge {
        orlop_cri::purge(config).await
    } else {
        let stop = CancellationToken::new();
        let token = stop.clone();
        // Owned by the runtime, which ends with this program.
        let signal = async move {
            let mut term = match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
                Ok(t) => t,
                Err(e) => return tracing::error!(error = %e, "cannot listen for SIGTERM"),
            };
            tokio::select! {
                _ = term.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
            token.cancel();
        };
        let serve = orlop_cri::run(config, Ready::default(), stop);
        tokio::pin!(serve);
        tokio::select! {
            done = &mut serve => done,
            () = signal => serve.await,
        }
    };
    if let Err(e) = done {
        failed(orlop_base::telemetry::chain(&e));
    }
}
