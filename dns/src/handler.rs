//! From the bytes of a question to the bytes of its answer.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use orlop_base::supervise::Ready;
use parking_lot::RwLock;

use crate::answer::{Answer, Decision, Settings, decide};
use crate::forward::{Forwarder, Transport};
use crate::metrics::DnsMetrics;
use crate::zone::Zone;

const HEADER: usize = 12;
/// What every receiver takes over UDP (RFC 1035), and what we announce (DNS flag day 2020).
const MIN_UDP: u16 = 512;
const OWN_UDP: u16 = 1232;
const MAX_UDP: u16 = 4096;
/// Aliases of aliases that are followed.
const MAX_ALIASES: usize = 8;

/// What is to be done with a datagram or a framed message.
pub enum Step {
    Reply(Vec<u8>),
    /// Needs others; takes up to the forwarder's time limit.
    Wait(Pin<Box<dyn Future<Output = Vec<u8>> + Send>>),
    /// Not a question.
    Ignore,
}

/// Answers questions.
pub struct Handler {
    pub zone: RwLock<Zone>,
    pub settings: Settings,
    /// Set once the tables are complete; until then a missing name proves nothing.
    pub synced: Ready,
    pub forwarder: Forwarder,
    pub metrics: DnsMetrics,
    rotation: AtomicUsize,
}

impl Handler {
    pub fn new(settings: Settings, forwarder: Forwarder, metrics: DnsMetrics) -> Handler {
        Handler {
            zone: RwLock::default(),
            settings,
            synced: Ready::default(),
            forwarder,
            metrics,
            rotation: AtomicUsize::new(0),
        }
    }

    /// Decides on one message. Quick for names of the cluster, also for names below it that do not exist, which is most of
    /// what a search path asks for.
    pub fn handle(self: &Arc<Self>, bytes: &[u8], transport: Transport) -> Step {
        let start = Instant::now();
        // An answer must never be answered: two servers would go on for ever.
        if bytes.len() < HEADER || bytes.get(2).is_some_and(|b| b & 0x80 != 0) {
            return Step::Ignore;
        }
        let Ok(request) = Message::from_vec(bytes) else {
            self.metrics.request(transport, None);
            self.metrics.response(ResponseCode::FormErr, start);
            return Step::Reply(bare_error(bytes, ResponseCode::FormErr));
        };
        let query = match request.queries.as_slice() {
            [query] => query.clone(),
            _ => return self.refuse(&request, ResponseCode::FormErr, transport, start),
        };
        self.metrics.request(transport, Some(query.query_type()));
        if request.metadata.op_code != OpCode::Query {
            return self.refuse(&request, ResponseCode::NotImp, transport, start);
        }
        if request.edns.as_ref().is_some_and(|e| e.version() > 0) {
            return self.refuse(&request, ResponseCode::BADVERS, transport, start);
        }
        if matches!(query.query_type(), RecordType::AXFR | RecordType::IXFR) {
            return self.refuse(&request, ResponseCode::Refused, transport, start);
        }
        let decision = decide(&self.zone.read(), &self.settings, &query);
        match decision {
            Decision::Answer(_) if !self.synced.is_set() => {
                self.refuse(&request, ResponseCode::ServFail, transport, start)
            }
            Decision::Answer(answer) => self.reply(request, &query, answer, transport, start),
            Decision::Forward => self.forward(request, bytes, transport, start),
        }
    }

    /// The answer when too many questions wait for others.
    pub fn overloaded(&self, bytes: &[u8]) -> Vec<u8> {
        self.metrics.response(ResponseCode::ServFail, Instant::now());
        bare_error(bytes, ResponseCode::ServFail)
    }

    fn refuse(&self, request: &Message, code: ResponseCode, transport: Transport, start: Instant) -> Step {
        let answer = Answer { code, ..Answer::default() };
        Step::Reply(self.finish(request, answer, false, transport, start))
    }

    fn finish(
        &self,
        request: &Message,
        answer: Answer,
        authoritative: bool,
        transport: Transport,
        start: Instant,
    ) -> Vec<u8> {
        self.metrics.response(answer.code, start);
        let turn = self.rotation.fetch_add(1, Ordering::Relaxed);
        encode(request, answer, authoritative, transport, turn)
    }

    fn reply(
        self: &Arc<Self>,
        request: Message,
        query: &Query,
        mut answer: Answer,
        transport: Transport,
        start: Instant,
    ) -> Step {
        for _ in 0..MAX_ALIASES {
            let Some(target) = answer.chase.take() else {
                return Step::Reply(self.finish(&request, answer, true, transport, start));
            };
            let next = Query::query(target.clone(), query.query_type());
            let decision = decide(&self.zone.read(), &self.settings, &next);
            match decision {
                Decision::Answer(more) => {
                    answer.code = more.code;
                    answer.answers.extend(more.answers);
                    answer.authorities = more.authorities;
                    answer.chase = more.chase;
                }
                Decision::Forward => {
                    let handler = self.clone();
                    return Step::Wait(Box::pin(async move {
                        handler.resolve(target, next.query_type(), &mut answer, transport).await;
                        handler.finish(&request, answer, true, transport, start)
                    }));
                }
            }
        }
        // The aliases go round in a circle.
        self.refuse(&request, ResponseCode::ServFail, transport, start)
    }

    /// Adds what the node's resolvers say about an alias's target.
    async fn resolve(&self, target: Name, kind: RecordType, answer: &mut Answer, transport: Transport) {
        let mut question = Message::query();
        question.metadata.recursion_desired = true;
        question.add_query(Query::query(target, kind));
        let Ok(bytes) = question.to_vec() else {
            answer.code = ResponseCode::ServFail;
            return;
        };
        let asked = self.forwarder.ask(&bytes, transport).await;
        match asked.and_then(|b| Message::from_vec(&b).ok()) {
            Some(mut found) => {
                answer.code = found.metadata.response_code;
                answer.answers.append(&mut found.answers);
                answer.authorities = found.authorities;
            }
            None => answer.code = ResponseCode::ServFail,
        }
    }

    fn forward(
        self: &Arc<Self>,
        request: Message,
        bytes: &[u8],
        transport: Transport,
        start: Instant,
    ) -> Step {
        let (handler, asked) = (self.clone(), self.forwarder.ask(bytes, transport));
        let limit = udp_limit(&request);
        Step::Wait(Box::pin(async move {
            match asked.await {
                Some(bytes) => {
                    // Equal questions share an answer, and equal includes the size that the asker takes; a resolver
                    // that ignores the size is cut here.
                    let code = ResponseCode::from(0, bytes.get(3).copied().unwrap_or_default() & 0x0f);
                    handler.metrics.forwarded(true);
                    handler.metrics.response(code, start);
                    if transport == Transport::Udp && bytes.len() > usize::from(limit) {
                        return truncated(&bytes, &request);
                    }
                    bytes
                }
                None => {
                    handler.metrics.forwarded(false);
                    let answer = Answer { code: ResponseCode::ServFail, ..Answer::default() };
                    handler.finish(&request, answer, false, transport, start)
                }
            }
        }))
    }
}

/// Only a header: the question's id, its operation and the code.
fn bare_error(request: &[u8], code: ResponseCode) -> Vec<u8> {
    let mut answer = vec![0; HEADER];
    for (to, from) in answer.iter_mut().zip(request).take(3) {
        *to = *from;
    }
    // QR on; operation and RD as asked.
    answer[2] = (answer[2] & 0x79) | 0x80;
    answer[3] = 0x80 | code.low();
    answer
}

fn udp_limit(request: &Message) -> u16 {
    request.edns.as_ref().map_or(MIN_UDP, |e| e.max_payload().clamp(MIN_UDP, MAX_UDP))
}

fn truncated(answer: &[u8], request: &Message) -> Vec<u8> {
    match Message::from_vec(answer) {
        Ok(m) => m.truncate().to_vec().unwrap_or_default(),
        Err(_) => {
            let answer = Answer { code: ResponseCode::ServFail, ..Answer::default() };
            encode(request, answer, false, Transport::Udp, 0)
        }
    }
}

/// The bytes of an answer, no longer than the asker takes. `turn` decides which of several addresses comes first.
fn encode(
    request: &Message,
    answer: Answer,
    authoritative: bool,
    transport: Transport,
    turn: usize,
) -> Vec<u8> {
    let mut message = Message::new(request.metadata.id, MessageType::Response, request.metadata.op_code);
    message.metadata.recursion_desired = request.metadata.recursion_desired;
    message.metadata.recursion_available = true;
    message.metadata.authoritative = authoritative;
    message.metadata.response_code = answer.code;
    message.queries = request.queries.clone();
    message.answers = answer.answers;
    message.authorities = answer.authorities;
    message.additionals = answer.additionals;
    let aliased = message.answers.first().is_some_and(|r| r.record_type() == RecordType::CNAME);
    if message.answers.len() > 1 && !aliased {
        let n = message.answers.len();
        message.answers.rotate_left(turn % n);
    }
    if request.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(OWN_UDP).set_version(0).set_rcode_high(answer.code.high());
        message.set_edns(edns);
    }
    let limit = match transport {
        Transport::Udp => usize::from(udp_limit(request)),
        Transport::Tcp => usize::from(u16::MAX),
    };
    loop {
        match message.to_vec() {
            Ok(bytes) if bytes.len() <= limit => return bytes,
            _ if !message.additionals.is_empty() => message.additionals.clear(),
            _ if !message.answers.is_empty() => {
                // The asker comes again by TCP; meanwhile as much as fits.
                message.metadata.truncation = true;
                message.answers.truncate(message.answers.len() * 3 / 4);
            }
            _ => {
                let code = ResponseCode::ServFail;
                return bare_error(&request.metadata.id.to_be_bytes(), code);
            }
        }
    }
}
