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
    #[serde(default)]
    pub annotations: std::collections::BTreeMap<String, String>,
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Platform {
    pub os: String,
    pub architecture: String,
    pub variant: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    #[serde(default)]
    schema_version: u32,
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
    match (doc.config, doc.layers, doc.manifests) {
        (Some(config), Some(layers), _) => {
            if layers.len() > MAX_LAYERS {
                return Err(bad(format!("it has {} layers, more than {MAX_LAYERS}", layers.len())));
            }
            let layers = layers
                .into_iter()
                .map(|d| LayerBlob { digest: d.digest, size: d.size, media_type: d.media_type })
                .collect();
            Ok(Manifest::Image { config, layers })
        }
        (_, _, Some(manifests)) => Ok(Manifest::Index(manifests)),
        _ => Err(bad("it has neither config and layers nor manifests".into())),
    }
}

/// Go's name of this machine's architecture, and the variants that it runs, best first.
pub(crate) fn host_platform() -> (&'static str, &'static [&'static str]) {
    match std::env::consts::ARCH {
        "x86_64" => ("amd64", &["", "v1"]),
        "aarch64" => ("arm64", &["v8", ""]),
        "arm" => ("arm", &["v7", "v6", "v5", ""]),
        "powerpc64" => ("ppc64le", &[""]),
        other => (other, &[""]),
    }
}

/// The entry of an index for this machine.
pub(crate) fn select(entries: &[Descriptor], reference: &str) -> Result<Descriptor> {
    let (arch, variants) = host_platform();
    let rank = |d: &Descriptor| match &d.platform {
        // An index of one image often says nothing about its platform; its config does.
        None => (!d.annotations.contains_key("vnd.docker.reference.type")).then_some(variants.len()),
        Some(p) if p.os == "linux" && p.architecture == arch => {
            let variant = p.variant.as_deref().unwrap_or("");
            variants.iter().position(|v| *v == variant)
        }
        Some(_) => None,
    };
    entries
        .iter()
        .filter_map(|d| rank(d).map(|r| (r, d)))
        .min_by_key(|(r, _)| *r)
        .map(|(_, d)| d.clone())
        .ok_or_else(|| Error::NoPlatform {
            reference: reference.into(),
            platform: format!("linux/{arch}"),
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

/// Parses a config and checks that it fits this machine and the number of layers.
pub(crate) fn parse_config(
    bytes: &[u8],
    layers: usize,
    reference: &str,
) -> Result<(ImageConfiguration, Vec<Digest>)> {
    let bad =
        |why: String| Error::Malformed { what: "the image config".into(), reference: reference.into(), why };
    let config: ImageConfiguration = serde_json::from_slice(bytes).map_err(|e| bad(e.to_string()))?;
    let (arch, _) = host_platform();
    let (os, has) = (config.os().to_string(), config.architecture().to_string());
    if os != "linux" || has != arch {
        return Err(Error::NoPlatform {
            reference: reference.into(),
            platform: format!("linux/{arch}"),
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
        let (arch, _) = host_platform();
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
    fn documents_that_are_no_manifests() {
        for (text, why) in [
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
