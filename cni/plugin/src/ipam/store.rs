//! The record of addresses on disk: one file for each boot, replaced in one step under a lock.
//!
//! Pods and their links do not outlive the kernel, so allocations are valid for the boot whose id is in the file's name.
//! For the same reason nothing is synced to disk: a killed process loses nothing, and after a power cut nothing counts.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use orlop_base::durable;

use super::plan::{IpamError, State};

const VERSION: u32 = 1;
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The turn of this process's threads: the next one goes on at once, while another process is only looked for now and then.
static TURN: Mutex<()> = Mutex::new(());
/// The longest pause between two looks. A holder takes well below a millisecond.
const PAUSE: Duration = Duration::from_millis(2);

/// Exclusive access to a network's record until dropped.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    _lock: File,
    _turn: MutexGuard<'static, ()>,
    pub state: State,
    /// What is on disk cannot be read, and `state` is empty: see [`Store::repair`].
    pub damaged: bool,
}

fn failed(what: &'static str, path: &Path, source: io::Error) -> IpamError {
    IpamError::State(durable::Error::Io { what, path: path.to_owned(), source })
}

impl Store {
    /// Opens the record of `network` below `data_dir`, waiting for whoever has it until `deadline`.
    pub fn open(data_dir: &Path, network: &str, deadline: Instant) -> Result<Store, IpamError> {
        let boot = Path::new(BOOT_ID);
        let id = fs::read_to_string(boot).map_err(|e| failed("read", boot, e))?;
        Self::open_for_boot(data_dir, network, id.trim(), deadline)
    }

    fn open_for_boot(
        data_dir: &Path,
        network: &str,
        boot_id: &str,
        deadline: Instant,
    ) -> Result<Store, IpamError> {
        // What a thread that panicked has left is what a killed process leaves.
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = data_dir.join(network);
        let lock_path = dir.join("lock");
        let open = || File::options().create(true).truncate(false).write(true).open(&lock_path);
        let lock = match open() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(&dir).map_err(|e| failed("create", &dir, e))?;
                open()
            }
            other => other,
        }
        .map_err(|e| failed("open", &lock_path, e))?;
        take(&lock, &lock_path, deadline)?;
        let path = dir.join(format!("{boot_id}.json"));
        let (state, damaged) = match durable::read_json(&path, VERSION) {
            Ok(Some(state)) => (state, false),
            Ok(None) => {
                remove_others(&dir, &path).map_err(|e| failed("clear", &dir, e))?;
                (State::default(), false)
            }
            Err(durable::Error::Json { .. }) => (State::default(), true),
            Err(e) => return Err(IpamError::State(e)),
        };
        Ok(Store { path, _lock: lock, _turn: turn, state, damaged })
    }

    /// Puts what else is known in the place of a damaged record, which is kept beside it.
    pub fn repair(&mut self, state: State) -> Result<(), IpamError> {
        let aside = self.path.with_extension("json.damaged");
        match fs::remove_file(&aside) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &aside, e)),
            _ => {}
        }
        // Not renamed: without a record all addresses would count as free.
        fs::hard_link(&self.path, &aside).map_err(|e| failed("keep a copy of", &self.path, e))?;
        self.state = state;
        self.save()?;
        self.damaged = false;
        Ok(())
    }

    /// Makes the state the valid one.
    pub fn save(&self) -> Result<(), IpamError> {
        durable::write_json(&self.path, VERSION, &self.state, durable::Sync::PageCache)
            .map_err(IpamError::State)
    }

    /// [`Store::save`] after a release, which is to succeed on a full disk too: what is shorter fits into the old one's place. Whoever
    /// is killed in between leaves a damaged record.
    pub fn save_shorter(&self) -> Result<(), IpamError> {
        match self.save() {
            Err(e) if e.is_full() => self.overwrite(),
            other => other,
        }
    }

    fn overwrite(&self) -> Result<(), IpamError> {
        let text = serde_json::json!({"version": VERSION, "data": self.state}).to_string();
        let file = File::options().write(true).open(&self.path).map_err(|e| failed("open", &self.path, e))?;
        let written = file.write_all_at(text.as_bytes(), 0).and_then(|()| file.set_len(text.len() as u64));
        written.map_err(|e| failed("write", &self.path, e))
    }
}

/// A holder's death frees the lock; one that was stopped keeps it.
fn take(lock: &File, path: &Path, deadline: Instant) -> Result<(), IpamError> {
    use rustix::fs::{FlockOperation::NonBlockingLockExclusive, flock};
    let mut pause = Duration::from_micros(50);
    loop {
        match flock(lock, NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                std::thread::sleep(pause);
                pause = (pause * 2).min(PAUSE);
            }
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(IpamError::Held { path: path.to_owned() }),
            Err(e) => return Err(failed("lock", path, e.into())),
        }
    }
}

/// Removes records of former boots and temporary files of killed writers.
fn remove_others(dir: &Path, keep: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path != keep && path.file_name().is_some_and(|n| n != "lock") && path.is_file() {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::plan::Range;
    use super::*;
    use orlop_cni_types::Attachment;

    fn owner(n: usize) -> Attachment {
        Attachment { container_id: format!("c{n}"), ifname: "eth0".into() }
    }

    fn open(data_dir: &Path, network: &str, boot_id: &str) -> Result<Store, IpamError> {
        Store::open_for_boot(data_dir, network, boot_id, Instant::now() + Duration::from_secs(60))
    }

    #[test]
    fn whoever_keeps_the_lock_is_not_waited_for_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path(), "n", "boot").unwrap());
        // As another process has it.
        let held = File::open(dir.path().join("n/lock")).unwrap();
        rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).unwrap();
        let soon = Instant::now() + Duration::from_millis(20);
        let e = Store::open_for_boot(dir.path(), "n", "boot", soon).unwrap_err();
        assert!(matches!(&e, IpamError::Held { path } if path.ends_with("n/lock")), "{e}");
        drop(held);
        open(dir.path(), "n", "boot").unwrap();
    }

    #[test]
    fn survives_a_restart_but_not_a_boot() {
        let dir = tempfile::tempdir().unwrap();
        let sets = [vec![Range::new("10.0.0.0/24".parse().unwrap(), None, None).unwrap()]];
        let mut s = open(dir.path(), "n", "boot1").unwrap();
        s.state.allocate(&owner(1), &sets, &[]).unwrap();
        s.save().unwrap();
        s.state.allocate(&owner(2), &sets, &[]).unwrap();
        drop(s); // not saved: as if killed
        let s = open(dir.path(), "n", "boot1").unwrap();
        assert_eq!(s.state.allocations.len(), 1);
        drop(s);
        let s = open(dir.path(), "n", "boot2").unwrap();
        assert!(s.state.allocations.is_empty());
        assert!(!dir.path().join("n/boot1.json").exists());
    }

    #[test]
    fn parallel_writers_never_share_an_address() {
        let dir = tempfile::tempdir().unwrap();
        let sets = [vec![Range::new("10.0.0.0/24".parse().unwrap(), None, None).unwrap()]];
        std::thread::scope(|scope| {
            for t in 0..8 {
                let (dir, sets) = (dir.path(), &sets);
                scope.spawn(move || {
                    for n in 0..20 {
                        let mut s = open(dir, "n", "boot").unwrap();
                        s.state.allocate(&owner(t * 100 + n), sets, &[]).unwrap();
                        s.save().unwrap();
                    }
                });
            }
        });
        let s = open(dir.path(), "n", "boot").unwrap();
        let all: std::collections::HashSet<_> = s.state.allocations.iter().map(|a| a.ip).collect();
        assert_eq!(all.len(), 160);
    }

    #[test]
    fn a_damaged_record_is_replaced_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let sets = [vec![Range::new("10.0.0.0/24".parse().unwrap(), None, None).unwrap()]];
        fs::create_dir(dir.path().join("n")).unwrap();
        for damage in ["{", ""] {
            fs::write(dir.path().join("n/boot.json"), damage).unwrap();
            let mut s = open(dir.path(), "n", "boot").unwrap();
            assert!(s.damaged);
            let mut known = State::default();
            known.allocate(&owner(1), &sets, &[]).unwrap();
            s.repair(known.clone()).unwrap();
            drop(s);
            let s = open(dir.path(), "n", "boot").unwrap();
            assert_eq!((s.damaged, &s.state), (false, &known));
            assert_eq!(fs::read_to_string(dir.path().join("n/boot.json.damaged")).unwrap(), damage);
        }
    }

    #[test]
    fn a_later_releases_record_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("n")).unwrap();
        fs::write(dir.path().join("n/boot.json"), r#"{"version": 99, "data": {}}"#).unwrap();
        let e = open(dir.path(), "n", "boot").unwrap_err();
        assert!(orlop_base::telemetry::chain(&e).contains("boot.json"), "{e}");
    }

    #[test]
    fn a_shorter_record_fits_into_the_old_ones_place() {
        let dir = tempfile::tempdir().unwrap();
        let sets = [vec![Range::new("10.0.0.0/24".parse().unwrap(), None, None).unwrap()]];
        let mut s = open(dir.path(), "n", "boot").unwrap();
        for n in 0..3 {
            s.state.allocate(&owner(n), &sets, &[]).unwrap();
        }
        s.save().unwrap();
        assert!(s.state.release(&owner(1)));
        s.overwrite().unwrap();
        let want = s.state.clone();
        drop(s);
        assert_eq!(open(dir.path(), "n", "boot").unwrap().state, want);
    }
}
