//! Loads, pins and attaches the service load balancer's BPF programs, and gives access to their maps.
//!
//! Everything in the kernel is pinned: traffic flows while no daemon runs, and the next one adopts the maps and replaces
//! the programs link by link.

pub mod attach;
mod clsact;
pub mod diag;
pub mod maps;
mod netlink;
mod pin;
pub mod probe;
mod sys;

use std::io;
use std::path::{Path, PathBuf};

use orlop_ebpf_common::LAYOUT;

pub use attach::{Datapath, Object, Programs, SOCKET_PROGRAMS};
pub use maps::{Dump, MapFailure, Maps, Op, Range, RealMaps};
pub use probe::{Finding, Level, check, verify_programs};

/// Where the load balancer lives on this machine.
#[derive(Clone, Debug)]
pub struct Config {
    /// Folder for pins, on a BPF file system; one is mounted when there is none. One load balancer per folder.
    pub pins: PathBuf,
    /// The cgroup (version 2) whose processes' traffic is translated; `None`: the root of the mounted hierarchy.
    pub cgroup: Option<PathBuf>,
    /// Attach to interfaces by clsact even where tcx exists.
    pub force_clsact: bool,
    /// Interfaces whose drivers send packets of known connections on themselves (XDP), where they can.
    pub xdp: Vec<String>,
    pub sizes: Sizes,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            pins: PathBuf::from("/sys/fs/bpf/orlop"),
            cgroup: None,
            force_clsact: false,
            xdp: Vec::new(),
            sizes: Sizes::default(),
        }
    }
}

/// Capacities of the maps. Tables that grow with Services take memory as they fill; the others take it at once
/// (about 100 bytes for each entry). They matter when maps are created: existing pins keep their sizes.
#[derive(Clone, Debug)]
pub struct Sizes {
    pub frontends: u32,
    pub slots: u32,
    pub backends: u32,
    /// Connections through uplinks, two entries each; as many again are for flows of datagrams.
    pub connections: u32,
    /// Sockets whose peer name is remembered.
    pub sockets: u32,
    /// Addresses of the node.
    pub addresses: u32,
    /// Interfaces that are served: uplinks and pods'.
    pub interfaces: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Sizes {
            frontends: 65_536,
            slots: 262_144,
            backends: 131_072,
            connections: 65_536,
            sockets: 65_536,
            addresses: 32_768,
            interfaces: 4096,
        }
    }
}

impl Sizes {
    /// A capacity by its name on the command line.
    pub fn named(&mut self, name: &str) -> Option<&mut u32> {
        Some(match name {
            "frontends" => &mut self.frontends,
            "slots" => &mut self.slots,
            "backends" => &mut self.backends,
            "connections" => &mut self.connections,
            "sockets" => &mut self.sockets,
            "addresses" => &mut self.addresses,
            "interfaces" => &mut self.interfaces,
            _ => return None,
        })
    }
}

/// Why the load balancer cannot be loaded, attached or removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no cgroup v2 hierarchy is mounted; mount one: mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified")]
    NoCgroup2,
    #[error("cannot {what} {path}", path = path.display())]
    Path { what: &'static str, path: PathBuf, source: io::Error },
    #[error("the kernel refuses the BPF programs; `orlop check` says what it lacks")]
    Load { source: Box<aya::EbpfError> },
    #[error("the kernel refuses BPF program {program}; `orlop check` says what it lacks")]
    Program { program: &'static str, source: Box<aya::programs::ProgramError> },
    #[error("BPF program or map {name} is not in the object; this build is broken")]
    Missing { name: &'static str },
    #[error("cannot open BPF map {name}; `orlop proxy cleanup` removes all of them")]
    Map { name: &'static str, source: Box<aya::maps::MapError> },
    #[error(
        "BPF map {name} at {pins} has another shape than this program's; `orlop proxy cleanup` removes all of them",
        pins = pins.display()
    )]
    Shape { name: &'static str, pins: PathBuf },
    #[error("no service load balancer is loaded at {pins}; start `orlop proxy`", pins = pins.display())]
    NotLoaded { pins: PathBuf },
    #[error(
        "{pins} holds maps of a newer version (layout {found}, this program has {LAYOUT}); run that version, or \
         `orlop proxy cleanup` and lose the connections that it translates",
        pins = pins.display()
    )]
    Newer { pins: PathBuf, found: u32 },
    #[error("cannot attach {program} to {target}")]
    Attach { program: &'static str, target: String, source: io::Error },
    #[error("cannot attach {program} to {target} by clsact; is the kernel module sch_ingress available?")]
    Clsact { program: &'static str, target: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("cannot read the network namespace's cookie (Linux 5.14 or later is needed)")]
    Netns { source: io::Error },
}

pub(crate) fn path_err(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Path { what, path, source }
}

/// Removes all that the load balancer left in the kernel: links, programs, maps, pins, and the BPF file system if it
/// was mounted for them. Nothing there is no error. A running daemon must be stopped first.
pub fn purge(config: &Config) -> Result<(), Error> {
    clsact::detach_all(&config.pins);
    pin::remove(&config.pins)
}
