//! The short way for packets of known connections between a client and another node: rewritten and sent on before the
//! kernel makes anything of them. Whatever is not plain goes up to the packet programs, which decide everything: first
//! and last packets, options, fragments, unknown neighbours, packets that are too big.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{xdp_action, xdp_md};
use aya_ebpf::helpers::{bpf_csum_diff, bpf_fib_lookup, bpf_redirect};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use orlop_ebpf_common::lifetime::{due, quiet};
use orlop_ebpf_common::*;

use crate::maps::*;
use crate::packet::{TCP_FIN, TCP_RST, TCP_SYN};
use crate::rewrite::{AF_INET, AF_INET6, folded};
use crate::select;

const ETHERNET: usize = 14;
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;

#[xdp]
pub fn lb_xdp(ctx: XdpContext) -> u32 {
    forward(&ctx).unwrap_or(xdp_action::XDP_PASS)
}

/// A header inside the packet, if all of it is there.
#[inline(always)]
fn at<T>(ctx: &XdpContext, offset: usize) -> Option<*mut T> {
    let start = ctx.data() + offset;
    if start + core::mem::size_of::<T>() > ctx.data_end() { None } else { Some(start as *mut T) }
}

#[inline(always)]
fn forward(ctx: &XdpContext) -> Option<u32> {
    // SAFETY: the context is valid while the program runs.
    let index = unsafe { (*ctx.as_ptr().cast::<xdp_md>()).ingress_ifindex };
    let s = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: this CPU's element; nothing else uses it while this program runs.
    let s = unsafe { &mut *s };
    let ethernet: *mut [u8; ETHERNET] = at(ctx, 0)?;
    // SAFETY: in bounds, as `at` says; so below.
    let kind = unsafe { u16::from_be_bytes([(*ethernet)[12], (*ethernet)[13]]) };
    match kind {
        ETH_P_IP => ipv4(ctx, index, ethernet, s),
        ETH_P_IPV6 => ipv6(ctx, index, ethernet, s),
        _ => None,
    }
}

#[inline(always)]
fn ipv4(ctx: &XdpContext, index: u32, ethernet: *mut [u8; ETHERNET], s: &mut Scratch) -> Option<u32> {
    let ip: *mut [u8; 20] = at(ctx, ETHERNET)?;
    // SAFETY: in bounds.
    let h = unsafe { &mut *ip };
    // No options, no fragment, hops left.
    if h[0] != 0x45 || h[6] & 0x3f != 0 || h[7] != 0 || h[8] <= 1 {
        return None;
    }
    let word = |i: usize| u32::from_ne_bytes([h[i], h[i + 1], h[i + 2], h[i + 3]]);
    s.key.src = addr4(word(12));
    s.key.dst = addr4(word(16));
    let length = u16::from_be_bytes([h[2], h[3]]);
    let out = plan(ctx, index, ETHERNET + 20, h[9], length, true, s)?;
    let old = [s.key.src[3], s.key.dst[3], u32::from_ne_bytes([h[8], h[9], 0, 0])];
    h[8] -= 1;
    let new = [s.forward.src[3], s.forward.dst[3], u32::from_ne_bytes([h[8], h[9], 0, 0])];
    let check = u16::from_ne_bytes([h[10], h[11]]);
    // SAFETY: both are 12 bytes long and only read.
    let sum = unsafe {
        bpf_csum_diff(old.as_ptr().cast_mut(), 12, new.as_ptr().cast_mut(), 12, !check as u16 as u32)
    };
    let check = folded(sum as u64).to_ne_bytes();
    (h[10], h[11]) = (check[0], check[1]);
    put(h, 12, new[0]);
    put(h, 16, new[1]);
    Some(leave(ethernet, index, out, s))
}

#[inline(always)]
fn ipv6(ctx: &XdpContext, index: u32, ethernet: *mut [u8; ETHERNET], s: &mut Scratch) -> Option<u32> {
    let ip: *mut [u8; 40] = at(ctx, ETHERNET)?;
    // SAFETY: in bounds.
    let h = unsafe { &mut *ip };
    if h[0] >> 4 != 6 || h[7] <= 1 {
        return None;
    }
    let word = |i: usize| u32::from_ne_bytes([h[i], h[i + 1], h[i + 2], h[i + 3]]);
    s.key.src = [word(8), word(12), word(16), word(20)];
    s.key.dst = [word(24), word(28), word(32), word(36)];
    let length = u16::from_be_bytes([h[4], h[5]]).checked_add(40)?;
    let out = plan(ctx, index, ETHERNET + 40, h[6], length, false, s)?;
    h[7] -= 1;
    for i in 0..4 {
        put(h, 8 + i * 4, s.forward.src[i]);
        put(h, 24 + i * 4, s.forward.dst[i]);
    }
    Some(leave(ethernet, index, out, s))
}

#[inline(always)]
fn put(h: &mut [u8], at: usize, word: u32) {
    let b = word.to_ne_bytes();
    (h[at], h[at + 1], h[at + 2], h[at + 3]) = (b[0], b[1], b[2], b[3]);
}

/// The interface that the packet with the addresses in the scratch's key leaves by; its new addresses are in the
/// scratch's `forward`, and its ports and their checksum are written. `None`: the packet is untouched and goes up.
#[inline(always)]
fn plan(
    ctx: &XdpContext,
    index: u32,
    l4: usize,
    proto: u8,
    length: u16,
    v4: bool,
    s: &mut Scratch,
) -> Option<u32> {
    let head: *mut [u8; 8] = at(ctx, l4)?;
    // SAFETY: in bounds.
    let h = unsafe { &mut *head };
    s.key.sport = u16::from_be_bytes([h[0], h[1]]);
    s.key.dport = u16::from_be_bytes([h[2], h[3]]);
    (s.key.proto, s.key.pad) = (proto, 0);
    let check: *mut [u8; 2] = if proto == TCP {
        let tcp: *mut [u8; 20] = at(ctx, l4)?;
        // SAFETY: in bounds.
        if unsafe { (*tcp)[13] } & (TCP_SYN | TCP_FIN | TCP_RST) != 0 {
            return None;
        }
        at(ctx, l4 + 16)?
    } else if proto == UDP {
        at(ctx, l4 + 6)?
    } else {
        return None;
    };
    let now = now();
    let v = connection(s, now)?;
    // SAFETY: a valid element; copied, as it may change while we use it.
    s.forward = unsafe { *v };
    let f = &mut s.forward;
    // What the other direction is to be told goes up.
    if f.flags & ct_flags::REDIRECT == 0 || f.flags & ct_flags::NEW != 0 || due(f.last_seen_ns, now) {
        return None;
    }
    if f.flags & ct_flags::SRC == 0 {
        (f.src, f.sport) = (s.key.src, s.key.sport);
    }
    if f.flags & ct_flags::DST == 0 {
        (f.dst, f.dport) = (s.key.dst, s.key.dport);
    }
    // SAFETY: all zeros is a valid value of this plain C struct.
    s.fib = unsafe { core::mem::zeroed() };
    s.fib.ifindex = index;
    s.fib.__bindgen_anon_1.tot_len = length;
    if v4 {
        s.fib.family = AF_INET;
        s.fib.__bindgen_anon_4.ipv4_dst = f.dst[3];
    } else {
        s.fib.family = AF_INET6;
        s.fib.__bindgen_anon_4.ipv6_dst = f.dst;
    }
    // SAFETY: the struct is valid and its size is given.
    let r = unsafe { bpf_fib_lookup(ctx.as_ptr(), &raw mut s.fib, core::mem::size_of_val(&s.fib) as i32, 0) };
    let out = s.fib.ifindex;
    // SAFETY: elements are replaced as a whole.
    if r != 0 || unsafe { UPLINKS.get(&out) }?.flags & uplink_flags::XDP == 0 {
        return None;
    }
    // SAFETY: a valid element; racing writers store nearly the same time.
    unsafe { (*v).last_seen_ns = now };

    // SAFETY: in bounds.
    let check = unsafe { &mut *check };
    let old_check = u16::from_ne_bytes(*check);
    // A datagram may come without.
    if proto == TCP || old_check != 0 {
        let ports = |a: u16, b: u16| {
            let (a, b) = (a.to_be_bytes(), b.to_be_bytes());
            u32::from_ne_bytes([a[0], a[1], b[0], b[1]])
        };
        let (k, f) = (&s.key, &s.forward);
        let old = ports(k.sport, k.dport);
        let new = ports(f.sport, f.dport);
        // SAFETY: lengths are those of what is pointed to, and all are only read.
        let sum = unsafe {
            let seed = !old_check as u32;
            let sum = bpf_csum_diff(k.src.as_ptr().cast_mut(), 16, f.src.as_ptr().cast_mut(), 16, seed);
            let sum = bpf_csum_diff(k.dst.as_ptr().cast_mut(), 16, f.dst.as_ptr().cast_mut(), 16, sum as u32);
            bpf_csum_diff((&raw const old).cast_mut(), 4, (&raw const new).cast_mut(), 4, sum as u32)
        };
        let new_check = folded(sum as u64);
        *check = if new_check == 0 && proto == UDP { [0xff; 2] } else { new_check.to_ne_bytes() };
    }
    let (a, b) = (s.forward.sport.to_be_bytes(), s.forward.dport.to_be_bytes());
    (h[0], h[1], h[2], h[3]) = (a[0], a[1], b[0], b[1]);
    Some(out)
}

/// The connection of a packet that may go the short way.
#[inline(always)]
fn connection(s: &mut Scratch, now: u64) -> Option<*mut CtValue> {
    let config = CONFIG.get(0)?;
    if s.key.dport >= config.snat_first && s.key.dport <= config.snat_last {
        s.key.dir = ct_dir::REPLY;
        if let Some(v) = entry(&s.key) {
            return Some(v);
        }
    }
    if !leads_somewhere(&s.key.dst, s.key.dport, s.key.proto) {
        return None;
    }
    s.key.dir = ct_dir::FORWARD;
    let v = entry(&s.key)?;
    // As for every packet: datagrams leave a Service that is gone, and a backend that is.
    if s.key.proto == UDP {
        let front = select::frontend(&s.key.dst, s.key.dport, UDP, SCOPE_EXTERNAL, || false, config)?;
        // SAFETY: a valid element.
        let known = unsafe { &*v };
        let moved =
            front.flags & frontend_flags::MEMBERS != 0 && !select::is_member(front.set, known.backend);
        if moved || quiet(known, now) || select::backend(known.backend).is_none() {
            return None;
        }
    }
    Some(v)
}

#[inline(always)]
fn leave(ethernet: *mut [u8; ETHERNET], index: u32, out: u32, s: &mut Scratch) -> u32 {
    // SAFETY: in bounds: checked when the packet was looked at, and nothing has moved it since.
    let e = unsafe { &mut *ethernet };
    for i in 0..6 {
        (e[i], e[6 + i]) = (s.fib.dmac[i], s.fib.smac[i]);
    }
    count(counters::XDP);
    if out == index {
        return xdp_action::XDP_TX;
    }
    // SAFETY: no pointers.
    unsafe { bpf_redirect(out, 0) as u32 }
}
