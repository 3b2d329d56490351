//! Packet hooks on uplinks: node ports, external IPs and load balancer IPs for clients outside of the node.
//!
//! A backend on this node sees the client's address; its answers are named back on the uplink's egress. A backend on
//! another node gets a source of ours, so that its answers come back here, and such packets leave by the route of their
//! new destination at once: the stack would drop a packet that arrives with a source of its own.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, bpf_fib_lookup as FibLookup};
use aya_ebpf::helpers::{bpf_fib_lookup, bpf_get_prandom_u32, bpf_ktime_get_ns, bpf_redirect_neigh};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use orlop_ebpf_common::*;

use crate::maps::*;
use crate::select;

/// Passes the packet to the next program and then the stack, on tcx and on clsact.
const NEXT: i32 = -1;
const DROP: i32 = 2;

const ETH_P_IP: u32 = 0x0800_u16.to_be() as u32;
const AF_INET: u8 = 2;
const FIB_SUCCESS: i64 = 0;
/// The route is known, the neighbour not yet: bpf_redirect_neigh resolves it.
const FIB_NO_NEIGH: i64 = 7;

const SECOND: u64 = 1_000_000_000;
/// After this silence a translated source port may be taken over: nf_conntrack's figures.
const UDP_IDLE: u64 = 180 * SECOND;
const TCP_IDLE: u64 = 5 * 86_400 * SECOND;
const TCP_CLOSED: u64 = 10 * SECOND;
const SNAT_TRIES: u32 = 12;

/// Clients of [`AffinityKey`] that are addresses.
const KIND_ADDRESS: u32 = 0;

const TCP_FIN: u8 = 1;
const TCP_SYN: u8 = 2;
const TCP_RST: u8 = 4;
const TCP_ACK: u8 = 16;

struct Packet {
    l3: usize,
    l4: usize,
    src: u32,
    dst: u32,
    sport: u16,
    dport: u16,
    proto: u8,
    tcp: u8,
}

impl Packet {
    #[inline(always)]
    fn key(&self, dir: u8) -> CtKey {
        CtKey {
            src: addr4(self.src),
            dst: addr4(self.dst),
            sport: self.sport,
            dport: self.dport,
            proto: self.proto,
            dir,
            pad: 0,
        }
    }

    #[inline(always)]
    fn opens(&self) -> bool {
        self.proto == TCP && self.tcp & (TCP_SYN | TCP_ACK) == TCP_SYN
    }
}

#[inline(always)]
fn uplink(index: u32) -> Option<Uplink> {
    // SAFETY: copied out; elements are replaced as a whole.
    unsafe { UPLINKS.get(&index) }.copied()
}

#[inline(always)]
fn ifindex(ctx: &TcContext) -> u32 {
    // SAFETY: the context is valid while the program runs.
    unsafe { (*ctx.skb.skb).ifindex }
}

#[inline(always)]
fn parse(ctx: &TcContext, link: &Uplink) -> Option<Packet> {
    if ctx.skb.protocol() != ETH_P_IP {
        return None;
    }
    let l3 = if link.l3_offset == 0 { 0 } else { 14 };
    let head: [u8; 20] = ctx.load(l3).ok()?;
    let proto = head[9];
    if proto != TCP && proto != UDP {
        return None;
    }
    // More fragments or an offset: ports are in the first fragment only, so none of them is translated.
    if (u16::from_be_bytes([head[6], head[7]]) & 0x3fff) != 0 {
        count(counters::FRAGMENTS);
        return None;
    }
    let l4 = l3 + ((head[0] & 0x0f) as usize) * 4;
    let ports: [u8; 4] = ctx.load(l4).ok()?;
    let tcp = if proto == TCP { ctx.load::<u8>(l4 + 13).ok()? } else { 0 };
    Some(Packet {
        l3,
        l4,
        src: u32::from_ne_bytes([head[12], head[13], head[14], head[15]]),
        dst: u32::from_ne_bytes([head[16], head[17], head[18], head[19]]),
        sport: u16::from_be_bytes([ports[0], ports[1]]),
        dport: u16::from_be_bytes([ports[2], ports[3]]),
        proto,
        tcp,
    })
}

/// Replaces one address and port. `addr_at` and `port_at` are offsets within the IP and the transport header.
#[inline(always)]
fn replace(
    ctx: &TcContext,
    p: &Packet,
    old: (u32, u16),
    new: (u32, u16),
    addr_at: usize,
    port_at: usize,
) -> Option<()> {
    let (check_at, mangled) = if p.proto == TCP { (16, 0) } else { (6, BPF_F_MARK_MANGLED_0 as u64) };
    let check = p.l4 + check_at;
    if old.0 != new.0 {
        ctx.l4_csum_replace(check, old.0 as u64, new.0 as u64, BPF_F_PSEUDO_HDR as u64 | mangled | 4).ok()?;
        ctx.l3_csum_replace(p.l3 + 10, old.0 as u64, new.0 as u64, 4).ok()?;
        ctx.store(p.l3 + addr_at, &new.0, 0).ok()?;
    }
    if old.1 != new.1 {
        let (from, to) = (old.1.to_be(), new.1.to_be());
        ctx.l4_csum_replace(check, from as u64, to as u64, mangled | 2).ok()?;
        ctx.store(p.l4 + port_at, &to, 0).ok()?;
    }
    Some(())
}

/// Carries out a connection's translation.
#[inline(always)]
fn apply(ctx: &TcContext, p: &Packet, v: &CtValue) -> i32 {
    if v.flags & ct_flags::SRC != 0 && replace(ctx, p, (p.src, p.sport), (v.src[3], v.sport), 12, 0).is_none()
    {
        return dropped();
    }
    if v.flags & ct_flags::DST != 0 && replace(ctx, p, (p.dst, p.dport), (v.dst[3], v.dport), 16, 2).is_none()
    {
        return dropped();
    }
    if v.flags & ct_flags::REDIRECT == 0 {
        return NEXT;
    }
    let Some(out) = route(ctx, v.dst[3]) else { return NEXT };
    if lower_ttl(ctx, p).is_none() {
        return dropped();
    }
    // SAFETY: no parameters: the kernel looks the next hop up itself.
    unsafe { bpf_redirect_neigh(out, core::ptr::null_mut(), 0, 0) as i32 }
}

#[inline(always)]
fn dropped() -> i32 {
    count(counters::PACKET_DROPPED);
    DROP
}

#[inline(always)]
fn lower_ttl(ctx: &TcContext, p: &Packet) -> Option<()> {
    let word: [u8; 2] = ctx.load(p.l3 + 8).ok()?;
    if word[0] <= 1 {
        return None;
    }
    let new = [word[0] - 1, word[1]];
    ctx.l3_csum_replace(p.l3 + 10, u16::from_ne_bytes(word) as u64, u16::from_ne_bytes(new) as u64, 2)
        .ok()?;
    ctx.store(p.l3 + 8, &new, 0).ok()
}

/// The interface by which `dst` is reached.
#[inline(always)]
fn route(ctx: &TcContext, dst: u32) -> Option<u32> {
    // SAFETY: all zeros is a valid value of this plain C struct.
    let mut q: FibLookup = unsafe { core::mem::zeroed() };
    q.family = AF_INET;
    q.ifindex = ifindex(ctx);
    q.__bindgen_anon_4.ipv4_dst = dst;
    // SAFETY: the struct lives on the stack and its size is given.
    let r = unsafe { bpf_fib_lookup(ctx.skb.skb.cast(), &mut q, core::mem::size_of::<FibLookup>() as i32, 0) }
        as i64;
    if r == FIB_SUCCESS || r == FIB_NO_NEIGH { Some(q.ifindex) } else { None }
}

/// Notes a packet of a known connection.
#[inline(always)]
fn touch(key: &CtKey, p: &Packet, now: u64) {
    if let Some(e) = CONNECTIONS.get_ptr_mut(key) {
        // SAFETY: a valid element; racing writers store the same flag and nearly the same time.
        unsafe {
            (*e).last_seen_ns = now;
            if p.proto == TCP && p.tcp & (TCP_FIN | TCP_RST) != 0 {
                (*e).flags |= ct_flags::CLOSING;
            }
        }
    }
}

#[inline(always)]
fn idle(v: &CtValue, proto: u8, now: u64) -> bool {
    let limit = if proto == UDP {
        UDP_IDLE
    } else if v.flags & ct_flags::CLOSING != 0 {
        TCP_CLOSED
    } else {
        TCP_IDLE
    };
    now.wrapping_sub(v.last_seen_ns) > limit
}

#[classifier]
pub fn lb_ingress(ctx: TcContext) -> i32 {
    let Some(link) = uplink(ifindex(&ctx)) else { return NEXT };
    let Some(p) = parse(&ctx, &link) else { return NEXT };
    // SAFETY: no arguments.
    let now = unsafe { bpf_ktime_get_ns() };

    let Some(config) = CONFIG.get(0).copied() else { return NEXT };
    // An answer from a backend on another node comes to one of the translated ports.
    if p.dport >= config.snat_first && p.dport <= config.snat_last {
        let key = p.key(ct_dir::REPLY);
        // SAFETY: copied out; elements are replaced as a whole.
        if let Some(v) = unsafe { CONNECTIONS.get(&key) }.copied()
            && v.flags & ct_flags::REDIRECT != 0
        {
            touch(&key, &p, now);
            return apply(&ctx, &p, &v);
        }
    }

    let Some(front) = select::frontend(&addr4(p.dst), p.dport, p.proto, SCOPE_EXTERNAL, false) else {
        return NEXT;
    };
    let key = p.key(ct_dir::FORWARD);
    // SAFETY: copied out; elements are replaced as a whole.
    if let Some(v) = unsafe { CONNECTIONS.get(&key) }.copied() {
        let gone = || select::backend(v.backend).is_none();
        let renew = if p.proto == UDP {
            idle(&v, UDP, now) || gone()
        } else {
            p.opens() && (v.flags & ct_flags::CLOSING != 0 || gone())
        };
        if !renew {
            touch(&key, &p, now);
            return apply(&ctx, &p, &v);
        }
    }
    connect(&ctx, &p, &front, &config, now)
}

/// For a backend on another node the source that its packets get (zero: none can be given). Endpoints that name no node
/// count as what they are: one that is reached by no uplink is here.
#[inline(always)]
fn elsewhere(ctx: &TcContext, b: &Backend) -> Option<Addr> {
    if b.flags & backend_flags::LOCAL != 0 || LOCAL_ADDRS.get_ptr(&b.addr).is_some() {
        return None;
    }
    match route(ctx, b.addr[3]) {
        Some(out) => uplink(out).map(|u| u.addr4),
        None => Some([0; 4]),
    }
}

/// FNV-1a over what makes up a connection.
#[inline(always)]
fn hash(p: &Packet) -> u32 {
    let mut h = 0x811c_9dc5_u32;
    let ports = ((p.sport as u32) << 16) | p.dport as u32;
    for word in [p.src, p.dst, ports, p.proto as u32] {
        h = (h ^ word).wrapping_mul(0x0100_0193);
        h ^= h >> 15;
    }
    h
}

/// A packet without a known connection: chooses a backend and notes the connection in both directions.
#[inline(always)]
fn connect(ctx: &TcContext, p: &Packet, front: &FrontendValue, config: &Config, now: u64) -> i32 {
    let Some((id, b)) = select::choose(front, KIND_ADDRESS, &addr4(p.src), Some(hash(p))) else {
        if front.flags & frontend_flags::DROP_WHEN_EMPTY != 0 {
            return dropped();
        }
        // The node's own stack refuses: nobody listens there.
        count(counters::PACKET_REFUSED);
        return NEXT;
    };
    if !is_v4(&b.addr) {
        return NEXT;
    }
    // Too large for the stack: kernels count it with that of the compiler's own functions.
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else { return dropped() };
    // SAFETY: this CPU's element; nothing else uses it while this program runs.
    let Scratch { forward, reply, rkey } = unsafe { &mut *scratch };
    (forward.src, forward.sport) = ([0; 4], 0);
    (forward.dst, forward.dport) = (b.addr, b.port);
    (reply.src, reply.sport) = (addr4(p.dst), p.dport);
    (reply.dst, reply.dport) = (addr4(p.src), p.sport);
    for (v, flags) in [(&mut *forward, ct_flags::DST), (&mut *reply, ct_flags::SRC)] {
        (v.flags, v.backend, v.service) = (flags, id, front.service);
        (v.last_seen_ns, v.created_ns) = (now, now);
    }
    (rkey.src, rkey.sport) = (b.addr, b.port);
    (rkey.dst, rkey.dport) = (addr4(p.src), p.sport);
    (rkey.proto, rkey.dir, rkey.pad) = (p.proto, ct_dir::REPLY, 0);
    if let Some(own) = elsewhere(ctx, &b) {
        if own[3] == 0 {
            return dropped();
        }
        rkey.dst = own;
        reply.flags |= ct_flags::DST | ct_flags::REDIRECT;
        let Some(port) = source_port(rkey, reply, config, now) else {
            count(counters::SNAT_EXHAUSTED);
            return dropped();
        };
        forward.src = own;
        forward.sport = port;
        forward.flags |= ct_flags::SRC | ct_flags::REDIRECT;
    } else if CONNECTIONS.insert(&*rkey, &*reply, 0).is_err() {
        return dropped();
    }
    if CONNECTIONS.insert(p.key(ct_dir::FORWARD), &*forward, 0).is_err() {
        return dropped();
    }
    count(counters::PACKET_CONNECTIONS);
    apply(ctx, p, forward)
}

/// Reserves a source port towards the backend by inserting the reply's entry.
#[inline(always)]
fn source_port(rkey: &mut CtKey, reply: &CtValue, config: &Config, now: u64) -> Option<u16> {
    const NO_EXIST: u64 = 1;
    // Never 0: a division by zero would need a panic, which no BPF program can have.
    let range = (config.snat_last as u32).saturating_sub(config.snat_first as u32).max(1);
    // SAFETY: no arguments.
    let start = unsafe { bpf_get_prandom_u32() };
    for i in 0..SNAT_TRIES {
        let port = (config.snat_first as u32 + start.wrapping_add(i * 7) % range) as u16;
        rkey.dport = port;
        // SAFETY: copied out; elements are replaced as a whole.
        let flags = match unsafe { CONNECTIONS.get(&*rkey) } {
            Some(old) if idle(old, rkey.proto, now) => 0,
            Some(_) => continue,
            None => NO_EXIST,
        };
        if CONNECTIONS.insert(&*rkey, reply, flags).is_ok() {
            return Some(port);
        }
    }
    None
}

#[classifier]
pub fn lb_egress(ctx: TcContext) -> i32 {
    let Some(link) = uplink(ifindex(&ctx)) else { return NEXT };
    let Some(p) = parse(&ctx, &link) else { return NEXT };
    let key = p.key(ct_dir::REPLY);
    // SAFETY: copied out; elements are replaced as a whole.
    let Some(v) = (unsafe { CONNECTIONS.get(&key) }).copied() else { return NEXT };
    if v.flags & ct_flags::REDIRECT != 0 {
        return NEXT;
    }
    // SAFETY: no arguments.
    touch(&key, &p, unsafe { bpf_ktime_get_ns() });
    apply(&ctx, &p, &v)
}
