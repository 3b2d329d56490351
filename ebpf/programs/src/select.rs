//! From an address to a backend: shared by the socket and the packet programs.

use aya_ebpf::helpers::bpf_get_prandom_u32;
use orlop_ebpf_common::*;

use crate::maps::*;

/// The frontend at this address: its own, or a node port when the address is the node's.
/// `on_node`: whether the asker lives in the node's network namespace, where loopback addresses mean the node.
#[inline(always)]
pub fn frontend(
    addr: &Addr,
    port: u16,
    proto: u8,
    scope: u8,
    on_node: impl Fn() -> bool,
    config: &Config,
) -> Option<&'static FrontendValue> {
    let mut key = FrontendKey { addr: *addr, port, proto, scope };
    let unspecified = is_unspecified(addr);
    if !unspecified && listed(addr, port, proto) {
        // SAFETY: an update replaces whole elements, and a replaced one stays until a grace period after this program.
        if let Some(v) = unsafe { FRONTENDS.get(&key) } {
            return Some(v);
        }
        if scope == SCOPE_EXTERNAL {
            // What others may reach has an entry of its own for them. What has not is a ClusterIP, and whoever routes
            // it to this node is answered.
            key.scope = SCOPE_INTERNAL;
            // SAFETY: as above.
            if let Some(v) = unsafe { FRONTENDS.get(&key) } {
                return Some(v);
            }
            key.scope = scope;
        }
    }
    if !unspecified && listed(addr, 0, 0) {
        // SAFETY: as above.
        if let Some(v) = unsafe { FRONTENDS.get(&FrontendKey::rest(*addr)) } {
            return Some(v);
        }
    }
    key.addr = any_addr(is_v4(addr));
    if !listed(&key.addr, port, proto) {
        return None;
    }
    // SAFETY: as above.
    let v = unsafe { FRONTENDS.get(&key) }?;
    let ours = if unspecified || is_loopback(addr) {
        let flag = if is_v4(addr) { config_flags::LOOPBACK4 } else { config_flags::LOOPBACK6 };
        config.flags & flag != 0 && on_node()
    } else {
        // SAFETY: as above.
        matches!(unsafe { LOCAL_ADDRS.get(addr) }, Some(f) if *f & local_flags::NODE_PORT != 0)
    };
    if ours { Some(v) } else { None }
}

#[inline(always)]
pub fn backend(id: u32) -> Option<&'static Backend> {
    // SAFETY: as above.
    unsafe { BACKENDS.get(&id) }
}

#[inline(always)]
pub fn is_member(set: u32, backend: u32) -> bool {
    MEMBERS.get_ptr(&SlotKey { set, slot: backend }).is_some()
}

/// Chooses a backend for a new connection. `hash` is `None` for a random choice.
#[inline(always)]
pub fn choose(
    v: &FrontendValue,
    kind: u32,
    client: &Addr,
    hash: Option<u32>,
) -> Option<(u32, &'static Backend)> {
    if v.count == 0 {
        return None;
    }
    let affinity = v.flags & frontend_flags::AFFINITY != 0;
    let akey = AffinityKey { service: v.service, kind, client: *client };
    if affinity {
        // SAFETY: copied out; elements are replaced as a whole.
        if let Some(a) = unsafe { AFFINITY.get(&akey) }.copied() {
            let limit = v.affinity_seconds as u64 * 1_000_000_000;
            if now().saturating_sub(a.last_seen_ns) <= limit
                && is_member(v.set, a.backend)
                && let Some(b) = backend(a.backend)
            {
                remember(&akey, a.backend);
                return Some((a.backend, b));
            }
        }
    }
    let (id, b) = match hash {
        Some(h) if v.flags & frontend_flags::MAGLEV != 0 => by_maglev(v.set, h),
        _ => None,
    }
    .or_else(|| by_slot(v, hash))?;
    if affinity {
        remember(&akey, id);
    }
    Some((id, b))
}

#[inline(always)]
fn remember(key: &AffinityKey, backend: u32) {
    // A full table evicts its oldest entry; failing leaves the client without affinity, not without service.
    let _ = AFFINITY.insert(key, AffinityValue { last_seen_ns: now(), backend, reserved: 0 }, 0);
}

#[inline(always)]
fn by_maglev(set: u32, hash: u32) -> Option<(u32, &'static Backend)> {
    let table = MAGLEV.get_ptr(&set)?;
    let index = hash as usize % maglev::SIZE;
    // The verifier does not follow a remainder: it must see a comparison, which the compiler must not drop.
    // SAFETY: reads a local.
    let index = unsafe { core::ptr::read_volatile(&index) };
    if index >= maglev::SIZE {
        return None;
    }
    // SAFETY: the table is a valid element and the index is below its length.
    let id = unsafe { (*table).0[index] };
    Some((id, backend(id)?))
}

#[inline(always)]
fn by_slot(v: &FrontendValue, hash: Option<u32>) -> Option<(u32, &'static Backend)> {
    let h = match hash {
        Some(h) => h,
        // SAFETY: no arguments.
        None => unsafe { bpf_get_prandom_u32() },
    };
    // Checked where it is used: a division by zero would need a panic, which no BPF program can have.
    if v.count == 0 {
        return None;
    }
    // The first slot is the second try: while user space shrinks a set, a slot may go between two look-ups.
    slot(v.set, h % v.count).or_else(|| slot(v.set, 0))
}

#[inline(always)]
fn slot(set: u32, slot: u32) -> Option<(u32, &'static Backend)> {
    // SAFETY: copied out; elements are replaced as a whole.
    let id = unsafe { SLOTS.get(&SlotKey { set, slot }) }.copied()?;
    Some((id, backend(id)?))
}
