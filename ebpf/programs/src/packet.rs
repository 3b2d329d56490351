//! Packet hooks. On uplinks: node ports, external IPs and load balancer IPs for clients outside of the node. On the
//! node's end of pods' veth pairs: every Service, for what the socket hooks do not see (sockets of the kernel, virtual
//! machines, processes outside of the cgroup) and for source ranges.
//!
//! A backend on this node sees the client's address; its answers are named back where they leave the node. A backend on
//! another node gets a source of ours, so that its answers come back here, and such packets leave by the route of their
//! new destination at once: the stack would drop a packet that arrives with a source of its own. The same goes for a pod
//! that reaches itself.
//!
//! A Service without endpoints is refused by the node's own stack: the packet is sent to port 0 of the node, where nobody
//! can listen, and the stack's reset or ICMP error is named back like any answer.

use aya_ebpf::bindings::{
    bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2,
};
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_sk_release, bpf_skc_lookup_tcp};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use orlop_ebpf_common::lifetime::{due, ended, over, quiet, spare};
use orlop_ebpf_common::*;

use crate::direct;
use crate::icmp;
use crate::maps::*;
use crate::parse::{Kind, parse};
use crate::plain;
use crate::refuse;
use crate::rewrite::{self, DROP, NEXT, Route, dropped};
use crate::select;
use crate::short;

/// Source ports that are looked at, and those among which one in use is taken. Each costs the verifier time when the
/// programs are loaded.
const SNAT_TRIES: u32 = 16;
const SPARE_TRIES: u32 = 8;
/// Flag of an insertion (BPF_NOEXIST).
const NO_EXIST: u64 = 1;

/// Addresses and ports of a connection, of each family; this network namespace; a state of sockets.
const TUPLE4: u32 = 12;
const TUPLE6: u32 = 36;
const HERE: u64 = u64::MAX;
const TCP_LISTEN: u32 = 10;

/// Clients of [`AffinityKey`] that are addresses.
const KIND_ADDRESS: u32 = 0;

pub const TCP_FIN: u8 = 1;
pub const TCP_SYN: u8 = 2;
pub const TCP_RST: u8 = 4;
pub const TCP_ACK: u8 = 16;

#[inline(always)]
fn opens(p: &Packet) -> bool {
    p.proto == TCP && p.tcp & (TCP_SYN | TCP_ACK) == TCP_SYN
}

#[inline(always)]
pub fn ifindex(ctx: &TcContext) -> u32 {
    // SAFETY: the context is valid while the program runs.
    unsafe { (*ctx.skb.skb).ifindex }
}

/// The interface's entry; a pointer, as the stack is small.
#[inline(always)]
pub fn uplink(index: u32) -> Option<&'static Uplink> {
    // SAFETY: elements are replaced as a whole and stay until a grace period after this program ended.
    unsafe { UPLINKS.get(&index) }
}

#[inline(always)]
pub fn scratch() -> Option<&'static mut Scratch> {
    // SAFETY: this CPU's element; nothing else uses it while this program runs.
    SCRATCH.get_ptr_mut(0).map(|s| unsafe { &mut *s })
}

#[inline(always)]
fn set_key(k: &mut CtKey, p: &Packet, dir: u8) {
    (k.src, k.dst) = (p.src, p.dst);
    (k.sport, k.dport) = (p.sport, p.dport);
    (k.proto, k.dir, k.pad) = (p.proto, dir, 0);
}

#[inline(always)]
fn ends(p: &Packet) -> bool {
    p.tcp & (TCP_FIN | TCP_RST) != 0
}

/// Notes an answer of a known connection.
#[inline(always)]
fn touch(e: *mut CtValue, p: &Packet, now: u64) {
    // SAFETY: a valid element; racing writers store nearly the same time.
    unsafe { (*e).last_seen_ns = now };
    if ends(p) {
        set_flags(e, ct_flags::CLOSING | reset(p));
    }
    // A backend that has reset a connection and now takes one from the same port has begun another one.
    let anew = ct_flags::CLOSING | ct_flags::FAR_CLOSING | ct_flags::RESET;
    clear_flags(e, ct_flags::NEW | if p.tcp & TCP_SYN != 0 { anew } else { 0 });
}

#[inline(always)]
fn reset(p: &Packet) -> u32 {
    if p.tcp & TCP_RST != 0 { ct_flags::RESET } else { 0 }
}

/// Notes a client's packet of a known connection. Says whether the connection still has its source port.
#[inline(always)]
fn follow(e: *mut CtValue, s: &mut Scratch, now: u64) -> bool {
    // SAFETY: as above.
    let (flags, last_seen) = unsafe { ((*e).flags, (*e).last_seen_ns) };
    let (opening, ending) = (opens(&s.packet), ends(&s.packet));
    let tells = ending || due(last_seen, now) || (!opening && flags & ct_flags::NEW != 0);
    // SAFETY: as above.
    unsafe { (*e).last_seen_ns = now };
    if !tells {
        return true;
    }
    if ending {
        set_flags(e, ct_flags::CLOSING);
    }
    if !opening {
        clear_flags(e, ct_flags::NEW);
    }
    // SAFETY: as above.
    tell(unsafe { &*e }, s, now)
}

/// Tells the entry of a known connection's answers about a packet of the client's, or makes it anew: it may have been
/// evicted or forgotten. The packet's connection is `v`.
#[inline(never)]
fn tell(v: &CtValue, s: &mut Scratch, now: u64) -> bool {
    let p = &s.packet;
    let has_port = v.flags & ct_flags::SRC != 0;
    let direct = v.flags & ct_flags::DIRECT != 0;
    (s.rkey.src, s.rkey.sport) = (v.dst, v.dport);
    (s.rkey.dst, s.rkey.dport) = if has_port { (v.src, v.sport) } else { (p.src, p.sport) };
    (s.rkey.proto, s.rkey.pad) = (p.proto, 0);
    s.rkey.dir = if direct { ct_dir::ERROR } else { ct_dir::REPLY };
    let mut clear = 0;
    if !opens(p) {
        // The client that acknowledges has seen the answer, wherever it came by.
        clear = ct_flags::FAR_NEW | if direct { ct_flags::NEW } else { 0 };
    }
    let set = reset(p) | if ends(p) { ct_flags::FAR_CLOSING } else { 0 };
    if let Some(r) = entry(&s.rkey) {
        // SAFETY: as above.
        let of = unsafe { &*r };
        let named = same(&of.src, &p.dst) && of.sport == p.dport;
        if !named || (has_port && !(same(&of.dst, &p.src) && of.dport == p.sport)) {
            // Without a port of its own it is the newer connection's, as it was when that began.
            return !has_port;
        }
        // SAFETY: as above.
        unsafe { (*r).last_seen_ns = now };
        set_flags(r, set);
        clear_flags(r, clear);
        return true;
    }
    (s.reply.src, s.reply.sport) = (p.dst, p.dport);
    (s.reply.dst, s.reply.dport) = (p.src, p.sport);
    s.reply.flags = (ct_flags::SRC | ct_flags::NEW | ct_flags::FAR_NEW) & !clear | set;
    if has_port {
        s.reply.flags |= ct_flags::DST | ct_flags::REDIRECT;
    }
    (s.reply.backend, s.reply.service) = (v.backend, v.service);
    (s.reply.last_seen_ns, s.reply.created_ns) = (now, v.created_ns);
    put_entry(&s.rkey, &s.reply, NO_EXIST) || !has_port
}

#[classifier]
pub fn lb_ingress(ctx: TcContext) -> i32 {
    ingress(&ctx)
}

#[classifier]
pub fn lb_egress(ctx: TcContext) -> i32 {
    egress(&ctx)
}

/// For what comes from pods.
#[classifier]
pub fn lb_pod_ingress(ctx: TcContext) -> i32 {
    match plain::from_pod(&ctx) {
        Some(verdict) => verdict,
        None => ingress(&ctx),
    }
}

/// For what goes to pods.
#[classifier]
pub fn lb_pod_egress(ctx: TcContext) -> i32 {
    if plain::passes_out(&ctx) { NEXT } else { egress(&ctx) }
}

#[inline(always)]
fn ingress(ctx: &TcContext) -> i32 {
    let Some(link) = uplink(ifindex(ctx)) else { return NEXT };
    let Some(s) = scratch() else { return NEXT };
    let kind = parse(ctx, link, s);
    let found = match kind {
        Kind::Transport => incoming(ctx, link, s),
        Kind::Error => icmp::find(ctx, s, true).ok_or(NEXT),
        Kind::Foreign => return refuse::at_cluster_ip(ctx, s),
        Kind::Other => return NEXT,
    };
    carry_out(ctx, Some(link), s, kind, found)
}

#[inline(always)]
fn egress(ctx: &TcContext) -> i32 {
    let Some(link) = uplink(ifindex(ctx)) else { return NEXT };
    let Some(s) = scratch() else { return NEXT };
    let kind = parse(ctx, link, s);
    let found = match kind {
        Kind::Transport => outgoing(ctx, link, s),
        Kind::Error => icmp::find(ctx, s, false).ok_or(NEXT),
        Kind::Foreign if link.flags & uplink_flags::POD == 0 => {
            return refuse::leaving(ctx, s, true);
        }
        Kind::Foreign => return NEXT,
        Kind::Other => return NEXT,
    };
    carry_out(ctx, None, s, kind, found)
}

/// Rewrites the packet as its connection says. All ways lead here, so that the verifier walks this once. `came_by`: on
/// ingress.
#[inline(always)]
fn carry_out(
    ctx: &TcContext,
    came_by: Option<&Uplink>,
    s: &mut Scratch,
    kind: Kind,
    found: Result<*const CtValue, i32>,
) -> i32 {
    let v = match found {
        // SAFETY: a valid element, or the scratch's, whose other fields are what changes below.
        Ok(v) => unsafe { &*v },
        Err(verdict) => return verdict,
    };
    let (mut out, mut pod) = (0, 0);
    let redirects = v.flags & ct_flags::REDIRECT != 0;
    let is_error = kind as u8 == Kind::Error as u8;
    if redirects || (!is_error && came_by.is_some_and(|link| short::leads_in(ctx, link, v))) {
        let length = if is_error { 0 } else { rewrite::length(ctx, &s.packet) };
        match rewrite::route(ctx, &v.dst, s.packet.v4, length, &mut s.fib) {
            Route::By(way) if redirects => out = way,
            Route::By(way) if short::ends_in_pod(way, &s.fib) => pod = way,
            Route::TooBig if redirects => return too_big(ctx, s, v),
            Route::None if redirects => return dropped(),
            // The stack knows what to do.
            _ => {}
        }
    }
    let done = if is_error {
        icmp::translate(ctx, &s.packet, &s.quote, v)
    } else {
        rewrite::apply(ctx, &s.packet, v)
    };
    let tells = v.flags & ct_flags::DIRECT != 0 && kind as u8 == Kind::Transport as u8 && opens(&s.packet);
    if done.is_none() || (tells && direct::tell(ctx, s).is_none()) {
        return dropped();
    }
    if out != 0 {
        rewrite::send(ctx, s.packet.l3, s.packet.v4, out)
    } else if pod != 0 {
        short::enter(ctx, s, pod)
    } else {
        NEXT
    }
}

/// Lets the stack say that a packet is too big for the way to its new destination: the stack gets it with that
/// destination but its old source, finds what we found, and sends the error that only it can send. The error is named
/// back like others, by an entry made for it.
#[inline(always)]
fn too_big(ctx: &TcContext, s: &mut Scratch, v: &CtValue) -> i32 {
    count(counters::TOO_BIG);
    let p = &s.packet;
    // The stack would cut it and send it on, with a source whose answers do not come back to us.
    if p.divisible {
        return dropped();
    }
    (s.rkey.src, s.rkey.sport) = (v.dst, v.dport);
    (s.rkey.dst, s.rkey.dport) = (p.src, p.sport);
    (s.rkey.proto, s.rkey.dir, s.rkey.pad) = (p.proto, ct_dir::ERROR, 0);
    s.reply = *v;
    s.reply.flags = ct_flags::SRC;
    (s.reply.src, s.reply.sport) = (p.dst, p.dport);
    if !put_entry(&s.rkey, &s.reply, 0)
        || rewrite::replace(ctx, p, true, &v.dst, v.dport).is_none()
    {
        return dropped();
    }
    NEXT
}

/// An answer of a backend that leaves by the interface that its client came in by.
#[inline(always)]
fn outgoing(ctx: &TcContext, link: &Uplink, s: &mut Scratch) -> Result<*const CtValue, i32> {
    set_key(&mut s.key, &s.packet, ct_dir::REPLY);
    let Some(v) = entry(&s.key) else {
        // Something of the node's own, perhaps, that sockets have not decided about.
        let own = link.flags & uplink_flags::POD == 0;
        let begins = s.packet.proto != TCP || opens(&s.packet);
        return Err(if own { refuse::leaving(ctx, s, begins) } else { NEXT });
    };
    // SAFETY: a valid element.
    if unsafe { (*v).flags } & ct_flags::REDIRECT != 0 {
        return Err(NEXT);
    }
    touch(v, &s.packet, now());
    short::confirm(ctx, link, s, v);
    Ok(v.cast_const())
}

/// A packet for a Service, or an answer of a backend on another node.
#[inline(always)]
fn incoming(ctx: &TcContext, link: &Uplink, s: &mut Scratch) -> Result<*const CtValue, i32> {
    let config = CONFIG.get(0).ok_or(NEXT)?;
    // An answer from a backend on another node comes to one of the translated ports.
    if s.packet.dport >= config.snat_first && s.packet.dport <= config.snat_last {
        set_key(&mut s.key, &s.packet, ct_dir::REPLY);
        if let Some(v) = entry(&s.key) {
            // SAFETY: a valid element.
            if unsafe { (*v).flags } & ct_flags::REDIRECT != 0 {
                touch(v, &s.packet, now());
                return Ok(v.cast_const());
            }
        }
    }
    let from_pod = link.flags & uplink_flags::POD != 0;
    let p = &s.packet;
    let opening = opens(p);
    if leads_somewhere(&p.dst, p.dport, p.proto) {
        if from_pod {
            note_client(&p.src);
        }
        set_key(&mut s.key, p, ct_dir::FORWARD);
        let mut known = entry(&s.key);
        if let Some(v) = known
            && p.proto == TCP
            && !opening
        {
            // Wherever it has led so far.
            if follow(v, s, now()) {
                return Ok(v.cast_const());
            }
            known = None;
        }
        let p = &s.packet;
        let scope = if from_pod { SCOPE_INTERNAL } else { SCOPE_EXTERNAL };
        if let Some(front) = select::frontend(&p.dst, p.dport, p.proto, scope, || false, config) {
            let now = now();
            if let Some(v) = known {
                // SAFETY: a valid element.
                let known = unsafe { &*v };
                let gone = select::backend(known.backend).is_none()
                    || (front.flags & frontend_flags::MEMBERS != 0
                        && !select::is_member(front.set, known.backend));
                // A first packet of TCP may be one that is sent again: it stays where the one before has gone.
                let renew = if p.proto == UDP {
                    gone || quiet(known, now)
                } else {
                    gone || known.flags & ct_flags::CLOSING != 0
                };
                if !renew && follow(v, s, now) {
                    return Ok(v.cast_const());
                }
            }
            // What is in the middle of a connection may be one of the node's own, from a port that is a node port by now.
            let p = &s.packet;
            if p.proto == TCP && !opening && (p.tcp & TCP_SYN != 0 || is_of_node(ctx, p)) {
                return Err(NEXT);
            }
            return connect(ctx, front, config, link, s, now);
        }
    }
    if opening && config.flags & config_flags::DIRECT != 0 && direct::told(ctx, s).is_some() {
        return Err(take_charge(s, now()));
    }
    let p = &s.packet;
    if p.proto == UDP || opening {
        // What an interface below this one has translated a moment ago looks as if the client knew the backend itself.
        if link.flags & uplink_flags::ABOVE == 0 {
            forget(&mut s.key, p);
        }
    } else if ends(p) && config.flags & config_flags::DIRECT != 0 {
        client_ends(&mut s.key, p);
    }
    Err(NEXT)
}

/// Another node has handed a connection over: its answers get the name that is in the reply's entry.
#[inline(always)]
fn take_charge(s: &mut Scratch, now: u64) -> i32 {
    let (addr, port) = (s.reply.src, s.reply.sport);
    let mut front = FrontendKey { addr, port, proto: s.packet.proto, scope: SCOPE_EXTERNAL };
    // Under no other name than a Service's: what comes by the network says much.
    if FRONTENDS.get_ptr(&front).is_none() {
        front.addr = any_addr(is_v4(&addr));
        if FRONTENDS.get_ptr(&front).is_none() {
            return NEXT;
        }
    }
    set_key(&mut s.rkey, &s.packet, ct_dir::REPLY);
    (s.rkey.src, s.rkey.dst) = (s.packet.dst, s.packet.src);
    (s.rkey.sport, s.rkey.dport) = (s.packet.dport, s.packet.sport);
    (s.reply.dst, s.reply.dport) = (s.packet.src, s.packet.sport);
    s.reply.flags = ct_flags::SRC | ct_flags::NEW;
    (s.reply.backend, s.reply.service) = (0, 0);
    (s.reply.last_seen_ns, s.reply.created_ns) = (now, now);
    // The same client's connection by another name is still alive; its answers would get the wrong one.
    if clashes(s, now) || !put_entry(&s.rkey, &s.reply, 0) {
        return dropped();
    }
    count(counters::DIRECT);
    NEXT
}

/// Of the answers to a packet that goes to the backend itself.
#[inline(always)]
fn set_answers_key(key: &mut CtKey, p: &Packet) {
    (key.src, key.dst) = (p.dst, p.src);
    (key.sport, key.dport) = (p.dport, p.sport);
    (key.proto, key.dir, key.pad) = (p.proto, ct_dir::REPLY, 0);
}

/// The client talks to the backend itself, by the port that it once used by way of a Service: the answers must not get
/// the Service's name any more, until it asks the Service again.
#[inline(always)]
fn forget(key: &mut CtKey, p: &Packet) {
    set_answers_key(key, p);
    let Some(v) = entry(key) else { return };
    // SAFETY: a valid element.
    let (flags, addr, port) = unsafe { ((*v).flags, (*v).src, (*v).sport) };
    if flags & ct_flags::REDIRECT != 0 {
        return;
    }
    remove_entry(key);
    (key.src, key.dst) = (p.src, addr);
    (key.sport, key.dport) = (p.sport, port);
    key.dir = ct_dir::FORWARD;
    if let Some(v) = entry(key) {
        set_flags(v, ct_flags::NEW);
    }
}

/// A client that is answered from here ends a connection which another node has handed over.
#[inline(always)]
fn client_ends(key: &mut CtKey, p: &Packet) {
    set_answers_key(key, p);
    if let Some(v) = entry(key) {
        set_flags(v, ct_flags::FAR_CLOSING | reset(p));
    }
}

/// Whether the answers of this connection would meet those of another one, by which the same client reaches the same
/// backend from the same port. A TCP connection that has ended makes room.
#[inline(always)]
fn clashes(s: &Scratch, now: u64) -> bool {
    match entry(&s.rkey) {
        Some(old) => {
            // SAFETY: a valid element.
            let old = unsafe { &*old };
            !(same(&old.src, &s.reply.src) && old.sport == s.reply.sport)
                && !(s.rkey.proto == TCP && ended(old))
                && !over(old, s.rkey.proto, now)
        }
        None => false,
    }
}

/// A packet without a known connection: chooses a backend and notes the connection in both directions.
#[inline(always)]
fn connect(
    ctx: &TcContext,
    front: &FrontendValue,
    config: &Config,
    link: &Uplink,
    s: &mut Scratch,
    now: u64,
) -> Result<*const CtValue, i32> {
    let p = &s.packet;
    if front.flags & frontend_flags::RANGES != 0 && !admits(front.service, &p.src) {
        count(counters::NOT_ADMITTED);
        count_connection(front.service, false);
        return Err(DROP);
    }
    let mut id = 0;
    let flags;
    if let Some((chosen, b)) = select::choose(front, KIND_ADDRESS, &p.src, Some(hash(p))) {
        id = chosen;
        (s.forward.dst, s.forward.dport) = (b.addr, b.port);
        flags = b.flags;
    } else {
        count_connection(front.service, false);
        if front.flags & frontend_flags::DROP_WHEN_EMPTY != 0 {
            return Err(dropped());
        }
        count(counters::PACKET_REFUSED);
        s.forward.dst = if is_local(&p.dst) { p.dst } else { own_address(link, p.v4) };
        s.forward.dport = 0;
        flags = backend_flags::LOCAL;
        if is_unspecified(&s.forward.dst) {
            return Err(dropped());
        }
    }
    if is_v4(&s.forward.dst) != p.v4 {
        return Err(NEXT);
    }
    (s.forward.src, s.forward.sport) = ([0; 4], 0);
    (s.reply.src, s.reply.sport) = (p.dst, p.dport);
    (s.reply.dst, s.reply.dport) = (p.src, p.sport);
    let new = if opens(p) { ct_flags::NEW } else { 0 };
    s.forward.flags = ct_flags::DST | new;
    s.reply.flags = ct_flags::SRC | ct_flags::NEW | if new != 0 { ct_flags::FAR_NEW } else { 0 };
    (s.forward.backend, s.forward.service) = (id, front.service);
    (s.reply.backend, s.reply.service) = (id, front.service);
    (s.forward.last_seen_ns, s.forward.created_ns) = (now, now);
    (s.reply.last_seen_ns, s.reply.created_ns) = (now, now);
    (s.rkey.src, s.rkey.sport) = (s.forward.dst, s.forward.dport);
    (s.rkey.dst, s.rkey.dport) = (p.src, p.sport);
    (s.rkey.proto, s.rkey.dir, s.rkey.pad) = (p.proto, ct_dir::REPLY, 0);
    let mut own_source = masquerade(ctx, flags, link, s);
    if own_source && config.flags & config_flags::DIRECT != 0 && hands_over(link, s, now) {
        own_source = false;
        s.forward.flags |= ct_flags::REDIRECT | ct_flags::DIRECT;
    } else
    // Nothing can be sent to the node itself with a source of its own; there the newer connection wins.
    if !own_source && !is_local(&s.forward.dst) && clashes(s, now) {
        s.rkey.dst = own_address(link, s.packet.v4);
        own_source = true;
    }
    if own_source {
        if is_unspecified(&s.rkey.dst) {
            return Err(dropped());
        }
        s.reply.flags |= ct_flags::DST | ct_flags::REDIRECT;
        let Some(port) = source_port(s, config, now) else {
            count(counters::SNAT_EXHAUSTED);
            return Err(dropped());
        };
        (s.forward.src, s.forward.sport) = (s.rkey.dst, port);
        s.forward.flags |= ct_flags::SRC | ct_flags::REDIRECT;
    } else if !put_entry(&s.rkey, &s.reply, 0) {
        return Err(dropped());
    }
    set_key(&mut s.key, &s.packet, ct_dir::FORWARD);
    short::prepare(ctx, config, link, &mut s.forward);
    if !put_entry(&s.key, &s.forward, 0) {
        return Err(dropped());
    }
    if id != 0 {
        count(counters::PACKET_CONNECTIONS);
        if s.packet.proto == TCP && !opens(&s.packet) {
            count(counters::RESUMED);
        }
        count_connection(front.service, true);
    }
    Ok(&raw const s.forward)
}

/// Whether a connection to another node is answered from there. If so the reply's entry is made one that names back
/// errors alone, as no answer comes here.
#[inline(always)]
fn hands_over(link: &Uplink, s: &mut Scratch, now: u64) -> bool {
    if s.packet.proto != TCP || link.flags & uplink_flags::POD != 0 || same(&s.forward.dst, &s.packet.src) {
        return false;
    }
    let own = s.rkey.dst;
    (s.rkey.dst, s.rkey.dir) = (s.packet.src, ct_dir::ERROR);
    // The backend's node could not tell their answers apart.
    if !clashes(s, now) {
        return true;
    }
    (s.rkey.dst, s.rkey.dir) = (own, ct_dir::REPLY);
    false
}

#[inline(always)]
fn own_address(link: &Uplink, v4: bool) -> Addr {
    if v4 { link.addr4 } else { link.addr6 }
}

#[inline(always)]
fn is_local(addr: &Addr) -> bool {
    LOCAL_ADDRS.get_ptr(addr).is_some()
}

/// Whether a socket of the node's own has this connection.
#[inline(always)]
fn is_of_node(ctx: &TcContext, p: &Packet) -> bool {
    if !is_local(&p.dst) {
        return false;
    }
    // SAFETY: all zeros is a valid value of this plain C union.
    let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    let (sport, dport) = (p.sport.to_be(), p.dport.to_be());
    let size = if p.v4 {
        tuple.__bindgen_anon_1.ipv4 =
            bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 { saddr: p.src[3], daddr: p.dst[3], sport, dport };
        TUPLE4
    } else {
        tuple.__bindgen_anon_1.ipv6 =
            bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 { saddr: p.src, daddr: p.dst, sport, dport };
        TUPLE6
    };
    // SAFETY: the tuple is valid and as long as is said; a socket is read before it is given back.
    unsafe {
        let socket = bpf_skc_lookup_tcp(ctx.skb.skb.cast(), &raw mut tuple, size, HERE, 0);
        if socket.is_null() {
            return false;
        }
        let state = core::ptr::read_volatile(&raw const (*socket).state);
        bpf_sk_release(socket.cast());
        state != TCP_LISTEN
    }
}

/// Whether packets to the backend in `forward` need another source than the client's; puts it into the reply's key
/// (zero: none can be given). Endpoints that name no node count as what they are: one that is reached by no uplink is
/// here.
#[inline(always)]
fn masquerade(ctx: &TcContext, flags: u8, link: &Uplink, s: &mut Scratch) -> bool {
    let v4 = s.packet.v4;
    if same(&s.forward.dst, &s.packet.src) {
        s.rkey.dst = own_address(link, v4);
        return true;
    }
    // A pod's address is known in the whole cluster, and answers to it pass its veth pair.
    if link.flags & uplink_flags::POD != 0 || flags & backend_flags::LOCAL != 0 || is_local(&s.forward.dst) {
        return false;
    }
    let Route::By(out) = rewrite::route(ctx, &s.forward.dst, v4, 0, &mut s.fib) else { return false };
    let Some(out) = uplink(out) else { return false };
    if out.flags & uplink_flags::POD != 0 {
        return false;
    }
    s.rkey.dst = own_address(out, v4);
    true
}

#[inline(always)]
pub fn same(a: &Addr, b: &Addr) -> bool {
    a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3]
}

#[inline(always)]
fn hash(p: &Packet) -> u32 {
    let mut h = 0x811c_9dc5_u32;
    let ports = ((p.sport as u32) << 16) | p.dport as u32;
    for word in [
        p.src[0],
        p.src[1],
        p.src[2],
        p.src[3],
        p.dst[0],
        p.dst[1],
        p.dst[2],
        p.dst[3],
        ports,
        p.proto as u32,
    ] {
        h = (h ^ word).wrapping_mul(0x0100_0193);
        h ^= h >> 15;
    }
    h
}

/// Reserves a source port towards the backend by inserting the reply's entry. Where all that were looked at are in use, the
/// one that can be spared best goes.
#[inline(always)]
fn source_port(s: &mut Scratch, config: &Config, now: u64) -> Option<u16> {
    let (first, proto) = (config.snat_first as u32, s.rkey.proto);
    // Never 0: a division by zero would need a panic, which no BPF program can have.
    let range = (config.snat_last as u32).saturating_sub(first) + 1;
    // SAFETY: no arguments.
    let start = unsafe { bpf_get_prandom_u32() };
    for i in 0..SNAT_TRIES {
        let port = (first + start.wrapping_add(i * 7) % range) as u16;
        s.rkey.dport = port;
        let flags = match entry(&s.rkey) {
            Some(old) => {
                // SAFETY: a valid element.
                let seen = unsafe { (*old).last_seen_ns };
                // SAFETY: as above.
                if !over(unsafe { &*old }, proto, now) || !claim(old, seen, now) {
                    continue;
                }
                0
            }
            None => NO_EXIST,
        };
        if put_entry(&s.rkey, &s.reply, flags) {
            return Some(port);
        }
    }
    let (mut best, mut worth) = (0, 0);
    for i in 0..SPARE_TRIES {
        let port = (first + start.wrapping_add(i * 7) % range) as u16;
        s.rkey.dport = port;
        // SAFETY: a valid element.
        let this = entry(&s.rkey).map_or(0, |old| spare(unsafe { &*old }, proto, now));
        if this > worth {
            (best, worth) = (port, this);
        }
    }
    if worth == 0 {
        return None;
    }
    s.rkey.dport = best;
    let old = entry(&s.rkey)?;
    // SAFETY: a valid element.
    let seen = unsafe { (*old).last_seen_ns };
    // SAFETY: as above. Another CPU may have taken it meanwhile.
    if spare(unsafe { &*old }, proto, now) == 0 || !claim(old, seen, now) {
        return None;
    }
    if put_entry(&s.rkey, &s.reply, 0) { Some(best) } else { None }
}
