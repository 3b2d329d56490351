//! The service proxy's packet programs on Linux 6.1, where they attach by clsact: its tests that make a node, pods and clients of network
//! namespaces, in one machine under QEMU.

use std::path::PathBuf;
use std::process::Command;
use std::sync::LazyLock;

use orlop_test_vms::vm::{Guest, Outcome, on_path};
use orlop_test_vms::{root, run};

/// The program of the proxy's tests, built like all others: from the whole workspace.
fn cells() -> Result<PathBuf, String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    // What cargo says to the test that runs: build scripts would take it for news, and their crates would be built again.
    let is_ours = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(is_ours)) {
        build.env_remove(name);
    }
    build.current_dir(root()).args(["test", "--offline", "--workspace", "--no-run", "--quiet"]);
    let said = run(build.args(["--message-format", "json", "--test", "cells"]));
    let built = said.lines().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok());
    let mut programs = built.filter(|m| m["target"]["name"] == "cells");
    let program = programs.find_map(|m| m["executable"].as_str().map(PathBuf::from));
    program.ok_or_else(|| format!("cargo names no program of the tests `cells`:\n{said}"))
}

/// Every kind of Service, policy, state of endpoints, protocol, family and place of the client.
const TABLES: [&str; 2] = ["every_cell_by_the_hooks_of_this_kernel", "every_cell_with_host_routing"];

fn guest() -> Result<Outcome, String> {
    let mut guest = Guest::new(&[])?;
    // Busybox's own knows no namespaces.
    guest.program(&on_path("ip")?)?;
    guest.program_at("/usr/local/bin/cells", &cells()?)?;
    guest.step("vlans", "exec cells --ignored --test-threads 1 vlan::\n")?;
    guest.step("cells", &format!("exec cells --nocapture --exact {}\n", TABLES.join(" ")))?;
    guest.step("full", "exec cells evicted::\n")?;
    guest.run()
}

fn machine() -> &'static Outcome {
    static MACHINE: LazyLock<Result<Outcome, String>> = LazyLock::new(guest);
    MACHINE.as_ref().unwrap_or_else(|e| panic!("{e}"))
}

/// The step ran so many tests, and none failed.
fn passed(step: &str, tests: usize) -> &'static str {
    let said = machine().succeeded(step);
    println!("{said}");
    assert!(said.contains(&format!("test result: ok. {tests} passed; 0 failed")), "{said}");
    said
}

#[test]
fn vlans_are_served_or_left_alone() {
    passed("vlans", 3);
}

#[test]
fn every_cell_is_answered() {
    let said = passed("cells", TABLES.len());
    let asked: Vec<u32> =
        said.lines().filter_map(|l| l.strip_suffix(" cells")?.split(' ').next_back()?.parse().ok()).collect();
    assert!(asked.len() == TABLES.len() && asked.iter().all(|n| *n > 2_000), "{said}");
}

#[test]
fn connections_outlive_a_full_table() {
    passed("full", 2);
}
