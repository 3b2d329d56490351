//! Socket hooks: the address is translated once, when a process connects or sends; packets are never touched.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval};
use aya_ebpf::macros::{cgroup_sock, cgroup_sock_addr};
use aya_ebpf::programs::{SockAddrContext, SockContext};
use core::ptr::{addr_of, addr_of_mut, read_volatile, write_volatile};
use orlop_ebpf_common::*;

use crate::maps::*;
use crate::packet::same;
use crate::select;

const ALLOW: i32 = 1;
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;
const EHOSTUNREACH: i32 = 113;

/// Clients of [`AffinityKey`] that are network namespaces.
const KIND_NETNS: u32 = 1;

// Volatile, one word each: the verifier allows these widths only, and the compiler must not merge or narrow them.
macro_rules! get {
    ($sa:expr, $($field:tt)+) => { unsafe { read_volatile(addr_of!((*$sa).$($field)+)) } };
}
macro_rules! set {
    ($sa:expr, $value:expr, $($field:tt)+) => { unsafe { write_volatile(addr_of_mut!((*$sa).$($field)+), $value) } };
}

#[inline(always)]
fn address(sa: *mut bpf_sock_addr, v6: bool) -> Addr {
    if v6 {
        [get!(sa, user_ip6[0]), get!(sa, user_ip6[1]), get!(sa, user_ip6[2]), get!(sa, user_ip6[3])]
    } else {
        addr4(get!(sa, user_ip4))
    }
}

#[inline(always)]
fn set_address(sa: *mut bpf_sock_addr, v6: bool, addr: &Addr, port: u16) {
    if v6 {
        set!(sa, addr[0], user_ip6[0]);
        set!(sa, addr[1], user_ip6[1]);
        set!(sa, addr[2], user_ip6[2]);
        set!(sa, addr[3], user_ip6[3]);
    } else {
        set!(sa, addr[3], user_ip4);
    }
    set!(sa, port.to_be() as u32, user_port);
}

#[inline(always)]
fn port(sa: *mut bpf_sock_addr) -> u16 {
    u16::from_be(get!(sa, user_port) as u16)
}

#[inline(always)]
fn refuse(v: &FrontendValue, errno: i32) -> i32 {
    count(counters::SOCK_REFUSED);
    count_connection(v.service, false);
    // SAFETY: sets the errno of this call; a kernel without the helper refuses the program when it is loaded.
    unsafe { bpf_set_retval(-errno) };
    REFUSE
}

#[inline(always)]
fn outgoing(ctx: &SockAddrContext, v6: bool, connected: bool) -> i32 {
    let sa = ctx.sock_addr;
    let proto = get!(sa, protocol) as u8;
    if proto != TCP && proto != UDP {
        return ALLOW;
    }
    let addr = address(sa, v6);
    let port = port(sa);
    // SAFETY: the context is valid while the program runs.
    let netns = || unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let Some(config) = CONFIG.get(0) else { return ALLOW };
    let on_node = || config.netns_cookie == netns();
    let Some(v) = select::frontend(&addr, port, proto, SCOPE_INTERNAL, on_node, config) else {
        if is_peer(&addr, port) {
            own_name(ctx, addr, port, proto, connected);
        }
        return ALLOW;
    };
    if v.flags & frontend_flags::RANGES != 0 {
        if !on_node() {
            // A pod's source address is not known yet: its packets are looked at where they enter the node.
            return ALLOW;
        }
        if v.flags & frontend_flags::NODE_ADMITTED == 0 {
            count(counters::NOT_ADMITTED);
            return refuse(v, EHOSTUNREACH);
        }
    }

    // SAFETY: as above.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let asked = SockKey { cookie, addr, port, proto, pad: 0, reserved: 0 };
    // Datagrams of one unconnected socket stay with one backend, as a flow through connection tracking would.
    let sticky = !connected && v.flags & frontend_flags::MEMBERS != 0;
    let mut chosen = None;
    if sticky {
        // SAFETY: copied out; elements are replaced as a whole.
        if let Some(f) = unsafe { SOCK_FLOWS.get(&asked) }.copied()
            && select::is_member(v.set, f.backend)
        {
            chosen = select::backend(f.backend).map(|b| (f.backend, b));
        }
    }
    let fresh = chosen.is_none();
    if fresh {
        let netns = if v.flags & frontend_flags::AFFINITY != 0 { netns() } else { 0 };
        let client = [netns as u32, (netns >> 32) as u32, 0, 0];
        chosen = select::choose(v, KIND_NETNS, &client, None);
        if sticky && let Some((backend, _)) = chosen {
            // A full table evicts; without an entry the next datagram chooses again.
            let _ = SOCK_FLOWS.insert(&asked, SockFlow { backend, set: v.set }, 0);
        }
    }
    let Some((_, b)) = chosen else {
        // Connecting a datagram socket sends nothing: resolvers do so to learn which source they would have.
        if connected && proto == UDP && !listed(&addr, port, proto) {
            return ALLOW;
        }
        let hidden = v.flags & frontend_flags::DROP_WHEN_EMPTY != 0;
        return refuse(v, if hidden { EHOSTUNREACH } else { ECONNREFUSED });
    };
    if !v6 && !is_v4(&b.addr) {
        return ALLOW;
    }

    let name = SockReverse { addr, port, pad: 0, service: v.service };
    // Without an entry the peer's name is the backend's, which TCP does not mind.
    if connected {
        let _ = SOCK_REVERSE.insert(&cookie, SockPeer { addr: b.addr, port: b.port, proto, pad: 0, name }, 0);
    } else {
        let seen = SockKey { cookie, addr: b.addr, port: b.port, proto, pad: 0, reserved: 0 };
        // A datagram after the first finds its entry, most times.
        // SAFETY: elements are replaced as a whole.
        if fresh || unsafe { SOCK_SENT.get(&seen) } != Some(&name) {
            let _ = SOCK_SENT.insert(&seen, name, 0);
        }
    }
    note_peer(&b.addr, b.port);
    set_address(sa, v6, &b.addr, b.port);
    count(counters::SOCK_TRANSLATED);
    if fresh {
        count_connection(v.service, true);
    }
    ALLOW
}

/// The socket's owner asks a peer by its own name: its answers must not get that of a Service by which the socket once reached
/// it.
#[inline(always)]
fn own_name(ctx: &SockAddrContext, addr: Addr, port: u16, proto: u8, connected: bool) {
    // SAFETY: the context is valid while the program runs.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // Most sockets that ask here have never asked a Service.
    if connected {
        forget(cookie);
    }
    let key = SockKey { cookie, addr, port, proto, pad: 0, reserved: 0 };
    // SAFETY: elements are replaced as a whole.
    if proto == UDP && unsafe { SOCK_SENT.get(&key) }.is_some() {
        let _ = SOCK_SENT.remove(&key);
    }
}

/// Forgets whom a socket is connected to. Looking for nothing takes no lock.
#[inline(always)]
fn forget(cookie: u64) {
    // SAFETY: elements are replaced as a whole.
    if unsafe { SOCK_REVERSE.get(&cookie) }.is_some() {
        let _ = SOCK_REVERSE.remove(&cookie);
    }
}

/// Gives a peer the name under which the socket's owner knows it.
#[inline(always)]
fn incoming(ctx: &SockAddrContext, v6: bool, datagram: bool) -> i32 {
    let sa = ctx.sock_addr;
    let proto = get!(sa, protocol) as u8;
    if proto != TCP && proto != UDP {
        return ALLOW;
    }
    // SAFETY: the context is valid while the program runs.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let (addr, port) = (address(sa, v6), port(sa));
    // SAFETY: elements are replaced as a whole, and one that is replaced stays until this program has ended.
    let peer = unsafe { SOCK_REVERSE.get(&cookie) };
    let mut named = peer.filter(|p| p.port == port && same(&p.addr, &addr)).map(|p| p.name);
    if datagram && named.is_none() {
        let key = SockKey { cookie, addr, port, proto, pad: 0, reserved: 0 };
        // SAFETY: as above.
        named = unsafe { SOCK_SENT.get(&key) }.copied();
    }
    if let Some(r) = named {
        set_address(sa, v6, &r.addr, r.port);
    }
    ALLOW
}

/// Forgets a connected socket that its owner closes: the table holds those that live. One whose connecting has failed too, of
/// which the kernel does not say any more whom it asked.
#[cgroup_sock(sock_release)]
pub fn lb_release(ctx: SockContext) -> i32 {
    let proto = get!(ctx.sock, protocol) as u8;
    if proto == TCP || proto == UDP {
        // Most were never translated.
        // SAFETY: the context is valid while the program runs.
        forget(unsafe { bpf_get_socket_cookie(ctx.as_ptr()) });
    }
    ALLOW
}

#[cgroup_sock_addr(connect4)]
pub fn lb_connect4(ctx: SockAddrContext) -> i32 {
    outgoing(&ctx, false, true)
}
#[cgroup_sock_addr(connect6)]
pub fn lb_connect6(ctx: SockAddrContext) -> i32 {
    outgoing(&ctx, true, true)
}
#[cgroup_sock_addr(sendmsg4)]
pub fn lb_sendmsg4(ctx: SockAddrContext) -> i32 {
    outgoing(&ctx, false, false)
}
#[cgroup_sock_addr(sendmsg6)]
pub fn lb_sendmsg6(ctx: SockAddrContext) -> i32 {
    outgoing(&ctx, true, false)
}
#[cgroup_sock_addr(recvmsg4)]
pub fn lb_recvmsg4(ctx: SockAddrContext) -> i32 {
    incoming(&ctx, false, true)
}
#[cgroup_sock_addr(recvmsg6)]
pub fn lb_recvmsg6(ctx: SockAddrContext) -> i32 {
    incoming(&ctx, true, true)
}
#[cgroup_sock_addr(getpeername4)]
pub fn lb_peername4(ctx: SockAddrContext) -> i32 {
    incoming(&ctx, false, false)
}
#[cgroup_sock_addr(getpeername6)]
pub fn lb_peername6(ctx: SockAddrContext) -> i32 {
    incoming(&ctx, true, false)
}
