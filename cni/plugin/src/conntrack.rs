//! The kernel's table of connections, for the one thing that a plugin has to correct there.

use std::io;

use crate::netfilter::{ACK, Attributes, DUMP, Family, Netfilter, attribute};

const SUBSYSTEM: u16 = 1;
const GET: u16 = 1;
const DELETE: u16 = 2;

const TUPLE_ORIGINAL: u16 = 1;
const FILTER: u16 = 25;
/// CTA_FILTER_ORIG_FLAGS: compare the protocol and the port that the client addressed.
const FILTER_FLAGS: u16 = 1;
const PROTOCOL_AND_PORT: u32 = 1 << 3 | 1 << 5;
const UDP: u8 = 17;

/// Forgets UDP flows to `port`. A flow keeps the translation that it began with as long as its client goes on sending, so a
/// client that was there before the pod would never reach it.
pub fn forget_udp(family: Family, port: u16) -> io::Result<()> {
    let mut netfilter = Netfilter::open()?;
    let mut wanted = Attributes::default();
    wanted
        .nested(TUPLE_ORIGINAL, |tuple| {
            tuple.nested(2, |protocol| {
                protocol.bytes(1, &[UDP]).bytes(3, &port.to_be_bytes());
            });
        })
        .nested(FILTER, |f| {
            f.bytes(FILTER_FLAGS, &PROTOCOL_AND_PORT.to_ne_bytes());
            f.bytes(FILTER_FLAGS + 1, &0u32.to_ne_bytes());
        });
    let mut flows = Vec::new();
    netfilter.ask(SUBSYSTEM << 8 | GET, DUMP, family, &wanted, |found| {
        flows.extend(attribute(found, TUPLE_ORIGINAL).map(<[u8]>::to_vec));
    })?;
    for flow in flows {
        let mut tuple = Attributes::default();
        tuple.nested(TUPLE_ORIGINAL, |t| t.0.extend_from_slice(&flow));
        match netfilter.ask(SUBSYSTEM << 8 | DELETE, ACK, family, &tuple, |_| {}) {
            // It ended by itself.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
    }
    Ok(())
}
