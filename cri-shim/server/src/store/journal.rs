//! A record in memory and in its file.

use std::path::PathBuf;
use std::sync::Arc;

use orlop_base::durable;
use parking_lot::Mutex;
use serde::Serialize;

use super::RECORD_VERSION;

struct Held<T> {
    record: Arc<T>,
    /// The file lacks what the record says.
    unwritten: bool,
}

/// See the module.
pub(crate) struct Journal<T> {
    pub file: PathBuf,
    held: Mutex<Held<T>>,
}

impl<T: Clone + Serialize> Journal<T> {
    pub fn new(record: T, file: PathBuf) -> Journal<T> {
        Journal { file, held: Mutex::new(Held { record: Arc::new(record), unwritten: false }) }
    }

    pub fn record(&self) -> Arc<T> {
        self.held.lock().record.clone()
    }

    /// A promise: on disk, then in memory, or in neither. `seen` is called before the next change.
    pub fn update(
        &self,
        change: impl FnOnce(&mut T),
        seen: impl FnOnce(&T),
    ) -> Result<Arc<T>, durable::Error> {
        let mut held = self.held.lock();
        let mut next = (*held.record).clone();
        change(&mut next);
        durable::append_json(&self.file, RECORD_VERSION, &next)?;
        *held = Held { record: Arc::new(next), unwritten: false };
        seen(&held.record);
        Ok(held.record.clone())
    }

    /// A fact: in memory in any case, and on disk if that takes it; whether it did. Only the first failure in a row is logged.
    pub fn note(&self, change: impl FnOnce(&mut T), seen: impl FnOnce(&T)) -> bool {
        let mut held = self.held.lock();
        let mut next = (*held.record).clone();
        change(&mut next);
        held.record = Arc::new(next);
        seen(&held.record);
        self.write(&mut held)
    }

    pub fn is_unwritten(&self) -> bool {
        self.held.lock().unwritten
    }

    /// Writes what the file lacks; whether it lacks nothing now.
    pub fn write_missing(&self) -> bool {
        let mut held = self.held.lock();
        !held.unwritten || self.write(&mut held)
    }

    fn write(&self, held: &mut Held<T>) -> bool {
        let file = self.file.display();
        let written = durable::append_json(&self.file, RECORD_VERSION, &*held.record);
        match (&written, held.unwritten) {
            (Ok(()), true) => tracing::info!(%file, "the record is written at last"),
            (Err(e), false) => {
                let error = orlop_base::telemetry::chain(e);
                tracing::error!(%file, error, "cannot write a record now; going on without, and trying again");
            }
            _ => {}
        }
        held.unwritten = written.is_err();
        written.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_hold_without_a_file_and_promises_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("gone/record.json");
        let journal = Journal::new(1u32, file.clone());
        assert!(journal.update(|r| *r = 2, |_| panic!("not seen")).is_err());
        assert!(!journal.is_unwritten());
        let mut seen = 0;
        assert!(!journal.note(|r| *r = 3, |r| seen = *r));
        assert_eq!((*journal.record(), seen), (3, 3));
        assert!(journal.is_unwritten() && !journal.write_missing());
        std::fs::create_dir(dir.path().join("gone")).unwrap();
        assert!(journal.write_missing() && !journal.is_unwritten());
        assert_eq!(durable::read_json(&file, RECORD_VERSION).unwrap(), Some(3u32));
        // A promise that is kept carries what was missing.
        std::fs::remove_dir_all(dir.path().join("gone")).unwrap();
        assert!(!journal.note(|r| *r += 10, |_| {}));
        std::fs::create_dir(dir.path().join("gone")).unwrap();
        journal.update(|r| *r += 100, |_| {}).unwrap();
        assert!(!journal.is_unwritten());
        assert_eq!(durable::read_json(&file, RECORD_VERSION).unwrap(), Some(113u32));
    }
}
