//! Names and numbers of system calls, by architecture.

use std::collections::HashMap;

use oci_spec::runtime::Arch;

/// One kind of entry into the kernel.
#[derive(Clone, Copy)]
pub(super) struct Machine {
    /// AUDIT_ARCH_* of linux/audit.h.
    pub audit: u32,
    /// Arguments have 32 bits.
    pub narrow: bool,
    /// Numbers from this on belong to another ABI that shares the audit number: x32.
    pub foreign: Option<u32>,
    pub numbers: fn() -> HashMap<&'static str, u32>,
}

macro_rules! numbers {
    ($machine:ident) => {
        || syscalls::$machine::Sysno::iter().map(|s| (s.name(), s.id() as u32)).collect()
    };
}

#[cfg(target_arch = "x86_64")]
pub(super) const NATIVE: Machine =
    Machine { audit: 0xC000_003E, narrow: false, foreign: Some(0x4000_0000), numbers: numbers!(x86_64) };
/// What else can run here.
#[cfg(target_arch = "x86_64")]
const SECOND: (Arch, Machine) =
    (Arch::ScmpArchX86, Machine { audit: 0x4000_0003, narrow: true, foreign: None, numbers: numbers!(x86) });

#[cfg(target_arch = "aarch64")]
pub(super) const NATIVE: Machine =
    Machine { audit: 0xC000_00B7, narrow: false, foreign: None, numbers: numbers!(aarch64) };
/// What else can run here.
#[cfg(target_arch = "aarch64")]
const SECOND: (Arch, Machine) =
    (Arch::ScmpArchArm, Machine { audit: 0x4000_0028, narrow: true, foreign: None, numbers: numbers!(arm) });

/// The machines that a profile covers: the native one always, the second when it is named.
pub(super) fn machines(named: &[Arch]) -> Vec<Machine> {
    let second = named.contains(&SECOND.0).then_some(SECOND.1);
    std::iter::once(NATIVE).chain(second).collect()
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::headers;

    #[test]
    fn numbers_are_the_kernels() {
        for (header, machine) in [("asm/unistd_64.h", NATIVE), ("asm/unistd_32.h", SECOND.1)] {
            let ours = (machine.numbers)();
            let header = headers::numbers(header, "__NR_");
            // The library cannot name it, and the kernel never had code for it.
            let named = |name: &str| name != "break";
            let other = header.iter().filter(|(n, v)| named(n) && ours.get(n.as_str()) != Some(*v));
            let other: Vec<_> = other.map(|(n, v)| (n, v, ours.get(n.as_str()))).collect();
            assert!(other.is_empty(), "{other:?}");
        }
    }
}
