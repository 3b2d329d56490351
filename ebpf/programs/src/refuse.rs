//! Refusals that nobody else can say: of packets to a ClusterIP that are for no port of a Service's. TCP and UDP from outside of
//! the node are led to the node's own stack, which refuses them. What the stack would answer (a ping), what it does not know,
//! and what the node itself sends is answered here, with the ICMP error that kube-proxy's rules send: port unreachable.

use aya_ebpf::helpers::{
    bpf_csum_diff, bpf_redirect, bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes,
};
use aya_ebpf::programs::TcContext;
use orlop_ebpf_common::*;

use crate::maps::*;
use crate::packet::ifindex;
use crate::rewrite::{NEXT, dropped, folded};

/// Where the answer comes out: for who came in, out of the interface again; for who was about to leave, in by it.
pub const OUT: u64 = 0;
pub const IN: u64 = 1;

const IPV4: usize = 20;
const IPV6: usize = 40;
/// The error's own header, and what it must quote behind the quoted IP header.
const ICMP: usize = 8;
const V4: usize = IPV4 + ICMP + IPV4 + ICMP;
const V6: usize = IPV6 + ICMP + IPV6 + ICMP;

const HOPS: u8 = 64;
const RECOMPUTE_CHECKSUM: u64 = 1;
const FOR_THIS_HOST: u32 = 0;

/// Refuses the packet in the scratch if it is for a ClusterIP. `transport`: it has ports, and goes on where one is a Service's.
#[inline(always)]
pub fn at_cluster_ip(ctx: &TcContext, s: &mut Scratch, transport: bool, answer: u64) -> i32 {
    let p = &s.packet;
    // What somebody has given the node as an address is the stack's.
    if !listed(&p.dst, 0, 0) || LOCAL_ADDRS.get_ptr(&p.dst).is_some() {
        return NEXT;
    }
    // SAFETY: elements are replaced as a whole.
    let Some(rest) = (unsafe { FRONTENDS.get(&FrontendKey::rest(p.dst)) }) else { return NEXT };
    if transport {
        let own = FrontendKey { addr: p.dst, port: p.dport, proto: p.proto, scope: SCOPE_INTERNAL };
        if FRONTENDS.get_ptr(&own).is_some() {
            return NEXT;
        }
    }
    // SAFETY: the context is valid while the program runs.
    if answer == OUT && unsafe { (*ctx.skb.skb).pkt_type } != FOR_THIS_HOST {
        return NEXT;
    }
    count(counters::PACKET_REFUSED);
    count_connection(rest.service, false);
    if instead(ctx, s).is_none() {
        return dropped();
    }
    // SAFETY: no pointers.
    unsafe { bpf_redirect(ifindex(ctx), answer) as i32 }
}

/// Whether errors may go there (RFC 1122, 3.2.2): one host's address.
#[inline(always)]
fn is_one_host(addr: &Addr) -> bool {
    let first = if is_v4(addr) { u32::from_be(addr[3]) >> 24 } else { u32::from_be(addr[0]) >> 24 };
    let many = if is_v4(addr) { first >= 224 } else { first == 0xff };
    !many && !is_unspecified(addr) && !is_loopback(addr)
}

/// Puts the error in the packet's place, from whom it was sent to.
#[inline(never)]
fn instead(ctx: &TcContext, s: &mut Scratch) -> Option<()> {
    let p = &s.packet;
    let (l3, v4) = (p.l3, p.v4);
    // The quoted header is as long as it is without options.
    if p.headless || !is_one_host(&p.src) || (v4 && p.l4 - l3 != IPV4 as u32) {
        return None;
    }
    let e = &mut s.error;
    if v4 {
        quote(ctx, l3, &mut e[IPV4 + ICMP..V4])?;
        put(e, 0, [0x45, 0, 0, V4 as u8]);
        // May not be cut.
        put(e, 4, [0, 0, 0x40, 0]);
        put(e, 8, [HOPS, 1, 0, 0]);
        put(e, 12, p.dst[3].to_ne_bytes());
        put(e, 16, p.src[3].to_ne_bytes());
        let sum = checksum(&mut e[..IPV4], 0);
        (e[10], e[11]) = (sum[0], sum[1]);
        put(e, IPV4, [3, 3, 0, 0]);
        put(e, IPV4 + 4, [0; 4]);
        let sum = checksum(&mut e[IPV4..V4], 0);
        (e[IPV4 + 2], e[IPV4 + 3]) = (sum[0], sum[1]);
    } else {
        quote(ctx, l3, &mut e[IPV6 + ICMP..V6])?;
        const LENGTH: u8 = (V6 - IPV6) as u8;
        const ICMPV6: u8 = 58;
        put(e, 0, [0x60, 0, 0, 0]);
        put(e, 4, [0, LENGTH, ICMPV6, HOPS]);
        for i in 0..4 {
            put(e, 8 + i * 4, p.dst[i].to_ne_bytes());
            put(e, 24 + i * 4, p.src[i].to_ne_bytes());
        }
        put(e, IPV6, [1, 4, 0, 0]);
        put(e, IPV6 + 4, [0; 4]);
        // The pseudo header: both addresses, length and protocol.
        let sum = checksum(&mut e[8..V6], (LENGTH as u32 + ICMPV6 as u32).to_be());
        (e[IPV6 + 2], e[IPV6 + 3]) = (sum[0], sum[1]);
    }
    let length = if v4 { V4 } else { V6 } as u32;
    // SAFETY: the context is valid while the program runs, and the error is as long as is said.
    let r = unsafe {
        if bpf_skb_change_tail(ctx.skb.skb, l3 + length, 0) != 0 {
            return None;
        }
        if v4 {
            bpf_skb_store_bytes(
                ctx.skb.skb.cast(),
                l3,
                s.error.as_ptr().cast(),
                V4 as u32,
                RECOMPUTE_CHECKSUM,
            )
        } else {
            bpf_skb_store_bytes(
                ctx.skb.skb.cast(),
                l3,
                s.error.as_ptr().cast(),
                V6 as u32,
                RECOMPUTE_CHECKSUM,
            )
        }
    };
    if r != 0 {
        return None;
    }
    if l3 != 0 {
        let [to, from]: [[u8; 6]; 2] = ctx.load(0).ok()?;
        ctx.store(0, &[from, to], RECOMPUTE_CHECKSUM).ok()?;
    }
    Some(())
}

/// Reads the beginning of the IP packet at `at`.
#[inline(always)]
fn quote(ctx: &TcContext, at: u32, room: &mut [u8]) -> Option<()> {
    // SAFETY: the room is as long as is said.
    let r =
        unsafe { bpf_skb_load_bytes(ctx.skb.skb.cast(), at, room.as_mut_ptr().cast(), room.len() as u32) };
    if r == 0 { Some(()) } else { None }
}

#[inline(always)]
fn put(e: &mut [u8; V6], at: usize, bytes: [u8; 4]) {
    (e[at], e[at + 1], e[at + 2], e[at + 3]) = (bytes[0], bytes[1], bytes[2], bytes[3]);
}

/// Of a multiple of four bytes, in which the checksum itself is zero.
#[inline(always)]
fn checksum(bytes: &mut [u8], seed: u32) -> [u8; 2] {
    // SAFETY: the bytes are as many as is said and only read.
    let sum = unsafe {
        bpf_csum_diff(core::ptr::null_mut(), 0, bytes.as_mut_ptr().cast(), bytes.len() as u32, seed)
    };
    folded(sum as u64).to_ne_bytes()
}
