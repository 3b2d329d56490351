//! A machine with huge pages, and a program that maps them.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use orlop_base::testkit::elf_program;
use orlop_test_vms::vm::Guest;

/// For x86-64, without a C library.
fn maps_huge_pages() -> Vec<u8> {
    let code: &[u8] = &[
        0x8b, 0x34, 0x24, 0xc1, 0xe6, 0x15, // esi = arguments * 2 MiB
        0xb8, 9, 0, 0, 0, 0x31, 0xff, 0xba, 3, 0, 0, 0, // mmap(0, esi, read and write,
        0x41, 0xba, 0x22, 0x00, 0x04, 0x00, // private, anonymous, huge,
        0x49, 0xc7, 0xc0, 0xff, 0xff, 0xff, 0xff, 0x45, 0x31, 0xc9, 0x0f, 0x05, // -1, 0)
        0x48, 0x85, 0xc0, 0x78, 0x15, // failed?
        0xc6, 0x00, 0x01, 0x48, 0x05, 0, 0, 0x20, 0, // touch, next page
        0x81, 0xee, 0, 0, 0x20, 0, 0x75, 0xef, // until all are touched
        0x31, 0xff, 0xeb, 0x04, // edi = 0
        0xf7, 0xd8, 0x89, 0xc7, // failed: edi = -eax
        0xb8, 60, 0, 0, 0, 0x0f, 0x05, // exit(edi)
    ];
    elf_program(code)
}

/// `/vm/huge` maps as many huge pages as it has arguments, itself the first, and touches each; it ends with the error number.
fn program(guest: &Guest) -> Result<(), String> {
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let path = dir.path().join("huge");
    fs::write(&path, maps_huge_pages()).map_err(|e| e.to_string())?;
    fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).map_err(|e| e.to_string())?;
    guest.file("/vm/huge", &path)
}

/// Adds a step of several scripts, and what they need: eight huge pages and `/vm/huge`.
pub fn step(guest: &mut Guest, name: &str, scripts: &[&str]) -> Result<(), String> {
    program(guest)?;
    guest.kernel_word("hugepages=8");
    guest.step(name, &scripts.concat())
}
