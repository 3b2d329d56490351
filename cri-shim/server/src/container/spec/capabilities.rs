//! Capability sets of a container.

use std::collections::HashSet;
use std::str::FromStr;

use oci_spec::runtime::{Capability, LinuxCapabilities};
use orlop_proto::cri;

use super::invalid;
use crate::error::Result;
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

/// `SYS_ADMIN`, `sys_admin` and `CAP_SYS_ADMIN` are the same.
fn parse(name: &str) -> Result<Capability> {
    let upper = name.to_ascii_uppercase();
    Capability::from_str(upper.strip_prefix("CAP_").unwrap_or(&upper))
        .map_err(|_| invalid(format!("capability {name:?} is not known")))
}

fn is_all(name: &str) -> bool {
    name.eq_ignore_ascii_case("ALL")
}

/// `available` is what this process may hand on: more is silently left out for "ALL" and privileged, as on a machine
/// whose kernel does not know a capability.
pub(super) fn capabilities(
    security: &cri::LinuxContainerSecurityContext,
    available: &HashSet<Capability>,
) -> Result<LinuxCapabilities> {
    let given = security.capabilities.clone().unwrap_or_default();
    let mut set: HashSet<Capability> = HashSet::new();
    let mut ambient: HashSet<Capability> = HashSet::new();
    if security.privileged {
        set.extend(CAPABILITIES);
    } else {
        let add_all = given.add_capabilities.iter().any(|c| is_all(c));
        let drop_all = given.drop_capabilities.iter().any(|c| is_all(c));
        if add_all {
            set.extend(CAPABILITIES);
        } else if !drop_all {
            set.extend(DEFAULT);
        }
        for name in given.drop_capabilities.iter().filter(|c| !is_all(c)) {
            set.remove(&parse(name)?);
        }
        for name in given.add_capabilities.iter().filter(|c| !is_all(c)) {
            set.insert(parse(name)?);
        }
        for name in &given.add_ambient_capabilities {
            let c = parse(name)?;
            set.insert(c);
            ambient.insert(c);
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
    Ok(out)
}
