//! What of a container's spec is needed after its creation, beside its seccomp filter: by execs, at its start and at its end. Most
//! containers need nothing and have no such file.

use std::fs;
use std::path::{Path, PathBuf};

use libcontainer::container::{ContainerStatus, State};
use oci_spec::runtime::{Hook, Spec};
use serde::{Deserialize, Serialize};

use crate::{Error, Kind};

/// Lies in [`Kept::path`].
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Kept {
    state: State,
    pub listener: Option<Listener>,
    pub poststart: Vec<Hook>,
    pub poststop: Vec<Hook>,
}

/// Who answers system calls, by the profile (OCI runtime spec, config-linux, "Seccomp").
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Listener {
    /// A stream socket of the host.
    pub path: PathBuf,
    pub metadata: Option<String>,
}

/// The container's state as hooks and listeners are told it.
pub(crate) fn state(id: &str, bundle: &Path, spec: &Spec) -> State {
    let mut state = State::new(id, ContainerStatus::Creating, None, bundle.to_owned());
    state.annotations = Some(spec.annotations().clone().unwrap_or_default());
    state
}

impl Kept {
    /// `None` when nothing of it is needed later.
    pub(crate) fn new(
        state: State,
        listener: Option<Listener>,
        poststart: Vec<Hook>,
        poststop: Vec<Hook>,
    ) -> Option<Kept> {
        let needed = listener.is_some() || !poststart.is_empty() || !poststop.is_empty();
        needed.then_some(Kept { state, listener, poststart, poststop })
    }

    pub(crate) fn path(root: &Path, id: &str) -> PathBuf {
        root.join(format!("{id}.kept"))
    }

    pub(crate) fn save(&self, root: &Path) -> Result<(), Error> {
        let at = Kept::path(root, &self.state.id);
        let failed = |e: &std::io::Error| Error::io("state", &format!("cannot write {}", at.display()), e);
        let bytes = serde_json::to_vec(self).map_err(|e| failed(&e.into()))?;
        fs::write(&at, bytes).map_err(|e| failed(&e))
    }

    pub(crate) fn load(root: &Path, id: &str) -> Result<Kept, Error> {
        let at = Kept::path(root, id);
        let bytes =
            fs::read(&at).map_err(|e| Error::io("state", &format!("cannot read {}", at.display()), &e))?;
        Kept::parse(&bytes)
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<Kept, Error> {
        serde_json::from_slice(bytes).map_err(|e| {
            let text = format!("what was kept of the container is damaged: {e}");
            Error::new(Kind::Runtime, "state", text, 0)
        })
    }

    pub(crate) fn state(&self, status: ContainerStatus, pid: Option<i32>) -> State {
        State { status, pid, ..self.state.clone() }
    }
}
