//! `orlop server`: API server, scheduler and controllers in one process, talking over the API.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::time::Duration;

use orlop_apiserver::pki::Pki;
use orlop_base::supervise::{Ready, TaskGroup};
use tokio_util::sync::CancellationToken;

use crate::Failure;
use crate::args::ServerArgs;
use crate::values;

/// How long the parts get to end.
const DRAIN: Duration = Duration::from_secs(10);

pub async fn run(args: ServerArgs) -> Result<(), Failure> {
    let stop = crate::shutdown::on_signal()?;
    let tasks = TaskGroup::new(&stop);
    if let Err(e) = start(&args, &tasks).await {
        tasks.stop_token().cancel();
        return Err(tasks.run_until_stopped(DRAIN).await.err().map_or(e, Into::into));
    }
    Ok(tasks.run_until_stopped(DRAIN).await?)
}

/// The address of the interface with the default route: what others reach this machine under. No packet is sent.
pub fn default_address() -> IpAddr {
    let local = || {
        let s = UdpSocket::bind("0.0.0.0:0").ok()?;
        s.connect("198.51.100.1:9").ok()?;
        Some(s.local_addr().ok()?.ip())
    };
    local().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
}

pub fn config(args: &ServerArgs) -> orlop_apiserver::Config {
    let mut c = orlop_apiserver::Config::new(args.data_dir.clone());
    c.listen = args.listen;
    c.advertise_address = args.advertise_address.unwrap_or_else(|| match args.listen.ip() {
        ip if ip.is_unspecified() => default_address(),
        ip => ip,
    });
    c.service_cidr = args.service_cidr;
    c.cluster_domain = args.cluster_domain.clone();
    c.cert_names = args.tls_sans.clone();
    c.admin_kubeconfig = args.write_kubeconfig.clone();
    c
}

/// Starts the control plane in `tasks` and returns its key material once the API is served and the controllers run.
pub async fn start(args: &ServerArgs, tasks: &TaskGroup) -> Result<Pki, Failure> {
    values::apart(args.service_cidr, args.cluster_cidr)?;
    let config = config(args);
    let stop = tasks.stop_token();
    let ready = Ready::default();
    tasks.spawn_essential("API server", orlop_apiserver::run(config.clone(), ready.clone(), stop.clone()));
    wait(&ready, &stop, "the API server did not start").await?;
    let pki = Pki::open(&config.pki_dir(), &config.server_names())?;

    let client = orlop_client::client_from_kubeconfig(&config.kubeconfig("scheduler")).await?;
    let scheduler = orlop_scheduler::Config {
        client,
        scheduler_name: "default-scheduler".into(),
        seed: None,
        leader_elect: None,
    };
    let scheduling = Ready::default();
    tasks.spawn_essential("scheduler", orlop_scheduler::run(scheduler, scheduling.clone(), stop.clone()));

    let client = orlop_client::client_from_kubeconfig(&config.kubeconfig("controller-manager")).await?;
    let controllers = orlop_controllers::Config {
        client,
        root_ca: pki.ca.cert_pem.clone(),
        cluster_cidrs: vec![args.cluster_cidr],
        node_prefix: values::NODE_PREFIX,
        manifests: Some(args.manifests.clone().unwrap_or_else(|| args.data_dir.join("server/manifests"))),
        leader_elect: None,
    };
    let controlling = Ready::default();
    tasks.spawn_essential(
        "controllers",
        orlop_controllers::run(controllers, controlling.clone(), stop.clone()),
    );
    wait(&scheduling, &stop, "the scheduler did not start").await?;
    wait(&controlling, &stop, "the controllers did not start").await?;
    Ok(pki)
}

/// Waits for a part to be ready; the error is for when the group stops before.
pub async fn wait(ready: &Ready, stop: &CancellationToken, what: &str) -> Result<(), Failure> {
    tokio::select! {
        () = ready.wait() => Ok(()),
        () = stop.cancelled() => Err(what.into()),
    }
}
