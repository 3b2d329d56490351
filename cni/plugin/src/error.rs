use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use orlop_cni_types::{ConfError, ErrorResult, ResultError, SpecVersion, code};

use crate::ipam::IpamError;

/// Why the plugin could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("environment variable {0} is missing or not valid")]
    Environment(&'static str),
    #[error("cannot read the configuration from standard input")]
    Stdin(#[source] io::Error),
    #[error("the configuration on standard input is not valid")]
    Decode(#[source] serde_json::Error),
    #[error("the configuration is not valid")]
    Conf(#[from] ConfError),
    #[error("cniVersion {0} has no {1}")]
    NotInVersion(SpecVersion, &'static str),
    #[error("{field}: {problem}")]
    Field { field: &'static str, problem: String },
    #[error("prevResult is not valid")]
    Previous(#[source] ResultError),
    #[error("orlop-cni makes the pod's interface and must be the first plugin of the network")]
    NotFirst,
    #[error("cannot open network namespace {path}", path = path.display())]
    OpenNetns { path: PathBuf, source: io::Error },
    #[error("cannot enter network namespace {path}", path = path.display())]
    EnterNetns { path: PathBuf, source: io::Error },
    #[error("cannot {what}")]
    Netlink { what: String, source: io::Error },
    #[error("a host port of the pod leads to another pod already; choose another port or delete that pod")]
    HostPort,
    #[error("the kernel lacks nf_tables with NAT (modules nf_tables, nft_chain_nat, nft_masq, nft_fib)")]
    NoNftables(#[source] io::Error),
    #[error("cannot write {value:?} to {path}", path = path.display())]
    Sysctl { path: PathBuf, value: &'static str, source: io::Error },
    #[error("the pod's interface {0} exists already")]
    InterfaceExists(String),
    #[error("address {ip} has a route on this node already; remove it or choose another range")]
    AddressInUse { ip: IpAddr },
    #[error(transparent)]
    Ipam(#[from] IpamError),
    #[error("the attachment is not as it was made: {0}")]
    Check(String),
}

impl Error {
    fn code(&self) -> u32 {
        match self {
            Error::Environment(_) => code::INVALID_ENVIRONMENT,
            Error::Stdin(_)
            | Error::Sysctl { .. }
            | Error::Netlink { .. }
            | Error::NoNftables(_)
            | Error::EnterNetns { .. } => code::IO,
            Error::OpenNetns { .. } => code::UNKNOWN_CONTAINER,
            Error::Decode(_) => code::DECODING,
            Error::Conf(ConfError::Version(_) | ConfError::Unsupported(_)) | Error::NotInVersion(..) => {
                code::INCOMPATIBLE_VERSION
            }
            Error::Conf(_) | Error::Field { .. } | Error::Previous(_) | Error::NotFirst => {
                code::INVALID_CONFIG
            }
            Error::Ipam(IpamError::Exhausted { .. } | IpamError::Held { .. }) => code::TRY_AGAIN_LATER,
            Error::Ipam(IpamError::State(_)) => code::IO,
            Error::Ipam(_) => 100,
            Error::InterfaceExists(_) | Error::AddressInUse { .. } => 101,
            Error::Check(_) => 102,
            Error::HostPort => 103,
        }
    }

    /// What the runtime gets on standard output.
    pub fn to_result(&self, version: SpecVersion) -> ErrorResult {
        let whole = orlop_base::telemetry::chain(self);
        let msg = self.to_string();
        let details = whole.strip_prefix(&msg).unwrap_or_default().trim_start_matches(": ").to_owned();
        ErrorResult { cni_version: version.as_str().to_owned(), code: self.code(), msg, details }
    }
}
