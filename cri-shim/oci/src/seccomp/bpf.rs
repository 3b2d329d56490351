//! Pure: classic BPF for seccomp. Every block ends in a return, so blocks are put together by writing one after the other.

use libc::sock_filter;

/// The kernel takes no longer program.
pub(super) const LONGEST: usize = 4096;

/// Offsets in `struct seccomp_data`.
const NR: u32 = 0;
const ARCH: u32 = 4;
const ARGS: u32 = 16;

const LD_ABS: u16 = 0x20;
const AND: u16 = 0x54;
const JA: u16 = 0x05;
const JEQ: u16 = 0x15;
const JGT: u16 = 0x25;
const JGE: u16 = 0x35;
const RET: u16 = 0x06;

pub(super) type Block = Vec<sock_filter>;

fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

pub(super) fn ret(action: u32) -> Block {
    vec![instruction(RET, 0, 0, action)]
}

pub(super) fn load_nr() -> sock_filter {
    instruction(LD_ABS, 0, 0, NR)
}

pub(super) fn load_arch() -> sock_filter {
    instruction(LD_ABS, 0, 0, ARCH)
}

/// `if <test> k { then } else { otherwise }` on what is loaded. A conditional jump reaches 255 instructions, a plain one all.
fn branch(test: u16, k: u32, then: Block, otherwise: Block) -> Block {
    let mut out = match u8::try_from(otherwise.len()) {
        Ok(n) => vec![instruction(test, n, 0, k)],
        Err(_) => vec![instruction(test, 0, 1, k), instruction(JA, 0, 0, otherwise.len() as u32)],
    };
    out.extend(otherwise);
    out.extend(then);
    out
}

pub(super) fn if_equal(k: u32, then: Block, otherwise: Block) -> Block {
    branch(JEQ, k, then, otherwise)
}

pub(super) fn if_at_least(k: u32, then: Block, otherwise: Block) -> Block {
    branch(JGE, k, then, otherwise)
}

/// How one argument is compared. Both numbers are 64 bits wide; `Masked` is `(argument & mask) == value`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Test {
    Ne(u64),
    Lt(u64),
    Le(u64),
    Eq(u64),
    Ge(u64),
    Gt(u64),
    Masked { mask: u64, value: u64 },
}

/// One comparison of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Condition {
    pub argument: u32,
    pub test: Test,
}

#[derive(Clone, Copy)]
enum To {
    Next,
    /// The condition holds.
    Holds,
    /// It does not.
    Fails,
}

/// A rule: `action` when all conditions hold, `otherwise` else.
pub(super) fn rule(conditions: &[Condition], narrow: bool, action: u32, otherwise: Block) -> Block {
    let mut out: Vec<(u16, To, To, u32, usize)> = Vec::new();
    for (i, c) in conditions.iter().enumerate() {
        condition(c, narrow, &mut |code, t, f, k| out.push((code, t, f, k, i)));
    }
    let ends: Vec<usize> =
        (0..conditions.len()).map(|i| out.iter().rposition(|o| o.4 == i).map_or(0, |p| p + 1)).collect();
    // The return follows the last comparison; what comes otherwise follows the return.
    let fails = out.len() + 1;
    let mut block: Block = Vec::with_capacity(out.len() + 1 + otherwise.len());
    for (at, (code, t, f, k, i)) in out.iter().enumerate() {
        let jump = |to: &To| match to {
            To::Next => 0,
            To::Holds => (ends[*i] - at - 1) as u8,
            To::Fails => (fails - at - 1) as u8,
        };
        block.push(instruction(*code, jump(t), jump(f), *k));
    }
    block.extend(ret(action));
    block.extend(otherwise);
    block
}

/// At most 8 instructions each, and a call has 6 arguments: jumps within a rule stay below 255 as long as a rule names no
/// argument twice, which its maker sees to. `narrow`: the registers of this architecture have 32 bits.
fn condition(c: &Condition, narrow: bool, out: &mut dyn FnMut(u16, To, To, u32)) {
    use To::{Fails, Holds, Next};
    let low_at = ARGS + 8 * c.argument + if cfg!(target_endian = "big") { 4 } else { 0 };
    let high_at = ARGS + 8 * c.argument + if cfg!(target_endian = "big") { 0 } else { 4 };
    let (high, low) = (|v: u64| (v >> 32) as u32, |v: u64| v as u32);
    let mut high_word = |code: u16, t: To, f: To, v: u64| {
        if !narrow {
            out(LD_ABS, Next, Next, high_at);
            out(code, t, f, high(v));
        }
    };
    match c.test {
        Test::Eq(v) => high_word(JEQ, Next, Fails, v),
        Test::Ne(v) => high_word(JEQ, Next, Holds, v),
        Test::Masked { mask, value } => {
            if !narrow {
                out(LD_ABS, Next, Next, high_at);
                out(AND, Next, Next, high(mask));
                out(JEQ, Next, Fails, high(value & mask));
            }
            out(LD_ABS, Next, Next, low_at);
            out(AND, Next, Next, low(mask));
            return out(JEQ, Next, Fails, low(value & mask));
        }
        Test::Gt(v) | Test::Ge(v) => {
            high_word(JGT, Holds, Next, v);
            if !narrow {
                out(JEQ, Next, Fails, high(v));
            }
        }
        Test::Lt(v) | Test::Le(v) => {
            high_word(JGT, Fails, Next, v);
            if !narrow {
                out(JEQ, Next, Holds, high(v));
            }
        }
    }
    out(LD_ABS, Next, Next, low_at);
    match c.test {
        Test::Eq(v) => out(JEQ, Next, Fails, low(v)),
        Test::Ne(v) => out(JEQ, Fails, Next, low(v)),
        Test::Gt(v) => out(JGT, Next, Fails, low(v)),
        Test::Ge(v) => out(JGE, Next, Fails, low(v)),
        Test::Lt(v) => out(JGE, Fails, Next, low(v)),
        Test::Le(v) => out(JGT, Fails, Next, low(v)),
        Test::Masked { .. } => {}
    }
}

/// What the kernel's interpreter does, for tests.
#[cfg(test)]
pub(super) fn interpret(program: &[sock_filter], nr: u32, arch: u32, args: [u64; 6]) -> u32 {
    let word = |offset: u32| match offset {
        NR => nr,
        ARCH => arch,
        o => {
            let arg = args[((o - ARGS) / 8) as usize];
            if (o - ARGS).is_multiple_of(8) { arg as u32 } else { (arg >> 32) as u32 }
        }
    };
    let (mut at, mut loaded) = (0usize, 0u32);
    loop {
        let i = program[at];
        at += 1;
        let choose = |holds: bool| if holds { i.jt as usize } else { i.jf as usize };
        match i.code {
            LD_ABS => loaded = word(i.k),
            AND => loaded &= i.k,
            JA => at += i.k as usize,
            JEQ => at += choose(loaded == i.k),
            JGT => at += choose(loaded > i.k),
            JGE => at += choose(loaded >= i.k),
            RET => return i.k,
            other => panic!("instruction {other:#x}"),
        }
    }
}
