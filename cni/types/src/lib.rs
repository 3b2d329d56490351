//! The vocabulary of the Container Network Interface: configuration, results and errors of specification 1.1.0 and of
//! the result versions 0.3.0 to 1.0.0. No I/O.

mod call;
mod conf;
mod error;
#[cfg(test)]
mod fuzz;
mod names;
mod node;
mod result;
mod version;

pub use call::{Answer, Builtin, Call};
pub use conf::{ConfError, NetworkConfig, PluginConfig};
pub use error::{ErrorResult, code};
pub use names::{HOST_INTERFACE_PREFIX, stable_hash};
pub use node::{Attachment, Bandwidth, DnsConfig, IpRange, OrlopNetwork, PortMapping, render_conflist};
pub use result::{CniResult, Dns, Interface, IpConfig, ResultError, Route};
pub use version::{SpecVersion, UnknownVersion, VersionResult};

/// Key of the attachments still in use in the configuration that GC gets (specification 1.1.0, "GC").
pub const VALID_ATTACHMENTS: &str = "cni.dev/valid-attachments";

/// What a plugin is asked to do: the value of `CNI_COMMAND`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    Add,
    Del,
    Check,
    Status,
    Gc,
    Version,
}

impl Command {
    pub fn as_str(self) -> &'static str {
        match self {
            Command::Add => "ADD",
            Command::Del => "DEL",
            Command::Check => "CHECK",
            Command::Status => "STATUS",
            Command::Gc => "GC",
            Command::Version => "VERSION",
        }
    }

    /// `None` for a word that is no command of the specification.
    pub fn parse(word: &str) -> Option<Command> {
        [Command::Add, Command::Del, Command::Check, Command::Status, Command::Gc, Command::Version]
            .into_iter()
            .find(|c| c.as_str() == word)
    }

    /// The first specification that has the command.
    pub fn since(self) -> SpecVersion {
        match self {
            Command::Add | Command::Del | Command::Version => SpecVersion::V0_1_0,
            Command::Check => SpecVersion::V0_4_0,
            Command::Status | Command::Gc => SpecVersion::V1_1_0,
        }
    }
}

impl std::fmt::Display for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
