//! How many files a daemon may have open. The usual soft limit, 1024, is there for programs with select(2): a daemon takes what it may
//! have, and has containers begin with what it found.

use std::io;
use std::sync::OnceLock;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};

/// Nobody needs more, and programs that close all that they may have open take long where the limit is a thousand times that.
const MOST: u64 = 1 << 20;

/// As it was before [`raise`]; empty when nothing had to be raised.
static FOUND: OnceLock<Rlimit> = OnceLock::new();

/// Pure: the limit to be had where `found` is there; `None` when that is enough.
fn raised(found: Rlimit) -> Option<Rlimit> {
    let most = found.maximum.map_or(MOST, |hard| hard.min(MOST));
    found.current.is_some_and(|soft| soft < most).then_some(Rlimit { current: Some(most), ..found })
}

/// Raises this process's soft limit to the hard one.
pub fn raise() -> io::Result<()> {
    let found = getrlimit(Resource::Nofile);
    if let Some(more) = raised(found) {
        setrlimit(Resource::Nofile, more)?;
        let _ = FOUND.set(found);
    }
    Ok(())
}

/// Gives a process that this one has started the limit that was found, and with it all that it starts. From outside, since to change
/// what a child inherits costs a fork of the whole daemon.
pub fn give_found(to: Pid) -> io::Result<()> {
    if let Some(found) = FOUND.get() {
        prlimit(Some(to), Resource::Nofile, *found)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn what_is_raised() {
        let of = |soft, hard| {
            let limit = raised(Rlimit { current: soft, maximum: hard })?;
            assert_eq!(limit.maximum, hard, "the hard limit stays");
            limit.current
        };
        assert_eq!(of(Some(1024), Some(4096)), Some(4096));
        assert_eq!(of(Some(4096), Some(4096)), None);
        assert_eq!(of(Some(1024), Some(1 << 30)), Some(MOST));
        assert_eq!(of(Some(1024), None), Some(MOST));
        assert_eq!(of(Some(MOST + 1), Some(1 << 30)), None);
        assert_eq!(of(None, None), None);
    }

    const NAME: &str = "descriptors::tests::a_daemon_has_the_hard_limit_and_its_children_the_soft_one";
    const INNER: &str = "ORLOP_TEST_DESCRIPTORS";

    /// In a process of its own: the limit is the whole process's.
    #[test]
    fn a_daemon_has_the_hard_limit_and_its_children_the_soft_one() {
        if std::env::var_os(INNER).is_none() {
            let limits = r#"ulimit -Sn 200 && ulimit -Hn 300 && exec "$0" --exact "$1""#;
            let mut shell = Command::new("sh");
            shell.args(["-c", limits]).arg(std::env::current_exe().unwrap()).arg(NAME).env(INNER, "1");
            let out = shell.output().unwrap();
            let said = String::from_utf8_lossy(&out.stdout);
            assert!(out.status.success() && said.contains("1 passed"), "{said}");
            return;
        }
        // The child says what it has once it is told to.
        let child = || {
            let mut shell = Command::new("sh");
            shell.args(["-c", "read word; ulimit -Sn; ulimit -Hn"]);
            shell.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
        };
        let limits =
            |child: std::process::Child| String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        let early = child();
        give_found(Pid::from_child(&early)).unwrap();
        assert_eq!(limits(early), "200\n300\n", "nothing is raised yet");
        raise().unwrap();
        assert_eq!(getrlimit(Resource::Nofile).current, Some(300));
        assert_eq!(limits(child()), "300\n300\n");
        // Again, as in a daemon of several roles.
        raise().unwrap();
        let late = child();
        give_found(Pid::from_child(&late)).unwrap();
        assert_eq!(limits(late), "200\n300\n");
    }
}
