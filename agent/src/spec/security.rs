//! Security contexts as CRI has them.

use k8s_openapi::api::core::v1::{
    AppArmorProfile, Container, Pod, PodSecurityContext, PodSpec, SELinuxOptions, SeccompProfile,
    SecurityContext,
};
use orlop_proto::cri::security_profile::ProfileType;
use orlop_proto::cri::{
    Capability, Int64Value, LinuxContainerSecurityContext, LinuxSandboxSecurityContext, NamespaceMode,
    NamespaceOption, SeLinuxOption, SecurityProfile, SupplementalGroupsPolicy, UserNamespace,
};

use super::SpecError;

const MASKED: [&str; 12] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Network, PID, IPC and user namespaces of a pod; `None` for the node's users.
pub fn namespaces(spec: &PodSpec, users: Option<UserNamespace>) -> NamespaceOption {
    let node = |on: Option<bool>| if on == Some(true) { NamespaceMode::Node } else { NamespaceMode::Pod };
    let pid = match (spec.host_pid, spec.share_process_namespace) {
        (Some(true), _) => NamespaceMode::Node,
        (_, Some(true)) => NamespaceMode::Pod,
        _ => NamespaceMode::Container,
    };
    NamespaceOption {
        network: node(spec.host_network) as i32,
        pid: pid as i32,
        ipc: node(spec.host_ipc) as i32,
        target_id: String::new(),
        userns_options: users,
    }
}

fn seccomp(profile: Option<&SeccompProfile>, root: &str, default: bool) -> SecurityProfile {
    let (kind, localhost) = match profile {
        Some(p) => (p.type_.as_str(), p.localhost_profile.as_deref()),
        None if default => ("RuntimeDefault", None),
        None => ("Unconfined", None),
    };
    let (profile_type, localhost_ref) = match kind {
        "RuntimeDefault" => (ProfileType::RuntimeDefault, String::new()),
        "Localhost" => (ProfileType::Localhost, format!("{root}/{}", localhost.unwrap_or_default())),
        _ => (ProfileType::Unconfined, String::new()),
    };
    SecurityProfile { profile_type: profile_type as i32, localhost_ref }
}

fn apparmor(profile: &AppArmorProfile) -> SecurityProfile {
    let (kind, name) = match profile.type_.as_str() {
        "Localhost" => (ProfileType::Localhost, profile.localhost_profile.clone().unwrap_or_default()),
        "Unconfined" => (ProfileType::Unconfined, String::new()),
        _ => (ProfileType::RuntimeDefault, String::new()),
    };
    SecurityProfile { profile_type: kind as i32, localhost_ref: name }
}

fn selinux(o: &SELinuxOptions) -> SeLinuxOption {
    SeLinuxOption {
        user: o.user.clone().unwrap_or_default(),
        role: o.role.clone().unwrap_or_default(),
        r#type: o.type_.clone().unwrap_or_default(),
        level: o.level.clone().unwrap_or_default(),
    }
}

fn int(v: Option<i64>) -> Option<Int64Value> {
    v.map(|value| Int64Value { value })
}

fn groups(p: &PodSecurityContext) -> (Vec<i64>, i32) {
    let mut all: Vec<i64> = p.fs_group.into_iter().collect();
    all.extend(p.supplemental_groups.iter().flatten());
    let policy = match p.supplemental_groups_policy.as_deref() {
        Some("Strict") => SupplementalGroupsPolicy::Strict,
        _ => SupplementalGroupsPolicy::Merge,
    };
    (all, policy as i32)
}

static NO_POD_CONTEXT: std::sync::LazyLock<PodSecurityContext> =
    std::sync::LazyLock::new(PodSecurityContext::default);
static NO_CONTEXT: std::sync::LazyLock<SecurityContext> = std::sync::LazyLock::new(SecurityContext::default);

fn is_privileged(c: &Container) -> bool {
    c.security_context.as_ref().and_then(|s| s.privileged) == Some(true)
}

/// The sandbox's security context. `seccomp_root` holds Localhost profiles.
pub fn sandbox(
    spec: &PodSpec,
    seccomp_root: &str,
    users: Option<UserNamespace>,
) -> LinuxSandboxSecurityContext {
    let p = spec.security_context.as_ref().unwrap_or(&NO_POD_CONTEXT);
    let (supplemental_groups, supplemental_groups_policy) = groups(p);
    let privileged = spec.containers.iter().chain(spec.init_containers.iter().flatten()).any(is_privileged);
    LinuxSandboxSecurityContext {
        namespace_options: Some(namespaces(spec, users)),
        selinux_options: p.se_linux_options.as_ref().map(selinux),
        run_as_user: int(p.run_as_user),
        // CRI refuses a group without a user.
        run_as_group: int(p.run_as_group.filter(|_| p.run_as_user.is_some())),
        supplemental_groups,
        supplemental_groups_policy,
        privileged,
        // The sandbox itself runs nothing of the user's; the runtime's default is enough unless the pod says otherwise.
        seccomp: Some(seccomp(p.seccomp_profile.as_ref(), seccomp_root, true)),
        ..Default::default()
    }
}

/// The user an image runs as, from its config.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageUser {
    pub uid: Option<i64>,
    pub name: String,
}

fn check_non_root(
    pod: &Pod,
    c: &Container,
    wanted: bool,
    user: Option<i64>,
    image: &ImageUser,
) -> Result<(), SpecError> {
    if !wanted {
        return Ok(());
    }
    let names = || {
        let m = &pod.metadata;
        let pod_name = format!(
            "{}_{}({})",
            m.name.as_deref().unwrap_or_default(),
            m.namespace.as_deref().unwrap_or_default(),
            m.uid.as_deref().unwrap_or_default()
        );
        (pod_name, c.name.clone())
    };
    match user.or(image.uid) {
        Some(0) => {
            let (pod, container) = names();
            Err(SpecError::RunsAsRoot { pod, container })
        }
        Some(_) => Ok(()),
        None if !image.name.is_empty() => {
            let (pod, container) = names();
            Err(SpecError::UserNotNumeric { user: image.name.clone(), pod, container })
        }
        None => {
            let (pod, container) = names();
            Err(SpecError::RunsAsRoot { pod, container })
        }
    }
}

/// The container's security context: its own settings before the pod's.
pub fn container(
    pod: &Pod,
    c: &Container,
    image: &ImageUser,
    seccomp_root: &str,
    seccomp_default: bool,
    users: Option<UserNamespace>,
) -> Result<LinuxContainerSecurityContext, SpecError> {
    let empty = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&empty);
    let p = spec.security_context.as_ref().unwrap_or(&NO_POD_CONTEXT);
    let s = c.security_context.as_ref().unwrap_or(&NO_CONTEXT);
    let user = s.run_as_user.or(p.run_as_user);
    check_non_root(pod, c, s.run_as_non_root.or(p.run_as_non_root) == Some(true), user, image)?;
    let privileged = s.privileged == Some(true);
    let run_as_group = s.run_as_group.or(p.run_as_group);
    // CRI wants the user by name or number where a group is given; the image's own is right then.
    let from_image = user.is_none() && run_as_group.is_some();
    let (supplemental_groups, supplemental_groups_policy) = groups(p);
    let unmasked = s.proc_mount.as_deref() == Some("Unmasked");
    let paths = |list: &[&str]| {
        if unmasked { Vec::new() } else { list.iter().map(|p| (*p).to_owned()).collect() }
    };
    let capabilities = s.capabilities.as_ref().map(|k| Capability {
        add_capabilities: k.add.clone().unwrap_or_default(),
        drop_capabilities: k.drop.clone().unwrap_or_default(),
        add_ambient_capabilities: Vec::new(),
    });
    let seccomp_profile = if privileged {
        seccomp(None, seccomp_root, false)
    } else {
        let declared = s.seccomp_profile.as_ref().or(p.seccomp_profile.as_ref());
        seccomp(declared, seccomp_root, seccomp_default)
    };
    Ok(LinuxContainerSecurityContext {
        capabilities,
        privileged,
        namespace_options: Some(namespaces(spec, users)),
        selinux_options: s.se_linux_options.as_ref().or(p.se_linux_options.as_ref()).map(selinux),
        run_as_user: int(user.or(if from_image {
            image.uid.or(image.name.is_empty().then_some(0))
        } else {
            None
        })),
        run_as_group: int(run_as_group),
        run_as_username: if from_image && image.uid.is_none() { image.name.clone() } else { String::new() },
        readonly_rootfs: s.read_only_root_filesystem == Some(true),
        supplemental_groups,
        supplemental_groups_policy,
        no_new_privs: s.allow_privilege_escalation == Some(false),
        masked_paths: paths(&MASKED),
        readonly_paths: paths(&READONLY),
        seccomp: Some(seccomp_profile),
        apparmor: super::apparmor::profile(pod, c).as_ref().map(apparmor),
        ..Default::default()
    })
}

/// Sysctls that may be set without the node's consent: they are namespaced and harmless.
const SAFE_SYSCTLS: [&str; 16] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
    "net.ipv4.tcp_tw_reuse",
    "net.ipv4.tcp_slow_start_after_idle",
    "net.ipv4.tcp_notsent_lowat",
    "net.ipv4.tcp_mtu_probing",
];

/// The first sysctl of the pod that this node does not allow. `allowed` may hold patterns that end in `*`.
pub fn forbidden_sysctl<'a>(spec: &'a PodSpec, allowed: &[String]) -> Option<&'a str> {
    let all = spec.security_context.as_ref().and_then(|c| c.sysctls.as_ref());
    let matches = |pattern: &String, name: &str| match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => pattern == name,
    };
    let names = all.into_iter().flatten().map(|s| s.name.as_str());
    names.into_iter().find(|n| {
        let dotted = n.replace('/', ".");
        !SAFE_SYSCTLS.contains(&dotted.as_str()) && !allowed.iter().any(|p| matches(p, &dotted))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(pod_context: serde_json::Value, context: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": {"securityContext": pod_context,
            "containers": [{"name": "c", "securityContext": context}]}}))
        .unwrap()
    }

    fn map(p: &Pod, image: &ImageUser) -> Result<LinuxContainerSecurityContext, SpecError> {
        container(p, &p.spec.as_ref().unwrap().containers[0], image, "/seccomp", false, None)
    }

    #[test]
    fn container_settings_win_over_the_pods() {
        let p = pod(
            json!({"runAsUser": 1, "runAsGroup": 2, "fsGroup": 3, "supplementalGroups": [4], "seccompProfile": {"type": "RuntimeDefault"}}),
            json!({"runAsUser": 10, "capabilities": {"add": ["NET_ADMIN"], "drop": ["ALL"]}, "readOnlyRootFilesystem": true, "allowPrivilegeEscalation": false}),
        );
        let s = map(&p, &ImageUser::default()).unwrap();
        assert_eq!(s.run_as_user.unwrap().value, 10);
        assert_eq!(s.run_as_group.unwrap().value, 2);
        assert_eq!(s.supplemental_groups, [3, 4]);
        assert!(s.readonly_rootfs && s.no_new_privs && !s.privileged);
        assert_eq!(s.capabilities.unwrap().drop_capabilities, ["ALL"]);
        assert_eq!(s.seccomp.unwrap().profile_type, ProfileType::RuntimeDefault as i32);
        assert_eq!(s.masked_paths.len(), MASKED.len());
    }

    #[test]
    fn run_as_non_root() {
        let user = |uid: Option<i64>, name: &str| ImageUser { uid, name: name.to_owned() };
        let wants = json!({"runAsNonRoot": true});
        let p = pod(wants.clone(), json!({}));
        assert!(matches!(map(&p, &user(None, "")), Err(SpecError::RunsAsRoot { .. })));
        assert!(matches!(map(&p, &user(Some(0), "")), Err(SpecError::RunsAsRoot { .. })));
        assert!(matches!(map(&p, &user(None, "www")), Err(SpecError::UserNotNumeric { .. })));
        assert!(map(&p, &user(Some(5), "")).is_ok());
        assert!(map(&pod(wants, json!({"runAsUser": 7})), &user(None, "www")).is_ok());
    }

    #[test]
    fn sysctls() {
        let p = pod(
            json!({"sysctls": [{"name": "net.ipv4.tcp_syncookies", "value": "1"}, {"name": "kernel.msgmax", "value": "1"}]}),
            json!({}),
        );
        let spec = p.spec.as_ref().unwrap();
        assert_eq!(forbidden_sysctl(spec, &[]), Some("kernel.msgmax"));
        assert_eq!(forbidden_sysctl(spec, &["kernel.msg*".to_owned()]), None);
    }
}
