//! A plugin's socket: calls to the plugin, and the plugin's calls to us.
//!
//! One task reads, one writes. A call that times out leaves both as they are, so that the connection can go on.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use orlop_base::supervise::TaskGroup;
use parking_lot::Mutex;
use prost::Message as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::mux::{self, Stream};
use crate::ttrpc::{Kind, MAX_MESSAGE, Message, code, wire};

/// Messages on their way to the plugin: its calls to us and one call of ours at a time, which is why few are enough.
const OUTGOING: usize = 16;
/// Calls of the plugin that wait for us.
const INCOMING: usize = 8;
/// A reason: the plugin's own wish.
pub(crate) const LEFT: &str = "it closed the connection";
/// How long the last answers may take to be written.
const LAST_WORDS: Duration = Duration::from_secs(1);
const READ_BUFFER: usize = 16 << 10;
/// Bytes of a request beside its payload: names, the timeout, lengths.
const REQUEST_ROOM: usize = 256;

/// The service that plugins serve.
const PLUGIN_SERVICE: &str = "nri.pkg.api.v1alpha1.Plugin";
/// The service that plugins call.
const RUNTIME_SERVICE: &str = "nri.pkg.api.v1alpha1.Runtime";

/// Why a call has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CallError {
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("{0}")]
    Closed(String),
    #[error("the answer cannot be read: {0}")]
    Garbage(String),
    #[error("a request of {0} bytes is longer than ttrpc allows")]
    TooLong(usize),
    #[error("{message}")]
    Status { code: i32, message: String },
}

/// A call of the plugin's that wants an answer.
pub(crate) struct Incoming {
    id: u32,
    pub method: String,
    pub payload: Vec<u8>,
}

/// Ends with [`Connection::close`], or when the plugin closes it or sends what no plugin sends.
#[derive(Clone)]
pub(crate) struct Connection(Arc<Shared>);

struct Shared {
    outgoing: mpsc::Sender<Vec<u8>>,
    calls: Mutex<Calls>,
    closed: CancellationToken,
    /// Why it ended; the first reason counts.
    reason: Mutex<Option<String>>,
}

#[derive(Default)]
struct Calls {
    last: u32,
    waiting: HashMap<u32, oneshot::Sender<Vec<u8>>>,
}

impl Connection {
    /// Serves `socket` in `tasks` until it ends or these are told to stop.
    pub fn start(socket: UnixStream, tasks: &TaskGroup) -> (Connection, mpsc::Receiver<Incoming>) {
        let (read, write) = socket.into_split();
        let (outgoing, to_write) = mpsc::channel(OUTGOING);
        let (tell, incoming) = mpsc::channel(INCOMING);
        let shared = Arc::new(Shared {
            outgoing,
            calls: Mutex::default(),
            closed: tasks.stop_token().child_token(),
            reason: Mutex::default(),
        });
        let connection = Connection(shared);
        let (reader, writer) = (connection.clone(), connection.clone());
        tasks.spawn(async move {
            let ended = reader.0.closed.clone();
            tokio::select! {
                // The connection ends with either, so nothing that is dropped half-read is missed.
                why = reader.read(read, tell) => reader.close(&why),
                () = ended.cancelled() => {}
            }
        });
        tasks.spawn(async move {
            let ended = writer.0.closed.clone();
            let late = async {
                ended.cancelled().await;
                tokio::time::sleep(LAST_WORDS).await;
            };
            tokio::select! {
                // As above.
                why = write_all(write, to_write, &ended) => writer.close(&why),
                () = late => {}
            }
        });
        (connection, incoming)
    }

    /// Calls the plugin. The answer's status is an error unless it is OK.
    pub async fn call(
        &self,
        method: &str,
        payload: Vec<u8>,
        limit: Duration,
    ) -> std::result::Result<Vec<u8>, CallError> {
        if payload.len() + REQUEST_ROOM > MAX_MESSAGE {
            return Err(CallError::TooLong(payload.len()));
        }
        let request = wire::Request {
            service: PLUGIN_SERVICE.to_owned(),
            method: method.to_owned(),
            payload,
            timeout_nano: i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX),
        };
        let (tell, told) = oneshot::channel();
        let id = self.0.calls.lock().begin(tell);
        let exchange = async {
            let message = mux::encode(Stream::Plugin, &Message::request(id, &request));
            drop(request);
            self.0.outgoing.send(message).await.map_err(|_| ())?;
            told.await.map_err(|_| ())
        };
        let answer = tokio::select! {
            // Dropping it forgets the answer, which is what is meant.
            answer = tokio::time::timeout(limit, exchange) => answer,
            () = self.0.closed.cancelled() => Ok(Err(())),
        };
        self.0.calls.lock().waiting.remove(&id);
        let bytes = match answer {
            Err(_) => return Err(CallError::Timeout(limit)),
            Ok(Err(())) => return Err(CallError::Closed(self.reason())),
            Ok(Ok(bytes)) => bytes,
        };
        let response = wire::Response::decode(&*bytes).map_err(|e| CallError::Garbage(e.to_string()))?;
        match response.status {
            Some(s) if s.code != code::OK => Err(CallError::Status { code: s.code, message: s.message }),
            _ => Ok(response.payload),
        }
    }

    /// Answers a call of the plugin's.
    pub fn answer(&self, call: &Incoming, answer: Result<Vec<u8>, (i32, String)>) {
        self.respond(call.id, answer);
    }

    fn respond(&self, id: u32, answer: Result<Vec<u8>, (i32, String)>) {
        let message = mux::encode(Stream::Runtime, &Message::response(id, answer));
        // Never waits: the reader answers, too.
        if self.0.outgoing.try_send(message).is_err() {
            self.close("it calls and does not read the answers");
        }
    }

    pub fn close(&self, why: &str) {
        self.0.reason.lock().get_or_insert_with(|| why.to_owned());
        self.0.closed.cancel();
    }

    pub fn is_closed(&self) -> bool {
        self.0.closed.is_cancelled()
    }

    /// Returns once it has ended.
    pub async fn ended(&self) {
        self.0.closed.cancelled().await;
    }

    pub fn reason(&self) -> String {
        self.0.reason.lock().clone().unwrap_or_else(|| "the server stops".to_owned())
    }

    async fn read(&self, mut socket: OwnedReadHalf, tell: mpsc::Sender<Incoming>) -> String {
        let mut decoder = mux::Decoder::default();
        let mut buffer = vec![0; READ_BUFFER];
        let mut messages = Vec::new();
        loop {
            match socket.read(&mut buffer).await {
                Ok(0) => return LEFT.to_owned(),
                Err(e) => return format!("its connection broke: {e}"),
                Ok(n) => {
                    if let Err(e) = decoder.feed(&buffer[..n], &mut messages) {
                        return format!("it does not speak NRI's protocol: {e}");
                    }
                }
            }
            for (stream, message) in messages.drain(..) {
                match stream {
                    Stream::Plugin => self.answered(message),
                    Stream::Runtime => self.called(message, &tell),
                }
            }
        }
    }

    /// An answer that nobody waits for any more is dropped.
    fn answered(&self, message: Message) {
        if message.kind == Kind::Response as u8
            && let Some(waiting) = self.0.calls.lock().waiting.remove(&message.id)
        {
            // The caller may just have given up.
            let _ = waiting.send(message.payload);
        }
    }

    fn called(&self, message: Message, tell: &mpsc::Sender<Incoming>) {
        if message.kind != Kind::Request as u8 {
            return;
        }
        let id = message.id;
        let refuse = |code, text: String| self.respond(id, Err((code, text)));
        match wire::Request::decode(&*message.payload) {
            Err(e) => refuse(code::INVALID_ARGUMENT, format!("the request cannot be read: {e}")),
            Ok(r) if r.service != RUNTIME_SERVICE => {
                refuse(code::UNIMPLEMENTED, format!("there is no service {:?}", r.service));
            }
            Ok(r) => {
                let incoming = Incoming { id, method: r.method, payload: r.payload };
                if tell.try_send(incoming).is_err() {
                    refuse(code::RESOURCE_EXHAUSTED, "too many calls at once; wait for answers".to_owned());
                }
            }
        }
    }
}

impl Calls {
    /// Ids of calls are odd and grow.
    fn begin(&mut self, waiting: oneshot::Sender<Vec<u8>>) -> u32 {
        self.last = if self.last == 0 { 1 } else { self.last.wrapping_add(2) };
        self.waiting.insert(self.last, waiting);
        self.last
    }
}

/// Writes until `ended`, and then what is there already: why a plugin is let go stands in the answer to its call.
async fn write_all(
    mut socket: OwnedWriteHalf,
    mut messages: mpsc::Receiver<Vec<u8>>,
    ended: &CancellationToken,
) -> String {
    loop {
        let message = tokio::select! {
            biased;
            // Nothing is lost: a message is taken whole or not.
            message = messages.recv() => message,
            () = ended.cancelled() => None,
        };
        let Some(message) = message else { break };
        if let Err(e) = socket.write_all(&message).await {
            return format!("its connection broke: {e}");
        }
    }
    "nobody uses the connection any more".to_owned()
}
