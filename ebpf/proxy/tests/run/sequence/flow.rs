//! Conversations with servers, by way of a Service.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::truth::{Bound, Name, Truth, address, here, port, server_at};
use crate::world::*;
use crate::{PATIENCE, tcp_error};

/// A busy machine loses datagrams between two namespaces: they are sent again, as resolvers do.
const AGAIN: Duration = Duration::from_secs(2);

/// Answers every question with itself, its own number and the asker as it sees him.
pub fn serve(net: &Net, number: usize, at: SocketAddr) {
    let bound = net.run(move || (TcpListener::bind(at).unwrap(), UdpSocket::bind(at).unwrap()));
    let (l, u) = bound.join().unwrap();
    let answer = move |question: &[u8], from: SocketAddr| {
        format!("{} {number} {from}\n", String::from_utf8_lossy(question)).into_bytes()
    };
    std::thread::spawn(move || {
        for mut s in l.incoming().flatten() {
            let Ok(from) = s.peer_addr() else { continue };
            std::thread::spawn(move || {
                let mut buf = [0; 64];
                while let Ok(n @ 1..) = s.read(&mut buf) {
                    let _ = s.write_all(&answer(&buf[..n], from));
                }
            });
        }
    });
    std::thread::spawn(move || {
        let mut buf = [0; 64];
        while let Ok((n, from)) = u.recv_from(&mut buf) {
            let _ = u.send_to(&answer(&buf[..n], from), from);
        }
    });
}

/// What a server says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heard {
    pub server: usize,
    /// Whom it sees. Of one flow that does not change either.
    from: SocketAddr,
}

/// `None`: an answer to another question.
fn read(answer: &[u8], question: &str) -> Option<Heard> {
    let text = String::from_utf8_lossy(answer);
    let mut words = text.trim_end().split(' ');
    let same = words.next() == Some(question);
    same.then(|| Heard {
        server: words.next().unwrap().parse().unwrap(),
        from: words.next().unwrap().parse().unwrap(),
    })
}

/// A question that nobody has asked before.
fn question() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed).to_string()
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Client {
    /// A process of the node's: its sockets are translated. Of all others packets are.
    Node,
    /// In the pod of the third server.
    Pod,
    Outside,
    /// The other node.
    Other,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Means {
    Tcp,
    Udp,
    /// Datagrams by a socket that is connected to nobody and that is used for all Services.
    Shared,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Way {
    pub client: Client,
    pub name: Name,
    pub means: Means,
    pub v4: bool,
}

impl Way {
    /// All that there are.
    pub fn all() -> Vec<Way> {
        use {Client::*, Means::*, Name::*};
        let names: [(Client, &[Name], &[Means]); 4] = [
            (Node, &[ClusterIp], &[Tcp, Udp, Shared]),
            (Pod, &[ClusterIp, NodePort, LoadBalancer], &[Tcp, Udp]),
            (Outside, &[NodePort, ExternalIp, LoadBalancer], &[Tcp, Udp]),
            (Other, &[NodePort, ExternalIp, LoadBalancer], &[Tcp, Udp]),
        ];
        let mut all = Vec::new();
        for (client, names, means) in names {
            for (name, v4) in names.iter().flat_map(|n| [(*n, true), (*n, false)]) {
                all.extend(means.iter().map(|means| Way { client, name, means: *means, v4 }));
            }
        }
        all
    }

    /// How many conversations of a kind are held at least, if there is anybody to talk to.
    pub fn wanted(self) -> usize {
        if self.means == Means::Shared { 1 } else { 2 }
    }

    pub fn to(self, service: usize) -> SocketAddr {
        let own = if self.client == Client::Other { NODE_TO_OTHER } else { NODE };
        let ip = match self.name {
            Name::NodePort => own[usize::from(!self.v4)].parse().unwrap(),
            name => address(name, service, self.v4),
        };
        SocketAddr::new(ip, port(self.name, service, self.means != Means::Tcp))
    }

    pub fn bound(self) -> Bound {
        match (self.name, self.client) {
            (Name::ClusterIp, _) => Bound::Internal,
            (_, Client::Outside | Client::Other) => Bound::External,
            _ => Bound::Free,
        }
    }

    /// Whether a server sees the client that it should see: the client itself, unless the answer would not come back by the node.
    fn is_named_right(self, port: u16, heard: Heard) -> bool {
        let v = usize::from(!self.v4);
        let own = match self.client {
            // Who it is by which route is the kernel's affair.
            Client::Node => return true,
            Client::Pod => CLIENT_POD,
            Client::Outside => OUTSIDE,
            Client::Other => OTHER,
        };
        let own = SocketAddr::new(own[v].parse().unwrap(), port);
        let itself = server_at(heard.server, self.v4).ip() == own.ip();
        if (self.client == Client::Pod || here(heard.server)) && !itself {
            return heard.from == own;
        }
        let nodes = [NODE, NODE_TO_OTHER].map(|both| both[v].parse::<IpAddr>().unwrap());
        nodes.contains(&heard.from.ip())
    }
}

enum By {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

pub struct Flow {
    pub service: usize,
    pub way: Way,
    /// What every answer must be.
    pub heard: Heard,
    by: By,
    port: u16,
    /// How often the Service had been deleted when this began.
    deleted: usize,
}

impl Flow {
    /// From a port that no other flow has. `shared`: the socket for all Services.
    pub fn open(
        net: &Net,
        shared: &UdpSocket,
        port: u16,
        truth: &Truth,
        service: usize,
        way: Way,
    ) -> io::Result<Flow> {
        let to = way.to(service);
        let by = match way.means {
            Means::Tcp => By::Tcp(net.run(move || from_port(port, to, PATIENCE)).join().unwrap()?),
            Means::Udp => By::Udp(net.run(move || datagrams(port, to, true)).join().unwrap()?),
            Means::Shared => By::Udp(shared.try_clone()?),
        };
        let nobody = Heard { server: usize::MAX, from: to };
        let mut flow = Flow { service, way, heard: nobody, by, port, deleted: 0 };
        flow.begin(truth)?;
        Ok(flow)
    }

    /// Takes for its server who answers now.
    pub fn begin(&mut self, truth: &Truth) -> io::Result<()> {
        self.heard = self.ask()?;
        self.deleted = truth.deleted[self.service];
        let expected = truth.usable(self.service, self.way.bound());
        if !expected.contains(&self.heard.server) {
            return Err(io::Error::other(format!("{:?} is none of {expected:?}", self.heard)));
        }
        if !self.way.is_named_right(self.port, self.heard) {
            return Err(io::Error::other(format!("{:?}, to port {}", self.heard, self.port)));
        }
        Ok(())
    }

    pub fn ask(&mut self) -> io::Result<Heard> {
        let question = question();
        let s = match &mut self.by {
            By::Tcp(s) => {
                s.write_all(question.as_bytes())?;
                let mut answer = Vec::new();
                while answer.last() != Some(&b'\n') {
                    let mut buf = [0; 64];
                    match s.read(&mut buf)? {
                        0 => return Err(ErrorKind::UnexpectedEof.into()),
                        n => answer.extend(&buf[..n]),
                    }
                }
                return read(&answer, &question).ok_or(ErrorKind::InvalidData.into());
            }
            By::Udp(s) => s,
        };
        let to = (self.way.means == Means::Shared).then(|| self.way.to(self.service));
        let begin = Instant::now();
        let mut buf = [0; 64];
        let mut asked = false;
        loop {
            if !asked {
                let bytes = question.as_bytes();
                to.map_or_else(|| s.send(bytes), |to| s.send_to(bytes, to))?;
                asked = true;
            }
            match s.recv_from(&mut buf) {
                Ok((n, from)) => match read(&buf[..n], &question) {
                    Some(_) if to.is_some_and(|to| to != from) => {
                        return Err(io::Error::other(format!("{from} answers")));
                    }
                    Some(heard) => return Ok(heard),
                    None => {}
                },
                Err(e) if e.kind() == ErrorKind::WouldBlock && begin.elapsed() < PATIENCE => asked = false,
                Err(e) => return Err(e),
            }
        }
    }

    /// Nothing has been said that could end it: a connection goes on with a server that drains, and without its Service;
    /// datagrams go where new ones go.
    pub fn lives(&self, truth: &Truth) -> bool {
        let (i, server) = (self.service, self.heard.server);
        match self.way.means {
            Means::Tcp => !truth.was_gone(i, server),
            _ => truth.always_usable(i, self.way.bound(), server),
        }
    }

    /// Its datagrams go to another server when they can, and nobody is told.
    pub fn moves(&self) -> bool {
        match self.way.means {
            Means::Tcp => false,
            Means::Udp => self.way.client != Client::Node,
            Means::Shared => true,
        }
    }

    /// Of one that has ended: whether the proxy, told of how things are now, must have closed its socket. A server that has come
    /// back meanwhile may never have been gone for the proxy, and nobody knows whose connection it was when the Service is another.
    /// One that serves the Service by another of its addresses is none whom datagrams would be lost to, so as upstream sees it.
    pub fn must_be_closed(&self, truth: &Truth) -> bool {
        let (i, server) = (self.service, self.heard.server);
        let lost = match self.way.means {
            Means::Tcp => {
                !self.lives(truth) && truth.settings[i].now().present && truth.deleted[i] == self.deleted
            }
            Means::Udp => {
                let bounds = [Bound::Internal, Bound::External, Bound::Free];
                !bounds.into_iter().any(|b| truth.usable(i, b).contains(&server))
            }
            Means::Shared => false,
        };
        lost && self.way.client == Client::Node
    }

    pub fn is_closed(&self) -> bool {
        match &self.by {
            By::Tcp(s) => tcp_error(s),
            // What is sent to a server that lives is answered.
            By::Udp(s) => s.send(b"?").is_err(),
        }
    }
}

/// A socket for datagrams to this place, in the namespace of this thread.
pub fn datagrams(port: u16, to: SocketAddr, connects: bool) -> io::Result<UdpSocket> {
    let s = UdpSocket::bind((any(to), port))?;
    s.set_read_timeout(Some(AGAIN))?;
    if connects {
        s.connect(to)?;
    }
    Ok(s)
}
