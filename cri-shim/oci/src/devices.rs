//! Device rules on cgroup v2, which has no files for them: a small BPF program at the container's cgroup.
//!
//! The program is as long as its rules and asks no helper of the kernel. It lives as long as the cgroup.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::{Error, sys};

const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;
const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;

/// One rule; `None` is "any".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

impl Rule {
    /// `None` for a type that has no numbers.
    fn new(r: &LinuxDeviceCgroup) -> Option<Rule> {
        let kind = match r.typ().unwrap_or(LinuxDeviceType::A) {
            LinuxDeviceType::A => None,
            LinuxDeviceType::B => Some(BLOCK),
            LinuxDeviceType::C | LinuxDeviceType::U => Some(CHARACTER),
            LinuxDeviceType::P => return None,
        };
        let letter = |c| match c {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            _ => 0,
        };
        let access = r.access().as_ref().map_or(ALL, |a| a.chars().map(letter).fold(0, |a, b| a | b));
        // A negative number stands for any.
        let number = |n: Option<i64>| n.and_then(|n| u32::try_from(n).ok());
        Some(Rule { allow: r.allow(), kind, major: number(r.major()), minor: number(r.minor()), access })
    }

    fn lets_everything_pass(&self) -> bool {
        self.allow
            && self.kind.is_none()
            && self.major.is_none()
            && self.minor.is_none()
            && self.access == ALL
    }
}

/// An instruction of eBPF: code, registers, jump and number.
fn instruction(code: u8, to: u8, from: u8, jump: i16, number: i32) -> u64 {
    u64::from(code)
        | u64::from(to | from << 4) << 8
        | u64::from(jump as u16) << 16
        | u64::from(number as u32) << 32
}

const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xbf;
const MOVE_NUMBER: u8 = 0xb7;
const AND: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const JUMP_IF_EQUAL: u8 = 0x15;
const JUMP_IF_NOT_EQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;

/// Pure. The last rule that says something about a request decides; a request that no rule names is denied.
fn program(rules: &[Rule]) -> Vec<u64> {
    // The context: type and access in one word, major, minor.
    let mut out = vec![
        instruction(LOAD_WORD, 2, 1, 0, 0),
        instruction(MOVE, 3, 2, 0, 0),
        instruction(AND, 2, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, 3, 0, 0, 16),
        instruction(LOAD_WORD, 4, 1, 4, 0),
        instruction(LOAD_WORD, 5, 1, 8, 0),
    ];
    for r in rules.iter().rev() {
        // Each test goes on to the next rule when it fails: (code, register, number).
        let mut tests: Vec<(u8, u8, u32)> = Vec::new();
        tests.extend(r.kind.map(|k| (JUMP_IF_NOT_EQUAL, 2, k)));
        tests.extend(r.major.map(|n| (JUMP_IF_NOT_EQUAL, 4, n)));
        tests.extend(r.minor.map(|n| (JUMP_IF_NOT_EQUAL, 5, n)));
        let mut block = Vec::new();
        // An allowed request asks for nothing beyond the rule, a denied one for something of it.
        let masked = if r.allow { ALL & !r.access } else { r.access };
        let access_tests: &[u64] = &[
            instruction(MOVE, 0, 3, 0, 0),
            instruction(AND, 0, 0, 0, masked as i32),
            instruction(if r.allow { JUMP_IF_NOT_EQUAL } else { JUMP_IF_EQUAL }, 0, 0, 2, 0),
        ];
        let len = tests.len() + access_tests.len() + 2;
        for (at, (code, register, number)) in tests.into_iter().enumerate() {
            block.push(instruction(code, register, 0, (len - at - 1) as i16, number as i32));
        }
        block.extend(access_tests);
        block.push(instruction(MOVE_NUMBER, 0, 0, 0, i32::from(r.allow)));
        block.push(instruction(EXIT, 0, 0, 0, 0));
        out.extend(block);
    }
    out.extend([instruction(MOVE_NUMBER, 0, 0, 0, 0), instruction(EXIT, 0, 0, 0, 0)]);
    out
}

/// What every container may use: null, zero, full, random, urandom, tty, console, ptmx and its terminals.
const STANDARD: [(u32, Option<u32>); 9] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(1)),
    (5, Some(2)),
    (136, None),
];

/// As runc and libcgroups have them for v1: nodes may be made, also of devices that may not be used.
fn standard_rules() -> impl Iterator<Item = Rule> {
    let node = |kind| Rule { allow: true, kind: Some(kind), major: None, minor: None, access: MKNOD };
    let device =
        |(major, minor)| Rule { allow: true, kind: Some(CHARACTER), major: Some(major), minor, access: ALL };
    [node(CHARACTER), node(BLOCK)].into_iter().chain(STANDARD.into_iter().map(device))
}

/// Applies the rules of a spec, and those for the devices that every container has, to a cgroup v2 folder.
pub(crate) fn confine(folder: &Path, rules: &[LinuxDeviceCgroup]) -> Result<(), Error> {
    let mut all: Vec<Rule> = rules.iter().filter_map(Rule::new).collect();
    if all.last().is_none_or(Rule::lets_everything_pass) {
        return Ok(());
    }
    all.extend(standard_rules());
    attach(folder, &program(&all)).map_err(|e| Error::io("cgroup", "cannot set the device rules", &e))
}

fn attach(folder: &Path, program: &[u64]) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let cgroup: OwnedFd = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC)
        .open(folder)?
        .into();
    let loaded = sys::load_device_program(program)?;
    sys::attach_device_program(cgroup.as_raw_fd(), loaded.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::helper;
    use std::fs;
    use std::os::fd::AsFd;

    fn rule(allow: bool, kind: Option<u32>, numbers: (i64, i64), access: u32) -> Rule {
        let number = |n: i64| u32::try_from(n).ok();
        Rule { allow, kind, major: number(numbers.0), minor: number(numbers.1), access }
    }

    /// Bits of what a process in `folder` may do: open /dev/null, write to it, open /dev/zero, make a node.
    fn tried_in(folder: &Path) -> i32 {
        let place = fs::File::open(folder).expect("the folder");
        let node = std::env::temp_dir().join(format!("orlop-oci-node-{}", std::process::id()));
        let path = std::ffi::CString::new(node.to_str().expect("a name")).expect("no NUL");
        // SAFETY: the child of a process with threads makes system calls only.
        let Some(pid) = sys::fork_child(Some(place.as_fd())).expect("fork") else {
            let opens = |p: &std::ffi::CStr, flags| {
                let fd = unsafe { libc::open(p.as_ptr(), flags) };
                i32::from(fd >= 0)
            };
            let made = unsafe { libc::mknod(path.as_ptr(), libc::S_IFCHR | 0o600, libc::makedev(1, 3)) } == 0;
            helper::leave(
                opens(c"/dev/null", libc::O_RDONLY)
                    | opens(c"/dev/null", libc::O_WRONLY) << 1
                    | opens(c"/dev/zero", libc::O_RDONLY) << 2
                    | i32::from(made) << 3,
            );
        };
        let status = nix::sys::wait::waitpid(pid, None).expect("its end");
        let _ = fs::remove_file(node);
        match status {
            nix::sys::wait::WaitStatus::Exited(_, code) => code,
            other => panic!("{other:?}"),
        }
    }

    /// Attached for real: also where containers use cgroup v1, the kernel has a v2 hierarchy beside it.
    #[test]
    fn the_kernel_obeys() {
        let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"];
        let root = root.iter().map(Path::new).find(|r| r.join("cgroup.controllers").exists());
        let root = root.expect("mount cgroup2 at /sys/fs/cgroup or /sys/fs/cgroup/unified");
        let null = |allow, access| rule(allow, Some(CHARACTER), (1, 3), access);
        let none = rule(false, None, (-1, -1), ALL);
        let cases: &[(&[Rule], i32)] = &[
            (&[none, null(true, READ | WRITE)], 0b0011),
            (&[none, null(true, READ)], 0b0001),
            (&[none, rule(true, Some(CHARACTER), (1, -1), ALL)], 0b1111),
            (&[none, rule(true, Some(BLOCK), (1, 3), ALL)], 0),
            (&[rule(true, None, (-1, -1), ALL), null(false, WRITE)], 0b1101),
            (&[rule(true, None, (-1, -1), ALL), rule(false, None, (-1, -1), MKNOD)], 0b0111),
            (&[], 0),
        ];
        for (i, (rules, want)) in cases.iter().enumerate() {
            let folder = root.join(format!("orlop-oci-devices-{}-{i}", std::process::id()));
            fs::create_dir(&folder).expect("a cgroup");
            let done = attach(&folder, &program(rules)).map(|()| tried_in(&folder));
            fs::remove_dir(&folder).expect("the cgroup goes");
            assert_eq!(done.expect("the program loads"), *want, "{rules:?}");
        }
    }

    #[test]
    fn rules_of_a_spec() {
        let parse = |json: serde_json::Value| Rule::new(&serde_json::from_value(json).expect("a rule"));
        let all = parse(serde_json::json!({"allow": true})).unwrap();
        assert!(all.lets_everything_pass());
        assert_eq!(
            parse(serde_json::json!({"allow": false, "type": "b", "major": 8, "minor": -1, "access": "rm"})),
            Some(rule(false, Some(BLOCK), (8, -1), READ | MKNOD))
        );
        assert_eq!(parse(serde_json::json!({"allow": true, "type": "p"})), None);
    }
}
