//! Liveness, readiness and startup probes: a task per probe of each running container.

pub mod exec;
pub mod grpc;
pub mod http;
pub mod tcp;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use prometheus_client::encoding::EncodeLabelSet;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};

use crate::context::Context;
use crate::pods::plan::is_started;
use crate::pods::state::Memory;
use crate::pods::{find_container, long_running};
use crate::runtime::{ObservedPod, State};

/// What a probe is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    Startup,
    Readiness,
    Liveness,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Startup => "Startup",
            Kind::Readiness => "Readiness",
            Kind::Liveness => "Liveness",
        }
    }
}

/// Labels of `prober_probe_total`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ProbeLabels {
    pub probe_type: String,
    pub result: String,
    pub container: String,
    pub pod: String,
    pub namespace: String,
    pub pod_uid: String,
}

/// A probe's verdict changed: its threshold was reached.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    pub container_id: String,
    pub kind: Kind,
    pub success: bool,
}

/// Counts results in a row; says when the verdict is reached. Pure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counter {
    success_threshold: u32,
    failure_threshold: u32,
    last: Option<bool>,
    run: u32,
}

impl Counter {
    pub fn new(probe: &Probe) -> Counter {
        let at_least_one = |v: Option<i32>, default: u32| v.filter(|v| *v > 0).map_or(default, |v| v as u32);
        Counter {
            success_threshold: at_least_one(probe.success_threshold, 1),
            failure_threshold: at_least_one(probe.failure_threshold, 3),
            last: None,
            run: 0,
        }
    }

    /// Takes a result; gives the verdict once the run of equal results reaches its threshold.
    pub fn take(&mut self, success: bool) -> Option<bool> {
        if self.last == Some(success) {
            self.run = self.run.saturating_add(1);
        } else {
            self.last = Some(success);
            self.run = 1;
        }
        let threshold = if success { self.success_threshold } else { self.failure_threshold };
        (self.run >= threshold).then_some(success)
    }
}

/// A port by number or by name of one of the container's ports.
pub fn port_of(port: &IntOrString, c: &Container) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(n) => Some(*n),
        IntOrString::String(s) => s.parse().ok().or_else(|| {
            c.ports.iter().flatten().find(|p| p.name.as_deref() == Some(s)).map(|p| p.container_port)
        }),
    };
    let number = number.and_then(|n| u16::try_from(n).ok()).filter(|n| *n > 0);
    number.ok_or_else(|| format!("couldn't find port {port:?} in container {}", c.name))
}

/// The probes of one pod; they end with it.
pub struct Probes {
    ctx: Context,
    send: mpsc::Sender<Outcome>,
    tasks: JoinSet<()>,
    running: HashMap<(String, Kind), AbortHandle>,
}

impl Probes {
    pub fn new(ctx: Context, send: mpsc::Sender<Outcome>) -> Probes {
        Probes { ctx, send, tasks: JoinSet::new(), running: HashMap::new() }
    }

    /// Starts and ends probe tasks so that they fit what runs. Liveness and readiness wait for the startup probe.
    pub fn follow(&mut self, pod: &Arc<Pod>, observed: &Arc<ObservedPod>, memory: &Memory) {
        let mut wanted: Vec<(String, Kind, Probe, Container)> = Vec::new();
        // While a pod ends nobody needs to know any more whether it lives; readiness still matters to clients.
        let ending = memory.is_ending();
        for c in long_running(pod) {
            let Some(run) = observed.container(&c.name).filter(|r| r.state == State::Running) else {
                continue;
            };
            let started = is_started(c, run, memory);
            let all = [
                (Kind::Startup, &c.startup_probe, !started && !ending),
                (Kind::Readiness, &c.readiness_probe, started),
                (Kind::Liveness, &c.liveness_probe, started && !ending),
            ];
            for (kind, probe, on) in all {
                if let (Some(p), true) = (probe, on && memory.hook_pending.as_deref() != Some(&c.name)) {
                    wanted.push((run.id.clone(), kind, p.clone(), c.clone()));
                }
            }
        }
        while self.tasks.try_join_next().is_some() {}
        // A probe must not outlive its container.
        self.running.retain(|(id, kind), task| {
            let stays = wanted.iter().any(|(i, k, ..)| i == id && k == kind);
            if !stays {
                task.abort();
            }
            stays
        });
        for (id, kind, probe, container) in wanted {
            let key = (id.clone(), kind);
            if self.running.contains_key(&key) {
                continue;
            }
            let run = observed.containers.iter().find(|r| r.id == id);
            let host_network = pod.spec.as_ref().and_then(|s| s.host_network) == Some(true);
            let host = match observed.sandbox() {
                _ if host_network => self.ctx.node.host_ips().first().map(ToString::to_string),
                Some(s) => s.ips.first().map(ToString::to_string),
                None => None,
            };
            let started_at = run.and_then(|r| r.started_at).unwrap_or_else(jiff::Timestamp::now);
            let view = memory.probes.get(&id).copied().unwrap_or_default();
            let known = match kind {
                Kind::Startup => view.started,
                Kind::Readiness => view.ready,
                Kind::Liveness => view.live,
            };
            let task = Task {
                ctx: self.ctx.clone(),
                pod: pod.clone(),
                container,
                probe,
                kind,
                id,
                host: host.unwrap_or_default(),
                started_at,
                known,
                send: self.send.clone(),
            };
            self.running.insert(key, self.tasks.spawn(task.run()));
        }
    }
}

struct Task {
    ctx: Context,
    pod: Arc<Pod>,
    container: Container,
    probe: Probe,
    kind: Kind,
    id: String,
    host: String,
    started_at: jiff::Timestamp,
    /// The verdict kept from before a restart of the agent.
    known: Option<bool>,
    send: mpsc::Sender<Outcome>,
}

fn seconds(v: Option<i32>, default: u64) -> Duration {
    Duration::from_secs(v.filter(|v| *v > 0).map_or(default, |v| v as u64))
}

impl Drop for Task {
    fn drop(&mut self) {
        // Without this every pod that ever was would stay in the metrics.
        for success in [true, false] {
            self.ctx.metrics.probes.remove(&self.labels(success));
        }
    }
}

impl Task {
    async fn run(self) {
        let period = seconds(self.probe.period_seconds, 10);
        let delay = seconds(self.probe.initial_delay_seconds, 0);
        let age =
            Duration::try_from(jiff::Timestamp::now().duration_since(self.started_at)).unwrap_or_default();
        tokio::time::sleep(delay.saturating_sub(age)).await;
        // After a restart of the agent all probes of a node would run at once.
        if self.known.is_some() {
            tokio::time::sleep(period.mul_f64(rand::random_range(0.0..1.0))).await;
        }
        let mut counter = Counter::new(&self.probe);
        let mut reported = self.known;
        let mut ticks = tokio::time::interval(period);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // A container that comes up is worth looking at more often than once a period, until it answers.
        let mut quick = Duration::from_millis(50);
        loop {
            let eager = self.kind != Kind::Liveness && reported != Some(true) && quick < period;
            if eager && counter.last.is_some() {
                tokio::time::sleep(quick).await;
                quick *= 2;
            } else {
                ticks.tick().await;
            }
            let result = self.attempt().await;
            let success = result.is_ok();
            self.ctx.metrics.probes.get_or_create(&self.labels(success)).inc();
            if let Err(message) = &result {
                // Quick looks at a container that comes up are no failures yet.
                if eager && counter.last.is_some() {
                    continue;
                }
                let text = format!("{} probe failed: {message}", self.kind.as_str());
                let kind = find_container(&self.pod, &self.container.name)
                    .map_or(crate::pods::ContainerKind::Regular, |f| f.1);
                self.ctx.events.container_warning(&self.pod, (&self.container.name, kind), "Unhealthy", text);
            }
            let verdict = counter.take(success);
            if let Some(v) = verdict
                && reported != Some(v)
            {
                reported = Some(v);
                let outcome = Outcome { container_id: self.id.clone(), kind: self.kind, success: v };
                if self.send.send(outcome).await.is_err() {
                    return;
                }
            }
        }
    }

    fn labels(&self, success: bool) -> ProbeLabels {
        let m = &self.pod.metadata;
        ProbeLabels {
            probe_type: self.kind.as_str().to_owned(),
            result: if success { "successful" } else { "failed" }.to_owned(),
            container: self.container.name.clone(),
            pod: m.name.clone().unwrap_or_default(),
            namespace: m.namespace.clone().unwrap_or_default(),
            pod_uid: m.uid.clone().unwrap_or_default(),
        }
    }

    async fn attempt(&self) -> Result<(), String> {
        let timeout = seconds(self.probe.timeout_seconds, 1);
        let p = &self.probe;
        if let Some(e) = &p.exec {
            return exec::run(&self.ctx, &self.id, e.command.clone().unwrap_or_default(), timeout).await;
        }
        if let Some(h) = &p.http_get {
            let request = http::Request::from_action(h, &self.host, &self.container)?;
            return http::get(&request, timeout).await.map(|_| ());
        }
        if let Some(t) = &p.tcp_socket {
            let port = port_of(&t.port, &self.container)?;
            let host = t.host.clone().filter(|h| !h.is_empty()).unwrap_or_else(|| self.host.clone());
            return tcp::connect(&host, port, timeout).await;
        }
        if let Some(g) = &p.grpc {
            let port = u16::try_from(g.port).map_err(|_| format!("{} is no port", g.port))?;
            return grpc::check(&self.host, port, g.service.clone().unwrap_or_default(), timeout).await;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds() {
        let p = Probe { success_threshold: Some(2), failure_threshold: Some(3), ..Default::default() };
        let mut c = Counter::new(&p);
        let seen: Vec<Option<bool>> =
            [true, true, false, false, true, false, false, false, false].map(|r| c.take(r)).into();
        let (y, n) = (Some(true), Some(false));
        assert_eq!(seen, [None, y, None, None, None, None, None, n, n]);
    }

    #[test]
    fn ports_by_name_and_number() {
        let c: Container = serde_json::from_value(
            serde_json::json!({"name": "c", "ports": [{"name": "web", "containerPort": 8080}]}),
        )
        .unwrap();
        assert_eq!(port_of(&IntOrString::String("web".into()), &c), Ok(8080));
        assert_eq!(port_of(&IntOrString::Int(70), &c), Ok(70));
        assert_eq!(port_of(&IntOrString::String("81".into()), &c), Ok(81));
        assert!(port_of(&IntOrString::String("none".into()), &c).is_err());
        assert!(port_of(&IntOrString::Int(0), &c).is_err());
    }
}
