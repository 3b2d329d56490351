//! Deletes what has lost its owners, and carries out foreground and orphaning deletion.
//!
//! A graph of who owns whom is fed by metadata-only watches of every kind that can be deleted; kinds that come later
//! (custom resources) are found by a periodic discovery. Before anything is deleted, the server is asked whether the
//! owner is really gone: a stale graph must not cost anybody an object.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::{ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, Preconditions};
use kube::core::PartialObjectMeta;
use kube::discovery::{Discovery, Scope, verbs};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use orlop_client::{Outcome, Queue};
use parking_lot::Mutex;

use crate::runtime::{Context, Result, has_code, unless_gone};

const FOREGROUND: &str = "foregroundDeletion";
const ORPHAN: &str = "orphan";
/// How often new kinds are looked for.
const DISCOVERY: Duration = Duration::from_secs(30);
/// Events are never owners and there are too many of them; the rest has no owners or is not stored.
const IGNORED: [&str; 2] = ["events", "componentstatuses"];

type Uid = String;

#[derive(Clone, Debug)]
struct Node {
    kind: Arc<ApiResource>,
    namespaced: bool,
    namespace: String,
    name: String,
    owners: Vec<OwnerReference>,
    terminating: bool,
    foreground: bool,
    orphan: bool,
}

#[derive(Default)]
struct Graph {
    nodes: HashMap<Uid, Node>,
    /// By owner's uid, whether or not the owner is known.
    dependents: HashMap<Uid, HashSet<Uid>>,
}

impl Graph {
    fn put(&mut self, uid: Uid, node: Node) {
        self.unlink(&uid);
        for o in &node.owners {
            self.dependents.entry(o.uid.clone()).or_default().insert(uid.clone());
        }
        self.nodes.insert(uid, node);
    }

    fn unlink(&mut self, uid: &str) -> Option<Node> {
        let node = self.nodes.remove(uid)?;
        for o in &node.owners {
            if let Some(set) = self.dependents.get_mut(&o.uid) {
                set.remove(uid);
                if set.is_empty() {
                    self.dependents.remove(&o.uid);
                }
            }
        }
        Some(node)
    }

    fn dependents_of(&self, uid: &str) -> Vec<Uid> {
        self.dependents.get(uid).into_iter().flatten().cloned().collect()
    }

    /// Dependents that hold their owner back.
    fn blocking(&self, uid: &str) -> usize {
        let blocks = |d: &&Uid| {
            let owners = self.nodes.get(*d).map(|n| n.owners.as_slice()).unwrap_or_default();
            owners.iter().any(|o| o.uid == uid && o.block_owner_deletion == Some(true))
        };
        self.dependents.get(uid).into_iter().flatten().filter(blocks).count()
    }
}

#[derive(Clone)]
struct Collector {
    client: Client,
    graph: Arc<Mutex<Graph>>,
    queue: Queue<Uid>,
}

pub(crate) fn start(context: &Context) {
    let gc = Collector { client: context.client.clone(), graph: Arc::default(), queue: Queue::default() };
    let me = gc.clone();
    gc.queue.run(&context.tasks, "garbage-collector", 4, move |uid| {
        let me = me.clone();
        async move { me.reconcile(uid).await }
    });
    let (tasks, stop) = (context.tasks.clone(), context.tasks.stop_token());
    context.tasks.spawn(async move {
        let mut watched: HashSet<String> = HashSet::new();
        loop {
            match deletable(&gc.client).await {
                Ok(kinds) => {
                    for (kind, namespaced) in kinds {
                        let id = format!("{}/{}", kind.group, kind.plural);
                        if watched.insert(id) {
                            let (gc, stop) = (gc.clone(), stop.clone());
                            tasks.spawn(async move { gc.watch(kind, namespaced, stop).await });
                        }
                    }
                }
                Err(e) => tracing::warn!(error = %e, "garbage collector: discovery failed, trying again"),
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(DISCOVERY) => {}
            }
        }
    });
}

async fn deletable(client: &Client) -> Result<Vec<(ApiResource, bool)>> {
    let discovery = Discovery::new(client.clone()).run_aggregated().await?;
    let mut kinds = Vec::new();
    for group in discovery.groups() {
        for (resource, caps) in group.recommended_resources() {
            let can = |v| caps.supports_operation(v);
            if can(verbs::LIST)
                && can(verbs::WATCH)
                && can(verbs::DELETE)
                && !IGNORED.contains(&&*resource.plural)
            {
                kinds.push((resource, caps.scope == Scope::Namespaced));
            }
        }
    }
    Ok(kinds)
}

impl Collector {
    async fn watch(&self, kind: ApiResource, namespaced: bool, stop: tokio_util::sync::CancellationToken) {
        let api: Api<PartialObjectMeta<DynamicObject>> = Api::all_with(self.client.clone(), &kind);
        let kind = Arc::new(kind);
        let mut stream = std::pin::pin!(watcher(api, watcher::Config::default()).default_backoff());
        let mut listed: Option<HashSet<Uid>> = None;
        let mut refusal = orlop_client::Refusal::default();
        loop {
            // Cancel-safe: the stream keeps its state, and the loop ends.
            let event = tokio::select! {
                () = stop.cancelled() => return,
                e = stream.next() => e,
            };
            match event {
                None => return,
                Some(Err(e)) => {
                    if let Some(message) = refusal.begins(&e) {
                        tracing::warn!(
                            kind = %kind.plural,
                            "garbage collector: the API server refuses its user: {message}; dependents of this kind stay"
                        );
                    }
                    tracing::debug!(kind = %kind.plural, error = %e, "garbage collector: watch broke")
                }
                Some(Ok(watcher::Event::Init)) => listed = Some(HashSet::new()),
                Some(Ok(watcher::Event::InitApply(o) | watcher::Event::Apply(o))) => {
                    if let (Some(l), Some(uid)) = (&mut listed, &o.metadata.uid) {
                        l.insert(uid.clone());
                    }
                    self.seen(&kind, namespaced, o);
                }
                Some(Ok(watcher::Event::Delete(o))) => {
                    self.gone(o.metadata.uid.as_deref().unwrap_or_default())
                }
                Some(Ok(watcher::Event::InitDone)) => {
                    refusal.answered();
                    let Some(l) = listed.take() else { continue };
                    let missing: Vec<Uid> = {
                        let g = self.graph.lock();
                        let mine = g.nodes.iter().filter(|(_, n)| Arc::ptr_eq(&n.kind, &kind));
                        mine.filter(|(u, _)| !l.contains(*u)).map(|(u, _)| u.clone()).collect()
                    };
                    missing.iter().for_each(|u| self.gone(u));
                }
            }
        }
    }

    fn seen(&self, kind: &Arc<ApiResource>, namespaced: bool, o: PartialObjectMeta<DynamicObject>) {
        let m = o.metadata;
        let Some(uid) = m.uid.clone() else { return };
        let has = |f: &str| m.finalizers.iter().flatten().any(|x| x == f);
        let node = Node {
            kind: kind.clone(),
            namespaced,
            owners: m.owner_references.clone().unwrap_or_default(),
            terminating: m.deletion_timestamp.is_some(),
            foreground: has(FOREGROUND),
            orphan: has(ORPHAN),
            namespace: m.namespace.unwrap_or_default(),
            name: m.name.unwrap_or_default(),
        };
        let look = !node.owners.is_empty() || node.terminating;
        let owners: Vec<Uid> = node.owners.iter().map(|o| o.uid.clone()).collect();
        let waiting: Vec<Uid> = {
            let mut g = self.graph.lock();
            g.put(uid.clone(), node);
            // An owner that waits for its dependents looks again when one of them changes.
            owners.into_iter().filter(|o| g.nodes.get(o).is_some_and(|n| n.terminating)).collect()
        };
        if look {
            self.queue.add(uid);
        }
        waiting.into_iter().for_each(|u| self.queue.add(u));
    }

    fn gone(&self, uid: &str) {
        let (node, dependents) = {
            let mut g = self.graph.lock();
            (g.unlink(uid), g.dependents_of(uid))
        };
        dependents.into_iter().for_each(|d| self.queue.add(d));
        for o in node.into_iter().flat_map(|n| n.owners) {
            self.queue.add(o.uid);
        }
    }

    fn api(&self, kind: &ApiResource, namespaced: bool, namespace: &str) -> Api<DynamicObject> {
        match namespaced {
            true => Api::namespaced_with(self.client.clone(), namespace, kind),
            false => Api::all_with(self.client.clone(), kind),
        }
    }

    /// Whether the owner exists, as the server sees it; `None` when its kind is not known (yet), which decides nothing.
    async fn owner(&self, of: &Node, o: &OwnerReference) -> Result<Option<Option<ObjectMeta>>> {
        let found = {
            let g = self.graph.lock();
            let kind = g.nodes.get(&o.uid).map(|n| (n.kind.clone(), n.namespaced));
            kind.or_else(|| {
                let same = |n: &&Node| n.kind.kind == o.kind && n.kind.api_version == o.api_version;
                g.nodes.values().find(same).map(|n| (n.kind.clone(), n.namespaced))
            })
        };
        let (kind, namespaced) = match found {
            Some(k) => k,
            None => {
                let all = deletable(&self.client).await?;
                let same = |r: &ApiResource| r.kind == o.kind && r.api_version == o.api_version;
                match all.into_iter().find(|(r, _)| same(r)) {
                    Some((r, n)) => (Arc::new(r), n),
                    None => return Ok(None),
                }
            }
        };
        let live = self.api(&kind, namespaced, &of.namespace).get_metadata_opt(&o.name).await?;
        Ok(Some(live.map(|l| l.metadata).filter(|m| m.uid.as_ref() == Some(&o.uid))))
    }

    async fn reconcile(&self, uid: Uid) -> Result {
        let Some(node) = self.graph.lock().nodes.get(&uid).cloned() else { return Ok(Outcome::Done) };
        if node.terminating {
            if node.orphan {
                self.orphan_dependents(&uid, &node).await?;
            } else if node.foreground {
                self.foreground(&uid, &node).await?;
            }
            return Ok(Outcome::Done);
        }
        if node.owners.is_empty() {
            return Ok(Outcome::Done);
        }
        let (mut solid, mut dangling, mut waiting) = (0, Vec::new(), Vec::new());
        for o in &node.owners {
            match self.owner(&node, o).await? {
                None => solid += 1,
                Some(None) => dangling.push(o.uid.clone()),
                Some(Some(m)) => {
                    let foreground = m.finalizers.iter().flatten().any(|f| f == FOREGROUND);
                    if m.deletion_timestamp.is_some() && foreground {
                        waiting.push(o.uid.clone());
                    } else {
                        solid += 1;
                    }
                }
            }
        }
        let api = self.api(&node.kind, node.namespaced, &node.namespace);
        if solid > 0 {
            let drop: Vec<_> = dangling.iter().chain(&waiting).collect();
            if !drop.is_empty() {
                self.drop_owners(&api, &uid, &node, &drop).await?;
            }
            return Ok(Outcome::Done);
        }
        if dangling.is_empty() && waiting.is_empty() {
            return Ok(Outcome::Done);
        }
        // An owner that waits for us wants our dependents gone first too.
        let has_dependents = !self.graph.lock().dependents_of(&uid).is_empty();
        let mut dp = match (waiting.is_empty(), has_dependents, node.orphan) {
            (_, _, true) => DeleteParams::orphan(),
            (false, true, _) => DeleteParams::foreground(),
            _ => DeleteParams::background(),
        };
        dp.preconditions = Some(Preconditions { uid: Some(uid), resource_version: None });
        tracing::debug!(kind = %node.kind.kind, namespace = %node.namespace, name = %node.name, "owners are gone, deleting");
        match api.delete(&node.name, &dp).await {
            // A new object of that name: not ours to delete.
            Err(e) if has_code(&e, 409) => Ok(Outcome::Done),
            r => {
                unless_gone(r)?;
                Ok(Outcome::Done)
            }
        }
    }

    async fn drop_owners(
        &self,
        api: &Api<DynamicObject>,
        uid: &str,
        node: &Node,
        drop: &[&Uid],
    ) -> Result<()> {
        let Some(live) = unless_gone(api.get_metadata(&node.name).await)? else { return Ok(()) };
        if live.metadata.uid.as_deref() != Some(uid) {
            return Ok(());
        }
        let kept: Vec<_> =
            live.metadata.owner_references.iter().flatten().filter(|o| !drop.contains(&&o.uid)).collect();
        let patch = serde_json::json!({"metadata": {"uid": uid, "resourceVersion": live.metadata.resource_version,
            "ownerReferences": kept}});
        unless_gone(api.patch_metadata(&node.name, &PatchParams::default(), &Patch::Merge(&patch)).await)?;
        Ok(())
    }

    async fn remove_finalizer(&self, uid: &str, node: &Node, finalizer: &str) -> Result<()> {
        let api = self.api(&node.kind, node.namespaced, &node.namespace);
        let Some(live) = unless_gone(api.get_metadata(&node.name).await)? else { return Ok(()) };
        if live.metadata.uid.as_deref() != Some(uid) {
            return Ok(());
        }
        let kept: Vec<_> = live.metadata.finalizers.iter().flatten().filter(|f| *f != finalizer).collect();
        let patch = serde_json::json!({"metadata": {"uid": uid, "resourceVersion": live.metadata.resource_version,
            "finalizers": kept}});
        unless_gone(api.patch_metadata(&node.name, &PatchParams::default(), &Patch::Merge(&patch)).await)?;
        Ok(())
    }

    /// Dependents are queued so that they delete themselves; the finalizer goes when none blocks any more.
    async fn foreground(&self, uid: &str, node: &Node) -> Result<()> {
        let (dependents, blocking) = {
            let g = self.graph.lock();
            (g.dependents_of(uid), g.blocking(uid))
        };
        if blocking == 0 {
            return self.remove_finalizer(uid, node, FOREGROUND).await;
        }
        dependents.into_iter().for_each(|d| self.queue.add(d));
        Ok(())
    }

    async fn orphan_dependents(&self, uid: &str, node: &Node) -> Result<()> {
        let dependents: Vec<(Uid, Node)> = {
            let g = self.graph.lock();
            g.dependents_of(uid)
                .into_iter()
                .filter_map(|d| g.nodes.get(&d).cloned().map(|n| (d, n)))
                .collect()
        };
        for (d, n) in &dependents {
            let api = self.api(&n.kind, n.namespaced, &n.namespace);
            self.drop_owners(&api, d, n, &[&uid.to_owned()]).await?;
        }
        self.remove_finalizer(uid, node, ORPHAN).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(owners: &[(&str, bool)]) -> Node {
        let owner = |(uid, block): &(&str, bool)| OwnerReference {
            uid: (*uid).into(),
            block_owner_deletion: Some(*block),
            ..Default::default()
        };
        Node {
            kind: Arc::new(ApiResource::erase::<k8s_openapi::api::core::v1::Pod>(&())),
            namespaced: true,
            namespace: "n".into(),
            name: "x".into(),
            owners: owners.iter().map(owner).collect(),
            terminating: false,
            foreground: false,
            orphan: false,
        }
    }

    #[test]
    fn edges_follow_the_objects() {
        let mut g = Graph::default();
        g.put("a".into(), node(&[("o", true), ("p", false)]));
        g.put("b".into(), node(&[("o", false)]));
        assert_eq!((g.dependents_of("o").len(), g.blocking("o"), g.blocking("p")), (2, 1, 0));
        g.put("a".into(), node(&[("p", true)]));
        assert_eq!((g.dependents_of("o"), g.blocking("p")), (vec!["b".to_owned()], 1));
        g.unlink("b");
        g.unlink("a");
        assert!(g.dependents.is_empty() && g.nodes.is_empty());
    }
}
