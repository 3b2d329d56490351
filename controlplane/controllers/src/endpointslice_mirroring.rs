//! Mirrors Endpoints that somebody wrote for a Service without a selector into EndpointSlices, the only form that proxies and
//! DNS servers read.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{self, EndpointAddress, Endpoints, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use orlop_api::meta::{Key, is_terminating};
use orlop_client::{Change, Queue};

use crate::endpointslice::{MANAGED_BY, SERVICE_NAME, Writes, over};
use crate::runtime::{Builders, Context, Result};

const MANAGER: &str = "endpointslicemirroring-controller.k8s.io";
const SKIP: &str = "endpointslice.kubernetes.io/skip-mirror";
const LEADER: &str = "control-plane.alpha.kubernetes.io/leader";
const NOT_MIRRORED: [&str; 2] =
    ["endpoints.kubernetes.io/last-change-trigger-time", "kubectl.kubernetes.io/last-applied-configuration"];
/// Upstream's --mirroring-max-endpoints-per-subset.
const MAX_ENDPOINTS: usize = 1000;

pub(crate) struct Controller {
    queue: Queue<Key>,
}

impl Controller {
    pub fn new(b: &mut Builders) -> Controller {
        let queue = Queue::default();
        let q = queue.clone();
        b.endpoints.add_handler(move |c: &Change<Endpoints>| q.add(Key::of(&c.object().metadata)));
        let q = queue.clone();
        b.services.add_handler(move |c: &Change<Service>| match c {
            Change::Updated { old, new } if selects(old) == selects(new) => {}
            _ => q.add(Key::of(&c.object().metadata)),
        });
        let q = queue.clone();
        b.endpointslices.add_handler(move |c: &Change<EndpointSlice>| {
            if let Some(key) = mirror_of(c.object()) {
                q.add(key);
            }
        });
        Controller { queue }
    }

    pub fn start(self, context: &Context) {
        let ctx = context.clone();
        self.queue.run(&context.tasks, "endpointslice-mirroring", 4, move |k| reconcile(ctx.clone(), k));
    }
}

fn selects(s: &Service) -> bool {
    s.spec.as_ref().and_then(|s| s.selector.as_ref()).is_some_and(|m| !m.is_empty())
}

/// The Endpoints that a slice of ours mirrors.
fn mirror_of(s: &EndpointSlice) -> Option<Key> {
    let labels = s.metadata.labels.as_ref()?;
    labels.get(MANAGED_BY).filter(|v| *v == MANAGER)?;
    Some(Key::new(s.metadata.namespace.clone().unwrap_or_default(), labels.get(SERVICE_NAME)?.clone()))
}

/// Endpoints that serve as a lock of a leader election, or that say so, are not mirrored.
fn is_mirrored(e: &Endpoints) -> bool {
    let m = &e.metadata;
    let skip = m.labels.as_ref().and_then(|l| l.get(SKIP)).is_some_and(|v| v == "true");
    let lock = m.annotations.as_ref().is_some_and(|a| a.contains_key(LEADER));
    !skip && !lock && !is_terminating(m)
}

fn endpoint(address: &EndpointAddress, ip: IpAddr, ready: bool) -> Endpoint {
    Endpoint {
        addresses: vec![ip.to_string()],
        conditions: Some(EndpointConditions { ready: Some(ready), ..Default::default() }),
        hostname: address.hostname.clone(),
        node_name: address.node_name.clone(),
        target_ref: address.target_ref.clone(),
        ..Default::default()
    }
}

fn ports(list: Option<&Vec<v1::EndpointPort>>) -> Vec<EndpointPort> {
    let mut ports: Vec<_> = list
        .into_iter()
        .flatten()
        .map(|p| EndpointPort {
            name: Some(p.name.clone().unwrap_or_default()),
            port: Some(p.port),
            protocol: Some(p.protocol.clone().unwrap_or_else(|| "TCP".into())),
            app_protocol: p.app_protocol.clone(),
        })
        .collect();
    ports.sort_by(|a, b| (&a.name, a.port, &a.protocol).cmp(&(&b.name, b.port, &b.protocol)));
    ports
}

/// One slice for each set of ports and address family. The second value is the number of addresses that were left out.
fn desired(e: &Endpoints) -> (Vec<EndpointSlice>, usize) {
    let mut groups: Vec<(&'static str, Vec<EndpointPort>, BTreeMap<IpAddr, Endpoint>)> = Vec::new();
    let mut skipped = 0;
    for subset in e.subsets.iter().flatten() {
        let ports = ports(subset.ports.as_ref());
        let ready = subset.addresses.iter().flatten().map(|a| (a, true));
        let waiting = subset.not_ready_addresses.iter().flatten().map(|a| (a, false));
        for (address, ready) in ready.chain(waiting) {
            let Ok(ip) = address.ip.parse::<IpAddr>() else {
                skipped += 1;
                continue;
            };
            let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
            let at = groups.iter().position(|(f, p, _)| *f == family && *p == ports).unwrap_or_else(|| {
                groups.push((family, ports.clone(), BTreeMap::new()));
                groups.len() - 1
            });
            let endpoints = &mut groups[at].2;
            if endpoints.len() < MAX_ENDPOINTS || endpoints.contains_key(&ip) {
                endpoints.entry(ip).or_insert_with(|| endpoint(address, ip, ready));
            } else {
                skipped += 1;
            }
        }
    }
    let slices = groups.into_iter().map(|(f, p, list)| slice(e, f, p, list.into_values().collect()));
    (slices.collect(), skipped)
}

fn slice(e: &Endpoints, family: &str, ports: Vec<EndpointPort>, endpoints: Vec<Endpoint>) -> EndpointSlice {
    let name = e.metadata.name.clone().unwrap_or_default();
    let mut labels = e.metadata.labels.clone().unwrap_or_default();
    labels.insert(SERVICE_NAME.into(), name.clone());
    labels.insert(MANAGED_BY.into(), MANAGER.into());
    let mut annotations = e.metadata.annotations.clone().unwrap_or_default();
    annotations.retain(|k, _| !NOT_MIRRORED.contains(&k.as_str()));
    EndpointSlice {
        address_type: family.into(),
        endpoints: Some(endpoints),
        ports: Some(ports),
        metadata: ObjectMeta {
            namespace: e.metadata.namespace.clone(),
            generate_name: Some(format!("{}-", name.chars().take(57).collect::<String>())),
            labels: Some(labels),
            annotations: (!annotations.is_empty()).then_some(annotations),
            owner_references: Some(vec![OwnerReference {
                api_version: "v1".into(),
                kind: "Endpoints".into(),
                name,
                uid: e.metadata.uid.clone().unwrap_or_default(),
                controller: Some(true),
                block_owner_deletion: Some(true),
            }]),
            ..Default::default()
        },
    }
}

fn same(a: &EndpointSlice, b: &EndpointSlice) -> bool {
    let sorted = |s: &EndpointSlice| {
        let mut e = s.endpoints.clone().unwrap_or_default();
        e.sort_by(|a, b| a.addresses.cmp(&b.addresses));
        e
    };
    let (x, y) = (&a.metadata, &b.metadata);
    sorted(a) == sorted(b)
        && a.ports.as_deref().unwrap_or_default() == b.ports.as_deref().unwrap_or_default()
        && x.labels == y.labels
        && x.annotations.clone().unwrap_or_default() == y.annotations.clone().unwrap_or_default()
        && x.owner_references == y.owner_references
}

/// What to do to the slices that are there. Slices that are to go are used again first.
fn match_slices(wanted: Vec<EndpointSlice>, mut existing: Vec<Arc<EndpointSlice>>) -> Writes {
    let (mut update, mut create, mut rest) = (Vec::new(), Vec::new(), Vec::new());
    for w in wanted {
        match existing.iter().position(|e| e.address_type == w.address_type && e.ports == w.ports) {
            Some(i) => {
                let e = existing.swap_remove(i);
                if !same(&e, &w) {
                    update.push(over(w, &e));
                }
            }
            None => rest.push(w),
        }
    }
    for w in rest {
        match existing.iter().position(|e| e.address_type == w.address_type) {
            Some(i) => update.push(over(w, &existing.swap_remove(i))),
            None => create.push(w),
        }
    }
    Writes { update, create, delete: existing }
}

async fn reconcile(ctx: Context, key: Key) -> Result {
    let mut owned = ctx.informers.endpointslices.list_namespace(&key.namespace);
    owned.retain(|s| mirror_of(s).is_some_and(|k| k == key) && !is_terminating(&s.metadata));
    let source = ctx.informers.endpoints.get(&key).filter(|e| is_mirrored(e));
    let source = source.filter(|_| ctx.informers.services.get(&key).is_some_and(|s| !selects(&s)));
    let (wanted, skipped) = source.as_deref().map(desired).unwrap_or_default();
    if skipped > 0 {
        tracing::warn!(namespace = %key.namespace, endpoints = %key.name, skipped, "addresses are not mirrored: no valid IP address, or beyond the first {MAX_ENDPOINTS}");
    }
    match_slices(wanted, owned).carry_out(ctx.client, &key.namespace).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn endpoints(subsets: serde_json::Value) -> Endpoints {
        serde_json::from_value(json!({"metadata": {"name": "web", "namespace": "n", "uid": "u",
            "labels": {"a": "b"}, "annotations": {"note": "x", NOT_MIRRORED[1]: "{}"}}, "subsets": subsets}))
        .unwrap()
    }

    #[test]
    fn a_slice_for_each_family_and_set_of_ports() {
        let e = endpoints(json!([
            {"addresses": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}, {"ip": "nonsense"}], "ports": [{"port": 80}]},
            {"addresses": [{"ip": "10.0.0.2"}], "notReadyAddresses": [{"ip": "10.0.0.3"}], "ports": [{"name": "p", "port": 90, "protocol": "UDP"}]},
        ]));
        let (slices, skipped) = desired(&e);
        let seen: Vec<_> = slices
            .iter()
            .map(|s| {
                let list = s.endpoints.as_ref().unwrap();
                let ready = list.iter().filter(|e| e.conditions.as_ref().unwrap().ready == Some(true));
                (
                    s.address_type.as_str(),
                    s.ports.as_ref().unwrap()[0].port.unwrap(),
                    list.len(),
                    ready.count(),
                )
            })
            .collect();
        assert_eq!(seen, [("IPv4", 80, 1, 1), ("IPv6", 80, 1, 1), ("IPv4", 90, 2, 1)]);
        assert_eq!(skipped, 1);
        let m = &slices[0].metadata;
        assert_eq!(m.annotations.as_ref().unwrap().keys().collect::<Vec<_>>(), ["note"]);
        assert_eq!(m.labels.as_ref().unwrap()[MANAGED_BY], MANAGER);
        assert_eq!(m.owner_references.as_ref().unwrap()[0].kind, "Endpoints");
    }

    #[test]
    fn a_slice_is_left_alone_written_again_or_reused_for_other_ports() {
        let make = |port: i32, ip: &str| {
            desired(&endpoints(json!([{"addresses": [{"ip": ip}], "ports": [{"port": port}]}]))).0
        };
        let mut stored = make(80, "10.0.0.1");
        stored[0].metadata.name = Some("web-x".into());
        let stored: Vec<Arc<EndpointSlice>> = stored.into_iter().map(Arc::new).collect();
        let count = |w| match_slices(w, stored.clone()).counts();
        assert_eq!(count(make(80, "10.0.0.1")), (0, 0, 0));
        assert_eq!(count(make(80, "10.0.0.2")), (1, 0, 0));
        assert_eq!(count(make(81, "10.0.0.1")), (1, 0, 0));
        assert_eq!(count(Vec::new()), (0, 0, 1));
        assert_eq!(count(make(80, "fd00::1")), (0, 1, 1));
    }

    #[test]
    fn locks_and_those_that_say_so_are_not_mirrored() {
        let mut e = endpoints(json!([]));
        assert!(is_mirrored(&e));
        e.metadata.labels.as_mut().unwrap().insert(SKIP.into(), "true".into());
        assert!(!is_mirrored(&e));
        let mut e = endpoints(json!([]));
        e.metadata.annotations.as_mut().unwrap().insert(LEADER.into(), "{}".into());
        assert!(!is_mirrored(&e));
    }
}
