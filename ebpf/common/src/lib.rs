//! What the BPF programs and user space share: keys, values and constants of the maps.
//!
//! Every type has a fixed layout without hidden padding, asserted below. A change of any of them raises [`LAYOUT`], so
//! that maps pinned by another version are never read by mistake.
#![cfg_attr(not(any(test, feature = "user")), no_std)]

pub mod lifetime;
pub mod maglev;
pub mod noted;

/// Version of all layouts in this crate. Pinned maps live in a folder named after it.
pub const LAYOUT: u32 = 3;

/// An address of either family: four words in network byte order; IPv4 is mapped (`::ffff:a.b.c.d`), so one set of maps
/// serves both families and dual-stack sockets.
pub type Addr = [u32; 4];

/// Third word of a mapped IPv4 address.
pub const V4_PREFIX: u32 = 0x0000_ffff_u32.to_be();

/// The IPv4 address given as a word in network byte order.
#[inline(always)]
pub const fn addr4(be: u32) -> Addr {
    [0, 0, V4_PREFIX, be]
}

/// Whether the address is a mapped IPv4 address.
#[inline(always)]
pub const fn is_v4(a: &Addr) -> bool {
    a[0] == 0 && a[1] == 0 && a[2] == V4_PREFIX
}

/// The address with which node ports are stored: all zeros within the family.
#[inline(always)]
pub const fn any_addr(v4: bool) -> Addr {
    if v4 { addr4(0) } else { [0; 4] }
}

/// 127.0.0.0/8 or ::1.
#[inline(always)]
pub const fn is_loopback(a: &Addr) -> bool {
    if is_v4(a) {
        u32::from_be(a[3]) >> 24 == 127
    } else {
        a[0] == 0 && a[1] == 0 && a[2] == 0 && a[3] == 1_u32.to_be()
    }
}

/// 0.0.0.0 or ::, which Linux takes for loopback when connecting.
#[inline(always)]
pub const fn is_unspecified(a: &Addr) -> bool {
    a[0] == 0 && a[1] == 0 && a[3] == 0 && (a[2] == 0 || a[2] == V4_PREFIX)
}

/// IP protocol numbers that Services use.
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;

/// Who asks: traffic that starts in the cluster (socket hooks) or arrives from outside (packet hooks). The same frontend
/// may have other backends for each (externalTrafficPolicy).
pub const SCOPE_INTERNAL: u8 = 0;
pub const SCOPE_EXTERNAL: u8 = 1;

macro_rules! shared {
    ($($(#[$doc:meta])* $name:ident[$size:literal] { $($(#[$fdoc:meta])* $field:ident: $ty:ty,)* })*) => { $(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub struct $name { $($(#[$fdoc])* pub $field: $ty,)* }
        const _: () = assert!(core::mem::size_of::<$name>() == $size);
        // No hidden padding: the fields fill the struct.
        const _: () = assert!(0 $(+ core::mem::size_of::<$ty>())* == $size);
        // SAFETY: repr(C), plain integers, no padding (both asserted above).
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $name {}
    )* };
}

shared! {
    /// A Service address: key of FRONTENDS. Ports are in host byte order in all maps.
    FrontendKey[20] { addr: Addr, port: u16, proto: u8, scope: u8, }

    /// What a frontend leads to.
    FrontendValue[20] {
        /// Key of the slots, and of the Maglev table.
        set: u32,
        /// Number of slots in use; 0 means that nobody answers.
        count: u32,
        /// Stable number of the service port: key of affinity.
        service: u32,
        /// Seconds of ClientIP affinity, with [`frontend_flags::AFFINITY`].
        affinity_seconds: u32,
        /// [`frontend_flags`].
        flags: u32,
    }

    /// Key of SLOTS (slot number) and of MEMBERS (backend id in place of the slot).
    SlotKey[8] { set: u32, slot: u32, }

    /// An endpoint: value of BACKENDS, keyed by its id (never 0).
    Backend[20] { addr: Addr, port: u16, proto: u8, /** [`backend_flags`]. */ flags: u8, }

    /// Key of AFFINITY. The client is an address (packets) or the cookie of a network namespace (sockets).
    AffinityKey[24] { service: u32, kind: u32, client: Addr, }
    AffinityValue[16] { last_seen_ns: u64, backend: u32, reserved: u32, }

    /// A peer as one socket sees it: key of SOCK_SENT (peer = backend) and SOCK_FLOWS (peer = frontend). The cookie keeps apart
    /// sockets that reach one backend through different Services.
    SockKey[32] { cookie: u64, addr: Addr, port: u16, proto: u8, pad: u8, reserved: u32, }
    /// What the socket's owner asked for.
    SockReverse[24] { addr: Addr, port: u16, pad: u16, service: u32, }
    /// The backend that a connected socket was led to, and by which name: value of SOCK_REVERSE, keyed by the socket's cookie, as it
    /// has one peer at a time.
    SockPeer[44] { addr: Addr, port: u16, proto: u8, pad: u8, name: SockReverse, }
    /// The backend that an unconnected UDP socket uses for a frontend.
    SockFlow[8] { backend: u32, set: u32, }

    /// A packet's addresses: key of the connection table.
    CtKey[40] { src: Addr, dst: Addr, sport: u16, dport: u16, proto: u8, /** [`ct_dir`]. */ dir: u8, pad: u16, }
    /// How to rewrite it.
    CtValue[64] {
        /// New source, with [`ct_flags::SRC`].
        src: Addr,
        /// New destination, with [`ct_flags::DST`].
        dst: Addr,
        sport: u16,
        dport: u16,
        flags: u32,
        backend: u32,
        service: u32,
        last_seen_ns: u64,
        created_ns: u64,
    }

    /// An interface that the packet programs serve: value of UPLINKS, keyed by its index.
    Uplink[40] {
        /// The node's addresses towards whoever is there: sources of translated packets; zero when there is none.
        addr4: Addr,
        addr6: Addr,
        /// Offset of the IP header: 14 on Ethernet, 0 on tunnels without a link header.
        l3_offset: u32,
        /// [`uplink_flags`].
        flags: u32,
    }

    /// Fragments of one datagram: key of FRAGMENTS. The value is the ports, which only the first fragment carries.
    FragmentKey[40] { src: Addr, dst: Addr, id: u32, proto: u8, pad: u8, pad2: u16, }
    FragmentPorts[4] { sport: u16, dport: u16, }

    /// A source that a service port admits, or (number [`SERVICE_RANGE`]) addresses that are Services' alone: key of RANGES, a
    /// trie; the prefix counts from `service`.
    RangeKey[20] { service: u32, addr: Addr, }

    /// What happened to a service port: value of STATS, keyed by its number.
    Stats[16] {
        /// Connections and datagram flows that were given a backend.
        connections: u64,
        /// Those that were refused or dropped.
        refused: u64,
    }

    /// The only value of CONFIG.
    Config[24] {
        layout: u32,
        flags: u32,
        /// The node's network namespace: loopback and unspecified addresses mean the node only there.
        netns_cookie: u64,
        /// Ports for translated sources, outside of ip_local_port_range so that no socket of the node has one.
        snat_first: u16,
        snat_last: u16,
        reserved: u32,
    }
}

/// No service port's number: the ranges under it are those that cluster IPs are taken from (ServiceCIDR).
pub const SERVICE_RANGE: u32 = 0;

/// Bytes of a service port's name.
pub const NAME_SIZE: usize = 144;

/// `namespace/name:port`, cut off at its size and filled up with zeros: value of NAMES, keyed by the service port's
/// number. No program reads it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceName(pub [u8; NAME_SIZE]);
// SAFETY: an array of bytes.
#[cfg(feature = "user")]
unsafe impl aya::Pod for ServiceName {}

/// Table for a set's Maglev selection: backend ids.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct MaglevTable(pub [u32; maglev::SIZE]);
// SAFETY: an array of plain integers.
#[cfg(feature = "user")]
unsafe impl aya::Pod for MaglevTable {}

pub mod frontend_flags {
    /// Clients keep their backend for a time.
    pub const AFFINITY: u32 = 1;
    /// Without a backend packets are dropped, not refused: there are endpoints, but policy Local hides them.
    pub const DROP_WHEN_EMPTY: u32 = 2;
    /// The set has a Maglev table.
    pub const MAGLEV: u32 = 4;
    /// The set is listed in MEMBERS. Earlier versions did not list all.
    pub const MEMBERS: u32 = 8;
    /// Only sources in RANGES are served.
    pub const RANGES: u32 = 16;
    /// With RANGES: an address of this node is among them.
    pub const NODE_ADMITTED: u32 = 32;
}

pub mod config_flags {
    /// Node ports answer on 127.0.0.0/8, and on ::1.
    pub const LOOPBACK4: u32 = 1;
    pub const LOOPBACK6: u32 = 2;
    /// Backends on other nodes answer TCP clients themselves, past this node (direct server return).
    pub const DIRECT: u32 = 4;
    /// Established connections between clients outside and pods here pass by the stack's forwarding.
    pub const HOST_ROUTING: u32 = 8;
}

pub mod uplink_flags {
    /// The node's end of a pod's veth pair: who comes in here is inside the cluster.
    pub const POD: u32 = 1;
    /// Served by XDP too; only such interfaces are sent to by XDP.
    pub const XDP: u32 = 2;
    /// With POD: the pair's other end is in another network namespace, and packets need nothing between the two.
    pub const PEER: u32 = 4;
    /// What comes in here has come in by another interface that is served, as by a port of a bridge.
    pub const ABOVE: u32 = 8;
}

pub mod backend_flags {
    /// Runs on this node.
    pub const LOCAL: u8 = 1;
}

/// What a node tells the node of a backend about a connection that is to be answered from there: the Service's address
/// and port, in the connection's first packet, as an IPv4 option or an IPv6 destination option. Numbers that are kept for
/// experiments (RFC 4727); who does not know them passes over them.
pub mod direct {
    /// Copied into fragments, class 0, number 30.
    pub const OPTION4: u8 = 158;
    /// Type and length, port, address.
    pub const LEN4: usize = 8;
    /// To be skipped by who does not know it, does not change on the way.
    pub const OPTION6: u8 = 0x1e;
    /// Next header and length, type and length, port, two bytes of nothing, address.
    pub const LEN6: usize = 24;
}

pub mod local_flags {
    /// Node ports answer on this address.
    pub const NODE_PORT: u32 = 1;
}

pub mod ct_dir {
    pub const FORWARD: u8 = 0;
    pub const REPLY: u8 = 1;
    /// As a reply, for ICMP errors alone: those of the node's stack about packets that were too big to be sent on.
    pub const ERROR: u8 = 2;
}

pub mod ct_flags {
    pub const SRC: u32 = 1;
    pub const DST: u32 = 2;
    /// Leave by the route of the new destination instead of passing up: the new source is one of ours, which the
    /// stack would take for a spoofed packet.
    pub const REDIRECT: u32 = 4;
    /// A FIN or RST was seen in this direction.
    pub const CLOSING: u32 = 8;
    /// The backend's node answers the client itself: it is told by the connection's first packet what for.
    pub const DIRECT: u32 = 16;
    /// Of answers: one has come from the pod by the interface that is noted, under the name that the entry has.
    pub const CAME: u32 = 32;
    /// The stack has forwarded a first packet each way and had nothing against it or to change about it: others that come
    /// by the interface that is noted may go the short way.
    pub const SHORT: u32 = 64;
    /// The bits from here on: the interface that packets of this direction come in by (see [`interface`]).
    pub const INTERFACE: u32 = 8;
    /// Interfaces with a number as large as this are not noted.
    pub const INTERFACES: u32 = 1 << 20;
    /// The uppermost bits say how far a connection has come; none of them is set while it is established.
    ///
    /// No packet was seen in this direction since the connection began. Of the client's direction: none that the
    /// answers' entry was told of.
    pub const NEW: u32 = 1 << 28;
    /// Of answers: the same of the client's direction.
    pub const FAR_NEW: u32 = 1 << 29;
    /// Of answers: the client has sent a FIN.
    pub const FAR_CLOSING: u32 = 1 << 30;
    /// Of answers: a RST was seen in either direction.
    pub const RESET: u32 = 1 << 31;

    /// The interface that packets of this direction come in by; 0: not noted.
    #[inline(always)]
    pub const fn interface(flags: u32) -> u32 {
        (flags >> INTERFACE) % INTERFACES
    }
}

/// Indexes of COUNTERS.
pub mod counters {
    pub const SOCK_TRANSLATED: u32 = 0;
    pub const SOCK_REFUSED: u32 = 1;
    pub const PACKET_CONNECTIONS: u32 = 2;
    pub const PACKET_REFUSED: u32 = 3;
    pub const PACKET_DROPPED: u32 = 4;
    pub const FRAGMENTS: u32 = 5;
    pub const SNAT_EXHAUSTED: u32 = 6;
    /// ICMP errors about translated packets, translated too.
    pub const ICMP_ERRORS: u32 = 7;
    /// Sources outside of loadBalancerSourceRanges.
    pub const NOT_ADMITTED: u32 = 8;
    /// Packets that were larger than the way to another node allows.
    pub const TOO_BIG: u32 = 9;
    /// Connections that another node handed over, to be answered from here.
    pub const DIRECT: u32 = 10;
    /// Packets sent on by XDP.
    pub const XDP: u32 = 11;
    /// TCP connections taken up in the middle: a full table had dropped their entry, or they are older than it.
    pub const RESUMED: u32 = 12;
    /// Packets that went past the stack's forwarding.
    pub const SHORT: u32 = 13;
    /// Packets to addresses of the Service range that no Service has.
    pub const UNALLOCATED: u32 = 14;
    pub const COUNT: u32 = 16;
}

impl FrontendKey {
    /// Where the ports of a ClusterIP are refused that are no Service's.
    #[inline(always)]
    pub const fn rest(addr: Addr) -> FrontendKey {
        FrontendKey { addr, port: 0, proto: 0, scope: SCOPE_INTERNAL }
    }

    pub const fn is_rest(&self) -> bool {
        self.port == 0
    }
}

#[cfg(any(test, feature = "user"))]
mod user {
    use super::{Addr, V4_PREFIX, is_v4};
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    /// The maps' form of an address.
    pub fn addr_from(ip: IpAddr) -> Addr {
        match ip {
            IpAddr::V4(a) => [0, 0, V4_PREFIX, u32::from_ne_bytes(a.octets())],
            IpAddr::V6(a) => {
                let o = a.octets();
                [0, 4, 8, 12].map(|i| u32::from_ne_bytes([o[i], o[i + 1], o[i + 2], o[i + 3]]))
            }
        }
    }

    impl super::ServiceName {
        pub fn new(name: &str) -> Self {
            let mut bytes = [0; super::NAME_SIZE];
            let n = name.len().min(bytes.len());
            bytes[..n].copy_from_slice(&name.as_bytes()[..n]);
            super::ServiceName(bytes)
        }
    }

    impl std::fmt::Display for super::ServiceName {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            let end = self.0.iter().position(|b| *b == 0).unwrap_or(self.0.len());
            f.write_str(&String::from_utf8_lossy(&self.0[..end]))
        }
    }

    /// The address that the maps' form stands for.
    pub fn addr_to(a: &Addr) -> IpAddr {
        if is_v4(a) {
            return IpAddr::V4(Ipv4Addr::from(a[3].to_ne_bytes()));
        }
        let mut o = [0u8; 16];
        for (chunk, word) in o.chunks_exact_mut(4).zip(a) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        IpAddr::V6(Ipv6Addr::from(o))
    }
}
#[cfg(any(test, feature = "user"))]
pub use user::{addr_from, addr_to};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_convert_both_ways() {
        for s in ["10.96.0.1", "127.0.0.1", "::1", "fd00:1::2", "0.0.0.0"] {
            let ip: std::net::IpAddr = s.parse().unwrap();
            assert_eq!(addr_to(&addr_from(ip)), ip, "{s}");
        }
        assert!(is_loopback(&addr_from("127.3.2.1".parse().unwrap())));
        assert!(is_loopback(&addr_from("::1".parse().unwrap())));
        assert!(!is_loopback(&addr_from("10.0.0.127".parse().unwrap())));
        assert!(is_unspecified(&any_addr(true)) && is_unspecified(&any_addr(false)));
        assert!(!is_unspecified(&addr_from("::1".parse().unwrap())));
    }
}
