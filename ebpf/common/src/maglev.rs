//! Maglev's table population (Eisenbud et al., NSDI 2016, section 3.4): every node computes the same table from the same
//! backends, and a changed backend moves few entries.

/// Entries per table, a prime. Good balance for up to a hundredth as many backends; 4 KiB per Service.
pub const SIZE: usize = 1021;
/// The largest set that gets a table; larger ones choose by slot.
pub const MAX_BACKENDS: usize = SIZE / 4;

const fn mix(mut h: u64) -> u64 {
    h ^= h >> 33;
    h = h.wrapping_mul(0xff51_afd7_ed55_8ccd);
    h ^= h >> 33;
    h = h.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
}

/// Fills `table` with indexes into `seeds`. A seed stands for a backend's address and port and must not depend on the
/// node or on the order of backends; the caller sorts backends by seed where nodes must agree. Nothing is written when
/// `seeds` is empty.
pub fn fill(seeds: &[u64], table: &mut [u32; SIZE]) {
    if seeds.is_empty() || seeds.len() > SIZE {
        return;
    }
    const FREE: u32 = u32::MAX;
    table.fill(FREE);
    let mut next = [0u16; SIZE];
    let mut filled = 0;
    loop {
        for (i, seed) in seeds.iter().enumerate() {
            let offset = mix(*seed) as usize % SIZE;
            let skip = mix(seed ^ 0x9e37_79b9_7f4a_7c15) as usize % (SIZE - 1) + 1;
            loop {
                let at = (offset + next[i] as usize * skip) % SIZE;
                next[i] += 1;
                if table[at] == FREE {
                    table[at] = i as u32;
                    break;
                }
            }
            filled += 1;
            if filled == SIZE {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_balanced_and_change_little() {
        let seeds: Vec<u64> = (1..=10).collect();
        let mut a = [0; SIZE];
        fill(&seeds, &mut a);
        for i in 0..10 {
            let n = a.iter().filter(|e| **e == i).count();
            assert!((102..=103).contains(&n), "{n}");
        }
        let mut b = [0; SIZE];
        fill(&seeds[..9], &mut b);
        let moved = a.iter().zip(&b).filter(|(x, y)| **x != 9 && x != y).count();
        assert!(moved < SIZE / 5, "{moved} entries of living backends moved");
    }
}
