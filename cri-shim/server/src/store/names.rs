//! Reservation of names, so that two creations of the same pod or container cannot both succeed.

use std::collections::HashMap;

use orlop_proto::cri::{ContainerMetadata, PodSandboxMetadata};
use parking_lot::Mutex;

use crate::error::{Error, Result};

/// The name a sandbox occupies.
pub(crate) fn sandbox_name(m: &PodSandboxMetadata) -> String {
    format!("{}_{}_{}_{}", m.name, m.namespace, m.uid, m.attempt)
}

/// The name a container occupies.
pub(crate) fn container_name(m: &ContainerMetadata, pod: &PodSandboxMetadata) -> String {
    format!("{}_{}_{}", m.name, sandbox_name(pod), m.attempt)
}

/// Name to ids: one, but for records that claim the same.
#[derive(Default)]
pub(crate) struct Names(Mutex<HashMap<String, Vec<String>>>);

impl Names {
    pub fn reserve(&self, name: &str, id: &str) -> Result<()> {
        let mut names = self.0.lock();
        if let Some(other) = names.get(name).and_then(|ids| ids.iter().find(|other| *other != id)) {
            return Err(Error::NameTaken { name: name.to_owned(), id: other.clone() });
        }
        names.insert(name.to_owned(), vec![id.to_owned()]);
        Ok(())
    }

    /// For `id`, which is there and has this name, whoever else has it: the name is free when all of them are gone. Returns one of
    /// the others.
    pub fn share(&self, name: &str, id: &str) -> Option<String> {
        let mut names = self.0.lock();
        let ids = names.entry(name.to_owned()).or_default();
        let other = ids.iter().find(|other| *other != id).cloned();
        if !ids.iter().any(|held| held == id) {
            ids.push(id.to_owned());
        }
        other
    }

    /// Releases every name that `id` holds.
    pub fn release(&self, id: &str) {
        self.0.lock().retain(|_, ids| {
            ids.retain(|held| held != id);
            !ids.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_holder() {
        let names = Names::default();
        names.reserve("a", "1").unwrap();
        names.reserve("a", "1").unwrap();
        assert!(matches!(names.reserve("a", "2"), Err(Error::NameTaken { id, .. }) if id == "1"));
        names.release("1");
        names.reserve("a", "2").unwrap();
    }

    #[test]
    fn a_shared_name_is_free_after_the_last_holder() {
        for order in [["1", "2"], ["2", "1"]] {
            let names = Names::default();
            assert_eq!(names.share("a", "1"), None);
            assert_eq!(names.share("a", "2").as_deref(), Some("1"));
            names.release(order[0]);
            assert!(matches!(names.reserve("a", "3"), Err(Error::NameTaken { id, .. }) if id == order[1]));
            names.release(order[1]);
            names.reserve("a", "3").unwrap();
        }
    }
}
