//! Closing sockets whose backend is gone, by sock_diag: their owners get an error at once in place of a timeout.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;

use nix::sched::{CloneFlags, setns};

use crate::netlink::Netlink;

const SOCK_DIAG: isize = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const ADDRESS_FAMILIES: [u8; 2] = [2, 10];
/// struct inet_diag_sockid, and where its cookie is.
const ID: usize = 48;
const COOKIE: usize = 40;
/// struct inet_diag_msg begins with family, state, timer and retransmissions.
const MESSAGE_HEAD: usize = 4;
/// All states but LISTEN (10) and, for TCP, TIME_WAIT (6), which is no socket any more.
const STATES: u32 = 0xfff & !(1 << 10) & !(1 << 6);

/// Closes the sockets with these cookies in all network namespaces that a process lives in; returns how many. The
/// kernel says ECONNABORTED to their owners and resets TCP connections.
///
/// # Errors
/// When processes cannot be listed or the kernel lacks CONFIG_INET_DIAG_DESTROY. Namespaces and sockets that go
/// meanwhile are no error.
pub fn close_sockets(cookies: HashSet<u64>, protocols: &[u8]) -> io::Result<usize> {
    if cookies.is_empty() {
        return Ok(0);
    }
    let protocols = protocols.to_vec();
    // A thread of its own, as it changes its network namespace and never changes back.
    let worker = std::thread::Builder::new().name("close-sockets".into()).spawn(move || {
        let mut closed = 0;
        for ns in namespaces()? {
            if setns(&ns, CloneFlags::CLONE_NEWNET).is_err() {
                continue;
            }
            closed += close_here(&cookies, &protocols)?;
            if closed >= cookies.len() {
                break;
            }
        }
        Ok(closed)
    })?;
    worker.join().unwrap_or_else(|_| Err(io::Error::other("the thread that closes sockets died")))
}

/// The network namespaces of all processes, each once.
fn namespaces() -> io::Result<Vec<File>> {
    let mut seen = HashSet::new();
    let mut out = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        if !entry.file_name().to_string_lossy().bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        let path = entry.path().join("ns/net");
        // The process may be gone.
        let Ok(id) = fs::metadata(&path).map(|m| (m.dev(), m.ino())) else { continue };
        if seen.insert(id)
            && let Ok(f) = File::open(&path)
        {
            out.push(f);
        }
    }
    Ok(out)
}

fn close_here(cookies: &HashSet<u64>, protocols: &[u8]) -> io::Result<usize> {
    let netlink = Netlink::open(SOCK_DIAG)?;
    let mut closed = 0;
    for protocol in protocols {
        for family in ADDRESS_FAMILIES {
            let mut found = Vec::new();
            let all = request(family, *protocol, &[0; ID]);
            let listed = netlink.dump(SOCK_DIAG_BY_FAMILY, &all, |m| {
                if let Some(id) = m.get(MESSAGE_HEAD..MESSAGE_HEAD + ID)
                    && cookie(id).is_some_and(|c| cookies.contains(&c))
                {
                    found.push(request(m[0], *protocol, id));
                }
            });
            match listed {
                Ok(()) => {}
                // A kernel without this family or protocol has no such sockets either.
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => continue,
                Err(e) => return Err(e),
            }
            for r in found {
                match netlink.act(SOCK_DESTROY, 0, &r) {
                    Ok(()) => closed += 1,
                    Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
                    Err(e) => return Err(e),
                }
            }
        }
    }
    Ok(closed)
}

fn cookie(id: &[u8]) -> Option<u64> {
    let word = |at: usize| Some(u64::from(u32::from_ne_bytes(id.get(at..at + 4)?.try_into().ok()?)));
    Some(word(COOKIE)? | word(COOKIE + 4)? << 32)
}

/// struct inet_diag_req_v2.
fn request(family: u8, protocol: u8, id: &[u8]) -> Vec<u8> {
    let mut r = vec![family, protocol, 0, 0];
    r.extend(STATES.to_ne_bytes());
    r.extend(id);
    r
}
