//! Coarse notes of what is in the larger maps: a program that finds nothing noted needs no look-up, which is most packets'
//! case. Something noted may still not be there.

use crate::Addr;

/// Bits of FILTER, an array of words: one for each address and port that is in FRONTENDS. Kept by user space.
pub const PLACES: u32 = 1 << 18;
/// Elements of CLIENTS: not 0 for each address behind a pod's interface that a packet for a Service came from, so that
/// answers to it may have to be renamed. Kept by programs.
pub const CLIENTS: u32 = 1 << 14;

/// Elements of SERVERS: not 0 for each address and port of a pod that answers clients outside of the node, with host
/// routing. Kept by programs.
pub const SERVERS: u32 = 1 << 14;

/// Elements of PEERS: not 0 for each address and port that a socket was led to by a Service's name. Kept by programs.
pub const PEERS: u32 = 1 << 14;

/// One word for an address. Of IPv4 only the last one differs, and the compiler does the rest.
#[inline(always)]
fn folded(addr: &Addr) -> u32 {
    let high = addr[0].wrapping_mul(0x9e37_79b1) ^ addr[1].wrapping_mul(0x85eb_ca77);
    addr[3] ^ high ^ addr[2].wrapping_mul(0xc2b2_ae3d)
}

#[inline(always)]
fn mixed(word: u32) -> u32 {
    let h = word.wrapping_mul(0x27d4_eb2f);
    (h ^ (h >> 15)).wrapping_mul(0x9e37_79b1)
}

/// The bit of FILTER for a frontend.
#[inline(always)]
pub fn place(addr: &Addr, port: u16, proto: u8) -> u32 {
    let rest = (((port as u32) << 8) | proto as u32).wrapping_mul(0x1656_67b1);
    mixed(folded(addr) ^ rest) >> (32 - PLACES.trailing_zeros())
}

/// The element of CLIENTS for an address.
#[inline(always)]
pub fn client(addr: &Addr) -> u32 {
    mixed(folded(addr)) >> (32 - CLIENTS.trailing_zeros())
}

/// The element of PEERS for an address and port.
#[inline(always)]
pub fn peer(addr: &Addr, port: u16) -> u32 {
    server(addr, port) % PEERS
}

/// The element of SERVERS for a pod's address and port.
#[inline(always)]
pub fn server(addr: &Addr, port: u16) -> u32 {
    mixed(folded(addr) ^ (port as u32).wrapping_mul(0x1656_67b1)) >> (32 - SERVERS.trailing_zeros())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr_from;

    #[test]
    fn places_are_spread() {
        let mut seen = std::collections::HashSet::new();
        for i in 0..10_000u32 {
            let ip = std::net::IpAddr::from([10, 96, (i >> 8) as u8, i as u8]);
            seen.insert(place(&addr_from(ip), 80, 6));
        }
        assert!(seen.iter().all(|p| *p < PLACES));
        // So many balls leave this many of 2^18 boxes filled when nothing pulls them together.
        assert!(seen.len() > 9_700, "{}", seen.len());
        let clients: std::collections::HashSet<u32> =
            (0..250u8).map(|i| client(&addr_from([10, 244, 0, i].into()))).collect();
        assert!(clients.len() > 240, "{}", clients.len());
    }
}
