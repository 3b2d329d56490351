//! ICMP errors about translated packets: who gets one must find his own addresses in it.

use aya_ebpf::programs::TcContext;
use orlop_ebpf_common::*;

use crate::maps::*;
use crate::packet::same;
use crate::parse::quote;
use crate::rewrite::{self, difference};

/// The connection that an error is about, as packets the other way see it: on ingress an error from the client's side
/// about an answer, or one from the side of a backend on another node; on egress one of a backend here, or of the node
/// itself, about a packet that was translated for it.
#[inline(always)]
pub fn find(ctx: &TcContext, s: &mut Scratch, ingress: bool) -> Option<*const CtValue> {
    quote(ctx, s)?;
    let q = &s.quote;
    (s.key.src, s.key.dst) = (q.dst, q.src);
    (s.key.sport, s.key.dport) = (q.dport, q.sport);
    (s.key.proto, s.key.dir, s.key.pad) = (q.proto, ct_dir::FORWARD, 0);
    if ingress && let Some(v) = entry(&s.key) {
        return Some(v.cast_const());
    }
    s.key.dir = ct_dir::REPLY;
    if let Some(v) = entry(&s.key) {
        // SAFETY: a valid element.
        let redirects = unsafe { (*v).flags } & ct_flags::REDIRECT != 0;
        if redirects == ingress {
            return Some(v.cast_const());
        }
    }
    if ingress {
        return None;
    }
    s.key.dir = ct_dir::ERROR;
    entry(&s.key).map(<*mut CtValue>::cast_const)
}

/// What a packet the other way would get as source is what the quoted one was sent to, and the other way round.
#[inline(always)]
pub fn translate(ctx: &TcContext, e: &Packet, q: &Packet, v: &CtValue) -> Option<()> {
    count(counters::ICMP_ERRORS);
    if v.flags & ct_flags::SRC != 0 {
        replace(ctx, e, q, true, &v.src, v.sport)?;
        // Who refuses in person is known to the other side by the name that it asked for; a router stays who he is.
        if same(&e.src, &q.dst) {
            outer(ctx, e, false, &v.src)?;
        }
    }
    if v.flags & ct_flags::DST != 0 {
        replace(ctx, e, q, false, &v.dst, v.dport)?;
        outer(ctx, e, true, &v.dst)?;
    }
    Some(())
}

/// Replaces an address of the error itself.
#[inline(always)]
fn outer(ctx: &TcContext, e: &Packet, second: bool, new: &Addr) -> Option<()> {
    let diff = difference(if second { &e.dst } else { &e.src }, new);
    if !e.v4 {
        // Only ICMPv6 has a pseudo header.
        rewrite::pseudo(ctx, e.l4 + 2, diff, false, 0)?;
    }
    rewrite::store_address(ctx, e.l3, e.v4, second, new, diff)
}

/// Replaces an address and port of the quoted packet. The quoted transport checksum stays: receivers do not look at it,
/// and TCP's is beyond what a quote must hold.
#[inline(always)]
fn replace(ctx: &TcContext, e: &Packet, q: &Packet, second: bool, new: &Addr, port: u16) -> Option<()> {
    let check = (e.l4 + 2) as usize;
    let (old, old_port) = if second { (&q.dst, q.dport) } else { (&q.src, q.sport) };
    let diff = difference(old, new);
    if !e.v4 {
        // IPv4's header checksum changes by as much as the address, so ICMP's stays.
        ctx.l4_csum_replace(check, 0, diff, 0).ok()?;
    }
    rewrite::store_address(ctx, q.l3, e.v4, second, new, diff)?;
    let (from, to) = (old_port.to_be(), port.to_be());
    ctx.l4_csum_replace(check, from as u64, to as u64, 2).ok()?;
    ctx.store(q.l4 as usize + if second { 2 } else { 0 }, &to, 0).ok()
}
