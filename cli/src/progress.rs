//! How far a cluster is that `orlop up --detach` has started, and what holds it up.

use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Event, Node, NodeCondition};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::ListParams;

use crate::Failure;
use crate::args::UpArgs;

/// What has been seen of a cluster that starts.
#[derive(Default, PartialEq)]
pub struct State {
    /// The API server answers.
    api: bool,
    /// The node, once it is Ready.
    node: Option<String>,
    /// Deployments: (name, available, wanted).
    deployments: Vec<(String, i32, i32)>,
    /// Deployments that the manifests name.
    manifests: usize,
}

impl State {
    pub fn is_done(&self) -> bool {
        let ready = self.deployments.iter().all(|(_, a, w)| a >= w);
        self.api && self.node.is_some() && self.deployments.len() >= self.manifests && ready
    }

    /// What is waited for.
    pub fn describe(&self) -> String {
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

/// Says each step once.
#[derive(Default)]
pub struct Progress {
    shown: String,
    node_shown: bool,
}

impl Progress {
    pub fn show(&mut self, s: &State) -> Result<(), Failure> {
        if let (Some(node), false) = (&s.node, self.node_shown) {
            crate::say(format_args!("orlop: node {node} is Ready"))?;
            self.node_shown = true;
        }
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

/// Asks the API server how far it is.
pub async fn look(args: &UpArgs, node: &str) -> State {
    let dir = args.server.manifests.clone().unwrap_or_else(|| args.server.data_dir.join("server/manifests"));
    let mut state = State { manifests: deployments_in(&dir), ..Default::default() };
    let Ok(client) = orlop_client::client_from_kubeconfig(&args.server.write_kubeconfig).await else {
        return state;
    };
    let nodes: Api<Node> = Api::all(client.clone());
    let Ok(Ok(found)) = tokio::time::timeout(Duration::from_secs(2), nodes.get_opt(node)).await else {
        return state;
    };
    state.api = true;
    // What an earlier run wrote of the node says nothing before this run's agent has registered it.
    if !crate::up::started_file(args).exists() {
        return state;
    }
    let is_ready = |n: &Node| {
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

/// Why it is not ready: what the node says of itself, or the newest warning about any object since `began`.
pub async fn trouble(args: &UpArgs, node: &str, state: &State, began: Timestamp) -> Option<String> {
    if !state.api {
        return None;
    }
    let client = orlop_client::client_from_kubeconfig(&args.server.write_kubeconfig).await.ok()?;
    let asked = async {
        let found = Api::<Node>::all(client.clone()).get_opt(node).await.ok()??;
        if let Some(said) = node_trouble(found.status?.conditions?, state.node.is_some()) {
            return Some(said);
        }
        let warnings = ListParams::default().fields("type=Warning");
        let events = Api::<Event>::all(client).list(&warnings).await.ok()?.items;
        newest(events, began).map(|e| in_words(&e))
    };
    tokio::time::timeout(Duration::from_secs(2), asked).await.ok()?
}

/// What keeps pods off the node, in its own words.
fn node_trouble(conditions: Vec<NodeCondition>, is_ready: bool) -> Option<String> {
    let wrong = |c: &NodeCondition| match is_ready {
        true => c.type_ != "Ready" && c.status == "True",
        false => c.type_ == "Ready",
    };
    conditions.into_iter().find(wrong)?.message
}

fn seen(e: &Event) -> Option<Timestamp> {
    let series = e.series.as_ref().and_then(|s| s.last_observed_time.as_ref()).map(|t| t.0);
    series.or(e.last_timestamp.as_ref().map(|t| t.0)).or(e.event_time.as_ref().map(|t| t.0))
}

fn newest(events: Vec<Event>, began: Timestamp) -> Option<Event> {
    let in_this_run = events.into_iter().filter_map(|e| Some((seen(&e)?, e))).filter(|(t, _)| *t >= began);
    in_this_run.max_by_key(|(t, _)| *t).map(|(_, e)| e)
}

/// An event on one line, as far as one wants to read it there.
fn in_words(e: &Event) -> String {
    let about = &e.involved_object;
    let text = |t: &Option<String>| t.clone().unwrap_or_default();
    let message: String = text(&e.message).split_whitespace().collect::<Vec<_>>().join(" ");
    let short: String = message.chars().take(300).collect();
    let kind = text(&about.kind).to_lowercase();
    format!("{kind} {}/{}: {}: {short}", text(&about.namespace), text(&about.name), text(&e.reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, second: i64, message: &str) -> Event {
        let mut e =
            Event { message: Some(message.into()), reason: Some("Failed".into()), ..Default::default() };
        e.involved_object.kind = Some("Pod".into());
        e.involved_object.namespace = Some("demo".into());
        e.involved_object.name = Some(name.into());
        e.last_timestamp =
            Timestamp::from_second(second).ok().map(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time);
        e
    }

    #[test]
    fn the_newest_warning_of_this_run_is_told_on_one_line() {
        let began = Timestamp::from_second(100).unwrap();
        let all = || vec![event("old", 99, "x"), event("b", 102, "no\n  such image"), event("a", 101, "y")];
        assert_eq!(in_words(&newest(all(), began).unwrap()), "pod demo/b: Failed: no such image");
        assert!(newest(all(), Timestamp::from_second(103).unwrap()).is_none());
    }

    #[test]
    fn what_the_node_lacks_goes_before_events() {
        let condition = |kind: &str, status: &str| NodeCondition {
            type_: kind.into(),
            status: status.into(),
            message: Some(format!("{kind} {status}")),
            ..Default::default()
        };
        let all = |disk, ready| vec![condition("DiskPressure", disk), condition("Ready", ready)];
        assert_eq!(node_trouble(all("True", "True"), true).unwrap(), "DiskPressure True");
        assert_eq!(node_trouble(all("False", "True"), true), None);
        assert_eq!(node_trouble(all("True", "False"), false).unwrap(), "Ready False");
    }

    #[test]
    fn what_is_waited_for() {
        let mut s = State { manifests: 1, ..Default::default() };
        assert_eq!(s.describe(), "API server");
        s.api = true;
        assert_eq!(s.describe(), "node");
        s.node = Some("vm".into());
        assert_eq!((s.describe(), s.is_done()), ("manifests on vm".into(), false));
        s.deployments = vec![("web".into(), 1, 2)];
        assert_eq!((s.describe(), s.is_done()), ("web 1/2".into(), false));
        s.deployments[0].1 = 2;
        assert!(s.is_done());
    }
}
