//! Builds the BPF programs with a toolchain of their own and leaves the object in OUT_DIR.
//!
//! The programs need `core` for bpfel-unknown-none built from source, which a stable rustup toolchain cannot do. Used
//! is Debian's compiler with its library sources, or else a rustup nightly with rust-src.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const TARGET: &str = "bpfel-unknown-none";
const DEBIAN: &str = "/usr/bin/rustc";

fn main() {
    if let Err(e) = build() {
        // One line with the remedy is what a reader of the build's output needs.
        eprintln!("error: {e}");
        println!("cargo::error={e}");
        std::process::exit(1);
    }
}

fn build() -> Result<(), String> {
    let here = PathBuf::from(var("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(var("OUT_DIR")?);
    let ebpf = here.parent().ok_or("the loader has no parent folder")?;
    let programs = ebpf.join("programs");
    for path in
        ["programs/src", "programs/Cargo.toml", "programs/Cargo.lock", "common/src", "common/Cargo.toml"]
    {
        println!("cargo::rerun-if-changed={}", ebpf.join(path).display());
    }
    println!("cargo::rerun-if-env-changed=ORLOP_BPF_OBJECT");

    let object = match env::var_os("ORLOP_BPF_OBJECT") {
        // For packagers who build the programs apart.
        Some(path) => PathBuf::from(path),
        None => compile(&programs, &target_dir(&out))?,
    };
    fs::copy(&object, out.join("lb.o")).map_err(|e| format!("cannot copy {}: {e}", object.display()))?;
    Ok(())
}

fn var(name: &str) -> Result<String, String> {
    env::var(name).map_err(|_| format!("{name} is not set; run this through cargo"))
}

/// Shared by all profiles of this checkout, so that the programs are compiled once: `target/bpf` beside the profile.
fn target_dir(out: &Path) -> PathBuf {
    // OUT_DIR is <target>/<profile>/build/<package>-<hash>/out, with a target triple before the profile when given.
    out.ancestors().find(|d| d.join("CACHEDIR.TAG").exists()).unwrap_or(out).join("bpf")
}

fn compile(programs: &Path, target_dir: &Path) -> Result<PathBuf, String> {
    let cargo_bin = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|h| Path::new(&h).join(".cargo")))
        .map(|d| d.join("bin"));
    let mut path: Vec<PathBuf> = env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect();
    path.extend(cargo_bin);
    if !path.iter().any(|d| d.join("bpf-linker").is_file()) {
        return Err("bpf-linker is missing; run: apt-get install llvm-22-dev libpolly-22-dev && LLVM_PREFIX=/usr/lib/llvm-22 \
                    cargo install bpf-linker --version 0.13.0 --no-default-features --features llvm-22 --locked"
            .into());
    }

    let mut cmd;
    if debian_has_sources() {
        cmd = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        clean(&mut cmd);
        cmd.env("RUSTC", DEBIAN).env("RUSTC_BOOTSTRAP", "1");
    } else if nightly_has_sources() {
        cmd = Command::new("rustup");
        clean(&mut cmd);
        cmd.args(["run", "nightly", "cargo"]);
    } else {
        return Err("no compiler for BPF programs; run: apt-get install rustc-web rust-web-src, or: rustup toolchain install \
                    nightly --component rust-src"
            .into());
    }
    let path = env::join_paths(path).map_err(|e| format!("PATH: {e}"))?;
    cmd.env("PATH", path)
        .current_dir(programs)
        .args(["build", "--release", "--locked", "--target", TARGET, "-Z", "build-std=core", "--target-dir"])
        .arg(target_dir);
    let output = cmd.output().map_err(|e| format!("cannot run cargo for the BPF programs: {e}"))?;
    if !output.status.success() {
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
        return Err(format!("the BPF programs in {} did not compile; see above", programs.display()));
    }
    Ok(target_dir.join(TARGET).join("release/lb"))
}

/// What cargo sets for this build must not reach the programs' build: other flags, other compiler, clippy's wrapper.
fn clean(cmd: &mut Command) {
    for (name, _) in env::vars_os() {
        let n = name.to_string_lossy();
        let keep = n == "CARGO_HOME"
            || n == "CARGO_NET_OFFLINE"
            || n.starts_with("CARGO_HTTP")
            || n.starts_with("CARGO_REGISTR");
        let ours = n.starts_with("CARGO")
            || n.starts_with("RUSTC")
            || n.starts_with("RUSTFLAGS")
            || n.starts_with("RUSTDOC");
        if (ours && !keep)
            || n.starts_with("CLIPPY")
            || n == "RUSTUP_TOOLCHAIN"
            || n == "OUT_DIR"
            || n == "TARGET"
        {
            cmd.env_remove(&name);
        }
    }
    cmd.env("RUSTFLAGS", "-C debuginfo=2 -C link-arg=--btf");
}

fn sysroot(rustc: &mut Command) -> Option<PathBuf> {
    let out = rustc.args(["--print", "sysroot"]).env_remove("RUSTUP_TOOLCHAIN").output().ok()?;
    out.status.success().then(|| PathBuf::from(String::from_utf8_lossy(&out.stdout).trim()))
}

fn has_sources(sysroot: Option<PathBuf>) -> bool {
    sysroot.is_some_and(|s| s.join("lib/rustlib/src/rust/library/core").is_dir())
}

fn debian_has_sources() -> bool {
    Path::new(DEBIAN).is_file() && has_sources(sysroot(&mut Command::new(DEBIAN)))
}

fn nightly_has_sources() -> bool {
    has_sources(sysroot(Command::new("rustup").args(["run", "nightly", "rustc"])))
}
