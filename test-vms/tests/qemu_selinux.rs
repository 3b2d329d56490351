//! SELinux with a policy of a few types, in a machine of its own under QEMU: a kernel has one of AppArmor and SELinux.

use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use orlop_test_vms::run;
use orlop_test_vms::vm::{Guest, Outcome, on_path};

/// The policy in the kernel's form.
fn policy(dir: &Path) -> std::path::PathBuf {
    let names: Vec<String> = (0..1024).map(|i| format!("c{i}")).collect();
    let mut categories: String = names.iter().map(|n| format!("(category {n})\n")).collect();
    categories.push_str(&format!("(categoryorder ({}))\n", names.join(" ")));
    let (given, more, out) = (dir.join("policy.cil"), dir.join("categories.cil"), dir.join("policy"));
    std::fs::write(&given, include_str!("../guest/selinux.cil")).unwrap();
    std::fs::write(&more, categories).unwrap();
    let compiler = on_path("secilc").unwrap();
    // The version of Linux 5.15 to 6.6.
    let mut command = Command::new(compiler);
    command.args(["--policyvers=33", "--filecontext=/dev/null", "--output"]).arg(&out);
    run(command.arg(&given).arg(&more));
    out
}

fn guest() -> Result<Outcome, String> {
    // Busybox's stat tells no labels.
    let mut guest = Guest::new(&["crun", "stat"])?;
    guest.kernel_word("security=selinux");
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    guest.file("/vm/policy", &policy(dir.path()))?;
    guest.step("policy", include_str!("../guest/policy.sh"))?;
    guest.cri("--runtime-handler crun=/usr/local/bin/crun")?;
    guest.step("selinux", include_str!("../guest/selinux.sh"))?;
    guest.step("up", include_str!("../guest/selinux_up.sh"))?;
    guest.run()
}

fn machine() -> &'static Outcome {
    static MACHINE: LazyLock<Result<Outcome, String>> = LazyLock::new(guest);
    MACHINE.as_ref().unwrap_or_else(|e| panic!("{e}"))
}

/// The last part of a label, and the label without it.
fn level(label: &str) -> (&str, &str) {
    let (rest, level) = label.split_once(":s0:").unwrap_or_else(|| panic!("no level of categories: {label}"));
    (rest, level)
}

#[test]
fn a_pod_has_labels_with_a_level_of_its_own() {
    let m = machine();
    println!("{}", m.succeeded("selinux"));
    let fact = |key| m.fact("selinux", key).trim();
    let (process, mount) = fact("pod").split_once(' ').unwrap();
    assert_eq!(level(process).0, "system_u:system_r:container_t");
    assert_eq!(mount, process.replace("system_r:container_t", "object_r:container_file_t"));
    assert_eq!((fact("process"), fact("exec"), fact("exec_later")), (process, process, process));
    assert_ne!(level(fact("second")).1, level(process).1);
    assert_eq!(fact("level"), "system_u:system_r:container_t:s0:c7,c9");
    assert_eq!(fact("reader"), process.replace("container_t", "reader_t"));
    assert_eq!(fact("privileged"), m.fact("policy", "own"), "the policy says what it becomes");
}

#[test]
fn all_files_of_a_container_have_its_label() {
    let fact = |key: &str| machine().fact("selinux", key);
    let mount = fact("pod").split_once(' ').unwrap().1;
    for file in [
        "/",
        "/bin/busybox",
        "/dev",
        "/dev/null",
        "/dev/pts",
        "/dev/shm",
        "/dev/mqueue",
        "/etc/hosts",
        "/proc/acpi",
    ] {
        assert_eq!(fact(&format!("file:{file}")), mount, "{file}");
    }
    assert_eq!(fact("written").trim(), "x y");
    let images = "system_u:object_r:container_ro_file_t:s0";
    assert_eq!(fact("images"), format!("{images} {images}"));
}

#[test]
fn containers_of_other_kinds_have_labels_too() {
    let fact = |key| machine().fact("selinux", key).trim();
    let (process, mount) = fact("pod").split_once(' ').unwrap();
    assert_eq!((fact("odd"), fact("odd_mount"), fact("odd_dev")), (process, mount, mount));
    assert_eq!(level(fact("crun")).0, "system_u:system_r:container_t");
    assert_eq!(fact("crun"), fact("crun_exec"));
    assert_eq!(level(fact("users")).0, "system_u:system_r:container_t");
    assert_eq!(fact("users"), fact("users_exec"));
    let mount = fact("users").replace("system_r:container_t", "object_r:container_file_t");
    assert_eq!((fact("users:/"), fact("users:/dev"), fact("users:/dev/mqueue")), (&*mount, &*mount, &*mount));
}

#[test]
fn a_volume_is_relabelled_when_asked_and_the_kernel_denies_the_rest() {
    let fact = |key| machine().fact("selinux", key).trim();
    let denied = |key| assert!(fact(key).contains("Permission denied"), "{key}: {}", fact(key));
    let mount = fact("pod").split_once(' ').unwrap().1;
    denied("unlabelled");
    assert_eq!(
        (fact("unlabelled_is"), fact("outside")),
        ("system_u:object_r:host_t:s0", "system_u:object_r:host_t:s0")
    );
    assert_eq!(fact("relabelled"), format!("{mount} {mount}"));
    assert_eq!((fact("labelled"), fact("labelled_reader")), ("text", "text"));
    denied("reader_write");
    denied("second_reads");
    assert!(fact("etc").contains("InvalidArgument desc = /etc belongs to the system"), "{}", fact("etc"));
}

#[test]
fn a_pod_of_a_cluster_has_its_level_and_uses_its_own_volumes() {
    let m = machine();
    println!("{}", m.succeeded("up"));
    let fact = |key| m.fact("up", key);
    assert_eq!(fact("label"), "system_u:system_r:container_t:s0:c3,c4");
    assert_eq!((fact("scratch"), fact("config"), fact("token")), ("x", "value", "read"));
    assert_eq!((fact("hosts"), fact("termination")), ("read", "written"));
    assert!(
        fact("nodes").contains("Permission denied"),
        "the node's files keep their label: {}",
        fact("nodes")
    );
}

#[test]
fn a_wrong_label_is_refused_and_leaves_nothing() {
    let fact = |key| machine().fact("selinux", key);
    for (key, label) in
        [("wrong_type", ":nobody_t:"), ("wrong_level", ":s0:c1024"), ("wrong_pod", ":nobody_r:")]
    {
        let said = fact(key);
        assert!(
            said.contains("InvalidArgument desc = the SELinux policy of this node does not know"),
            "{said}"
        );
        assert!(said.contains(label), "{said}");
    }
    assert!(fact("wrong_text").contains("SELinux user"), "{}", fact("wrong_text"));
    assert_eq!(fact("left"), "");
}
