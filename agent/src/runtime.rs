//! What the runtime says of one pod: sandboxes and containers, newest first.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;
use orlop_proto::cri::{self, ContainerState, PodSandboxState};

use crate::cri::{Cri, Error};

/// Labels that tie runtime objects to pods; upstream's names, so that crictl and log collectors know them.
pub mod labels {
    pub const POD_NAME: &str = "io.kubernetes.pod.name";
    pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
    pub const POD_UID: &str = "io.kubernetes.pod.uid";
    pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";
    pub const HASH: &str = "io.kubernetes.container.hash";
    pub const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
    pub const TERMINATION_PATH: &str = "io.kubernetes.container.terminationMessagePath";
    pub const TERMINATION_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";
    pub const POD_GRACE: &str = "io.kubernetes.pod.terminationGracePeriod";
}

/// A sandbox as last seen.
#[derive(Clone, Debug, PartialEq)]
pub struct Sandbox {
    pub id: String,
    pub attempt: u32,
    pub ready: bool,
    pub created_at: Option<Timestamp>,
    /// Empty for host network.
    pub ips: Vec<IpAddr>,
}

/// Life of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Created,
    Running,
    Exited,
    Unknown,
}

/// A container as last seen.
#[derive(Clone, Debug, PartialEq)]
pub struct Container {
    pub id: String,
    pub sandbox_id: String,
    pub name: String,
    /// The restart count it was created with.
    pub attempt: u32,
    pub state: State,
    pub created_at: Option<Timestamp>,
    pub started_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
    pub exit_code: i32,
    pub reason: String,
    pub message: String,
    pub image: String,
    pub image_id: String,
    pub log_path: String,
    pub hash: String,
    /// Host path of the termination message file.
    pub termination_log: Option<String>,
    /// `FallbackToLogsOnError` was set.
    pub log_fallback: bool,
    /// uid, gid, groups as the runtime reports them.
    pub user: Option<(i64, i64, Vec<i64>)>,
}

/// All of one pod, newest first. Shared between the worker, probes, the node server and collectors.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ObservedPod {
    pub uid: String,
    pub name: String,
    pub namespace: String,
    pub sandboxes: Vec<Sandbox>,
    pub containers: Vec<Container>,
}

impl ObservedPod {
    /// The newest sandbox.
    pub fn sandbox(&self) -> Option<&Sandbox> {
        self.sandboxes.first()
    }

    /// The newest sandbox if it runs.
    pub fn ready_sandbox(&self) -> Option<&Sandbox> {
        self.sandbox().filter(|s| s.ready)
    }

    /// The newest container of a name.
    pub fn container(&self, name: &str) -> Option<&Container> {
        self.containers.iter().find(|c| c.name == name)
    }

    /// The one before the newest of a name.
    pub fn previous_container(&self, name: &str) -> Option<&Container> {
        self.containers.iter().filter(|c| c.name == name).nth(1)
    }

    pub fn running(&self) -> impl Iterator<Item = &Container> {
        self.containers.iter().filter(|c| c.state == State::Running)
    }
}

/// CRI's nanoseconds since 1970; zero means never.
pub fn timestamp(nanos: i64) -> Option<Timestamp> {
    if nanos <= 0 { None } else { Timestamp::from_nanosecond(nanos as i128).ok() }
}

fn state(s: i32) -> State {
    match ContainerState::try_from(s) {
        Ok(ContainerState::ContainerCreated) => State::Created,
        Ok(ContainerState::ContainerRunning) => State::Running,
        Ok(ContainerState::ContainerExited) => State::Exited,
        _ => State::Unknown,
    }
}

fn container(sandbox_id: String, s: cri::ContainerStatus) -> Container {
    let meta = s.metadata.unwrap_or_default();
    let note = |k: &str| s.annotations.get(k).cloned().unwrap_or_default();
    let path = note(labels::TERMINATION_PATH);
    let termination_log = s.mounts.iter().find(|m| m.container_path == path).map(|m| m.host_path.clone());
    let user = s.user.and_then(|u| u.linux).map(|u| (u.uid, u.gid, u.supplemental_groups));
    Container {
        sandbox_id,
        name: s.labels.get(labels::CONTAINER_NAME).cloned().unwrap_or(meta.name),
        attempt: note(labels::RESTART_COUNT).parse().unwrap_or(meta.attempt),
        state: state(s.state),
        created_at: timestamp(s.created_at),
        started_at: timestamp(s.started_at),
        finished_at: timestamp(s.finished_at),
        exit_code: s.exit_code,
        hash: note(labels::HASH),
        log_fallback: note(labels::TERMINATION_POLICY) == "FallbackToLogsOnError",
        termination_log,
        image: s.image.map(|i| i.image).unwrap_or_default(),
        image_id: if s.image_ref.is_empty() { s.image_id } else { s.image_ref },
        log_path: s.log_path,
        reason: s.reason,
        message: s.message,
        id: s.id,
        user,
    }
}

fn sandbox_ips(status: &cri::PodSandboxStatus) -> Vec<IpAddr> {
    let Some(net) = &status.network else { return Vec::new() };
    let more = net.additional_ips.iter().map(|i| i.ip.as_str());
    std::iter::once(net.ip.as_str()).chain(more).filter_map(|ip| ip.parse().ok()).collect()
}

/// At most this much of a termination message is kept.
const MAX_MESSAGE: usize = 4096;
/// Of a log at most this much and so many lines serve as a message.
const MAX_LOG: usize = 2048;
const MAX_LINES: usize = 80;

/// What a container left to say: its termination message file, else (where asked for and it failed) the end of its
/// log, else what the runtime says.
async fn last_words(c: &Container) -> String {
    let tail = |text: &[u8], limit: usize| {
        String::from_utf8_lossy(&text[text.len().saturating_sub(limit)..]).into_owned()
    };
    if let Some(path) = &c.termination_log
        && let Ok(text) = tokio::fs::read(path).await
        && !text.is_empty()
    {
        // The beginning counts, as upstream has it.
        return String::from_utf8_lossy(&text[..text.len().min(MAX_MESSAGE)]).into_owned();
    }
    if c.log_fallback
        && c.exit_code != 0
        && let Ok(log) = tokio::fs::read(&c.log_path).await
    {
        let lines: Vec<&str> = std::str::from_utf8(&log[log.len().saturating_sub(64 << 10)..])
            .unwrap_or_default()
            .lines()
            // The CRI log format: time, stream, tag, text.
            .filter_map(|l| l.splitn(4, ' ').nth(3))
            .collect();
        let last = lines[lines.len().saturating_sub(MAX_LINES)..].join("\n");
        return tail(last.as_bytes(), MAX_LOG);
    }
    c.message.clone()
}

/// Asks the runtime for all it has of one pod. Finished containers and stopped sandboxes do not change any more, so
/// they are taken over from `last`.
pub async fn observe(cri: &Cri, uid: &str, last: &ObservedPod) -> Result<ObservedPod, Error> {
    let of_pod: HashMap<String, String> = HashMap::from([(labels::POD_UID.to_owned(), uid.to_owned())]);
    let sandbox_filter = cri::PodSandboxFilter { label_selector: of_pod.clone(), ..Default::default() };
    let container_filter = cri::ContainerFilter { label_selector: of_pod, ..Default::default() };
    // Containers first: one that is listed has its sandbox in the later list, unless it was removed in between.
    let (containers, sandboxes) = tokio::try_join!(
        cri.list_containers(cri::ListContainersRequest { filter: Some(container_filter) }),
        cri.list_pod_sandbox(cri::ListPodSandboxRequest { filter: Some(sandbox_filter) }),
    )?;
    let known_sandboxes: HashMap<&str, &Sandbox> =
        last.sandboxes.iter().map(|s| (s.id.as_str(), s)).collect();
    let known: HashMap<&str, &Container> = last.containers.iter().map(|c| (c.id.as_str(), c)).collect();
    let mut pod = ObservedPod {
        uid: uid.to_owned(),
        name: last.name.clone(),
        namespace: last.namespace.clone(),
        ..Default::default()
    };
    for s in sandboxes.items {
        let meta = s.metadata.unwrap_or_default();
        (pod.name, pod.namespace) = (meta.name, meta.namespace);
        let ready = s.state == PodSandboxState::SandboxReady as i32;
        let ips = match known_sandboxes.get(s.id.as_str()) {
            Some(old) if !ready || !old.ips.is_empty() => old.ips.clone(),
            _ => {
                let request = cri::PodSandboxStatusRequest { pod_sandbox_id: s.id.clone(), verbose: false };
                match cri.pod_sandbox_status(request).await {
                    Ok(r) => r.status.as_ref().map(sandbox_ips).unwrap_or_default(),
                    Err(e) if e.is_not_found() => continue,
                    Err(e) => return Err(e),
                }
            }
        };
        pod.sandboxes.push(Sandbox {
            id: s.id,
            attempt: meta.attempt,
            ready,
            created_at: timestamp(s.created_at),
            ips,
        });
    }
    for c in containers.containers {
        match known.get(c.id.as_str()) {
            Some(old) if old.state == State::Exited => pod.containers.push((*old).clone()),
            _ => {
                let request = cri::ContainerStatusRequest { container_id: c.id.clone(), verbose: false };
                match cri.container_status(request).await {
                    Ok(r) => {
                        let Some(status) = r.status else { continue };
                        let mut seen = container(c.pod_sandbox_id, status);
                        if seen.state == State::Exited {
                            seen.message = last_words(&seen).await;
                        }
                        pod.containers.push(seen);
                    }
                    Err(e) if e.is_not_found() => {}
                    Err(e) => return Err(e),
                }
            }
        }
    }
    pod.sandboxes.sort_by_key(|s| std::cmp::Reverse((s.created_at, s.attempt)));
    pod.containers.sort_by_key(|c| std::cmp::Reverse((c.created_at, c.attempt)));
    Ok(pod)
}

/// An observed pod that several read.
pub type SharedPod = Arc<ObservedPod>;
