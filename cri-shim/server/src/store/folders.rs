//! Folders of records. Each is made ahead of time and moved to its place with its record inside, so that none is ever seen without.
//!
//! Ahead of time, because a file system may take longer for a handful of new inodes than the kernel for a pod's namespaces: ext4
//! without a journal looks through all inodes that were deleted in the last minutes before it gives one out.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use orlop_base::durable;
use parking_lot::Mutex;
use serde::Serialize;

use super::{ANSWERED, RECORD_VERSION};
use crate::error::{Error, Result};
use crate::mounts;

/// Makes folders of one kind.
#[derive(Debug)]
pub(crate) struct Folders {
    /// Where they are made. On the file system of their places.
    workshop: PathBuf,
    /// The record's file.
    record: &'static str,
    /// Others that will be needed, by whoever may read them.
    files: &'static [&'static str],
    spare: Mutex<Option<Unplaced>>,
    next: AtomicU64,
}

/// Removed unless it comes to its place.
#[derive(Debug)]
struct Unplaced(PathBuf);

impl Drop for Unplaced {
    fn drop(&mut self) {
        // The next start empties the workshop anyway.
        let _ = mounts::remove_tree(&self.0);
    }
}

impl Folders {
    /// `workshop` is emptied.
    pub fn new(workshop: PathBuf, record: &'static str, files: &'static [&'static str]) -> Result<Folders> {
        mounts::remove_tree(&workshop)?;
        fs::create_dir_all(&workshop).map_err(Error::io("create", &workshop))?;
        Ok(Folders { workshop, record, files, spare: Mutex::default(), next: AtomicU64::new(0) })
    }

    fn empty(&self) -> Result<Unplaced> {
        let dir = self.workshop.join(self.next.fetch_add(1, Ordering::Relaxed).to_string());
        DirBuilder::new().mode(0o700).create(&dir).map_err(Error::io("create", &dir))?;
        Ok(Unplaced(dir))
    }

    /// Makes one for the next [`place`](Self::place), unless there is one.
    pub fn make_spare(&self) -> Result<()> {
        if self.spare.lock().is_some() {
            return Ok(());
        }
        let made = self.empty()?;
        let files = self.files.iter().map(|name| (*name, 0o644));
        for (name, mode) in files.chain([(self.record, 0o600), (ANSWERED, 0o600)]) {
            let path = made.0.join(name);
            let file = File::options().write(true).create_new(true).mode(mode).open(&path);
            file.map_err(Error::io("create", &path))?;
        }
        *self.spare.lock() = Some(made);
        Ok(())
    }

    pub fn drop_spare(&self) {
        drop(self.spare.lock().take());
    }

    /// The folder `at`, which must not exist, with `record` in it; the others and the record's copy may be there, empty.
    pub fn place<T: Serialize>(&self, at: &Path, record: &T) -> Result<()> {
        let spare = self.spare.lock().take();
        // Somebody may have cleaned up.
        let made = match spare.filter(|s| s.0.is_dir()) {
            Some(spare) => spare,
            None => self.empty()?,
        };
        durable::append_json(&made.0.join(self.record), RECORD_VERSION, record)?;
        let placed = match (fs::rename(&made.0, at), at.parent()) {
            (Err(e), Some(above)) if e.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(above).map_err(Error::io("create", above))?;
                fs::rename(&made.0, at)
            }
            (renamed, _) => renamed,
        };
        placed.map_err(Error::io("create", at))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn folders_appear_with_their_record_spare_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let (workshop, places) = (dir.path().join("w"), dir.path().join("places"));
        fs::create_dir_all(workshop.join("left/over")).unwrap();
        let folders = Folders::new(workshop.clone(), "r.json", &["hosts"]).unwrap();
        let names = |at: &Path| {
            let mut names: Vec<_> = fs::read_dir(at).unwrap().map(|e| e.unwrap().file_name()).collect();
            names.sort();
            names
        };
        let record = |at: &Path| durable::read_json::<u32>(&at.join("r.json"), RECORD_VERSION).unwrap();
        assert!(names(&workshop).is_empty());
        let fresh = places.join("fresh");
        folders.place(&fresh, &1u32).unwrap();
        assert_eq!((record(&fresh), names(&fresh)), (Some(1), vec!["r.json".into()]));
        folders.make_spare().unwrap();
        folders.make_spare().unwrap();
        assert_eq!(names(&workshop).len(), 1);
        let spare = places.join("spare");
        folders.place(&spare, &2u32).unwrap();
        assert_eq!(
            (record(&spare), names(&spare)),
            (Some(2), vec![ANSWERED.into(), "hosts".into(), "r.json".into()])
        );
        for at in [&fresh, &spare] {
            let mode = |p: &Path| fs::metadata(p).unwrap().mode() & 0o777;
            assert_eq!((mode(at), mode(&at.join("r.json"))), (0o700, 0o600));
        }
        // One that somebody has cleaned up, and one whose place is taken.
        folders.make_spare().unwrap();
        fs::remove_dir_all(workshop.join("2")).unwrap();
        folders.place(&places.join("third"), &3u32).unwrap();
        assert!(folders.place(&spare, &4u32).is_err());
        assert_eq!(record(&spare), Some(2));
        folders.make_spare().unwrap();
        folders.drop_spare();
        assert!(names(&workshop).is_empty());
    }
}
