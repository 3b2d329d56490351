//! The node on Linux 6.1 with all controllers in cgroup v1, that of huge pages among them: one machine under QEMU, booted once.

mod huge_pages;

use std::sync::LazyLock;

use orlop_test_vms::vm::{Guest, Outcome};

const MI: u64 = 1 << 20;

fn guest() -> Result<Outcome, String> {
    let mut guest = Guest::new(&["jq"])?;
    guest.text("/vm/cgroups", include_str!("../guest/cgroup_v1.sh"))?;
    guest.step("check", "exec orlop check\n")?;
    guest.cri("")?;
    huge_pages::step(
        &mut guest,
        "v1",
        &[
            include_str!("../guest/limits_begin.sh"),
            include_str!("../guest/v1_limits.sh"),
            include_str!("../guest/limits_change.sh"),
            include_str!("../guest/v1_figures.sh"),
            include_str!("../guest/limits_end.sh"),
        ],
    )?;
    guest.step("oom", include_str!("../guest/oom.sh"))?;
    guest.step("up", include_str!("../guest/v1_up.sh"))?;
    guest.run()
}

fn machine() -> &'static Outcome {
    static MACHINE: LazyLock<Result<Outcome, String>> = LazyLock::new(guest);
    MACHINE.as_ref().unwrap_or_else(|e| panic!("{e}"))
}

fn fact(key: &str) -> &'static str {
    machine().fact("v1", key).trim()
}

fn number(key: &str) -> u64 {
    fact(key).parse().unwrap_or_else(|e| panic!("{key}={}: {e}", fact(key)))
}

#[test]
fn a_container_is_in_its_pods_group_of_each_controller() {
    let check = machine().succeeded("check");
    assert!(check.contains("cgroup version 1"), "{check}");
    println!("{}", machine().succeeded("v1"));
    for controller in ["cpu", "cpuacct", "cpuset", "memory", "pids", "hugetlb", "blkio", "devices", "freezer"]
    {
        assert_eq!(fact(&format!("in:{controller}")), "yes", "{controller}");
    }
    assert_eq!(fact("exec_in"), format!("/orlop-vm/limits/{}", fact("container")), "an exec, too");
    assert_eq!(fact("left"), "");
}

#[test]
fn limits_change_while_a_container_runs() {
    for (step, cpu, cpus, memory) in [
        ("created", "512 50000 100000", "0-1", 32),
        ("all", "256 20000 50000", "0", 48),
        ("share", "1024 20000 50000", "0", 48),
        ("quota", "1024 40000 50000", "0", 48),
        ("period", "1024 40000 200000", "0", 48),
        ("cpus", "1024 40000 200000", "0-1", 48),
        ("less", "1024 40000 200000", "0-1", 24),
        ("none", "1024 -1 200000", "0-1", 24),
    ] {
        assert_eq!(fact(step), format!("{cpu} {cpus} {0} {0}", memory * MI), "{step}");
    }
}

#[test]
fn huge_pages_are_limited() {
    let limits = (fact("hugetlb.2MB.limit_in_bytes"), fact("hugetlb.2MB.rsvd.limit_in_bytes"));
    assert_eq!((limits, fact("hugetlb.1GB.limit_in_bytes")), (("4194304", "4194304"), "0"));
    let pages = (fact("1_page"), fact("2_pages"), fact("3_pages"));
    assert_eq!(pages, ("0", "0", "12"), "12 is ENOMEM");
    assert_eq!((fact("file"), fact("larger"), fact("free")), ("allocated", "refused", "8"));
}

#[test]
fn figures_are_the_kernels() {
    let (before, after) = (number("cpu_before"), number("cpu_after"));
    let stats = number("stats:cpu");
    assert!(before > 0 && (before..=after).contains(&stats), "{before} {stats} {after}");
    let seconds = number("metrics:cpu_usage_seconds_total");
    assert!((before / 1_000_000_000..=after / 1_000_000_000).contains(&seconds), "{seconds}");

    // The kernel counts in batches, and crictl's own runs may have left a page.
    let used = number("memory");
    assert!((8 * MI..24 * MI).contains(&used), "{used}");
    for key in ["stats:usage", "stats:working_set", "metrics:memory_usage_bytes"] {
        assert!(number(key).abs_diff(used) < MI, "{key}: {} of {used}", number(key));
    }
    assert!(number("cache") >= 8 * MI && number("metrics:memory_cache").abs_diff(number("cache")) < MI);
    assert_eq!(fact("metrics:processes"), fact("processes"));
    let spec = ["memory_limit_bytes", "cpu_shares", "cpu_period"].map(|n| fact(&format!("metrics:spec_{n}")));
    assert_eq!((spec, fact("metrics:oom_events_total")), (["25165824", "1024", "200000"], "0"));
}

#[test]
fn too_much_memory_is_reported_as_that() {
    let fact = |key| machine().fact("oom", key);
    assert_eq!((fact("state"), fact("reason"), fact("exit_code")), ("CONTAINER_EXITED", "OOMKilled", "137"));
}

#[test]
fn a_pod_of_a_cluster_is_limited_and_has_its_huge_pages() {
    let m = machine();
    println!("{}", m.succeeded("up"));
    let fact = |key: &str| m.fact("up", key).trim();
    let limits = ["memory/memory.limit_in_bytes", "pids/pids.max", "cpu/cpu.shares", "cpu/cpu.cfs_quota_us"];
    let limits = limits.map(|l| fact(&format!("pod:{l}")));
    assert_eq!(limits, ["33554432", "77", "512", "50000"]);
    assert_eq!(fact("pod:hugetlb/hugetlb.2MB.limit_in_bytes"), "4194304");
    let mounted = fact("mounted");
    assert!(mounted.starts_with("hugetlbfs ") && mounted.contains("pagesize=2M"), "{mounted}");
    assert_eq!((fact("file"), fact("larger"), fact("volumes")), ("allocated", "refused", "1"));
    assert_eq!((fact("volumes_left"), fact("groups_left"), fact("free")), ("0", "", "8"));
}
