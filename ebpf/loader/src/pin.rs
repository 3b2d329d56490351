//! The folder of pins, and the BPF file system below it.
//!
//! ```text
//! <pins>/links/<program>          cgroup links           <pins>/links/{in,out}_<ifindex>   tcx links
//! <pins>/links/xdp_<ifindex>      XDP links
//! <pins>/links/clsact_<ifindex>   a folder: attached by clsact
//! <pins>/links/qdisc_<ifindex>    a folder: the queueing discipline is ours
//! <pins>/v<layout>/               maps                   <pins>/mounted   a folder: the file system is ours
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use std::os::fd::AsFd;

use aya::maps::MapData;
use orlop_ebpf_common::{
    Addr, AffinityKey, AffinityValue, Backend, Config, CtKey, CtValue, FragmentKey, FragmentPorts,
    FrontendKey, FrontendValue, LAYOUT, MaglevTable, RangeKey, ServiceName, SlotKey, SockFlow, SockKey,
    SockPeer, SockReverse, Stats, Uplink,
};
use rustix::mount::{MountFlags, UnmountFlags};

use crate::{Error, Sizes, path_err, sys};

const STANDARD: &str = "/sys/fs/bpf";
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

fn on_bpffs(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|s| s.f_type as u64 == BPF_FS_MAGIC)
}

/// The nearest folder at or above `path` that exists.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"))
}

/// Where the file system would be mounted for these pins.
fn mount_point(pins: &Path) -> PathBuf {
    if pins.starts_with(STANDARD) { PathBuf::from(STANDARD) } else { pins.to_owned() }
}

pub(crate) fn links(pins: &Path) -> PathBuf {
    pins.join("links")
}

pub(crate) fn maps(pins: &Path) -> PathBuf {
    pins.join(format!("v{LAYOUT}"))
}

/// Makes the folders, mounting a BPF file system when the place is on none.
pub(crate) fn prepare(pins: &Path) -> Result<(), Error> {
    let mut ours = false;
    if !on_bpffs(existing(pins)) {
        let at = mount_point(pins);
        fs::create_dir_all(&at).map_err(path_err("create", &at))?;
        if !on_bpffs(&at) {
            rustix::mount::mount(
                "bpf",
                &at,
                "bpf",
                MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RELATIME,
                c"mode=0700",
            )
            .map_err(|e| path_err("mount a BPF file system at", &at)(e.into()))?;
            ours = true;
        }
    }
    for dir in [links(pins), maps(pins)] {
        fs::create_dir_all(&dir).map_err(path_err("create", &dir))?;
    }
    if ours {
        let mark = pins.join("mounted");
        fs::create_dir_all(&mark).map_err(path_err("create", &mark))?;
    }
    Ok(())
}

/// Layouts whose maps are pinned.
fn layouts(pins: &Path) -> Vec<u32> {
    let names = fs::read_dir(pins).into_iter().flatten().flatten().map(|e| e.file_name());
    names.filter_map(|n| n.to_str()?.strip_prefix('v')?.parse().ok()).collect()
}

/// Brings the maps of the latest older layout over, as far as their keys and values have the same size; a map whose
/// meaning changes without them gets another name. A newer layout is refused.
pub(crate) fn adopt_older(pins: &Path) -> Result<(), Error> {
    let found = layouts(pins);
    if let Some(newer) = found.iter().copied().filter(|l| *l > LAYOUT).max() {
        return Err(Error::Newer { pins: pins.to_owned(), found: newer });
    }
    let Some(older) = found.into_iter().filter(|l| *l < LAYOUT).max() else { return Ok(()) };
    let (from, to) = (pins.join(format!("v{older}")), maps(pins));
    for entry in fs::read_dir(&from).map_err(path_err("read", &from))?.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let target = to.join(&name);
        if target.exists() || !like_ours(&entry.path(), &name) {
            continue;
        }
        let map = sys::open_pinned(&entry.path()).map_err(path_err("open", &entry.path()))?;
        sys::pin(map.as_fd(), &target).map_err(path_err("pin", &target))?;
    }
    Ok(())
}

/// The table of connected sockets that layouts before the third have, if there is one.
pub(crate) fn older_peers(pins: &Path) -> Option<MapData> {
    let older = layouts(pins).into_iter().filter(|l| *l < LAYOUT).max()?;
    let path = pins.join(format!("v{older}/SOCK_REVERSE"));
    let shape = ("SOCK_REVERSE", size_of::<SockKey>(), size_of::<SockReverse>());
    if has_shape(&path, &shape) { MapData::from_pin(path).ok() } else { None }
}

/// Refuses maps of this layout whose keys or values have another size than ours, whoever made them: nothing else looks.
pub(crate) fn check_shapes(pins: &Path) -> Result<(), Error> {
    for shape in SHAPES.iter().chain(&OTHER_SHAPES) {
        let path = maps(pins).join(shape.0);
        if path.exists() && !has_shape(&path, shape) {
            return Err(Error::Shape { name: shape.0, pins: pins.to_owned() });
        }
    }
    Ok(())
}

/// Unpins maps that are smaller than they should be and that hold nothing but what user space puts there at every start:
/// they are made anew. Programs that run on the old ones go on until they are replaced.
pub(crate) fn make_room(pins: &Path, sizes: &Sizes) -> Result<(), Error> {
    for (name, size) in [
        ("LOCAL_ADDRS", sizes.addresses),
        ("UPLINKS", sizes.interfaces),
        ("MEMBERS", sizes.slots),
        ("MAGLEV", sizes.frontends),
    ] {
        let path = maps(pins).join(name);
        if MapData::from_pin(&path).and_then(|m| m.info()).is_ok_and(|i| i.max_entries() < size) {
            gone(fs::remove_file(&path)).map_err(path_err("unpin", &path))?;
        }
    }
    Ok(())
}

fn like_ours(path: &Path, name: &str) -> bool {
    SHAPES.iter().find(|(n, ..)| *n == name).is_some_and(|s| has_shape(path, s))
}

fn has_shape(path: &Path, (_, key, value): &(&str, usize, usize)) -> bool {
    MapData::from_pin(path)
        .and_then(|m| m.info())
        .is_ok_and(|i| i.key_size() as usize == *key && i.value_size() as usize == *value)
}

/// Maps worth keeping over a change of layouts, with the sizes of key and value.
const SHAPES: [(&str, usize, usize); 13] = [
    ("CONFIG", size_of::<u32>(), size_of::<Config>()),
    ("FRONTENDS", size_of::<FrontendKey>(), size_of::<FrontendValue>()),
    ("SLOTS", size_of::<SlotKey>(), size_of::<u32>()),
    ("MEMBERS", size_of::<SlotKey>(), size_of::<u32>()),
    ("BACKENDS", size_of::<u32>(), size_of::<Backend>()),
    ("NAMES", size_of::<u32>(), size_of::<ServiceName>()),
    ("STATS", size_of::<u32>(), size_of::<Stats>()),
    ("CONNECTIONS", size_of::<CtKey>(), size_of::<CtValue>()),
    ("DATAGRAMS", size_of::<CtKey>(), size_of::<CtValue>()),
    ("AFFINITY", size_of::<AffinityKey>(), size_of::<AffinityValue>()),
    ("SOCK_REVERSE", size_of::<u64>(), size_of::<SockPeer>()),
    ("SOCK_SENT", size_of::<SockKey>(), size_of::<SockReverse>()),
    ("SOCK_FLOWS", size_of::<SockKey>(), size_of::<SockFlow>()),
];

/// Maps that an upgrade makes anew, and the counters.
const OTHER_SHAPES: [(&str, usize, usize); 10] = [
    ("CLIENTS", size_of::<u32>(), size_of::<u32>()),
    ("COUNTERS", size_of::<u32>(), size_of::<u64>()),
    ("FILTER", size_of::<u32>(), size_of::<u64>()),
    ("FRAGMENTS", size_of::<FragmentKey>(), size_of::<FragmentPorts>()),
    ("LOCAL_ADDRS", size_of::<Addr>(), size_of::<u32>()),
    ("MAGLEV", size_of::<u32>(), size_of::<MaglevTable>()),
    ("PEERS", size_of::<u32>(), size_of::<u32>()),
    // A trie's key begins with the length of its prefix.
    ("RANGES", size_of::<u32>() + size_of::<RangeKey>(), size_of::<u32>()),
    ("SERVERS", size_of::<u32>(), size_of::<u32>()),
    ("UPLINKS", size_of::<u32>(), size_of::<Uplink>()),
];

/// Removes the maps of older layouts, which no program uses any more.
pub(crate) fn remove_older(pins: &Path) -> Result<(), Error> {
    for l in layouts(pins).into_iter().filter(|l| *l < LAYOUT) {
        let dir = pins.join(format!("v{l}"));
        gone(fs::remove_dir_all(&dir)).map_err(path_err("remove", &dir))?;
    }
    Ok(())
}

/// Unlinks every pin, links first so that no program runs without its maps.
pub(crate) fn remove(pins: &Path) -> Result<(), Error> {
    if !pins.exists() || !on_bpffs(pins) {
        return Ok(());
    }
    let ours = pins.join("mounted").exists();
    for entry in fs::read_dir(links(pins)).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_file()) {
            remove_link(&entry.path())?;
        }
    }
    gone(fs::remove_dir_all(links(pins))).map_err(path_err("remove", &links(pins)))?;
    let at = mount_point(pins);
    if at == pins {
        // The mount point itself stays: it is not ours to remove.
        for dir in folders(pins)? {
            gone(fs::remove_dir_all(&dir)).map_err(path_err("remove", &dir))?;
        }
    } else {
        gone(fs::remove_dir_all(pins)).map_err(path_err("remove", pins))?;
    }
    let empty = folders(&at).is_ok_and(|d| d.is_empty());
    if ours && empty {
        // In a place of our own nobody pins anything; who looks at it just now (somebody counts free space on all file
        // systems, another process had the mounts copied) must not keep it.
        let how = if at == pins { UnmountFlags::DETACH } else { UnmountFlags::empty() };
        match rustix::mount::unmount(&at, how) {
            // Somebody else has come to use it: then it is theirs.
            Ok(()) | Err(rustix::io::Errno::BUSY | rustix::io::Errno::INVAL) => {}
            Err(e) => return Err(path_err("unmount", &at)(e.into())),
        }
    }
    Ok(())
}

/// Detaches a link and removes its pin: nothing runs its program any more when this returns.
pub(crate) fn remove_link(path: &Path) -> Result<(), Error> {
    if let Ok(link) = sys::open_pinned(path)
        && let Err(e) = sys::link_detach(link.as_fd())
    {
        // What it was attached to may be gone; then it is detached already.
        tracing::debug!(link = %path.display(), error = %e, "cannot detach");
    }
    gone(fs::remove_file(path)).map_err(path_err("remove", path))
}

/// The folders below, without what the kernel puts into every BPF file system (`maps.debug`, `progs.debug`).
fn folders(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = fs::read_dir(dir).map_err(path_err("read", dir))?;
    Ok(entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_none()).collect())
}

fn gone(r: io::Result<()>) -> io::Result<()> {
    match r {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        r => r,
    }
}
