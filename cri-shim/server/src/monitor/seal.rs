//! The monitor runs from a read-only view of its program file (CVE-2019-5736). It can make that view itself, at the price of being
//! executed twice; here it is made ahead.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::mount_setattr::{self, Change};

/// A mount of the file alone, in no mount namespace.
pub(super) fn read_only(program: &Path) -> io::Result<OwnedFd> {
    let view = open_tree(CWD, program, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    mount_setattr::set(view.as_fd(), Change::ReadOnly, false)?;
    Ok(view)
}
