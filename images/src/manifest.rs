//! Manifests and indexes, OCI's and Docker's alike. Pure.

use oci_spec::image::ImageConfiguration;
use serde::Deserialize;

use crate::ingest::LayerPlan;
use crate::layout::LayerBlob;
use crate::{Digest, Error, Result};

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    pub platform: Option<Platform>,
    #[serde(default, deserialize_with = "or_default")]
    pub annotations: std::collections::BTreeMap<String, String>,
}

/// Absent fields mean this machine's.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Platform {
    #[serde(default)]
    pub os: String,
    #[serde(default)]
    pub architecture: String,
    pub variant: Option<String>,
}

/// Go writes what is empty as `null`.
fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    #[serde(default)]
    schema_version: u32,
    #[serde(default, deserialize_with = "or_default")]
    media_type: String,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
}

/// A parsed manifest or index.
#[derive(Debug)]
pub(crate) enum Manifest {
    Image { config: Descriptor, layers: Vec<LayerBlob> },
    Index(Vec<Descriptor>),
}

/// The most layers of an image; overlayfs takes at most 500.
const MAX_LAYERS: usize = 499;

/// Tells by content what `bytes` are, because media types are often missing or wrong.
pub(crate) fn parse(bytes: &[u8], reference: &str) -> Result<Manifest> {
    let bad =
        |why: String| Error::Malformed { what: "the manifest".into(), reference: reference.into(), why };
    let doc: Document = serde_json::from_slice(bytes).map_err(|e| bad(e.to_string()))?;
    if doc.schema_version != 2 {
        return Err(bad(
            "it is of schema version 1, which was withdrawn; push the image again with a current tool".into(),
        ));
    }
    let is_index = doc.manifests.is_some();
    if is_index && (doc.config.is_some() || doc.layers.is_some()) {
        // Somebody else who has approved of its digest may have read it as the other (CVE-2021-41190).
        return Err(bad("it is a manifest and an index at once".into()));
    }
    let (manifests, indexes) = (
        [
            "application/vnd.oci.image.manifest.v1+json",
            "application/vnd.docker.distribution.manifest.v2+json",
        ],
        [
            "application/vnd.oci.image.index.v1+json",
            "application/vnd.docker.distribution.manifest.list.v2+json",
        ],
    );
    if (if is_index { manifests } else { indexes }).contains(&doc.media_type.as_str()) {
        return Err(bad(format!("it calls itself {}, which it is not", doc.media_type)));
    }
    match (doc.config, doc.manifests) {
        (Some(config), _) => {
            // An image without files may have no list at all.
            let layers = doc.layers.unwrap_or_default();
            if layers.len() > MAX_LAYERS {
                return Err(bad(format!("it has {} layers, more than {MAX_LAYERS}", layers.len())));
            }
            if layers.iter().any(|l| l.media_type.ends_with("+encrypted")) {
                return Err(bad("its layers are encrypted, which is not supported".into()));
            }
            let layers = layers
                .into_iter()
                .map(|d| LayerBlob { digest: d.digest, size: d.size, media_type: d.media_type })
                .collect();
            Ok(Manifest::Image { config, layers })
        }
        (None, Some(manifests)) => Ok(Manifest::Index(manifests)),
        _ => Err(bad("it has neither config and layers nor manifests".into())),
    }
}

/// Go's name of this machine's architecture.
pub(crate) fn host_architecture() -> &'static str {
    platforms(std::env::consts::ARCH)[0].0
}

/// What runs on a machine that Rust calls `arch`: architectures and variants in Go's names, best first. The same, in the same order, as
/// containerd takes.
fn platforms(arch: &'static str) -> Vec<(&'static str, &'static str)> {
    match arch {
        "x86_64" => vec![("amd64", ""), ("386", "")],
        "aarch64" => vec![("arm64", ""), ("arm", "v8"), ("arm", "v7"), ("arm", "v6"), ("arm", "v5")],
        "arm" => vec![("arm", "v7"), ("arm", "v6"), ("arm", "v5")],
        "x86" => vec![("386", "")],
        "powerpc64" => vec![("ppc64le", "")],
        "loongarch64" => vec![("loong64", "")],
        other => vec![(other, "")],
    }
}

/// An architecture and its variant in the one way of several in which they are written above.
fn normal(architecture: &str, variant: &str) -> (String, String) {
    let own = Some(architecture).filter(|a| !a.is_empty()).unwrap_or(host_architecture());
    let (architecture, variant) = (own.to_ascii_lowercase(), variant.to_ascii_lowercase());
    let (architecture, variant) = match (architecture.as_str(), variant.as_str()) {
        ("amd64" | "x86_64" | "x86-64", v) => ("amd64", if v == "v1" { "" } else { v }),
        ("arm64" | "aarch64", "" | "8" | "v8") => ("arm64", ""),
        ("arm64" | "aarch64", v) => ("arm64", v),
        ("armhf", _) | ("arm", "" | "7") => ("arm", "v7"),
        ("armel", _) | ("arm", "6") => ("arm", "v6"),
        ("arm", "5") => ("arm", "v5"),
        ("arm", "8") => ("arm", "v8"),
        ("i386" | "386", _) => ("386", ""),
        other => other,
    };
    (architecture.to_owned(), variant.to_owned())
}

/// How good a platform is for a machine that runs `list`: 0 is best; `None` when it does not run there.
fn rank(list: &[(&str, &str)], platform: &Platform) -> Option<usize> {
    if !matches!(platform.os.to_ascii_lowercase().as_str(), "" | "linux") {
        return None;
    }
    let (arch, variant) = normal(&platform.architecture, platform.variant.as_deref().unwrap_or_default());
    list.iter().position(|(a, v)| *a == arch && *v == variant)
}

/// The entry of an index for this machine.
pub(crate) fn select(entries: &[Descriptor], reference: &str) -> Result<Descriptor> {
    select_for(&platforms(std::env::consts::ARCH), entries, reference)
}

fn select_for(list: &[(&str, &str)], entries: &[Descriptor], reference: &str) -> Result<Descriptor> {
    let rank_of = |d: &Descriptor| match &d.platform {
        // An index of one image often says nothing about its platform; its config does.
        None => (!d.annotations.contains_key("vnd.docker.reference.type")).then_some(list.len()),
        Some(p) => rank(list, p),
    };
    entries
        .iter()
        .filter_map(|d| rank_of(d).map(|r| (r, d)))
        .min_by_key(|(r, _)| *r)
        .map(|(_, d)| d.clone())
        .ok_or_else(|| Error::NoPlatform {
            reference: reference.into(),
            platform: format!("linux/{}", list[0].0),
            offered: entries
                .iter()
                .filter_map(|d| d.platform.as_ref())
                .map(|p| {
                    format!(
                        "{}/{}{}",
                        p.os,
                        p.architecture,
                        p.variant.as_ref().map(|v| format!("/{v}")).unwrap_or_default()
                    )
                })
                .collect::<Vec<_>>()
                .join(", "),
        })
}

/// Fills in what is left out by tools that write `null` or nothing for what is empty.
fn complete(config: &mut serde_json::Value) {
    let serde_json::Value::Object(fields) = config else { return };
    let is_empty = |v: &serde_json::Value| v.is_null() || v.as_str() == Some("");
    for (key, own) in [("os", "linux"), ("architecture", host_architecture())] {
        if fields.get(key).is_none_or(is_empty) {
            fields.insert(key.to_owned(), own.into());
        }
    }
    if let Some(serde_json::Value::Object(rootfs)) = fields.get_mut("rootfs") {
        if rootfs.get("diff_ids").is_some_and(serde_json::Value::is_null) {
            rootfs.insert("diff_ids".to_owned(), serde_json::Value::Array(Vec::new()));
        }
        if rootfs.get("type").is_none_or(is_empty) {
            rootfs.insert("type".to_owned(), "layers".into());
        }
    }
}

/// Parses a config and checks that it fits this machine and the number of layers.
pub(crate) fn parse_config(
    bytes: &[u8],
    layers: usize,
    reference: &str,
) -> Result<(ImageConfiguration, Vec<Digest>)> {
    let bad =
        |why: String| Error::Malformed { what: "the image config".into(), reference: reference.into(), why };
    let mut value: serde_json::Value = serde_json::from_slice(bytes).map_err(|e| bad(e.to_string()))?;
    complete(&mut value);
    let config: ImageConfiguration = serde_json::from_value(value).map_err(|e| bad(e.to_string()))?;
    let (os, has) = (config.os().to_string(), config.architecture().to_string());
    let list = platforms(std::env::consts::ARCH);
    // Indexes tell variants apart; configs are often wrong about theirs.
    let runs = os.eq_ignore_ascii_case("linux") && list.iter().any(|(a, _)| *a == normal(&has, "").0);
    if !runs {
        return Err(Error::NoPlatform {
            reference: reference.into(),
            platform: format!("linux/{}", list[0].0),
            offered: format!("{os}/{has}"),
        });
    }
    let diffs = config
        .rootfs()
        .diff_ids()
        .iter()
        .map(|d| d.parse::<Digest>().map_err(|_| bad(format!("{d:?} is not a digest of sha256 or sha512"))))
        .collect::<Result<Vec<_>>>()?;
    if diffs.len() != layers {
        return Err(bad(format!("it names {} layers, the manifest {layers}", diffs.len())));
    }
    Ok((config, diffs))
}

/// Chain ids of a stack of layers, bottom first (OCI image spec, "Layer ChainID").
pub(crate) fn chain_ids(diffs: &[Digest]) -> Vec<Digest> {
    let mut chain: Vec<Digest> = Vec::with_capacity(diffs.len());
    for diff in diffs {
        chain.push(match chain.last() {
            None => *diff,
            Some(below) => Digest::of(format!("{below} {diff}").as_bytes()),
        });
    }
    chain
}

/// What to fetch for the layers of an image.
pub(crate) fn plan(blobs: &[LayerBlob], diffs: &[Digest], chain: &[Digest]) -> Vec<LayerPlan> {
    (0..blobs.len().min(diffs.len()))
        .map(|i| LayerPlan {
            digest: Some(blobs[i].digest),
            size: blobs[i].size,
            diff: diffs[i],
            chain: chain[i],
            parent: i.checked_sub(1).map(|p| chain[p]),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let chain = chain_ids(&[a, b]);
        assert_eq!(chain[0], a);
        assert_eq!(chain[1], Digest::of(format!("{a} {b}").as_bytes()));
    }

    #[test]
    fn the_best_platform_is_chosen() {
        let arch = host_architecture();
        let entry = |n: &str, platform: Option<(&str, &str, Option<&str>)>| Descriptor {
            media_type: String::new(),
            digest: Digest::of(n.as_bytes()),
            size: 1,
            platform: platform.map(|(os, a, v)| Platform {
                os: os.into(),
                architecture: a.into(),
                variant: v.map(Into::into),
            }),
            annotations: Default::default(),
        };
        let entries = [
            entry("win", Some(("windows", arch, None))),
            entry("other", Some(("linux", "mips", None))),
            entry("unknown", Some(("unknown", "unknown", None))),
            entry("bare", None),
            entry("fits", Some(("linux", arch, None))),
        ];
        assert_eq!(select(&entries, "x").unwrap().digest, Digest::of(b"fits"));
        assert_eq!(select(&entries[..4], "x").unwrap().digest, Digest::of(b"bare"));
        let e = select(&entries[..2], "x").unwrap_err();
        assert!(e.to_string().contains("linux/mips"), "{e}");
    }

    #[test]
    fn variants_fall_back_as_in_containerd() {
        let entry = |text: &str| {
            let (platform, variant) = match text.split('/').collect::<Vec<_>>()[..] {
                [arch] => (arch.to_owned(), None),
                [arch, variant] => (arch.to_owned(), Some(variant.to_owned())),
                _ => panic!("{text}"),
            };
            Descriptor {
                media_type: String::new(),
                digest: Digest::of(text.as_bytes()),
                size: 1,
                platform: Some(Platform { os: "linux".into(), architecture: platform, variant }),
                annotations: Default::default(),
            }
        };
        for (machine, offered, wanted) in [
            ("x86_64", &["386", "amd64", "amd64/v2"][..], Some("amd64")),
            ("x86_64", &["amd64/v2", "amd64/v1"], Some("amd64/v1")),
            ("x86_64", &["x86_64"], Some("x86_64")),
            ("x86_64", &["arm64", "386"], Some("386")),
            ("x86_64", &["amd64/v3", "arm64"], None),
            ("aarch64", &["arm/v7", "arm64/v8", "amd64"], Some("arm64/v8")),
            ("aarch64", &["arm/v7", "arm64", "amd64"], Some("arm64")),
            ("aarch64", &["amd64", "arm/v6", "arm/v7"], Some("arm/v7")),
            ("aarch64", &["arm64/v9", "arm/v5"], Some("arm/v5")),
            ("arm", &["arm/v5", "arm/v6", "arm/v7", "arm64"], Some("arm/v7")),
            ("arm", &["arm/v5", "arm/v6"], Some("arm/v6")),
            ("arm", &["arm/v5", "arm"], Some("arm")),
            ("arm", &["armel", "armhf"], Some("armhf")),
            ("arm", &["arm/v8", "arm64/v8"], None),
            ("riscv64", &["amd64", "riscv64"], Some("riscv64")),
            ("s390x", &["amd64", "S390X"], Some("S390X")),
            ("powerpc64", &["ppc64", "ppc64le"], Some("ppc64le")),
        ] {
            let entries: Vec<_> = offered.iter().map(|t| entry(t)).collect();
            let got = select_for(&platforms(machine), &entries, "x").ok().map(|d| d.digest);
            let wanted = wanted.map(|t| Digest::of(t.as_bytes()));
            assert_eq!(got, wanted, "{machine}: {offered:?}");
        }
    }

    #[test]
    fn what_tools_leave_out_is_filled_in() {
        let digest = Digest::of(b"x");
        for text in [
            format!(
                "{{\"schemaVersion\":2,\"config\":{{\"digest\":\"{digest}\",\"size\":1}},\"layers\":null}}"
            ),
            format!(
                "{{\"schemaVersion\":2,\"mediaType\":null,\"config\":{{\"digest\":\"{digest}\",\"size\":1,\"annotations\":null,\"platform\":null}}}}"
            ),
        ] {
            let Manifest::Image { layers, .. } = parse(text.as_bytes(), "x").unwrap() else {
                panic!("{text}")
            };
            assert!(layers.is_empty());
        }
        let text = format!(
            "{{\"schemaVersion\":2,\"manifests\":[{{\"digest\":\"{digest}\",\"size\":1,\"platform\":{{}}}}]}}"
        );
        let Manifest::Index(entries) = parse(text.as_bytes(), "x").unwrap() else { panic!("{text}") };
        assert_eq!(select(&entries, "x").unwrap().digest, digest);
        for text in [
            "{\"rootfs\":{\"type\":\"layers\",\"diff_ids\":null}}",
            "{\"os\":\"\",\"architecture\":\"\",\"rootfs\":{\"diff_ids\":[]},\"history\":null}",
            "{\"os\":\"Linux\",\"architecture\":null,\"config\":null,\"rootfs\":{\"diff_ids\":[]}}",
            "{\"rootfs\":{\"diff_ids\":[]},\"config\":{\"Env\":null,\"Cmd\":null,\"Volumes\":null,\"ExposedPorts\":null,\"Labels\":null,\"Entrypoint\":null,\"OnBuild\":null,\"User\":\"\"}}",
            "{\"rootfs\":{\"diff_ids\":[]},\"container_config\":{},\"docker_version\":\"20\",\"created\":\"0001-01-01T00:00:00Z\",\"history\":[{\"created_by\":\"x\",\"empty_layer\":true}]}",
        ] {
            let (config, diffs) =
                parse_config(text.as_bytes(), 0, "x").unwrap_or_else(|e| panic!("{text}: {e}"));
            assert!(diffs.is_empty() && config.os().to_string().eq_ignore_ascii_case("linux"), "{text}");
        }
        for text in
            ["{}", "[]", "null", "{\"rootfs\":null}", "{\"os\":\"windows\",\"rootfs\":{\"diff_ids\":[]}}"]
        {
            assert!(parse_config(text.as_bytes(), 0, "x").is_err(), "{text}");
        }
    }

    #[test]
    fn documents_that_are_no_manifests() {
        let both = format!(
            "{{\"schemaVersion\":2,\"config\":{{\"digest\":\"{0}\",\"size\":1}},\"layers\":[],\"manifests\":[]}}",
            Digest::of(b"")
        );
        let named =
            both.replace(",\"manifests\":[]", ",\"mediaType\":\"application/vnd.oci.image.index.v1+json\"");
        let secret = both.replace(",\"manifests\":[]", "").replace("\"layers\":[]", &format!("\"layers\":[{{\"digest\":\"{}\",\"size\":1,\"mediaType\":\"application/vnd.oci.image.layer.v1.tar+gzip+encrypted\"}}]", Digest::of(b"")));
        for (text, why) in [
            (both.as_str(), "at once"),
            (&named, "which it is not"),
            (&secret, "encrypted"),
            (
                "{\"schemaVersion\":2,\"manifests\":[],\"mediaType\":\"application/vnd.docker.distribution.manifest.v2+json\"}",
                "which it is not",
            ),
            ("{\"schemaVersion\":2,\"layers\":[],\"layers\":[]}", "duplicate"),
            ("{\"schemaVersion\":2,\"layers\":[]}", "neither"),
            ("{", "EOF"),
            ("{\"schemaVersion\":1}", "version 1"),
            ("{\"schemaVersion\":2}", "neither"),
            ("{\"schemaVersion\":2,\"config\":{\"digest\":\"md5:1\",\"size\":1},\"layers\":[]}", "sha256"),
        ] {
            let e = parse(text.as_bytes(), "x").unwrap_err().to_string();
            assert!(e.contains(why), "{text}: {e}");
        }
    }
}
