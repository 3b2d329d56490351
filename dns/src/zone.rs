//! The tables that answers come from: what Services and EndpointSlices say, and nothing else of them.

use std::collections::HashMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;

const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// Transport protocol of a port, as it stands in SRV names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    fn of(name: Option<&str>) -> Protocol {
        match name {
            Some("UDP") => Protocol::Udp,
            Some("SCTP") => Protocol::Sctp,
            _ => Protocol::Tcp,
        }
    }

    /// From the label of an SRV name, such as `_tcp`.
    pub fn from_label(label: &str) -> Option<Protocol> {
        match label {
            "_tcp" => Some(Protocol::Tcp),
            "_udp" => Some(Protocol::Udp),
            "_sctp" => Some(Protocol::Sctp),
            _ => None,
        }
    }
}

/// A named port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    pub name: Box<str>,
    pub protocol: Protocol,
    pub port: u16,
}

/// What a Service's name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    ClusterIp(Box<[IpAddr]>),
    Headless { publish_not_ready: bool },
    ExternalName(Box<str>),
}

/// What is kept of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    pub kind: Kind,
    /// Those with a name.
    pub ports: Box<[Port]>,
}

impl Spec {
    /// `None` for a Service that has no address yet.
    pub fn of(service: &Service) -> Option<Spec> {
        let spec = service.spec.as_ref()?;
        let kind = if spec.type_.as_deref() == Some("ExternalName") {
            Kind::ExternalName(spec.external_name.as_deref()?.trim_end_matches('.').into())
        } else if spec.cluster_ip.as_deref() == Some("None") {
            Kind::Headless { publish_not_ready: spec.publish_not_ready_addresses.unwrap_or_default() }
        } else {
            let many = spec.cluster_ips.iter().flatten();
            let mut ips: Vec<IpAddr> = many.filter_map(|ip| ip.parse().ok()).collect();
            if ips.is_empty() {
                ips.extend(spec.cluster_ip.as_deref().and_then(|ip| ip.parse::<IpAddr>().ok()));
            }
            if ips.is_empty() {
                return None;
            }
            Kind::ClusterIp(ips.into())
        };
        let ports = spec.ports.iter().flatten().filter_map(|p| {
            Some(Port {
                name: p.name.as_deref().filter(|n| !n.is_empty())?.into(),
                protocol: Protocol::of(p.protocol.as_deref()),
                port: u16::try_from(p.port).ok()?,
            })
        });
        Some(Spec { kind, ports: ports.collect() })
    }
}

/// One address behind a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub ip: IpAddr,
    pub hostname: Option<Box<str>>,
    pub ready: bool,
}

impl Endpoint {
    /// The label of the endpoint below its Service: its hostname, else its address with dashes.
    pub fn label(&self) -> String {
        match &self.hostname {
            Some(h) => h.to_string(),
            None => dashed(self.ip),
        }
    }

    pub fn has_label(&self, label: &str) -> bool {
        match &self.hostname {
            Some(h) if &**h == label => true,
            _ => undash(label) == Some(self.ip),
        }
    }
}

/// An address as one label: `10-0-0-1`, `fd00--1`.
pub fn dashed(ip: IpAddr) -> String {
    ip.to_string().replace(['.', ':'], "-")
}

/// The address that a label such as `10-0-0-1` stands for.
pub fn undash(label: &str) -> Option<IpAddr> {
    if !label.contains('-') {
        return None;
    }
    label.replace('-', ".").parse().or_else(|_| label.replace('-', ":").parse()).ok()
}

/// What is kept of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    pub endpoints: Box<[Endpoint]>,
    pub ports: Box<[Port]>,
}

impl Slice {
    /// The Service that the slice belongs to and what is kept; `None` for a slice of no Service or of names.
    pub fn of(slice: &EndpointSlice) -> Option<(&str, Slice)> {
        let service = slice.metadata.labels.as_ref()?.get(SERVICE_NAME_LABEL)?;
        if slice.address_type == "FQDN" {
            return None;
        }
        let endpoints = slice.endpoints.iter().flatten().filter_map(|e| {
            // Consumers use the first address only; all of them are interchangeable.
            let ip = e.addresses.first()?.parse().ok()?;
            // Unset means ready.
            let ready = e.conditions.as_ref().and_then(|c| c.ready).unwrap_or(true);
            let hostname = e.hostname.as_deref().filter(|h| !h.is_empty()).map(Box::from);
            Some(Endpoint { ip, hostname, ready })
        });
        let ports = slice.ports.iter().flatten().filter_map(|p| {
            Some(Port {
                name: p.name.as_deref().filter(|n| !n.is_empty())?.into(),
                protocol: Protocol::of(p.protocol.as_deref()),
                port: u16::try_from(p.port?).ok()?,
            })
        });
        let kept = Slice { endpoints: endpoints.collect(), ports: ports.collect() };
        Some((service, kept))
    }
}

/// A Service and its slices; either may be known before the other.
#[derive(Clone, Debug, Default)]
pub struct Entry {
    pub spec: Option<Spec>,
    slices: Vec<(Box<str>, Slice)>,
}

impl Entry {
    fn is_empty(&self) -> bool {
        self.spec.is_none() && self.slices.is_empty()
    }

    /// The endpoints that a headless Service's name stands for, with the ports of their slice; none for other Services.
    pub fn published(&self) -> impl Iterator<Item = (&Endpoint, &[Port])> {
        let all = match self.spec.as_ref().map(|s| &s.kind) {
            Some(Kind::Headless { publish_not_ready }) => Some(*publish_not_ready),
            _ => None,
        };
        let slices = all.is_some().then_some(&self.slices).into_iter().flatten();
        slices
            .flat_map(|(_, s)| s.endpoints.iter().map(move |e| (e, &*s.ports)))
            .filter(move |(e, _)| e.ready || all == Some(true))
    }
}

#[derive(Debug, Default)]
struct Namespace {
    exists: bool,
    services: HashMap<Box<str>, Entry>,
}

/// Everything that cluster names are answered from.
#[derive(Debug, Default)]
pub struct Zone {
    namespaces: HashMap<Box<str>, Namespace>,
    /// Namespace and name of the Service that has an address.
    by_cluster_ip: HashMap<IpAddr, (Box<str>, Box<str>)>,
    /// Counts changes; the serial of the SOA record.
    serial: u32,
}

impl Zone {
    pub fn serial(&self) -> u32 {
        self.serial
    }

    pub fn set_namespace(&mut self, name: &str, exists: bool) {
        self.serial = self.serial.wrapping_add(1);
        self.namespaces.entry(name.into()).or_default().exists = exists;
        self.tidy(name);
    }

    /// `None` removes the Service.
    pub fn set_service(&mut self, namespace: &str, name: &str, spec: Option<Spec>) {
        self.serial = self.serial.wrapping_add(1);
        let entry = self.entry(namespace, name);
        let old = entry.spec.take();
        if let Some(Kind::ClusterIp(ips)) = old.map(|s| s.kind) {
            for ip in &ips {
                // A new Service may have got the address before the old one's removal is seen.
                if self.by_cluster_ip.get(ip).is_some_and(|(ns, n)| &**ns == namespace && &**n == name) {
                    self.by_cluster_ip.remove(ip);
                }
            }
        }
        if let Some(Spec { kind: Kind::ClusterIp(ips), .. }) = &spec {
            for ip in ips {
                self.by_cluster_ip.insert(*ip, (namespace.into(), name.into()));
            }
        }
        self.entry(namespace, name).spec = spec;
        self.tidy_service(namespace, name);
    }

    /// `None` removes the slice.
    pub fn set_slice(&mut self, namespace: &str, service: &str, slice: &str, content: Option<Slice>) {
        self.serial = self.serial.wrapping_add(1);
        let known = |e: &Entry| e.slices.iter().any(|(n, _)| &**n == slice);
        if content.is_some()
            && let Some(ns) = self.namespaces.get_mut(namespace)
            && !ns.services.get(service).is_some_and(known)
        {
            // It may have been another Service's before its label changed.
            for entry in ns.services.values_mut() {
                entry.slices.retain(|(n, _)| &**n != slice);
            }
        }
        let slices = &mut self.entry(namespace, service).slices;
        let at = slices.iter().position(|(n, _)| &**n == slice);
        match (at.and_then(|i| slices.get_mut(i)), content) {
            (Some(known), Some(content)) => known.1 = content,
            (None, Some(content)) => slices.push((slice.into(), content)),
            (_, None) => slices.retain(|(n, _)| &**n != slice),
        }
        self.tidy_service(namespace, service);
    }

    fn entry(&mut self, namespace: &str, name: &str) -> &mut Entry {
        // Looked up first, as most changes are to what is known and need no new key.
        if !self.namespaces.contains_key(namespace) {
            self.namespaces.insert(namespace.into(), Namespace::default());
        }
        let services = &mut self.namespaces.entry(namespace.into()).or_default().services;
        services.entry(name.into()).or_default()
    }

    fn tidy_service(&mut self, namespace: &str, name: &str) {
        if let Some(ns) = self.namespaces.get_mut(namespace)
            && ns.services.get(name).is_some_and(Entry::is_empty)
        {
            ns.services.remove(name);
        }
        self.tidy(namespace);
    }

    fn tidy(&mut self, namespace: &str) {
        if self.namespaces.get(namespace).is_some_and(|ns| !ns.exists && ns.services.is_empty()) {
            self.namespaces.remove(namespace);
        }
    }

    /// Names of all namespaces that were said to exist.
    pub fn namespaces(&self) -> Vec<String> {
        self.namespaces.iter().filter(|(_, ns)| ns.exists).map(|(n, _)| n.to_string()).collect()
    }

    /// Namespace and name of all Services.
    pub fn services(&self) -> Vec<(String, String)> {
        let all = self.namespaces.iter().flat_map(|(ns, n)| n.services.iter().map(move |(s, e)| (ns, s, e)));
        all.filter(|(_, _, e)| e.spec.is_some()).map(|(ns, s, _)| (ns.to_string(), s.to_string())).collect()
    }

    /// Namespace, Service and name of all slices.
    pub fn slices(&self) -> Vec<(String, String, String)> {
        let mut all = Vec::new();
        for (ns, n) in &self.namespaces {
            for (service, e) in &n.services {
                all.extend(
                    e.slices.iter().map(|(s, _)| (ns.to_string(), service.to_string(), s.to_string())),
                );
            }
        }
        all
    }

    pub fn has_namespace(&self, name: &str) -> bool {
        self.namespaces.contains_key(name)
    }

    /// A Service that exists.
    pub fn service(&self, namespace: &str, name: &str) -> Option<&Entry> {
        self.namespaces.get(namespace)?.services.get(name).filter(|e| e.spec.is_some())
    }

    pub fn service_of_ip(&self, ip: IpAddr) -> Option<(&str, &str)> {
        self.by_cluster_ip.get(&ip).map(|(ns, n)| (&**ns, &**n))
    }

    /// Label, Service and namespace of each published endpoint with the address. Walks over everything: it is asked
    /// seldom, and an index would cost memory for every endpoint.
    pub fn endpoints_of_ip(&self, ip: IpAddr) -> Vec<(String, &str, &str)> {
        let mut found = Vec::new();
        for (namespace, ns) in &self.namespaces {
            for (name, entry) in &ns.services {
                let first = entry.published().find(|(e, _)| e.ip == ip);
                found.extend(first.map(|(e, _)| (e.label(), &**name, &**namespace)));
            }
        }
        found
    }
}
