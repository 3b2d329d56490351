//! The node on Linux 6.1 with cgroup v2 only, which is what Debian 12 gives its users: one machine under QEMU, booted once; each
//! test looks at what one of its steps said.

mod huge_pages;

use std::sync::LazyLock;

use orlop_test_vms::vm::{Guest, Outcome};

fn guest() -> Result<Outcome, String> {
    // criu has tar and gzip pack what lies in a container's tmpfs.
    let mut guest = Guest::new(&["criu", "tar", "gzip", "crun", "apparmor_parser"])?;
    guest.demo()?;
    guest.step("check", "exec orlop check\n")?;
    guest.step("no-bus", "echo \"said=$(orlop cri --cgroup-driver systemd 2>&1 | tail -n 1)\"\n")?;
    guest.cri("--runtime-handler crun=/usr/local/bin/crun")?;
    guest.step("pod", include_str!("../guest/pod.sh"))?;
    huge_pages::step(
        &mut guest,
        "limits",
        &[
            include_str!("../guest/limits_begin.sh"),
            include_str!("../guest/v2_limits.sh"),
            include_str!("../guest/limits_change.sh"),
            include_str!("../guest/limits_end.sh"),
        ],
    )?;
    guest.step("oom", include_str!("../guest/oom.sh"))?;
    guest.step("checkpoint", include_str!("../guest/checkpoint.sh"))?;
    guest.step("crun", include_str!("../guest/crun.sh"))?;
    guest.step("apparmor", include_str!("../guest/apparmor.sh"))?;
    guest.step("up", include_str!("../guest/up.sh"))?;
    guest.run()
}

/// What the machine said; its end, when something went wrong, is the failure of each test.
fn machine() -> &'static Outcome {
    static MACHINE: LazyLock<Result<Outcome, String>> = LazyLock::new(guest);
    MACHINE.as_ref().unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn check_finds_all_that_a_node_needs() {
    let findings = machine().succeeded("check");
    println!("{findings}");
    assert!(findings.contains("cgroup version 2"), "{findings}");
    assert!(!findings.contains("MISSING"), "{findings}");
}

#[test]
fn limits_are_in_the_cgroup_of_the_container() {
    let m = machine();
    let refused = m.fact("no-bus", "said");
    assert!(refused.contains("no system bus at /var/run/dbus/system_bus_socket"), "{refused}");
    println!("{}", m.succeeded("pod"));
    let fact = |key| m.fact("pod", key);
    assert!(fact("cgroup").starts_with("/sys/fs/cgroup/orlop-vm/limited/"), "{}", fact("cgroup"));
    assert_eq!(fact("memory.max"), "67108864");
    assert_eq!(fact("cpu.max"), "50000 100000");
    assert_eq!(fact("pids.max"), "64");
    let weight: u32 = fact("cpu.weight").parse().unwrap();
    assert!((1..100).contains(&weight), "512 shares are less than the usual 1024: weight {weight}");
}

/// All in one call and one by one; what is not named stays, and there is never swap beyond the memory.
#[test]
fn limits_change_while_a_container_runs() {
    let m = machine();
    println!("{}", m.succeeded("limits"));
    let mut weights = Vec::new();
    for (step, quota, cpus, memory) in [
        ("created", "50000 100000", "", 32),
        ("all", "20000 50000", "0", 48),
        ("share", "20000 50000", "0", 48),
        ("quota", "40000 50000", "0", 48),
        ("period", "40000 200000", "0", 48),
        ("cpus", "40000 200000", "0-1", 48),
        ("less", "40000 200000", "0-1", 24),
        ("none", "max 200000", "0-1", 24),
    ] {
        let (weight, rest) = m.fact("limits", step).split_once(' ').unwrap();
        assert_eq!(rest, format!("{quota} {cpus} {} 0", memory << 20), "{step}");
        weights.push((step, weight.parse::<u32>().unwrap()));
    }
    // Of 512, 256 and 1024 shares.
    assert!(weights[1].1 < weights[0].1 && weights[0].1 < weights[2].1, "{weights:?}");
    assert!(weights[3..].iter().all(|w| w.1 == weights[2].1), "{weights:?}");
}

#[test]
fn huge_pages_are_limited() {
    let fact = |key| machine().fact("limits", key);
    assert_eq!((fact("hugetlb.2MB.max"), fact("hugetlb.1GB.max")), ("4194304", "0"));
    assert_eq!(fact("hugetlb.2MB.rsvd.max"), "4194304");
    let pages = (fact("1_page"), fact("2_pages"), fact("3_pages"));
    assert_eq!(pages, ("0", "0", "12"), "12 is ENOMEM");
    assert_eq!((fact("file"), fact("larger"), fact("free")), ("allocated", "refused", "8"));
    assert_eq!(fact("left"), "", "groups");
}

#[test]
fn a_pod_runs_is_seen_into_and_leaves_nothing() {
    let fact = |key| machine().fact("pod", key);
    assert!(fact("address").starts_with("10.244.0."), "{}", fact("address"));
    assert_eq!(fact("ping"), "ok");
    assert_eq!(fact("exec").trim(), "limited 0::/", "own host name, own cgroup namespace");
    assert_eq!(fact("exec_code"), "5");
    assert_eq!(fact("exit_code"), "7");
    assert_eq!((fact("stdout"), fact("stderr")), ("1", "1"));
    assert_eq!(fact("left"), "");
}

#[test]
fn too_much_memory_is_reported_as_that() {
    let fact = |key| machine().fact("oom", key);
    assert_eq!(fact("state"), "CONTAINER_EXITED");
    assert_eq!(fact("reason"), "OOMKilled");
    assert_eq!(fact("exit_code"), "137");
}

#[test]
fn a_checkpoint_is_whole_and_its_container_goes_on() {
    let m = machine();
    println!("{}", m.succeeded("checkpoint"));
    let fact = |key| m.fact("checkpoint", key);
    assert_eq!((fact("counts"), fact("frozen"), fact("memory")), ("on", "0", "there"));
    assert_eq!((fact("beside").trim(), fact("left")), ("/run/checkpoints/counter.tar", ""));
    let files: Vec<&str> = fact("files").split_whitespace().collect();
    for name in ["bind.mounts", "config.dump", "container.log", "deleted.files", "dump.log", "spec.dump"] {
        assert!(files.contains(&name), "{name} is missing: {files:?}");
    }
    assert!(fact("count_on_disk").parse::<u32>().is_ok_and(|n| n >= 5), "{}", fact("count_on_disk"));
    let images: Vec<&str> = fact("images").split_whitespace().collect();
    for name in
        ["core.img", "descriptors.json", "inventory.img", "mountpoints.img", "pages.img", "pstree.img"]
    {
        assert!(images.contains(&name), "{name} is missing: {images:?}");
    }
    assert_eq!(fact("terminal"), "done");
}

#[test]
fn a_pod_of_crun_lives_like_any_other() {
    let m = machine();
    println!("{}", m.succeeded("crun"));
    let fact = |key| m.fact("crun", key);
    assert_eq!((fact("state"), fact("memory")), ("crun", "67108864"));
    assert_eq!(fact("exec").trim(), "other 0::/");
    assert_eq!((fact("exit_code"), fact("stdout"), fact("left")), ("7", "1", ""));
    // Debian's is built without criu.
    let refused = fact("checkpoint");
    assert!(refused.starts_with("Unimplemented") && refused.contains("runtime crun"), "{refused}");
}

#[test]
fn apparmor_confines_containers() {
    let m = machine();
    println!("{}", m.succeeded("apparmor"));
    let fact = |key| m.fact("apparmor", key).trim();
    // The program that loads profiles came later.
    assert_eq!(fact("without"), "unconfined");
    assert!(fact("without_asked").contains("apparmor_parser is missing"), "{}", fact("without_asked"));
    let default = "orlop-default (enforce)";
    assert_eq!((fact("default"), fact("exec"), fact("default_writes")), (default, default, "x"));
    assert!(fact("default_mounts").contains("Permission denied"), "{}", fact("default_mounts"));
    assert_eq!((fact("unconfined"), fact("unconfined_mounts")), ("unconfined", "mounted"));
    assert_eq!(fact("privileged"), "unconfined");
    let missing = fact("missing");
    assert!(
        missing.contains(r#"InvalidArgument desc = the AppArmor profile \"vm-no-tmp\" is not loaded"#),
        "{missing}"
    );
    assert_eq!((fact("local"), fact("local_writes")), ("vm-no-tmp (enforce)", "x"));
    assert!(fact("local_denied").contains("Permission denied"), "{}", fact("local_denied"));
    assert_eq!((fact("exit_code_default"), fact("exit_code_local")), ("7", "7"));
}

#[test]
fn pods_are_limited_one_by_one_and_together() {
    let fact = |key| machine().fact("up", key);
    assert_eq!((fact("pod/memory.max"), fact("pod/cpu.max")), ("33554432", "50000 100000"));
    assert_eq!(fact("kubepods/memory.max"), fact("memory"), "nothing is reserved");
    assert_eq!(fact("kubepods/besteffort/cpu.weight"), "1");
    let all: u32 = fact("kubepods/cpu.weight").parse().unwrap();
    assert!(all >= 39, "a whole CPU weighs 39: {all}");
    assert!(fact("kubepods/pids.max").parse::<u32>().is_ok(), "{}", fact("kubepods/pids.max"));
}

#[test]
fn a_cluster_serves_the_demo_through_its_service() {
    let m = machine();
    println!("{}", m.succeeded("up"));
    for address in ["10.96.0.80", "192.0.2.10"] {
        let answer = m.fact("up", address);
        assert!(
            answer.starts_with("web-") && answer.contains("on vm: hello from the orlop"),
            "{address}: {answer}"
        );
    }
    assert_ne!(m.fact("up", "confined"), "0", "by the default AppArmor profile");
}
