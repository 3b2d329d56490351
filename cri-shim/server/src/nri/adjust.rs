//! What plugins make of a container, put into its OCI spec. What this node's runtime cannot do is refused by name.

use std::path::{Component, Path};

use oci_spec::runtime::Spec;
use orlop_nri::api::{self, Field};
use orlop_nri::{Owners, removal};
use serde_json::{Map, Value, json};

use super::resources::refused;
use crate::error::{Error, Result};
use crate::mounts::{Propagation, propagation_of};

/// What the spec is for.
pub(super) struct Target<'a> {
    pub id: &'a str,
    pub owners: &'a Owners,
    /// Our own runtime, not one of another program.
    pub own: bool,
    /// Below it none may go without the right to.
    pub least_oom_score_adj: i32,
}

impl Target<'_> {
    pub fn who(&self, field: Field, key: Option<&str>) -> String {
        match self.owners.of(self.id, field, key) {
            Some(plugin) => plugin.to_owned(),
            None => self.owners.all(self.id).join(", "),
        }
    }

    fn refused(&self, field: Field, key: Option<&str>, what: &str, why: &str) -> Error {
        refused(self.who(field, key), what, why)
    }
}

/// Everything but resources and CDI devices.
pub(super) fn adjust(spec: &Spec, given: &api::ContainerAdjustment, target: &Target) -> Result<Spec> {
    let broken = |e: serde_json::Error| {
        let plugins = target.owners.all(target.id).join(", ");
        Error::Invalid(format!("what NRI plugins {plugins} ask for makes no valid OCI spec: {e}"))
    };
    let mut json = serde_json::to_value(spec).map_err(broken)?;
    let whole = &mut json;
    entries(&mut whole["annotations"], given.annotations.iter().map(|(k, v)| (k, v.as_str().into())));
    env(&mut whole["process"], &given.env, target)?;
    if !given.args.is_empty() {
        whole["process"]["args"] = given.args.clone().into();
    }
    hooks(whole, given.hooks.as_ref());
    for limit in &given.rlimits {
        let value = json!({"type": limit.r#type, "hard": limit.hard, "soft": limit.soft});
        replace(&mut whole["process"]["rlimits"], "type", &limit.r#type, Some(value));
    }
    if let Some(linux) = &given.linux {
        adjust_linux(whole, linux, target)?;
    }
    mounts(whole, &given.mounts, target)?;
    serde_json::from_value(json).map_err(broken)
}

fn adjust_linux(spec: &mut Value, given: &api::LinuxContainerAdjustment, target: &Target) -> Result<()> {
    for d in &given.devices {
        let (path, removed) = removal(&d.path);
        let value = (!removed).then(|| device(d));
        replace(&mut spec["linux"]["devices"], "path", path, value);
        if !removed && d.r#type != "p" {
            let rule =
                json!({"allow": true, "type": d.r#type, "major": d.major, "minor": d.minor, "access": "rwm"});
            array(&mut spec["linux"]["resources"]["devices"]).push(rule);
        }
    }
    if let Some(score) = given.oom_score_adj {
        let score = score.value.clamp(-1000, 1000).max(target.least_oom_score_adj.into());
        spec["process"]["oomScoreAdj"] = score.into();
    }
    if let Some(policy) = &given.seccomp_policy {
        spec["linux"]["seccomp"] = seccomp(policy);
    }
    for n in &given.namespaces {
        let (kind, removed) = removal(&n.r#type);
        let mut value = json!({"type": kind});
        if !n.path.is_empty() {
            value["path"] = n.path.as_str().into();
        }
        replace(&mut spec["linux"]["namespaces"], "type", kind, (!removed).then_some(value));
    }
    refuse_unknown(given, target)?;
    entries(&mut spec["linux"]["sysctl"], given.sysctl.iter().map(|(k, v)| (k, v.as_str().into())));
    let net = given.net_devices.iter().map(|(k, d)| (k, json!({"name": d.name})));
    entries(&mut spec["linux"]["netDevices"], net);
    if let Some(p) = given.io_priority {
        spec["process"]["ioPriority"] = json!({"class": p.class().as_str_name(), "priority": p.priority});
    }
    if let Some(s) = &given.scheduler {
        // Two that the library for OCI specs spells in its own way.
        let name = |f: api::LinuxSchedulerFlag| match f {
            api::LinuxSchedulerFlag::SchedFlagResetOnFork if target.own => "SCHED_RESET_ON_FORK",
            api::LinuxSchedulerFlag::SchedFlagDlOverrun if target.own => "SCHED_FLAG_D_L_OVERRUN",
            f => f.as_str_name(),
        };
        let flags: Vec<_> = s.flags().map(name).collect();
        spec["process"]["scheduler"] = json!({"policy": s.policy().as_str_name(), "nice": s.nice, "priority": s.priority,
            "flags": flags, "runtime": s.runtime, "deadline": s.deadline, "period": s.period});
    }
    if let Some(m) = &given.memory_policy {
        let flags: Vec<_> = m.flags().map(|f| f.as_str_name()).collect();
        spec["linux"]["memoryPolicy"] =
            json!({"mode": m.mode().as_str_name(), "nodes": m.nodes, "flags": flags});
    }
    if let Some(rdt) = &given.rdt {
        if rdt.remove {
            spec["linux"]["intelRdt"] = Value::Null;
        }
        let to = &mut spec["linux"]["intelRdt"];
        if let Some(v) = &rdt.clos_id {
            to["closID"] = v.value.as_str().into();
        }
        if let Some(v) = &rdt.schemata {
            to["schemata"] = v.value.clone().into();
        }
        if let Some(v) = rdt.enable_monitoring {
            to["enableMonitoring"] = v.value.into();
        }
    }
    Ok(())
}

/// Other programs' runtimes may know what ours does not.
fn refuse_unknown(given: &api::LinuxContainerAdjustment, target: &Target) -> Result<()> {
    if !target.own {
        return Ok(());
    }
    let net = given.net_devices.keys().find(|k| !removal(k).1).cloned();
    let rdt = given
        .rdt
        .as_ref()
        .is_some_and(|r| r.clos_id.is_some() || r.schemata.is_some() || r.enable_monitoring.is_some());
    let rdt_field = [Field::RdtClosId, Field::RdtSchemata, Field::RdtEnableMonitoring]
        .into_iter()
        .find(|f| target.owners.of(target.id, *f, None).is_some())
        .unwrap_or(Field::RdtClosId);
    for (asked, field, key, what) in [
        (net.is_some(), Field::LinuxNetDevices, net.as_deref(), "a network device"),
        (given.memory_policy.is_some(), Field::MemoryPolicy, None, "a memory policy"),
        (rdt, rdt_field, None, "Intel RDT"),
    ] {
        if asked {
            let what = key.map_or_else(|| what.to_owned(), |key| format!("{what}, {key}"));
            return Err(target.refused(field, key, &what, "this node's runtime does not support it"));
        }
    }
    Ok(())
}

fn array(v: &mut Value) -> &mut Vec<Value> {
    if !v.is_array() {
        *v = Value::Array(Vec::new());
    }
    match v {
        Value::Array(a) => a,
        // Made one above.
        _ => unreachable!(),
    }
}

/// Puts `value` in the place of the entry whose `key` is `name`, or at the end; without a value the entry goes.
fn replace(list: &mut Value, key: &str, name: &str, value: Option<Value>) {
    if value.is_none() && list.is_null() {
        return;
    }
    let list = array(list);
    let at = list.iter().position(|held| held[key] == name);
    match (at, value) {
        (Some(at), Some(value)) => list[at] = value,
        (Some(at), None) => drop(list.remove(at)),
        (None, Some(value)) => list.push(value),
        (None, None) => {}
    }
}

/// Removals first: a plugin may take away and set anew.
fn entries<'a>(to: &mut Value, given: impl Iterator<Item = (&'a String, Value)>) {
    let (removed, set): (Vec<_>, Vec<_>) = given.partition(|(k, _)| removal(k).1);
    if removed.is_empty() && set.is_empty() {
        return;
    }
    let mut map = to.as_object().cloned().unwrap_or_else(Map::new);
    for (k, _) in removed {
        map.remove(removal(k).0);
    }
    map.extend(set.into_iter().map(|(k, v)| (k.clone(), v)));
    *to = if map.is_empty() { Value::Null } else { map.into() };
}

fn env(process: &mut Value, given: &[api::KeyValue], target: &Target) -> Result<()> {
    for e in given {
        let (key, removed) = removal(&e.key);
        if key.is_empty() || key.contains(['=', '\0']) || e.value.contains('\0') {
            let what = format!("the environment variable {key:?}");
            return Err(target.refused(Field::Env, Some(key), &what, "no process can have it"));
        }
        let list = array(&mut process["env"]);
        let named = |held: &Value| held.as_str().and_then(|h| h.split('=').next()) == Some(key);
        let at = list.iter().position(named);
        let value = || Value::from(format!("{key}={}", e.value));
        match (at, removed) {
            (Some(at), true) => drop(list.remove(at)),
            (Some(at), false) => list[at] = value(),
            (None, false) => list.push(value()),
            (None, true) => {}
        }
    }
    Ok(())
}

fn hooks(spec: &mut Value, given: Option<&api::Hooks>) {
    let Some(given) = given else { return };
    for (name, hooks) in [
        ("prestart", &given.prestart),
        ("createRuntime", &given.create_runtime),
        ("createContainer", &given.create_container),
        ("startContainer", &given.start_container),
        ("poststart", &given.poststart),
        ("poststop", &given.poststop),
    ] {
        for h in hooks {
            let mut hook = json!({"path": h.path});
            if !h.args.is_empty() {
                hook["args"] = h.args.clone().into();
            }
            if !h.env.is_empty() {
                hook["env"] = h.env.clone().into();
            }
            if let Some(timeout) = h.timeout {
                hook["timeout"] = timeout.value.into();
            }
            array(&mut spec["hooks"][name]).push(hook);
        }
    }
}

fn device(d: &api::LinuxDevice) -> Value {
    let mut out = json!({"path": d.path, "type": d.r#type, "major": d.major, "minor": d.minor});
    if let Some(mode) = d.file_mode {
        out["fileMode"] = (mode.value & 0o7777).into();
    }
    if let Some(uid) = d.uid {
        out["uid"] = uid.value.into();
    }
    if let Some(gid) = d.gid {
        out["gid"] = gid.value.into();
    }
    out
}

fn seccomp(p: &api::LinuxSeccomp) -> Value {
    let calls = p.syscalls.iter().map(|c| {
        let args = c
            .args
            .iter()
            .map(|a| json!({"index": a.index, "value": a.value, "valueTwo": a.value_two, "op": a.op}));
        let mut out = json!({"names": c.names, "action": c.action});
        if !c.args.is_empty() {
            out["args"] = args.collect();
        }
        if let Some(errno) = c.errno_ret {
            out["errnoRet"] = errno.value.into();
        }
        out
    });
    let mut out = json!({"defaultAction": p.default_action, "syscalls": calls.collect::<Vec<_>>()});
    if let Some(errno) = p.default_errno {
        out["defaultErrnoRet"] = errno.value.into();
    }
    for (key, list) in [("architectures", &p.architectures), ("flags", &p.flags)] {
        if !list.is_empty() {
            out[key] = list.clone().into();
        }
    }
    for (key, text) in [("listenerPath", &p.listener_path), ("listenerMetadata", &p.listener_metadata)] {
        if !text.is_empty() {
            out[key] = text.as_str().into();
        }
    }
    out
}

fn mounts(spec: &mut Value, given: &[api::Mount], target: &Target) -> Result<()> {
    for m in given {
        let (at, removed) = removal(&m.destination);
        let place = Path::new(at);
        let list = array(&mut spec["mounts"]);
        list.retain(|held| held["destination"] != at);
        if removed {
            continue;
        }
        if !place.is_absolute() || place.components().any(|c| c == Component::ParentDir) {
            let what = format!("a mount at {at:?}");
            return Err(target.refused(
                Field::Mounts,
                Some(at),
                &what,
                "the place is not an absolute path without ..",
            ));
        }
        let mut mount = json!({"destination": at, "source": m.source, "options": m.options});
        if !m.r#type.is_empty() {
            mount["type"] = m.r#type.as_str().into();
        }
        list.push(mount);
        propagate(spec, m, target)?;
    }
    if !given.is_empty() {
        let depth = |m: &Value| Path::new(m["destination"].as_str().unwrap_or_default()).components().count();
        // A parent before what lies in it; equal depth keeps its order.
        array(&mut spec["mounts"]).sort_by_key(depth);
    }
    Ok(())
}

/// A mount that passes mounts on needs a root that does.
fn propagate(spec: &mut Value, m: &api::Mount, target: &Target) -> Result<()> {
    let has = |words: [&str; 2]| m.options.iter().any(|o| words.contains(&o.as_str()));
    let (shared, slave) = (has(["shared", "rshared"]), has(["slave", "rslave"]));
    if !shared && !slave {
        return Ok(());
    }
    let host = propagation_of(Path::new(&m.source));
    if host != Propagation::Shared && (shared || host != Propagation::Slave) {
        let what = format!("mount propagation at {}", m.destination);
        return Err(target.refused(
            Field::Mounts,
            Some(&m.destination),
            &what,
            "its source is not on such a mount",
        ));
    }
    let root = &mut spec["linux"]["rootfsPropagation"];
    if shared {
        *root = "shared".into();
    } else if *root != "shared" {
        *root = "slave".into();
    }
    Ok(())
}

#[cfg(test)]
mod tests;
