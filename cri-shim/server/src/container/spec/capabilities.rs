//! Capability sets of a container.

use std::collections::HashSet;
use std::str::FromStr;

use oci_spec::runtime::{Capability, LinuxCapabilities};
use orlop_proto::cri;

use crate::facts::CAPABILITIES;

/// What a container has unless it says otherwise; the set that Docker and containerd agreed on.
const DEFAULT: [Capability; 14] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fsetid,
    Capability::Fowner,
    Capability::Mknod,
    Capability::NetRaw,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
    Capability::Setpcap,
    Capability::NetBindService,
    Capability::SysChroot,
    Capability::Kill,
    Capability::AuditWrite,
];

/// `SYS_ADMIN`, `sys_admin` and `CAP_SYS_ADMIN` are the same. One that is not known changes nothing, as with upstream's runtimes: it may
/// be a newer kernel's.
fn parse(name: &String) -> Option<Capability> {
    let upper = name.to_ascii_uppercase();
    let known = Capability::from_str(upper.strip_prefix("CAP_").unwrap_or(&upper)).ok();
    if known.is_none() {
        tracing::warn!(name, "ignoring a capability that is not known");
    }
    known
}

fn is_all(name: &str) -> bool {
    name.eq_ignore_ascii_case("ALL")
}

/// `available` is what this process may hand on: more is silently left out for "ALL" and privileged, as on a machine
/// whose kernel does not know a capability.
pub(super) fn capabilities(
    security: &cri::LinuxContainerSecurityContext,
    available: &HashSet<Capability>,
) -> LinuxCapabilities {
    let given = security.capabilities.clone().unwrap_or_default();
    let mut set: HashSet<Capability> = HashSet::new();
    let mut ambient: HashSet<Capability> = HashSet::new();
    if security.privileged {
        set.extend(CAPABILITIES);
    } else {
        // In upstream's order: what is dropped is gone, whoever adds it.
        let drops = &given.drop_capabilities;
        if drops.iter().any(|c| is_all(c)) {
            // Single ones can be added to nothing.
        } else if given.add_capabilities.iter().any(|c| is_all(c)) {
            set.extend(CAPABILITIES);
        } else {
            set.extend(DEFAULT);
        }
        set.extend(given.add_capabilities.iter().filter(|c| !is_all(c)).filter_map(parse));
        ambient.extend(given.add_ambient_capabilities.iter().filter_map(parse));
        set.extend(&ambient);
        for dropped in drops.iter().filter(|c| !is_all(c)).filter_map(parse) {
            set.remove(&dropped);
            ambient.remove(&dropped);
        }
    }
    set.retain(|c| available.contains(c));
    ambient.retain(|c| available.contains(c));
    let mut out = LinuxCapabilities::default();
    // Not inheritable, so that a file's inheritable bits give nothing (CVE-2022-29162).
    out.set_bounding(Some(set.clone()))
        .set_effective(Some(set.clone()))
        .set_permitted(Some(set))
        .set_inheritable(Some(ambient.clone()))
        .set_ambient(Some(ambient));
    out
}
