//! The one place where libcontainer's errors become ours: keeps the stage and the errno.

use libcontainer::error::LibcontainerError as L;
use libcontainer::process::container_main_process::ProcessError;

use crate::{Error, Kind};

pub(crate) fn libcontainer(e: &L) -> Error {
    let (kind, stage) = classify(e);
    let out = from_text(chain(e));
    let errno = errno_in_chain(e).unwrap_or(out.errno);
    Error { kind, stage: stage.map_or(out.stage, str::to_owned), errno, ..out }
}

/// An error of which only text is left.
fn from_text(message: String) -> Error {
    let errno = errno_in_text(&message).unwrap_or(0);
    let stage = stage_in_text(&message).unwrap_or("runtime");
    Error::new(Kind::Runtime, stage, message, errno)
}

fn classify(e: &L) -> (Kind, Option<&'static str>) {
    match e {
        L::IncorrectStatus(_) | L::Exist | L::NoDirectory => (Kind::WrongState, Some("state")),
        L::InvalidInput(_) | L::InvalidID(_) | L::MissingSpec(_) | L::InvalidSpec(_) | L::Spec(_) => {
            (Kind::Invalid, Some("spec"))
        }
        L::Tty(_) => (Kind::Runtime, Some("tty")),
        L::UserNamespace(_) | L::NoUserNamespace => (Kind::Runtime, Some("namespace")),
        L::Hook(_) => (Kind::Runtime, Some("hook")),
        L::CgroupManager(_) | L::CgroupCreate(_) | L::CgroupGet(_) | L::OtherCgroup(_) => {
            (Kind::Runtime, Some("cgroup"))
        }
        L::Capabilities(_) => (Kind::Runtime, Some("capabilities")),
        L::MainProcess(ProcessError::Hooks(_)) => (Kind::Runtime, Some("hook")),
        _ => (Kind::Runtime, None),
    }
}

pub(crate) fn chain(e: &dyn std::error::Error) -> String {
    let mut out = e.to_string();
    let mut source = e.source();
    while let Some(s) = source {
        let text = s.to_string();
        if !out.contains(&text) {
            out.push_str(": ");
            out.push_str(&text);
        }
        source = s.source();
    }
    out
}

fn errno_in_chain(e: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut at = Some(e);
    while let Some(e) = at {
        if let Some(io) = e.downcast_ref::<std::io::Error>()
            && let Some(n) = io.raw_os_error()
        {
            return Some(n);
        }
        if let Some(n) = e.downcast_ref::<nix29::errno::Errno>() {
            return Some(*n as i32);
        }
        at = e.source();
    }
    None
}

/// Finds "(os error 2)" or a symbolic name such as "ENOENT" in text that came through libcontainer's pipe.
pub(crate) fn errno_in_text(text: &str) -> Option<i32> {
    if let Some(at) = text.find("os error ") {
        let digits: String = text[at + 9..].chars().take_while(char::is_ascii_digit).collect();
        if let Ok(n) = digits.parse() {
            return Some(n);
        }
    }
    text.split(|c: char| !c.is_ascii_uppercase() && !c.is_ascii_digit())
        .filter(|w| w.len() > 2 && w.starts_with('E'))
        .find_map(|w| (1..134).find(|n| format!("{:?}", nix::errno::Errno::from_raw(*n)) == w))
}

fn stage_in_text(text: &str) -> Option<&'static str> {
    let text = text.to_lowercase();
    const WORDS: &[(&str, &str)] = &[
        ("cgroup", "cgroup"),
        ("executable", "exec"),
        ("execvp", "exec"),
        ("apparmor", "apparmor"),
        ("selinux", "selinux"),
        ("seccomp", "seccomp"),
        ("sysctl", "sysctl"),
        ("rootfs", "rootfs"),
        ("mount", "mount"),
        ("pivot", "rootfs"),
        ("namespace", "namespace"),
        ("capabilit", "capabilities"),
        ("rlimit", "rlimit"),
        ("tty", "tty"),
        ("console", "tty"),
        ("chdir", "cwd"),
        ("hook", "hook"),
    ];
    WORDS.iter().find(|(w, _)| text.contains(w)).map(|(_, s)| *s)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errno_from_text() {
        let cases = [
            ("exec failed: No such file or directory (os error 2)", Some(2)),
            ("failed to mount: Nix(EPERM)", Some(1)),
            ("EACCES: Permission denied", Some(13)),
            ("source: ENOTDIR, at ENTRY", Some(20)),
            ("nothing here", None),
            ("Error EXEC", None),
        ];
        for (text, want) in cases {
            assert_eq!(errno_in_text(text), want, "{text}");
        }
    }

    #[test]
    fn stages_are_told_apart() {
        let e = libcontainer(&L::OtherCgroup("no".into()));
        assert_eq!((e.kind, e.stage.as_str()), (Kind::Runtime, "cgroup"));
        let e = libcontainer(&L::Exist);
        assert_eq!((e.kind, e.stage.as_str()), (Kind::WrongState, "state"));
        let e = libcontainer(&L::Other("failed to prepare rootfs err=Nix(ENOENT)".into()));
        assert_eq!((e.stage.as_str(), e.errno), ("rootfs", 2));
        assert!(e.message.contains("prepare rootfs"));
    }
}
