//! From an OCI seccomp profile to a filter of the kernel. Pure; [`crate::sys::load_filter`] installs it.
//!
//! Meaning, where the OCI spec leaves it open, is that of runc with libseccomp:
//! - Names that this table does not know are left out. A call whose number is beyond every number that the profile names gets
//!   ENOSYS unless the default lets calls pass: it is newer than the profile, and programs fall back on older ones.
//! - A rule without conditions decides alone; rules with conditions are tried in the order of the profile. A rule whose action
//!   is the default one says nothing.
//! - Conditions of a rule that name the same argument twice are alternatives, all others must hold together.
//! - Calls by an architecture that the profile does not name end the process.

mod bpf;
mod table;

use std::collections::BTreeMap;

use libc::sock_filter;
use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
    LinuxSyscall,
};

use crate::{Error, Kind};
use bpf::{Block, Condition, Test};
use table::Machine;

const RET_KILL_PROCESS: u32 = 0x8000_0000;
const RET_ALLOW: u32 = 0x7fff_0000;
const RET_LOG: u32 = 0x7ffc_0000;
const RET_ERRNO: u32 = 0x0005_0000;
const RET_NOTIFY: u32 = libc::SECCOMP_RET_USER_NOTIF;
/// By it the listener's descriptor leaves the process, before anybody can answer a call that waits for that listener.
const HANDS_OVER: &str = "sendmmsg";

const NEW_LISTENER: u32 = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER as u32;

/// A program that the kernel takes, with the flags of seccomp(2).
#[derive(Clone, Debug)]
pub(crate) struct Filter {
    pub program: Vec<sock_filter>,
    pub flags: u32,
}

impl Filter {
    /// The kernel gives a descriptor for it, over which somebody answers calls.
    pub(crate) fn notifies(&self) -> bool {
        self.flags & NEW_LISTENER != 0
    }

    /// For the file from which an exec into the container reads it: the flags, then 8 bytes for each instruction.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut out = self.flags.to_ne_bytes().to_vec();
        for i in &self.program {
            out.extend(i.code.to_ne_bytes());
            out.extend([i.jt, i.jf]);
            out.extend(i.k.to_ne_bytes());
        }
        out
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Filter> {
        let (flags, rest) = bytes.split_first_chunk::<4>()?;
        let (instructions, tail) = rest.as_chunks::<8>();
        if !tail.is_empty() || instructions.is_empty() || instructions.len() > bpf::LONGEST {
            return None;
        }
        let program = instructions
            .iter()
            .map(|[c0, c1, jt, jf, k @ ..]| sock_filter {
                code: u16::from_ne_bytes([*c0, *c1]),
                jt: *jt,
                jf: *jf,
                k: u32::from_ne_bytes(*k),
            })
            .collect();
        Some(Filter { program, flags: u32::from_ne_bytes(*flags) })
    }
}

fn bad(message: impl Into<String>) -> Error {
    Error::new(Kind::Invalid, "seccomp", message, libc::EINVAL)
}

/// Makes the filter; `None` when the profile lets everything pass.
pub(crate) fn compile(profile: &LinuxSeccomp) -> Result<Option<Filter>, Error> {
    let default = action(profile.default_action(), profile.default_errno_ret());
    let rules = profile.syscalls().as_deref().unwrap_or_default();
    if default == RET_NOTIFY {
        return Err(bad("SCMP_ACT_NOTIFY cannot be the default action"));
    }
    let asks = |r: &&LinuxSyscall| r.action() == LinuxSeccompAction::ScmpActNotify;
    let notifies = rules.iter().any(|r| asks(&r));
    if rules.iter().filter(asks).any(|r| r.names().iter().any(|n| n == HANDS_OVER)) {
        let text = format!(
            "SCMP_ACT_NOTIFY of {HANDS_OVER} is not possible: the runtime itself needs it to hand the listener over"
        );
        return Err(bad(text));
    }
    if notifies && profile.listener_path().as_ref().is_none_or(|p| !p.is_absolute()) {
        return Err(bad("SCMP_ACT_NOTIFY needs a listenerPath, which is absolute"));
    }
    if default == RET_ALLOW && rules.is_empty() {
        return Ok(None);
    }
    let named = profile.architectures().as_deref().unwrap_or_default();
    let mut out = bpf::ret(RET_KILL_PROCESS);
    for machine in table::machines(named).into_iter().rev() {
        let section = section(profile, default, machine)?;
        out = bpf::if_equal(machine.audit, section, out);
    }
    out.insert(0, bpf::load_arch());
    if out.len() > bpf::LONGEST {
        return Err(bad(format!(
            "the profile needs {} instructions, the kernel takes {}",
            out.len(),
            bpf::LONGEST
        )));
    }
    Ok(Some(Filter { program: out, flags: flags(profile, notifies) }))
}

fn flags(profile: &LinuxSeccomp, notifies: bool) -> u32 {
    let more = if notifies { NEW_LISTENER } else { 0 };
    // Without flags in the profile, mitigations of speculation are left as they are, as with runc.
    let Some(named) = profile.flags() else { return libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW as u32 | more };
    named
        .iter()
        .map(|f| match f {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG as u32,
            // There is one thread; the kernel would refuse this beside a listener.
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW as u32,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv if notifies => {
                libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV as u32
            }
            // Only means something to a listener; the kernel would refuse it.
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
        })
        .fold(more, |a, b| a | b)
}

fn action(a: LinuxSeccompAction, errno: Option<u32>) -> u32 {
    use LinuxSeccompAction as A;
    let number = errno.unwrap_or(libc::EPERM as u32) & 0xffff;
    match a {
        A::ScmpActKill | A::ScmpActKillThread => 0,
        A::ScmpActKillProcess => RET_KILL_PROCESS,
        A::ScmpActTrap => 0x0003_0000,
        A::ScmpActErrno => RET_ERRNO | number,
        A::ScmpActTrace => 0x7ff0_0000 | number,
        A::ScmpActLog => RET_LOG,
        A::ScmpActAllow => RET_ALLOW,
        A::ScmpActNotify => RET_NOTIFY,
    }
}

/// What happens to one system call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Verdict {
    always: Option<u32>,
    /// Alternatives in their order.
    when: Vec<(Vec<Condition>, u32)>,
}

impl Verdict {
    fn block(&self, default: u32, narrow: bool) -> Block {
        if let Some(a) = self.always {
            return bpf::ret(a);
        }
        let last = bpf::ret(default);
        self.when.iter().rev().fold(last, |rest, (conditions, a)| bpf::rule(conditions, narrow, *a, rest))
    }
}

/// The part of the program for one architecture.
fn section(profile: &LinuxSeccomp, default: u32, machine: Machine) -> Result<Block, Error> {
    let numbers = (machine.numbers)();
    let mut verdicts: BTreeMap<u32, Verdict> = BTreeMap::new();
    let mut newest = None;
    for rule in profile.syscalls().as_deref().unwrap_or_default() {
        let what = action(rule.action(), rule.errno_ret());
        let when = alternatives(rule.args().as_deref().unwrap_or_default())?;
        for nr in rule.names().iter().filter_map(|n| numbers.get(n.as_str())) {
            newest = newest.max(Some(*nr));
            if what == default {
                continue;
            }
            let v = verdicts.entry(*nr).or_default();
            match when.is_empty() {
                true => v.always = v.always.or(Some(what)),
                false => v.when.extend(when.iter().map(|c| (c.clone(), what))),
            }
        }
    }
    // Ranges with the same fate: from this number on.
    let mut ranges: Vec<(u32, Verdict)> = vec![(0, Verdict::default())];
    let mut put = |from: u32, v: Verdict| match ranges.last_mut() {
        Some(last) if last.0 == from => last.1 = v,
        Some(last) if last.1 == v => {}
        _ => ranges.push((from, v)),
    };
    for (nr, v) in verdicts {
        put(nr, v);
        put(nr + 1, Verdict::default());
    }
    let passes = default == RET_ALLOW || default == RET_LOG;
    if let Some(newest) = newest.filter(|_| !passes) {
        put(newest + 1, Verdict { always: Some(RET_ERRNO | libc::ENOSYS as u32), ..Verdict::default() });
    }
    let mut out = vec![bpf::load_nr()];
    out.extend(search(&ranges, default, machine.narrow));
    if let Some(from) = machine.foreign {
        // Kernels of today are built without that ABI: the answer is theirs.
        let unknown = bpf::ret(RET_ERRNO | libc::ENOSYS as u32);
        let rest = out.split_off(1);
        out.extend(bpf::if_at_least(from, unknown, rest));
    }
    Ok(out)
}

fn search(ranges: &[(u32, Verdict)], default: u32, narrow: bool) -> Block {
    match ranges {
        [] => bpf::ret(default),
        [(_, v)] => v.block(default, narrow),
        _ => {
            let (left, right) = ranges.split_at(ranges.len() / 2);
            let at = right[0].0;
            bpf::if_at_least(at, search(right, default, narrow), search(left, default, narrow))
        }
    }
}

/// The conditions of a rule as alternatives; none for a rule without conditions.
fn alternatives(args: &[LinuxSeccompArg]) -> Result<Vec<Vec<Condition>>, Error> {
    let mut all = Vec::new();
    for a in args {
        if a.index() > 5 {
            return Err(bad(format!("a system call has no argument {}", a.index())));
        }
        all.push(Condition { argument: a.index() as u32, test: test(a) });
    }
    let mut seen = [false; 6];
    let twice = all.iter().any(|c| std::mem::replace(&mut seen[c.argument as usize], true));
    Ok(match (all.is_empty(), twice) {
        (true, _) => Vec::new(),
        (_, true) => all.into_iter().map(|c| vec![c]).collect(),
        (_, false) => vec![all],
    })
}

fn test(a: &LinuxSeccompArg) -> Test {
    use LinuxSeccompOperator as O;
    let v = a.value();
    match a.op() {
        O::ScmpCmpNe => Test::Ne(v),
        O::ScmpCmpLt => Test::Lt(v),
        O::ScmpCmpLe => Test::Le(v),
        O::ScmpCmpEq => Test::Eq(v),
        O::ScmpCmpGe => Test::Ge(v),
        O::ScmpCmpGt => Test::Gt(v),
        O::ScmpCmpMaskedEq => Test::Masked { mask: v, value: a.value_two().unwrap_or(0) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn profile(json: serde_json::Value) -> LinuxSeccomp {
        serde_json::from_value(json).expect("a profile")
    }

    fn run(f: &Filter, name: &str, args: [u64; 6]) -> u32 {
        let nr = (table::NATIVE.numbers)()[name];
        bpf::interpret(&f.program, nr, table::NATIVE.audit, args)
    }

    #[test]
    fn an_allow_list() {
        let p = profile(serde_json::json!({
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [
                {"names": ["read", "write", "futex", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
                {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
                {"names": ["kill"], "action": "SCMP_ACT_KILL_PROCESS"},
                {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]},
                {"names": ["personality"], "action": "SCMP_ACT_ALLOW",
                 "args": [{"index": 0, "value": 0xffff_ffffu64, "op": "SCMP_CMP_EQ"}]},
                {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_NE"}]},
                {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
                 "args": [{"index": 0, "value": 0x7E02_0000u64, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]}
            ]
        }));
        let f = compile(&p).unwrap().unwrap();
        let arg = |v: u64| [v, 0, 0, 0, 0, 0];
        let errno = |n: i32| RET_ERRNO | n as u32;
        let cases = [
            ("read", 0, RET_ALLOW),
            ("write", 9, RET_ALLOW),
            ("mount", 0, errno(libc::EPERM)),
            ("kill", 0, RET_KILL_PROCESS),
            ("clone3", 0, errno(libc::ENOSYS)),
            ("personality", 8, RET_ALLOW),
            ("personality", 0xffff_ffff, RET_ALLOW),
            ("personality", 9, errno(libc::EPERM)),
            ("personality", 8 | 1 << 40, errno(libc::EPERM)),
            ("socket", 40, errno(libc::EPERM)),
            ("socket", 2, RET_ALLOW),
            ("clone", 0x11, RET_ALLOW),
            ("clone", 0x1002_0000, errno(libc::EPERM)),
            // Newer than the newest that the profile names.
            ("faccessat2", 0, errno(libc::ENOSYS)),
        ];
        for (name, first, want) in cases {
            assert_eq!(run(&f, name, arg(first)), want, "{name} {first:#x}");
        }
        assert_eq!(bpf::interpret(&f.program, 0, 0x1234, [0; 6]), RET_KILL_PROCESS, "another architecture");
        if cfg!(target_arch = "x86_64") {
            assert_eq!(bpf::interpret(&f.program, 3, 0x4000_0003, [0; 6]), RET_ALLOW, "read of i386");
            assert_eq!(bpf::interpret(&f.program, 1 << 30, 0xC000_003E, [0; 6]), errno(libc::ENOSYS), "x32");
        }
        let back = Filter::from_bytes(&f.to_bytes()).unwrap();
        assert_eq!((back.to_bytes(), back.flags), (f.to_bytes(), f.flags));
        assert!(Filter::from_bytes(&f.to_bytes()[1..]).is_none() && Filter::from_bytes(&[]).is_none());
    }

    #[test]
    fn what_else_a_profile_says() {
        let deny = profile(serde_json::json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [
                {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13,
                 "args": [{"index": 1, "value": 1, "op": "SCMP_CMP_EQ"}, {"index": 1, "value": 2, "op": "SCMP_CMP_EQ"}]},
                {"names": ["mkdir"], "action": "SCMP_ACT_LOG", "args": [{"index": 0, "value": 7, "op": "SCMP_CMP_GT"}]},
                {"names": ["rmdir"], "action": "SCMP_ACT_TRAP"},
                {"names": ["rmdir"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "value": 7, "op": "SCMP_CMP_GT"}]}
            ]
        }));
        let f = compile(&deny).unwrap().unwrap();
        let two = |a: u64, b: u64| [a, b, 0, 0, 0, 0];
        if cfg!(target_arch = "x86_64") {
            assert_eq!(run(&f, "mkdir", two(0, 1)), RET_ERRNO | 13);
            assert_eq!(run(&f, "mkdir", two(9, 2)), RET_ERRNO | 13, "the first that holds");
            assert_eq!(run(&f, "mkdir", two(9, 3)), RET_LOG);
            assert_eq!(run(&f, "mkdir", two(7, 3)), RET_ALLOW);
            assert_eq!(run(&f, "rmdir", two(9, 0)), 0x0003_0000, "without conditions decides alone");
            assert_eq!(bpf::interpret(&f.program, 9999, table::NATIVE.audit, [0; 6]), RET_ALLOW, "no ENOSYS");
        }
        assert!(compile(&profile(serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW"}))).unwrap().is_none());
        let argument = serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["mkdir"], "action": "SCMP_ACT_LOG", "args": [{"index": 6, "value": 1, "op": "SCMP_CMP_EQ"}]}]});
        assert!(compile(&profile(argument)).is_err());
    }

    #[test]
    fn a_listener() {
        let with = |default: &str, name: &str, path: Option<&str>| {
            let mut p = serde_json::json!({"defaultAction": default, "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
                "SECCOMP_FILTER_FLAG_TSYNC"], "syscalls": [{"names": [name], "action": "SCMP_ACT_NOTIFY"}]});
            if let Some(path) = path {
                p["listenerPath"] = path.into();
            }
            compile(&profile(p)).map(Option::unwrap)
        };
        let f = with("SCMP_ACT_ALLOW", "fchmod", Some("/run/agent")).unwrap();
        assert_eq!((run(&f, "fchmod", [0; 6]), run(&f, "read", [0; 6])), (RET_NOTIFY, RET_ALLOW));
        // Of linux/seccomp.h: NEW_LISTENER and WAIT_KILLABLE_RECV, which go together with nothing else of the profile's.
        assert_eq!((f.flags, f.notifies()), (1 << 3 | 1 << 5, true));
        assert!(Filter::from_bytes(&f.to_bytes()).unwrap().notifies());
        for (default, name, path, says) in [
            ("SCMP_ACT_ALLOW", "fchmod", None, "listenerPath"),
            ("SCMP_ACT_ALLOW", "fchmod", Some("run/agent"), "absolute"),
            ("SCMP_ACT_ALLOW", "sendmmsg", Some("/run/agent"), "sendmmsg"),
            ("SCMP_ACT_NOTIFY", "fchmod", Some("/run/agent"), "default"),
        ] {
            let e = with(default, name, path).unwrap_err();
            assert!(e.kind == Kind::Invalid && e.message.contains(says), "{name}: {e}");
        }
        // Nobody to tell: the kernel refuses that flag alone.
        let none =
            profile(serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/agent",
            "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"],
            "syscalls": [{"names": ["fchmod"], "action": "SCMP_ACT_LOG"}]}));
        assert_eq!(compile(&none).unwrap().unwrap().flags, 0);
    }

    fn holds(c: &Condition, args: &[u64; 6], narrow: bool) -> bool {
        let cut = |v: u64| if narrow { v & 0xffff_ffff } else { v };
        let a = cut(args[c.argument as usize]);
        match c.test {
            Test::Ne(v) => a != cut(v),
            Test::Lt(v) => a < cut(v),
            Test::Le(v) => a <= cut(v),
            Test::Eq(v) => a == cut(v),
            Test::Ge(v) => a >= cut(v),
            Test::Gt(v) => a > cut(v),
            Test::Masked { mask, value } => a & cut(mask) == cut(value & mask),
        }
    }

    fn number() -> impl Strategy<Value = u64> {
        prop_oneof![
            0u64..4,
            Just(u64::MAX),
            Just(1 << 32),
            Just((1 << 32) + 1),
            Just(0xffff_ffff),
            any::<u64>()
        ]
    }

    fn any_condition() -> impl Strategy<Value = Condition> {
        let test = (0..7, number(), number()).prop_map(|(op, v, w)| match op {
            0 => Test::Ne(v),
            1 => Test::Lt(v),
            2 => Test::Le(v),
            3 => Test::Eq(v),
            4 => Test::Ge(v),
            5 => Test::Gt(v),
            _ => Test::Masked { mask: v, value: w },
        });
        (0u32..3, test).prop_map(|(argument, test)| Condition { argument, test })
    }

    proptest! {
        /// The program decides as the rules read, whatever the ranges and the conditions are.
        #[test]
        fn programs_decide_as_rules_do(
            rules in prop::collection::btree_map(0u32..400, prop::collection::vec((prop::collection::vec(any_condition(), 0..3), 1u32..9), 1..4), 0..60),
            calls in prop::collection::vec((0u32..410, number(), number(), number()), 40),
            narrow in any::<bool>(),
        ) {
            let mut ranges = vec![(0, Verdict::default())];
            for (nr, list) in &rules {
                let mut v = Verdict::default();
                for (conditions, a) in list {
                    match conditions.is_empty() {
                        true => v.always = v.always.or(Some(*a)),
                        false => v.when.push((conditions.clone(), *a)),
                    }
                }
                ranges.retain(|r| r.0 != *nr);
                ranges.push((*nr, v));
                ranges.push((*nr + 1, Verdict::default()));
            }
            let mut program = vec![bpf::load_nr()];
            program.extend(search(&ranges, 77, narrow));
            for (nr, a, b, c) in calls {
                let args = [a, b, c, 0, 0, 0];
                let want = rules.get(&nr).map_or(77, |list| {
                    let first = list.iter().find(|(c, _)| c.is_empty());
                    let first = first.or_else(|| list.iter().find(|(cs, _)| cs.iter().all(|c| holds(c, &args, narrow))));
                    first.map_or(77, |(_, a)| *a)
                });
                prop_assert_eq!(bpf::interpret(&program, nr, 0, args), want);
            }
        }
    }
}
