//! Arrows point down only. What is not listed here is forbidden.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

/// Each crate with the crates of ours that it may use (docs/ARCHITECTURE.md has the reasons).
const ALLOWED: &[(&str, &[&str])] = &[
    ("orlop-proto", &[]),
    ("orlop-base", &[]),
    ("orlop-fuzz", &[]),
    ("orlop-api", &["orlop-base"]),
    ("orlop-client", &["orlop-base", "orlop-api"]),
    ("orlop-images", &["orlop-base"]),
    ("orlop-oci", &["orlop-base"]),
    ("orlop-monitor", &["orlop-proto", "orlop-base", "orlop-oci"]),
    ("orlop-nri", &["orlop-base"]),
    (
        "orlop-cri",
        &[
            "orlop-proto",
            "orlop-base",
            "orlop-api",
            "orlop-images",
            "orlop-nri",
            "orlop-cni-types",
            "orlop-cni-invoke",
        ],
    ),
    ("orlop-cni-types", &[]),
    ("orlop-cni-invoke", &["orlop-base", "orlop-cni-types"]),
    ("orlop-cni", &["orlop-base", "orlop-cni-types"]),
    ("orlop-ebpf-common", &[]),
    ("orlop-ebpf-loader", &["orlop-base", "orlop-ebpf-common"]),
    ("orlop-proxy", &["orlop-base", "orlop-api", "orlop-client", "orlop-ebpf-common", "orlop-ebpf-loader"]),
    ("orlop-agent", &["orlop-proto", "orlop-base", "orlop-api", "orlop-client"]),
    ("orlop-store", &["orlop-base"]),
    ("orlop-apiserver", &["orlop-base", "orlop-api", "orlop-store"]),
    ("orlop-scheduler", &["orlop-base", "orlop-api", "orlop-client"]),
    ("orlop-controllers", &["orlop-base", "orlop-api", "orlop-client"]),
    ("orlop-dns", &["orlop-base", "orlop-api", "orlop-client"]),
    ("orlop-demo-web", &[]),
    ("orlop-test-vms", &["orlop-base"]),
    ("xtask", &["orlop-client", "orlop-proto", "orlop-test-vms"]),
    (
        "orlop",
        &[
            "orlop-base",
            "orlop-proto",
            "orlop-api",
            "orlop-client",
            "orlop-images",
            "orlop-cri",
            "orlop-proxy",
            "orlop-cni",
            "orlop-cni-types",
            "orlop-agent",
            "orlop-apiserver",
            "orlop-scheduler",
            "orlop-controllers",
            "orlop-dns",
        ],
    ),
];

/// Only this crate may name libcontainer, so that its errors and habits are dealt with once.
const LIBCONTAINER: &str = "orlop-oci";

/// Words that a decision module (`plan.rs`) must not contain: no I/O, no clock, no API client.
const IMPURE: &[&str] =
    &["tokio", "std::fs", "std::net", "kube::", "SystemTime::now", "Instant::now", "Timestamp::now"];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    workspace_root: PathBuf,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    kind: Option<String>,
}

fn metadata() -> Metadata {
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps"])
        .output()
        .expect("cargo runs");
    serde_json::from_slice(&out.stdout).expect("cargo metadata answers JSON")
}

#[test]
fn arrows_point_down() {
    let meta = metadata();
    let ours: Vec<&str> = meta.packages.iter().map(|p| p.name.as_str()).collect();
    let mut wrong = Vec::new();
    for p in &meta.packages {
        let Some((_, allowed)) = ALLOWED.iter().find(|(n, _)| *n == p.name) else {
            wrong.push(format!("crate {} is not in the table of allowed edges", p.name));
            continue;
        };
        // Tests may use what they test against.
        for d in p.dependencies.iter().filter(|d| d.kind.as_deref() != Some("dev")) {
            if ours.contains(&d.name.as_str()) && !allowed.contains(&d.name.as_str()) {
                wrong.push(format!("{} must not depend on {}", p.name, d.name));
            }
            if d.name == "libcontainer" && p.name != LIBCONTAINER {
                wrong.push(format!("{} must not name libcontainer; {LIBCONTAINER} does", p.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn decision_modules_are_pure() {
    let mut plans = Vec::new();
    find_plans(&metadata().workspace_root, &mut plans);
    assert!(!plans.is_empty());
    let mut wrong = Vec::new();
    for path in plans {
        let text = std::fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        for word in IMPURE {
            if let Some(n) = code.lines().position(|l| !l.trim_start().starts_with("//") && l.contains(word))
            {
                wrong.push(format!("{}:{}: a decision module names {word}", path.display(), n + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn find_plans(dir: &Path, found: &mut Vec<PathBuf>) {
    for e in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = e.path();
        let name = e.file_name();
        if path.is_dir() && name != "target" && name != ".git" {
            find_plans(&path, found);
        } else if name == "plan.rs" {
            found.push(path);
        }
    }
}
