//! The common case on pods' interfaces: packets that sockets have translated already, or that are for no Service. They are
//! told from the packet's own bytes and from notes ([`orlop_ebpf_common::noted`]), without a call into the kernel, so that
//! they cost next to nothing. Whatever is not plain is looked at in full.
//!
//! With host routing answers to clients outside of the node are plain too: they are sent on from here.

use aya_ebpf::programs::TcContext;
use orlop_ebpf_common::*;

use crate::maps::*;
use crate::packet::{TCP_ACK, TCP_SYN};
use crate::parse::{ETH_P_IP, ETH_P_IPV6};
use crate::rewrite::NEXT;
use crate::short;

/// veth pairs are Ethernet.
const ETHERNET: usize = 14;

/// Something in the packet, if all of it is at hand.
#[inline(always)]
fn at<T: Copy>(ctx: &TcContext, offset: usize) -> Option<T> {
    let start = ctx.data() + offset;
    if start + core::mem::size_of::<T>() > ctx.data_end() {
        return None;
    }
    // SAFETY: within the packet, as was just seen. IP headers begin at a multiple of four bytes, or the machine does not
    // mind: the verifier refuses the program where neither is so.
    Some(unsafe { *(start as *const T) })
}

/// Of IPv4: version and length, type of service, total length, number, place among fragments, time to live, protocol,
/// checksum, addresses.
#[derive(Clone, Copy)]
#[repr(C)]
struct Head4 {
    first: u8,
    service: u8,
    length: u16,
    number: u16,
    place: u16,
    ttl: u8,
    proto: u8,
    check: u16,
    src: u32,
    dst: u32,
}

/// Nothing when it has options or is a fragment.
#[inline(always)]
fn head4(ctx: &TcContext) -> Option<Head4> {
    let h: Head4 = at(ctx, ETHERNET)?;
    if h.first == 0x45 && h.place & 0x3fff_u16.to_be() == 0 { Some(h) } else { None }
}

/// What becomes of a packet from a pod that is surely for no Service, no answer by way of another node, and no reason to
/// forget a connection. Each family has code of its own: much of IPv4's is known when it is compiled.
#[inline(always)]
pub fn from_pod(ctx: &TcContext) -> Option<i32> {
    match ctx.skb.protocol() {
        ETH_P_IP => {
            let h = head4(ctx)?;
            verdict(ctx, &addr4(h.src), &addr4(h.dst), h.proto, ETHERNET + 20)
        }
        ETH_P_IPV6 => {
            let (src, dst): (Addr, Addr) = (at(ctx, ETHERNET + 8)?, at(ctx, ETHERNET + 24)?);
            verdict(ctx, &src, &dst, at(ctx, ETHERNET + 6)?, ETHERNET + 40)
        }
        _ => None,
    }
}

#[inline(always)]
fn verdict(ctx: &TcContext, src: &Addr, dst: &Addr, proto: u8, l4: usize) -> Option<i32> {
    let opens = match proto {
        TCP => {
            let flags: u8 = at(ctx, l4 + 13)?;
            flags & (TCP_SYN | TCP_ACK) == TCP_SYN
        }
        UDP => true,
        _ => return None,
    };
    let (sport, dport): (u16, u16) = (u16::from_be(at(ctx, l4)?), u16::from_be(at(ctx, l4 + 2)?));
    let config = CONFIG.get(0)?;
    let answers = dport >= config.snat_first && dport <= config.snat_last;
    let forgets = opens && is_client(src);
    if answers || forgets || leads_somewhere(dst, dport, proto) {
        return None;
    }
    if config.flags & config_flags::HOST_ROUTING == 0 || !is_server(src, sport) {
        return Some(NEXT);
    }
    let key = CtKey { src: *src, dst: *dst, sport, dport, proto, dir: ct_dir::REPLY, pad: 0 };
    Some(short::leave(ctx, key, l4 as u32))
}

/// Whether a packet to a pod is surely no answer that has to be renamed, nor an error about a translated packet.
#[inline(always)]
pub fn passes_out(ctx: &TcContext) -> bool {
    match ctx.skb.protocol() {
        ETH_P_IP => head4(ctx).is_some_and(|h| !is_client(&addr4(h.dst))),
        ETH_P_IPV6 => at(ctx, ETHERNET + 24).is_some_and(|dst| !is_client(&dst)),
        _ => false,
    }
}
