//! Files that survive a crash at any moment: written to a temporary name, synced, renamed, and the folder synced.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// What went wrong with a durable file, and where.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {what} {path}", path = path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{path} does not hold valid JSON; move it away to start afresh", path = path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("{path} is of version {found}, this program reads version {wanted}", path = path.display())]
    Version { path: PathBuf, found: u32, wanted: u32 },
    #[error("{path} is in use by another process; stop it or choose another folder", path = path.display())]
    Locked { path: PathBuf },
}

fn io_err(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { what, path, source }
}

/// Whether the bytes must outlive a power cut or only a crash of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sync {
    /// fsync the file and its folder before returning.
    Disk,
    /// Leave the page cache to the kernel: a killed process loses nothing, a power cut may. For state that does
    /// not outlive a reboot anyway (running containers, namespaces).
    PageCache,
}

/// Replaces `path` by `bytes` in one step: a reader sees the old content or the new, never a part.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32, sync: Sync) -> Result<(), Error> {
    let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    // The thread is part of the name because two tasks of one process may write the same path.
    let tmp = dir.join(format!(".{name}.{}.{:?}.tmp", std::process::id(), std::thread::current().id()));
    let result = (|| {
        let mut f = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&tmp)
            .map_err(io_err("create", &tmp))?;
        f.write_all(bytes).map_err(io_err("write", &tmp))?;
        if sync == Sync::Disk {
            f.sync_all().map_err(io_err("sync", &tmp))?;
        }
        fs::rename(&tmp, path).map_err(io_err("replace", path))?;
        if sync == Sync::Disk {
            File::open(dir).and_then(|d| d.sync_all()).map_err(io_err("sync", dir))?;
        }
        Ok(())
    })();
    if result.is_err() {
        // The first error is the one to report; a left-over temporary file is harmless.
        let _ = fs::remove_file(&tmp);
    }
    result
}

#[derive(serde::Deserialize)]
struct VersionOnly {
    version: u32,
}

#[derive(serde::Deserialize)]
struct Versioned<T> {
    data: T,
}

#[derive(Serialize)]
struct VersionedRef<'a, T> {
    version: u32,
    data: &'a T,
}

/// Writes `data` as `{"version": version, "data": …}` with [`write_atomic`], mode 0600.
pub fn write_json<T: Serialize>(path: &Path, version: u32, data: &T, sync: Sync) -> Result<(), Error> {
    let bytes = serde_json::to_vec(&VersionedRef { version, data })
        .map_err(|source| Error::Json { path: path.to_owned(), source })?;
    write_atomic(path, &bytes, 0o600, sync)
}

/// Reads what [`write_json`] wrote. `None` when there is no such file.
pub fn read_json<T: DeserializeOwned>(path: &Path, version: u32) -> Result<Option<T>, Error> {
    let bytes = match fs::read(path) {
        Ok(b) => b,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io_err("read", path)(e)),
    };
    let json = |source| Error::Json { path: path.to_owned(), source };
    let head: VersionOnly = serde_json::from_slice(&bytes).map_err(json)?;
    if head.version != version {
        return Err(Error::Version { path: path.to_owned(), found: head.version, wanted: version });
    }
    let v: Versioned<T> =
        serde_json::from_slice(&bytes).map_err(|source| Error::Json { path: path.to_owned(), source })?;
    Ok(Some(v.data))
}

/// Exclusive ownership of a data folder, released when dropped or when the process ends.
#[derive(Debug)]
pub struct DirLock {
    _file: File,
}

impl DirLock {
    /// Takes `dir`/lock; fails with [`Error::Locked`] when another process holds it.
    pub fn take(dir: &Path) -> Result<DirLock, Error> {
        fs::create_dir_all(dir).map_err(io_err("create", dir))?;
        let path = dir.join("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(io_err("open", &path))?;
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(DirLock { _file: file }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::Locked { path: dir.to_owned() }),
            Err(e) => Err(io_err("lock", &path)(e.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_round_trip_and_version_check() {
        let dir = tempfile::tempdir().unwrap();
        let p = dir.path().join("a.json");
        assert!(read_json::<Vec<u32>>(&p, 1).unwrap().is_none());
        write_json(&p, 1, &vec![1u32, 2], Sync::Disk).unwrap();
        assert_eq!(read_json::<Vec<u32>>(&p, 1).unwrap(), Some(vec![1, 2]));
        assert!(matches!(read_json::<Vec<u32>>(&p, 2), Err(Error::Version { found: 1, wanted: 2, .. })));
        fs::write(&p, b"{\"version\":1,\"da").unwrap();
        assert!(matches!(read_json::<Vec<u32>>(&p, 1), Err(Error::Json { .. })));
    }

    #[test]
    fn a_bare_name_is_in_the_current_folder() {
        let name = crate::testkit::unique_name("durable-");
        write_atomic(Path::new(&name), b"x", 0o600, Sync::Disk).unwrap();
        assert_eq!(fs::read(&name).unwrap(), b"x");
        fs::remove_file(&name).unwrap();
    }

    #[test]
    fn a_second_lock_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let first = DirLock::take(dir.path()).unwrap();
        assert!(matches!(DirLock::take(dir.path()), Err(Error::Locked { .. })));
        drop(first);
        DirLock::take(dir.path()).unwrap();
    }
}
