//! Loading the programs and attaching them: to a cgroup for sockets, to interfaces for packets.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use aya::programs::{CgroupSock, CgroupSockAddr, ProgramFd, SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader};
use orlop_ebpf_common::{Config as KernelConfig, LAYOUT, Uplink, uplink_flags};

use crate::maps::RealMaps;
use crate::sys::{self, AttachType};
use crate::{Config, Error, MapFailure, Sizes, clsact, path_err, pin, probe};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb.o"));

const SOCKETS: [(&str, AttachType); 8] = [
    // What names answers comes first: no socket is translated before its answers would be named back.
    ("lb_recvmsg4", AttachType::Recvmsg4),
    ("lb_recvmsg6", AttachType::Recvmsg6),
    ("lb_peername4", AttachType::Peername4),
    ("lb_peername6", AttachType::Peername6),
    ("lb_connect4", AttachType::Connect4),
    ("lb_connect6", AttachType::Connect6),
    ("lb_sendmsg4", AttachType::Sendmsg4),
    ("lb_sendmsg6", AttachType::Sendmsg6),
];

/// Forgets sockets that are closed.
const RELEASE: &str = "lb_release";

/// How many programs are attached to the cgroup.
pub const SOCKET_PROGRAMS: usize = SOCKETS.len() + 1;

/// Source ports for packets to other nodes: above ip_local_port_range's default of 32768-60999.
const SNAT_PORTS: (u16, u16) = (61_000, 65_535);
/// Node ports, which no translated source may have either.
const NODE_PORTS: (u16, u16) = (30_000, 32_767);
/// Fewer source ports than this towards one backend are too few.
const MIN_SNAT_PORTS: u16 = 1024;

/// The load balancer in the kernel. Dropping it detaches nothing: the pins hold.
pub struct Datapath {
    pub maps: RealMaps,
    programs: Option<Programs>,
    config: Config,
}

/// The programs as they were compiled, bound to the maps of a [`Datapath`].
pub struct Object {
    bpf: Ebpf,
    config: Config,
}

/// Programs that the kernel's verifier has accepted.
pub struct Programs {
    sockets: Vec<(&'static str, AttachType, ProgramFd)>,
    packet: Packet,
    /// When interfaces are to be served by XDP.
    xdp: Option<ProgramFd>,
}

/// Programs for uplinks and for pods' interfaces.
enum Packet {
    Tcx { uplink: Pair<ProgramFd>, pod: Pair<ProgramFd> },
    Clsact { uplink: Pair<Box<SchedClassifier>>, pod: Pair<Box<SchedClassifier>> },
}

struct Pair<P> {
    ingress: P,
    egress: P,
}

impl<P> Pair<P> {
    fn load(
        mut by: impl FnMut(&'static str) -> Result<P, Error>,
        names: [&'static str; 2],
    ) -> Result<Self, Error> {
        Ok(Pair { ingress: by(names[0])?, egress: by(names[1])? })
    }
}

const UPLINK: [&str; 2] = ["lb_ingress", "lb_egress"];
const POD: [&str; 2] = ["lb_pod_ingress", "lb_pod_egress"];

impl Object {
    /// Shows the programs to the kernel's verifier, which takes a part of a second of processor time.
    pub fn load(mut self) -> Result<Programs, Error> {
        let Object { bpf, config } = &mut self;
        let packet = if !config.force_clsact && probe::has_tcx() {
            let mut load = |name| classifier(bpf, name);
            Packet::Tcx { uplink: Pair::load(&mut load, UPLINK)?, pod: Pair::load(&mut load, POD)? }
        } else {
            let mut load = |name| lasting(bpf, name, &config.pins).map(Box::new);
            Packet::Clsact { uplink: Pair::load(&mut load, UPLINK)?, pod: Pair::load(&mut load, POD)? }
        };
        let xdp = if config.xdp.is_empty() { None } else { Some(xdp(bpf)?) };
        Ok(Programs { sockets: socket_programs(bpf)?, packet, xdp })
    }
}

impl Datapath {
    /// Adopts pinned maps or makes them; those of an older layout are adopted as far as they are alike. What an earlier process
    /// attached goes on with its own programs and maps until [`Datapath::attach`].
    pub fn prepare(config: &Config) -> Result<(Datapath, Object), Error> {
        pin::prepare(&config.pins)?;
        pin::adopt_older(&config.pins)?;
        pin::check_shapes(&config.pins)?;
        pin::make_room(&config.pins, &config.sizes)?;
        let mut bpf = parse(config)?;
        let mut maps = RealMaps::take(&mut bpf)?;
        let before = maps.config().unwrap_or_default();
        let snat = snat_ports((before.snat_first, before.snat_last));
        let flags = before.flags;
        maps.set_config(KernelConfig {
            layout: LAYOUT,
            flags,
            netns_cookie: sys::netns_cookie().map_err(|source| Error::Netns { source })?,
            snat_first: snat.0,
            snat_last: snat.1,
            reserved: 0,
        })
        .map_err(|e| map_error("CONFIG", e))?;
        let datapath = Datapath { maps, programs: None, config: config.clone() };
        Ok((datapath, Object { bpf, config: config.clone() }))
    }

    /// All in one: maps, programs, and sockets served by them.
    pub fn open(config: &Config) -> Result<Datapath, Error> {
        let (mut datapath, object) = Datapath::prepare(config)?;
        datapath.attach(&mut Some(object.load()?))?;
        Ok(datapath)
    }

    /// Whether [`Datapath::attach`] has succeeded.
    pub fn is_attached(&self) -> bool {
        self.programs.is_some()
    }

    /// Attaches the socket programs, and takes all of them over when that is done. Links that an earlier process pinned get
    /// the new programs in one step each: no connection sees a moment without them. Maps of older layouts go.
    pub fn attach(&mut self, programs: &mut Option<Programs>) -> Result<(), Error> {
        let Some(Programs { sockets, .. }) = programs else { return Ok(()) };
        let cgroup = match &self.config.cgroup {
            Some(c) => c.clone(),
            None => probe::cgroup2().ok_or(Error::NoCgroup2)?,
        };
        let dir = File::open(&cgroup).map_err(path_err("open cgroup", &cgroup))?;
        let cgroup_id = dir.metadata().map_err(path_err("read cgroup", &cgroup))?.ino();
        for &(name, attach, ref fd) in sockets.iter() {
            let target = Target { number: dir.as_raw_fd() as u32, id: cgroup_id };
            let pin = pin::links(&self.config.pins).join(name);
            link(&pin, fd.as_fd(), target, attach).map_err(|source| Error::Attach {
                program: name,
                target: cgroup.display().to_string(),
                source,
            })?;
        }
        if let Some(old) = pin::older_peers(&self.config.pins) {
            let failed = |source| Error::Map { name: "SOCK_REVERSE", source: Box::new(source) };
            self.maps.adopt_peers(old).map_err(failed)?;
            self.maps.adopt_datagrams().map_err(|e| map_error("DATAGRAMS", e))?;
        }
        pin::remove_older(&self.config.pins)?;
        self.programs = programs.take();
        Ok(())
    }

    /// Serves packets of an interface, or changes how it is served. The interface's settings are in place before its
    /// programs run.
    pub fn attach_uplink(&mut self, index: u32, name: &str, uplink: Uplink) -> Result<(), Error> {
        let Some(programs) = &mut self.programs else {
            return Err(Error::NotLoaded { pins: self.config.pins.clone() });
        };
        let by_driver =
            if attach_xdp(&self.config, programs, index, name, &uplink)? { uplink_flags::XDP } else { 0 };
        let uplink = Uplink { flags: uplink.flags | by_driver, ..uplink };
        self.maps.put_uplink(index, uplink).map_err(|e| map_error("UPLINKS", e))?;
        let links = pin::links(&self.config.pins);
        let is_pod = uplink.flags & uplink_flags::POD != 0;
        match &mut programs.packet {
            Packet::Tcx { uplink, pod } => {
                let (names, Pair { ingress, egress }) = if is_pod { (POD, pod) } else { (UPLINK, uplink) };
                let target = Target { number: index, id: u64::from(index) };
                for (program, pin, fd, attach) in [
                    (names[1], "out", &*egress, AttachType::TcxEgress),
                    (names[0], "in", &*ingress, AttachType::TcxIngress),
                ] {
                    link(&links.join(format!("{pin}_{index}")), fd.as_fd(), target, attach)
                        .map_err(|source| Error::Attach { program, target: name.to_owned(), source })?;
                }
            }
            Packet::Clsact { uplink, pod } => {
                let Pair { ingress, egress } = if is_pod { pod } else { uplink };
                clsact::attach(&self.config.pins, index, name, ingress, egress)?;
            }
        }
        Ok(())
    }

    /// Stops serving every interface whose index is not in `wanted`, whoever attached it.
    pub fn keep_uplinks(&mut self, wanted: &[u32]) -> Result<(), Error> {
        let links = pin::links(&self.config.pins);
        for entry in fs::read_dir(&links).map_err(path_err("read", &links))?.flatten() {
            let name = entry.file_name();
            let Some((kind, index)) = name.to_str().and_then(|n| n.split_once('_')) else { continue };
            let Ok(index) = index.parse::<u32>() else { continue };
            if wanted.contains(&index) {
                continue;
            }
            match kind {
                "clsact" => clsact::detach(&self.config.pins, index),
                "in" | "out" | "xdp" => pin::remove_link(&entry.path())?,
                _ => {}
            }
        }
        for (index, _) in self.maps.uplinks() {
            if !wanted.contains(&index) {
                self.maps.del_uplink(index).map_err(|e| map_error("UPLINKS", e))?;
            }
        }
        Ok(())
    }
}

/// Attaches the XDP program where it is wanted and the driver takes it; says whether it is there. Without it packets
/// go through the other programs, as all but those of known connections do anyway.
fn attach_xdp(
    config: &Config,
    programs: &Programs,
    index: u32,
    name: &str,
    uplink: &Uplink,
) -> Result<bool, Error> {
    let path = pin::links(&config.pins).join(format!("xdp_{index}"));
    let wanted = config.xdp.iter().any(|x| x == name) && uplink.flags & uplink_flags::POD == 0;
    let Some(program) = programs.xdp.as_ref().filter(|_| wanted) else {
        pin::remove_link(&path)?;
        return Ok(false);
    };
    let refused = if uplink.l3_offset == 0 {
        io::Error::other("it is no Ethernet interface")
    } else {
        let target = Target { number: index, id: u64::from(index) };
        match link(&path, program.as_fd(), target, AttachType::Xdp) {
            Ok(()) => return Ok(true),
            Err(e) => e,
        }
    };
    tracing::warn!(
        interface = name,
        error = %refused,
        "the interface's driver takes no XDP program; its packets go through the stack's hooks"
    );
    Ok(false)
}

/// Shows every program to this kernel's verifier, with maps that are gone afterwards. Nothing is attached.
pub(crate) fn verify() -> Result<(), Error> {
    let small = Sizes {
        frontends: 16,
        slots: 16,
        backends: 16,
        connections: 16,
        sockets: 16,
        addresses: 16,
        interfaces: 16,
    };
    let pins = Config::default().pins.with_file_name(format!("orlop-check-{}", std::process::id()));
    let config = Config { pins, sizes: small, ..Config::default() };
    pin::prepare(&config.pins)?;
    let result = parse(&config).and_then(|mut bpf| {
        socket_programs(&mut bpf)?;
        for name in UPLINK.into_iter().chain(POD) {
            classifier(&mut bpf, name)?;
        }
        xdp(&mut bpf).map(drop)
    });
    pin::remove(&config.pins)?;
    result
}

fn map_error(name: &'static str, e: MapFailure) -> Error {
    Error::Path { what: "write BPF map", path: PathBuf::from(name), source: io::Error::other(e) }
}

/// The range for translated sources: where the node's own sockets get no port by themselves. What it was before stays if it
/// can: answers to ports outside of it are not looked for.
fn snat_ports(before: (u16, u16)) -> (u16, u16) {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut numbers = text.split_whitespace().filter_map(|n| n.parse().ok());
    let (Some(first), Some(last)) = (numbers.next(), numbers.next()) else { return SNAT_PORTS };
    if stays(before, first, last) {
        return before;
    }
    let chosen = outside(first, last);
    if chosen.is_none() {
        tracing::warn!(
            first,
            last,
            "net.ipv4.ip_local_port_range leaves no room for translated source ports; they may meet those of the \
             node's sockets. Set it to 32768 60999"
        );
    }
    chosen.unwrap_or(SNAT_PORTS)
}

fn wide(r: &(u16, u16)) -> bool {
    r.1.saturating_sub(r.0) >= MIN_SNAT_PORTS
}

/// Whether a range is one that could be chosen.
fn stays(range: (u16, u16), first: u16, last: u16) -> bool {
    let clear_of = |other: (u16, u16)| range.1 < other.0 || range.0 > other.1;
    wide(&range) && clear_of((first, last)) && clear_of(NODE_PORTS)
}

fn outside(first: u16, last: u16) -> Option<(u16, u16)> {
    let above = (last.saturating_add(1).max(SNAT_PORTS.0), u16::MAX);
    let between = (NODE_PORTS.1 + 1, first.saturating_sub(1));
    let below = (10_000, NODE_PORTS.0.min(first) - 1);
    [above, between, below].into_iter().find(wide)
}

fn parse(config: &Config) -> Result<Ebpf, Error> {
    let sizes = &config.sizes;
    EbpfLoader::new()
        // Nothing in the programs depends on the kernel's own types.
        .btf(None)
        .default_map_pin_directory(pin::maps(&config.pins))
        .map_max_entries("FRONTENDS", sizes.frontends)
        .map_max_entries("SLOTS", sizes.slots)
        .map_max_entries("BACKENDS", sizes.backends)
        // No set has more members than slots.
        .map_max_entries("MEMBERS", sizes.slots)
        // Of each Service port that clients outside ask.
        .map_max_entries("MAGLEV", sizes.frontends)
        .map_max_entries("LOCAL_ADDRS", sizes.addresses)
        .map_max_entries("UPLINKS", sizes.interfaces)
        .map_max_entries("RANGES", sizes.frontends)
        .map_max_entries("CONNECTIONS", sizes.connections)
        .map_max_entries("DATAGRAMS", sizes.connections)
        .map_max_entries("SOCK_REVERSE", sizes.sockets)
        .map_max_entries("SOCK_SENT", (sizes.sockets / 4).max(1))
        .map_max_entries("SOCK_FLOWS", (sizes.sockets / 2).max(1))
        .map_max_entries("AFFINITY", (sizes.sockets / 2).max(1))
        .map_max_entries("STATS", sizes.frontends)
        .map_max_entries("NAMES", sizes.frontends)
        .load(OBJECT)
        .map_err(|e| Error::Load { source: Box::new(e) })
}

fn program<'a, P>(bpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, Error>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = aya::programs::ProgramError>,
{
    bpf.program_mut(name)
        .ok_or(Error::Missing { name })?
        .try_into()
        .map_err(|e| Error::Program { program: name, source: Box::new(e) })
}

/// The programs for a cgroup, in the order in which they are attached.
fn socket_programs(bpf: &mut Ebpf) -> Result<Vec<(&'static str, AttachType, ProgramFd)>, Error> {
    let mut all = Vec::with_capacity(SOCKET_PROGRAMS);
    for (name, attach) in SOCKETS {
        let failed = |e| Error::Program { program: name, source: Box::new(e) };
        let p: &mut CgroupSockAddr = program(bpf, name)?;
        p.load().map_err(failed)?;
        all.push((name, attach, own(p.fd().map_err(failed)?, name)?));
    }
    let failed = |e| Error::Program { program: RELEASE, source: Box::new(e) };
    let p: &mut CgroupSock = program(bpf, RELEASE)?;
    p.load().map_err(failed)?;
    all.push((RELEASE, AttachType::Release, own(p.fd().map_err(failed)?, RELEASE)?));
    Ok(all)
}

/// A descriptor that outlives the object.
fn own(fd: &ProgramFd, program: &'static str) -> Result<ProgramFd, Error> {
    fd.try_clone().map_err(|e| Error::Program { program, source: Box::new(e.into()) })
}

fn classifier(bpf: &mut Ebpf, name: &'static str) -> Result<ProgramFd, Error> {
    let failed = |e| Error::Program { program: name, source: Box::new(e) };
    let p: &mut SchedClassifier = program(bpf, name)?;
    p.load().map_err(failed)?;
    own(p.fd().map_err(failed)?, name)
}

fn xdp(bpf: &mut Ebpf) -> Result<ProgramFd, Error> {
    const NAME: &str = "lb_xdp";
    let failed = |e| Error::Program { program: NAME, source: Box::new(e) };
    let p: &mut Xdp = program(bpf, NAME)?;
    p.load().map_err(failed)?;
    own(p.fd().map_err(failed)?, NAME)
}

/// The program as a handle that outlives the object it was loaded from.
fn lasting(bpf: &mut Ebpf, name: &'static str, pins: &Path) -> Result<SchedClassifier, Error> {
    let failed = |e| Error::Program { program: name, source: Box::new(e) };
    let fd = classifier(bpf, name)?;
    let path = pins.join(name);
    // Only a way to hand the program over; one left by a killed process is of no use.
    let _ = fs::remove_file(&path);
    sys::pin(fd.as_fd(), &path).map_err(path_err("pin", &path))?;
    let program = SchedClassifier::from_pin(&path).map_err(failed);
    let _ = fs::remove_file(&path);
    program
}

/// What a link is attached to: the number given to the kernel and the one it reports.
#[derive(Clone, Copy)]
struct Target {
    number: u32,
    id: u64,
}

/// Puts `program` in place of the one behind the pinned link, or makes and pins a new link.
fn link(path: &Path, program: BorrowedFd<'_>, target: Target, attach: AttachType) -> io::Result<()> {
    match sys::open_pinned(path) {
        Ok(old) => {
            let info = sys::link_info(old.as_fd())?;
            let attached_to = match attach {
                // The kernel reports 32 bits for interfaces; the other half is the attach type.
                AttachType::TcxIngress | AttachType::TcxEgress | AttachType::Xdp => info.target & 0xffff_ffff,
                _ => info.target,
            };
            if attached_to == target.id && sys::link_update(old.as_fd(), program).is_ok() {
                return Ok(());
            }
            // Attached elsewhere, or what it was attached to is gone.
            fs::remove_file(path)?;
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let link = sys::link_create(program, target.number, attach)?;
    sys::pin(link.as_fd(), path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn translated_sources_keep_clear_of_the_nodes_ports() {
        assert_eq!(outside(32_768, 60_999), Some((61_000, 65_535)));
        assert_eq!(outside(40_000, 65_535), Some((32_768, 39_999)));
        assert_eq!(outside(32_768, 65_535), Some((10_000, 29_999)));
        assert_eq!(outside(1024, 65_535), None);
    }

    #[test]
    fn translated_sources_stay_as_long_as_they_can() {
        assert!(stays((61_000, 65_535), 32_768, 60_999));
        assert!(stays((61_000, 65_535), 32_768, 50_000), "fewer ports of the node's");
        assert!(stays((32_768, 39_999), 40_000, 65_535));
        assert!(!stays((61_000, 65_535), 32_768, 61_000));
        assert!(!stays((61_000, 65_535), 62_000, 63_000), "in the midst of it");
        assert!(!stays((30_000, 39_999), 40_000, 65_535) && !stays((0, 0), 40_000, 65_535));
    }
}
