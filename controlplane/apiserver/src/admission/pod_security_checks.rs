//! The Pod Security Standards as checks on a pod: what `baseline` and `restricted` forbid.
//! <https://kubernetes.io/docs/concepts/security/pod-security-standards/>

use serde_json::Value;

use super::{items, text};

/// How much a pod may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Privileged,
    Baseline,
    Restricted,
}

const BASELINE_CAPABILITIES: [&str; 13] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];
const SAFE_SYSCTLS: [&str; 10] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
];
const SELINUX_TYPES: [&str; 5] =
    ["", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"];
const RESTRICTED_VOLUMES: [&str; 9] = [
    "name",
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
];

fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    ["/spec/initContainers", "/spec/containers", "/spec/ephemeralContainers"]
        .into_iter()
        .flat_map(|p| items(pod, p))
}

/// The pod's security context and those of all containers.
fn contexts(pod: &Value) -> Vec<&Value> {
    let own = pod.pointer("/spec/securityContext");
    own.into_iter().chain(containers(pod).filter_map(|c| c.get("securityContext"))).collect()
}

/// What the pod does that the level forbids, one short text for each kind of fault.
pub fn violations(pod: &Value, level: Level) -> Vec<String> {
    let mut faults = Vec::new();
    if level >= Level::Baseline {
        faults.extend(baseline(pod));
    }
    if level == Level::Restricted && text(pod, "/spec/os/name") != "windows" {
        faults.extend(restricted(pod));
    } else if level == Level::Restricted {
        faults.extend(restricted_volumes(pod));
    }
    faults
}

fn culprits(pod: &Value, bad: impl Fn(&Value) -> bool) -> String {
    let names: Vec<String> =
        containers(pod).filter(|c| bad(c)).map(|c| format!("{:?}", text(c, "/name"))).collect();
    match names.len() {
        0 => "pod".to_owned(),
        1 => format!("container {}", names[0]),
        _ => format!("containers {}", names.join(", ")),
    }
}

fn added(container: &Value) -> impl Iterator<Item = &str> {
    items(container, "/securityContext/capabilities/add").filter_map(Value::as_str)
}

fn baseline(pod: &Value) -> Vec<String> {
    let mut faults = Vec::new();
    let spec = &pod["spec"];
    let shared: Vec<String> = ["hostNetwork", "hostPID", "hostIPC"]
        .iter()
        .filter(|k| spec[**k] == true)
        .map(|k| format!("{k}=true"))
        .collect();
    if !shared.is_empty() {
        faults.push(format!("host namespaces ({})", shared.join(", ")));
    }
    let privileged = |c: &Value| c.pointer("/securityContext/privileged") == Some(&Value::Bool(true));
    if containers(pod).any(privileged) {
        faults.push(format!(
            "privileged ({} must not set securityContext.privileged=true)",
            culprits(pod, privileged)
        ));
    }
    let capable = |c: &Value| added(c).any(|cap| !BASELINE_CAPABILITIES.contains(&cap));
    if containers(pod).any(capable) {
        faults.push(format!(
            "non-default capabilities ({} must not add more than the defaults)",
            culprits(pod, capable)
        ));
    }
    let host_paths: Vec<&str> = items(pod, "/spec/volumes")
        .filter(|v| v.get("hostPath").is_some())
        .map(|v| text(v, "/name"))
        .collect();
    if !host_paths.is_empty() {
        faults.push(format!("hostPath volumes (volumes {host_paths:?})"));
    }
    let host_port = |c: &Value| items(c, "/ports").any(|p| p["hostPort"].as_u64().unwrap_or(0) != 0);
    if containers(pod).any(host_port) {
        faults.push(format!("hostPort ({} uses hostPorts)", culprits(pod, host_port)));
    }
    let all = contexts(pod);
    if all.iter().any(|c| text(c, "/appArmorProfile/type") == "Unconfined") || unconfined_annotation(pod) {
        faults.push("forbidden AppArmor profile (must not be unconfined)".to_owned());
    }
    let selinux = |c: &&Value| {
        !SELINUX_TYPES.contains(&text(c, "/seLinuxOptions/type"))
            || !text(c, "/seLinuxOptions/user").is_empty()
            || !text(c, "/seLinuxOptions/role").is_empty()
    };
    if all.iter().any(selinux) {
        faults.push("seLinuxOptions (a forbidden type, user or role)".to_owned());
    }
    let proc_mount = |c: &Value| !matches!(text(c, "/securityContext/procMount"), "" | "Default");
    if spec["hostUsers"] != false && containers(pod).any(proc_mount) {
        faults.push(format!(
            "procMount ({} must not set securityContext.procMount)",
            culprits(pod, proc_mount)
        ));
    }
    if all.iter().any(|c| text(c, "/seccompProfile/type") == "Unconfined") {
        faults.push("seccompProfile (must not be Unconfined)".to_owned());
    }
    let unsafe_sysctls: Vec<&str> = items(pod, "/spec/securityContext/sysctls")
        .map(|s| text(s, "/name"))
        .filter(|s| !SAFE_SYSCTLS.contains(s))
        .collect();
    if !unsafe_sysctls.is_empty() {
        faults.push(format!("forbidden sysctls ({})", unsafe_sysctls.join(", ")));
    }
    if all.iter().any(|c| c.pointer("/windowsOptions/hostProcess") == Some(&Value::Bool(true))) {
        faults.push("hostProcess (must not be true)".to_owned());
    }
    let probe_host = |c: &Value| {
        ["livenessProbe", "readinessProbe", "startupProbe"].iter().any(|p| {
            !text(c, &format!("/{p}/httpGet/host")).is_empty()
                || !text(c, &format!("/{p}/tcpSocket/host")).is_empty()
        })
    };
    if containers(pod).any(probe_host) {
        faults.push(format!("probe or lifecycle host ({} must not set host)", culprits(pod, probe_host)));
    }
    faults
}

fn unconfined_annotation(pod: &Value) -> bool {
    let annotations = pod.pointer("/metadata/annotations").and_then(Value::as_object);
    annotations
        .into_iter()
        .flatten()
        .any(|(k, v)| k.starts_with("container.apparmor.security.beta.kubernetes.io/") && v == "unconfined")
}

fn restricted_volumes(pod: &Value) -> Option<String> {
    let bad: Vec<&str> = items(pod, "/spec/volumes")
        .filter(|v| {
            v.as_object().is_some_and(|m| m.keys().any(|k| !RESTRICTED_VOLUMES.contains(&k.as_str())))
        })
        .map(|v| text(v, "/name"))
        .collect();
    (!bad.is_empty()).then(|| format!("restricted volume types (volumes {bad:?})"))
}

fn restricted(pod: &Value) -> Vec<String> {
    let mut faults: Vec<String> = restricted_volumes(pod).into_iter().collect();
    let escalates =
        |c: &Value| c.pointer("/securityContext/allowPrivilegeEscalation") != Some(&Value::Bool(false));
    if containers(pod).any(escalates) {
        let who = culprits(pod, escalates);
        faults.push(format!("allowPrivilegeEscalation != false ({who} must set securityContext.allowPrivilegeEscalation=false)"));
    }
    let keeps = |c: &Value| {
        !items(c, "/securityContext/capabilities/drop").any(|d| d == "ALL")
            || added(c).any(|cap| cap != "NET_BIND_SERVICE")
    };
    if containers(pod).any(keeps) {
        let who = culprits(pod, keeps);
        faults.push(format!(
            "unrestricted capabilities ({who} must set securityContext.capabilities.drop=[\"ALL\"])"
        ));
    }
    let user_namespace = pod.pointer("/spec/hostUsers") == Some(&Value::Bool(false));
    let pod_context = pod.pointer("/spec/securityContext").unwrap_or(&Value::Null);
    let may_be_root = |c: &Value| match c.pointer("/securityContext/runAsNonRoot").and_then(Value::as_bool) {
        Some(own) => !own,
        None => pod_context["runAsNonRoot"] != true,
    };
    if !user_namespace && (containers(pod).any(may_be_root) || pod_context["runAsNonRoot"] == false) {
        let who = culprits(pod, may_be_root);
        faults
            .push(format!("runAsNonRoot != true (pod or {who} must set securityContext.runAsNonRoot=true)"));
    }
    if !user_namespace && contexts(pod).iter().any(|c| c["runAsUser"] == 0) {
        faults.push("runAsUser=0 (must not run as user 0)".to_owned());
    }
    let confined = |c: &Value, p: &str| matches!(text(c, p), "RuntimeDefault" | "Localhost");
    let pod_confined = confined(pod_context, "/seccompProfile/type");
    let unconfined = |c: &Value| match text(c, "/securityContext/seccompProfile/type") {
        "" => !pod_confined,
        _ => !confined(c, "/securityContext/seccompProfile/type"),
    };
    if containers(pod).any(unconfined) {
        let who = culprits(pod, unconfined);
        faults.push(format!(
            "seccompProfile (pod or {who} must set securityContext.seccompProfile.type to \"RuntimeDefault\" or \"Localhost\")"
        ));
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn good() -> Value {
        json!({"spec": {"securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{"name": "c", "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}}],
            "volumes": [{"name": "v", "emptyDir": {}}]}})
    }

    #[test]
    fn a_good_pod_keeps_both_levels() {
        assert_eq!(violations(&good(), Level::Restricted), Vec::<String>::new());
        assert_eq!(
            violations(&json!({"spec": {"containers": [{"name": "c"}]}}), Level::Baseline),
            Vec::<String>::new()
        );
        assert_eq!(violations(&json!({"spec": {"containers": [{"name": "c"}]}}), Level::Restricted).len(), 4);
    }

    #[test]
    fn each_fault_is_found() {
        // pointer, value -> found at baseline
        let table = [
            ("/spec/hostNetwork", json!(true), true),
            ("/spec/containers/0/securityContext/privileged", json!(true), true),
            ("/spec/containers/0/securityContext/capabilities/add", json!(["SYS_ADMIN"]), true),
            ("/spec/containers/0/securityContext/capabilities/add", json!(["CHOWN"]), false),
            ("/spec/volumes/0/hostPath", json!({"path": "/"}), true),
            ("/spec/volumes/0/nfs", json!({}), false),
            ("/spec/containers/0/ports", json!([{"hostPort": 80}]), true),
            ("/spec/securityContext/seccompProfile/type", json!("Unconfined"), true),
            ("/spec/securityContext/sysctls", json!([{"name": "kernel.msgmax"}]), true),
            ("/spec/containers/0/securityContext/procMount", json!("Unmasked"), true),
            ("/spec/securityContext/runAsUser", json!(0), false),
            ("/spec/securityContext/runAsNonRoot", json!(false), false),
            ("/spec/containers/0/securityContext/allowPrivilegeEscalation", json!(true), false),
            ("/spec/containers/0/securityContext/seLinuxOptions", json!({"type": "spc_t"}), true),
        ];
        for (pointer, value, at_baseline) in table {
            let mut pod = good();
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            pod.pointer_mut(parent).unwrap()[key] = value;
            assert_eq!(!violations(&pod, Level::Baseline).is_empty(), at_baseline, "{pointer}");
            assert!(!violations(&pod, Level::Restricted).is_empty(), "{pointer}");
        }
    }
}
