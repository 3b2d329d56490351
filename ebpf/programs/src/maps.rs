//! The maps. All are pinned by name; user space sets their sizes when it creates them (see the loader's `Sizes`).

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray};
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
pub static SOCK_REVERSE: LruHashMap<SockKey, SockReverse> = LruHashMap::pinned(65536, 0);
#[map]
pub static SOCK_FLOWS: LruHashMap<SockKey, SockFlow> = LruHashMap::pinned(32768, 0);
#[map]
pub static CONNECTIONS: LruHashMap<CtKey, CtValue> = LruHashMap::pinned(65536, 0);
#[map]
pub static LOCAL_ADDRS: HashMap<Addr, u32> = HashMap::pinned(1024, BPF_F_NO_PREALLOC);
#[map]
pub static UPLINKS: HashMap<u32, Uplink> = HashMap::pinned(256, BPF_F_NO_PREALLOC);
#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::pinned(counters::COUNT, 0);

#[inline(always)]
pub fn count(index: u32) {
    if let Some(c) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: a valid element of this CPU; programs of one CPU do not interleave within this statement's needs.
        unsafe { *c = (*c).wrapping_add(1) };
    }
}

/// Room for what a new connection's entries are put together from. Not pinned: no program leaves anything in it.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Scratch {
    pub forward: CtValue,
    pub reply: CtValue,
    pub rkey: CtKey,
}

#[map]
pub static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);
