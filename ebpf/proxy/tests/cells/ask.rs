//! What clients ask, and servers that say who they are.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use crate::world::*;

/// For an answer that must come, and for one that must not.
const PATIENCE: [Duration; 2] = [Duration::from_secs(30), Duration::from_millis(300)];

/// Answers on both families and protocols at the backends' port; returns when it does.
pub fn serve_by(
    net: &Net,
    addresses: Both,
    connection: impl Fn(TcpStream) + Clone + Send + 'static,
    datagram: impl Fn(&[u8], SocketAddr) -> Vec<u8> + Clone + Send + 'static,
) {
    let (tell, ready) = std::sync::mpsc::channel();
    for addr in addresses {
        let at = SocketAddr::new(addr.parse().unwrap(), BACKEND_PORT);
        let (told, connection) = (tell.clone(), connection.clone());
        net.run(move || {
            let l = TcpListener::bind(at).unwrap();
            told.send(()).unwrap();
            l.incoming().flatten().for_each(connection);
        });
        let (told, datagram) = (tell.clone(), datagram.clone());
        net.run(move || {
            let s = UdpSocket::bind(at).unwrap();
            told.send(()).unwrap();
            let mut buf = [0; 2048];
            while let Ok((n, from)) = s.recv_from(&mut buf) {
                // Refused while the way's size is being learned; the client asks again.
                let _ = s.send_to(&datagram(&buf[..n], from), from);
            }
        });
    }
    for _ in 0..4 {
        ready.recv().unwrap();
    }
}

/// Says its name and the source that it sees.
pub fn serve(net: &Net, name: &'static str, addresses: Both) {
    let said = move |from: SocketAddr| format!("{name} {}", from.ip());
    let connection = move |mut s: TcpStream| {
        let _ = s.write_all(s.peer_addr().map(said).unwrap_or_default().as_bytes());
    };
    serve_by(net, addresses, connection, move |_, from| said(from).into_bytes());
}

/// Port 0 stands for a ping. What a client saw: answers as `name source`, sorted, or `refused`, or `dropped`. `want`: how many different answers
/// there are; 0 when none is to come.
pub fn probe(udp: bool, to: SocketAddr, want: usize) -> String {
    let patience = PATIENCE[usize::from(want == 0)];
    let mut seen = std::collections::BTreeSet::new();
    // A choice among two misses one of them 64 times in a row never.
    for _ in 0..64 {
        let asked = match (to.port(), udp) {
            (0, _) => ping(to, 0, patience).and_then(|_| ping(to, 5000, patience)),
            (_, true) => ask_udp(to, patience),
            (_, false) => ask_tcp(to, patience),
        };
        match asked {
            Ok(text) => drop(seen.insert(text)),
            Err(e) => {
                let code = e.raw_os_error();
                seen.insert(match (e.kind(), code) {
                    (std::io::ErrorKind::ConnectionRefused, _) => "refused".to_owned(),
                    (std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock, _)
                    | (_, Some(libc_errno::EHOSTUNREACH | libc_errno::ENOBUFS)) => "dropped".to_owned(),
                    _ => format!("error: {e}"),
                });
                break;
            }
        }
        if seen.len() >= want {
            break;
        }
    }
    seen.into_iter().collect::<Vec<_>>().join(", ")
}

mod libc_errno {
    pub const EHOSTUNREACH: i32 = 113;
    /// A raw socket's own packet is dropped where it leaves.
    pub const ENOBUFS: i32 = 105;
}

fn ask_tcp(to: SocketAddr, patience: Duration) -> std::io::Result<String> {
    let mut s = from_port(next_port(), to, patience)?;
    let mut text = String::new();
    s.read_to_string(&mut text)?;
    Ok(text)
}

/// A port that no other question has. The kernel may give one port to two connections to different addresses, and the
/// first one goes on while a program that is just starting has a copy of it: the second has another source. Nothing
/// tells the end of a datagram flow at all. The helper's ports begin elsewhere, as it shares namespaces with us; node ports and the backends' are nobody's.
fn next_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let (first, many) =
        if std::env::var_os(crate::HELPER).is_some() { (9_000, 20_000) } else { (33_000, 27_000) };
    first + NEXT.fetch_add(1, Ordering::Relaxed) % many
}

/// An echo request with so many bytes. Who is refused by whom knows it from the ICMP error, as programs do: from their socket.
fn ping(to: SocketAddr, bytes: usize, patience: Duration) -> std::io::Result<String> {
    // Of IPv4 raw sockets get the IP header, too.
    let (family, proto, kind, head) = match to {
        SocketAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp, 8, 20),
        SocketAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6, 128, 0),
    };
    let s = UdpSocket::from(socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, proto)?);
    s.connect(to)?;
    // The rest of it is zeros, so the checksum is known.
    let mut request = vec![0; 8 + bytes];
    request[0] = kind;
    (request[2], request[3]) = (!kind, 0xff);
    let reply = if kind == 8 { 0 } else { kind + 1 };
    // An ICMP error comes as a message as well, and before it is the socket's error.
    until_answered(&s, &request, patience, |said| said.get(head) == Some(&reply))?;
    Ok("answered".into())
}

fn ask_udp(to: SocketAddr, patience: Duration) -> std::io::Result<String> {
    let s = UdpSocket::bind((any(to), next_port()))?;
    s.connect(to)?;
    until_answered(&s, b"?", patience, |_| true)
}

/// Asks again as resolvers do: on a busy machine the kernel loses packets between two namespaces.
fn until_answered(
    s: &UdpSocket,
    question: &[u8],
    patience: Duration,
    is_answer: impl Fn(&[u8]) -> bool,
) -> std::io::Result<String> {
    const AGAIN: Duration = Duration::from_secs(3);
    s.set_read_timeout(Some(patience.min(AGAIN)))?;
    let begin = Instant::now();
    loop {
        s.send(question)?;
        let mut buf = [0; 64];
        let said = loop {
            match s.recv(&mut buf) {
                Ok(n) if !is_answer(&buf[..n]) => {}
                said => break said,
            }
        };
        match said {
            Err(e) if e.kind() == ErrorKind::WouldBlock && begin.elapsed() < patience => {}
            other => return other.map(|n| String::from_utf8_lossy(&buf[..n]).into_owned()),
        }
    }
}
