//! The maps as user space sees them: single changes, and a dump of all that is in them.

use std::collections::{HashMap, HashSet};

use orlop_ebpf_common::{
    Addr, Backend, FrontendKey, FrontendValue, MaglevTable, RangeKey, ServiceName, SlotKey, maglev,
};

mod fake;
mod listed;
mod real;

pub use fake::{FakeMaps, FaultyMaps};
pub use real::RealMaps;

/// A range of source addresses of a service port: its key and the number of bits of the address that count, of 128.
pub type Range = (RangeKey, u8);

/// One change of one map. Deleting what is not there succeeds.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    PutBackend(u32, Backend),
    DelBackend(u32),
    PutSlot(SlotKey, u32),
    DelSlot(SlotKey),
    PutMember(SlotKey),
    DelMember(SlotKey),
    PutMaglev(u32, Box<[u32; maglev::SIZE]>),
    DelMaglev(u32),
    /// A service port's number and name; its counters start at zero.
    PutService(u32, Box<ServiceName>),
    DelService(u32),
    PutRange(Range),
    DelRange(Range),
    PutFrontend(FrontendKey, FrontendValue),
    DelFrontend(FrontendKey),
    PutLocal(Addr, u32),
    DelLocal(Addr),
}

impl Op {
    /// The map that it changes.
    pub fn map(&self) -> &'static str {
        match self {
            Op::PutBackend(..) | Op::DelBackend(_) => "BACKENDS",
            Op::PutSlot(..) | Op::DelSlot(_) => "SLOTS",
            Op::PutMember(_) | Op::DelMember(_) => "MEMBERS",
            Op::PutMaglev(..) | Op::DelMaglev(_) => "MAGLEV",
            Op::PutService(..) | Op::DelService(_) => "NAMES",
            Op::PutRange(_) | Op::DelRange(_) => "RANGES",
            Op::PutFrontend(..) | Op::DelFrontend(_) => "FRONTENDS",
            Op::PutLocal(..) | Op::DelLocal(_) => "LOCAL_ADDRS",
        }
    }
}

impl Op {
    /// Adds or replaces an entry.
    pub fn is_put(&self) -> bool {
        match self {
            Op::PutBackend(..) | Op::PutSlot(..) | Op::PutMember(_) | Op::PutMaglev(..) => true,
            Op::PutService(..) | Op::PutRange(_) | Op::PutFrontend(..) | Op::PutLocal(..) => true,
            Op::DelBackend(_) | Op::DelSlot(_) | Op::DelMember(_) | Op::DelMaglev(_) => false,
            Op::DelService(_) | Op::DelRange(_) | Op::DelFrontend(_) | Op::DelLocal(_) => false,
        }
    }
}

/// All entries of the maps that user space writes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Dump {
    pub frontends: HashMap<FrontendKey, FrontendValue>,
    pub slots: HashMap<SlotKey, u32>,
    pub members: HashMap<SlotKey, u32>,
    /// Sets that have a Maglev table.
    pub maglev: Vec<u32>,
    pub backends: HashMap<u32, Backend>,
    /// Names of service ports by number.
    pub services: HashMap<u32, String>,
    pub ranges: HashSet<Range>,
    pub locals: HashMap<Addr, u32>,
}

/// A map that would not change or be read.
#[derive(Debug, thiserror::Error)]
pub enum MapFailure {
    #[error(
        "BPF map {map} is full; start `orlop proxy` with a larger `--map-size {}=ENTRIES` after `orlop proxy cleanup`",
        size_of(map)
    )]
    Full { map: &'static str },
    #[error("BPF map {map}")]
    Syscall { map: &'static str, source: Box<dyn std::error::Error + Send + Sync> },
}

/// The name of the capacity ([`crate::Sizes`]) that a map has.
fn size_of(map: &str) -> &'static str {
    match map {
        "SLOTS" | "MEMBERS" => "slots",
        "BACKENDS" => "backends",
        "LOCAL_ADDRS" => "addresses",
        "UPLINKS" => "interfaces",
        _ => "frontends",
    }
}

/// The maps, real or not.
pub trait Maps {
    /// Carries out one change.
    fn apply(&mut self, op: &Op) -> Result<(), MapFailure>;
    /// Carries out many changes that put entries, none twice: backends first, then what leads to them, frontends last.
    /// After a failure any part of them has been carried out. Programs may find new frontends only after [`Maps::show`].
    fn put_all(&mut self, mut ops: Vec<Op>) -> Result<(), MapFailure> {
        ops.sort_by_key(rank);
        ops.iter().try_for_each(|op| self.apply(op))
    }
    /// Lets programs find what [`Maps::put_all`] has put.
    fn show(&mut self) -> Result<(), MapFailure> {
        Ok(())
    }
    /// Reads everything back.
    fn dump(&self) -> Result<Dump, MapFailure>;
}

/// Where a change stands among those that are carried out at once.
fn rank(op: &Op) -> u8 {
    match op {
        Op::PutBackend(..) => 0,
        Op::PutFrontend(..) => 2,
        _ => 1,
    }
}

fn table(t: &[u32; maglev::SIZE]) -> MaglevTable {
    MaglevTable(*t)
}
