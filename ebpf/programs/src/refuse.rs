//! Refusals that nobody else can say: of packets to a ClusterIP that are for no port of a Service's. TCP and UDP from outside of
//! the node are led to the node's own stack, which refuses them. What the stack would answer (a ping), what it does not know,
//! and what leaves the node untranslated is answered here, with the ICMP error that kube-proxy's rules send: port unreachable.
//!
//! Packets to addresses of the Service range that no Service has are dropped where they leave the node, as those rules do:
//! whoever translates them by other means has done so by then.

use aya_ebpf::helpers::{
    bpf_csum_diff, bpf_redirect, bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes,
};
use aya_ebpf::programs::TcContext;
use core::arch::asm;
use orlop_ebpf_common::*;

use crate::maps::*;
use crate::packet::ifindex;
use crate::rewrite::{NEXT, dropped, folded};

/// Where the answer comes out: for who came in, out of the interface again; for who was about to leave, in by it.
const OUT: u64 = 0;
const IN: u64 = 1;

const IPV4: usize = 20;
const IPV6: usize = 40;
/// The error's own header, and what it must quote behind the quoted IP header.
const ICMP: usize = 8;
/// The longest quote: an IPv6 header with 32 bytes of others behind it. IPv4's options are shorter.
const QUOTE: usize = ERROR - IPV6 - ICMP;

const HOPS: u8 = 64;
const RECOMPUTE_CHECKSUM: u64 = 1;
const FOR_THIS_HOST: u32 = 0;

/// Refuses a packet that came in, and that has no ports of TCP or UDP, if it is for a ClusterIP.
#[inline(always)]
pub fn at_cluster_ip(ctx: &TcContext, s: &mut Scratch) -> i32 {
    match cluster_ip(&s.packet.dst) {
        Some(rest) => refuse(ctx, s, rest, OUT),
        None => NEXT,
    }
}

/// Refuses a packet that is about to leave the node for a ClusterIP, whatever the port: nobody will translate it any more. Its
/// socket was connected before the Service was known, or is none that the socket programs see. What is for nobody's address is
/// dropped. `begins`: it is not of a connection that goes on.
#[inline(always)]
pub fn leaving(ctx: &TcContext, s: &mut Scratch, begins: bool) -> i32 {
    match cluster_ip(&s.packet.dst) {
        Some(rest) => refuse(ctx, s, rest, IN),
        None if begins && admits(SERVICE_RANGE, &s.packet.dst) => {
            count(counters::UNALLOCATED);
            dropped()
        }
        None => NEXT,
    }
}

/// What there is for a ClusterIP's other ports.
#[inline(always)]
fn cluster_ip(addr: &Addr) -> Option<&'static FrontendValue> {
    if !listed(addr, 0, 0) {
        return None;
    }
    // SAFETY: elements are replaced as a whole.
    unsafe { FRONTENDS.get(&FrontendKey::rest(*addr)) }
}

#[inline(always)]
fn refuse(ctx: &TcContext, s: &mut Scratch, rest: &FrontendValue, answer: u64) -> i32 {
    let p = &s.packet;
    // What somebody has given the node as an address is the stack's.
    if LOCAL_ADDRS.get_ptr(&p.dst).is_some() {
        return NEXT;
    }
    // SAFETY: the context is valid while the program runs.
    if answer == OUT && unsafe { (*ctx.skb.skb).pkt_type } != FOR_THIS_HOST {
        return NEXT;
    }
    // No error may be sent about it (RFC 1122, 3.2.2), and the datagram was counted by its first fragment.
    if p.headless {
        return dropped();
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

/// A length that the compiler knows nothing about, so that what it is compared with next is what the verifier compares.
#[inline(always)]
fn unknown(length: usize) -> usize {
    let mut length = length as u64;
    // SAFETY: changes nothing. An instruction there must be: two lines of the source at one address are refused.
    unsafe { asm!("{0} = {0}", inout(reg) length) };
    length as usize
}

/// Puts the error in the packet's place, from whom it was sent to.
#[inline(never)]
fn instead(ctx: &TcContext, s: &mut Scratch) -> Option<()> {
    let p = &s.packet;
    let (l3, v4) = (p.l3, p.v4);
    if !is_one_host(&p.src) {
        return None;
    }
    let head = if v4 { IPV4 } else { IPV6 } + ICMP;
    // The header with its options or with others behind it, and ports or what stands in their place.
    let quoted = unknown((p.l4 - l3) as usize + ICMP);
    if quoted > QUOTE {
        return None;
    }
    let quoted = unknown(quoted);
    if quoted < IPV4 + ICMP {
        return None;
    }
    let e = &mut s.error;
    // The checksum is that of what is longer by zeros.
    *e = [0; ERROR];
    // SAFETY: the room is as long as the longest head and quote.
    let r = unsafe {
        let room = e.as_mut_ptr().add(head);
        bpf_skb_load_bytes(ctx.skb.skb.cast(), l3, room.cast(), quoted as u32)
    };
    if r != 0 {
        return None;
    }
    let length = head + quoted;
    if v4 {
        put(e, 0, [0x45, 0, 0, length as u8]);
        // May not be cut.
        put(e, 4, [0, 0, 0x40, 0]);
        put(e, 8, [HOPS, 1, 0, 0]);
        put(e, 12, p.dst[3].to_ne_bytes());
        put(e, 16, p.src[3].to_ne_bytes());
        let sum = checksum(&mut e[..IPV4], 0);
        (e[10], e[11]) = (sum[0], sum[1]);
        put(e, IPV4, [3, 3, 0, 0]);
        let sum = checksum(&mut e[IPV4..IPV4 + ICMP + QUOTE], 0);
        (e[IPV4 + 2], e[IPV4 + 3]) = (sum[0], sum[1]);
    } else {
        const ICMPV6: u8 = 58;
        let behind = (length - IPV6) as u8;
        put(e, 0, [0x60, 0, 0, 0]);
        put(e, 4, [0, behind, ICMPV6, HOPS]);
        for i in 0..4 {
            put(e, 8 + i * 4, p.dst[i].to_ne_bytes());
            put(e, 24 + i * 4, p.src[i].to_ne_bytes());
        }
        put(e, IPV6, [1, 4, 0, 0]);
        // The pseudo header: both addresses, length and protocol.
        let sum = checksum(&mut e[8..], (behind as u32 + ICMPV6 as u32).to_be());
        (e[IPV6 + 2], e[IPV6 + 3]) = (sum[0], sum[1]);
    }
    let length = unknown(length);
    if length > ERROR {
        return None;
    }
    let length = unknown(length);
    if length == 0 {
        return None;
    }
    // SAFETY: the context is valid while the program runs, and the error is at least as long as is said.
    let r = unsafe {
        if bpf_skb_change_tail(ctx.skb.skb, l3 + length as u32, 0) != 0 {
            return None;
        }
        bpf_skb_store_bytes(
            ctx.skb.skb.cast(),
            l3,
            s.error.as_ptr().cast(),
            length as u32,
            RECOMPUTE_CHECKSUM,
        )
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

#[inline(always)]
fn put(e: &mut [u8; ERROR], at: usize, bytes: [u8; 4]) {
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
