//! SELinux with a distribution's policy: Debian's, as its package installs it, and with the modules for containers.

use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use orlop_test_vms::vm::{Guest, Outcome};
use orlop_test_vms::{root, run};

fn unpacked() -> std::path::PathBuf {
    let tools = std::env::var_os("ORLOP_TOOLS").unwrap_or_else(|| "/var/cache/orlop-tools".into());
    Path::new(&tools).join("selinux-policy")
}

fn guest() -> Result<Outcome, String> {
    // Busybox's stat tells no labels.
    let mut guest = Guest::new(&["stat", "setfiles", "runcon", "chcon"])?;
    guest.kernel_word("security=selinux");
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    run(Command::new(root().join("scripts/selinux-policy.sh")).arg(dir.path().join("policy")));
    for policy in ["plain", "containers"] {
        for name in ["policy", "file_contexts"] {
            let path = format!("{policy}/{name}");
            guest.file(&format!("/vm/{path}"), &dir.path().join("policy").join(&path))?;
        }
    }
    let contexts = unpacked().join("etc/selinux/default/contexts");
    guest.file("/etc/selinux/default/contexts/lxc_contexts", &contexts.join("lxc_contexts"))?;
    for policy in ["plain", "containers"] {
        let substitutions = format!("/vm/{policy}/file_contexts.subs_dist");
        guest.file(&substitutions, &contexts.join("files/file_contexts.subs_dist"))?;
    }
    let parts = [
        include_str!("../guest/node.sh"),
        include_str!("../guest/selinux_debian.sh"),
        include_str!("../guest/selinux_containers.sh"),
    ];
    guest.text("/vm/enforced", &parts.concat())?;
    guest.step("debian", include_str!("../guest/selinux_load.sh"))?;
    guest.run()
}

fn machine() -> &'static Outcome {
    static MACHINE: LazyLock<Result<Outcome, String>> = LazyLock::new(guest);
    MACHINE.as_ref().unwrap_or_else(|e| panic!("{e}"))
}

fn fact(key: &str) -> &'static str {
    machine().fact("debian", key).trim()
}

/// Debian 12's policy names `container_t` and has no such type.
#[test]
fn a_policy_without_types_for_containers_runs_them_in_the_servers_domain() {
    println!("{}", machine().succeeded("debian"));
    assert_eq!((fact("named"), fact("plain_server")), ("2", "system_u:system_r:initrc_t:s0"));
    assert_eq!((fact("plain_process"), fact("plain_warned")), (fact("plain_server"), "1"));
    assert!(fact("plain_asked").contains("policy has no labels for containers"), "{}", fact("plain_asked"));
}

#[test]
fn the_server_is_a_container_engine_and_needs_no_more_than_our_module_gives() {
    assert_eq!(fact("program"), "system_u:object_r:container_engine_exec_t:s0");
    assert_eq!(fact("server"), "system_u:system_r:container_engine_t:s0");
    let denied: Vec<&str> =
        machine().succeeded("debian").lines().filter(|l| l.starts_with("denied ")).collect();
    // That of the volume that is not a pod's.
    assert!(
        matches!(&denied[..], [one] if one.contains("{ relabelfrom }") && one.contains(":var_t:")),
        "{denied:?}"
    );
}

#[test]
fn containers_have_the_policys_labels_with_a_level_of_their_pod() {
    let process = fact("process");
    let (label, level) = process.split_once(":s0:").unwrap();
    assert_eq!(label, "system_u:system_r:container_t");
    assert!(level.starts_with('c') && level.contains(",c"), "{process}");
    assert_eq!((fact("exec"), fact("log")), (process, "said"));
    let file = format!("system_u:object_r:container_file_t:s0:{level}");
    assert_eq!((fact("inspect"), fact("file")), (&*format!("{process} {file}"), &*file));
    let (other, other_level) = fact("second").split_once(":s0:").unwrap();
    assert_eq!(other, label);
    assert_ne!(other_level, level);
    let privileged = "system_u:system_r:spc_t:s0";
    assert_eq!((fact("privileged"), fact("privileged_exec")), (privileged, privileged));
}

#[test]
fn the_kernel_holds_containers_to_their_labels() {
    let denied = |key| assert!(fact(key).contains("Permission denied"), "{key}: {}", fact(key));
    assert_eq!(fact("written"), "x y");
    assert_eq!(fact("host_is"), "system_u:object_r:var_t:s0");
    denied("host");
    denied("others");
    assert_eq!(fact("labelled"), "text");
    assert_eq!(fact("labelled_is"), fact("file"));
    denied("second_reads");
    assert!(fact("not_ours").contains("SELinux label of /srv/host"), "{}", fact("not_ours"));
    denied("not_ours");
    assert_eq!(fact("privileged_reads"), "text");
}
