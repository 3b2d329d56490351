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

/// Name to id.
#[derive(Default)]
pub(crate) struct Names(Mutex<HashMap<String, String>>);

impl Names {
    pub fn reserve(&self, name: &str, id: &str) -> Result<()> {
        let mut names = self.0.lock();
        if let Some(other) = names.get(name).filter(|other| *other != id) {
            return Err(Error::NameTaken { name: name.to_owned(), id: other.clone() });
        }
        names.insert(name.to_owned(), id.to_owned());
        Ok(())
    }

    /// Does `then` if no name is held, before any can be.
    pub fn if_none(&self, then: impl FnOnce()) {
        let names = self.0.lock();
        if names.is_empty() {
            then();
        }
    }

    /// Releases every name that `id` holds.
    pub fn release(&self, id: &str) {
        self.0.lock().retain(|_, holder| holder != id);
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
        names.if_none(|| panic!("one is held"));
        names.release("1");
        let mut none = false;
        names.if_none(|| none = true);
        assert!(none);
        names.reserve("a", "2").unwrap();
    }
}
