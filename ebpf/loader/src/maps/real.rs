//! The kernel's maps.

use aya::Ebpf;
use aya::Pod;
use aya::maps::{Array, HashMap, MapData, MapError, PerCpuArray};
use orlop_ebpf_common::{
    Addr, Backend, Config, FrontendKey, FrontendValue, MaglevTable, SlotKey, Uplink, counters,
};

use super::{Dump, MapFailure, Maps, Op, table};
use crate::Error;

type Table<K, V> = HashMap<MapData, K, V>;

/// Handles of the kernel's maps.
pub struct RealMaps {
    config: Array<MapData, Config>,
    frontends: Table<FrontendKey, FrontendValue>,
    slots: Table<SlotKey, u32>,
    members: Table<SlotKey, u32>,
    backends: Table<u32, Backend>,
    maglev: Table<u32, MaglevTable>,
    locals: Table<Addr, u32>,
    uplinks: Table<u32, Uplink>,
    counters: PerCpuArray<MapData, u64>,
}

fn take<T: TryFrom<aya::maps::Map, Error = MapError>>(
    bpf: &mut Ebpf,
    name: &'static str,
) -> Result<T, Error> {
    let map = bpf.take_map(name).ok_or(Error::Missing { name })?;
    T::try_from(map).map_err(|source| Error::Map { name, source: Box::new(source) })
}

impl RealMaps {
    pub(crate) fn take(bpf: &mut Ebpf) -> Result<RealMaps, Error> {
        Ok(RealMaps {
            config: take(bpf, "CONFIG")?,
            frontends: take(bpf, "FRONTENDS")?,
            slots: take(bpf, "SLOTS")?,
            members: take(bpf, "MEMBERS")?,
            backends: take(bpf, "BACKENDS")?,
            maglev: take(bpf, "MAGLEV")?,
            locals: take(bpf, "LOCAL_ADDRS")?,
            uplinks: take(bpf, "UPLINKS")?,
            counters: take(bpf, "COUNTERS")?,
        })
    }

    pub(crate) fn set_config(&mut self, config: Config) -> Result<(), Error> {
        self.config.set(0, config, 0).map_err(|e| Error::Map { name: "CONFIG", source: Box::new(e) })
    }

    pub(crate) fn put_uplink(&mut self, index: u32, uplink: Uplink) -> Result<(), MapFailure> {
        put("UPLINKS", &mut self.uplinks, index, uplink)
    }

    pub(crate) fn del_uplink(&mut self, index: u32) -> Result<(), MapFailure> {
        del("UPLINKS", &mut self.uplinks, &index)
    }

    pub(crate) fn uplinks(&self) -> Vec<u32> {
        self.uplinks.keys().filter_map(Result::ok).collect()
    }

    /// A counter of [`counters`], summed over all CPUs.
    pub fn counter(&self, index: u32) -> u64 {
        debug_assert!(index < counters::COUNT);
        self.counters.get(&index, 0).map(|v| v.iter().sum()).unwrap_or(0)
    }
}

fn put<K: Pod, V: Pod>(name: &'static str, map: &mut Table<K, V>, k: K, v: V) -> Result<(), MapFailure> {
    map.insert(k, v, 0).map_err(|e| failure(name, e))
}

fn del<K: Pod, V: Pod>(name: &'static str, map: &mut Table<K, V>, k: &K) -> Result<(), MapFailure> {
    match map.remove(k) {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(e)) if e.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        r => r.map_err(|e| failure(name, e)),
    }
}

fn failure(map: &'static str, e: MapError) -> MapFailure {
    match e {
        MapError::SyscallError(s) if s.io_error.raw_os_error() == Some(libc::E2BIG) => {
            MapFailure::Full { map }
        }
        e => MapFailure::Syscall { map, source: Box::new(e) },
    }
}

fn all<K: Pod + Eq + std::hash::Hash, V: Pod>(
    name: &'static str,
    map: &Table<K, V>,
) -> Result<std::collections::HashMap<K, V>, MapFailure> {
    map.iter().collect::<Result<_, _>>().map_err(|e| failure(name, e))
}

impl Maps for RealMaps {
    fn apply(&mut self, op: &Op) -> Result<(), MapFailure> {
        match op {
            Op::PutBackend(id, b) => put("BACKENDS", &mut self.backends, *id, *b),
            Op::DelBackend(id) => del("BACKENDS", &mut self.backends, id),
            Op::PutSlot(k, id) => put("SLOTS", &mut self.slots, *k, *id),
            Op::DelSlot(k) => del("SLOTS", &mut self.slots, k),
            Op::PutMember(k) => put("MEMBERS", &mut self.members, *k, 1),
            Op::DelMember(k) => del("MEMBERS", &mut self.members, k),
            Op::PutMaglev(set, t) => put("MAGLEV", &mut self.maglev, *set, table(t)),
            Op::DelMaglev(set) => del("MAGLEV", &mut self.maglev, set),
            Op::PutFrontend(k, v) => put("FRONTENDS", &mut self.frontends, *k, *v),
            Op::DelFrontend(k) => del("FRONTENDS", &mut self.frontends, k),
            Op::PutLocal(a, f) => put("LOCAL_ADDRS", &mut self.locals, *a, *f),
            Op::DelLocal(a) => del("LOCAL_ADDRS", &mut self.locals, a),
        }
    }

    fn dump(&self) -> Result<Dump, MapFailure> {
        let maglev = self.maglev.keys().collect::<Result<_, _>>().map_err(|e| failure("MAGLEV", e))?;
        Ok(Dump {
            frontends: all("FRONTENDS", &self.frontends)?,
            slots: all("SLOTS", &self.slots)?,
            members: all("MEMBERS", &self.members)?,
            maglev,
            backends: all("BACKENDS", &self.backends)?,
            locals: all("LOCAL_ADDRS", &self.locals)?,
        })
    }
}
