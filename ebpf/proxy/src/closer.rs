//! Which sockets talk to a backend that is gone. Pure.

use orlop_ebpf_common::{SockKey, SockReverse, UDP, addr_to};

use crate::model::Model;
use crate::tables::Tables;

/// Sockets to close. A datagram socket goes when its backend serves the Service no more, as upstream forgets the flow
/// then. A TCP connection may go on with a backend that is being shut down, and with one whose Service was deleted; it
/// goes when the endpoint itself is gone, and nobody would answer it.
pub fn stale(sockets: &[(SockKey, SockReverse)], tables: &Tables, model: &Model) -> Vec<SockKey> {
    if sockets.is_empty() {
        return Vec::new();
    }
    let is_stale = |k: &SockKey, r: &SockReverse| match tables.owner(r.service) {
        Some((name, port)) if k.proto == UDP => !tables.serves(name, port, &k.addr, k.port),
        Some((name, _)) => !model.has_endpoint(name, addr_to(&k.addr)),
        None => k.proto == UDP,
    };
    sockets.iter().filter(|(k, r)| is_stale(k, r)).map(|(k, _)| *k).collect()
}
