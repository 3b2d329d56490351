//! Upstream's words for types and fields. They are packed in the program, unpacked while a document is made, and forgotten.
//!
//! `schema/descriptions.gz` is written by `cargo run -p xtask -- descriptions` from the doc comments of k8s-openapi, which
//! carry the words of the Kubernetes project (Apache License 2.0). A line is a type, or behind a space a field of the type above: name, tab, words.

use std::{collections::HashMap, io::Read};

/// The packed text.
pub(super) const PACKED: &[u8] = include_bytes!("../../schema/descriptions.gz");

/// A type's words and those of its fields, still escaped.
#[derive(Default)]
pub(super) struct Words<'a> {
    pub(super) own: &'a str,
    pub(super) fields: HashMap<&'a str, &'a str>,
}

/// The text, about 1 MiB. What cannot be unpacked (never, the bytes are part of the program) gives documents without words.
pub(super) fn unpack() -> String {
    let mut text = String::new();
    if let Err(e) = flate2::read::GzDecoder::new(PACKED).read_to_string(&mut text) {
        tracing::error!("the descriptions in this program are damaged: {e}");
    }
    text
}

/// The words of each type.
pub(super) fn index(text: &str) -> HashMap<&str, Words<'_>> {
    let mut types: HashMap<&str, Words<'_>> = HashMap::new();
    let mut current = "";
    for (name, words) in text.lines().filter_map(|l| l.split_once('\t')) {
        match name.strip_prefix(' ') {
            Some(field) => {
                types.entry(current).or_default().fields.insert(field, words);
            }
            None => {
                current = name;
                types.entry(name).or_default().own = words;
            }
        }
    }
    types
}

/// Takes back the escapes of line ends and `\`.
pub(super) fn unescape(words: &str) -> String {
    let mut out = String::with_capacity(words.len());
    let mut chars = words.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some('n') => out.push('\n'),
                other => out.extend(other),
            },
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_found_by_type_and_field() {
        let text = "a.B\tOne.\\nTwo \\\\n.\n x\tEx.\nc.D\t\n";
        let words = index(text);
        assert_eq!(unescape(words["a.B"].own), "One.\nTwo \\n.");
        assert_eq!(words["a.B"].fields["x"], "Ex.");
        assert!(words["c.D"].own.is_empty());
    }

    #[test]
    fn the_packed_text_is_whole() {
        assert!(unpack().lines().count() > 2500);
    }
}
