//! Programs that outlive the daemon that started them. One that is still at work would finish after the next daemon has taken back
//! what it had begun.
//!
//! A daemon starts such a program with [`OWNER`] in its environment and in a process group of its own.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

/// Says in a program's environment whose it is: a folder that only its daemon works in.
pub const OWNER: &str = "ORLOP_OWNER";

/// A killed process ends as soon as the kernel lets it, unless a file system hangs.
const PATIENCE: Duration = Duration::from_secs(10);

fn says(environment: &[u8], owner: &OsStr) -> bool {
    let wanted = [OWNER.as_bytes(), b"=", owner.as_bytes()].concat();
    environment.split(|b| *b == 0).any(|v| v == wanted)
}

/// Process group and session, from /proc/PID/stat. A name may hold spaces and parentheses.
fn group_and_session(stat: &str) -> Option<(i32, i32)> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(2);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

/// Process groups of `owner`, also those whose leader has ended. What a program left running for good (a DHCP client, a name
/// server) has a session of its own and does not count.
fn running(owner: &OsStr) -> BTreeSet<i32> {
    let names = fs::read_dir("/proc").into_iter().flatten().flatten().map(|e| e.file_name());
    let pids = names.filter_map(|n| n.to_str()?.parse::<i32>().ok());
    // A process that has ended meanwhile says nothing.
    let ours = pids.filter(|pid| says(&fs::read(format!("/proc/{pid}/environ")).unwrap_or_default(), owner));
    let stat = |pid: i32| fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let groups = ours.filter_map(|pid| group_and_session(&stat(pid)));
    groups.filter(|(group, session)| group != session).map(|(group, _)| group).collect()
}

/// Ends every program that an earlier daemon has left running for `owner`, and waits until they are gone. Only while this daemon
/// has started none for it itself.
pub async fn end(owner: &Path) {
    let start = Instant::now();
    loop {
        let left = running(owner.as_os_str());
        if left.is_empty() {
            return;
        }
        if start.elapsed() > PATIENCE {
            tracing::warn!(groups = ?left, owner = %owner.display(), "programs of an earlier run do not end");
            return;
        }
        for group in left.into_iter().filter_map(Pid::from_raw) {
            let _ = kill_process_group(group, Signal::KILL);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn environments() {
        let env = |text: &str| says(text.as_bytes(), OsStr::new("/var/a"));
        assert!(env("PATH=/bin\0ORLOP_OWNER=/var/a\0X=1\0"));
        assert_eq!(group_and_session("7 (a) b) S 1 7 3 0 -1"), Some((7, 3)));
        assert_eq!(group_and_session(""), None);
        assert!(!env("ORLOP_OWNER=/var/ab\0") && !env("A=ORLOP_OWNER=/var/a\0") && !env(""));
    }

    #[tokio::test]
    async fn what_is_marked_ends_also_without_its_leader_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let script = |text: &str| {
            let mut c = Command::new("/bin/sh");
            c.arg("-c").arg(text).process_group(0).stdout(Stdio::piped());
            c
        };
        // Only mentions the folder.
        let file = dir.path().join("file").display().to_string();
        let mut other =
            script(&format!("echo; read x < /dev/null; exec sleep 1000 # {file}")).spawn().unwrap();
        let mut orphan = script("sleep 1000 & echo $!").env(OWNER, dir.path()).spawn().unwrap();
        let mut pid = String::new();
        BufReader::new(orphan.stdout.take().unwrap()).read_line(&mut pid).unwrap();
        assert!(orphan.wait().unwrap().success());
        let mut marked = script("sleep 1000").env(OWNER, dir.path()).spawn().unwrap();
        assert!(!running(dir.path().as_os_str()).is_empty());
        end(dir.path()).await;
        let environ = fs::read(format!("/proc/{}/environ", pid.trim())).unwrap_or_default();
        assert!(!says(&environ, dir.path().as_os_str()), "the orphan {pid} still runs");
        assert_eq!(marked.wait().unwrap().signal(), Some(9));
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
