//! Keeps the Endpoints of Services with a selector, the older form of what EndpointSlices say. Clients that have not moved on
//! read them; nothing of ours does.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{
    EndpointAddress, EndpointPort, EndpointSubset, Endpoints, ObjectReference, Pod, Service,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use orlop_api::meta::{Key, is_terminating};
use orlop_api::pod::{condition, is_finished};
use orlop_client::{Change, Outcome};

use crate::endpointslice::{Ports, ports_on};
use crate::runtime::{Builders, Context, Result, has_code, namespace_ends, unless_gone};
use crate::service_queue::{ServiceQueue, selector_of};

pub(crate) const MANAGED_BY: &str = "endpoints.kubernetes.io/managed-by";
pub(crate) const MANAGER: &str = "endpoint-controller";
const HEADLESS: &str = "service.kubernetes.io/headless";
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";
/// Most addresses in one object, as upstream's.
const MAX_ADDRESSES: usize = 1000;

pub(crate) struct Controller {
    queue: ServiceQueue,
}

impl Controller {
    pub fn new(b: &mut Builders) -> Controller {
        let queue = ServiceQueue::new(b);
        let q = queue.services();
        b.endpoints.add_handler(move |c: &Change<Endpoints>| {
            // Also what was there at the start: its Service may have gone while nobody looked.
            let m = &c.object().metadata;
            if is_ours(m) {
                q.add(Key::of(m));
            }
        });
        Controller { queue }
    }

    pub fn start(self, context: &Context) {
        self.queue.start(context, "endpoints", "endpoints pods", reconcile);
    }
}

fn is_ours(m: &ObjectMeta) -> bool {
    m.labels.as_ref().and_then(|l| l.get(MANAGED_BY)).is_some_and(|v| v == MANAGER)
}

fn is_headless(service: &Service) -> bool {
    service.spec.as_ref().and_then(|s| s.cluster_ip.as_deref()) == Some("None")
}

fn address(service: &Service, pod: &Pod, ip: &str) -> EndpointAddress {
    let spec = pod.spec.as_ref();
    EndpointAddress {
        ip: ip.to_owned(),
        // A pod has a name of its own in DNS when its subdomain is the Service.
        hostname: spec
            .filter(|p| p.subdomain.as_deref().is_some_and(|d| Some(d) == service.metadata.name.as_deref()))
            .and_then(|p| p.hostname.clone()),
        node_name: spec.and_then(|p| p.node_name.clone()),
        target_ref: Some(ObjectReference {
            kind: Some("Pod".into()),
            namespace: pod.metadata.namespace.clone(),
            name: pod.metadata.name.clone(),
            uid: pod.metadata.uid.clone(),
            ..Default::default()
        }),
    }
}

/// The subsets that a Service should have: pods with the same ports share one. Only addresses of the Service's first family
/// fit into this kind of object.
fn desired(service: &Service, pods: &[Arc<Pod>]) -> Vec<EndpointSubset> {
    let spec = service.spec.as_ref();
    let publish = spec.and_then(|s| s.publish_not_ready_addresses) == Some(true);
    let portless = spec.and_then(|s| s.ports.as_ref()).is_none_or(Vec::is_empty);
    let family = spec.and_then(|s| s.ip_families.as_ref()?.first().cloned());
    let v6 = family.as_deref() == Some("IPv6");
    let mut groups: BTreeMap<Ports, (Vec<EndpointAddress>, Vec<EndpointAddress>)> = BTreeMap::new();
    for pod in pods {
        if is_finished(pod) || (is_terminating(&pod.metadata) && !publish) {
            continue;
        }
        let mut ips = pod.status.iter().flat_map(|s| s.pod_ips.iter().flatten());
        let Some(ip) = ips.find(|ip| ip.ip.contains(':') == v6) else { continue };
        let mut ports = ports_on(service, pod);
        ports.sort();
        if ports.is_empty() && !(portless && is_headless(service)) {
            continue;
        }
        let (ready, waiting) = groups.entry(ports).or_default();
        let side = if publish || condition(pod, "Ready") == Some("True") { ready } else { waiting };
        side.push(address(service, pod, &ip.ip));
    }
    let listed = |mut a: Vec<EndpointAddress>| {
        a.sort_by(|a, b| a.ip.cmp(&b.ip));
        (!a.is_empty()).then_some(a)
    };
    groups
        .into_iter()
        .map(|(ports, (ready, waiting))| EndpointSubset {
            addresses: listed(ready),
            not_ready_addresses: listed(waiting),
            ports: (!ports.is_empty()).then(|| {
                ports
                    .into_iter()
                    .map(|(name, protocol, port, app_protocol)| EndpointPort {
                        app_protocol,
                        name: (!name.is_empty()).then_some(name),
                        port,
                        protocol: Some(protocol),
                    })
                    .collect()
            }),
        })
        .collect()
}

/// Drops what goes beyond [`MAX_ADDRESSES`], those that are not ready first; tells whether something was dropped.
fn truncate(subsets: &mut Vec<EndpointSubset>) -> bool {
    let (mut left, mut dropped) = (MAX_ADDRESSES, false);
    let mut cut = |list: &mut Option<Vec<EndpointAddress>>| {
        if let Some(l) = list {
            dropped |= l.len() > left;
            l.truncate(left);
            left -= l.len();
        }
        list.take_if(|l| l.is_empty());
    };
    subsets.iter_mut().for_each(|s| cut(&mut s.addresses));
    subsets.iter_mut().for_each(|s| cut(&mut s.not_ready_addresses));
    subsets.retain(|s| s.addresses.is_some() || s.not_ready_addresses.is_some());
    dropped
}

/// What the object should be, on top of what is stored.
fn wanted(service: &Service, pods: &[Arc<Pod>], old: Option<&Endpoints>) -> Endpoints {
    let mut subsets = desired(service, pods);
    let mut annotations = old.and_then(|o| o.metadata.annotations.clone()).unwrap_or_default();
    if truncate(&mut subsets) {
        annotations.insert(OVER_CAPACITY.into(), "truncated".into());
    } else {
        annotations.remove(OVER_CAPACITY);
    }
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    labels.insert(MANAGED_BY.into(), MANAGER.into());
    if is_headless(service) {
        labels.insert(HEADLESS.into(), String::new());
    } else {
        labels.remove(HEADLESS);
    }
    let mut metadata = old.map(|o| o.metadata.clone()).unwrap_or_else(|| ObjectMeta {
        name: service.metadata.name.clone(),
        namespace: service.metadata.namespace.clone(),
        ..Default::default()
    });
    metadata.labels = Some(labels);
    metadata.annotations = (!annotations.is_empty()).then_some(annotations);
    Endpoints { metadata, subsets: (!subsets.is_empty()).then_some(subsets) }
}

async fn reconcile(ctx: Context, key: Key) -> Result {
    let api: Api<Endpoints> = Api::namespaced(ctx.client.clone(), &key.namespace);
    let old = ctx.informers.endpoints.get(&key);
    let Some(service) = ctx.informers.services.get(&key).filter(|s| !is_terminating(&s.metadata)) else {
        // With the Service goes what somebody wrote for it by hand as well. Endpoints that never had one do not come here.
        if old.is_some() {
            unless_gone(api.delete(&key.name, &DeleteParams::default()).await)?;
        }
        return Ok(Outcome::Done);
    };
    let Some(selector) = selector_of(&service) else { return Ok(Outcome::Done) };
    let empty = BTreeMap::new();
    let mut pods = ctx.informers.pods.list_namespace(&key.namespace);
    pods.retain(|p| selector.matches(p.metadata.labels.as_ref().unwrap_or(&empty)));
    let next = wanted(&service, &pods, old.as_deref());
    let result = match old {
        Some(old) if *old == next => return Ok(Outcome::Done),
        Some(_) => api.replace(&key.name, &PostParams::default(), &next).await,
        None => api.create(&PostParams::default(), &next).await,
    };
    match result {
        // Our copy was stale and its watch event asks again, or the namespace is going away.
        Err(e) if has_code(&e, 404) || has_code(&e, 409) || namespace_ends(&e) => {}
        r => drop(r?),
    }
    Ok(Outcome::Done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(name: &str, ip: &str, ready: bool, deleted: bool) -> Arc<Pod> {
        let mut v = json!({"metadata": {"name": name, "namespace": "n", "labels": {"a": "b"}},
            "spec": {"nodeName": "node", "hostname": "h", "subdomain": "web", "containers": [
                {"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}]},
            "status": {"podIPs": [{"ip": ip}], "conditions": [{"type": "Ready", "status": if ready {"True"} else {"False"}}]}});
        if deleted {
            v["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        Arc::new(serde_json::from_value(v).unwrap())
    }

    fn service(spec: serde_json::Value) -> Service {
        let v = json!({"metadata": {"name": "web", "namespace": "n", "labels": {"x": "y"}}, "spec": spec});
        serde_json::from_value(v).unwrap()
    }

    #[test]
    fn ready_and_waiting_pods_share_a_subset_and_ending_ones_are_left_out() {
        let s = service(json!({"selector": {"a": "b"}, "clusterIP": "10.96.0.9",
            "ports": [{"name": "p", "port": 80, "targetPort": "http"}]}));
        let pods = [
            pod("b", "10.0.0.2", true, false),
            pod("a", "10.0.0.1", true, false),
            pod("c", "10.0.0.3", false, false),
            pod("d", "10.0.0.4", true, true),
        ];
        let e = wanted(&s, &pods, None);
        let v = serde_json::to_value(&e.subsets).unwrap();
        assert_eq!(v[0]["addresses"][0]["ip"], "10.0.0.1");
        assert_eq!(v[0]["addresses"][0]["hostname"], "h");
        assert_eq!(v[0]["addresses"][1]["targetRef"]["name"], "b");
        assert_eq!(v[0]["notReadyAddresses"].as_array().unwrap().len(), 1);
        assert_eq!(v[0]["ports"], json!([{"name": "p", "port": 8080, "protocol": "TCP"}]));
        let labels = e.metadata.labels.clone().unwrap();
        assert_eq!((labels[MANAGED_BY].as_str(), labels["x"].as_str()), (MANAGER, "y"));
        assert_eq!(wanted(&s, &pods, Some(&e)), e, "an unchanged object is left alone");
    }

    #[test]
    fn unready_pods_can_be_published_and_headless_services_need_no_ports() {
        let s =
            service(json!({"selector": {"a": "b"}, "clusterIP": "None", "publishNotReadyAddresses": true}));
        let e = wanted(&s, &[pod("c", "10.0.0.3", false, true)], None);
        let subset = &e.subsets.as_ref().unwrap()[0];
        assert_eq!((subset.addresses.as_ref().map(Vec::len), subset.ports.as_ref()), (Some(1), None));
        assert!(e.metadata.labels.unwrap().contains_key(HEADLESS));
    }

    #[test]
    fn pods_with_other_ports_get_a_subset_of_their_own_and_those_without_the_port_none() {
        let s = service(json!({"selector": {"a": "b"}, "ports": [{"port": 80, "targetPort": "http"}]}));
        let mut other = (*pod("b", "10.0.0.2", true, false)).clone();
        other.spec.as_mut().unwrap().containers[0].ports.as_mut().unwrap()[0].container_port = 9090;
        let mut without = (*pod("c", "10.0.0.3", true, false)).clone();
        without.spec.as_mut().unwrap().containers[0].ports = None;
        let d = desired(&s, &[pod("a", "10.0.0.1", true, false), other.into(), without.into()]);
        let ports: Vec<i32> = d.iter().map(|s| s.ports.as_ref().unwrap()[0].port).collect();
        assert_eq!(ports, [8080, 9090]);
    }

    #[test]
    fn an_object_holds_a_thousand_addresses_and_says_when_it_is_cut() {
        let s = service(json!({"selector": {"a": "b"}, "ports": [{"port": 80}]}));
        let pods: Vec<_> = (0..1100)
            .map(|i| pod(&format!("p{i}"), &format!("10.0.{}.{}", i / 200, i % 200), i >= 600, false))
            .collect();
        let e = wanted(&s, &pods, None);
        let subset = &e.subsets.as_ref().unwrap()[0];
        assert_eq!(subset.addresses.as_ref().map(Vec::len), Some(500));
        assert_eq!(subset.not_ready_addresses.as_ref().map(Vec::len), Some(500));
        assert_eq!(e.metadata.annotations.clone().unwrap()[OVER_CAPACITY], "truncated");
        assert!(wanted(&s, &pods[..10], Some(&e)).metadata.annotations.is_none());
    }
}
