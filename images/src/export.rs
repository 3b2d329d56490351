//! Images as archives that are OCI layouts and docker archives at once. Blocking code.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;
use tar::{EntryType, Header};

use crate::build::{canonical_json, compress};
use crate::layout::{ImageRecord, LayerBlob, Layout};
use crate::manifest::{self, Manifest};
use crate::pack::{Deletions, Style};
use crate::state::Entry;
use crate::{Digest, Error, Result};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Writes the archive under a temporary name, so that a reader never sees half of one.
pub(crate) struct ArchiveWriter {
    tar: tar::Builder<BufWriter<tempfile::NamedTempFile>>,
    path: PathBuf,
    written: std::collections::HashSet<Digest>,
    index: Vec<serde_json::Value>,
    /// The same images for those who read docker archives only.
    docker: Vec<serde_json::Value>,
}

impl ArchiveWriter {
    pub fn create(path: &Path) -> Result<ArchiveWriter> {
        let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = tempfile::NamedTempFile::new_in(dir).map_err(Error::io("create a file in", dir))?;
        let mut writer = ArchiveWriter {
            tar: tar::Builder::new(BufWriter::with_capacity(256 << 10, file)),
            path: path.to_owned(),
            written: Default::default(),
            index: Vec::new(),
            docker: Vec::new(),
        };
        writer.file("oci-layout", &mut &br#"{"imageLayoutVersion":"1.0.0"}"#[..], 30)?;
        Ok(writer)
    }

    fn file(&mut self, name: &str, from: &mut dyn Read, size: u64) -> Result<()> {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o644);
        header.set_mtime(0);
        header.set_size(size);
        self.tar.append_data(&mut header, name, from.take(size)).map_err(Error::io("write", &self.path))
    }

    /// Adds a blob, once.
    pub fn blob(&mut self, digest: &Digest, size: u64, from: &mut dyn Read) -> Result<()> {
        if !self.written.insert(*digest) {
            return Ok(());
        }
        self.file(&blob_name(digest), from, size)
    }

    /// Adds a manifest under `names`.
    pub fn image(&mut self, manifest: &[u8], names: &[String]) -> Result<()> {
        let digest = Digest::of(manifest);
        if let Manifest::Image { config, layers } = manifest::parse(manifest, &digest.to_string())? {
            let layers: Vec<_> = layers.iter().map(|l| blob_name(&l.digest)).collect();
            self.docker
                .push(json!({"Config": blob_name(&config.digest), "RepoTags": names, "Layers": layers}));
        }
        self.blob(&digest, manifest.len() as u64, &mut &manifest[..])?;
        let plain = json!({"mediaType": MANIFEST, "digest": digest, "size": manifest.len()});
        if names.is_empty() {
            self.index.push(plain);
            return Ok(());
        }
        for name in names {
            let tag = name.rsplit_once(':').map_or("latest", |(_, t)| t);
            let mut entry = plain.clone();
            entry["annotations"] =
                json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": tag});
            self.index.push(entry);
        }
        Ok(())
    }

    pub fn finish(mut self) -> Result<()> {
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": self.index,
        })
        .to_string();
        self.file("index.json", &mut index.as_bytes(), index.len() as u64)?;
        let docker = serde_json::Value::from(std::mem::take(&mut self.docker)).to_string();
        self.file("manifest.json", &mut docker.as_bytes(), docker.len() as u64)?;
        let io = |e: io::Error| Error::Io { what: "write", path: self.path.clone(), source: Arc::new(e) };
        let file = self.tar.into_inner().map_err(io)?.into_inner().map_err(|e| io(e.into_error()))?;
        let readable: fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        file.as_file().set_permissions(readable).map_err(io)?;
        file.as_file().sync_all().map_err(io)?;
        file.persist(&self.path).map_err(|e| io(e.error))?;
        Ok(())
    }
}

/// Where a blob lies in an OCI layout.
pub(crate) fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().name(), digest.hex())
}

/// An OCI manifest for a config and layers.
pub(crate) fn manifest_json(config: Digest, config_size: u64, layers: &[LayerBlob]) -> Vec<u8> {
    let layers: Vec<_> = layers
        .iter()
        .map(|l| json!({"mediaType": l.media_type, "digest": l.digest, "size": l.size}))
        .collect();
    json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": config,
            "size": config_size,
        },
        "layers": layers,
    })
    .to_string()
    .into_bytes()
}

pub(crate) fn export(layout: &Layout, entries: &[Entry], archive: &Path) -> Result<()> {
    let mut out = ArchiveWriter::create(archive)?;
    for entry in entries {
        let record = &entry.record;
        if record.layers.iter().all(|l| layout.content(&l.digest).exists()) {
            for layer in &record.layers {
                let path = layout.content(&layer.digest);
                let file = File::open(&path).map_err(Error::io("read", &path))?;
                out.blob(&layer.digest, layer.size, &mut BufReader::new(file))?;
            }
            let read =
                |d: &Digest| fs::read(layout.content(d)).map_err(Error::io("read", &layout.content(d)));
            let config = read(&record.id)?;
            out.blob(&record.id, config.len() as u64, &mut &config[..])?;
            out.image(&read(&record.manifest)?, &record.tags)?;
        } else {
            repack(layout, entry, record, &mut out)?;
        }
    }
    out.finish()
}

/// Makes layers from the unpacked files; the config then names the new diff ids.
fn repack(layout: &Layout, entry: &Entry, record: &ImageRecord, out: &mut ArchiveWriter) -> Result<()> {
    let style = Style { mtime: None, root_owned: false, deletions: Deletions::Whiteouts, holes: true };
    let (mut layers, mut diffs) = (Vec::new(), Vec::new());
    for chain in &record.chain {
        let temporary = layout.ingest();
        let mut file = File::create_new(&temporary.path).map_err(Error::io("create", &temporary.path))?;
        let (layer, diff) = compress(&layout.layer_fs(chain), &mut file, style)?;
        let mut file = File::open(&temporary.path).map_err(Error::io("read", &temporary.path))?;
        out.blob(&layer.digest, layer.size, &mut file)?;
        layers.push(layer);
        diffs.push(diff.to_string());
    }
    let mut config = entry.image.config.clone();
    config.rootfs_mut().set_diff_ids(diffs);
    let config = canonical_json(&config)?;
    let id = Digest::of(&config);
    out.blob(&id, config.len() as u64, &mut &config[..])?;
    out.image(&manifest_json(id, config.len() as u64, &layers), &record.tags)
}
