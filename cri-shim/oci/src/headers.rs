//! The kernel's own numbers, which tables here are held against.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// What a header of the kernel defines as a plain number, by its name without `prefix`.
pub(crate) fn numbers(header: &str, prefix: &str) -> BTreeMap<String, u32> {
    let triplet = format!("/usr/include/{}-linux-gnu", std::env::consts::ARCH);
    let places = [Path::new(&triplet).join(header), Path::new("/usr/include").join(header)];
    let text = places.iter().find_map(|p| fs::read_to_string(p).ok());
    let text = text.unwrap_or_else(|| panic!("{header} is missing: apt-get install linux-libc-dev"));
    let one = |line: &str| {
        let mut words = line.trim_start_matches('#').trim_start().strip_prefix("define ")?.split_whitespace();
        let name = words.next()?.strip_prefix(prefix)?.to_owned();
        Some((name, words.next()?.parse().ok()?))
    };
    let found: BTreeMap<_, _> = text.lines().filter(|l| l.starts_with('#')).filter_map(one).collect();
    assert!(found.len() > 10, "{header} is read wrongly: {found:?}");
    found
}
