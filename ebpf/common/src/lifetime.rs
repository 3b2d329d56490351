//! How long a connection counts as alive: nf_conntrack's figures.
//!
//! The entry of a connection's answers decides, as it holds what others may want: a source port of the node's, or the
//! name of the answers. Packets of the other direction are told there, but not each of them (see [`due`]).

use crate::{CtValue, UDP, ct_flags};

const SECOND: u64 = 1_000_000_000;
const UDP_QUIET: u64 = 180 * SECOND;
const TCP_UNANSWERED: u64 = 120 * SECOND;
const TCP_UNACKNOWLEDGED: u64 = 60 * SECOND;
const TCP_HALF_CLOSED: u64 = 60 * SECOND;
const TCP_ENDED: u64 = 10 * SECOND;
const TCP_ESTABLISHED: u64 = 5 * 86_400 * SECOND;
/// A silence in which no translator may take an established connection for dead (RFC 5382, REQ-5).
const TCP_PATIENCE: u64 = 7440 * SECOND;

/// Time is cut into pieces of so many bits of nanoseconds, some 9 seconds; less than any time above.
const PIECE_BITS: u32 = 33;
const PIECE: u64 = 1 << PIECE_BITS;

/// Whether a packet is the first one of its direction in its piece of time: then the other direction is told.
#[inline(always)]
pub fn due(last_seen_ns: u64, now: u64) -> bool {
    (last_seen_ns ^ now) >> PIECE_BITS != 0
}

/// A clock that another CPU has read later is no reason for anything.
#[inline(always)]
fn silence(v: &CtValue, now: u64) -> u64 {
    now.saturating_sub(v.last_seen_ns)
}

/// Whether a datagram flow, of which this is the client's direction, is over.
#[inline(always)]
pub fn quiet(v: &CtValue, now: u64) -> bool {
    silence(v, now) > UDP_QUIET
}

/// Whether both ends of a TCP connection have closed it, or one has reset it. `v`: its answers' entry.
#[inline(always)]
pub fn ended(v: &CtValue) -> bool {
    const BOTH: u32 = ct_flags::CLOSING | ct_flags::FAR_CLOSING;
    v.flags & ct_flags::RESET != 0 || v.flags & BOTH == BOTH
}

/// Whether the entry of a connection's answers may be another's.
#[inline(always)]
pub fn over(v: &CtValue, proto: u8, now: u64) -> bool {
    let limit = if proto == UDP {
        UDP_QUIET
    } else if ended(v) {
        TCP_ENDED
    } else if v.flags & (ct_flags::CLOSING | ct_flags::FAR_CLOSING) != 0 {
        TCP_HALF_CLOSED
    } else if v.flags & ct_flags::NEW != 0 {
        TCP_UNANSWERED
    } else if v.flags & ct_flags::FAR_NEW != 0 {
        TCP_UNACKNOWLEDGED
    } else {
        TCP_ESTABLISHED
    };
    // What the client has sent since may not have been told yet.
    silence(v, now) > limit + PIECE
}

/// How well the entry of a connection's answers can be spared when there is no better one; 0: not at all. The client
/// of a connection that goes on notices the loss with its next packet, except for TCP connections that have not begun
/// or that have ended.
#[inline(always)]
pub fn spare(v: &CtValue, proto: u8, now: u64) -> u64 {
    const BEGINS_OR_ENDS: u32 = ct_flags::NEW | ct_flags::FAR_NEW | ct_flags::CLOSING | ct_flags::FAR_CLOSING;
    let age = silence(v, now);
    if proto != UDP && ended(v) {
        return age + TCP_ESTABLISHED;
    }
    let least = if proto == UDP {
        PIECE
    } else if v.flags & BEGINS_OR_ENDS != 0 {
        0
    } else {
        TCP_PATIENCE
    };
    if age > least { age } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TCP;
    use crate::ct_flags::*;

    const NOW: u64 = 90 * 86_400 * SECOND;

    fn silent(flags: u32, seconds: u64) -> CtValue {
        CtValue { flags, last_seen_ns: NOW - seconds * SECOND, ..CtValue::default() }
    }

    #[test]
    fn entries_are_kept_as_long_as_their_connection_may_live() {
        for (what, proto, flags, alive, over_after) in [
            ("a SYN without an answer", TCP, NEW | FAR_NEW, 120, 130),
            ("an answer to a SYN, and no more", TCP, FAR_NEW, 60, 70),
            ("taken up in the middle, no answer yet", TCP, NEW, 120, 130),
            ("established, or of an older version", TCP, 0, 5 * 86_400, 5 * 86_400 + 10),
            ("closed by the backend", TCP, CLOSING, 60, 70),
            ("closed by the client", TCP, FAR_CLOSING, 60, 70),
            ("closed by both", TCP, CLOSING | FAR_CLOSING, 10, 20),
            ("reset by the backend", TCP, CLOSING | RESET, 10, 20),
            ("reset by the client before an answer", TCP, NEW | FAR_CLOSING | RESET, 10, 20),
            ("datagrams", UDP, 0, 180, 190),
            ("datagrams without an answer", UDP, NEW, 180, 190),
        ] {
            assert!(!over(&silent(flags, alive), proto, NOW), "{what}");
            assert!(over(&silent(flags, over_after), proto, NOW), "{what}");
        }
        let ahead = CtValue { last_seen_ns: NOW + 1, ..CtValue::default() };
        assert!(!over(&ahead, UDP, NOW) && !quiet(&ahead, NOW) && spare(&ahead, UDP, NOW) == 0);
        assert!(quiet(&silent(0, 181), NOW) && !quiet(&silent(0, 180), NOW));
    }

    #[test]
    fn what_can_be_spared_is_what_is_least_missed() {
        // From the best to the worst, then what is not to be had.
        let order = [
            (TCP, silent(CLOSING | FAR_CLOSING, 5)),
            (TCP, silent(CLOSING | RESET, 1)),
            (TCP, silent(0, 7441)),
            (TCP, silent(NEW | FAR_NEW, 50)),
            (TCP, silent(CLOSING, 10)),
            (TCP, silent(FAR_NEW, 1)),
        ];
        let worth: Vec<u64> = order.iter().map(|(p, v)| spare(v, *p, NOW)).collect();
        assert!(worth.is_sorted_by(|a, b| a > b) && worth[5] > 0, "{worth:?}");
        assert_eq!(spare(&silent(0, 7440), TCP, NOW), 0);
        assert_eq!(spare(&silent(NEW, 8), UDP, NOW), 0);
        assert!(spare(&silent(0, 9), UDP, NOW) > 0);
    }

    #[test]
    fn who_may_be_taken_for_dead_is_told_of_before_its_time() {
        // A flow that never answers: its client's packets, one in each second, against any place in a piece of time.
        for phase in 0..20 {
            let (start, mut told, mut last) = (NOW + phase * SECOND / 2, 0, 0);
            for i in 0..400 {
                let now = start + i * SECOND;
                if due(last, now) {
                    told = now;
                }
                last = now;
                assert!(now - told <= PIECE);
            }
        }
    }
}
