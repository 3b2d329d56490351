//! Resource limits of a process. A hard limit above the caller's own is cut to that where the right to raise it is missing.

use oci_spec::runtime::{PosixRlimitType, Process};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::{Error, Kind};

pub(crate) struct Rlimits {
    all: Vec<(PosixRlimitType, Resource, Rlimit)>,
    clamped: Vec<String>,
}

fn resource(t: PosixRlimitType) -> Resource {
    use PosixRlimitType as T;
    match t {
        T::RlimitCpu => Resource::Cpu,
        T::RlimitFsize => Resource::Fsize,
        T::RlimitData => Resource::Data,
        T::RlimitStack => Resource::Stack,
        T::RlimitCore => Resource::Core,
        T::RlimitRss => Resource::Rss,
        T::RlimitNproc => Resource::Nproc,
        T::RlimitNofile => Resource::Nofile,
        T::RlimitMemlock => Resource::Memlock,
        T::RlimitAs => Resource::As,
        T::RlimitLocks => Resource::Locks,
        T::RlimitSigpending => Resource::Sigpending,
        T::RlimitMsgqueue => Resource::Msgqueue,
        T::RlimitNice => Resource::Nice,
        T::RlimitRtprio => Resource::Rtprio,
        T::RlimitRttime => Resource::Rttime,
    }
}

/// Pure: what can be had of `wanted` when nothing above `most` can; `None` is "unlimited" everywhere.
fn clamp(wanted: &Rlimit, most: Option<u64>) -> Rlimit {
    let lower = |a: Option<u64>, b: Option<u64>| match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    };
    let maximum = lower(wanted.maximum, most);
    Rlimit { current: lower(wanted.current, maximum), maximum }
}

impl Rlimits {
    pub(crate) fn new(p: &Process) -> Rlimits {
        let value = |n: u64| (n != u64::MAX).then_some(n);
        let one = |r: &oci_spec::runtime::PosixRlimit| {
            let wanted = Rlimit { current: value(r.soft()), maximum: value(r.hard()) };
            (r.typ(), resource(r.typ()), wanted)
        };
        let mut all: Vec<_> = p.rlimits().iter().flatten().map(one).collect();
        let mut clamped = Vec::new();
        if !may_raise() {
            for (name, resource, wanted) in &mut all {
                let had = clamp(wanted, getrlimit(*resource).maximum);
                if had != *wanted {
                    clamped.push(format!("{name:?}"));
                    *wanted = had;
                }
            }
        }
        Rlimits { all, clamped }
    }

    /// Names of those that could not be had in full.
    pub(crate) fn clamped(&self) -> &[String] {
        &self.clamped
    }

    /// For the calling process.
    pub(crate) fn set(&self) -> Result<(), Error> {
        for (name, resource, limit) in &self.all {
            setrlimit(*resource, *limit).map_err(|e| {
                Error::new(Kind::Runtime, "rlimit", format!("cannot set {name:?}: {e}"), e.raw_os_error())
            })?;
        }
        Ok(())
    }
}

fn may_raise() -> bool {
    caps::has_cap(None, caps::CapSet::Effective, caps::Capability::CAP_SYS_RESOURCE).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_the_kernels() {
        for (name, number) in crate::headers::numbers("asm-generic/resource.h", "RLIMIT_") {
            let limit: PosixRlimitType = serde_json::from_value(format!("RLIMIT_{name}").into())
                .unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(resource(limit) as u32, number, "{name}");
        }
    }

    #[test]
    fn nothing_above_what_is_there() {
        let of = |current, maximum| Rlimit { current, maximum };
        let cases = [
            (of(Some(10), Some(20)), Some(15), of(Some(10), Some(15))),
            (of(Some(18), Some(20)), Some(15), of(Some(15), Some(15))),
            (of(None, None), Some(15), of(Some(15), Some(15))),
            (of(Some(10), Some(20)), None, of(Some(10), Some(20))),
            (of(None, None), None, of(None, None)),
        ];
        for (wanted, most, want) in cases {
            assert_eq!(clamp(&wanted, most), want, "{wanted:?} {most:?}");
        }
    }
}
