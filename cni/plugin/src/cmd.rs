//! The commands of the specification.

use ipnet::IpNet;
use orlop_cni_types::{
    Attachment, CniResult, Command, Dns, HOST_INTERFACE_PREFIX, Interface, IpConfig, Route, SpecVersion,
    VersionResult,
};
use serde_json::Value;

use crate::Work;
use crate::error::Error;
use crate::ipam::{State, Store, link_of};
use crate::links;
use crate::nat::{self, Nat};
use crate::netlink::Netlink;
use crate::wire::{self, Netns, Wiring};

impl Work<'_> {
    /// What is to be printed, if anything.
    pub(crate) fn run(&self) -> Result<Option<Value>, Error> {
        let (command, conf) = (self.call.command, self.conf);
        if conf.version < command.since() {
            return Err(Error::NotInVersion(conf.version, command.as_str()));
        }
        let loopback = conf.plugin_type == "loopback";
        match command {
            Command::Add if loopback => loopback_add(self).map(Some),
            Command::Add => add(self).map(Some),
            Command::Del if loopback => Ok(None),
            Command::Del => del(self).map(|()| None),
            Command::Check if loopback => loopback_check(self).map(|()| None),
            Command::Check => check(self).map(|()| None),
            Command::Status | Command::Gc if loopback => Ok(None),
            Command::Status => status(self).map(|()| None),
            Command::Gc => gc(self).map(|()| None),
            Command::Version => Ok(Some(version())),
        }
    }
}

/// The answer to VERSION.
pub fn version() -> Value {
    let answer = VersionResult {
        cni_version: SpecVersion::V1_1_0.as_str().to_owned(),
        supported_versions: SpecVersion::SUPPORTED.iter().map(|v| v.as_str().to_owned()).collect(),
    };
    serde_json::to_value(answer).unwrap_or_default()
}

impl Work<'_> {
    fn attachment(&self) -> Result<Attachment, Error> {
        if self.call.container_id.is_empty() {
            return Err(Error::Environment("CNI_CONTAINERID"));
        }
        if self.call.ifname.is_empty() || self.call.ifname.len() > 15 || self.call.ifname.contains(['/', ' '])
        {
            return Err(Error::Environment("CNI_IFNAME"));
        }
        Ok(Attachment { container_id: self.call.container_id.clone(), ifname: self.call.ifname.clone() })
    }

    fn open_netns(&self) -> Result<Netns, Error> {
        if self.call.netns.as_os_str().is_empty() {
            return Err(Error::Environment("CNI_NETNS"));
        }
        Netns::open(&self.call.netns)
    }

    /// How an operator sees the host's interface: the pod, else the container.
    fn alias(&self) -> String {
        let arg = |name: &str| {
            self.call
                .args
                .split(';')
                .filter_map(|a| a.split_once('='))
                .find(|(k, _)| *k == name)
                .map(|(_, v)| v)
        };
        match (arg("K8S_POD_NAMESPACE"), arg("K8S_POD_NAME")) {
            (Some(namespace), Some(name)) if !name.is_empty() => format!("{namespace}/{name}"),
            _ => self.call.container_id.clone(),
        }
    }
}

/// The record of addresses. One that is damaged is made anew from what pods' links tell: it must neither keep pods from being deleted
/// nor give an address twice. `host` is of the node's network namespace.
fn open_store(work: &Work<'_>, host: &mut Netlink) -> Result<Store, Error> {
    let conf = work.conf;
    let mut store = Store::open(&conf.data_dir, &conf.network, work.deadline)?;
    if store.damaged {
        let mut known = Vec::new();
        for (ip, index) in links::routed_addresses(host)? {
            // Other networks' pods are theirs.
            if conf.ranges.iter().flatten().any(|r| r.contains(ip))
                && let Some(link) = links::find_index(host, index)?
                && link.name.starts_with(HOST_INTERFACE_PREFIX)
            {
                known.push((ip, link.name));
            }
        }
        work.note(format!(
            "the record of addresses is damaged; made it anew with the {} that are in use",
            known.len()
        ));
        store.repair(State::of_links(known))?;
    }
    Ok(store)
}

fn add(work: &Work<'_>) -> Result<Value, Error> {
    let conf = work.conf;
    if conf.previous.is_some() {
        return Err(Error::NotFirst);
    }
    let attachment = work.attachment()?;
    let netns = work.open_netns()?;
    let mut host = links::open()?;
    let needs_nat = conf.masquerade.is_some() || !conf.port_mappings.is_empty();
    let (mut nat, opened) = match needs_nat.then(|| Nat::open(conf)).transpose() {
        Ok(nat) => (nat, Ok(())),
        Err(e) => (None, Err(e)),
    };

    let mut store = open_store(work, &mut host)?;
    store.state.recognize(&attachment);
    let had_addresses = !store.state.ips_of(&attachment).is_empty();
    let ips = store.state.allocate(&attachment, &conf.ranges, &conf.wanted_ips)?;
    store.save()?;
    let published = opened.and_then(|()| nat.as_mut().map_or(Ok(()), |n| n.publish(conf, &ips)));
    // Others need not wait for the links.
    drop(store);

    let wiring = Wiring {
        attachment: &attachment,
        host_name: attachment.host_interface(),
        ips: &ips,
        mtu: conf.mtu,
        mac: conf.mac,
        alias: &work.alias(),
        from_loopback: nat::on_loopback(&conf.port_mappings),
    };
    let published = match published {
        // Pods talk to each other all the same.
        Err(e @ Error::NoNftables(_)) if conf.port_mappings.is_empty() => {
            work.note(format!("pods do not reach the world: {}", orlop_base::telemetry::chain(&e)));
            Ok(())
        }
        other => other,
    };
    let wired = match published.and_then(|()| wiring.attach(&mut host, &netns)) {
        Ok(wired) => wired,
        Err(e) => {
            // A second ADD must not destroy what the first made; the runtime has to send DEL.
            if !had_addresses {
                undo(work, &mut host, nat.as_mut(), &attachment);
            }
            return Err(e);
        }
    };
    let mac = |m: [u8; 6]| m.map(|b| format!("{b:02x}")).join(":");
    let result = CniResult {
        interfaces: vec![
            Interface {
                name: wiring.host_name.clone(),
                mac: mac(wired.host_mac),
                mtu: Some(wired.mtu),
                ..Interface::default()
            },
            Interface {
                name: attachment.ifname.clone(),
                mac: mac(wired.pod_mac),
                mtu: Some(wired.mtu),
                sandbox: work.call.netns.to_string_lossy().into_owned(),
                ..Interface::default()
            },
        ],
        ips: ips
            .iter()
            .map(|&ip| IpConfig {
                address: IpNet::from(ip),
                interface: Some(1),
                gateway: Some(wire::gateway(ip)),
            })
            .collect(),
        routes: default_routes(&ips),
        dns: Dns::default(),
    };
    Ok(result.to_value(conf.version))
}

fn default_routes(ips: &[std::net::IpAddr]) -> Vec<Route> {
    [(true, "0.0.0.0/0", wire::GATEWAY_V4), (false, "::/0", wire::GATEWAY_V6)]
        .into_iter()
        .filter(|(v4, ..)| ips.iter().any(|ip| ip.is_ipv4() == *v4))
        .filter_map(|(_, dst, gateway)| {
            Some(Route {
                dst: dst.parse().ok()?,
                gw: Some(gateway),
                mtu: None,
                advmss: None,
                priority: None,
                table: None,
                scope: None,
            })
        })
        .collect()
}

/// Best effort: the runtime sends DEL after a failed ADD in any case.
fn undo(work: &Work<'_>, host: &mut Netlink, nat: Option<&mut Nat>, attachment: &Attachment) {
    let freed = links::delete_from_afar(host, &attachment.host_interface())
        .and_then(|_| release(work, host, nat, attachment));
    if let Err(e) = freed {
        work.note(format!("cannot undo yet: {}", orlop_base::telemetry::chain(&e)));
    }
}

/// Frees the attachment's addresses and takes back what leads to them.
fn release(
    work: &Work<'_>,
    host: &mut Netlink,
    nat: Option<&mut Nat>,
    attachment: &Attachment,
) -> Result<(), Error> {
    let mut store = open_store(work, host)?;
    store.state.recognize(attachment);
    release_from(&mut store, nat, attachment)
}

fn release_from(store: &mut Store, nat: Option<&mut Nat>, attachment: &Attachment) -> Result<(), Error> {
    let ips = store.state.ips_of(attachment);
    let last = store.state.owners_not_in(std::slice::from_ref(attachment)).is_empty();
    if let Some(nat) = nat {
        // Also when nothing is on record: a killed ADD or DEL may have left the table.
        match last {
            true => nat.remove()?,
            false if ips.is_empty() => {}
            false => nat.withdraw(&ips)?,
        }
    }
    if store.state.release(attachment) {
        store.save_shorter()?;
    }
    Ok(())
}

/// First the link, then the address: nobody may get an address that still leads to this pod.
fn del(work: &Work<'_>) -> Result<(), Error> {
    let attachment = work.attachment()?;
    let mut host = links::open()?;
    // While there is a link to tell what a damaged record does not. The link goes in any case.
    let opened = open_store(work, &mut host).map(drop);
    links::delete(&mut host, &attachment.host_interface(), work.host)?;
    match opened {
        // The first that is made of a record is the lock's file: on a full disk without it, nothing was ever given.
        Err(Error::Ipam(e)) if e.is_full() => Ok(()),
        Err(e) => Err(e),
        Ok(()) => release(work, &mut host, Nat::open_existing(work.conf)?.as_mut(), &attachment),
    }
}

fn check(work: &Work<'_>) -> Result<(), Error> {
    let (call, conf) = (work.call, work.conf);
    let attachment = work.attachment()?;
    let netns = work.open_netns()?;
    let Some(previous) = conf.previous_result()? else {
        return Err(Error::Field { field: "prevResult", problem: "is missing; CHECK needs it".to_owned() });
    };
    let ours = previous.interfaces.iter().position(|i| i.name == call.ifname && !i.sandbox.is_empty());
    let ips: Vec<_> = previous
        .ips
        .iter()
        .filter(|ip| ip.interface.is_none() || ip.interface == ours)
        .map(|ip| ip.address.addr())
        .collect();
    let mut store = open_store(work, &mut links::open()?)?;
    store.state.recognize(&attachment);
    let own = store.state.ips_of(&attachment);
    drop(store);
    if let Some(ip) = ips.iter().find(|ip| !own.contains(ip)) {
        return Err(Error::Check(format!("address {ip} is not recorded as this container's")));
    }
    if !conf.port_mappings.is_empty() && !Nat::open(conf)?.check(conf, &ips)? {
        return Err(Error::Check("a host port does not lead to the pod".to_owned()));
    }
    wire::check(&attachment.host_interface(), &attachment.ifname, &ips, &netns)
}

/// Whether an ADD can be served: the ranges are read already, so what remains is the record. A full range is no reason to
/// say no: the node would be reported as not ready for that.
fn status(work: &Work<'_>) -> Result<(), Error> {
    open_store(work, &mut links::open()?)?.save()?;
    Ok(())
}

fn gc(work: &Work<'_>) -> Result<(), Error> {
    let conf = work.conf;
    let Some(valid) = &conf.valid else {
        // Taking a missing list for an empty one would cut every pod off.
        return Err(Error::Field {
            field: orlop_cni_types::VALID_ATTACHMENTS,
            problem: "is missing; GC needs the list of attachments to keep".to_owned(),
        });
    };
    let mut host = links::open()?;
    let mut nat = Nat::open_existing(conf)?;
    let mut store = open_store(work, &mut host)?;
    valid.iter().for_each(|owner| store.state.recognize(owner));
    for owner in store.state.owners_not_in(valid) {
        links::delete(&mut host, &link_of(&owner), work.host)?;
        release_from(&mut store, nat.as_mut(), &owner)?;
    }
    Ok(())
}

fn loopback_add(work: &Work<'_>) -> Result<Value, Error> {
    let conf = work.conf;
    wire::loopback_up(&work.open_netns()?)?;
    if let Some(previous) = conf.previous_result()? {
        return Ok(previous.to_value(conf.version));
    }
    let result = CniResult {
        interfaces: vec![Interface {
            name: "lo".to_owned(),
            mac: "00:00:00:00:00:00".to_owned(),
            sandbox: work.call.netns.to_string_lossy().into_owned(),
            ..Interface::default()
        }],
        ips: ["127.0.0.1/8", "::1/128"]
            .iter()
            .filter_map(|a| Some(IpConfig { address: a.parse().ok()?, interface: Some(0), gateway: None }))
            .collect(),
        ..CniResult::default()
    };
    Ok(result.to_value(conf.version))
}

fn loopback_check(work: &Work<'_>) -> Result<(), Error> {
    match wire::loopback_is_up(&work.open_netns()?)? {
        true => Ok(()),
        false => Err(Error::Check("interface lo of the pod is down".to_owned())),
    }
}
