//! Exec and attach over SPDY: a stream for each of error, stdin, stdout, stderr and resize.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;

use super::{Event, Reader, Writer, connection};
use crate::runtime::Runtime;
use crate::streaming::Session;
use crate::streaming::http::Upgraded;
use crate::streaming::remote::{self, In, Out, QUEUE, Version, Wants};

/// How long a client may take to open its streams (upstream's default).
const SETUP: Duration = Duration::from_secs(30);
/// Input that may arrive while not all streams are open.
const MAX_EARLY: usize = 64;

/// Numbers of the client's streams.
#[derive(Default)]
struct Streams {
    by_type: HashMap<String, u32>,
}

impl Streams {
    fn id(&self, kind: &str) -> Option<u32> {
        self.by_type.get(kind).copied()
    }

    fn complete(&self, wants: Wants) -> bool {
        let has = |kind: &str| self.by_type.contains_key(kind);
        has("error")
            && (!wants.stdin || has("stdin"))
            && (!wants.stdout || has("stdout"))
            && (!wants.stderr || wants.tty || has("stderr"))
    }

    fn note(&mut self, id: u32, headers: &[(String, String)]) {
        if let Some((_, kind)) = headers.iter().find(|(n, _)| n == "streamtype") {
            self.by_type.insert(kind.to_ascii_lowercase(), id);
        }
    }
}

/// Serves one session on an upgraded connection.
pub(in crate::streaming) async fn serve(
    runtime: &Arc<Runtime>,
    session: Session,
    version: Version,
    io: Upgraded,
) {
    let (reader, writer, writing) = match connection(io) {
        Ok(c) => c,
        Err(e) => return tracing::warn!(error = %e, "could not set up a SPDY connection"),
    };
    let limit = runtime.config.streaming_idle_timeout;
    remote::beside(talk(runtime, session, version, reader, writer), writing, limit).await;
}

async fn talk(
    runtime: &Arc<Runtime>,
    session: Session,
    version: Version,
    mut reader: Reader<Upgraded>,
    writer: Writer,
) {
    let wants = session.wants();
    let mut streams = Streams::default();
    let mut early = Vec::new();
    let setup = async {
        while !streams.complete(wants) {
            match reader.next().await? {
                Event::Open { id, headers } => streams.note(id, &headers),
                other if early.len() < MAX_EARLY => early.push(other),
                _ => return None,
            }
        }
        Some(())
    };
    if !matches!(timeout(SETUP, setup).await, Ok(Some(()))) {
        return tracing::debug!("a client did not open its streams");
    }
    let (in_tx, in_rx) = mpsc::channel(QUEUE);
    let (out_tx, out_rx) = mpsc::channel(QUEUE);
    let ids = [streams.id("stdout"), streams.id("stderr"), streams.id("error")];
    let limit = runtime.config.streaming_idle_timeout;
    let session = remote::run(runtime, session, version, in_rx, out_tx);
    tokio::select! {
        () = remote::beside(session, send(out_rx, &writer, ids), limit) => {}
        () = async { receive(&mut reader, &mut streams, early, in_tx).await; std::future::pending().await } => {}
    }
    // The client may be gone by now, or not read.
    let _ = timeout(limit, writer.go_away(reader.last_stream())).await;
}

/// Hands what the client sends to the session; returns when the client is gone, which closes `to`.
async fn receive(
    reader: &mut Reader<Upgraded>,
    streams: &mut Streams,
    early: Vec<Event>,
    to: mpsc::Sender<In>,
) {
    let mut partial = Vec::new();
    let mut early = early.into_iter();
    loop {
        let event = match early.next() {
            Some(e) => e,
            None => match reader.next().await {
                Some(e) => e,
                None => return,
            },
        };
        let items = match event {
            Event::Open { id, headers } => {
                // The resize stream is not waited for.
                streams.note(id, &headers);
                continue;
            }
            Event::Data { id, data } if streams.id("stdin") == Some(id) => vec![In::Stdin(data)],
            Event::End { id } | Event::Reset { id } if streams.id("stdin") == Some(id) => {
                vec![In::StdinClosed]
            }
            Event::Data { id, data } if streams.id("resize") == Some(id) => {
                partial.extend_from_slice(&data);
                remote::sizes(&mut partial)
            }
            _ => continue,
        };
        for item in items {
            if to.send(item).await.is_err() {
                return;
            }
        }
    }
}

async fn send(mut from: mpsc::Receiver<Out>, writer: &Writer, [stdout, stderr, error]: [Option<u32>; 3]) {
    while let Some(item) = from.recv().await {
        let sent = match item {
            Out::Stdout(data) => match stdout {
                Some(id) => writer.data(id, data).await,
                None => Ok(()),
            },
            Out::Stderr(data) => match stderr {
                Some(id) => writer.data(id, data).await,
                None => Ok(()),
            },
            Out::End(verdict) => {
                for id in [stdout, stderr].into_iter().flatten() {
                    let _ = writer.end(id).await;
                }
                if let Some(id) = error {
                    if let Some(text) = verdict {
                        let _ = writer.data(id, text).await;
                    }
                    let _ = writer.end(id).await;
                }
                return;
            }
        };
        if sent.is_err() {
            return;
        }
    }
}
