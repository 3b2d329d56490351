//! System call filters.
//!
//! `RuntimeDefault` here is a list of what is refused. A container that holds the capability a call belongs to may make it.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Arch, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder,
    LinuxSeccompOperator, LinuxSyscall,
};
use orlop_proto::cri;
use orlop_proto::cri::security_profile::ProfileType;

use super::{Input, invalid};
use crate::error::{Error, Result};

/// The profile a container asks for. The older path form is understood: `runtime/default`, `docker/default`, `unconfined`,
/// `localhost/<path>`.
pub(crate) fn requested(security: &cri::LinuxContainerSecurityContext) -> Option<cri::SecurityProfile> {
    if security.seccomp.is_some() {
        return security.seccomp.clone();
    }
    #[allow(deprecated)]
    let path = security.seccomp_profile_path.as_str();
    let profile = |kind: ProfileType, localhost_ref: &str| {
        Some(cri::SecurityProfile { profile_type: kind as i32, localhost_ref: localhost_ref.to_owned() })
    };
    match path {
        "" => None,
        "runtime/default" | "docker/default" => profile(ProfileType::RuntimeDefault, ""),
        "unconfined" => profile(ProfileType::Unconfined, ""),
        other => profile(ProfileType::Localhost, other.strip_prefix("localhost/").unwrap_or(other)),
    }
}

/// Reads a localhost profile, when one is asked for.
pub(crate) fn read_localhost(
    security: &cri::LinuxContainerSecurityContext,
    root: &Path,
) -> Result<Option<LinuxSeccomp>> {
    let Some(profile) = requested(security).filter(|p| p.profile_type() == ProfileType::Localhost) else {
        return Ok(None);
    };
    if security.privileged {
        return Ok(None);
    }
    if profile.localhost_ref.is_empty() {
        return Err(invalid("a localhost seccomp profile needs a path"));
    }
    let given = PathBuf::from(&profile.localhost_ref);
    let path = if given.is_absolute() { given } else { root.join(given) };
    let text = std::fs::read(&path).map_err(Error::io("read seccomp profile", &path))?;
    let parsed = serde_json::from_slice(&text)
        .map_err(|e| invalid(format!("seccomp profile {} is not valid: {e}", path.display())))?;
    Ok(Some(parsed))
}

pub(super) fn choose(
    input: &Input,
    security: &cri::LinuxContainerSecurityContext,
) -> Result<Option<LinuxSeccomp>> {
    if security.privileged {
        return Ok(None);
    }
    match requested(security).map(|p| p.profile_type()) {
        None | Some(ProfileType::Unconfined) => Ok(None),
        Some(ProfileType::Localhost) => Ok(input.localhost_seccomp.clone()),
        Some(ProfileType::RuntimeDefault) => {
            let held = super::capabilities::capabilities(security, &input.facts.capabilities);
            runtime_default(held.bounding().as_ref().unwrap_or(&HashSet::new())).map(Some)
        }
    }
}

/// Refused unless the capability is held.
const GUARDED: &[(Capability, &[&str])] = &[
    (
        Capability::SysAdmin,
        &[
            "mount",
            "umount",
            "umount2",
            "pivot_root",
            "setns",
            "unshare",
            "fanotify_init",
            "lookup_dcookie",
            "quotactl",
            "quotactl_fd",
            "setdomainname",
            "sethostname",
            "swapon",
            "swapoff",
            "fsopen",
            "fsconfig",
            "fsmount",
            "fspick",
            "move_mount",
            "open_tree",
            "mount_setattr",
            "nfsservctl",
        ],
    ),
    (Capability::Bpf, &["bpf"]),
    (Capability::Perfmon, &["perf_event_open"]),
    (Capability::Syslog, &["syslog"]),
    (
        Capability::SysModule,
        &["init_module", "finit_module", "delete_module", "create_module", "query_module", "get_kernel_syms"],
    ),
    (Capability::SysBoot, &["reboot", "kexec_load", "kexec_file_load"]),
    (Capability::SysTime, &["settimeofday", "stime", "clock_settime", "clock_settime64"]),
    (Capability::SysPacct, &["acct"]),
    (Capability::SysRawio, &["iopl", "ioperm"]),
    (Capability::DacReadSearch, &["open_by_handle_at"]),
    (Capability::SysNice, &["mbind", "get_mempolicy", "set_mempolicy", "move_pages", "migrate_pages"]),
    (Capability::SysPtrace, &["kcmp", "pidfd_getfd", "process_madvise"]),
];

/// Refused always: not namespaced, or known mostly from exploits.
const NEVER: &[&str] = &[
    "add_key",
    "request_key",
    "keyctl",
    "userfaultfd",
    "uselib",
    "ustat",
    "sysfs",
    "_sysctl",
    "vm86",
    "vm86old",
    "io_uring_setup",
    "io_uring_enter",
    "io_uring_register",
];

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
const AF_VSOCK: u64 = 40;
/// CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}.
const CLONE_NEW_ANY: u64 = 0x7e02_0000;

fn refuse(names: &[&str], errno: u32, args: Option<Vec<LinuxSeccompArg>>) -> LinuxSyscall {
    let mut rule = LinuxSyscall::default();
    rule.set_names(names.iter().map(|n| (*n).to_owned()).collect())
        .set_action(LinuxSeccompAction::ScmpActErrno)
        .set_errno_ret(Some(errno))
        .set_args(args);
    rule
}

fn arg(
    index: usize,
    value: u64,
    value_two: Option<u64>,
    op: LinuxSeccompOperator,
) -> Result<LinuxSeccompArg> {
    let builder = LinuxSeccompArgBuilder::default().index(index).value(value).op(op);
    let builder = match value_two {
        Some(two) => builder.value_two(two),
        None => builder,
    };
    builder.build().map_err(|e| Error::Internal(format!("seccomp argument: {e}")))
}

/// Our default profile for a container that holds `capabilities`.
pub(crate) fn runtime_default(capabilities: &HashSet<Capability>) -> Result<LinuxSeccomp> {
    let mut rules = vec![refuse(NEVER, EPERM, None)];
    for (capability, names) in GUARDED {
        let held = capabilities.contains(capability)
            || (matches!(capability, Capability::Bpf | Capability::Perfmon)
                && capabilities.contains(&Capability::SysAdmin));
        if !held {
            rules.push(refuse(names, EPERM, None));
        }
    }
    if !capabilities.contains(&Capability::SysAdmin) {
        // Of clone's seven namespace flags each is refused by itself: a filter compares, it does not test for "any bit".
        for bit in (0..64).map(|b| 1u64 << b).filter(|b| CLONE_NEW_ANY & b != 0) {
            let any = arg(0, bit, Some(bit), LinuxSeccompOperator::ScmpCmpMaskedEq)?;
            rules.push(refuse(&["clone"], EPERM, Some(vec![any])));
        }
        // Its flags lie in memory where a filter cannot look; libc falls back to clone.
        rules.push(refuse(&["clone3"], ENOSYS, None));
    }
    let vsock = arg(0, AF_VSOCK, None, LinuxSeccompOperator::ScmpCmpEq)?;
    rules.push(refuse(&["socket"], EPERM, Some(vec![vsock])));
    let mut profile = LinuxSeccomp::default();
    profile
        .set_default_action(LinuxSeccompAction::ScmpActAllow)
        .set_architectures(Some(architectures()))
        .set_syscalls(Some(rules));
    Ok(profile)
}

fn architectures() -> Vec<Arch> {
    if cfg!(target_arch = "aarch64") {
        vec![Arch::ScmpArchAarch64, Arch::ScmpArchArm]
    } else {
        vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(profile: &LinuxSeccomp, name: &str) -> bool {
        profile.syscalls().iter().flatten().any(|r| r.args().is_none() && r.names().iter().any(|n| n == name))
    }

    #[test]
    fn a_capability_opens_its_calls() {
        let none = runtime_default(&HashSet::new()).unwrap();
        assert!(refused(&none, "mount") && refused(&none, "bpf") && refused(&none, "keyctl"));
        assert!(refused(&none, "clone3") && !refused(&none, "read"));
        let admin = runtime_default(&HashSet::from([Capability::SysAdmin])).unwrap();
        assert!(!refused(&admin, "mount") && !refused(&admin, "bpf") && refused(&admin, "init_module"));
        assert!(!refused(&admin, "clone3"));
    }

    #[test]
    fn the_old_path_form() {
        for (path, want) in [
            ("", None),
            ("runtime/default", Some((ProfileType::RuntimeDefault, ""))),
            ("unconfined", Some((ProfileType::Unconfined, ""))),
            ("localhost/a.json", Some((ProfileType::Localhost, "a.json"))),
        ] {
            #[allow(deprecated)]
            let s = cri::LinuxContainerSecurityContext {
                seccomp_profile_path: path.into(),
                ..Default::default()
            };
            let got = requested(&s).map(|p| (p.profile_type(), p.localhost_ref));
            assert_eq!(got, want.map(|(k, r)| (k, r.to_owned())), "{path}");
        }
    }
}
