//! Loading the programs and attaching them: to a cgroup for sockets, to interfaces for packets.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle};
use aya::programs::{CgroupSockAddr, ProgramFd, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use orlop_ebpf_common::{Config as KernelConfig, LAYOUT, Uplink};

use crate::maps::RealMaps;
use crate::sys::{self, AttachType};
use crate::{Config, Error, MapFailure, path_err, pin, probe};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb.o"));

const SOCKET_PROGRAMS: [(&str, AttachType); 8] = [
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

/// Place of our filters among others' on clsact.
const CLSACT_PRIORITY: u16 = 49;
const CLSACT_HANDLE: TcHandle = TcHandle::new(0, 1);

/// Source ports for packets to other nodes: above ip_local_port_range's default of 32768-60999.
const SNAT_PORTS: (u16, u16) = (61_000, 65_535);

/// The attached load balancer. Dropping it detaches nothing: the pins hold.
pub struct Datapath {
    pub maps: RealMaps,
    packet: Packet,
    pins: PathBuf,
}

enum Packet {
    Tcx { ingress: ProgramFd, egress: ProgramFd },
    Clsact { ingress: Box<SchedClassifier>, egress: Box<SchedClassifier> },
}

impl Datapath {
    /// Loads the programs, adopting pinned maps, and attaches the socket programs. Links that an earlier process
    /// pinned get the new programs in one step each: no connection sees a moment without them.
    pub fn open(config: &Config) -> Result<Datapath, Error> {
        let cgroup = match &config.cgroup {
            Some(c) => c.clone(),
            None => probe::cgroup2().ok_or(Error::NoCgroup2)?,
        };
        pin::prepare(&config.pins)?;
        let mut bpf = load(config)?;
        let mut maps = RealMaps::take(&mut bpf)?;
        maps.set_config(KernelConfig {
            layout: LAYOUT,
            netns_cookie: sys::netns_cookie().map_err(|source| Error::Netns { source })?,
            snat_first: SNAT_PORTS.0,
            snat_last: SNAT_PORTS.1,
            ..KernelConfig::default()
        })?;
        let dir = File::open(&cgroup).map_err(path_err("open cgroup", &cgroup))?;
        let cgroup_id = dir.metadata().map_err(path_err("read cgroup", &cgroup))?.ino();
        for (name, attach) in SOCKET_PROGRAMS {
            let program: &mut CgroupSockAddr = program(&mut bpf, name)?;
            program.load().map_err(|e| Error::Program { program: name, source: Box::new(e) })?;
            let fd = program.fd().map_err(|e| Error::Program { program: name, source: Box::new(e) })?;
            let target = Target { number: dir.as_raw_fd() as u32, id: cgroup_id };
            link(&pin::links(&config.pins).join(name), fd.as_fd(), target, attach).map_err(|source| {
                Error::Attach { program: name, target: cgroup.display().to_string(), source }
            })?;
        }
        let packet = if !config.force_clsact && probe::has_tcx() {
            Packet::Tcx {
                ingress: classifier(&mut bpf, "lb_ingress")?,
                egress: classifier(&mut bpf, "lb_egress")?,
            }
        } else {
            Packet::Clsact {
                ingress: Box::new(lasting(&mut bpf, "lb_ingress", &config.pins)?),
                egress: Box::new(lasting(&mut bpf, "lb_egress", &config.pins)?),
            }
        };
        drop(bpf);
        sys::release_memory();
        Ok(Datapath { maps, packet, pins: config.pins.clone() })
    }

    /// Serves packets of an interface, or changes how it is served. The interface's settings are in place before its
    /// programs run.
    pub fn attach_uplink(&mut self, index: u32, name: &str, uplink: Uplink) -> Result<(), Error> {
        self.maps.put_uplink(index, uplink).map_err(|e| map_error("UPLINKS", e))?;
        let links = pin::links(&self.pins);
        match &mut self.packet {
            Packet::Tcx { ingress, egress } => {
                let target = Target { number: index, id: u64::from(index) };
                for (program, pin, fd, attach) in [
                    ("lb_egress", "out", &*egress, AttachType::TcxEgress),
                    ("lb_ingress", "in", &*ingress, AttachType::TcxIngress),
                ] {
                    link(&links.join(format!("{pin}_{index}")), fd.as_fd(), target, attach)
                        .map_err(|source| Error::Attach { program, target: name.to_owned(), source })?;
                }
            }
            Packet::Clsact { ingress, egress } => {
                let failed = |program| {
                    move |e: aya::programs::ProgramError| Error::Clsact {
                        program,
                        target: name.to_owned(),
                        source: Box::new(e),
                    }
                };
                let mark = links.join(format!("clsact_{index}"));
                fs::create_dir_all(&mark).map_err(path_err("create", &mark))?;
                match aya::programs::tc::qdisc_add_clsact(name) {
                    Ok(()) | Err(aya::programs::tc::TcError::AlreadyAttached) => {}
                    Err(aya::programs::tc::TcError::NetlinkError(e))
                        if e.raw_os_error() == Some(libc::EEXIST) => {}
                    Err(e) => {
                        return Err(Error::Clsact {
                            program: "lb_ingress",
                            target: name.to_owned(),
                            source: Box::new(e),
                        });
                    }
                }
                clsact(egress, name, TcAttachType::Egress).map_err(failed("lb_egress"))?;
                clsact(ingress, name, TcAttachType::Ingress).map_err(failed("lb_ingress"))?;
            }
        }
        Ok(())
    }

    /// Stops serving every interface whose index is not in `wanted`, whoever attached it.
    pub fn keep_uplinks(&mut self, wanted: &[u32]) -> Result<(), Error> {
        let links = pin::links(&self.pins);
        for entry in fs::read_dir(&links).map_err(path_err("read", &links))?.flatten() {
            let name = entry.file_name();
            let Some((kind, index)) = name.to_str().and_then(|n| n.split_once('_')) else { continue };
            let Ok(index) = index.parse::<u32>() else { continue };
            if wanted.contains(&index) {
                continue;
            }
            if kind == "clsact" {
                remove_filters(index);
                // An empty folder; when it stays, the next start tries again.
                let _ = fs::remove_dir(entry.path());
            } else {
                fs::remove_file(entry.path()).map_err(path_err("remove", &entry.path()))?;
            }
        }
        for index in self.maps.uplinks() {
            if !wanted.contains(&index) {
                self.maps.del_uplink(index).map_err(|e| map_error("UPLINKS", e))?;
            }
        }
        Ok(())
    }
}

fn map_error(name: &'static str, e: MapFailure) -> Error {
    Error::Path { what: "write BPF map", path: PathBuf::from(name), source: io::Error::other(e) }
}

fn load(config: &Config) -> Result<Ebpf, Error> {
    let sizes = &config.sizes;
    EbpfLoader::new()
        // Nothing in the programs depends on the kernel's own types.
        .btf(None)
        .default_map_pin_directory(pin::maps(&config.pins))
        .map_max_entries("FRONTENDS", sizes.frontends)
        .map_max_entries("SLOTS", sizes.slots)
        .map_max_entries("BACKENDS", sizes.backends)
        .map_max_entries("MEMBERS", sizes.backends)
        .map_max_entries("CONNECTIONS", sizes.connections)
        .map_max_entries("SOCK_REVERSE", sizes.sockets)
        .map_max_entries("SOCK_FLOWS", (sizes.sockets / 2).max(1))
        .map_max_entries("AFFINITY", (sizes.sockets / 2).max(1))
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

fn classifier(bpf: &mut Ebpf, name: &'static str) -> Result<ProgramFd, Error> {
    let failed = |e| Error::Program { program: name, source: Box::new(e) };
    let p: &mut SchedClassifier = program(bpf, name)?;
    p.load().map_err(failed)?;
    let fd = p.fd().map_err(failed)?;
    fd.try_clone().map_err(|e| Error::Program { program: name, source: Box::new(e.into()) })
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
                AttachType::TcxIngress | AttachType::TcxEgress => info.target & 0xffff_ffff,
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

fn clsact(
    program: &mut SchedClassifier,
    interface: &str,
    attach: TcAttachType,
) -> Result<(), aya::programs::ProgramError> {
    let old = SchedClassifierLink::attached(interface, attach, CLSACT_PRIORITY, CLSACT_HANDLE, None)?;
    let id = match program.attach_to_link(old) {
        Ok(id) => id,
        Err(_) => program.attach_with_options(
            interface,
            attach,
            TcAttachOptions::Netlink(NlOptions {
                priority: CLSACT_PRIORITY,
                handle: CLSACT_HANDLE,
                classid: None,
            }),
        )?,
    };
    // The filter must outlive this process.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

fn interface_name(index: u32) -> Option<String> {
    nix::net::if_::if_indextoname(index).ok().and_then(|n| n.into_string().ok())
}

fn remove_filters(index: u32) {
    let Some(name) = interface_name(index) else { return };
    for attach in [TcAttachType::Ingress, TcAttachType::Egress] {
        if let Ok(link) = SchedClassifierLink::attached(&name, attach, CLSACT_PRIORITY, CLSACT_HANDLE, None)
            && let Err(e) = aya::programs::links::Link::detach(link)
        {
            tracing::debug!(interface = name, error = %e, "no filter to remove");
        }
    }
}

/// Takes filters off the interfaces that the pins name.
pub(crate) fn detach_clsact(config: &Config) {
    let Ok(entries) = fs::read_dir(pin::links(&config.pins)) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if let Some(Ok(index)) = name.to_str().and_then(|n| n.strip_prefix("clsact_")).map(str::parse) {
            remove_filters(index);
        }
    }
}
