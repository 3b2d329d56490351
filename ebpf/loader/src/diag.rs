//! Closing sockets whose backend is gone, by sock_diag: their owners get an error at once in place of a timeout.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;

use nix::sched::{CloneFlags, setns};
use orlop_ebpf_common::{Addr, SockKey, V4_PREFIX};

use crate::netlink::Netlink;

const SOCK_DIAG: isize = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const IPV4: u8 = 2;
const IPV6: u8 = 10;
/// struct inet_diag_sockid, and where its peer's port and address, and its cookie are.
const ID: usize = 48;
const PEER_PORT: usize = 2;
const PEER: usize = 20;
const COOKIE: usize = 40;
/// struct inet_diag_msg begins with family, state, timer and retransmissions.
const MESSAGE_HEAD: usize = 4;
/// All states but LISTEN (10) and, for TCP, TIME_WAIT (6), which is no socket any more.
const STATES: u32 = 0xfff & !(1 << 10) & !(1 << 6);

/// What came of closing sockets.
#[derive(Debug, Default, PartialEq)]
pub struct Closed {
    pub count: usize,
    /// IP protocols whose sockets the kernel does not list: modules are missing.
    pub unseen: Vec<u8>,
}

/// By cookie, the peers to which a socket is to be closed.
type Wanted = HashMap<u64, Vec<SockKey>>;

/// Closes those of these sockets that are connected to the peer that is given with each, in all network namespaces that a process
/// lives in. The kernel says ECONNABORTED to their owners and resets TCP connections.
///
/// # Errors
/// When processes cannot be listed or the kernel lacks CONFIG_INET_DIAG_DESTROY. Namespaces and sockets that go
/// meanwhile are no error.
pub fn close_sockets(sockets: &[SockKey]) -> io::Result<Closed> {
    let mut wanted = Wanted::new();
    let mut protocols: Vec<u8> = Vec::new();
    for key in sockets {
        wanted.entry(key.cookie).or_default().push(*key);
        if !protocols.contains(&key.proto) {
            protocols.push(key.proto);
        }
    }
    if wanted.is_empty() {
        return Ok(Closed::default());
    }
    // A thread of its own, as it changes its network namespace and never changes back.
    let worker = std::thread::Builder::new().name("close-sockets".into()).spawn(move || {
        let mut closed = Closed::default();
        for ns in namespaces()? {
            if setns(&ns, CloneFlags::CLONE_NEWNET).is_err() {
                continue;
            }
            close_here(&wanted, &protocols, &mut closed)?;
            if closed.count >= wanted.len() {
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

fn close_here(wanted: &Wanted, protocols: &[u8], closed: &mut Closed) -> io::Result<()> {
    let netlink = Netlink::open(SOCK_DIAG)?;
    for protocol in protocols {
        for family in [IPV4, IPV6] {
            let mut found = Vec::new();
            let all = request(family, *protocol, &[0; ID]);
            let listed = netlink.dump(SOCK_DIAG_BY_FAMILY, &all, |m| {
                if let Some(id) = m.get(MESSAGE_HEAD..MESSAGE_HEAD + ID)
                    && is_wanted(wanted, m[0], *protocol, id)
                {
                    found.push(request(m[0], *protocol, id));
                }
            });
            match listed {
                Ok(()) => {}
                // The kernel answers for families that it does not have itself, but not for want of a module.
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {
                    if !closed.unseen.contains(protocol) {
                        closed.unseen.push(*protocol);
                    }
                    continue;
                }
                Err(e) => return Err(e),
            }
            for r in found {
                match netlink.act(SOCK_DESTROY, 0, &r) {
                    Ok(()) => closed.count += 1,
                    Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
                    Err(e) => return Err(e),
                }
            }
        }
    }
    Ok(())
}

/// Whether a socket is to be closed: a datagram socket may have been connected to another peer since.
fn is_wanted(wanted: &Wanted, family: u8, protocol: u8, id: &[u8]) -> bool {
    let peers = || Some((wanted.get(&cookie(id)?)?, peer(family, id)?));
    peers().is_some_and(|(keys, (addr, port))| {
        keys.iter().any(|k| (k.addr, k.port, k.proto) == (addr, port, protocol))
    })
}

fn cookie(id: &[u8]) -> Option<u64> {
    let word = |at: usize| Some(u64::from(u32::from_ne_bytes(id.get(at..at + 4)?.try_into().ok()?)));
    Some(word(COOKIE)? | word(COOKIE + 4)? << 32)
}

fn peer(family: u8, id: &[u8]) -> Option<(Addr, u16)> {
    let word =
        |i: usize| Some(u32::from_ne_bytes(id.get(PEER + 4 * i..PEER + 4 * (i + 1))?.try_into().ok()?));
    let addr =
        if family == IPV4 { [0, 0, V4_PREFIX, word(0)?] } else { [word(0)?, word(1)?, word(2)?, word(3)?] };
    Some((addr, u16::from_be_bytes(id.get(PEER_PORT..PEER_PORT + 2)?.try_into().ok()?)))
}

/// struct inet_diag_req_v2.
fn request(family: u8, protocol: u8, id: &[u8]) -> Vec<u8> {
    let mut r = vec![family, protocol, 0, 0];
    r.extend(STATES.to_ne_bytes());
    r.extend(id);
    r
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
    use std::os::fd::AsFd;

    use orlop_ebpf_common::{TCP, UDP, addr_from};

    fn key(socket: impl AsFd, proto: u8, peer: SocketAddr) -> SockKey {
        let cookie = rustix::net::sockopt::socket_cookie(socket).unwrap();
        SockKey { cookie, addr: addr_from(peer.ip()), port: peer.port(), proto, ..SockKey::default() }
    }

    /// An own network namespace, which no other test looks through.
    fn alone(f: impl FnOnce() + Send + 'static) {
        let thread = std::thread::spawn(move || {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).expect("run as root");
            let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status();
            assert!(up.expect("`ip` is missing: apt-get install iproute2").success());
            f();
        });
        thread.join().unwrap();
    }

    fn close(keys: &[SockKey]) -> Closed {
        let mut wanted = Wanted::new();
        keys.iter().for_each(|k| wanted.entry(k.cookie).or_default().push(*k));
        let mut closed = Closed::default();
        close_here(&wanted, &[TCP, UDP], &mut closed).unwrap();
        closed
    }

    #[test]
    fn a_socket_that_talks_to_another_peer_by_now_stays_open() {
        alone(|| {
            for (old, new) in
                [("127.0.0.2:7", "127.0.0.3:7"), ("127.0.0.2:7", "127.0.0.2:8"), ("[::1]:7", "[::1]:8")]
            {
                let (old, new): (SocketAddr, SocketAddr) = (old.parse().unwrap(), new.parse().unwrap());
                let any = SocketAddr::new(if old.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() }, 0);
                let udp = UdpSocket::bind(any).unwrap();
                udp.connect(old).unwrap();
                udp.connect(new).unwrap();
                assert_eq!(close(&[key(&udp, UDP, old)]), Closed::default());
                assert_eq!(udp.peer_addr().unwrap(), new);
                assert_eq!(close(&[key(&udp, UDP, old), key(&udp, UDP, new)]).count, 1);
                assert!(udp.peer_addr().is_err(), "closed");
            }
            // A socket of both families that talks by IPv4.
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let at = listener.local_addr().unwrap();
            let tcp = TcpStream::connect(("::ffff:127.0.0.1", at.port())).unwrap();
            assert_eq!(close(&[key(&tcp, UDP, at)]), Closed::default(), "of another protocol");
            assert_eq!(close(&[key(&tcp, TCP, at)]).count, 1);
        });
    }

    #[test]
    fn protocols_whose_sockets_are_not_listed_are_named() {
        // For experiments: no kernel has a module for it.
        const NONE: u8 = 253;
        alone(|| {
            let mut closed = Closed::default();
            close_here(&Wanted::new(), &[NONE, TCP], &mut closed).unwrap();
            assert_eq!(closed, Closed { count: 0, unseen: vec![NONE] });
        });
    }
}
