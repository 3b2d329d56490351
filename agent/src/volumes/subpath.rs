//! subPath mounts: the path is resolved by the kernel so that no symbolic link leads out of the volume, and what was
//! resolved is pinned by a bind mount before the runtime sees it.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::mount::{MsFlags, mount};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2};

use super::{Error, mounts};

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(rustix::io::Errno) -> Error {
    let path = path.to_owned();
    move |e| Error::Io { what, path, source: e.into() }
}

fn open_beneath(dir: impl AsFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    // IN_ROOT would let absolute links resolve inside the volume; upstream refuses whatever leaves it.
    openat2(
        dir,
        path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
    )
}

/// Opens `path` in the volume, making missing folders one by one.
fn open_or_make(volume: &Path, path: &Path) -> Result<OwnedFd, Error> {
    let escapes = || Error::Escapes(path.to_string_lossy().into_owned());
    if path.components().any(|c| !matches!(c, Component::Normal(_) | Component::CurDir)) {
        return Err(escapes());
    }
    let root = openat(CWD, volume, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(io_error("open", volume))?;
    let mode = fs::metadata(volume).map_err(Error::io("look at", volume))?;
    let mode = Mode::from_raw_mode(std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o7777);
    match open_beneath(&root, path) {
        Ok(fd) => return Ok(fd),
        Err(rustix::io::Errno::NOENT) => {}
        Err(rustix::io::Errno::XDEV | rustix::io::Errno::LOOP) => return Err(escapes()),
        Err(e) => return Err(io_error("open", path)(e)),
    }
    let mut done = PathBuf::new();
    let mut parent = open_beneath(&root, Path::new(".")).map_err(io_error("open", volume))?;
    for part in path.components() {
        let Component::Normal(name) = part else { continue };
        done.push(name);
        match mkdirat(&parent, name, mode) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(io_error("create", &done)(e)),
        }
        parent = open_beneath(&root, &done).map_err(|e| match e {
            rustix::io::Errno::XDEV | rustix::io::Errno::LOOP => escapes(),
            e => io_error("open", &done)(e),
        })?;
    }
    Ok(parent)
}

/// Pins `path` of the volume at `pin` (a path below the pod's `volume-subpaths`), which is what the container mounts.
pub fn bind(volume: &Path, path: &str, pin: &Path) -> Result<(), Error> {
    let fd = open_or_make(volume, Path::new(path))?;
    let source = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let is_dir = fs::metadata(&source).map_err(Error::io("look at", &source))?.is_dir();
    // A restarted container resolves its path afresh.
    mounts::unmount_below(pin)?;
    let _ = fs::remove_file(pin);
    if let Some(parent) = pin.parent() {
        fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    }
    if is_dir {
        fs::create_dir_all(pin).map_err(Error::io("create", pin))?;
    } else {
        fs::write(pin, b"").map_err(Error::io("create", pin))?;
    }
    mount(Some(&source), pin, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(|e| Error::io("bind", pin)(e.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_out_of_the_volume_are_refused() {
        let t = tempfile::tempdir().unwrap();
        let v = t.path().join("v");
        fs::create_dir(&v).unwrap();
        fs::create_dir(v.join("in")).unwrap();
        std::os::unix::fs::symlink("/etc", v.join("out")).unwrap();
        std::os::unix::fs::symlink("in", v.join("ok")).unwrap();
        assert!(open_or_make(&v, Path::new("ok")).is_ok());
        assert!(open_or_make(&v, Path::new("new/dir")).is_ok() && v.join("new/dir").is_dir());
        for bad in ["out", "out/passwd", "../x", "/etc", "in/../../y"] {
            assert!(matches!(open_or_make(&v, Path::new(bad)), Err(Error::Escapes(_))), "{bad}");
        }
    }
}
