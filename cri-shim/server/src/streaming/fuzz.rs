//! Fuzz targets: what clients of exec, attach and port-forward send. Known good input is mutated and cut anywhere; proptest shrinks
//! what fails. The gate runs a fixed number of cases; for longer: `PROPTEST_CASES=1000000 cargo test --release -p orlop-cri fuzz`.

use orlop_fuzz::{cases, mutated};
use proptest::prelude::*;
use tokio::io::AsyncWriteExt;
use tokio_tungstenite::tungstenite::Message;

use super::spdy::{self, Event};
use super::websocket::Codec;
use super::{portforward, remote};

/// Lengths and numbers at their limits.
const WORDS: &[&[u8]] = &[b"\0\0\0\0", b"\xff\xff\xff\x00", b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff"];

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

proptest! {
    #![proptest_config(cases(256))]

    /// Whatever a client sends, the connection ends, or says what a client may do, and streams begin before they have data.
    #[test]
    fn fuzz_spdy_connection(bytes in mutated(spdy::samples(), WORDS), cut in 1..200usize) {
        runtime().block_on(async {
            let (mut client, server) = tokio::io::duplex(64 << 10);
            let (mut reader, writer, writing) = spdy::connection(server).unwrap();
            let write = async {
                for part in bytes.chunks(cut) {
                    if client.write_all(part).await.is_err() {
                        break;
                    }
                }
                // Answers are read, as clients do, until the server is done.
                let _ = client.shutdown().await;
                let _ = tokio::io::copy(&mut client, &mut tokio::io::sink()).await;
            };
            let read = async {
                let mut open = std::collections::HashSet::new();
                let mut events = 0usize;
                while let Some(event) = reader.next().await {
                    events += 1;
                    assert!(events <= bytes.len() + 1, "more events than bytes");
                    match event {
                        Event::Open { id, .. } => assert!(open.insert(id), "stream {id} opened twice"),
                        Event::Data { id, .. } | Event::End { id } => {
                            assert!(open.contains(&id), "stream {id} was never opened");
                        }
                        // Means nothing for one that is not known.
                        Event::Reset { .. } => {}
                    }
                }
                drop((reader, writer));
            };
            let all = async { tokio::join!(write, read, writing) };
            tokio::time::timeout(std::time::Duration::from_secs(20), all).await.expect("it ends");
        });
    }

    #[test]
    fn fuzz_websocket_message(
        bytes in mutated(vec![b"\x00typed".to_vec(), b"0dHlwZWQ=".to_vec(), b"\xff\x00".to_vec(), br#"4eyJXaWR0aCI6MX0="#.to_vec()], WORDS)
    ) {
        for codec in [Codec::Binary, Codec::Base64] {
            for message in [
                Message::Binary(bytes.clone().into()),
                Message::Text(String::from_utf8_lossy(&bytes).into_owned().into()),
            ] {
                if let Some((channel, data)) = codec.decode(message) {
                    prop_assert!(data.len() <= bytes.len() * 3);
                    // What is taken can be said again.
                    if codec == Codec::Binary || channel < 10 {
                        prop_assert_eq!(codec.decode(codec.encode(channel, &data)), Some((channel, data)));
                    }
                }
            }
        }
    }

    /// Port-forward: the channel's number says which port; resizes come whole, in parts and broken, and never pile up.
    #[test]
    fn fuzz_channels_and_sizes(
        channel in any::<u8>(),
        count in 0..130usize,
        parts in prop::collection::vec(mutated(vec![br#"{"Width":80,"Height":24}{"Width":1,"Hei"#.to_vec()], WORDS), 1..6),
    ) {
        if let Some(at) = portforward::input_of(channel, count) {
            prop_assert!(at < count && usize::from(channel) == 2 * at);
        }
        let (mut held, mut given) = (Vec::new(), 0);
        for part in parts {
            given += part.len();
            held.extend_from_slice(&part);
            let sizes = remote::sizes(&mut held);
            prop_assert!(sizes.len() <= given && held.len() <= 4096);
        }
    }
}
