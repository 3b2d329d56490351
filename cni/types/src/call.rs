//! A plugin's work without a process of its own.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::{Command, ErrorResult};

/// What a plugin is asked: the parameters of the execution protocol (specification 1.1.0, section 2).
#[derive(Clone, Debug)]
pub struct Call {
    pub command: Command,
    pub container_id: String,
    /// Empty when there is none (any more).
    pub netns: PathBuf,
    pub ifname: String,
    pub args: String,
    /// What a plugin reads from its standard input.
    pub conf: Vec<u8>,
    /// How long to wait for others.
    pub limit: Duration,
}

/// What a plugin says.
#[derive(Clone, Debug)]
pub struct Answer {
    /// What it would print, if anything.
    pub result: Result<Option<Value>, ErrorResult>,
    /// What it would write to its standard error.
    pub notes: Vec<String>,
}

/// A plugin that is linked into the runtime. A process for each call costs more than the call does.
#[derive(Clone, Debug)]
pub struct Builtin {
    /// The `type` that it serves.
    pub name: &'static str,
    /// Called on a thread of its own, whose namespaces it may change; it ends by itself, whatever happens.
    pub call: fn(&Call) -> Answer,
    /// Where the same plugin lies as a program, for others that run it by its name.
    pub program_dir: PathBuf,
}
