//! What a packet is about: addresses and ports, or the packet that an ICMP error quotes.

use aya_ebpf::helpers::bpf_skb_load_bytes;
use aya_ebpf::programs::TcContext;
use orlop_ebpf_common::*;

use crate::maps::*;

pub const ETH_P_IP: u32 = 0x0800_u16.to_be() as u32;
pub const ETH_P_IPV6: u32 = 0x86dd_u16.to_be() as u32;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const ECHO: u8 = 8;
const ECHOV6: u8 = 128;
const IPV6_FRAGMENT: u8 = 44;
const IPV6_HOP_BY_HOP: u8 = 0;
const IPV6_DESTINATION: u8 = 60;
const VLAN_ID: u32 = 0x0fff;
/// More of IPv6's headers in front of the transport's than this are nobody's.
const MAX_EXTENSIONS: usize = 2;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Transport,
    /// An ICMP error about a TCP or UDP packet.
    Error,
    /// Neither of these, or a ping.
    Foreign,
    Other,
}

/// Reads `N` bytes into the scratch's room for headers.
#[inline(always)]
pub fn load<const N: usize>(ctx: &TcContext, at: u32, head: &mut [u8; 40]) -> Option<()> {
    const { assert!(N <= 40) }
    // SAFETY: the room is at least that large.
    let r = unsafe { bpf_skb_load_bytes(ctx.skb.skb.cast(), at, head.as_mut_ptr().cast(), N as u32) };
    if r == 0 { Some(()) } else { None }
}

#[inline(always)]
pub fn word(head: &[u8; 40], at: usize) -> u32 {
    u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]])
}

#[inline(always)]
pub fn half(head: &[u8; 40], at: usize) -> u16 {
    u16::from_be_bytes([head[at], head[at + 1]])
}

/// Addresses, protocol and place of the next header of an IP header at `l3`.
#[inline(always)]
fn ip_header(ctx: &TcContext, l3: u32, v4: bool, head: &mut [u8; 40], p: &mut Packet) -> Option<()> {
    p.l3 = l3;
    p.v4 = v4;
    p.headless = false;
    if v4 {
        load::<20>(ctx, l3, head)?;
        p.src = addr4(word(head, 12));
        p.dst = addr4(word(head, 16));
        p.proto = head[9];
        p.l4 = l3 + ((head[0] & 0x0f) as u32) * 4;
    } else {
        load::<40>(ctx, l3, head)?;
        p.src = [word(head, 8), word(head, 12), word(head, 16), word(head, 20)];
        p.dst = [word(head, 24), word(head, 28), word(head, 32), word(head, 36)];
        p.proto = head[6];
        p.l4 = l3 + 40;
    }
    Some(())
}

/// Reads a packet into the scratch.
#[inline(always)]
pub fn parse(ctx: &TcContext, link: &Uplink, s: &mut Scratch) -> Kind {
    // SAFETY: the context is valid while the program runs.
    let (tagged, tag) = unsafe { ((*ctx.skb.skb).vlan_present, (*ctx.skb.skb).vlan_tci) };
    // The VLAN's own interface sees it without the tag. Number 0 is no VLAN's.
    if tagged != 0 && tag & VLAN_ID != 0 {
        return Kind::Other;
    }
    let l3 = if link.l3_offset == 0 { 0 } else { 14 };
    let v4 = match ctx.skb.protocol() {
        ETH_P_IP => true,
        ETH_P_IPV6 => false,
        _ => return Kind::Other,
    };
    match inner(ctx, l3, v4, s) {
        Some(k) => k,
        None => Kind::Other,
    }
}

#[inline(always)]
fn inner(ctx: &TcContext, l3: u32, v4: bool, s: &mut Scratch) -> Option<Kind> {
    let p = &mut s.packet;
    ip_header(ctx, l3, v4, &mut s.head, p)?;
    pass_extensions(ctx, &mut s.head, p)?;
    // The fragment's offset, whether more follow, and the datagram's number.
    p.divisible = false;
    let (later, more, id) = if v4 {
        let place = half(&s.head, 6);
        p.divisible = place & 0x4000 == 0;
        (place & 0x1fff != 0, place & 0x2000 != 0, half(&s.head, 4) as u32)
    } else if p.proto == IPV6_FRAGMENT {
        load::<8>(ctx, p.l4, &mut s.head)?;
        p.proto = s.head[0];
        p.l4 += 8;
        let place = half(&s.head, 2);
        (place & 0xfff8 != 0, place & 1 != 0, word(&s.head, 4))
    } else {
        (false, false, 0)
    };
    let proto = p.proto;
    if proto != TCP && proto != UDP {
        p.headless = later;
        if proto != (if v4 { ICMP } else { ICMPV6 }) || later {
            return Some(Kind::Foreign);
        }
        load::<1>(ctx, p.l4, &mut s.head)?;
        let kind = s.head[0];
        // Unreachable, (too big,) time exceeded, parameter problem.
        let error = if v4 { kind == 3 || kind == 11 || kind == 12 } else { kind != 0 && kind <= 4 };
        let asks = kind == if v4 { ECHO } else { ECHOV6 };
        return match (error, asks) {
            (true, _) if !more => Some(Kind::Error),
            (_, true) => Some(Kind::Foreign),
            _ => None,
        };
    }
    if later || more {
        (s.fragment.src, s.fragment.dst) = (p.src, p.dst);
        (s.fragment.id, s.fragment.proto) = (id, proto);
        (s.fragment.pad, s.fragment.pad2) = (0, 0);
    }
    if later {
        // SAFETY: elements are replaced as a whole.
        let Some(ports) = (unsafe { FRAGMENTS.get(&s.fragment) }) else {
            // The first one was lost, or comes later.
            count(counters::FRAGMENTS);
            return None;
        };
        (p.sport, p.dport) = (ports.sport, ports.dport);
        p.tcp = 0;
        p.headless = true;
        return Some(Kind::Transport);
    }
    if proto == TCP {
        load::<14>(ctx, p.l4, &mut s.head)?;
        p.tcp = s.head[13];
        (p.sport, p.dport) = (half(&s.head, 0), half(&s.head, 2));
    } else {
        p.tcp = 0;
        ports(ctx, &mut s.head, p)?;
    }
    if more {
        // A full table evicts; the rest of the datagram is counted then.
        let _ = FRAGMENTS.insert(&s.fragment, &FragmentPorts { sport: p.sport, dport: p.dport }, 0);
    }
    Some(Kind::Transport)
}

/// Goes on to what comes after IPv6's headers of options.
#[inline(always)]
fn pass_extensions(ctx: &TcContext, head: &mut [u8; 40], p: &mut Packet) -> Option<()> {
    for _ in 0..MAX_EXTENSIONS {
        if p.v4 || (p.proto != IPV6_HOP_BY_HOP && p.proto != IPV6_DESTINATION) {
            break;
        }
        load::<2>(ctx, p.l4, head)?;
        p.proto = head[0];
        p.l4 += (head[1] as u32 + 1) * 8;
    }
    Some(())
}

#[inline(always)]
fn ports(ctx: &TcContext, head: &mut [u8; 40], p: &mut Packet) -> Option<()> {
    load::<4>(ctx, p.l4, head)?;
    (p.sport, p.dport) = (half(head, 0), half(head, 2));
    Some(())
}

/// Reads what the ICMP error in the scratch quotes.
#[inline(always)]
pub fn quote(ctx: &TcContext, s: &mut Scratch) -> Option<()> {
    let (at, v4) = (s.packet.l4 + 8, s.packet.v4);
    ip_header(ctx, at, v4, &mut s.head, &mut s.quote)?;
    pass_extensions(ctx, &mut s.head, &mut s.quote)?;
    if s.quote.proto != TCP && s.quote.proto != UDP {
        return None;
    }
    ports(ctx, &mut s.head, &mut s.quote)
}
