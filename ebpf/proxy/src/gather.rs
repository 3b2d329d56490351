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

    /// Carries out what waits, and lets programs find it all, also after a failure.
    pub fn finish(mut self) -> Result<(), MapFailure> {
        let put = self.flush();
        put.and(self.maps.show())
    }

    fn flush(&mut self) -> Result<(), MapFailure> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use orlop_ebpf_common::Backend;

    /// How many changes came at once, and how often they were shown; can be made to fail.
    #[derive(Default)]
    struct Counted {
        put: Vec<usize>,
        shown: usize,
        fails: bool,
    }

    impl Maps for Counted {
        fn apply(&mut self, op: &Op) -> Result<(), MapFailure> {
            panic!("one by one: {op:?}");
        }

        fn put_all(&mut self, ops: Vec<Op>) -> Result<(), MapFailure> {
            self.put.push(ops.len());
            if self.fails { Err(MapFailure::Full { map: "BACKENDS" }) } else { Ok(()) }
        }

        fn show(&mut self) -> Result<(), MapFailure> {
            self.shown += 1;
            Ok(())
        }

        fn dump(&self) -> Result<Dump, MapFailure> {
            Ok(Dump::default())
        }
    }

    #[test]
    fn many_changes_are_shown_once_and_so_are_those_before_a_failure() {
        let op = |i| Op::PutBackend(i, Backend::default());
        let mut maps = Counted::default();
        let mut all = Gather::new(&mut maps);
        (0..2 * LIMIT as u32 + 1).for_each(|i| all.apply(&op(i)).unwrap());
        all.finish().unwrap();
        assert_eq!((maps.put, maps.shown), (vec![LIMIT, LIMIT, 1], 1));

        let mut maps = Counted { fails: true, ..Counted::default() };
        let mut all = Gather::new(&mut maps);
        all.apply(&op(1)).unwrap();
        assert!(all.finish().is_err());
        assert_eq!(maps.shown, 1);
    }
}
