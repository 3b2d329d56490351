//! Keeps the EndpointSlices of Services with a selector: which pods serve, on which addresses and ports.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use orlop_api::meta::{Key, is_terminating};
use orlop_api::pod::{condition, is_finished};
use orlop_client::{Change, Outcome};

use crate::runtime::{Builders, Context, Result, has_code, namespace_ends, unless_gone};
use crate::service_queue::{ServiceQueue, selector_of};

pub(crate) const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const MANAGER: &str = "endpointslice-controller.k8s.io";
pub(crate) const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Upstream's --max-endpoints-per-slice.
const MAX_ENDPOINTS: usize = 100;

pub(crate) struct Controller {
    queue: ServiceQueue,
}

impl Controller {
    pub fn new(b: &mut Builders) -> Controller {
        let queue = ServiceQueue::new(b);
        let q = queue.services();
        b.endpointslices.add_handler(move |c: &Change<EndpointSlice>| {
            // Our own writes come back too; the reconcile that they cause finds nothing to do.
            let m = &c.object().metadata;
            let label = |name: &str| m.labels.as_ref().and_then(|l| l.get(name));
            if label(MANAGED_BY).is_some_and(|v| v == MANAGER)
                && !matches!(c, Change::Added(_))
                && let Some(service) = label(SERVICE_NAME)
            {
                q.add(Key::new(m.namespace.clone().unwrap_or_default(), service.clone()));
            }
        });
        Controller { queue }
    }

    pub fn start(self, context: &Context) {
        self.queue.start(context, "endpointslice", "endpointslice pods", reconcile);
    }
}

/// The number that a Service's port has on a pod; named target ports are looked up in its containers.
fn target_port(port: &ServicePort, pod: &Pod) -> Option<i32> {
    match port.target_port.as_ref() {
        None | Some(IntOrString::Int(0)) => Some(port.port),
        Some(IntOrString::Int(n)) => Some(*n),
        Some(IntOrString::String(name)) if name.is_empty() => Some(port.port),
        Some(IntOrString::String(name)) => {
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            let spec = pod.spec.as_ref()?;
            let sidecars = spec.init_containers.iter().flatten().filter(|c| orlop_api::pod::is_sidecar(c));
            spec.containers
                .iter()
                .chain(sidecars)
                .flat_map(|c| c.ports.iter().flatten())
                .find(|p| p.name.as_ref() == Some(name) && p.protocol.as_deref().unwrap_or("TCP") == protocol)
                .map(|p| p.container_port)
        }
    }
}

pub(crate) type Ports = Vec<(String, String, i32, Option<String>)>;

pub(crate) fn ports_on(service: &Service, pod: &Pod) -> Ports {
    let ports = service.spec.as_ref().and_then(|s| s.ports.as_deref()).unwrap_or_default();
    ports
        .iter()
        .filter_map(|p| {
            let protocol = p.protocol.clone().unwrap_or_else(|| "TCP".into());
            Some((p.name.clone().unwrap_or_default(), protocol, target_port(p, pod)?, p.app_protocol.clone()))
        })
        .collect()
}

fn endpoint(service: &Service, pod: &Pod, ip: &str, zone: Option<String>) -> Endpoint {
    let spec = service.spec.as_ref();
    let terminating = is_terminating(&pod.metadata);
    let serving = condition(pod, "Ready") == Some("True");
    let publish = spec.and_then(|s| s.publish_not_ready_addresses) == Some(true);
    let pod_spec = pod.spec.as_ref();
    // A pod has a name of its own in DNS when its subdomain is the Service.
    let hostname = pod_spec
        .filter(|p| p.subdomain.as_deref().is_some_and(|d| Some(d) == service.metadata.name.as_deref()))
        .and_then(|p| p.hostname.clone());
    Endpoint {
        addresses: vec![ip.to_owned()],
        conditions: Some(EndpointConditions {
            ready: Some(publish || (serving && !terminating)),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        hostname,
        node_name: pod_spec.and_then(|p| p.node_name.clone()),
        target_ref: Some(ObjectReference {
            kind: Some("Pod".into()),
            namespace: pod.metadata.namespace.clone(),
            name: pod.metadata.name.clone(),
            uid: pod.metadata.uid.clone(),
            ..Default::default()
        }),
        zone,
        ..Default::default()
    }
}

/// The slices that a Service should have: (address type, ports, endpoints) with at most [`MAX_ENDPOINTS`] each.
fn desired(
    service: &Service,
    pods: &[Arc<Pod>],
    zone_of: impl Fn(&str) -> Option<String>,
) -> Vec<(String, Ports, Vec<Endpoint>)> {
    let families = service.spec.as_ref().and_then(|s| s.ip_families.clone());
    let families = families.filter(|f| !f.is_empty()).unwrap_or_else(|| vec!["IPv4".into()]);
    let mut slices = Vec::new();
    for family in &families {
        let mut groups: BTreeMap<Ports, Vec<Endpoint>> = BTreeMap::new();
        for pod in pods {
            let ips = pod.status.iter().flat_map(|s| s.pod_ips.iter().flatten());
            let Some(ip) = ips.map(|p| p.ip.as_str()).find(|ip| ip.contains(':') == (family == "IPv6"))
            else {
                continue;
            };
            let node = pod.spec.as_ref().and_then(|s| s.node_name.as_deref());
            let zone = node.and_then(&zone_of);
            groups.entry(ports_on(service, pod)).or_default().push(endpoint(service, pod, ip, zone));
        }
        for (ports, mut endpoints) in groups {
            endpoints.sort_by(|a, b| a.addresses.cmp(&b.addresses));
            for part in endpoints.chunks(MAX_ENDPOINTS) {
                slices.push((family.clone(), ports.clone(), part.to_vec()));
            }
        }
        // A Service without pods has one empty slice, so that watchers can tell "none" from "not yet".
        if !slices.iter().any(|(f, _, _)| f == family) {
            slices.push((family.clone(), Vec::new(), Vec::new()));
        }
    }
    slices
}

fn slice(service: &Service, family: &str, ports: &Ports, endpoints: Vec<Endpoint>) -> EndpointSlice {
    let m = &service.metadata;
    let name = m.name.clone().unwrap_or_default();
    let mut labels = m.labels.clone().unwrap_or_default();
    labels.insert(SERVICE_NAME.into(), name.clone());
    labels.insert(MANAGED_BY.into(), MANAGER.into());
    if service.spec.as_ref().and_then(|s| s.cluster_ip.as_deref()) == Some("None") {
        labels.insert("service.kubernetes.io/headless".into(), String::new());
    }
    let owner = OwnerReference {
        api_version: "v1".into(),
        kind: "Service".into(),
        name: name.clone(),
        uid: m.uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    };
    let ports = ports.iter().map(|(name, protocol, port, app)| EndpointPort {
        name: Some(name.clone()),
        protocol: Some(protocol.clone()),
        port: Some(*port),
        app_protocol: app.clone(),
    });
    EndpointSlice {
        address_type: family.to_owned(),
        endpoints: Some(endpoints),
        ports: Some(ports.collect()),
        metadata: ObjectMeta {
            namespace: m.namespace.clone(),
            generate_name: Some(format!("{}-", name.chars().take(57).collect::<String>())),
            labels: Some(labels),
            owner_references: Some(vec![owner]),
            ..Default::default()
        },
    }
}

fn same(a: &EndpointSlice, b: &EndpointSlice) -> bool {
    let (ea, eb) = (a.endpoints.as_deref().unwrap_or_default(), b.endpoints.as_deref().unwrap_or_default());
    let (pa, pb) = (a.ports.as_deref().unwrap_or_default(), b.ports.as_deref().unwrap_or_default());
    ea == eb && pa == pb && a.metadata.labels == b.metadata.labels
}

/// How alike two slices are: the number of addresses in both. Matching the most alike keeps writes small.
fn overlap(a: &EndpointSlice, b: &EndpointSlice) -> usize {
    let of = |s: &EndpointSlice| -> BTreeSet<String> {
        s.endpoints.iter().flatten().flat_map(|e| e.addresses.iter().cloned()).collect()
    };
    of(a).intersection(&of(b)).count()
}

/// What to do to the slices that are there.
#[derive(Default)]
pub(crate) struct Writes {
    pub update: Vec<EndpointSlice>,
    pub create: Vec<EndpointSlice>,
    pub delete: Vec<Arc<EndpointSlice>>,
}

impl Writes {
    pub async fn carry_out(self, client: kube::Client, namespace: &str) -> Result {
        let api: Api<EndpointSlice> = Api::namespaced(client, namespace);
        for s in self.update {
            let name = s.metadata.name.clone().unwrap_or_default();
            match api.replace(&name, &PostParams::default(), &s).await {
                // Our copy was stale; its watch event asks again.
                Err(e) if has_code(&e, 409) || has_code(&e, 404) => {}
                r => drop(r?),
            }
        }
        for s in self.create {
            match api.create(&PostParams::default(), &s).await {
                Err(e) if namespace_ends(&e) || has_code(&e, 404) => {}
                r => drop(r?),
            }
        }
        for s in self.delete {
            let name = s.metadata.name.as_deref().unwrap_or_default();
            unless_gone(api.delete(name, &DeleteParams::default()).await)?;
        }
        Ok(Outcome::Done)
    }

    #[cfg(test)]
    pub fn counts(&self) -> (usize, usize, usize) {
        (self.update.len(), self.create.len(), self.delete.len())
    }
}

/// A slice that takes the place of one that is there.
pub(crate) fn over(mut new: EndpointSlice, old: &EndpointSlice) -> EndpointSlice {
    new.metadata.name = old.metadata.name.clone();
    new.metadata.generate_name = None;
    new.metadata.resource_version = old.metadata.resource_version.clone();
    new
}

/// Pairs the wanted slices with existing ones of the same family.
fn match_slices(wanted: Vec<EndpointSlice>, mut existing: Vec<Arc<EndpointSlice>>) -> Writes {
    let (mut update, mut create) = (Vec::new(), Vec::new());
    for w in wanted {
        let candidates = existing.iter().enumerate().filter(|(_, e)| e.address_type == w.address_type);
        let best = candidates.max_by_key(|(_, e)| (e.ports == w.ports, overlap(e, &w))).map(|(i, _)| i);
        match best {
            None => create.push(w),
            Some(i) => {
                let e = existing.swap_remove(i);
                if !same(&e, &w) {
                    update.push(over(w, &e));
                }
            }
        }
    }
    Writes { update, create, delete: existing }
}

async fn reconcile(ctx: Context, key: Key) -> Result {
    let owned: Vec<Arc<EndpointSlice>> = ctx
        .informers
        .endpointslices
        .list_namespace(&key.namespace)
        .into_iter()
        .filter(|s| {
            let label = |name: &str| s.metadata.labels.as_ref().and_then(|l| l.get(name));
            label(MANAGED_BY).is_some_and(|v| v == MANAGER) && label(SERVICE_NAME) == Some(&key.name)
        })
        .filter(|s| !is_terminating(&s.metadata))
        .collect();
    let service = ctx.informers.services.get(&key).filter(|s| !is_terminating(&s.metadata));
    let Some((service, selector)) = service.and_then(|s| selector_of(&s).map(|sel| (s, sel))) else {
        let all = Writes { delete: owned, ..Writes::default() };
        return all.carry_out(ctx.client, &key.namespace).await;
    };
    let empty = BTreeMap::new();
    let pods: Vec<Arc<Pod>> = ctx
        .informers
        .pods
        .list_namespace(&key.namespace)
        .into_iter()
        .filter(|p| !is_finished(p) && selector.matches(p.metadata.labels.as_ref().unwrap_or(&empty)))
        .collect();
    let zone_of = |node: &str| {
        let node = ctx.informers.nodes.get(&Key::new("", node))?;
        node.metadata.labels.as_ref()?.get("topology.kubernetes.io/zone").cloned()
    };
    let wanted = desired(&service, &pods, zone_of)
        .into_iter()
        .map(|(family, ports, endpoints)| slice(&service, &family, &ports, endpoints))
        .collect();
    match_slices(wanted, owned).carry_out(ctx.client.clone(), &key.namespace).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn service(v: serde_json::Value) -> Service {
        serde_json::from_value(v).unwrap()
    }

    fn pod(name: &str, ip: &str, ready: bool, deleted: bool) -> Arc<Pod> {
        let mut v = json!({"metadata": {"name": name, "namespace": "n", "labels": {"a": "b"}},
            "spec": {"nodeName": "node", "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}]},
            "status": {"podIPs": [{"ip": ip}], "conditions": [{"type": "Ready", "status": if ready {"True"} else {"False"}}]}});
        if deleted {
            v["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        Arc::new(serde_json::from_value(v).unwrap())
    }

    fn web() -> Service {
        service(
            json!({"metadata": {"name": "web", "namespace": "n", "uid": "u"}, "spec": {"selector": {"a": "b"},
            "ports": [{"name": "p", "port": 80, "targetPort": "http"}]}}),
        )
    }

    #[test]
    fn conditions_tell_ready_serving_and_terminating_apart() {
        let pods = [
            pod("a", "10.0.0.1", true, false),
            pod("b", "10.0.0.2", true, true),
            pod("c", "10.0.0.3", false, false),
        ];
        let d = desired(&web(), &pods, |_| Some("z".into()));
        assert_eq!(d.len(), 1);
        assert_eq!(d[0].1[0].2, 8080);
        let c: Vec<_> = d[0]
            .2
            .iter()
            .map(|e| e.conditions.clone().unwrap())
            .map(|c| (c.ready.unwrap(), c.serving.unwrap(), c.terminating.unwrap()))
            .collect();
        assert_eq!(c, [(true, true, false), (false, true, true), (false, false, false)]);
    }

    #[test]
    fn a_service_without_pods_has_an_empty_slice() {
        let d = desired(&web(), &[], |_| None);
        assert_eq!(d, [("IPv4".to_owned(), vec![], vec![])]);
    }

    #[test]
    fn unchanged_slices_are_left_alone_and_the_most_alike_is_rewritten() {
        let s = web();
        let make = |pods: &[Arc<Pod>]| -> Vec<EndpointSlice> {
            desired(&s, pods, |_| None).into_iter().map(|(f, p, e)| slice(&s, &f, &p, e)).collect()
        };
        let two = [pod("a", "10.0.0.1", true, false), pod("b", "10.0.0.2", true, false)];
        let mut stored = make(&two);
        stored[0].metadata.name = Some("web-x".into());
        let stored: Vec<Arc<EndpointSlice>> = stored.into_iter().map(Arc::new).collect();
        assert_eq!(match_slices(make(&two), stored.clone()).counts(), (0, 0, 0));
        let w = match_slices(make(&two[..1]), stored);
        assert_eq!(w.counts(), (1, 0, 0));
        assert_eq!(w.update[0].metadata.name.as_deref(), Some("web-x"));
    }

    #[test]
    fn slices_hold_a_hundred_endpoints() {
        let pods: Vec<_> = (0..250)
            .map(|i| pod(&format!("p{i}"), &format!("10.0.{}.{}", i / 200, i % 200), true, false))
            .collect();
        assert_eq!(
            desired(&web(), &pods, |_| None).iter().map(|d| d.2.len()).collect::<Vec<_>>(),
            [100, 100, 50]
        );
    }
}
