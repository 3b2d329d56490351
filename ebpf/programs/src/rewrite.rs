//! Changing a packet's addresses and ports with their checksums, and sending it where it now belongs.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, bpf_fib_lookup as FibLookup};
use aya_ebpf::helpers::{bpf_csum_diff, bpf_fib_lookup, bpf_redirect_neigh, bpf_skb_change_head};
use aya_ebpf::programs::TcContext;
use orlop_ebpf_common::*;

use crate::maps::*;

/// Passes the packet to the next program and then the stack, on tcx and on clsact.
pub const NEXT: i32 = -1;
pub const DROP: i32 = 2;

pub const AF_INET: u8 = 2;
pub const AF_INET6: u8 = 10;
/// Bytes of a link header.
const ETHERNET: u32 = 14;
const FIB_SUCCESS: i64 = 0;
/// The route is known, the neighbour not yet: bpf_redirect_neigh resolves it.
const FIB_NO_NEIGH: i64 = 7;
const FIB_TOO_BIG: i64 = 8;

/// Newer kernels want to be told that a checksum belongs to IPv6, older ones refuse to be.
const BPF_F_IPV6: u64 = 1 << 7;

#[inline(always)]
pub fn dropped() -> i32 {
    count(counters::PACKET_DROPPED);
    DROP
}

/// The difference that putting `new` in place of `old` makes to a checksum.
#[inline(always)]
pub fn difference(old: &Addr, new: &Addr) -> u64 {
    if is_v4(old) && is_v4(new) {
        let sum = !old[3] as u64 + new[3] as u64;
        return (sum & 0xffff_ffff) + (sum >> 32);
    }
    // SAFETY: both are 16 bytes long and only read.
    unsafe { bpf_csum_diff(old.as_ptr().cast_mut(), 16, new.as_ptr().cast_mut(), 16, 0) as u64 }
}

/// The checksum that a sum of 32 bits stands for.
#[inline(always)]
pub fn folded(sum: u64) -> u16 {
    let sum = (sum & 0xffff) + ((sum >> 16) & 0xffff);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// Corrects a checksum that covers the pseudo header.
#[inline(always)]
pub fn pseudo(ctx: &TcContext, at: u32, diff: u64, v4: bool, mangled: u64) -> Option<()> {
    let at = at as usize;
    let flags = BPF_F_PSEUDO_HDR as u64 | mangled;
    if !v4 && ctx.l4_csum_replace(at, 0, diff, flags | BPF_F_IPV6).is_ok() {
        return Some(());
    }
    ctx.l4_csum_replace(at, 0, diff, flags).ok()
}

/// Writes an address into an IP header. `second`: the destination.
#[inline(always)]
pub fn store_address(ctx: &TcContext, l3: u32, v4: bool, second: bool, new: &Addr, diff: u64) -> Option<()> {
    let l3 = l3 as usize;
    if v4 {
        ctx.l3_csum_replace(l3 + 10, 0, diff, 0).ok()?;
        ctx.store(l3 + if second { 16 } else { 12 }, &new[3], 0).ok()
    } else {
        ctx.store(l3 + if second { 24 } else { 8 }, new, 0).ok()
    }
}

/// Replaces the source, or (`second`) the destination.
#[inline(always)]
pub fn replace(ctx: &TcContext, p: &Packet, second: bool, new: &Addr, new_port: u16) -> Option<()> {
    let (check_at, mangled) = if p.proto == TCP { (16, 0) } else { (6, BPF_F_MARK_MANGLED_0 as u64) };
    let check = p.l4 + check_at;
    let (old, old_port) = if second { (&p.dst, p.dport) } else { (&p.src, p.sport) };
    let diff = difference(old, new);
    if !p.headless {
        pseudo(ctx, check, diff, p.v4, mangled)?;
        let (from, to) = (old_port.to_be(), new_port.to_be());
        if from != to {
            ctx.l4_csum_replace(check as usize, from as u64, to as u64, mangled | 2).ok()?;
            ctx.store(p.l4 as usize + if second { 2 } else { 0 }, &to, 0).ok()?;
        }
    }
    store_address(ctx, p.l3, p.v4, second, new, diff)
}

/// Carries out a connection's translation.
#[inline(always)]
pub fn apply(ctx: &TcContext, p: &Packet, v: &CtValue) -> Option<()> {
    if v.flags & ct_flags::SRC != 0 {
        replace(ctx, p, false, &v.src, v.sport)?;
    }
    if v.flags & ct_flags::DST != 0 {
        replace(ctx, p, true, &v.dst, v.dport)?;
    }
    Some(())
}

/// Sends the packet by an interface.
#[inline(always)]
pub fn send(ctx: &TcContext, l3: u32, v4: bool, out: u32) -> i32 {
    if lower_ttl(ctx, l3, v4).is_none() {
        return dropped();
    }
    // The kernel takes a link header off before it puts the next one on, and drops what came without.
    // SAFETY: the context is valid while the program runs.
    if l3 == 0 && unsafe { bpf_skb_change_head(ctx.skb.skb, ETHERNET, 0) } != 0 {
        return dropped();
    }
    // SAFETY: no parameters: the kernel looks the next hop up itself.
    unsafe { bpf_redirect_neigh(out, core::ptr::null_mut(), 0, 0) as i32 }
}

/// Bytes of the packet from its IP header on, as it will be on the wire: of one segment, where many travel as one.
#[inline(always)]
pub fn length(ctx: &TcContext, p: &Packet) -> u16 {
    // SAFETY: the context is valid while the program runs.
    let (len, segment) = unsafe { ((*ctx.skb.skb).len, (*ctx.skb.skb).gso_size) };
    let bytes = if segment == 0 {
        len.saturating_sub(p.l3)
    } else {
        let head = if p.proto == TCP {
            let offset: u8 = ctx.load(p.l4 as usize + 12).unwrap_or(0x50);
            (offset >> 4) as u32 * 4
        } else {
            8
        };
        p.l4 - p.l3 + head + segment
    };
    // What a packet cannot be is what no way carries.
    if bytes > u16::MAX as u32 { u16::MAX } else { bytes as u16 }
}

/// `None` when it has come to its end, with nothing changed.
#[inline(always)]
pub fn lower_ttl(ctx: &TcContext, l3: u32, v4: bool) -> Option<()> {
    let l3 = l3 as usize;
    if !v4 {
        let hops: u8 = ctx.load(l3 + 7).ok()?;
        return if hops <= 1 { None } else { ctx.store(l3 + 7, &(hops - 1), 0).ok() };
    }
    let word: [u8; 2] = ctx.load(l3 + 8).ok()?;
    if word[0] <= 1 {
        return None;
    }
    let new = [word[0] - 1, word[1]];
    ctx.l3_csum_replace(l3 + 10, u16::from_ne_bytes(word) as u64, u16::from_ne_bytes(new) as u64, 2).ok()?;
    ctx.store(l3 + 8, &new, 0).ok()
}

/// How an address is reached.
pub enum Route {
    By(u32),
    /// The packet is larger than the way there allows.
    TooBig,
    None,
}

/// The interface by which `dst` is reached by packets of `length` bytes; 0: however long.
#[inline(always)]
pub fn route(ctx: &TcContext, dst: &Addr, v4: bool, length: u16, q: &mut FibLookup) -> Route {
    // SAFETY: all zeros is a valid value of this plain C struct.
    *q = unsafe { core::mem::zeroed() };
    // SAFETY: the context is valid while the program runs.
    q.ifindex = unsafe { (*ctx.skb.skb).ifindex };
    q.__bindgen_anon_1.tot_len = length;
    if v4 {
        q.family = AF_INET;
        q.__bindgen_anon_4.ipv4_dst = dst[3];
    } else {
        q.family = AF_INET6;
        q.__bindgen_anon_4.ipv6_dst = *dst;
    }
    // SAFETY: the struct is valid and its size is given.
    let r =
        unsafe { bpf_fib_lookup(ctx.skb.skb.cast(), &mut *q, core::mem::size_of::<FibLookup>() as i32, 0) }
            as i64;
    if r == FIB_SUCCESS || r == FIB_NO_NEIGH {
        return Route::By(q.ifindex);
    }
    if r != FIB_TOO_BIG {
        return Route::None;
    }
    // Without a length the kernel compares the packet with the interface all the same, once it has found it.
    if length == 0 { Route::By(q.ifindex) } else { Route::TooBig }
}
