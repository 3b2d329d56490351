//! The folder of pins, and the BPF file system below it.
//!
//! ```text
//! <pins>/links/<program>          cgroup links           <pins>/links/{in,out}_<ifindex>   tcx links
//! <pins>/links/clsact_<ifindex>   a folder: attached by clsact
//! <pins>/v<layout>/               maps                   <pins>/mounted   a folder: the file system is ours
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags};

use crate::{Error, path_err};

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
    pins.join(format!("v{}", orlop_ebpf_common::LAYOUT))
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

/// Unlinks every pin, links first so that no program runs without its maps.
pub(crate) fn remove(pins: &Path) -> Result<(), Error> {
    if !pins.exists() || !on_bpffs(pins) {
        return Ok(());
    }
    let ours = pins.join("mounted").exists();
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
        match rustix::mount::unmount(&at, UnmountFlags::empty()) {
            // Somebody else has come to use it: then it is theirs.
            Ok(()) | Err(rustix::io::Errno::BUSY | rustix::io::Errno::INVAL) => {}
            Err(e) => return Err(path_err("unmount", &at)(e.into())),
        }
    }
    Ok(())
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
