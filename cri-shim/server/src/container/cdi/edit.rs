//! What a CDI spec file asks for, put into an OCI spec (CDI specification, "OCI Edits").

use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Hook as OciHook, HookBuilder, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, LinuxIntelRdt,
    Mount as OciMount, Spec,
};

use super::format::{Edits, Hook, IntelRdt, Mount, Node};
use super::invalid;
use crate::container::spec::devices;
use crate::error::Result;

pub(super) fn apply(edits: &Edits, spec: &mut Spec) -> Result<()> {
    let mut process = spec.process().clone().unwrap_or_default();
    let mut env = process.env().clone().unwrap_or_default();
    for entry in &edits.env {
        let name = entry.split('=').next();
        match env.iter_mut().find(|held| held.split('=').next() == name) {
            Some(held) => held.clone_from(entry),
            None => env.push(entry.clone()),
        }
    }
    process.set_env(Some(env));
    let mut user = process.user().clone();
    let (uid, gid) = (user.uid(), user.gid());
    let mut groups = user.additional_gids().clone().unwrap_or_default();
    // Group 0 is never given away by a device.
    for g in edits.additional_gids.iter().filter(|g| **g != 0) {
        if !groups.contains(g) {
            groups.push(*g);
        }
    }
    user.set_additional_gids(Some(groups));
    process.set_user(user);
    spec.set_process(Some(process));
    for n in &edits.device_nodes {
        add_node(n, (uid, gid), spec)?;
    }
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for m in &edits.mounts {
        mounts.retain(|held| held.destination() != Path::new(&m.container_path));
        mounts.push(mount(m));
    }
    spec.set_mounts(Some(mounts));
    for h in &edits.hooks {
        add_hook(h, spec)?;
    }
    if let Some(rdt) = &edits.intel_rdt {
        let mut linux = spec.linux().clone().unwrap_or_default();
        linux.set_intel_rdt(Some(intel_rdt(rdt)));
        spec.set_linux(Some(linux));
    }
    Ok(())
}

/// A parent before what lies in it, as in every spec of ours.
pub(super) fn order_mounts(spec: &mut Spec) {
    if let Some(mounts) = spec.mounts_mut() {
        mounts.sort_by_key(|m| m.destination().components().count());
    }
}

fn kind(text: &str) -> LinuxDeviceType {
    match text {
        "b" => LinuxDeviceType::B,
        "p" => LinuxDeviceType::P,
        "u" => LinuxDeviceType::U,
        _ => LinuxDeviceType::C,
    }
}

/// The node as the file has it; what the file leaves open is that of the host's node.
fn complete(n: &Node) -> Result<LinuxDevice> {
    let path = PathBuf::from(&n.path);
    if !n.r#type.is_empty() && (n.major != 0 || n.r#type == "p") {
        let mut device = LinuxDevice::default();
        device.set_path(path).set_typ(kind(&n.r#type)).set_major(n.major).set_minor(n.minor);
        device.set_file_mode(n.file_mode).set_uid(n.uid).set_gid(n.gid);
        return Ok(device);
    }
    let host = if n.host_path.is_empty() { &n.path } else { &n.host_path };
    let mut device =
        devices::node(Path::new(host), path)?.ok_or_else(|| invalid(format!("{host} is no device node")))?;
    if !n.r#type.is_empty() && kind(&n.r#type) != device.typ() {
        return Err(invalid(format!("{host} is no device of type {}", n.r#type)));
    }
    let mode = n.file_mode.or(device.file_mode());
    device.set_file_mode(mode).set_uid(n.uid).set_gid(n.gid);
    Ok(device)
}

fn add_node(n: &Node, owner: (u32, u32), spec: &mut Spec) -> Result<()> {
    let mut device = complete(n)?;
    // A node that belongs to nobody in particular is the container's user's.
    if device.uid().is_none() && owner.0 > 0 {
        device.set_uid(Some(owner.0));
    }
    if device.gid().is_none() && owner.1 > 0 {
        device.set_gid(Some(owner.1));
    }
    let mut linux = spec.linux().clone().unwrap_or_default();
    if device.typ() != LinuxDeviceType::P {
        let access = if n.permissions.is_empty() { "rwm" } else { &n.permissions };
        let mut rule = LinuxDeviceCgroup::default();
        rule.set_allow(true)
            .set_typ(Some(device.typ()))
            .set_major(Some(device.major()))
            .set_minor(Some(device.minor()))
            .set_access(Some(access.to_owned()));
        let mut resources = linux.resources().clone().unwrap_or_default();
        let mut rules = resources.devices().clone().unwrap_or_default();
        rules.push(rule);
        resources.set_devices(Some(rules));
        linux.set_resources(Some(resources));
    }
    let mut nodes = linux.devices().clone().unwrap_or_default();
    nodes.retain(|held| held.path() != device.path());
    nodes.push(device);
    linux.set_devices(Some(nodes));
    spec.set_linux(Some(linux));
    Ok(())
}

fn mount(m: &Mount) -> OciMount {
    let mut options = m.options.clone();
    let bind = |o: &String| o == "bind" || o == "rbind";
    // The specification's mounts are of host paths; without a type and options that is a bind.
    if m.r#type.is_empty() && !options.iter().any(bind) {
        options.push("rbind".to_owned());
    }
    let kind = if m.r#type.is_empty() { "bind" } else { &m.r#type };
    let mut out = OciMount::default();
    out.set_destination(PathBuf::from(&m.container_path))
        .set_typ(Some(kind.to_owned()))
        .set_source(Some(PathBuf::from(&m.host_path)))
        .set_options(Some(options));
    out
}

fn add_hook(h: &Hook, spec: &mut Spec) -> Result<()> {
    let mut builder = HookBuilder::default().path(&h.path);
    if !h.args.is_empty() {
        builder = builder.args(h.args.clone());
    }
    if !h.env.is_empty() {
        builder = builder.env(h.env.clone());
    }
    if let Some(t) = h.timeout {
        builder = builder.timeout(t);
    }
    let hook = builder.build().map_err(|e| invalid(format!("hook {}: {e}", h.path)))?;
    let mut hooks = spec.hooks().clone().unwrap_or_default();
    let and = |held: &Option<Vec<OciHook>>, hook: OciHook| {
        let mut all = held.clone().unwrap_or_default();
        all.push(hook);
        Some(all)
    };
    #[allow(deprecated)]
    match h.hook_name.as_str() {
        "prestart" => hooks.set_prestart(and(hooks.prestart(), hook)),
        "createRuntime" => hooks.set_create_runtime(and(hooks.create_runtime(), hook)),
        "createContainer" => hooks.set_create_container(and(hooks.create_container(), hook)),
        "startContainer" => hooks.set_start_container(and(hooks.start_container(), hook)),
        "poststart" => hooks.set_poststart(and(hooks.poststart(), hook)),
        "poststop" => hooks.set_poststop(and(hooks.poststop(), hook)),
        other => return Err(invalid(format!("hook {other:?} is not one of OCI's"))),
    };
    spec.set_hooks(Some(hooks));
    Ok(())
}

fn intel_rdt(r: &IntelRdt) -> LinuxIntelRdt {
    let text = |s: &String| (!s.is_empty()).then(|| s.clone());
    let mut out = LinuxIntelRdt::default();
    out.set_clos_id(text(&r.clos_id))
        .set_l3_cache_schema(text(&r.l3_cache_schema))
        .set_mem_bw_schema(text(&r.mem_bw_schema))
        .set_schemata((!r.schemata.is_empty()).then(|| r.schemata.clone()));
    if r.enable_monitoring || r.enable_cmt || r.enable_mbm {
        out.set_enable_monitoring(Some(true));
    }
    out
}
