//! Inputs for fuzz targets: known good ones, mutated. Proptest shrinks what fails. A development dependency only.

use proptest::prelude::*;
use proptest::sample::Index;

/// A fixed number of cases unless `PROPTEST_CASES` asks for another.
pub fn cases(fixed: u32) -> ProptestConfig {
    let given = ProptestConfig::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { given.cases } else { fixed };
    ProptestConfig { cases, failure_persistence: None, ..given }
}

#[derive(Clone, Debug)]
enum Mutation {
    Set(Index, u8),
    Flip(Index, u8),
    Insert(Index, Index),
    Overwrite(Index, Index),
    Remove(Index, usize),
    Repeat(Index, usize, usize),
    Truncate(Index),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let at = any::<Index>;
    prop_oneof![
        (at(), any::<u8>()).prop_map(|(i, b)| Mutation::Set(i, b)),
        (at(), 0..8u8).prop_map(|(i, b)| Mutation::Flip(i, b)),
        (at(), at()).prop_map(|(i, w)| Mutation::Insert(i, w)),
        (at(), at()).prop_map(|(i, w)| Mutation::Overwrite(i, w)),
        (at(), 1..64usize).prop_map(|(i, n)| Mutation::Remove(i, n)),
        (at(), 1..600usize, 1..5usize).prop_map(|(i, n, t)| Mutation::Repeat(i, n, t)),
        at().prop_map(Mutation::Truncate),
    ]
}

fn apply(mut data: Vec<u8>, mutations: &[Mutation], words: &[impl AsRef<[u8]>]) -> Vec<u8> {
    for m in mutations {
        if data.is_empty() {
            data.push(0);
        }
        let len = data.len();
        match m {
            Mutation::Set(i, b) => data[i.index(len)] = *b,
            Mutation::Flip(i, bit) => data[i.index(len)] ^= 1 << bit,
            Mutation::Insert(i, w) => {
                let at = i.index(len);
                data.splice(at..at, w.get(words).as_ref().iter().copied());
            }
            Mutation::Overwrite(i, w) => {
                for (to, from) in data[i.index(len)..].iter_mut().zip(w.get(words).as_ref()) {
                    *to = *from;
                }
            }
            Mutation::Remove(i, n) => {
                let at = i.index(len);
                data.drain(at..(at + n).min(len));
            }
            Mutation::Repeat(i, n, times) => {
                let at = i.index(len);
                let piece = data[at..(at + n).min(len)].repeat(*times);
                data.splice(at..at, piece);
            }
            Mutation::Truncate(i) => data.truncate(i.index(len)),
        }
    }
    data
}

/// One of `seeds` after a few mutations. `words` are pieces that mean something to its format.
///
/// # Panics
/// Without seeds or words.
pub fn mutated<W: AsRef<[u8]> + 'static>(
    seeds: Vec<Vec<u8>>,
    words: &'static [W],
) -> impl Strategy<Value = Vec<u8>> {
    (prop::sample::select(seeds), prop::collection::vec(mutation(), 0..8))
        .prop_map(move |(seed, mutations)| apply(seed, &mutations, words))
}

/// Lengths in which bytes arrive, to be taken in turn: everything can be cut anywhere.
pub fn cuts() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(1usize..400, 1..8)
}

#[cfg(test)]
mod tests {
    use proptest::strategy::ValueTree;

    use super::*;

    #[test]
    fn seeds_come_as_they_are_and_in_all_ways_changed() {
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        let strategy = mutated(vec![b"seed".to_vec()], &["word"]);
        let all: Vec<Vec<u8>> = (0..500).map(|_| strategy.new_tree(&mut runner).unwrap().current()).collect();
        assert!(all.iter().any(|d| d == b"seed"));
        assert!(all.iter().any(|d| d == b"wordseed" || d == b"seedword" || d == b"sewordet"));
        assert!(all.iter().any(|d| d.len() < 4) && all.iter().any(|d| d.len() > 8));
    }
}
