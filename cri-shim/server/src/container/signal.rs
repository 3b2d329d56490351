//! Signals by name, as images and the CRI write them.

use oci_spec::image::ImageConfiguration;
use orlop_proto::cri;

use crate::error::{Error, Result};

/// The number of `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`, `SIGRTMINPLUS3`, `RTMAX-1`.
pub(crate) fn parse(name: &str) -> Option<i32> {
    let (rtmin, rtmax) = (libc::SIGRTMIN(), libc::SIGRTMAX());
    let valid = |n: i32| (1..=rtmax).contains(&n).then_some(n);
    if let Ok(n) = name.parse::<i32>() {
        return valid(n);
    }
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("SIG").unwrap_or(&upper);
    let offset = |rest: &str, word: &str, sign: char| -> Option<i32> {
        if rest.is_empty() {
            return Some(0);
        }
        rest.strip_prefix(word).or_else(|| rest.strip_prefix(sign))?.parse().ok()
    };
    if let Some(rest) = short.strip_prefix("RTMIN") {
        return offset(rest, "PLUS", '+').and_then(|n| valid(rtmin + n));
    }
    if let Some(rest) = short.strip_prefix("RTMAX") {
        return offset(rest, "MINUS", '-').and_then(|n| valid(rtmax - n));
    }
    // Second names of the same number.
    let known = match short {
        "CLD" => "CHLD",
        "IOT" => "ABRT",
        "POLL" => "IO",
        other => other,
    };
    format!("SIG{known}").parse::<nix::sys::signal::Signal>().ok().map(|s| s as i32)
}

/// The container's own stop signal (KEP-4960), else its image's, else SIGTERM.
pub(crate) fn stop_signal(config: &cri::ContainerConfig, image: &ImageConfiguration) -> Result<i32> {
    if config.stop_signal() != cri::Signal::RuntimeDefault {
        let name = config.stop_signal().as_str_name();
        return parse(name).ok_or_else(|| Error::Invalid(format!("stop signal {name} is not known")));
    }
    let named = image.config().as_ref().and_then(|c| c.stop_signal().clone()).filter(|s| !s.is_empty());
    match named {
        Some(name) => parse(&name)
            .ok_or_else(|| Error::Invalid(format!("the image's stop signal {name:?} is not known"))),
        None => Ok(libc::SIGTERM),
    }
}

/// The CRI's name for a number, for ContainerStatus.
pub(crate) fn cri_name(number: i32) -> cri::Signal {
    (1..=65)
        .filter_map(|n| cri::Signal::try_from(n).ok())
        .find(|s| parse(s.as_str_name()) == Some(number))
        .unwrap_or(cri::Signal::RuntimeDefault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (name, want) in [
            ("SIGTERM", Some(15)),
            ("term", Some(15)),
            ("9", Some(9)),
            ("SIGRTMIN+3", Some(37)),
            ("SIGRTMINPLUS3", Some(37)),
            ("SIGRTMAXMINUS1", Some(63)),
            ("RTMAX", Some(64)),
            ("SIGCLD", Some(17)),
            ("0", None),
            ("SIGNOPE", None),
            ("RTMIN+99", None),
        ] {
            assert_eq!(parse(name), want, "{name}");
        }
    }

    #[test]
    fn every_signal_of_the_cri_is_known_here() {
        for n in 1..=65 {
            let s = cri::Signal::try_from(n).unwrap();
            assert!(parse(s.as_str_name()).is_some(), "{}", s.as_str_name());
        }
        assert_eq!(cri_name(15), cri::Signal::Sigterm);
    }
}
