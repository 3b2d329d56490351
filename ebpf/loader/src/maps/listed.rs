//! What the programs' filter says, with the counts that it takes to know when a bit goes. Pure.

use orlop_ebpf_common::FrontendKey;
use orlop_ebpf_common::noted::{PLACES, place};

/// Bits for frontends, which several of them may share.
pub struct Listed {
    words: Vec<u64>,
    /// Frontends at each place; one that was full once stays so.
    counts: Vec<u8>,
}

/// A word of the filter and what it is now.
pub type Word = (u32, u64);

fn at(k: &FrontendKey) -> usize {
    place(&k.addr, k.port, k.proto) as usize
}

impl Listed {
    pub fn new<'a>(frontends: impl IntoIterator<Item = &'a FrontendKey>) -> Listed {
        let mut l = Listed { words: vec![0; PLACES as usize / 64], counts: vec![0; PLACES as usize] };
        for k in frontends {
            l.add(k);
        }
        l
    }

    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Counts a frontend; the word that changed by it.
    pub fn add(&mut self, k: &FrontendKey) -> Option<Word> {
        let at = at(k);
        self.counts[at] = self.counts[at].saturating_add(1);
        self.words[at / 64] |= 1 << (at % 64);
        (self.counts[at] == 1).then_some((at as u32 / 64, self.words[at / 64]))
    }

    /// Counts one less; the word that changed by it.
    pub fn remove(&mut self, k: &FrontendKey) -> Option<Word> {
        let at = at(k);
        if matches!(self.counts[at], 0 | u8::MAX) {
            return None;
        }
        self.counts[at] -= 1;
        if self.counts[at] > 0 {
            return None;
        }
        self.words[at / 64] &= !(1 << (at % 64));
        Some((at as u32 / 64, self.words[at / 64]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use orlop_ebpf_common::{TCP, addr_from};

    fn key(i: u32, scope: u8) -> FrontendKey {
        let addr = addr_from(std::net::IpAddr::from([10, 96, (i >> 8) as u8, i as u8]));
        FrontendKey { addr, port: 80, proto: TCP, scope }
    }

    #[test]
    fn bits_stay_while_one_needs_them() {
        let keys: Vec<FrontendKey> = (0..20_000).map(|i| key(i, 0)).collect();
        let mut l = Listed::new(&keys);
        assert!(l.add(&key(7, 1)).is_none(), "the other scope is at the same place");
        assert!(l.remove(&key(7, 0)).is_none(), "and still there");
        for k in keys.iter().skip(100) {
            l.remove(k);
        }
        let left: Vec<FrontendKey> = (0..100).map(|i| key(i, u8::from(i == 7))).collect();
        assert!(l.words() == Listed::new(&left).words());
        for k in &left {
            l.remove(k);
        }
        assert!(l.words().iter().all(|w| *w == 0));
        assert!(l.remove(&left[0]).is_none(), "what is not there changes nothing");
    }
}
