//! The systemd cgroup driver under systemd itself, the first process of a machine under QEMU, booted once.

use std::sync::LazyLock;

use orlop_test_vms::vm::{Guest, Outcome};

fn guest() -> Result<Outcome, String> {
    let mut guest = Guest::new(&[])?;
    guest.with_systemd()?;
    guest.demo()?;
    guest.cri("--cgroup-driver systemd")?;
    guest.step("pods", include_str!("../guest/systemd/pods.sh"))?;
    guest.step("up", include_str!("../guest/systemd/up.sh"))?;
    guest.run()
}

fn fact(step: &str, key: &str) -> &'static str {
    static MACHINE: LazyLock<Result<Outcome, String>> = LazyLock::new(guest);
    MACHINE.as_ref().unwrap_or_else(|e| panic!("{e}")).fact(step, key).trim()
}

#[test]
fn a_container_is_a_scope_in_its_pods_slice() {
    let pods = |key| fact("pods", key);
    assert_eq!(
        (pods("path"), pods("named"), pods("state")),
        (
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podx.slice",
            "orlop-ID.scope",
            "active"
        )
    );
    assert_eq!(pods("memory"), "67108864", "as systemd knows it");
    assert_eq!(pods("exec"), "limited 0::/");
    assert_eq!((pods("adopted"), pods("exit_code")), ("CONTAINER_RUNNING", "7"));
    assert_eq!(pods("greedy"), "OOMKilled 137");
    assert_eq!(pods("left"), "");
}

#[test]
fn limits_and_devices_outlive_a_reload_of_systemd() {
    let pods = |key| fact("pods", key);
    let (limits, updated) = ("67108864 50000 100000 59 64", "33554432 20000 100000 59 64");
    assert_eq!((pods("limits"), pods("devices")), (limits, "2"));
    assert_eq!(pods("reloaded"), format!("{limits} 2"));
    assert_eq!(pods("updated"), updated);
    assert_eq!(pods("updated_reloaded"), format!("{updated} 2"));
}

#[test]
fn a_clusters_pods_have_slices_with_their_limits() {
    let up = |key| fact("up", key);
    assert!(up("answer").contains("hello from the orlop"), "{}", up("answer"));
    assert_eq!(up("slice"), "kubepods-burstable-podUID.slice");
    assert!(up("limits").starts_with("33554432 50000 100000 "), "{}", up("limits"));
    assert_eq!(up("reloaded_limits"), up("limits"));
    assert_eq!(up("reloaded_weights"), up("weights"));
    assert_eq!(up("unit"), "active 33554432");
    assert_eq!(up("scopes"), "1");
    assert_eq!(up("left"), "");
}
