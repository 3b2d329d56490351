//! Images from OCI layouts and docker archives.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use serde::Deserialize;
use tokio::sync::mpsc;

use crate::export::blob_name;
use crate::ingest::{LayerPlan, Origin};
use crate::layout::{ImageRecord, Ingest, LayerBlob};
use crate::manifest::{self, Descriptor, Manifest};
use crate::pull::{fetch_layers, finish};
use crate::store::{Inner, blocking};
use crate::unpack::{Frames, TarReader};
use crate::{Digest, Error, Image, Reference, Result};

/// The largest document (index, manifest, config) of an archive.
const MAX_DOCUMENT: u64 = 8 << 20;
const CHUNK: usize = 256 << 10;
/// The most entries of an archive, the longest name in it, and the most bytes of all names.
const MAX_ENTRIES: usize = 100_000;
const MAX_NAME: usize = 4096;
const MAX_NAMES: usize = 16 << 20;

/// Files of an archive by name.
enum Source {
    Dir(PathBuf),
    /// Offset and length of each file in an uncompressed tar.
    Tar {
        file: PathBuf,
        index: HashMap<String, (u64, u64)>,
        _unpacked: Option<Ingest>,
    },
}

impl Source {
    /// Opens one file, at its start; with its length.
    fn open(&self, name: &str) -> std::io::Result<(File, u64)> {
        match self {
            Source::Dir(dir) => {
                let path = fs::canonicalize(dir.join(name))?;
                // What the folder's documents name must lie in it, whichever way it is named.
                if !path.starts_with(fs::canonicalize(dir)?) {
                    return Err(std::io::Error::other("it leads out of the folder"));
                }
                let file = File::open(path)?;
                let len = file.metadata()?.len();
                Ok((file, len))
            }
            Source::Tar { file, index, .. } => {
                let (offset, len) = index.get(name).ok_or(std::io::ErrorKind::NotFound)?;
                let mut file = File::open(file)?;
                file.seek(SeekFrom::Start(*offset))?;
                Ok((file, *len))
            }
        }
    }

    fn has(&self, name: &str) -> bool {
        match self {
            Source::Dir(dir) => dir.join(name).is_file(),
            Source::Tar { index, .. } => index.contains_key(name),
        }
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, String> {
        let (file, len) = self.open(name).map_err(|e| format!("{name}: {e}"))?;
        if len > MAX_DOCUMENT {
            return Err(format!("{name} is larger than {MAX_DOCUMENT} bytes"));
        }
        let mut out = Vec::with_capacity(len as usize);
        file.take(len).read_to_end(&mut out).map_err(|e| format!("{name}: {e}"))?;
        Ok(out)
    }

    fn document(&self, digest: &Digest) -> Result<Vec<u8>, String> {
        let bytes = self.read(&blob_name(digest))?;
        let actual = digest.same_of(&bytes);
        if actual != *digest {
            return Err(format!("the blob {digest} has digest {actual}; the archive is damaged"));
        }
        Ok(bytes)
    }

    /// Sends a file's bytes, then an empty chunk. Blocking code.
    fn send(&self, name: &str, to: &mpsc::Sender<Result<Bytes>>) {
        let result = self.open(name).and_then(|(file, mut left)| {
            let mut file = file;
            while left > 0 {
                let mut chunk = vec![0; CHUNK.min(left as usize)];
                file.read_exact(&mut chunk)?;
                left -= chunk.len() as u64;
                if to.blocking_send(Ok(chunk.into())).is_err() {
                    return Ok(());
                }
            }
            let _ = to.blocking_send(Ok(Bytes::new()));
            Ok(())
        });
        if let Err(e) = result {
            let (Source::Dir(archive) | Source::Tar { file: archive, .. }) = self;
            let (archive, why) = (archive.clone(), format!("{name}: {e}"));
            let _ = to.blocking_send(Err(Error::Archive { archive, why }));
        }
    }
}

/// One image of an archive.
struct Found {
    tags: Vec<String>,
    manifest: Vec<u8>,
    config: Vec<u8>,
    /// Digest of `config`.
    id: Digest,
    layers: Vec<LayerBlob>,
    /// Names of the layers' files.
    files: Vec<String>,
    /// The digests in `layers` are those of the files.
    digests_known: bool,
}

pub(crate) async fn import(
    inner: &Arc<Inner>,
    archive: &Path,
    name: Option<&str>,
) -> Result<Vec<Arc<Image>>> {
    let name = name.map(Reference::parse).transpose()?;
    let (source, found) = {
        let (inner, archive) = (inner.clone(), archive.to_owned());
        blocking(move || {
            let source = open(&inner, &archive)?;
            let found = find(&source, name.as_ref()).map_err(|why| Error::Archive { archive, why })?;
            Ok((Arc::new(source), found))
        })
        .await?
    };
    let images = async {
        let mut images = Vec::new();
        for image in found {
            images.push(import_one(inner, archive, &source, image).await?);
        }
        Ok(images)
    };
    let images = images.await;
    // An archive that was decompressed is a large file to delete.
    blocking(move || {
        drop(source);
        Ok(())
    })
    .await?;
    images
}

async fn import_one(
    inner: &Arc<Inner>,
    archive: &Path,
    source: &Arc<Source>,
    found: Found,
) -> Result<Arc<Image>> {
    let text = found.tags.first().cloned().unwrap_or_else(|| archive.display().to_string());
    let (config, diffs) = manifest::parse_config(&found.config, found.layers.len(), &text)?;
    let chain = manifest::chain_ids(&diffs);
    let id = found.id;
    let pins = inner.pin(&[&chain[..], &[id]].concat());
    let mut plans = manifest::plan(&found.layers, &diffs, &chain);
    if !found.digests_known {
        plans.iter_mut().for_each(|p| p.digest = None);
    }
    let origin = Origin { reference: text, from: archive.display().to_string() };
    let files: HashMap<Digest, String> = plans.iter().map(|p| p.chain).zip(found.files).collect();
    fetch_layers(inner, plans, &origin, |plan: LayerPlan, to| {
        let (source, name) = (source.clone(), files.get(&plan.chain).cloned());
        async move {
            // A panic there shows as a stream that ends early.
            let _ = tokio::task::spawn_blocking(move || {
                if let Some(name) = name {
                    source.send(&name, &to);
                }
            })
            .await;
        }
    })
    .await?;
    let digests = found
        .tags
        .iter()
        .filter_map(|t| Reference::parse(t).ok())
        .filter(|_| found.digests_known)
        .map(|r| r.with_digest(&Digest::of(&found.manifest)))
        .collect();
    let record = ImageRecord {
        id,
        tags: found.tags,
        digests,
        manifest: Digest::of(&found.manifest),
        layers: found.layers,
        chain,
    };
    finish(inner, record, config, &found.manifest, &found.config, pins).await
}

fn open(inner: &Inner, archive: &Path) -> Result<Source> {
    let meta = fs::metadata(archive).map_err(Error::io("read", archive))?;
    if meta.is_dir() {
        return Ok(Source::Dir(archive.to_owned()));
    }
    let mut head = Vec::new();
    let file = File::open(archive).map_err(Error::io("read", archive))?;
    file.take(4).read_to_end(&mut head).map_err(Error::io("read", archive))?;
    let file = File::open(archive).map_err(Error::io("read", archive))?;
    let mut unpacked = None;
    let mut path = archive.to_owned();
    let mut plain: Option<Box<dyn Read>> = None;
    if head.starts_with(&[0x1f, 0x8b]) {
        plain = Some(Box::new(flate2::read::MultiGzDecoder::new(file)));
    } else if head == [0x28, 0xb5, 0x2f, 0xfd] {
        let buffered = BufReader::with_capacity(CHUNK, file);
        plain = Some(Box::new(Frames::new(buffered, None).map_err(Error::io("read", archive))?));
    }
    if let Some(mut plain) = plain {
        // Layers are read in any order, several at a time.
        let temporary = inner.layout.ingest();
        let mut out = File::create_new(&temporary.path).map_err(Error::io("create", &temporary.path))?;
        std::io::copy(&mut plain, &mut out).map_err(|e| match e.raw_os_error() {
            // Of the disk, not of the data.
            Some(_) => Error::io("decompress", archive)(e),
            None => Error::Archive { archive: archive.to_owned(), why: e.to_string() },
        })?;
        path.clone_from(&temporary.path);
        unpacked = Some(temporary);
    }
    let index = index_tar(&path).map_err(|why| Error::Archive { archive: archive.to_owned(), why })?;
    Ok(Source::Tar { file: path, index, _unpacked: unpacked })
}

fn index_tar(path: &Path) -> Result<HashMap<String, (u64, u64)>, String> {
    use crate::unpack::Kind;
    let file = File::open(path).map_err(|e| e.to_string())?;
    let mut tar = TarReader::new(BufReader::with_capacity(CHUNK, file));
    let mut index = HashMap::new();
    let mut links: Vec<(String, String)> = Vec::new();
    let (mut entries, mut names) = (0, 0);
    while let Some(entry) = tar.next().map_err(|e| e.to_string())? {
        entries += 1;
        names += entry.path.len() + entry.link.len();
        if entries > MAX_ENTRIES || names > MAX_NAMES {
            return Err("it has too many files".into());
        }
        if entry.path.len() > MAX_NAME {
            return Err(format!("a name in it is longer than {MAX_NAME} bytes"));
        }
        let name = |bytes: &[u8]| {
            let text = String::from_utf8_lossy(bytes);
            text.trim_start_matches("./").trim_start_matches('/').to_owned()
        };
        let path = name(&entry.path);
        match entry.kind {
            Kind::File if entry.pieces.is_none() => {
                index.insert(path, tar.data_position());
            }
            Kind::HardLink => links.push((path, name(&entry.link))),
            // Old `docker save` links a repeated layer to the first: `../<id>/layer.tar`.
            Kind::Symlink => {
                let target = name(entry.link.strip_prefix(b"../").unwrap_or(&entry.link));
                links.push((path, target));
            }
            _ => {}
        }
    }
    for (path, target) in links {
        if let Some(&at) = index.get(&target) {
            index.insert(path, at);
        }
    }
    Ok(index)
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerEntry {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

fn find(source: &Source, name: Option<&Reference>) -> Result<Vec<Found>, String> {
    let found = if source.has("index.json") {
        find_oci(source, name)?
    } else if source.has("manifest.json") {
        find_docker(source, name)?
    } else {
        return Err("it has neither index.json nor manifest.json".into());
    };
    if found.is_empty() {
        return Err("it holds no image".into());
    }
    Ok(found)
}

fn find_oci(source: &Source, name: Option<&Reference>) -> Result<Vec<Found>, String> {
    let index: Index =
        serde_json::from_slice(&source.read("index.json")?).map_err(|e| format!("index.json: {e}"))?;
    let docker_tags = docker_tags(source);
    let tags_of = |entry: &Descriptor, config: Digest| match oci_name(entry, name) {
        Some(t) => vec![t],
        None => docker_tags.get(&config).cloned().unwrap_or_default(),
    };
    let mut images: Vec<Found> = Vec::new();
    // Places in `images`, by the digests of entries and of manifests.
    let mut by_entry: HashMap<Digest, (usize, Digest)> = HashMap::new();
    let mut by_manifest: HashMap<Digest, usize> = HashMap::new();
    for entry in index.manifests {
        if let Some(&(at, config)) = by_entry.get(&entry.digest) {
            images[at].tags.extend(tags_of(&entry, config));
            continue;
        }
        let mut bytes = source.document(&entry.digest)?;
        let mut image = None;
        for _ in 0..3 {
            match manifest::parse(&bytes, &entry.digest.to_string()).map_err(|e| e.to_string())? {
                Manifest::Image { config, layers } => {
                    image = Some((config, layers));
                    break;
                }
                Manifest::Index(entries) => {
                    let chosen =
                        manifest::select(&entries, &entry.digest.to_string()).map_err(|e| e.to_string())?;
                    bytes = source.document(&chosen.digest)?;
                }
            }
        }
        let (config, layers) = image.ok_or("its index is nested too deeply")?;
        let tags = tags_of(&entry, config.digest);
        let at = *by_manifest.entry(Digest::of(&bytes)).or_insert(images.len());
        by_entry.insert(entry.digest, (at, config.digest));
        if let Some(same) = images.get_mut(at) {
            same.tags.extend(tags);
            continue;
        }
        images.push(Found {
            tags,
            config: source.document(&config.digest)?,
            id: config.digest,
            files: layers.iter().map(|l| blob_name(&l.digest)).collect(),
            manifest: bytes,
            layers,
            digests_known: true,
        });
    }
    // One image that nothing names gets the caller's name.
    if let ([one], Some(name)) = (&mut images[..], name)
        && one.tags.is_empty()
    {
        one.tags.extend(name.tagged());
    }
    Ok(images)
}

/// containerd's annotation is a whole reference; the specification's may be that, or only a tag.
fn oci_name(entry: &Descriptor, name: Option<&Reference>) -> Option<String> {
    let full = |text: &str| Reference::parse(text).ok().and_then(|r| r.tagged());
    if let Some(text) = entry.annotations.get("io.containerd.image.name") {
        return full(text);
    }
    let text = entry.annotations.get("org.opencontainers.image.ref.name")?;
    if text.contains(['/', ':']) {
        return full(text);
    }
    let name = name?;
    Reference::parse(&format!("{}:{text}", name.name())).ok()?;
    // The caller's own tag counts when it gave one other than the default.
    match name.tag.as_deref() {
        Some(tag) if tag != "latest" => name.tagged(),
        _ => Some(format!("{}:{text}", name.name())),
    }
}

/// Archives of current docker are both kinds at once; their names stand in the docker part.
fn docker_tags(source: &Source) -> HashMap<Digest, Vec<String>> {
    let Ok(bytes) = source.read("manifest.json") else { return HashMap::new() };
    let entries: Vec<DockerEntry> = serde_json::from_slice(&bytes).unwrap_or_default();
    entries
        .into_iter()
        .filter_map(|e| {
            let digest = Digest::of(&source.read(&e.config).ok()?);
            let tags = e.repo_tags.unwrap_or_default();
            Some((digest, tags.iter().filter_map(|t| Reference::parse(t).ok()?.tagged()).collect()))
        })
        .collect()
}

fn find_docker(source: &Source, name: Option<&Reference>) -> Result<Vec<Found>, String> {
    let entries: Vec<DockerEntry> =
        serde_json::from_slice(&source.read("manifest.json")?).map_err(|e| format!("manifest.json: {e}"))?;
    let single = entries.len() == 1;
    let mut images = Vec::new();
    for entry in entries {
        let config = source.read(&entry.config)?;
        let (_, diffs) =
            manifest::parse_config(&config, entry.layers.len(), &entry.config).map_err(|e| e.to_string())?;
        let mut layers = Vec::new();
        for (file, diff) in entry.layers.iter().zip(&diffs) {
            let (_, size) = source.open(file).map_err(|e| format!("{file}: {e}"))?;
            // Plain tar: as transferred and unpacked are the same. A compressed one is told by its diff id alone.
            let media_type = "application/vnd.oci.image.layer.v1.tar".to_owned();
            layers.push(LayerBlob { digest: *diff, size, media_type });
        }
        let mut tags: Vec<String> = entry
            .repo_tags
            .unwrap_or_default()
            .iter()
            .filter_map(|t| Reference::parse(t).ok()?.tagged())
            .collect();
        if let (true, true, Some(name)) = (tags.is_empty(), single, name) {
            tags.extend(name.tagged());
        }
        let id = Digest::of(&config);
        let manifest = crate::export::manifest_json(id, config.len() as u64, &layers);
        images.push(Found { tags, manifest, config, id, layers, files: entry.layers, digests_known: false });
    }
    Ok(images)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(add: impl FnOnce(&mut tar::Builder<Vec<u8>>)) -> tempfile::NamedTempFile {
        let mut tar = tar::Builder::new(Vec::new());
        add(&mut tar);
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), tar.into_inner().unwrap()).unwrap();
        file
    }

    fn link(tar: &mut tar::Builder<Vec<u8>>, name: &str) {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        tar.append_link(&mut header, name, "x").unwrap();
    }

    #[test]
    fn an_archive_of_links_alone_has_an_end() {
        let file = archive(|tar| (0..=MAX_ENTRIES).for_each(|n| link(tar, &n.to_string())));
        assert_eq!(index_tar(file.path()).unwrap_err(), "it has too many files");
        let long = "n".repeat(MAX_NAME);
        let file = archive(|tar| (0..=MAX_NAMES / MAX_NAME).for_each(|_| link(tar, &long)));
        assert_eq!(index_tar(file.path()).unwrap_err(), "it has too many files");
        let file = archive(|tar| link(tar, &format!("{long}n")));
        assert!(index_tar(file.path()).unwrap_err().contains("longer than 4096"));
        let file = archive(|tar| link(tar, &long));
        assert!(index_tar(file.path()).unwrap().is_empty());
    }
}
