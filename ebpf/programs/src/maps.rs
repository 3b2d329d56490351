//! The maps. All are pinned by name; user space sets their sizes when it creates them (see the loader's `Sizes`).

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::bindings::bpf_fib_lookup as FibLookup;
use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap};
use core::arch::asm;
use orlop_ebpf_common::*;

#[map]
pub static CONFIG: Array<Config> = Array::pinned(1, 0);
#[map]
pub static FRONTENDS: HashMap<FrontendKey, FrontendValue> = HashMap::pinned(65536, BPF_F_NO_PREALLOC);
#[map]
pub static SLOTS: HashMap<SlotKey, u32> = HashMap::pinned(262_144, BPF_F_NO_PREALLOC);
#[map]
pub static MEMBERS: HashMap<SlotKey, u32> = HashMap::pinned(131_072, BPF_F_NO_PREALLOC);
#[map]
pub static BACKENDS: HashMap<u32, Backend> = HashMap::pinned(131_072, BPF_F_NO_PREALLOC);
#[map]
pub static MAGLEV: HashMap<u32, MaglevTable> = HashMap::pinned(4096, BPF_F_NO_PREALLOC);
#[map]
pub static AFFINITY: LruHashMap<AffinityKey, AffinityValue> = LruHashMap::pinned(32768, 0);
#[map]
pub static SOCK_REVERSE: LruHashMap<u64, SockPeer> = LruHashMap::pinned(65536, 0);
/// The same of sockets that send without connecting. Nothing tells when one is done with a peer, so these must not take the
/// place of connections that live.
#[map]
pub static SOCK_SENT: LruHashMap<SockKey, SockReverse> = LruHashMap::pinned(16384, 0);
#[map]
pub static SOCK_FLOWS: LruHashMap<SockKey, SockFlow> = LruHashMap::pinned(32768, 0);
/// Of TCP, in both directions.
#[map]
pub static CONNECTIONS: LruHashMap<CtKey, CtValue> = LruHashMap::pinned(65536, 0);
/// The same of datagrams. Nothing tells when a flow ends, so those of a busy server must not take the place of connections that live.
#[map]
pub static DATAGRAMS: LruHashMap<CtKey, CtValue> = LruHashMap::pinned(65536, 0);
#[map]
pub static LOCAL_ADDRS: HashMap<Addr, u32> = HashMap::pinned(1024, BPF_F_NO_PREALLOC);
#[map]
pub static UPLINKS: HashMap<u32, Uplink> = HashMap::pinned(256, BPF_F_NO_PREALLOC);
#[map]
pub static FRAGMENTS: LruHashMap<FragmentKey, FragmentPorts> = LruHashMap::pinned(4096, 0);
#[map]
pub static RANGES: LpmTrie<RangeKey, u32> = LpmTrie::pinned(65536, BPF_F_NO_PREALLOC);
#[map]
pub static STATS: PerCpuHashMap<u32, Stats> = PerCpuHashMap::pinned(32768, BPF_F_NO_PREALLOC);
#[map]
pub static NAMES: HashMap<u32, ServiceName> = HashMap::pinned(32768, BPF_F_NO_PREALLOC);
#[map]
pub static FILTER: Array<u64> = Array::pinned(noted::PLACES / 64, 0);
#[map]
pub static CLIENTS: Array<u32> = Array::pinned(noted::CLIENTS, 0);
#[map]
pub static SERVERS: Array<u32> = Array::pinned(noted::SERVERS, 0);
#[map]
pub static PEERS: Array<u32> = Array::pinned(noted::PEERS, 0);
#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::pinned(counters::COUNT, 0);

/// The entry of a connection or of a flow of datagrams.
#[inline(always)]
pub fn entry(key: &CtKey) -> Option<*mut CtValue> {
    if key.proto != UDP {
        return CONNECTIONS.get_ptr_mut(key);
    }
    let mut v = DATAGRAMS.get_ptr_mut(key).unwrap_or(core::ptr::null_mut());
    // Changes nothing. It keeps the compiler from making one call of the two, which the kernel could not make a direct one.
    // SAFETY: as it says.
    unsafe { asm!("{0} = {0}", inout(reg) v) };
    if v.is_null() { None } else { Some(v) }
}

/// Makes or replaces it; says whether that was done.
#[inline(always)]
pub fn put_entry(key: &CtKey, value: &CtValue, flags: u64) -> bool {
    if key.proto == UDP {
        DATAGRAMS.insert(key, value, flags).is_ok()
    } else {
        CONNECTIONS.insert(key, value, flags).is_ok()
    }
}

/// Removes it; gone already is as good.
#[inline(always)]
pub fn remove_entry(key: &CtKey) {
    let _ = if key.proto == UDP { DATAGRAMS.remove(key) } else { CONNECTIONS.remove(key) };
}

/// Nanoseconds of the machine's monotonic clock, as of its last tick: much cheaper than to the nanosecond. What an earlier
/// version noted may be a tick later.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_ktime_get_coarse_ns() }
}

#[inline(always)]
pub fn count(index: u32) {
    if let Some(c) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: a valid element of this CPU; programs of one CPU do not interleave within this statement's needs.
        unsafe { *c = (*c).wrapping_add(1) };
    }
}

/// Counts in favour of a service port, whose entry user space made.
#[inline(always)]
pub fn count_connection(service: u32, served: bool) {
    if let Some(s) = STATS.get_ptr_mut(&service) {
        // SAFETY: this CPU's element, as above.
        unsafe {
            if served {
                (*s).connections = (*s).connections.wrapping_add(1);
            } else {
                (*s).refused = (*s).refused.wrapping_add(1);
            }
        }
    }
}

/// Whether there may be a frontend at this address and port.
#[inline(always)]
pub fn listed(addr: &Addr, port: u16, proto: u8) -> bool {
    let at = noted::place(addr, port, proto);
    match FILTER.get(at / 64) {
        Some(word) => word & (1 << (at % 64)) != 0,
        None => true,
    }
}

/// Whether there may be a frontend at this address and port, or a node port, or the address is a Service's.
#[inline(always)]
pub fn leads_somewhere(addr: &Addr, port: u16, proto: u8) -> bool {
    listed(addr, port, proto) || listed(addr, 0, 0) || listed(&any_addr(is_v4(addr)), port, proto)
}

/// Notes that packets for Services come from this address of a pod.
#[inline(always)]
pub fn note_client(addr: &Addr) {
    if let Some(c) = CLIENTS.get_ptr_mut(noted::client(addr)) {
        // SAFETY: a valid element; all that is ever stored is the same.
        unsafe { *c = 1 };
    }
}

/// Whether packets for Services may have come from this address of a pod.
#[inline(always)]
pub fn is_client(addr: &Addr) -> bool {
    CLIENTS.get(noted::client(addr)).is_none_or(|c| *c != 0)
}

/// Notes that a pod answers clients outside of the node from this address and port.
#[inline(always)]
pub fn note_server(addr: &Addr, port: u16) {
    if let Some(s) = SERVERS.get_ptr_mut(noted::server(addr, port)) {
        // SAFETY: a valid element; all that is ever stored is the same.
        unsafe { *s = 1 };
    }
}

/// Whether a pod may answer clients outside of the node from this address and port.
#[inline(always)]
pub fn is_server(addr: &Addr, port: u16) -> bool {
    SERVERS.get(noted::server(addr, port)).is_some_and(|s| *s != 0)
}

/// Notes that sockets have been led to this address and port by a Service's name.
#[inline(always)]
pub fn note_peer(addr: &Addr, port: u16) {
    if let Some(p) = PEERS.get_ptr_mut(noted::peer(addr, port)) {
        // SAFETY: a valid element; all that is ever stored is the same. Read first: every CPU has it at hand.
        unsafe {
            if *p == 0 {
                *p = 1;
            }
        }
    }
}

/// Whether sockets may have been led to this address and port by a Service's name.
#[inline(always)]
pub fn is_peer(addr: &Addr, port: u16) -> bool {
    PEERS.get(noted::peer(addr, port)).is_none_or(|p| *p != 0)
}

/// Whether a service port admits this source; under [`SERVICE_RANGE`]: whether it is an address for Services alone.
#[inline(always)]
pub fn admits(service: u32, source: &Addr) -> bool {
    let key = Key::new(160, RangeKey { service, addr: *source });
    RANGES.get(&key).is_some()
}

/// Sets flags of a connection. Packets of its two directions are on two CPUs at a time, and neither may undo what the other
/// has just said: a lost RESET would keep a source port for days. Looked at first, as most packets change nothing. The compiler has no
/// atomic operations of 32 bits for the first version of BPF's instructions, which all other code is compiled to.
#[inline(always)]
pub fn set_flags(v: *mut CtValue, flags: u32) {
    // SAFETY: a valid element.
    unsafe {
        if (*v).flags & flags != flags {
            asm!("lock *(u32 *)(r1 + 0) |= w2", in("r1") &raw mut (*v).flags, in("r2") flags as u64);
        }
    }
}

/// Takes flags of a connection back; as above.
#[inline(always)]
pub fn clear_flags(v: *mut CtValue, flags: u32) {
    // SAFETY: a valid element.
    unsafe {
        if (*v).flags & flags != 0 {
            asm!("lock *(u32 *)(r1 + 0) &= w2", in("r1") &raw mut (*v).flags, in("r2") !flags as u64);
        }
    }
}

/// Makes a connection that was last seen at this time one that is seen now: of several CPUs that want its source port, for one.
#[inline(always)]
pub fn claim(v: *mut CtValue, seen: u64, now: u64) -> bool {
    let before: u64;
    // SAFETY: a valid element.
    unsafe {
        asm!(
            "r0 = cmpxchg_64(r1 + 0, r0, r2)",
            inlateout("r0") seen => before,
            in("r1") &raw mut (*v).last_seen_ns,
            in("r2") now,
        );
    }
    before == seen && seen != now
}

/// A TCP or UDP packet, or the ICMP error about one.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Packet {
    pub src: Addr,
    pub dst: Addr,
    /// Offsets of the IP and the transport (or ICMP) header.
    pub l3: u32,
    pub l4: u32,
    pub sport: u16,
    pub dport: u16,
    pub proto: u8,
    /// TCP's flags.
    pub tcp: u8,
    pub v4: bool,
    /// A fragment other than the first: there is no transport header.
    pub headless: bool,
    /// Routers may cut it into fragments.
    pub divisible: bool,
}

/// Bytes of the longest ICMP error of ours: its headers, and the beginning of the packet that it is about.
pub const ERROR: usize = 40 + 8 + 80;

/// Room for what does not fit on the stack: kernels count it with that of the compiler's own functions. Not pinned: no
/// program leaves anything in it.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Scratch {
    pub packet: Packet,
    /// What an ICMP error quotes.
    pub quote: Packet,
    pub forward: CtValue,
    pub reply: CtValue,
    pub key: CtKey,
    pub rkey: CtKey,
    pub fragment: FragmentKey,
    pub fib: FibLookup,
    /// A header as it was read.
    pub head: [u8; 40],
    /// An ICMP error of ours.
    pub error: [u8; ERROR],
}

#[map]
pub static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);
