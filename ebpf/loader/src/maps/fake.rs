//! Maps in memory, and maps that fail, for tests of whatever writes maps.

use super::{Dump, MapFailure, Maps, Op};

/// Maps in memory.
#[derive(Default, Debug)]
pub struct FakeMaps {
    pub content: Dump,
    /// Changes carried out so far.
    pub writes: usize,
}

impl Maps for FakeMaps {
    fn apply(&mut self, op: &Op) -> Result<(), MapFailure> {
        self.writes += 1;
        let c = &mut self.content;
        match op {
            Op::PutBackend(id, b) => drop(c.backends.insert(*id, *b)),
            Op::DelBackend(id) => drop(c.backends.remove(id)),
            Op::PutSlot(k, id) => drop(c.slots.insert(*k, *id)),
            Op::DelSlot(k) => drop(c.slots.remove(k)),
            Op::PutMember(k) => drop(c.members.insert(*k, 1)),
            Op::DelMember(k) => drop(c.members.remove(k)),
            Op::PutMaglev(set, _) => {
                c.maglev.retain(|s| s != set);
                c.maglev.push(*set);
            }
            Op::DelMaglev(set) => c.maglev.retain(|s| s != set),
            Op::PutService(n, name) => drop(c.services.insert(*n, name.to_string())),
            Op::DelService(n) => drop(c.services.remove(n)),
            Op::PutRange(r) => drop(c.ranges.insert(*r)),
            Op::DelRange(r) => drop(c.ranges.remove(r)),
            Op::PutFrontend(k, v) => drop(c.frontends.insert(*k, *v)),
            Op::DelFrontend(k) => drop(c.frontends.remove(k)),
            Op::PutLocal(a, f) => drop(c.locals.insert(*a, *f)),
            Op::DelLocal(a) => drop(c.locals.remove(a)),
        }
        Ok(())
    }

    fn dump(&self) -> Result<Dump, MapFailure> {
        Ok(self.content.clone())
    }
}

/// Passes changes on, except those that `fails` picks (it gets the change's number, from 0).
pub struct FaultyMaps<M, F> {
    pub inner: M,
    pub fails: F,
    pub seen: usize,
}

impl<M: Maps, F: FnMut(usize) -> bool> Maps for FaultyMaps<M, F> {
    fn apply(&mut self, op: &Op) -> Result<(), MapFailure> {
        let n = self.seen;
        self.seen += 1;
        if (self.fails)(n) {
            let source = std::io::Error::other("injected").into();
            return Err(MapFailure::Syscall { map: op.map(), source });
        }
        self.inner.apply(op)
    }

    fn dump(&self) -> Result<Dump, MapFailure> {
        self.inner.dump()
    }
}
