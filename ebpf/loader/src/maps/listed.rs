//! What the programs' filter says. Pure.

use orlop_ebpf_common::FrontendKey;
use orlop_ebpf_common::noted::{PLACES, place};

/// Frontends that may have gone before the filter is made anew: what they leave in it only costs look-ups.
const MANY: usize = 1024;

/// Bits for frontends, which several of them may share.
pub struct Listed {
    words: Vec<u64>,
    /// Frontends that have gone since the filter was made. Their bits stay: packets of connections that they have begun are
    /// looked for no longer otherwise.
    gone: usize,
}

/// A word of the filter and what it is now.
pub type Word = (u32, u64);

impl Listed {
    pub fn new(frontends: impl IntoIterator<Item = FrontendKey>) -> Listed {
        let mut l = Listed { words: vec![0; PLACES as usize / 64], gone: 0 };
        for k in frontends {
            l.add(&k);
        }
        l
    }

    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Lists a frontend; the word that changed by it.
    pub fn add(&mut self, k: &FrontendKey) -> Option<Word> {
        let at = place(&k.addr, k.port, k.proto) as usize;
        let (word, bit) = (&mut self.words[at / 64], 1 << (at % 64));
        let new = *word & bit == 0;
        *word |= bit;
        new.then_some((at as u32 / 64, *word))
    }

    /// Counts a frontend that has gone; says when there are so many that the filter is better made anew.
    pub fn goes(&mut self) -> bool {
        self.gone += 1;
        self.gone >= MANY
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
    fn all_are_listed_and_who_goes_is_counted() {
        let mut l = Listed::new((0..1000).map(|i| key(i, 0)));
        assert!(l.add(&key(7, 1)).is_none(), "the other scope is at the same place");
        let set: u32 = l.words().iter().map(|w| w.count_ones()).sum();
        assert!((900..=1000).contains(&set), "{set}");
        let new = (1000..).map(|i| key(i, 0)).find_map(|k| l.add(&k)).unwrap();
        assert_eq!(l.words()[new.0 as usize], new.1);
        assert_eq!((0..MANY).position(|_| l.goes()), Some(MANY - 1));
    }
}
