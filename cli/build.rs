//! How the program is linked.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // A program that may be loaded anywhere lists every pointer in its constants, 24 bytes each, and the loader reads the whole list
    // into memory: 1.6 MiB, for 70,000 pointers. Packed it is a bitmap of a few KiB (glibc 2.36, Debian 12).
    if std::env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|e| e == "gnu") {
        println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
}
