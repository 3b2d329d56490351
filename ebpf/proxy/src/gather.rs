//! Many changes in few system calls, for the first sync.

use orlop_ebpf_loader::{Dump, MapFailure, Maps, Op};

/// Changes that wait at most: about 400 KiB.
const LIMIT: usize = 8192;

/// Collects what is put and passes it on in an order in which nothing leads to what is not there yet. A failure is that
/// of any change since the last one that was passed on.
pub struct Gather<'a> {
    maps: &'a mut dyn Maps,
    puts: Vec<Op>,
}

impl<'a> Gather<'a> {
    pub fn new(maps: &'a mut dyn Maps) -> Gather<'a> {
        Gather { maps, puts: Vec::new() }
    }

    /// Carries out what waits.
    pub fn flush(&mut self) -> Result<(), MapFailure> {
        let puts = std::mem::take(&mut self.puts);
        if puts.is_empty() { Ok(()) } else { self.maps.put_all(puts) }
    }
}

impl Maps for Gather<'_> {
    fn apply(&mut self, op: &Op) -> Result<(), MapFailure> {
        if !op.is_put() {
            self.flush()?;
            return self.maps.apply(op);
        }
        self.puts.push(op.clone());
        if self.puts.len() < LIMIT { Ok(()) } else { self.flush() }
    }

    fn put_all(&mut self, ops: Vec<Op>) -> Result<(), MapFailure> {
        ops.iter().try_for_each(|op| self.apply(op))
    }

    fn dump(&self) -> Result<Dump, MapFailure> {
        self.maps.dump()
    }
}
