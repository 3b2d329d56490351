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
    MaglevTable, RangeKey, SCOPE_EXTERNAL, ServiceName, SlotKey, SockFlow, SockKey, SockPeer, SockReverse,
    Stats, TCP, UDP, Uplink, counters, ct_dir, ct_flags, frontend_flags,
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
    frontends: Bulk<FrontendKey, FrontendValue>,
    slots: Bulk<SlotKey, u32>,
    members: Bulk<SlotKey, u32>,
    backends: Bulk<u32, Backend>,
    maglev: Table<u32, MaglevTable>,
    locals: Bulk<Addr, u32>,
    uplinks: Table<u32, Uplink>,
    names: Bulk<u32, ServiceName>,
    ranges: LpmTrie<MapData, RangeKey, u32>,
    stats: PerCpuHashMap<MapData, u32, Stats>,
    stats_all: Handle,
    connections: Bulk<CtKey, CtValue>,
    datagrams: Bulk<CtKey, CtValue>,
    reverse: Bulk<u64, SockPeer>,
    sent: Bulk<SockKey, SockReverse>,
    affinity: Bulk<AffinityKey, AffinityValue>,
    counters: PerCpuArray<MapData, u64>,
    flows: Bulk<SockKey, SockFlow>,
    /// The filter, kept by who changes frontends.
    filter: Option<Filter>,
    /// Programs are loaded with it.
    _clients: Option<Array<MapData, u32>>,
    cpus: usize,
}

/// Where programs look for frontends.
struct Filter {
    words: Array<MapData, u64>,
    all: Handle,
    listed: Listed,
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

/// The same, and a handle of the map as a whole.
fn take_whole<T: TryFrom<Map, Error = MapError>>(
    from: &mut dyn Source,
    name: &'static str,
) -> Result<(T, Handle), Error> {
    let failed = |source| Error::Map { name, source: Box::new(source) };
    let map = from.map(name)?;
    let (Map::HashMap(data) | Map::LruHashMap(data) | Map::PerCpuHashMap(data) | Map::Array(data)) = &map
    else {
        return Err(Error::Missing { name });
    };
    let fd = data.fd().as_fd().try_clone_to_owned().map_err(|e| failed(e.into()))?;
    let capacity = data.info().map_err(failed)?.max_entries();
    Ok((T::try_from(map).map_err(failed)?, Handle { name, fd, capacity }))
}

impl RealMaps {
    pub(crate) fn take(bpf: &mut Ebpf) -> Result<RealMaps, Error> {
        let mut maps = RealMaps::from(bpf)?;
        let (words, all) = take_whole(bpf, "FILTER")?;
        maps.filter = Some(Filter { words, all, listed: Listed::new([]) });
        maps.show().map_err(|e| written("FILTER", e))?;
        let mut clients = take(bpf, "CLIENTS")?;
        maps.note_clients(&mut clients).map_err(|e| written("CLIENTS", e))?;
        maps._clients = Some(clients);
        Ok(maps)
    }

    /// Connections of an earlier version's programs, which took no note of their clients.
    fn note_clients(&self, table: &mut Array<MapData, u32>) -> Result<(), MapFailure> {
        if table.iter().any(|noted| noted.is_ok_and(|n| n != 0)) {
            return Ok(());
        }
        for (k, v) in self.connections.all()?.into_iter().chain(self.datagrams.all()?) {
            if k.dir != ct_dir::FORWARD && v.flags & ct_flags::REDIRECT == 0 {
                table.set(client(&k.dst), 1, 0).map_err(|e| failure("CLIENTS", e))?;
            }
        }
        Ok(())
    }

    /// Programs look for a frontend only where one is listed, so that comes first.
    fn put_frontend(&mut self, k: &FrontendKey, v: FrontendValue) -> Result<(), MapFailure> {
        let failed = |e| failure("FRONTENDS", e);
        let frontends = &mut self.frontends.table;
        let Some(filter) = &mut self.filter else { return frontends.insert(k, v, 0).map_err(failed) };
        match frontends.insert(k, v, REPLACE) {
            Err(MapError::SyscallError(e)) if e.io_error.raw_os_error() == Some(libc::ENOENT) => {}
            r => return r.map_err(failed),
        }
        let word = filter.listed.add(k);
        filter.write(word)?;
        frontends.insert(k, v, NEW).map_err(failed)
    }

    fn del_frontend(&mut self, k: &FrontendKey) -> Result<(), MapFailure> {
        missing("FRONTENDS", self.frontends.table.remove(k))?;
        let many = self.filter.as_mut().is_some_and(|f| f.listed.goes());
        if many { self.show() } else { Ok(()) }
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
        let (stats, stats_all) = take_whole(s, "STATS")?;
        Ok(RealMaps {
            config: take(s, "CONFIG")?,
            frontends: Bulk::take(s, "FRONTENDS")?,
            slots: Bulk::take(s, "SLOTS")?,
            members: Bulk::take(s, "MEMBERS")?,
            backends: Bulk::take(s, "BACKENDS")?,
            maglev: take(s, "MAGLEV")?,
            locals: Bulk::take(s, "LOCAL_ADDRS")?,
            uplinks: take(s, "UPLINKS")?,
            names: Bulk::take(s, "NAMES")?,
            ranges: take(s, "RANGES")?,
            stats,
            stats_all,
            connections: Bulk::take(s, "CONNECTIONS")?,
            datagrams: Bulk::take(s, "DATAGRAMS")?,
            reverse: Bulk::take(s, "SOCK_REVERSE")?,
            sent: Bulk::take(s, "SOCK_SENT")?,
            affinity: Bulk::take(s, "AFFINITY")?,
            counters: take(s, "COUNTERS")?,
            flows: Bulk::take(s, "SOCK_FLOWS")?,
            filter: None,
            _clients: None,
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
    pub fn stats(&self) -> Result<Vec<(u32, Stats)>, MapFailure> {
        let sum = |values: &[Stats]| {
            values.iter().fold(Stats::default(), |a, b| Stats {
                connections: a.connections + b.connections,
                refused: a.refused + b.refused,
            })
        };
        let mut all = Vec::new();
        self.stats_all.each(self.cpus, |number, values: &[Stats]| all.push((number, sum(values))))?;
        Ok(all)
    }

    /// How many service addresses have endpoints but none that policy Local allows: from inside and from outside.
    pub fn hidden(&self) -> Result<(usize, usize), MapFailure> {
        let (mut inside, mut outside) = (0, 0);
        self.frontends.handle.each(1, |k: FrontendKey, v: &[FrontendValue]| {
            if v[0].flags & frontend_flags::DROP_WHEN_EMPTY != 0 {
                *(if k.scope == SCOPE_EXTERNAL { &mut outside } else { &mut inside }) += 1;
            }
        })?;
        Ok((inside, outside))
    }

    /// The names of all service ports, by number.
    pub fn service_names(&self) -> Result<std::collections::HashMap<u32, String>, MapFailure> {
        let mut all = std::collections::HashMap::new();
        self.names
            .handle
            .each(1, |number, name: &[ServiceName]| drop(all.insert(number, name[0].to_string())))?;
        Ok(all)
    }

    /// Connections and flows of datagrams through interfaces, in both directions.
    pub fn connections(&self) -> Result<Vec<(CtKey, CtValue)>, MapFailure> {
        let mut all = self.connections.all()?;
        all.retain(|(k, _)| k.proto != UDP);
        all.extend(self.datagrams.all()?);
        Ok(all)
    }

    /// Takes over flows of datagrams that an older layout's programs have kept among the connections.
    pub(crate) fn adopt_datagrams(&mut self) -> Result<(), MapFailure> {
        for (k, v) in self.connections.all()?.into_iter().filter(|(k, _)| k.proto == UDP) {
            // Our programs know better by now, or there is no room.
            let _ = self.datagrams.table.insert(k, v, NEW);
        }
        Ok(())
    }

    /// Connected sockets that were given a backend.
    pub fn connected(&self) -> Result<Vec<(SockKey, SockReverse)>, MapFailure> {
        let key = |cookie, p: &SockPeer| SockKey {
            cookie,
            addr: p.addr,
            port: p.port,
            proto: p.proto,
            ..SockKey::default()
        };
        Ok(self.reverse.all()?.into_iter().map(|(cookie, p)| (key(cookie, &p), p.name)).collect())
    }

    /// Takes over connected sockets from the table of an older layout, which is keyed by their peers as well.
    pub(crate) fn adopt_peers(&mut self, old: MapData) -> Result<(), MapError> {
        let old: Table<SockKey, SockReverse> = Table::try_from(Map::LruHashMap(old))?;
        for (k, name) in old.iter().flatten() {
            let peer = SockPeer { addr: k.addr, port: k.port, proto: k.proto, pad: 0, name };
            // Our programs know better by now, or there is no room.
            let _ = self.reverse.table.insert(k.cookie, peer, NEW);
        }
        Ok(())
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
        let peer = self.reverse.table.get(&key.cookie, 0);
        // It may be connected to somebody else by now.
        if peer.is_ok_and(|p| (p.addr, p.port) == (key.addr, key.port)) {
            self.reverse.del(&key.cookie)?;
        }
        self.sent.del(key)
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

/// A map by its descriptor, through which many entries go in one system call.
struct Handle {
    name: &'static str,
    fd: OwnedFd,
    capacity: u32,
}

impl Handle {
    /// Passes on all entries, each with so many values. Entries that change meanwhile may be missing; the walk always ends.
    fn each<K: Pod, V: Pod>(&self, values: usize, each: impl FnMut(K, &[V])) -> Result<(), MapFailure> {
        sys::lookup_batches(self.fd.as_fd(), self.capacity, values, each).map_err(|e| self.failed(e))
    }

    /// Puts entries, with the same number of values for each key.
    fn put<K: Pod, V: Pod>(&self, keys: &[K], values: &[V]) -> Result<(), MapFailure> {
        sys::update_batch(self.fd.as_fd(), keys, values).map_err(|e| self.failed(e))
    }

    fn failed(&self, e: io::Error) -> MapFailure {
        match e.raw_os_error() {
            Some(libc::E2BIG) => MapFailure::Full { map: self.name },
            _ => MapFailure::Syscall { map: self.name, source: Box::new(e) },
        }
    }
}

/// A table that is read or filled as a whole, too.
struct Bulk<K, V> {
    table: Table<K, V>,
    handle: Handle,
}

impl<K: Pod, V: Pod> Bulk<K, V> {
    fn take(from: &mut dyn Source, name: &'static str) -> Result<Self, Error> {
        let (table, handle) = take_whole(from, name)?;
        Ok(Bulk { table, handle })
    }

    /// All entries, many in one system call, as [`Handle::each`] has them.
    fn all(&self) -> Result<Vec<(K, V)>, MapFailure> {
        let fd = self.handle.fd.as_fd();
        sys::lookup_batch(fd, self.handle.capacity).map_err(|e| self.handle.failed(e))
    }

    fn put_all(&self, pairs: &Pairs<K, V>) -> Result<(), MapFailure> {
        self.handle.put(&pairs.0, &pairs.1)
    }

    fn put(&mut self, k: K, v: V) -> Result<(), MapFailure> {
        put(self.handle.name, &mut self.table, k, v)
    }

    /// Deleting what is not there succeeds.
    fn del(&mut self, k: &K) -> Result<(), MapFailure> {
        del(self.handle.name, &mut self.table, k)
    }
}

impl Filter {
    /// Writes a word that changed.
    fn write(&mut self, word: Option<Word>) -> Result<(), MapFailure> {
        word.map_or(Ok(()), |(i, word)| self.words.set(i, word, 0)).map_err(|e| failure("FILTER", e))
    }
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

impl Maps for RealMaps {
    fn apply(&mut self, op: &Op) -> Result<(), MapFailure> {
        match op {
            Op::PutBackend(id, b) => self.backends.put(*id, *b),
            Op::DelBackend(id) => self.backends.del(id),
            Op::PutSlot(k, id) => self.slots.put(*k, *id),
            Op::DelSlot(k) => self.slots.del(k),
            Op::PutMember(k) => self.members.put(*k, 1),
            Op::DelMember(k) => self.members.del(k),
            Op::PutMaglev(set, t) => put("MAGLEV", &mut self.maglev, *set, table(t)),
            Op::DelMaglev(set) => del("MAGLEV", &mut self.maglev, set),
            Op::PutService(n, name) => {
                let zero = PerCpuValues::try_from(vec![Stats::default(); self.cpus])
                    .map_err(|e| MapFailure::Syscall { map: "STATS", source: Box::new(e) })?;
                self.stats.insert(n, zero, 0).map_err(|e| failure("STATS", e))?;
                self.names.put(*n, **name)
            }
            Op::DelService(n) => {
                missing("STATS", self.stats.remove(n))?;
                self.names.del(n)
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
            Op::PutLocal(a, f) => self.locals.put(*a, *f),
            Op::DelLocal(a) => self.locals.del(a),
        }
    }

    fn put_all(&mut self, ops: Vec<Op>) -> Result<(), MapFailure> {
        let (mut backends, mut slots, mut members) = <(Pairs<_, _>, Pairs<_, _>, Pairs<_, _>)>::default();
        let (mut names, mut frontends) = <(Pairs<_, _>, Pairs<_, _>)>::default();
        let mut others = Vec::new();
        for op in ops {
            match op {
                Op::PutBackend(id, b) => backends.push(id, b),
                Op::PutSlot(k, id) => slots.push(k, id),
                Op::PutMember(k) => members.push(k, 1),
                Op::PutService(n, name) => names.push(n, *name),
                Op::PutFrontend(k, v) => frontends.push(k, v),
                other => others.push(other),
            }
        }
        self.backends.put_all(&backends)?;
        self.slots.put_all(&slots)?;
        self.members.put_all(&members)?;
        others.iter().try_for_each(|op| self.apply(op))?;
        let zero = vec![Stats::default(); names.0.len() * self.cpus];
        self.stats_all.put(&names.0, &zero)?;
        self.names.put_all(&names)?;
        self.frontends.put_all(&frontends)
    }

    /// Brings the filter in step with the frontends and connections that are there.
    fn show(&mut self) -> Result<(), MapFailure> {
        let Some(filter) = &mut self.filter else { return Ok(()) };
        let mut there = Vec::new();
        self.frontends.handle.each(1, |k, _: &[FrontendValue]| there.push(k))?;
        // A TCP connection goes on when its frontend goes.
        self.connections.handle.each(1, |k: CtKey, _: &[CtValue]| {
            if k.dir == ct_dir::FORWARD && k.proto == TCP {
                there.push(FrontendKey { addr: k.dst, port: k.dport, proto: TCP, scope: SCOPE_EXTERNAL });
            }
        })?;
        filter.listed = Listed::new(there);
        let mut changed = Pairs(Vec::new(), Vec::new());
        let wanted = filter.listed.words();
        filter.all.each(1, |i: u32, have: &[u64]| {
            if let Some(word) = wanted.get(i as usize).filter(|w| **w != have[0]) {
                changed.push(i, *word);
            }
        })?;
        filter.all.put(&changed.0, &changed.1)
    }

    fn dump(&self) -> Result<Dump, MapFailure> {
        let maglev = self.maglev.keys().collect::<Result<_, _>>().map_err(|e| failure("MAGLEV", e))?;
        Ok(Dump {
            frontends: self.frontends.all()?.into_iter().collect(),
            slots: self.slots.all()?.into_iter().collect(),
            members: self.members.all()?.into_iter().collect(),
            maglev,
            backends: self.backends.all()?.into_iter().collect(),
            services: self.service_names()?,
            ranges: self
                .ranges
                .keys()
                .map(|k| k.map(|k| (k.data(), k.prefix_len().saturating_sub(RANGE_HEAD) as u8)))
                .collect::<Result<_, _>>()
                .map_err(|e| failure("RANGES", e))?,
            locals: self.locals.all()?.into_iter().collect(),
        })
    }
}
