//! Questions about names outside of the cluster go to the node's own resolvers, bytes as they came, and so do the answers.
//!
//! Equal questions that are under way share one exchange. That is also what makes a loop harmless (a resolver that sends
//! the question back to us): the returned question waits for the first one, which ends with its time limit.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

/// For one resolver. Two tries end before a stub resolver's usual 5 s.
const TRY_LIMIT: Duration = Duration::from_secs(2);
const TOTAL_LIMIT: Duration = Duration::from_secs(4);
/// glibc reads three; more would only lengthen a failure.
const MAX_UPSTREAMS: usize = 3;
const HEADER: usize = 12;

/// The transport by which a question came and its answer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    Udp,
    Tcp,
}

type Exchange = Shared<BoxFuture<'static, Option<Arc<Vec<u8>>>>>;
type Key = (Transport, Vec<u8>);

#[derive(Debug, Default)]
struct Upstreams {
    read_at: Option<SystemTime>,
    list: Arc<Vec<SocketAddr>>,
}

/// Sends questions on.
pub struct Forwarder {
    resolv_conf: PathBuf,
    /// Addresses that this server listens on: asking them would be asking itself.
    own: Vec<SocketAddr>,
    upstreams: Mutex<Upstreams>,
    /// The one that answered last is asked first.
    preferred: Arc<AtomicUsize>,
    under_way: Arc<Mutex<HashMap<Key, Exchange>>>,
}

impl Forwarder {
    pub fn new(resolv_conf: PathBuf, own: Vec<SocketAddr>) -> Forwarder {
        Forwarder {
            resolv_conf,
            own,
            upstreams: Mutex::default(),
            preferred: Arc::default(),
            under_way: Arc::default(),
        }
    }

    /// The resolvers of the file, read again when it changed.
    pub fn upstreams(&self) -> Arc<Vec<SocketAddr>> {
        let changed = std::fs::metadata(&self.resolv_conf).and_then(|m| m.modified()).ok();
        let mut known = self.upstreams.lock();
        if changed.is_none() || known.read_at != changed {
            let text = std::fs::read_to_string(&self.resolv_conf).unwrap_or_default();
            *known = Upstreams { read_at: changed, list: Arc::new(parse_resolv_conf(&text, &self.own)) };
        }
        known.list.clone()
    }

    /// The answer to `request` with the request's own id; `None` when no resolver gives one in time.
    pub fn ask(
        &self,
        request: &[u8],
        transport: Transport,
    ) -> impl Future<Output = Option<Vec<u8>>> + Send + 'static {
        let request = request.to_vec();
        let exchange = self.shared(&request, transport);
        async move {
            let answer = exchange.await?;
            let mut answer = answer.to_vec();
            answer.get_mut(..2)?.copy_from_slice(request.get(..2)?);
            // The asker may compare the letters' case of its question (0x20 protection).
            let question = HEADER..question_end(&request)?;
            if question_end(&answer) == Some(question.end) {
                answer.get_mut(question.clone())?.copy_from_slice(request.get(question)?);
            }
            Some(answer)
        }
    }

    fn shared(&self, request: &[u8], transport: Transport) -> Exchange {
        let key = (transport, normalized(request));
        let mut under_way = self.under_way.lock();
        if let Some(exchange) = under_way.get(&key) {
            return exchange.clone();
        }
        let (list, preferred) = (self.upstreams(), self.preferred.clone());
        let (map, own_key) = (self.under_way.clone(), key.clone());
        let request = request.to_vec();
        let exchange = async move {
            let asked = ask_all(&list, &preferred, &request, transport);
            let answer = tokio::time::timeout(TOTAL_LIMIT, asked).await.ok().flatten();
            map.lock().remove(&own_key);
            answer.map(Arc::new)
        }
        .boxed()
        .shared();
        under_way.insert(key, exchange.clone());
        exchange
    }
}

/// The request without its id and with its name in lower case.
fn normalized(request: &[u8]) -> Vec<u8> {
    let mut key = request.get(2..).unwrap_or_default().to_vec();
    if let Some(end) = question_end(request)
        && let Some(question) = key.get_mut(HEADER - 2..end - 2)
    {
        question.make_ascii_lowercase();
    }
    key
}

/// Where the first question ends; `None` when the message is too short.
fn question_end(message: &[u8]) -> Option<usize> {
    let mut at = HEADER;
    loop {
        match *message.get(at)? {
            0 => break,
            length if length & 0xc0 == 0 => at += 1 + usize::from(length),
            _ => return None,
        }
    }
    let end = at + 1 + 4;
    (end <= message.len()).then_some(end)
}

async fn ask_all(
    list: &[SocketAddr],
    preferred: &AtomicUsize,
    request: &[u8],
    transport: Transport,
) -> Option<Vec<u8>> {
    let first = preferred.load(Ordering::Relaxed);
    for n in 0..list.len() {
        let at = (first + n) % list.len();
        let upstream = *list.get(at)?;
        let asked = async {
            match transport {
                Transport::Udp => ask_udp(upstream, request).await,
                Transport::Tcp => ask_tcp(upstream, request).await,
            }
        };
        match tokio::time::timeout(TRY_LIMIT, asked).await {
            Ok(Ok(answer)) => {
                preferred.store(at, Ordering::Relaxed);
                return Some(answer);
            }
            Ok(Err(e)) => tracing::debug!(%upstream, error = %e, "resolver cannot be asked"),
            Err(_) => tracing::debug!(%upstream, "resolver did not answer"),
        }
    }
    None
}

fn with_fresh_id(request: &[u8]) -> Vec<u8> {
    let mut message = request.to_vec();
    if let Some(id) = message.get_mut(..2) {
        id.copy_from_slice(&rand::random::<[u8; 2]>());
    }
    message
}

fn answers(question: &[u8], answer: &[u8]) -> bool {
    answer.len() >= HEADER && answer.get(..2) == question.get(..2) && answer.get(2).is_some_and(|b| b & 0x80 != 0)
        // A failing server may leave the question out.
        && (answer.get(4..6) == Some(&[0, 0]) || normalized_question(question) == normalized_question(answer))
}

fn normalized_question(message: &[u8]) -> Option<Vec<u8>> {
    message.get(HEADER..question_end(message)?).map(<[u8]>::to_ascii_lowercase)
}

/// A new socket each time: its random port is half of what an attacker has to guess.
async fn ask_udp(upstream: SocketAddr, request: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr =
        if upstream.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
    socket.connect(upstream).await?;
    let question = with_fresh_id(request);
    socket.send(&question).await?;
    let mut buffer = vec![0; 4096];
    loop {
        let n = socket.recv(&mut buffer).await?;
        if buffer.get(..n).is_some_and(|answer| answers(&question, answer)) {
            buffer.truncate(n);
            return Ok(buffer);
        }
    }
}

async fn ask_tcp(upstream: SocketAddr, request: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(upstream).await?;
    let question = with_fresh_id(request);
    let length = u16::try_from(question.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(&question);
    stream.write_all(&framed).await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; usize::from(length)];
    stream.read_exact(&mut answer).await?;
    if answers(&question, &answer) { Ok(answer) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// The resolvers of a resolv.conf (5), without ourselves.
fn parse_resolv_conf(text: &str, own: &[SocketAddr]) -> Vec<SocketAddr> {
    let mut list = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        // An address with a zone (fe80::1%eth0) cannot be parsed here; such a resolver is left out.
        let Some(ip) = words.next().and_then(|w| w.parse::<IpAddr>().ok()) else { continue };
        let address = SocketAddr::new(ip, 53);
        if own.contains(&address) || list.contains(&address) {
            continue;
        }
        list.push(address);
    }
    list.truncate(MAX_UPSTREAMS);
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_without_ourselves() {
        let own = ["169.254.20.10:53".parse().unwrap()];
        let text = "# nameserver 9.9.9.9\nsearch x\nnameserver 169.254.20.10\nnameserver 1.1.1.1 \n\
                    nameserver fe80::1%eth0\nnameserver 1.1.1.1\nnameserver 2001:db8::1\nnameserver x\n";
        let list = parse_resolv_conf(text, &own);
        assert_eq!(list, ["1.1.1.1:53".parse().unwrap(), "[2001:db8::1]:53".parse().unwrap()]);
    }

    #[test]
    fn equal_questions_have_equal_keys() {
        let message = |id: u8, name: &[u8]| {
            let mut m = vec![id, id, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
            m.extend_from_slice(name);
            m.extend_from_slice(&[0, 0, 1, 0, 1]);
            m
        };
        assert_eq!(normalized(&message(1, b"\x03wWw")), normalized(&message(2, b"\x03www")));
        assert_ne!(normalized(&message(1, b"\x03www")), normalized(&message(1, b"\x03wwx")));
        assert_eq!(question_end(&message(1, b"\x03www")), Some(21));
        for n in 0..21 {
            assert_eq!(question_end(&message(1, b"\x03www")[..n]), None);
        }
    }
}
