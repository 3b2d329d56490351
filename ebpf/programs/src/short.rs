//! Host routing: established connections between clients outside and pods on this node go past the stack's forwarding, from
//! the uplink into the pod and from the pod to the uplink.
//!
//! Everything that decides about a connection sees its beginning. A first packet each way takes the stack's way, through
//! routes, the checks of sources and packet filters. Only when the first answer came from the pod under the same addresses as
//! it had when it left the stack, so that nobody but us changes them, the rest goes the short way; and only by the interfaces
//! that the first ones came in by, so that nobody else can say it is his.
//!
//! What the stack alone can do stays with it: packets that are too large or too old for the way on, errors, neighbours that
//! are not known yet.

use aya_ebpf::bindings::bpf_fib_lookup as FibLookup;
use aya_ebpf::helpers::{bpf_redirect_neigh, bpf_redirect_peer};
use aya_ebpf::programs::TcContext;
use orlop_ebpf_common::*;

use crate::maps::*;
use crate::packet::{ifindex, same, scratch, uplink};
use crate::rewrite::{self, NEXT, Route, dropped};

/// Uplinks that can do it, and pods' interfaces, are Ethernet.
const ETHERNET: u32 = 14;
const FOR_THIS_HOST: u32 = 0;

#[inline(always)]
fn allowed() -> bool {
    CONFIG.get(0).is_some_and(|c| c.flags & config_flags::HOST_ROUTING != 0)
}

/// Notes by which interface a new connection comes in, and that there will be answers.
#[inline(always)]
pub fn prepare(ctx: &TcContext, config: &Config, link: &Uplink, forward: &mut CtValue) {
    let index = ifindex(ctx);
    if config.flags & config_flags::HOST_ROUTING == 0
        || link.flags & uplink_flags::POD != 0
        || forward.flags & ct_flags::REDIRECT != 0
        || index >= ct_flags::INTERFACES
    {
        return;
    }
    forward.flags |= index << ct_flags::INTERFACE;
    note_server(&forward.dst, forward.dport);
}

/// Whether a packet from outside may go the short way into a pod.
#[inline(always)]
pub fn leads_in(ctx: &TcContext, link: &Uplink, v: &CtValue) -> bool {
    // SAFETY: the context is valid while the program runs.
    let (kind, vlan) = unsafe { ((*ctx.skb.skb).pkt_type, (*ctx.skb.skb).vlan_present) };
    v.flags & (ct_flags::SHORT | ct_flags::SRC | ct_flags::REDIRECT) == ct_flags::SHORT
        && ct_flags::interface(v.flags) == ifindex(ctx)
        && link.flags & uplink_flags::POD == 0
        && link.l3_offset == ETHERNET
        && kind == FOR_THIS_HOST
        && vlan == 0
        && allowed()
}

/// Whether a route leads into a pod whose hardware address is known.
#[inline(always)]
pub fn ends_in_pod(way: u32, fib: &FibLookup) -> bool {
    fib.dmac != [0; 6] && uplink(way).is_some_and(|u| u.flags & uplink_flags::PEER != 0)
}

/// Puts a packet where it would come out of the pod's interface. The route to it has just been looked up.
#[inline(always)]
pub fn enter(ctx: &TcContext, s: &Scratch, pod: u32) -> i32 {
    if rewrite::lower_ttl(ctx, s.packet.l3, s.packet.v4).is_none() {
        return NEXT;
    }
    if ctx.store(0, &[s.fib.dmac, s.fib.smac], 0).is_err() {
        return dropped();
    }
    count(counters::SHORT);
    // SAFETY: no pointers.
    unsafe { bpf_redirect_peer(pod, 0) as i32 }
}

/// An answer of a pod; it is named back where it leaves.
#[inline(always)]
pub fn leave(ctx: &TcContext, key: CtKey, l4: u32) -> i32 {
    let index = ifindex(ctx);
    let (Some(link), Some(s)) = (uplink(index), scratch()) else { return NEXT };
    if link.flags & uplink_flags::PEER == 0 {
        return NEXT;
    }
    s.key = key;
    let Some(v) = entry(&s.key) else { return NEXT };
    // SAFETY: a valid element.
    let flags = unsafe { (*v).flags };
    if flags & ct_flags::REDIRECT != 0 {
        return NEXT;
    }
    if flags & ct_flags::SHORT == 0 {
        if ct_flags::interface(flags) == 0 && index < ct_flags::INTERFACES {
            set_flags(v, ct_flags::CAME | (index << ct_flags::INTERFACE));
        }
        return NEXT;
    }
    if ct_flags::interface(flags) != index {
        return NEXT;
    }
    let v4 = is_v4(&s.key.dst);
    (s.packet.l3, s.packet.l4, s.packet.proto) = (ETHERNET, l4, s.key.proto);
    let length = rewrite::length(ctx, &s.packet);
    let Route::By(out) = rewrite::route(ctx, &s.key.dst, v4, length, &mut s.fib) else { return NEXT };
    let outside = uplink(out).is_some_and(|u| u.flags & uplink_flags::POD == 0);
    if !outside || rewrite::lower_ttl(ctx, ETHERNET, v4).is_none() {
        return NEXT;
    }
    count(counters::SHORT);
    // SAFETY: no parameters: the kernel looks the next hop up itself.
    unsafe { bpf_redirect_neigh(out, core::ptr::null_mut(), 0, 0) as i32 }
}

/// The stack has let an answer pass: the connection goes the short way from now on, if nobody has changed the answer since it
/// came.
#[inline(always)]
pub fn confirm(ctx: &TcContext, link: &Uplink, s: &mut Scratch, v: *mut CtValue) {
    // SAFETY: a valid element, here and below.
    let reply = unsafe { &*v };
    // SAFETY: the context is valid while the program runs.
    let came_by = unsafe { (*ctx.skb.skb).ingress_ifindex };
    if reply.flags & (ct_flags::CAME | ct_flags::SHORT) != ct_flags::CAME
        || ct_flags::interface(reply.flags) != came_by
        || link.flags & uplink_flags::POD != 0
    {
        return;
    }
    set_flags(v, ct_flags::SHORT);
    let p = &s.packet;
    (s.rkey.src, s.rkey.dst) = (p.dst, reply.src);
    (s.rkey.sport, s.rkey.dport) = (p.dport, reply.sport);
    (s.rkey.proto, s.rkey.dir, s.rkey.pad) = (p.proto, ct_dir::FORWARD, 0);
    if let Some(forward) = entry(&s.rkey) {
        // SAFETY: as above.
        let to = unsafe { &*forward };
        if same(&to.dst, &p.src) && to.dport == p.sport {
            set_flags(forward, ct_flags::SHORT);
        }
    }
}
