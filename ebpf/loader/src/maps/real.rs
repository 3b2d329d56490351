//! The kernel's maps.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuHashMap, PerCpuValues};
use aya::{Ebpf, Pod};
use orlop_ebpf_common::noted::client;
use orlop_ebpf_common::{
    Addr, AffinityKey, AffinityValue, Backend, Config, CtKey, CtValue, FrontendKey, FrontendValue,
    MaglevTable, RangeKey, SCOPE_EXTERNAL, ServiceName, SlotKey, SockFlow, SockKey, SockReverse, Stats,
    Uplink, counters, ct_dir, ct_flags, frontend_flags,
};

use super::listed::{Listed, Word};
use super::{Dump, MapFailure, Maps, Op, table};
use crate::{Error, pin, sys};

type Table<K, V> = HashMap<MapData, K, V>;

/// Bits of a [`RangeKey`] before the address.
const RANGE_HEAD: u32 = 32;

/// Flags of a change (BPF_NOEXIST, BPF_EXIST).
const NEW: u64 = 1;
const REPLACE: u64 = 2;

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
    names: Table<u32, ServiceName>,
    ranges: LpmTrie<MapData, RangeKey, u32>,
    stats: PerCpuHashMap<MapData, u32, Stats>,
    connections: Flows<CtKey, CtValue>,
    reverse: Flows<SockKey, SockReverse>,
    sent: Flows<SockKey, SockReverse>,
    affinity: Flows<AffinityKey, AffinityValue>,
    counters: PerCpuArray<MapData, u64>,
    flows: Flows<SockKey, SockFlow>,
    /// The filter, kept by who changes frontends.
    listed: Option<(Array<MapData, u64>, Listed)>,
    /// Programs are loaded with it.
    _clients: Option<Array<MapData, u32>>,
    /// Descriptors of the maps that are written in one go.
    batch: Batch,
    cpus: usize,
}

struct Batch {
    frontends: OwnedFd,
    slots: OwnedFd,
    backends: OwnedFd,
    names: OwnedFd,
    stats: OwnedFd,
}

/// Where handles come from: a loaded object, or pins.
trait Source {
    fn map(&mut self, name: &'static str) -> Result<Map, Error>;
}

impl Source for Ebpf {
    fn map(&mut self, name: &'static str) -> Result<Map, Error> {
        self.take_map(name).ok_or(Error::Missing { name })
    }
}

struct Pins<'a>(&'a Path);

impl Source for Pins<'_> {
    fn map(&mut self, name: &'static str) -> Result<Map, Error> {
        let failed = |source| Error::Map { name, source: Box::new(source) };
        let data = MapData::from_pin(self.0.join(name)).map_err(failed)?;
        Map::from_map_data(data).map_err(failed)
    }
}

fn take<T: TryFrom<Map, Error = MapError>>(from: &mut dyn Source, name: &'static str) -> Result<T, Error> {
    T::try_from(from.map(name)?).map_err(|source| Error::Map { name, source: Box::new(source) })
}

/// The same, and a descriptor of the map.
fn take_with_fd<T: TryFrom<Map, Error = MapError>>(
    from: &mut dyn Source,
    name: &'static str,
) -> Result<(T, OwnedFd), Error> {
    let failed = |source| Error::Map { name, source: Box::new(source) };
    let map = from.map(name)?;
    let (Map::HashMap(data) | Map::PerCpuHashMap(data)) = &map else { return Err(Error::Missing { name }) };
    let fd = data.fd().as_fd().try_clone_to_owned().map_err(|e| failed(e.into()))?;
    Ok((T::try_from(map).map_err(failed)?, fd))
}

impl RealMaps {
    pub(crate) fn take(bpf: &mut Ebpf) -> Result<RealMaps, Error> {
        let mut maps = RealMaps::from(bpf)?;
        maps.listed = Some((take(bpf, "FILTER")?, Listed::new([])));
        maps.list_anew().map_err(|e| written("FILTER", e))?;
        let mut clients = take(bpf, "CLIENTS")?;
        maps.note_clients(&mut clients).map_err(|e| written("CLIENTS", e))?;
        maps._clients = Some(clients);
        Ok(maps)
    }

    /// Brings the filter in step with the frontends that are there.
    fn list_anew(&mut self) -> Result<(), MapFailure> {
        let Some((table, listed)) = &mut self.listed else { return Ok(()) };
        let all = sys::lookup_batch::<FrontendKey, FrontendValue>(self.batch.frontends.as_fd(), u32::MAX)
            .map_err(|e| MapFailure::Syscall { map: "FRONTENDS", source: Box::new(e) })?;
        *listed = Listed::new(all.iter().map(|(k, _)| k));
        for (i, word) in (0..).zip(listed.words()) {
            if table.get(&i, 0).map_err(|e| failure("FILTER", e))? != *word {
                list(table, Some((i, *word)))?;
            }
        }
        Ok(())
    }

    /// Connections of an earlier version's programs, which took no note of their clients.
    fn note_clients(&self, table: &mut Array<MapData, u32>) -> Result<(), MapFailure> {
        if table.iter().any(|noted| noted.is_ok_and(|n| n != 0)) {
            return Ok(());
        }
        for (k, v) in self.connections()? {
            if k.dir != ct_dir::FORWARD && v.flags & ct_flags::REDIRECT == 0 {
                table.set(client(&k.dst), 1, 0).map_err(|e| failure("CLIENTS", e))?;
            }
        }
        Ok(())
    }

    /// Programs look for a frontend only where one is listed, so that comes first.
    fn put_frontend(&mut self, k: &FrontendKey, v: FrontendValue) -> Result<(), MapFailure> {
        let failed = |e| failure("FRONTENDS", e);
        let Some((table, listed)) = &mut self.listed else {
            return self.frontends.insert(k, v, 0).map_err(failed);
        };
        match self.frontends.insert(k, v, REPLACE) {
            Err(MapError::SyscallError(e)) if e.io_error.raw_os_error() == Some(libc::ENOENT) => {}
            r => return r.map_err(failed),
        }
        list(table, listed.add(k))?;
        let put = self.frontends.insert(k, v, NEW).map_err(failed);
        if put.is_err() {
            list(table, listed.remove(k))?;
        }
        put
    }

    fn del_frontend(&mut self, k: &FrontendKey) -> Result<(), MapFailure> {
        match self.frontends.remove(k) {
            Ok(()) => {}
            r => return missing("FRONTENDS", r),
        }
        match &mut self.listed {
            Some((table, listed)) => list(table, listed.remove(k)),
            None => Ok(()),
        }
    }

    /// The maps of a load balancer that somebody else runs, or that runs by itself.
    pub fn open(pins: &Path) -> Result<RealMaps, Error> {
        let dir = pin::maps(pins);
        if !dir.exists() {
            return Err(Error::NotLoaded { pins: pins.to_owned() });
        }
        RealMaps::from(&mut Pins(&dir))
    }

    fn from(s: &mut dyn Source) -> Result<RealMaps, Error> {
        let (frontends, frontends_fd) = take_with_fd(s, "FRONTENDS")?;
        let (slots, slots_fd) = take_with_fd(s, "SLOTS")?;
        let (backends, backends_fd) = take_with_fd(s, "BACKENDS")?;
        let (names, names_fd) = take_with_fd(s, "NAMES")?;
        let (stats, stats_fd) = take_with_fd(s, "STATS")?;
        Ok(RealMaps {
            config: take(s, "CONFIG")?,
            frontends,
            slots,
            members: take(s, "MEMBERS")?,
            backends,
            maglev: take(s, "MAGLEV")?,
            locals: take(s, "LOCAL_ADDRS")?,
            uplinks: take(s, "UPLINKS")?,
            names,
            ranges: take(s, "RANGES")?,
            stats,
            connections: Flows::take(s, "CONNECTIONS")?,
            reverse: Flows::take(s, "SOCK_REVERSE")?,
            sent: Flows::take(s, "SOCK_SENT")?,
            affinity: Flows::take(s, "AFFINITY")?,
            counters: take(s, "COUNTERS")?,
            flows: Flows::take(s, "SOCK_FLOWS")?,
            listed: None,
            _clients: None,
            batch: Batch {
                frontends: frontends_fd,
                slots: slots_fd,
                backends: backends_fd,
                names: names_fd,
                stats: stats_fd,
            },
            cpus: aya::util::nr_cpus().map_err(|(what, source)| Error::Path {
                what: "read",
                path: what.into(),
                source,
            })?,
        })
    }

    pub fn config(&self) -> Result<Config, MapFailure> {
        self.config.get(&0, 0).map_err(|e| failure("CONFIG", e))
    }

    pub(crate) fn set_config(&mut self, config: Config) -> Result<(), MapFailure> {
        self.config.set(0, config, 0).map_err(|e| failure("CONFIG", e))
    }

    /// Changes the flags ([`orlop_ebpf_common::config_flags`]) of the configuration.
    pub fn set_flags(&mut self, flags: u32) -> Result<(), MapFailure> {
        let old = self.config()?;
        if old.flags == flags { Ok(()) } else { self.set_config(Config { flags, ..old }) }
    }

    pub(crate) fn put_uplink(&mut self, index: u32, uplink: Uplink) -> Result<(), MapFailure> {
        put("UPLINKS", &mut self.uplinks, index, uplink)
    }

    pub(crate) fn del_uplink(&mut self, index: u32) -> Result<(), MapFailure> {
        del("UPLINKS", &mut self.uplinks, &index)
    }

    /// Interfaces that are served, by index.
    pub fn uplinks(&self) -> Vec<(u32, Uplink)> {
        self.uplinks.iter().filter_map(Result::ok).collect()
    }

    /// A counter of [`counters`], summed over all CPUs.
    pub fn counter(&self, index: u32) -> u64 {
        debug_assert!(index < counters::COUNT);
        self.counters.get(&index, 0).map(|v| v.iter().sum()).unwrap_or(0)
    }

    /// What happened to each service port, by number, summed over all CPUs.
    pub fn stats(&self) -> Vec<(u32, Stats)> {
        let sum = |v: &PerCpuValues<Stats>| {
            v.iter().fold(Stats::default(), |a, b| Stats {
                connections: a.connections + b.connections,
                refused: a.refused + b.refused,
            })
        };
        self.stats.iter().filter_map(Result::ok).map(|(k, v)| (k, sum(&v))).collect()
    }

    /// How many service addresses have endpoints but none that policy Local allows: from inside and from outside.
    pub fn hidden(&self) -> Result<(usize, usize), MapFailure> {
        let all = all("FRONTENDS", &self.frontends)?;
        let hidden = all.iter().filter(|(_, v)| v.flags & frontend_flags::DROP_WHEN_EMPTY != 0);
        let outside = hidden.clone().filter(|(k, _)| k.scope == SCOPE_EXTERNAL).count();
        Ok((hidden.count() - outside, outside))
    }

    /// The name of a service port.
    pub fn service_name(&self, number: u32) -> Option<String> {
        self.names.get(&number, 0).ok().map(|n| n.to_string())
    }

    /// Connections through interfaces, in both directions.
    pub fn connections(&self) -> Result<Vec<(CtKey, CtValue)>, MapFailure> {
        self.connections.all()
    }

    /// Connected sockets that were given a backend.
    pub fn connected(&self) -> Result<Vec<(SockKey, SockReverse)>, MapFailure> {
        self.reverse.all()
    }

    /// Sockets that were given a backend when they sent without connecting, also closed ones.
    pub fn sent(&self) -> Result<Vec<(SockKey, SockReverse)>, MapFailure> {
        self.sent.all()
    }

    /// Both.
    pub fn sockets(&self) -> Result<Vec<(SockKey, SockReverse)>, MapFailure> {
        let mut all = self.connected()?;
        all.extend(self.sent()?);
        Ok(all)
    }

    /// Forgets a socket.
    pub fn del_socket(&mut self, key: &SockKey) -> Result<(), MapFailure> {
        del("SOCK_REVERSE", &mut self.reverse.table, key)?;
        del("SOCK_SENT", &mut self.sent.table, key)
    }

    /// The highest numbers of backends and of service ports that flows remember.
    pub fn remembered(&self) -> Result<(u32, u32), MapFailure> {
        let (mut backend, mut service) = (0, 0);
        for (_, v) in self.connections()? {
            (backend, service) = (v.backend.max(backend), v.service.max(service));
        }
        for (k, v) in self.affinity()? {
            (backend, service) = (v.backend.max(backend), k.service.max(service));
        }
        for (_, v) in self.sockets()? {
            service = v.service.max(service);
        }
        for (_, v) in self.flows.all()? {
            backend = v.backend.max(backend);
        }
        Ok((backend, service))
    }

    /// Clients that stay with a backend.
    pub fn affinity(&self) -> Result<Vec<(AffinityKey, AffinityValue)>, MapFailure> {
        self.affinity.all()
    }
}

/// A table that programs fill, read as a whole.
struct Flows<K, V> {
    name: &'static str,
    table: Table<K, V>,
    fd: OwnedFd,
    capacity: u32,
}

impl<K: Pod, V: Pod> Flows<K, V> {
    fn take(from: &mut dyn Source, name: &'static str) -> Result<Self, Error> {
        let map = from.map(name)?;
        let failed = |source| Error::Map { name, source: Box::new(source) };
        let (Map::LruHashMap(data) | Map::HashMap(data)) = &map else { return Err(Error::Missing { name }) };
        let fd = data.fd().as_fd().try_clone_to_owned().map_err(|e| failed(e.into()))?;
        let capacity = data.info().map_err(failed)?.max_entries();
        Ok(Flows { name, fd, capacity, table: Table::try_from(map).map_err(failed)? })
    }

    /// All entries, many in one system call. Entries that change meanwhile may be missing; the walk always ends.
    fn all(&self) -> Result<Vec<(K, V)>, MapFailure> {
        sys::lookup_batch(self.fd.as_fd(), self.capacity)
            .map_err(|e| MapFailure::Syscall { map: self.name, source: Box::new(e) })
    }
}

/// Writes a word of the filter that changed.
fn list(filter: &mut Array<MapData, u64>, word: Option<Word>) -> Result<(), MapFailure> {
    word.map_or(Ok(()), |(i, word)| filter.set(i, word, 0)).map_err(|e| failure("FILTER", e))
}

fn written(name: &'static str, e: MapFailure) -> Error {
    Error::Path { what: "write BPF map", path: name.into(), source: io::Error::other(e) }
}

/// Keys and values of one map.
struct Pairs<K, V>(Vec<K>, Vec<V>);

impl<K, V> Default for Pairs<K, V> {
    fn default() -> Self {
        Pairs(Vec::new(), Vec::new())
    }
}

impl<K: Pod, V: Pod> Pairs<K, V> {
    fn push(&mut self, k: K, v: V) {
        self.0.push(k);
        self.1.push(v);
    }

    fn put(&self, name: &'static str, map: &OwnedFd) -> Result<(), MapFailure> {
        put_batch(name, map, &self.0, &self.1)
    }
}

fn put_batch<K: Pod, V: Pod>(
    name: &'static str,
    map: &OwnedFd,
    keys: &[K],
    values: &[V],
) -> Result<(), MapFailure> {
    sys::update_batch(map.as_fd(), keys, values).map_err(|e| match e.raw_os_error() {
        Some(libc::E2BIG) => MapFailure::Full { map: name },
        _ => MapFailure::Syscall { map: name, source: Box::new(e) },
    })
}

fn put<K: Pod, V: Pod>(name: &'static str, map: &mut Table<K, V>, k: K, v: V) -> Result<(), MapFailure> {
    map.insert(k, v, 0).map_err(|e| failure(name, e))
}

fn del<K: Pod, V: Pod>(name: &'static str, map: &mut Table<K, V>, k: &K) -> Result<(), MapFailure> {
    missing(name, map.remove(k))
}

/// Deleting what is not there succeeds.
fn missing(name: &'static str, result: Result<(), MapError>) -> Result<(), MapFailure> {
    match result {
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
            Op::PutService(n, name) => {
                let zero = PerCpuValues::try_from(vec![Stats::default(); self.cpus])
                    .map_err(|e| MapFailure::Syscall { map: "STATS", source: Box::new(e) })?;
                self.stats.insert(n, zero, 0).map_err(|e| failure("STATS", e))?;
                put("NAMES", &mut self.names, *n, **name)
            }
            Op::DelService(n) => {
                missing("STATS", self.stats.remove(n))?;
                del("NAMES", &mut self.names, n)
            }
            Op::PutRange((k, bits)) => {
                let key = Key::new(RANGE_HEAD + u32::from(*bits), *k);
                self.ranges.insert(&key, 1, 0).map_err(|e| failure("RANGES", e))
            }
            Op::DelRange((k, bits)) => {
                missing("RANGES", self.ranges.remove(&Key::new(RANGE_HEAD + u32::from(*bits), *k)))
            }
            Op::PutFrontend(k, v) => self.put_frontend(k, *v),
            Op::DelFrontend(k) => self.del_frontend(k),
            Op::PutLocal(a, f) => put("LOCAL_ADDRS", &mut self.locals, *a, *f),
            Op::DelLocal(a) => del("LOCAL_ADDRS", &mut self.locals, a),
        }
    }

    fn put_all(&mut self, ops: Vec<Op>) -> Result<(), MapFailure> {
        let (mut backends, mut slots, mut names, mut frontends) =
            <(Pairs<_, _>, Pairs<_, _>, Pairs<_, _>, Pairs<_, _>)>::default();
        let mut others = Vec::new();
        for op in ops {
            match op {
                Op::PutBackend(id, b) => backends.push(id, b),
                Op::PutSlot(k, id) => slots.push(k, id),
                Op::PutService(n, name) => names.push(n, *name),
                Op::PutFrontend(k, v) => frontends.push(k, v),
                other => others.push(other),
            }
        }
        backends.put("BACKENDS", &self.batch.backends)?;
        slots.put("SLOTS", &self.batch.slots)?;
        others.iter().try_for_each(|op| self.apply(op))?;
        let zero = vec![Stats::default(); names.0.len() * self.cpus];
        put_batch("STATS", &self.batch.stats, &names.0, &zero)?;
        names.put("NAMES", &self.batch.names)?;
        let put = frontends.put("FRONTENDS", &self.batch.frontends);
        self.list_anew()?;
        put
    }

    fn dump(&self) -> Result<Dump, MapFailure> {
        let maglev = self.maglev.keys().collect::<Result<_, _>>().map_err(|e| failure("MAGLEV", e))?;
        Ok(Dump {
            frontends: all("FRONTENDS", &self.frontends)?,
            slots: all("SLOTS", &self.slots)?,
            members: all("MEMBERS", &self.members)?,
            maglev,
            backends: all("BACKENDS", &self.backends)?,
            services: all("NAMES", &self.names)?.into_iter().map(|(k, v)| (k, v.to_string())).collect(),
            ranges: self
                .ranges
                .keys()
                .map(|k| k.map(|k| (k.data(), k.prefix_len().saturating_sub(RANGE_HEAD) as u8)))
                .collect::<Result<_, _>>()
                .map_err(|e| failure("RANGES", e))?,
            locals: all("LOCAL_ADDRS", &self.locals)?,
        })
    }
}
