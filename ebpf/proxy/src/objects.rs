//! Services, EndpointSlices, ServiceCIDRs and Nodes as the API server sends them, without the fields that no packet depends on: those
//! are skipped while reading. Large clusters are read several times faster this way, and leave nothing behind on the heap.

use std::borrow::Cow;
use std::net::IpAddr;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Labels and annotations that mean something to the proxy; others are not kept.
pub mod keys {
    pub const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
    pub const HEADLESS: &str = "service.kubernetes.io/headless";
    pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
    pub const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
    pub const ZONE: &str = "topology.kubernetes.io/zone";
    /// How a Service's backends are chosen: maglev or random.
    pub const SELECTION: &str = "orlop.dev/selection";
    /// Taint of a node whose machine the cluster's autoscaler takes away.
    pub const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";
    pub const ALL: [&str; 6] = [PROXY_NAME, HEADLESS, SERVICE_NAME, TRIGGER_TIME, ZONE, SELECTION];
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident, $group:literal, $version:literal, $plural:literal, $scope:ident {
        $($(#[$attr:meta])* $field:ident: $ty:ty,)*
    })*) => { $(
        $(#[$doc])*
        #[derive(Clone, Debug, Default, serde::Deserialize)]
        #[serde(rename_all = "camelCase", default)]
        pub struct $name {
            #[serde(deserialize_with = "meta")]
            pub metadata: ObjectMeta,
            $($(#[$attr])* pub $field: $ty,)*
        }

        impl kube::Resource for $name {
            type DynamicType = ();
            type Scope = kube::core::$scope;
            fn kind((): &()) -> Cow<'_, str> {
                stringify!($name).into()
            }
            fn group((): &()) -> Cow<'_, str> {
                $group.into()
            }
            fn version((): &()) -> Cow<'_, str> {
                $version.into()
            }
            fn plural((): &()) -> Cow<'_, str> {
                $plural.into()
            }
            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }
            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    )* };
}

kinds! {
    /// A core/v1 Service.
    Service, "", "v1", "services", NamespaceResourceScope {
        spec: Option<ServiceSpec>,
        status: Option<ServiceStatus>,
    }

    /// A discovery.k8s.io/v1 EndpointSlice.
    EndpointSlice, "discovery.k8s.io", "v1", "endpointslices", NamespaceResourceScope {
        address_type: String,
        ports: Option<Vec<EndpointPort>>,
        endpoints: Option<Vec<Endpoint>>,
    }

    /// A core/v1 Node.
    Node, "", "v1", "nodes", ClusterResourceScope {
        spec: Option<NodeSpec>,
        status: Option<NodeStatus>,
    }

    /// A networking.k8s.io/v1 ServiceCIDR: addresses that ClusterIPs are taken from.
    ServiceCIDR, "networking.k8s.io", "v1", "servicecidrs", ClusterResourceScope {
        spec: Option<ServiceCidrSpec>,
    }
}

macro_rules! parts {
    ($($name:ident { $($(#[$attr:meta])* $field:ident: $ty:ty,)* })*) => { $(
        #[derive(Clone, Debug, Default, serde::Deserialize)]
        #[serde(rename_all = "camelCase", default)]
        pub struct $name { $($(#[$attr])* pub $field: $ty,)* }
    )* };
}

// A list may be null in JSON, so each is an Option.
parts! {
    NodeSpec {
        taints: Option<Vec<Taint>>,
    }
    Taint {
        key: String,
    }
    NodeStatus {
        addresses: Option<Vec<NodeAddress>>,
    }
    NodeAddress {
        #[serde(rename = "type")]
        type_: String,
        address: String,
    }
    ServiceCidrSpec {
        cidrs: Option<Vec<String>>,
    }
    ServiceSpec {
        #[serde(rename = "type")]
        type_: Option<String>,
        #[serde(rename = "clusterIP")]
        cluster_ip: Option<String>,
        #[serde(rename = "clusterIPs")]
        cluster_ips: Option<Vec<String>>,
        #[serde(rename = "externalIPs")]
        external_ips: Option<Vec<String>>,
        load_balancer_source_ranges: Option<Vec<String>>,
        ports: Option<Vec<ServicePort>>,
        session_affinity: Option<String>,
        session_affinity_config: Option<SessionAffinityConfig>,
        internal_traffic_policy: Option<String>,
        external_traffic_policy: Option<String>,
        health_check_node_port: Option<i32>,
    }
    ServicePort {
        name: Option<String>,
        protocol: Option<String>,
        port: i32,
        node_port: Option<i32>,
    }
    SessionAffinityConfig {
        #[serde(rename = "clientIP")]
        client_ip: Option<ClientIp>,
    }
    ClientIp {
        timeout_seconds: Option<i32>,
    }
    ServiceStatus {
        load_balancer: Option<LoadBalancer>,
    }
    LoadBalancer {
        ingress: Option<Vec<Ingress>>,
    }
    Ingress {
        ip: Option<String>,
        ip_mode: Option<String>,
    }
    EndpointPort {
        name: Option<String>,
        protocol: Option<String>,
        port: Option<i32>,
    }
    Endpoint {
        /// The first of the addresses, which are interchangeable.
        #[serde(rename = "addresses", deserialize_with = "first_address")]
        address: Option<IpAddr>,
        conditions: Option<Conditions>,
        node_name: Option<String>,
        hints: Option<Hints>,
    }
    Conditions {
        ready: Option<bool>,
        serving: Option<bool>,
        terminating: Option<bool>,
    }
    Hints {
        for_nodes: Option<Vec<ForWhom>>,
        for_zones: Option<Vec<ForWhom>>,
    }
    ForWhom {
        name: String,
    }
}

#[derive(Default, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Meta {
    name: Option<String>,
    namespace: Option<String>,
    resource_version: Option<String>,
    deletion_timestamp: Option<k8s_openapi::apimachinery::pkg::apis::meta::v1::Time>,
    labels: Known,
    annotations: Known,
}

fn meta<'de, D: Deserializer<'de>>(d: D) -> Result<ObjectMeta, D::Error> {
    let m = Meta::deserialize(d)?;
    Ok(ObjectMeta {
        name: m.name,
        namespace: m.namespace,
        resource_version: m.resource_version,
        labels: m.labels.0,
        annotations: m.annotations.0,
        deletion_timestamp: m.deletion_timestamp,
        ..ObjectMeta::default()
    })
}

/// A map of strings, of which only [`keys`] are kept.
#[derive(Default)]
struct Known(Option<std::collections::BTreeMap<String, String>>);

impl<'de> Deserialize<'de> for Known {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Known, D::Error> {
        struct Keep;
        impl<'de> Visitor<'de> for Keep {
            type Value = Known;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a map of strings")
            }
            fn visit_unit<E>(self) -> Result<Known, E> {
                Ok(Known(None))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Known, A::Error> {
                let mut out = std::collections::BTreeMap::new();
                while let Some(Key(key)) = map.next_key()? {
                    match key {
                        Some(key) => drop(out.insert(key.to_owned(), map.next_value()?)),
                        None => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(Known(if out.is_empty() { None } else { Some(out) }))
            }
        }
        d.deserialize_any(Keep)
    }
}

/// Strings that are looked at where they are and not copied.
macro_rules! looked_at {
    ($name:ident, $ty:ty, $what:literal, $read:expr) => {
        struct $name($ty);

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<$name, D::Error> {
                struct Look;
                impl Visitor<'_> for Look {
                    type Value = $name;
                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str($what)
                    }
                    fn visit_str<E>(self, s: &str) -> Result<$name, E> {
                        Ok($name($read(s)))
                    }
                }
                d.deserialize_str(Look)
            }
        }
    };
}

looked_at!(Key, Option<&'static str>, "a key", |s: &str| keys::ALL.into_iter().find(|k| *k == s));
// What cannot be read is none.
looked_at!(Address, Option<IpAddr>, "an address", |s: &str| s.parse().ok());

fn first_address<'de, D: Deserializer<'de>>(d: D) -> Result<Option<IpAddr>, D::Error> {
    struct First;
    impl<'de> Visitor<'de> for First {
        type Value = Option<IpAddr>;
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a list of addresses")
        }
        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let first = list.next_element()?;
            while list.next_element::<IgnoredAny>()?.is_some() {}
            Ok(first.and_then(|Address(a)| a))
        }
    }
    d.deserialize_any(First)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn nulls_are_read_and_what_means_nothing_is_left_out() {
        let s: EndpointSlice = serde_json::from_value(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": "s-1", "namespace": "n", "resourceVersion": "7", "uid": "u",
                "labels": {"kubernetes.io/service-name": "s", "other": "x"}, "annotations": null,
                "managedFields": [{"manager": "m", "fieldsV1": {"f:endpoints": {}}}],
            },
            "addressType": "IPv4", "ports": null,
            "endpoints": [{"addresses": ["10.1.0.1", "10.1.0.9"], "conditions": {"ready": null}}, {"addresses": null}],
        }))
        .unwrap();
        assert_eq!(
            s.metadata.labels.unwrap().into_iter().collect::<Vec<_>>(),
            [("kubernetes.io/service-name".to_owned(), "s".to_owned())]
        );
        assert_eq!((s.metadata.annotations, s.metadata.uid, s.metadata.managed_fields), (None, None, None));
        let addresses: Vec<_> = s.endpoints.unwrap().into_iter().map(|e| e.address).collect();
        assert_eq!(addresses, ["10.1.0.1".parse().ok(), None]);
        // From text, where strings with escapes cannot be borrowed.
        let n: Node = serde_json::from_str(
            r#"{"metadata": {"name": "n", "labels": {"topology.kubernetes.io\/zone": "\u007a", "a": "b"}}, "spec": {}}"#,
        )
        .unwrap();
        assert_eq!(n.metadata.labels.unwrap()["topology.kubernetes.io/zone"], "z");
        let s: Service =
            serde_json::from_str(r#"{"metadata": {"name": "s"}, "spec": {"ports": null}}"#).unwrap();
        assert!(s.spec.unwrap().ports.is_none());
    }

    /// As upstream's types read them: what the two make of an object is the same.
    #[test]
    fn fields_have_upstreams_names() {
        use k8s_openapi::api::core::v1 as core;
        let full = json!({
            "metadata": {"name": "s", "namespace": "n"},
            "spec": {
                "type": "LoadBalancer", "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1"], "externalIPs": ["192.0.2.1"],
                "loadBalancerSourceRanges": ["10.0.0.0/8"], "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 7}}, "internalTrafficPolicy": "Local",
                "externalTrafficPolicy": "Local", "healthCheckNodePort": 30001,
                "ports": [{"name": "a", "protocol": "UDP", "port": 53, "nodePort": 30053}],
            },
            "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.9", "ipMode": "VIP"}]}},
        });
        let theirs: core::Service = serde_json::from_value(full.clone()).unwrap();
        let ours: Service = serde_json::from_value(full).unwrap();
        let (t, o) = (theirs.spec.unwrap(), ours.spec.unwrap());
        assert_eq!((t.type_, t.cluster_ip, t.cluster_ips), (o.type_, o.cluster_ip, o.cluster_ips));
        assert_eq!((t.external_ips, t.session_affinity), (o.external_ips, o.session_affinity));
        assert_eq!(t.load_balancer_source_ranges, o.load_balancer_source_ranges);
        assert_eq!(t.internal_traffic_policy, o.internal_traffic_policy);
        assert_eq!(t.external_traffic_policy, o.external_traffic_policy);
        assert_eq!(t.health_check_node_port, o.health_check_node_port);
        let seconds = |a: Option<Option<i32>>| a.flatten();
        assert_eq!(
            seconds(t.session_affinity_config.and_then(|c| c.client_ip).map(|c| c.timeout_seconds)),
            seconds(o.session_affinity_config.and_then(|c| c.client_ip).map(|c| c.timeout_seconds))
        );
        let (t, o) = (t.ports.unwrap().remove(0), o.ports.unwrap().remove(0));
        assert_eq!((t.name, t.protocol, t.port, t.node_port), (o.name, o.protocol, o.port, o.node_port));
        let t = theirs.status.unwrap().load_balancer.unwrap().ingress.unwrap().remove(0);
        let o = ours.status.unwrap().load_balancer.unwrap().ingress.unwrap().remove(0);
        assert_eq!((t.ip, t.ip_mode), (o.ip, o.ip_mode));

        let full =
            json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/12", "fd00::/112"]}});
        let theirs: k8s_openapi::api::networking::v1::ServiceCIDR =
            serde_json::from_value(full.clone()).unwrap();
        let ours: ServiceCIDR = serde_json::from_value(full).unwrap();
        assert_eq!(theirs.spec.unwrap().cidrs, ours.spec.unwrap().cidrs);
        let full = json!({"metadata": {"name": "n"}, "status": {"addresses": [{"type": "InternalIP", "address": "10.0.0.1"}]}});
        let theirs: core::Node = serde_json::from_value(full.clone()).unwrap();
        let ours: Node = serde_json::from_value(full).unwrap();
        let (mut t, mut o) =
            (theirs.status.unwrap().addresses.unwrap(), ours.status.unwrap().addresses.unwrap());
        let (t, o) = (t.remove(0), o.remove(0));
        assert_eq!((t.type_, t.address), (o.type_, o.address));
    }
}
