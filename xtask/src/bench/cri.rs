//! Pods over CRI, beside Debian's containerd and runc: one at a time, by several clients, all at once, and what they hold in memory.
//! Each side has its own network plugin: ours, and the reference bridge.

use std::time::{Duration, Instant};

use futures::future::join_all;
use orlop_proto::cri;

use super::node::{Network, Node, busybox_image};
use super::table::{Goal, Table, Times, Unit};
use super::{Options, Result, block_on, process, text};

const IMAGE: &str = "orlop.local/bench-busybox:1";
const CLIENTS: usize = 4;
/// Pods while the server's memory is weighed first.
const FEW: usize = 10;

pub fn run(options: &Options) -> Result<Vec<Table>> {
    block_on(async {
        let dir = tempfile::tempdir().map_err(text)?;
        let archive = busybox_image(dir.path(), IMAGE)?;
        let ours = Node::orlop(&[&archive]).await?;
        let theirs = Node::containerd(&[&archive], IMAGE, None).await?;
        let tables = measure(&ours, theirs.as_ref(), options).await;
        ours.end().await?;
        if let Some(theirs) = &theirs {
            theirs.end().await?;
        }
        tables
    })
}

async fn measure(ours: &Node, theirs: Option<&Node>, options: &Options) -> Result<Vec<Table>> {
    let counterpart = theirs.map(|_| "containerd + runc");
    let mut tables = vec![one_at_a_time(ours, theirs, counterpart, options.pods).await?];
    let (a, b) = (clients(ours, options.pods).await?, both(theirs, |n| clients(n, options.pods)).await?);
    let mut table = Table::new(format!("{CLIENTS} clients at once, {} pods each", options.pods), counterpart);
    table.row("pods made and removed", Unit::PerSecond, a.0, b.as_ref().map(|b| b.0), None);
    table.times("Run + Create + Start", &a.1, b.as_ref().map(|b| &b.1), [None, None]);
    tables.push(table);
    let (a, b) = (held(ours, options.held).await?, both(theirs, |n| held(n, options.held)).await?);
    let mut table = Table::new("memory (PSS)", counterpart);
    let few = FEW.min(options.held);
    for (i, what, goal) in [
        (0, "server, no pods".to_owned(), None),
        (1, format!("server, {few} pods"), Some(Goal::Figure(20.0))),
        (2, format!("server, {} pods", options.held), Some(Goal::Figure(20.0))),
        (3, "per pod: monitor, shim".to_owned(), Some(Goal::Figure(1.0))),
    ] {
        table.row(what, Unit::MiB, a[i], b.map(|b| b[i]), goal);
    }
    tables.push(table);
    let (a, b) = (burst(ours, options.burst).await?, both(theirs, |n| burst(n, options.burst)).await?);
    let mut table = Table::new(format!("{} pods at once", options.burst), counterpart);
    table.row("pods started", Unit::PerSecond, a.rate, b.as_ref().map(|b| b.rate), None);
    let failed = b.as_ref().map(|b| b.failed as f64);
    table.row("calls failed", Unit::Count, a.failed as f64, failed, Some(Goal::Figure(0.0)));
    table.times("Run + Create + Start", &a.times, b.as_ref().map(|b| &b.times), [None, None]);
    tables.push(table);
    Ok(tables)
}

async fn both<'a, T, F>(theirs: Option<&'a Node>, work: impl FnOnce(&'a Node) -> F) -> Result<Option<T>>
where
    F: Future<Output = Result<T>>,
{
    match theirs {
        Some(node) => work(node).await.map(Some),
        None => Ok(None),
    }
}

/// A pod with one container, and what its three calls took.
struct Started {
    pod: String,
    container: String,
    steps: [Duration; 3],
}

async fn start(node: &Node, name: &str) -> Result<Started> {
    let mut client = node.runtime();
    let config = node.pod(name, Network::Own);
    let begun = Instant::now();
    let request = cri::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
    let pod = client.run_pod_sandbox(request).await.map_err(text)?.into_inner().pod_sandbox_id;
    let run = begun.elapsed();
    let container = cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: "c".into(), attempt: 0 }),
        image: Some(cri::ImageSpec { image: IMAGE.into(), ..Default::default() }),
        command: vec!["/bin/sleep".into(), "3600".into()],
        log_path: "c.log".into(),
        linux: Some(cri::LinuxContainerConfig {
            security_context: Some(cri::LinuxContainerSecurityContext {
                namespace_options: config
                    .linux
                    .as_ref()
                    .and_then(|l| l.security_context.as_ref()?.namespace_options.clone()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let request = cri::CreateContainerRequest {
        pod_sandbox_id: pod.clone(),
        config: Some(container),
        sandbox_config: Some(config),
    };
    let container = client.create_container(request).await.map_err(text)?.into_inner().container_id;
    let create = begun.elapsed() - run;
    let request = cri::StartContainerRequest { container_id: container.clone() };
    client.start_container(request).await.map_err(text)?;
    Ok(Started { pod, container, steps: [run, create, begun.elapsed() - run - create] })
}

async fn exec_true(node: &Node, container: &str) -> Result<Duration> {
    let begun = Instant::now();
    let request = cri::ExecSyncRequest {
        container_id: container.to_owned(),
        cmd: vec!["/bin/true".into()],
        timeout: 30,
    };
    let answer = node.runtime().exec_sync(request).await.map_err(text)?.into_inner();
    match answer.exit_code {
        0 => Ok(begun.elapsed()),
        code => Err(format!("true exits with {code}")),
    }
}

/// What a pod's whole life took, by step.
#[derive(Default)]
struct Cycles {
    steps: [Times; 3],
    all: Times,
    exec: Times,
    stop: Times,
}

impl Cycles {
    async fn one(&mut self, node: &Node, name: &str) -> Result {
        let started = start(node, name).await?;
        for (times, step) in self.steps.iter_mut().zip(started.steps) {
            times.add(step);
        }
        self.all.add(started.steps.iter().sum());
        self.exec.add(exec_true(node, &started.container).await?);
        let begun = Instant::now();
        node.remove_pod(&started.pod).await?;
        self.stop.add(begun.elapsed());
        Ok(())
    }
}

/// The sides take turns, so that both meet the same machine.
async fn one_at_a_time(
    ours: &Node,
    theirs: Option<&Node>,
    counterpart: Option<&str>,
    pods: usize,
) -> Result<Table> {
    let (mut a, mut b) = (Cycles::default(), Cycles::default());
    // What the first pod alone pays for.
    Cycles::default().one(ours, "warm").await?;
    if let Some(theirs) = theirs {
        Cycles::default().one(theirs, "warm").await?;
    }
    for i in 0..pods {
        a.one(ours, &format!("one-{i}")).await?;
        if let Some(theirs) = theirs {
            b.one(theirs, &format!("one-{i}")).await?;
        }
    }
    let mut table = Table::new(format!("{pods} pods one after another"), counterpart);
    let there = |times| theirs.map(|_| times);
    let goals = [Some(Goal::Times(10.0)), Some(Goal::Figure(40.0))];
    table.times("Run + Create + Start", &a.all, there(&b.all), goals);
    for (i, name) in ["RunPodSandbox", "CreateContainer", "StartContainer"].into_iter().enumerate() {
        table.times(name, &a.steps[i], there(&b.steps[i]), [None, None]);
    }
    table.times("ExecSync true", &a.exec, there(&b.exec), [Some(Goal::Figure(4.0)), None]);
    table.times("Stop + Remove", &a.stop, there(&b.stop), [Some(Goal::Figure(13.0)), None]);
    Ok(table)
}

/// Whole lives per second, and times to start.
async fn clients(node: &Node, pods: usize) -> Result<(f64, Times)> {
    let begun = Instant::now();
    let lives = join_all((0..CLIENTS).map(|client| async move {
        let mut cycles = Cycles::default();
        for i in 0..pods {
            cycles.one(node, &format!("client-{client}-{i}")).await?;
        }
        Ok(cycles.all)
    }))
    .await;
    let rate = (CLIENTS * pods) as f64 / begun.elapsed().as_secs_f64();
    let mut all = Times::default();
    for times in lives.into_iter().collect::<Result<Vec<Times>>>()? {
        all.extend(times);
    }
    Ok((rate, all))
}

/// MiB of the server with no pods, few and all of them, and of what lives in each pod.
async fn held(node: &Node, pods: usize) -> Result<[f64; 4]> {
    let mut found = [process::pss(node.pid()), 0.0, 0.0, 0.0];
    let mut ids = Vec::new();
    for i in 0..pods {
        ids.push(start(node, &format!("held-{i}")).await?.pod);
        if i + 1 == FEW.min(pods) {
            settle().await;
            found[1] = process::pss(node.pid());
        }
    }
    settle().await;
    found[2] = process::pss(node.pid());
    let (each, count) = process::mean_pss(&node.shims());
    if count != pods {
        return Err(format!("{count} monitors or shims live in {pods} pods"));
    }
    found[3] = each;
    for id in ids {
        node.remove_pod(&id).await?;
    }
    Ok(found)
}

/// What a start needed for a moment is given back.
async fn settle() {
    tokio::time::sleep(Duration::from_secs(3)).await;
}

struct Burst {
    rate: f64,
    failed: usize,
    times: Times,
}

async fn burst(node: &Node, pods: usize) -> Result<Burst> {
    let begun = Instant::now();
    let names: Vec<String> = (0..pods).map(|i| format!("burst-{i}")).collect();
    let started = join_all(names.iter().map(|name| start(node, name))).await;
    let rate = pods as f64 / begun.elapsed().as_secs_f64();
    let mut times = Times::default();
    let mut failed = 0;
    for pod in started {
        match pod {
            Ok(p) => times.add(p.steps.iter().sum()),
            Err(e) => {
                failed += 1;
                eprintln!("bench: a pod among {pods} at once: {e}");
            }
        }
    }
    node.end().await?;
    Ok(Burst { rate, failed, times })
}
