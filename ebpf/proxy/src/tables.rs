//! What is in the maps, and the changes that bring it to what is desired.
//!
//! Order within a Service keeps every moment consistent: backends, then slots, then the frontend that counts them; and
//! the other way round when something goes. A change that fails leaves the tables knowing exactly what was written, so
//! trying again does the rest. Pure apart from [`Maps`].

use std::collections::HashMap as StdMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;

use foldhash::{HashMap, HashSet, HashSetExt};
use orlop_ebpf_common::{
    Addr, Backend, FrontendKey, FrontendValue, RangeKey, SERVICE_RANGE, ServiceName, SlotKey, addr_to,
    frontend_flags, is_v4, local_flags, maglev,
};
use orlop_ebpf_loader::{Dump, MapFailure, Maps, Op, Range};

use crate::desired::{Desired, Set, SetKey};
use crate::model::Name;

/// A set in the maps.
#[derive(Debug)]
struct InMap {
    id: u32,
    /// What each slot holds.
    slots: Vec<u32>,
    /// Backends that this set keeps alive, among them all in `slots`; sorted.
    held: Vec<u32>,
    /// Backends listed as members; sorted.
    members: Vec<u32>,
    /// The backends in the Maglev table, when there is one.
    maglev: Option<Vec<u32>>,
}

#[derive(Debug, Default)]
struct Programmed {
    sets: Vec<(SetKey, InMap)>,
    frontends: Vec<FrontendKey>,
    /// Numbers of service ports.
    numbers: Vec<((u16, u8), u32)>,
}

impl Programmed {
    /// Gives back what lists reserved to grow: there are thousands of them.
    fn shrink(&mut self) {
        self.sets.shrink_to_fit();
        for (_, s) in &mut self.sets {
            s.slots.shrink_to_fit();
            s.held.shrink_to_fit();
            s.members.shrink_to_fit();
        }
        self.frontends.shrink_to_fit();
        self.numbers.shrink_to_fit();
    }
}

#[derive(Debug)]
struct Front {
    value: FrontendValue,
    /// `None`: found in the maps at start, not claimed yet.
    owner: Option<Name>,
}

type Endpoint = (Addr, u16, u8);

#[derive(Debug)]
struct InUse {
    id: u32,
    flags: u8,
    /// Sets that hold it.
    sets: u32,
}

impl InUse {
    /// This set keeps it, too, if it did not before.
    fn hold(&mut self, set: &mut InMap) {
        if let Err(at) = set.held.binary_search(&self.id) {
            set.held.insert(at, self.id);
            self.sets += 1;
        }
    }
}

/// The maps' content as user space knows it.
#[derive(Default)]
pub struct Tables {
    services: HashMap<Name, Programmed>,
    frontends: HashMap<FrontendKey, Front>,
    backends: HashMap<Endpoint, InUse>,
    endpoint_of: HashMap<u32, Endpoint>,
    /// Sets found at start that no service has claimed yet.
    orphans: HashMap<u32, InMap>,
    /// Numbers found at start, by the names of service ports that have not claimed them yet.
    unclaimed: HashMap<String, u32>,
    /// Services and their ports by number.
    owners: HashMap<u32, (Name, (u16, u8))>,
    /// Source ranges in the maps, by number.
    ranges: HashMap<u32, Vec<Range>>,
    /// Backends left sets since this was last asked.
    lost: bool,
    locals: HashMap<Addr, u32>,
    /// Services that want a frontend which another one has.
    contested: HashSet<Name>,
    last_backend: u32,
    last_set: u32,
    last_number: u32,
    writes: u64,
}

/// What a sync left to do.
#[derive(Debug, Default, PartialEq)]
pub struct Outcome {
    /// Services that may now get a frontend that was taken before.
    pub retry: Vec<Name>,
}

impl Tables {
    /// Takes over what the maps hold from an earlier process.
    pub fn adopt(dump: Dump) -> Tables {
        let mut t = Tables { locals: dump.locals.into_iter().collect(), ..Tables::default() };
        t.backends.reserve(dump.backends.len());
        t.endpoint_of.reserve(dump.backends.len());
        t.frontends.reserve(dump.frontends.len());
        for (id, b) in dump.backends {
            t.last_backend = t.last_backend.max(id);
            let endpoint = (b.addr, b.port, b.proto);
            t.endpoint_of.insert(id, endpoint);
            t.backends.insert(endpoint, InUse { id, flags: b.flags, sets: 0 });
        }
        let mut slots: Vec<(SlotKey, u32)> = dump.slots.into_iter().collect();
        slots.sort_by_key(|(k, _)| (k.set, k.slot));
        let empty = |id| InMap { id, slots: vec![], held: vec![], members: vec![], maglev: None };
        for (k, backend) in slots {
            let set = t.orphans.entry(k.set).or_insert_with(|| empty(k.set));
            // A hole cannot come from us; what lies behind one would never be used, 0 marks it.
            set.slots.resize(k.slot as usize, 0);
            set.slots.push(backend);
        }
        let mut members: Vec<SlotKey> = dump.members.into_keys().collect();
        members.sort_unstable_by_key(|k| (k.set, k.slot));
        for k in members {
            t.orphans.entry(k.set).or_insert_with(|| empty(k.set)).members.push(k.slot);
        }
        for set in dump.maglev {
            t.orphans.entry(set).or_insert_with(|| empty(set)).maglev = Some(vec![]);
        }
        for (key, value) in dump.frontends {
            t.last_number = t.last_number.max(value.service);
            t.last_set = t.last_set.max(value.set);
            t.frontends.insert(key, Front { value, owner: None });
        }
        for (number, name) in dump.services {
            t.last_number = t.last_number.max(number);
            if let Some(other) = t.unclaimed.insert(name, number) {
                // Two ports of one name: the other's number has no claim and goes.
                t.unclaimed.insert(format!("#{other}"), other);
            }
        }
        for r in dump.ranges {
            t.ranges.entry(r.0.service).or_default().push(r);
        }
        t.last_set = t.orphans.keys().copied().max().unwrap_or(0).max(t.last_set);
        let orphans: Vec<u32> = t.orphans.keys().copied().collect();
        for id in orphans {
            if let Some(mut set) = t.orphans.remove(&id) {
                for b in set.slots.clone() {
                    t.hold_id(&mut set, b);
                }
                t.orphans.insert(id, set);
            }
        }
        t
    }

    /// Flows of an earlier process remember numbers up to these, so they are not given again.
    pub fn keep_clear_of(&mut self, backend: u32, number: u32) {
        self.last_backend = self.last_backend.max(backend);
        self.last_number = self.last_number.max(number);
    }

    /// Changes of maps so far.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// Number of frontends and of backends in the maps.
    pub fn sizes(&self) -> (usize, usize) {
        (self.frontends.len(), self.backends.len())
    }

    /// Whether backends left sets since this was last asked: sockets may be left without theirs.
    pub fn take_lost(&mut self) -> bool {
        std::mem::take(&mut self.lost)
    }

    /// The Service, and its port, that has a number.
    pub fn owner(&self, number: u32) -> Option<(&Name, (u16, u8))> {
        self.owners.get(&number).map(|(name, port)| (name, *port))
    }

    /// Whether a service port may send to this backend.
    pub fn serves(&self, name: &str, port: (u16, u8), addr: &Addr, backend_port: u16) -> bool {
        let Some(used) = self.backends.get(&(*addr, backend_port, port.1)) else { return false };
        self.services
            .get(name)
            .is_some_and(|p| p.sets.iter().any(|(k, s)| (k.port, k.proto) == port && has(&s.held, used.id)))
    }

    /// Brings one service's entries to what is desired; an empty `desired` removes them.
    pub fn sync(
        &mut self,
        maps: &mut dyn Maps,
        name: &Name,
        desired: &Desired,
    ) -> Result<Outcome, MapFailure> {
        let mut p = self.services.remove(name).unwrap_or_default();
        let result = self.sync_service(maps, name, desired, &mut p);
        p.shrink();
        if !(p.sets.is_empty() && p.frontends.is_empty() && p.numbers.is_empty()) {
            self.services.insert(name.clone(), p);
        }
        result
    }

    fn sync_service(
        &mut self,
        maps: &mut dyn Maps,
        name: &Name,
        desired: &Desired,
        p: &mut Programmed,
    ) -> Result<Outcome, MapFailure> {
        let mut out = Outcome::default();
        self.contested.remove(name);
        let mut mine = Vec::with_capacity(desired.frontends.len());
        for f in &desired.frontends {
            match self.frontends.get(&f.key).and_then(|o| o.owner.as_ref()) {
                Some(other) if other != name => {
                    self.contested.insert(name.clone());
                }
                _ => mine.push(f),
            }
        }
        for (i, set) in desired.sets.iter().enumerate() {
            let keys: Vec<FrontendKey> = mine.iter().filter(|f| f.set == i).map(|f| f.key).collect();
            if keys.is_empty() {
                continue;
            }
            let at = self.set_in_map(p, set.key, &keys);
            let in_map = &mut p.sets[at].1;
            self.grow(maps, in_map, set)?;
        }
        for f in &mine {
            let set = &desired.sets[f.set];
            let Some((_, in_map)) = p.sets.iter().find(|(k, _)| *k == set.key) else { continue };
            let mut flags = frontend_flags::MEMBERS;
            if desired.affinity_seconds > 0 {
                flags |= frontend_flags::AFFINITY;
            }
            if f.hidden {
                flags |= frontend_flags::DROP_WHEN_EMPTY;
            }
            if set.maglev && in_map.maglev.is_some() {
                flags |= frontend_flags::MAGLEV;
            }
            if f.ranged {
                flags |= frontend_flags::RANGES;
                if desired.node_admitted[usize::from(!is_v4(&f.key.addr))] {
                    flags |= frontend_flags::NODE_ADMITTED;
                }
            }
            let id = in_map.id;
            let number = self.number(maps, name, desired, p, set.key)?;
            let value = FrontendValue {
                set: id,
                count: set.backends.len() as u32,
                service: number,
                affinity_seconds: desired.affinity_seconds,
                flags,
            };
            self.put_frontend(maps, name, p, f.key, value)?;
        }
        let wanted: HashSet<FrontendKey> = mine.iter().map(|f| f.key).collect();
        for key in p.frontends.clone() {
            if !wanted.contains(&key) {
                self.write(maps, &Op::DelFrontend(key))?;
                self.frontends.remove(&key);
                p.frontends.retain(|k| *k != key);
                out.retry = self.contested.iter().filter(|c| *c != name).cloned().collect();
            }
        }
        self.shrink_sets(maps, desired, &wanted, p)?;
        Ok(out)
    }

    fn shrink_sets(
        &mut self,
        maps: &mut dyn Maps,
        desired: &Desired,
        frontends: &HashSet<FrontendKey>,
        p: &mut Programmed,
    ) -> Result<(), MapFailure> {
        let mut i = 0;
        while i < p.sets.len() {
            let key = p.sets[i].0;
            let set = desired.sets.iter().enumerate().find(|(_, s)| s.key == key).filter(|(at, _)| {
                desired.frontends.iter().any(|f| f.set == *at && frontends.contains(&f.key))
            });
            match set {
                Some((_, set)) => {
                    self.shrink(maps, &mut p.sets[i].1, set)?;
                    i += 1;
                }
                None => {
                    self.clear(maps, &mut p.sets[i].1)?;
                    p.sets.remove(i);
                }
            }
        }
        let mut i = 0;
        while let Some((port, number)) = p.numbers.get(i).copied() {
            if p.sets.iter().any(|(k, _)| (k.port, k.proto) == port) {
                i += 1;
                continue;
            }
            self.drop_number(maps, number)?;
            p.numbers.swap_remove(i);
        }
        Ok(())
    }

    /// Where the set is in `p`: as it was, as an earlier process left it behind one of its frontends, or new.
    fn set_in_map(&mut self, p: &mut Programmed, key: SetKey, frontends: &[FrontendKey]) -> usize {
        if let Some(at) = p.sets.iter().position(|(k, _)| *k == key) {
            return at;
        }
        let nobody = |id| InMap { id, slots: vec![], held: vec![], members: vec![], maglev: None };
        if key.rest {
            // The same at every start, so that nothing is written then.
            p.sets.push((key, nobody(0)));
            return p.sets.len() - 1;
        }
        let mut found = None;
        for f in frontends {
            if let Some(front) = self.frontends.get(f).filter(|f| f.owner.is_none()) {
                // Where a set without backends is shared, either service may keep it; no entry tells them apart.
                found = self.orphans.remove(&front.value.set);
                if found.is_some() {
                    break;
                }
            }
        }
        let in_map = found.unwrap_or_else(|| {
            self.last_set += 1;
            nobody(self.last_set)
        });
        p.sets.push((key, in_map));
        p.sets.len() - 1
    }

    /// The service port's number, which its name, counters, source ranges and clients' affinity are filed under; kept
    /// over restarts.
    fn number(
        &mut self,
        maps: &mut dyn Maps,
        name: &Name,
        desired: &Desired,
        p: &mut Programmed,
        set: SetKey,
    ) -> Result<u32, MapFailure> {
        let port = (set.port, set.proto);
        let n = match p.numbers.iter().find(|(k, _)| *k == port) {
            Some((_, n)) => *n,
            None => {
                let label = desired.names.iter().find(|(k, _)| *k == port).map_or("", |(_, n)| n);
                let full = if label.is_empty() { name.to_string() } else { format!("{name}:{label}") };
                let stored = ServiceName::new(&full);
                let n = match self.unclaimed.remove(&stored.to_string()) {
                    Some(n) => n,
                    None => {
                        let n = self.last_number + 1;
                        self.write(maps, &Op::PutService(n, Box::new(stored)))?;
                        self.last_number = n;
                        n
                    }
                };
                p.numbers.push((port, n));
                self.owners.insert(n, (name.clone(), port));
                n
            }
        };
        self.sync_ranges(maps, n, &desired.ranges)?;
        Ok(n)
    }

    /// Brings the ranges of addresses that are Services' alone to `wanted`.
    pub fn sync_service_range(&mut self, maps: &mut dyn Maps, wanted: &[Range]) -> Result<(), MapFailure> {
        self.sync_ranges(maps, SERVICE_RANGE, wanted)
    }

    /// New ranges first: who is admitted before and after is admitted all the time.
    fn sync_ranges(&mut self, maps: &mut dyn Maps, number: u32, wanted: &[Range]) -> Result<(), MapFailure> {
        if wanted.is_empty() && !self.ranges.contains_key(&number) {
            return Ok(());
        }
        let wanted: Vec<Range> =
            wanted.iter().map(|(k, bits)| (RangeKey { service: number, ..*k }, *bits)).collect();
        for r in &wanted {
            if !self.ranges.get(&number).is_some_and(|l| l.contains(r)) {
                self.write(maps, &Op::PutRange(*r))?;
                self.ranges.entry(number).or_default().push(*r);
            }
        }
        for r in self.ranges.get(&number).cloned().unwrap_or_default() {
            if !wanted.contains(&r) {
                self.write(maps, &Op::DelRange(r))?;
                self.ranges.entry(number).or_default().retain(|o| *o != r);
            }
        }
        if wanted.is_empty() {
            self.ranges.remove(&number);
        }
        Ok(())
    }

    fn drop_number(&mut self, maps: &mut dyn Maps, number: u32) -> Result<(), MapFailure> {
        self.sync_ranges(maps, number, &[])?;
        self.write(maps, &Op::DelService(number))?;
        self.owners.remove(&number);
        Ok(())
    }

    /// First half of changing a set: everything that the new frontends will need.
    fn grow(&mut self, maps: &mut dyn Maps, in_map: &mut InMap, set: &Set) -> Result<(), MapFailure> {
        let count = set.backends.len();
        for list in [&mut in_map.held, &mut in_map.members, &mut in_map.slots] {
            list.reserve_exact(count.saturating_sub(list.len()));
        }
        let mut ids = Vec::with_capacity(count);
        for b in &set.backends {
            ids.push(self.hold(maps, in_map, b)?);
        }
        for id in &ids {
            if let Err(at) = in_map.members.binary_search(id) {
                self.write(maps, &Op::PutMember(SlotKey { set: in_map.id, slot: *id }))?;
                in_map.members.insert(at, *id);
            }
        }
        for (slot, id) in arrange(&in_map.slots, &ids).into_iter().enumerate() {
            if in_map.slots.get(slot) != Some(&id) {
                self.write(maps, &Op::PutSlot(SlotKey { set: in_map.id, slot: slot as u32 }, id))?;
                if slot < in_map.slots.len() {
                    in_map.slots[slot] = id;
                } else {
                    in_map.slots.push(id);
                }
            }
        }
        if set.maglev {
            ids.sort_unstable();
            if in_map.maglev.as_ref() != Some(&ids) {
                let table = self.maglev_table(&set.backends);
                match self.write(maps, &Op::PutMaglev(in_map.id, table)) {
                    Ok(()) => in_map.maglev = Some(ids),
                    // Slots serve as well, without agreement between nodes.
                    Err(e @ MapFailure::Full { .. }) => {
                        tracing::warn!(error = %e, "a service goes without Maglev")
                    }
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(())
    }

    fn maglev_table(&self, backends: &[Backend]) -> Box<[u32; maglev::SIZE]> {
        let mut seeded: Vec<(u64, u32)> = backends
            .iter()
            .filter_map(|b| {
                let id = self.backends.get(&(b.addr, b.port, b.proto))?.id;
                Some((seed(b), id))
            })
            .collect();
        seeded.sort_unstable();
        let seeds: Vec<u64> = seeded.iter().map(|(s, _)| *s).collect();
        let mut table = Box::new([0; maglev::SIZE]);
        maglev::fill(&seeds, &mut table);
        for entry in table.iter_mut() {
            *entry = seeded.get(*entry as usize).map_or(0, |(_, id)| *id);
        }
        table
    }

    /// Second half: what no frontend uses any more goes.
    fn shrink(&mut self, maps: &mut dyn Maps, in_map: &mut InMap, set: &Set) -> Result<(), MapFailure> {
        // All that is wanted is there since the first half, so that nothing more is when there are as many.
        let lists = [&in_map.slots, &in_map.members, &in_map.held];
        if lists.iter().all(|l| l.len() == set.backends.len()) && (set.maglev || in_map.maglev.is_none()) {
            return Ok(());
        }
        let keep: HashSet<u32> = set
            .backends
            .iter()
            .filter_map(|b| self.backends.get(&(b.addr, b.port, b.proto)).map(|u| u.id))
            .collect();
        self.trim(maps, in_map, set.backends.len(), &keep, set.maglev)
    }

    fn clear(&mut self, maps: &mut dyn Maps, in_map: &mut InMap) -> Result<(), MapFailure> {
        self.trim(maps, in_map, 0, &HashSet::new(), false)
    }

    fn trim(
        &mut self,
        maps: &mut dyn Maps,
        in_map: &mut InMap,
        count: usize,
        keep: &HashSet<u32>,
        maglev: bool,
    ) -> Result<(), MapFailure> {
        if !maglev && in_map.maglev.is_some() {
            self.write(maps, &Op::DelMaglev(in_map.id))?;
            in_map.maglev = None;
        }
        while in_map.slots.len() > count {
            let slot = in_map.slots.len() as u32 - 1;
            self.write(maps, &Op::DelSlot(SlotKey { set: in_map.id, slot }))?;
            in_map.slots.pop();
        }
        let set = in_map.id;
        without(&mut in_map.members, keep, |id| self.write(maps, &Op::DelMember(SlotKey { set, slot: id })))?;
        without(&mut in_map.held, keep, |id| {
            self.lost = true;
            self.release(maps, id)
        })
    }

    /// Makes sure that the backend is in its map and that this set keeps it there.
    fn hold(&mut self, maps: &mut dyn Maps, set: &mut InMap, b: &Backend) -> Result<u32, MapFailure> {
        let endpoint = (b.addr, b.port, b.proto);
        match self.backends.entry(endpoint) {
            Entry::Occupied(mut known) => {
                let used = known.get_mut();
                if used.flags != b.flags {
                    self.writes += 1;
                    maps.apply(&Op::PutBackend(used.id, *b))?;
                    used.flags = b.flags;
                }
                used.hold(set);
                Ok(used.id)
            }
            Entry::Vacant(place) => {
                // Ids are not used again: a connection may remember one for long.
                let id = self.last_backend + 1;
                self.writes += 1;
                maps.apply(&Op::PutBackend(id, *b))?;
                self.last_backend = id;
                self.endpoint_of.insert(id, endpoint);
                place.insert(InUse { id, flags: b.flags, sets: 0 }).hold(set);
                Ok(id)
            }
        }
    }

    fn hold_id(&mut self, set: &mut InMap, id: u32) {
        if let Some(used) = self.endpoint_of.get(&id).and_then(|e| self.backends.get_mut(e)) {
            used.hold(set);
        }
    }

    fn release(&mut self, maps: &mut dyn Maps, id: u32) -> Result<(), MapFailure> {
        let Some(endpoint) = self.endpoint_of.get(&id).copied() else { return Ok(()) };
        if self.backends.get(&endpoint).is_some_and(|u| u.sets > 1) {
            if let Some(u) = self.backends.get_mut(&endpoint) {
                u.sets -= 1;
            }
            return Ok(());
        }
        self.write(maps, &Op::DelBackend(id))?;
        self.backends.remove(&endpoint);
        self.endpoint_of.remove(&id);
        Ok(())
    }

    fn put_frontend(
        &mut self,
        maps: &mut dyn Maps,
        name: &Name,
        p: &mut Programmed,
        key: FrontendKey,
        value: FrontendValue,
    ) -> Result<(), MapFailure> {
        let owner = Some(name.clone());
        match self.frontends.entry(key) {
            Entry::Occupied(mut known) => {
                let front = known.get_mut();
                if front.value != value {
                    self.writes += 1;
                    maps.apply(&Op::PutFrontend(key, value))?;
                }
                *front = Front { value, owner };
            }
            Entry::Vacant(place) => {
                self.writes += 1;
                maps.apply(&Op::PutFrontend(key, value))?;
                place.insert(Front { value, owner });
            }
        }
        if !p.frontends.contains(&key) {
            p.frontends.push(key);
        }
        Ok(())
    }

    /// Removes what an earlier process left and no service has claimed. To be called when all services are known.
    pub fn drop_orphans(&mut self, maps: &mut dyn Maps) -> Result<(), MapFailure> {
        let stale: Vec<FrontendKey> =
            self.frontends.iter().filter(|(_, f)| f.owner.is_none()).map(|(k, _)| *k).collect();
        for key in stale {
            self.write(maps, &Op::DelFrontend(key))?;
            self.frontends.remove(&key);
        }
        let sets: Vec<u32> = self.orphans.keys().copied().collect();
        for id in sets {
            if let Some(mut set) = self.orphans.remove(&id) {
                let cleared = self.clear(maps, &mut set);
                if cleared.is_err() {
                    self.orphans.insert(id, set);
                }
                cleared?;
            }
        }
        let numbers: Vec<(String, u32)> = self.unclaimed.iter().map(|(l, n)| (l.clone(), *n)).collect();
        for (label, number) in numbers {
            self.drop_number(maps, number)?;
            self.unclaimed.remove(&label);
        }
        let used: HashSet<u32> = self.services.values().flat_map(|p| &p.numbers).map(|(_, n)| *n).collect();
        let of_ports = self.ranges.keys().filter(|n| **n != SERVICE_RANGE);
        let stray: Vec<u32> = of_ports.filter(|n| !used.contains(n)).copied().collect();
        for number in stray {
            self.sync_ranges(maps, number, &[])?;
        }
        let unused: Vec<(Endpoint, u32)> =
            self.backends.iter().filter(|(_, u)| u.sets == 0).map(|(e, u)| (*e, u.id)).collect();
        for (endpoint, id) in unused {
            self.write(maps, &Op::DelBackend(id))?;
            self.backends.remove(&endpoint);
            self.endpoint_of.remove(&id);
        }
        Ok(())
    }

    /// The node's addresses that node ports answer on.
    pub fn node_port_ips(&self) -> Vec<IpAddr> {
        let serving = self.locals.iter().filter(|(_, f)| **f & local_flags::NODE_PORT != 0);
        serving.map(|(a, _)| addr_to(a)).collect()
    }

    /// Brings the node's own addresses, with their flags, to `wanted`.
    pub fn sync_locals(&mut self, maps: &mut dyn Maps, wanted: &StdMap<Addr, u32>) -> Result<(), MapFailure> {
        for (addr, flags) in wanted {
            if self.locals.get(addr) != Some(flags) {
                self.write(maps, &Op::PutLocal(*addr, *flags))?;
                self.locals.insert(*addr, *flags);
            }
        }
        let gone: Vec<Addr> = self.locals.keys().filter(|a| !wanted.contains_key(*a)).copied().collect();
        for addr in gone {
            self.write(maps, &Op::DelLocal(addr))?;
            self.locals.remove(&addr);
        }
        Ok(())
    }

    fn write(&mut self, maps: &mut dyn Maps, op: &Op) -> Result<(), MapFailure> {
        self.writes += 1;
        maps.apply(op)
    }
}

fn has(sorted: &[u32], id: u32) -> bool {
    sorted.binary_search(&id).is_ok()
}

/// Removes what is not in `keep`, each id after `remove` has; what a failure leaves stays listed.
fn without(
    list: &mut Vec<u32>,
    keep: &HashSet<u32>,
    mut remove: impl FnMut(u32) -> Result<(), MapFailure>,
) -> Result<(), MapFailure> {
    let mut result = Ok(());
    list.retain(|id| {
        if keep.contains(id) || result.is_err() {
            return true;
        }
        result = remove(*id);
        result.is_err()
    });
    result
}

/// The wanted ids in an order that leaves as many as possible where they are.
fn arrange(old: &[u32], wanted: &[u32]) -> Vec<u32> {
    // Most are new, or others come behind them.
    if old.iter().zip(wanted).all(|(o, w)| o == w) {
        return wanted.to_vec();
    }
    let set: HashSet<u32> = wanted.iter().copied().collect();
    let mut kept: HashSet<u32> = HashSet::new();
    let mut out: Vec<u32> = (0..wanted.len())
        .map(|i| match old.get(i) {
            Some(id) if set.contains(id) && kept.insert(*id) => *id,
            _ => 0,
        })
        .collect();
    let mut rest = wanted.iter().filter(|id| !kept.contains(id));
    for slot in out.iter_mut().filter(|s| **s == 0) {
        if let Some(id) = rest.next() {
            *slot = *id;
        }
    }
    out
}

/// Stands for a backend in Maglev tables: the same on every node.
fn seed(b: &Backend) -> u64 {
    let mut h = 0xcbf2_9ce4_8422_2325_u64;
    for byte in b.addr.iter().flat_map(|w| w.to_ne_bytes()).chain(b.port.to_be_bytes()).chain([b.proto]) {
        h = (h ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    h
}

#[cfg(test)]
mod tests;
