//! Files that survive a crash at any moment: written to a temporary name, synced, renamed, and the folder synced.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

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

/// A file that [`append_json`] has made longer than this is written anew.
const APPENDED_LIMIT: u64 = 64 << 10;

/// Puts `data` into effect in the file that [`write_json`] made, by a line at its end: for records that change often and need
/// only outlive a crash of the process. Replacing a file costs a new inode each time, and file systems (ext4 with
/// `auto_da_alloc`) start writing the old one's successor to the disk at once.
pub fn append_json<T: Serialize>(path: &Path, version: u32, data: &T) -> Result<(), Error> {
    let mut f = match File::options().append(true).open(path) {
        Ok(f) => f,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return write_json(path, version, data, Sync::PageCache);
        }
        Err(e) => return Err(io_err("open", path)(e)),
    };
    if f.metadata().map_err(io_err("look at", path))?.len() > APPENDED_LIMIT {
        return write_json(path, version, data, Sync::PageCache);
    }
    // The line break comes first: what a failed write has left is a line of its own.
    let mut line = vec![b'\n'];
    serde_json::to_writer(&mut line, &VersionedRef { version, data })
        .map_err(|source| Error::Json { path: path.to_owned(), source })?;
    f.write_all(&line).map_err(io_err("write", path))
}

/// Reads what [`write_json`] or [`append_json`] wrote last. `None` when there is no such file.
pub fn read_json<T: DeserializeOwned>(path: &Path, version: u32) -> Result<Option<T>, Error> {
    let bytes = match fs::read(path) {
        Ok(b) => b,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io_err("read", path)(e)),
    };
    let json = |source| Error::Json { path: path.to_owned(), source };
    // JSON text of ours has no line breaks, so a line is whole or what a crash has left of it.
    let mut lines = bytes.rsplit(|b| *b == b'\n');
    let last = lines.next().unwrap_or_default();
    let mut whole = last;
    let head: VersionOnly = match serde_json::from_slice(last) {
        Ok(head) => head,
        Err(torn) => lines
            .find_map(|line| {
                whole = line;
                serde_json::from_slice(line).ok()
            })
            .ok_or_else(|| json(torn))?,
    };
    if head.version != version {
        return Err(Error::Version { path: path.to_owned(), found: head.version, wanted: version });
    }
    let v: Versioned<T> = serde_json::from_slice(whole).map_err(json)?;
    Ok(Some(v.data))
}

/// Exclusive ownership of a data folder, released when dropped or when the process ends.
#[derive(Debug)]
pub struct DirLock {
    _file: File,
}

/// How long the last child of a killed process may hold its lock: a child has a copy of it from its fork to its exec.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);

impl DirLock {
    /// Takes `dir`/lock as [`DirLock::try_take`], and waits a little for one whose holder was just killed.
    pub async fn take(dir: &Path) -> Result<DirLock, Error> {
        let start = tokio::time::Instant::now();
        loop {
            match DirLock::try_take(dir) {
                Err(Error::Locked { .. }) if start.elapsed() < LOCK_PATIENCE => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                other => return other,
            }
        }
    }

    /// Takes `dir`/lock; fails with [`Error::Locked`] when another process holds it.
    pub fn try_take(dir: &Path) -> Result<DirLock, Error> {
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
    fn the_last_whole_line_counts() {
        let dir = tempfile::tempdir().unwrap();
        let p = dir.path().join("a.json");
        let read = || read_json::<Vec<u32>>(&p, 1).unwrap();
        append_json(&p, 1, &vec![0u32]).unwrap();
        append_json(&p, 1, &vec![1u32]).unwrap();
        assert_eq!(read(), Some(vec![1]));
        let whole = fs::read(&p).unwrap();
        append_json(&p, 1, &vec![2u32]).unwrap();
        assert_eq!(read(), Some(vec![2]));
        // Killed or out of space in the middle of the second append, at any byte.
        let all = fs::read(&p).unwrap();
        for end in whole.len()..all.len() {
            fs::write(&p, &all[..end]).unwrap();
            assert_eq!(read(), Some(vec![1]), "{end} bytes");
            append_json(&p, 1, &vec![3u32]).unwrap();
            assert_eq!(read(), Some(vec![3]), "after {end} bytes");
        }
        assert!(matches!(read_json::<Vec<u32>>(&p, 2), Err(Error::Version { found: 1, wanted: 2, .. })));
    }

    #[test]
    fn a_file_with_many_lines_is_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        let p = dir.path().join("a.json");
        for n in 0..200 {
            append_json(&p, 1, &vec![n; 200]).unwrap();
        }
        assert_eq!(read_json::<Vec<u32>>(&p, 1).unwrap(), Some(vec![199; 200]));
        assert!(fs::metadata(&p).unwrap().len() < APPENDED_LIMIT + 4096);
    }

    #[test]
    fn a_bare_name_is_in_the_current_folder() {
        let name = crate::testkit::unique_name("durable-");
        write_atomic(Path::new(&name), b"x", 0o600, Sync::Disk).unwrap();
        assert_eq!(fs::read(&name).unwrap(), b"x");
        fs::remove_file(&name).unwrap();
    }

    #[tokio::test]
    async fn a_second_lock_is_refused_until_the_first_goes() {
        let dir = tempfile::tempdir().unwrap();
        let first = DirLock::try_take(dir.path()).unwrap();
        assert!(matches!(DirLock::try_take(dir.path()), Err(Error::Locked { .. })));
        let taken = DirLock::take(dir.path());
        let release = async {
            tokio::task::yield_now().await;
            drop(first);
        };
        let (second, ()) = tokio::join!(taken, release);
        let _second = second.unwrap();
        assert!(matches!(DirLock::try_take(dir.path()), Err(Error::Locked { .. })));
    }
}
