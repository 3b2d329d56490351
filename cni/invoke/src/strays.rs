//! Plugins that outlive the server that started them. One that is still making an attachment would finish after the next server
//! has deleted it, and one that collects garbage would go by a list of old.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

/// Says in a plugin's environment whose it is: the folder of its server's cache.
pub(crate) const OWNER: &str = "ORLOP_CNI_OWNER";

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

/// Plugins of `owner` that run. Each leads a process group, with what it has called in it. What a plugin left running for good (a DHCP
/// client, a name server) has a session of its own and does not count.
fn running(owner: &OsStr) -> BTreeSet<i32> {
    let names = fs::read_dir("/proc").into_iter().flatten().flatten().map(|e| e.file_name());
    let pids = names.filter_map(|n| n.to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        // A process that has ended meanwhile says nothing.
        says(&fs::read(format!("/proc/{pid}/environ")).unwrap_or_default(), owner)
            && group_and_session(&fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default())
                .is_some_and(|(group, session)| group == *pid && session != *pid)
    })
    .collect()
}

/// Ends every plugin that an earlier server with this cache has left running, and waits until they are gone. Only while this
/// server has started none itself.
pub(crate) async fn end(cache: &Path) {
    let start = Instant::now();
    loop {
        let left = running(cache.as_os_str());
        if left.is_empty() {
            return;
        }
        if start.elapsed() > PATIENCE {
            tracing::warn!(pids = ?left, "network plugins of an earlier run do not end");
            return;
        }
        for pid in left.into_iter().filter_map(Pid::from_raw) {
            let _ = kill_process_group(pid, Signal::KILL);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn environments() {
        let env = |text: &str| says(text.as_bytes(), OsStr::new("/var/a"));
        assert!(env("PATH=/bin\0ORLOP_CNI_OWNER=/var/a\0X=1\0"));
        assert_eq!(group_and_session("7 (a) b) S 1 7 3 0 -1"), Some((7, 3)));
        assert_eq!(group_and_session(""), None);
        assert!(!env("ORLOP_CNI_OWNER=/var/ab\0") && !env("A=ORLOP_CNI_OWNER=/var/a\0") && !env(""));
    }
}
