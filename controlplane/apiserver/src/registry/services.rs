//! Cluster addresses and node ports of Services: given out before a Service is stored, taken back when the write fails or
//! the Service goes. The truth is in the stored Services; this table is rebuilt from them at every start.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    ops::RangeInclusive,
    sync::Arc,
};

use ipnet::Ipv4Net;
use parking_lot::Mutex;
use rand::Rng;
use serde_json::{Value, json};

use crate::{resources::Resource, status::Status, validation::Errors, value};

const SERVICES: &str = "core/services";
/// Random tries before a linear search.
const RANDOM_TRIES: usize = 32;

/// The table. Cloning gives another handle.
#[derive(Clone)]
pub struct Services {
    table: Arc<Mutex<Table>>,
}

struct Table {
    cidr: Ipv4Net,
    ports: RangeInclusive<u16>,
    used_ips: BTreeSet<Ipv4Addr>,
    /// Port and protocol, with the number of users: a Service may use one number for several protocols.
    used_ports: BTreeMap<(u16, String), String>,
}

/// What a write took. Given back when it is dropped without [`Reservation::keep`].
#[must_use]
pub struct Reservation {
    table: Option<Arc<Mutex<Table>>>,
    ips: Vec<Ipv4Addr>,
    ports: Vec<(u16, String)>,
}

impl Reservation {
    /// Took nothing.
    pub fn none() -> Reservation {
        Reservation { table: None, ips: Vec::new(), ports: Vec::new() }
    }

    /// The object has been stored.
    pub fn keep(mut self) {
        self.table = None;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let Some(table) = self.table.take() else { return };
        let mut table = table.lock();
        self.ips.iter().for_each(|ip| {
            table.used_ips.remove(ip);
        });
        self.ports.iter().for_each(|p| {
            table.used_ports.remove(p);
        });
    }
}

fn ips_of(object: &Value) -> Vec<Ipv4Addr> {
    value::list(object, "spec.clusterIPs").iter().filter_map(|v| v.as_str()?.parse().ok()).collect()
}

fn ports_of(object: &Value) -> Vec<(u16, String)> {
    let mut all: Vec<(u16, String)> = value::list(object, "spec.ports")
        .iter()
        .filter_map(|p| {
            let port = u16::try_from(value::int(p, "nodePort")?).ok().filter(|n| *n > 0)?;
            Some((port, protocol(p).to_owned()))
        })
        .collect();
    let health =
        value::int(object, "spec.healthCheckNodePort").and_then(|n| u16::try_from(n).ok()).filter(|n| *n > 0);
    all.extend(health.map(|p| (p, "TCP".to_owned())));
    all
}

fn protocol(port: &Value) -> &str {
    match value::text(port, "protocol") {
        "" => "TCP",
        other => other,
    }
}

fn owner(object: &Value) -> String {
    format!("{}/{}", value::text(object, "metadata.namespace"), value::text(object, "metadata.name"))
}

impl Services {
    /// An empty table.
    pub fn new(cidr: Ipv4Net, ports: RangeInclusive<u16>) -> Services {
        let table = Table { cidr, ports, used_ips: BTreeSet::new(), used_ports: BTreeMap::new() };
        Services { table: Arc::new(Mutex::new(table)) }
    }

    /// Notes what a stored Service uses.
    pub fn occupy(&self, object: &Value) {
        let mut table = self.table.lock();
        table.used_ips.extend(ips_of(object));
        let owner = owner(object);
        for port in ports_of(object) {
            table.used_ports.insert(port, owner.clone());
        }
    }

    /// Takes back what `old` used and `new` does not.
    pub fn released(&self, resource: &Resource, old: &Value, new: Option<&Value>) {
        if &*resource.storage != SERVICES {
            return;
        }
        let (ips, ports) = new.map(|n| (ips_of(n), ports_of(n))).unwrap_or_default();
        let mut table = self.table.lock();
        ips_of(old).iter().filter(|ip| !ips.contains(ip)).for_each(|ip| {
            table.used_ips.remove(ip);
        });
        ports_of(old).iter().filter(|p| !ports.contains(p)).for_each(|p| {
            table.used_ports.remove(p);
        });
    }

    /// Gives a Service the addresses and ports that it wants and does not have.
    ///
    /// # Errors
    /// 422 for addresses and ports that are taken or out of range, 500 when none is left.
    pub fn reserve(
        &self,
        resource: &Resource,
        object: &mut Value,
        old: Option<&Value>,
    ) -> Result<Reservation, Status> {
        if &*resource.storage != SERVICES {
            return Ok(Reservation::none());
        }
        let mut taken = Reservation { table: Some(self.table.clone()), ips: Vec::new(), ports: Vec::new() };
        let mut errors = Errors::default();
        {
            let mut table = self.table.lock();
            let had = old.map(ips_of).unwrap_or_default();
            table.address(object, &had, &mut taken, &mut errors);
            let had = old.map(ports_of).unwrap_or_default();
            table.node_ports(object, &had, &mut taken, &mut errors);
            table.health_port(object, &had, &mut taken, &mut errors);
        }
        if errors.is_empty() {
            return Ok(taken);
        }
        Err(Status::invalid("", "Service", value::text(object, "metadata.name"), errors.into_causes()))
    }
}

impl Table {
    fn address(
        &mut self,
        object: &mut Value,
        had: &[Ipv4Addr],
        taken: &mut Reservation,
        errors: &mut Errors,
    ) {
        if value::text(object, "spec.type") == "ExternalName" {
            return;
        }
        let wanted = value::text(object, "spec.clusterIP").to_owned();
        if wanted == "None" {
            value::set(object, "spec.clusterIPs", json!(["None"]));
            return;
        }
        let ip = if wanted.is_empty() {
            match self.free_ip() {
                Some(ip) => ip,
                None => {
                    errors.invalid(
                        "spec.clusterIPs",
                        &json!([]),
                        "failed to allocate a serviceIP: range is full",
                    );
                    return;
                }
            }
        } else {
            match wanted.parse::<IpAddr>() {
                Ok(IpAddr::V4(ip)) => ip,
                Ok(IpAddr::V6(_)) | Err(_) => {
                    errors.invalid(
                        "spec.clusterIPs[0]",
                        &wanted.into(),
                        "must be a valid IPv4 address of the service network",
                    );
                    return;
                }
            }
        };
        if !had.contains(&ip) {
            if !self.cidr.contains(&ip) || ip == self.cidr.network() || ip == self.cidr.broadcast() {
                let detail = format!(
                    "failed to allocate IP {ip}: the provided network does not match the current range"
                );
                errors.invalid("spec.clusterIPs", &json!([ip.to_string()]), &detail);
                return;
            }
            if !self.used_ips.insert(ip) {
                let detail = format!("failed to allocate IP {ip}: provided IP is already allocated");
                errors.invalid("spec.clusterIPs", &json!([ip.to_string()]), &detail);
                return;
            }
            taken.ips.push(ip);
        }
        value::set(object, "spec.clusterIP", ip.to_string());
        value::set(object, "spec.clusterIPs", json!([ip.to_string()]));
        value::default(object, "spec.ipFamilies", json!(["IPv4"]));
        value::default_text(object, "spec.ipFamilyPolicy", "SingleStack");
    }

    fn free_ip(&self) -> Option<Ipv4Addr> {
        let first = u32::from(self.cidr.network()) + 1;
        let last = u32::from(self.cidr.broadcast()) - 1;
        if first > last {
            return None;
        }
        // The low part is left to addresses that users choose, such as that of the cluster DNS.
        let reserved = ((last - first + 1) / 16).min(256);
        let mut rng = rand::rng();
        if first + reserved <= last {
            for _ in 0..RANDOM_TRIES {
                let ip = Ipv4Addr::from(rng.random_range(first + reserved..=last));
                if !self.used_ips.contains(&ip) {
                    return Some(ip);
                }
            }
        }
        (first + reserved..=last)
            .chain(first..first + reserved)
            .map(Ipv4Addr::from)
            .find(|ip| !self.used_ips.contains(ip))
    }

    fn node_ports(
        &mut self,
        object: &mut Value,
        had: &[(u16, String)],
        taken: &mut Reservation,
        errors: &mut Errors,
    ) {
        let kind = value::text(object, "spec.type");
        let wants = kind == "NodePort"
            || (kind == "LoadBalancer"
                && value::at(object, "spec.allocateLoadBalancerNodePorts").and_then(Value::as_bool)
                    != Some(false));
        let allowed = matches!(kind, "NodePort" | "LoadBalancer");
        let owner = owner(object);
        // Numbers that this very Service uses: one number may serve several protocols.
        let mut mine: BTreeMap<u16, Vec<String>> = BTreeMap::new();
        for (number, protocol) in had {
            mine.entry(*number).or_default().push(protocol.clone());
        }
        for (i, port) in value::list_mut(object, "spec.ports").iter_mut().enumerate() {
            let at = format!("spec.ports[{i}].nodePort");
            let protocol = protocol(port).to_owned();
            match value::int(port, "nodePort").filter(|n| *n != 0) {
                Some(n) if !allowed => errors
                    .forbidden(&at, &format!("may not be used when `type` is '{}' (got {n})", "ClusterIP")),
                Some(n) => {
                    let Some(number) = u16::try_from(n).ok().filter(|n| self.ports.contains(n)) else {
                        let detail = format!(
                            "provided port is not in the valid range. The range of valid ports is {}-{}",
                            self.ports.start(),
                            self.ports.end()
                        );
                        errors.invalid(&at, &n.into(), &detail);
                        continue;
                    };
                    let key = (number, protocol.clone());
                    if had.contains(&key) {
                        continue;
                    }
                    if self.used_ports.contains_key(&key) {
                        errors.invalid(&at, &n.into(), "provided port is already allocated");
                        continue;
                    }
                    self.used_ports.insert(key.clone(), owner.clone());
                    mine.entry(number).or_default().push(protocol);
                    taken.ports.push(key);
                }
                None if wants => match self.free_port(&protocol) {
                    Some(number) => {
                        self.used_ports.insert((number, protocol.clone()), owner.clone());
                        taken.ports.push((number, protocol));
                        value::set(port, "nodePort", number);
                    }
                    None => errors.invalid(&at, &0.into(), "failed to allocate a nodePort: range is full"),
                },
                None => {
                    value::remove(port, "nodePort");
                }
            }
        }
    }

    fn health_port(
        &mut self,
        object: &mut Value,
        had: &[(u16, String)],
        taken: &mut Reservation,
        errors: &mut Errors,
    ) {
        let needed = value::text(object, "spec.type") == "LoadBalancer"
            && value::text(object, "spec.externalTrafficPolicy") == "Local";
        if !needed {
            value::remove(object, "spec.healthCheckNodePort");
            return;
        }
        let wanted = value::int(object, "spec.healthCheckNodePort")
            .and_then(|n| u16::try_from(n).ok())
            .filter(|n| *n > 0);
        let owner = owner(object);
        match wanted {
            Some(n) if had.contains(&(n, "TCP".into())) => {}
            Some(n) if self.used_ports.contains_key(&(n, "TCP".into())) => {
                errors.invalid("spec.healthCheckNodePort", &n.into(), "provided port is already allocated");
            }
            Some(n) => {
                self.used_ports.insert((n, "TCP".into()), owner);
                taken.ports.push((n, "TCP".into()));
            }
            None => {
                if let Some(n) = self.free_port("TCP") {
                    self.used_ports.insert((n, "TCP".into()), owner);
                    taken.ports.push((n, "TCP".into()));
                    value::set(object, "spec.healthCheckNodePort", n);
                }
            }
        }
    }

    fn free_port(&self, protocol: &str) -> Option<u16> {
        let free = |n: &u16| !self.used_ports.contains_key(&(*n, protocol.to_owned()));
        let (first, last) = (*self.ports.start(), *self.ports.end());
        let chosen = first.saturating_add(reserved_ports(self.ports.len()));
        let mut rng = rand::rng();
        (0..RANDOM_TRIES)
            .filter(|_| chosen <= last)
            .map(|_| rng.random_range(chosen..=last))
            .find(free)
            .or_else(|| (chosen..=last).chain(first..chosen).find(free))
    }
}

/// How many of `size` node ports, the lowest, are left to users who choose one (KEP-3668).
fn reserved_ports(size: usize) -> u16 {
    if size < 16 { 0 } else { (size / 32).clamp(16, 128) as u16 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::ResourceTable;

    fn setup() -> (Services, Arc<Resource>) {
        let table = ResourceTable::builtin();
        let services = Services::new("10.0.0.0/29".parse().expect("net"), 30000..=30002);
        (services, table.get("", "v1", "services").expect("services").clone())
    }

    fn service(name: &str, kind: &str, ip: &str) -> Value {
        json!({"metadata": {"name": name, "namespace": "a"}, "spec": {"type": kind, "clusterIP": ip, "ports": [{"port": 80, "protocol": "TCP"}]}})
    }

    #[test]
    fn addresses_are_unique_and_come_back() {
        let (services, r) = setup();
        let mut seen = BTreeSet::new();
        let mut all = Vec::new();
        for i in 0..6 {
            let mut s = service(&format!("s{i}"), "ClusterIP", "");
            services.reserve(&r, &mut s, None).expect("free").keep();
            assert!(seen.insert(value::text(&s, "spec.clusterIP").to_owned()));
            all.push(s);
        }
        assert_eq!(
            services.reserve(&r, &mut service("x", "ClusterIP", ""), None).err().expect("full").code,
            422
        );
        services.released(&r, &all[2], None);
        let mut again = service("x", "ClusterIP", "");
        // Dropped without keep: as if the write had failed.
        drop(services.reserve(&r, &mut again, None).expect("free"));
        let mut again = service("y", "ClusterIP", value::text(&all[2], "spec.clusterIP"));
        services.reserve(&r, &mut again, None).expect("free").keep();
        assert!(services.reserve(&r, &mut service("z", "ClusterIP", "10.9.9.9"), None).is_err());
    }

    #[test]
    fn low_node_ports_are_left_to_users() {
        assert_eq!([0, 15, 16, 1000, 2768, 65535].map(reserved_ports), [0, 0, 16, 31, 86, 128]);
        let services = Services::new("10.9.0.0/16".parse().expect("net"), 30000..=30039);
        let r = setup().1;
        let mut ports = Vec::new();
        for i in 0..40 {
            let mut s = service(&format!("s{i}"), "NodePort", "");
            services.reserve(&r, &mut s, None).expect("free").keep();
            ports.push(value::int(&s["spec"]["ports"][0], "nodePort").expect("port"));
        }
        assert!(ports[..24].iter().all(|p| *p >= 30016), "{ports:?}");
        assert!(ports[24..].iter().all(|p| *p < 30016), "{ports:?}");
    }

    #[test]
    fn node_ports_follow_the_type() {
        let (services, r) = setup();
        let mut s = service("a", "NodePort", "");
        services.reserve(&r, &mut s, None).expect("free").keep();
        let port = value::int(&s["spec"]["ports"][0], "nodePort").expect("port");
        assert!((30000..=30002).contains(&port));
        // An update that keeps the port is no conflict with itself.
        let mut same = s.clone();
        services.reserve(&r, &mut same, Some(&s)).expect("own port").keep();
        let mut clash = service("b", "NodePort", "");
        clash["spec"]["ports"][0]["nodePort"] = port.into();
        assert!(services.reserve(&r, &mut clash, None).is_err());
        let mut headless = service("c", "ClusterIP", "None");
        services.reserve(&r, &mut headless, None).expect("headless").keep();
        assert_eq!(headless["spec"]["clusterIPs"], json!(["None"]));
    }
}
