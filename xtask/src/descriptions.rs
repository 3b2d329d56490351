//! What fields mean, for `kubectl explain`: k8s-openapi carries upstream's descriptions as doc comments of its types. They are
//! collected here for the types that the API server knows, and packed into `controlplane/apiserver/schema/descriptions.gz`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use serde::Deserialize;

/// The Kubernetes level whose descriptions are taken.
const LEVEL: &str = "v1_36";
const SCHEMA: &str = "controlplane/apiserver/schema";
/// k8s-openapi leaves `apiVersion` and `kind` out of its kinds; this type has them with upstream's words.
const TYPED: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions";

/// A type's description and those of its fields by JSON name.
#[derive(Debug, Default, PartialEq)]
struct TypeDocs {
    own: String,
    fields: BTreeMap<String, String>,
}

/// Writes the packed descriptions; with `check` only compares and fails when they are not what would be written.
pub fn run(check: bool) -> Result<(), String> {
    let schema = orlop_test_vms::root().join(SCHEMA);
    let types = schema.join("types.txt");
    let types = std::fs::read_to_string(&types).map_err(|e| format!("{}: {e}", types.display()))?;
    let mut docs = BTreeMap::new();
    collect(&source()?, &mut docs)?;
    let text = render(&types, &docs);
    let path = schema.join("descriptions.gz");
    if check {
        let packed = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let mut there = String::new();
        GzDecoder::new(&packed[..])
            .read_to_string(&mut there)
            .map_err(|e| format!("{}: {e}", path.display()))?;
        return if there == text {
            Ok(())
        } else {
            Err(format!("{} is out of date; run `cargo run -p xtask -- descriptions`", path.display()))
        };
    }
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    let packed = encoder.write_all(text.as_bytes()).and_then(|()| encoder.finish());
    let packed = packed.map_err(|e| format!("packing: {e}"))?;
    std::fs::write(&path, packed).map_err(|e| format!("{}: {e}", path.display()))
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    manifest_path: PathBuf,
}

/// The folder of k8s-openapi's sources for our level.
fn source() -> Result<PathBuf, String> {
    // Offline and for this platform: what others would need is not on a machine that has only built this, and tests have no network.
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let out = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".into()))
        .args(["metadata", "--format-version", "1", "--locked", "--offline", "--filter-platform", &platform])
        .output()
        .map_err(|e| format!("cargo metadata: {e}"))?;
    let meta: Metadata = serde_json::from_slice(&out.stdout).map_err(|e| format!("cargo metadata: {e}"))?;
    let package = meta.packages.iter().find(|p| p.name == "k8s-openapi").ok_or("k8s-openapi is not used")?;
    Ok(package.manifest_path.with_file_name("src").join(LEVEL))
}

fn collect(dir: &Path, docs: &mut BTreeMap<String, TypeDocs>) -> Result<(), String> {
    let failed = |e: std::io::Error| format!("{}: {e}", dir.display());
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.is_dir() {
            collect(&path, docs)?;
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
            if let Some((name, found)) = parse(&text) {
                docs.insert(name, found);
            }
        }
    }
    Ok(())
}

/// Reads one generated file: the type's name, the comments, and from the deserializer the fields' JSON names.
fn parse(source: &str) -> Option<(String, TypeDocs)> {
    let mut name = None;
    let mut docs = TypeDocs::default();
    let mut comment: Vec<&str> = Vec::new();
    let mut by_rust_name = BTreeMap::new();
    for line in source.lines() {
        let line = line.trim();
        if let Some(text) = line.strip_prefix("///") {
            comment.push(text.strip_prefix(' ').unwrap_or(text));
            continue;
        }
        if line.starts_with("#[") {
            continue;
        }
        let text = plain(&std::mem::take(&mut comment).join("\n"));
        if let Some(n) = line.strip_prefix("// Generated from definition ") {
            name.get_or_insert_with(|| n.to_owned());
        } else if line.starts_with("pub struct ") || line.starts_with("pub enum ") {
            if docs.own.is_empty() {
                docs.own = text;
            }
        } else if let Some((field, _)) = line.strip_prefix("pub ").and_then(|l| l.split_once(": ")) {
            by_rust_name.insert(field.to_owned(), text);
        } else if let Some((json, field)) = line.split_once(" => Field::Key_")
            && let Some(text) = by_rust_name.remove(field.trim_end_matches(','))
        {
            docs.fields.insert(json.trim_matches('"').to_owned(), text);
        }
    }
    Some((name?, docs))
}

/// Takes back what rustdoc needs escaped.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match (c, chars.peek()) {
            ('\\', Some('[' | ']' | '<' | '>' | '\\')) => out.extend(chars.next()),
            _ => out.push(c),
        }
    }
    out
}

/// A line for each type and, behind a space, each of its fields: name, tab, description with `\` and line ends escaped.
fn render(types: &str, docs: &BTreeMap<String, TypeDocs>) -> String {
    let none = TypeDocs::default();
    let typed = docs.get(TYPED).unwrap_or(&none);
    let mut out = String::new();
    let mut current = &none;
    let mut seen = BTreeSet::new();
    for line in types.lines().filter(|l| !l.starts_with('#')) {
        let word = line.trim_start().split(' ').next().unwrap_or_default();
        let (indent, name, text) = if line.starts_with(' ') {
            let name = word.trim_end_matches('!');
            let fallback = matches!(name, "apiVersion" | "kind").then(|| typed.fields.get(name)).flatten();
            (" ", name, current.fields.get(name).or(fallback).map(String::as_str))
        } else {
            if !seen.insert(word) {
                continue;
            }
            current = docs.get(word).unwrap_or(&none);
            ("", word, Some(current.own.as_str()))
        };
        let text = text.unwrap_or_default();
        if indent.is_empty() || !text.is_empty() {
            let escaped = text.replace('\\', "\\\\").replace('\n', "\\n");
            out.push_str(&format!("{indent}{name}\t{escaped}\n"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"// Generated from definition io.k8s.api.core.v1.Probe

/// Probe describes a check.
#[derive(Clone)]
pub struct Probe {
    /// First line.
    ///
    /// Second \ line \[of two\].
    pub http_get: Option<X>,

    pub silent: Option<i32>,
}

    "httpGet" => Field::Key_http_get,
    "silent" => Field::Key_silent,
"#;

    #[test]
    fn comments_go_to_json_names() {
        let (name, docs) = parse(FILE).unwrap();
        assert_eq!(
            (name.as_str(), docs.own.as_str()),
            ("io.k8s.api.core.v1.Probe", "Probe describes a check.")
        );
        assert_eq!(docs.fields["httpGet"], "First line.\n\nSecond \\ line [of two].");
        let all = BTreeMap::from([(name, docs)]);
        let types = "# x\nio.k8s.api.core.v1.Probe\n httpGet! a.B\n silent int32\nother\n";
        assert_eq!(
            render(types, &all),
            "io.k8s.api.core.v1.Probe\tProbe describes a check.\n httpGet\tFirst line.\\n\\nSecond \\\\ line [of two].\nother\t\n"
        );
    }

    #[test]
    fn the_checked_in_descriptions_are_current() {
        run(true).unwrap();
    }
}
