//! What the store knows in memory, and how it gets it from disk. The disk is the truth; this is its index.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use orlop_base::durable::{self, Sync};

use crate::layout::{ImageRecord, LayerRecord, Layout, RootfsRecord, VERSION, boot_id, measure};
use crate::{Digest, Error, Image, Reference, Result, manifest, overlay};

#[derive(Default)]
pub(crate) struct State {
    /// By the config's digest.
    pub images: BTreeMap<Digest, Entry>,
    /// Unpacked layers by chain id.
    pub layers: HashMap<Digest, LayerRecord>,
    pub rootfs: BTreeMap<String, RootfsRecord>,
    /// Layers of pulls and imports in progress, with the number of those.
    pub pins: HashMap<Digest, usize>,
}

#[derive(Clone)]
pub(crate) struct Entry {
    pub record: ImageRecord,
    pub image: Arc<Image>,
}

impl Entry {
    pub fn new(
        record: ImageRecord,
        config: oci_spec::image::ImageConfiguration,
        sizes: u64,
        pinned: &[String],
    ) -> Entry {
        let image = Arc::new(Image {
            id: record.id.to_string(),
            repo_tags: record.tags.clone(),
            repo_digests: record.digests.clone(),
            // A layer that was here already may have any size in a later manifest.
            size: record.layers.iter().fold(sizes, |all, l| all.saturating_add(l.size)),
            pinned: record.tags.iter().chain(&record.digests).any(|n| pinned.contains(n)),
            config,
            chain: record.chain.clone(),
        });
        Entry { record, image }
    }

    /// The same image with other names.
    pub fn renamed(&self, record: ImageRecord, pinned: &[String]) -> Entry {
        let mut image = (*self.image).clone();
        image.repo_tags = record.tags.clone();
        image.repo_digests = record.digests.clone();
        image.pinned = record.tags.iter().chain(&record.digests).any(|n| pinned.contains(n));
        Entry { record, image: Arc::new(image) }
    }
}

impl State {
    /// By name, then by id, then by the id's unique beginning.
    pub fn find(&self, text: &str) -> Option<&Entry> {
        if let Some(entry) = text.parse().ok().and_then(|d: Digest| self.images.get(&d)) {
            return Some(entry);
        }
        if let Ok(r) = Reference::parse(text) {
            let wanted = r.digest.map(|d| r.with_digest(&d));
            let tagged = r.tagged();
            let hit = self.images.values().find(|e| match &wanted {
                Some(d) => e.record.digests.contains(d),
                None => tagged.as_ref().is_some_and(|t| e.record.tags.contains(t)),
            });
            if hit.is_some() {
                return hit;
            }
        }
        let (algorithm, hex) = text.split_once(':').map_or((None, text), |(a, h)| (Some(a), h));
        if hex.is_empty() || !hex.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase()) {
            return None;
        }
        let mut hits = self.images.values().filter(|e| {
            let id = e.record.id;
            algorithm.is_none_or(|a| a == id.algorithm().name()) && id.hex().starts_with(hex)
        });
        match (hits.next(), hits.next()) {
            (Some(e), None) => Some(e),
            _ => None,
        }
    }

    pub fn records(&self) -> Vec<&ImageRecord> {
        self.images.values().map(|e| &e.record).collect()
    }

    /// Chain ids that something needs.
    pub fn used_layers(&self) -> HashSet<Digest> {
        let images = self.images.values().flat_map(|e| &e.record.chain);
        let rootfs = self.rootfs.values().flat_map(|r| &r.chain);
        images.chain(rootfs).chain(self.pins.keys()).copied().collect()
    }

    /// Blobs that an image needs.
    pub fn used_blobs(&self) -> HashSet<Digest> {
        let records = self.images.values().map(|e| &e.record);
        records
            .flat_map(|r| [r.id, r.manifest].into_iter().chain(r.layers.iter().map(|l| l.digest)))
            .collect()
    }
}

/// Reads everything and takes away what a crash or power cut damaged. Blocking code.
pub(crate) fn load(layout: &Layout, pinned: &[String]) -> Result<State> {
    layout.clean()?;
    let records: Vec<ImageRecord> = durable::read_json(&layout.images_file(), VERSION)?.unwrap_or_default();
    let rootfs = load_rootfs(layout)?;
    let mut state = State { layers: load_layers(layout, &records, &rootfs)?, rootfs, ..State::default() };
    let mut dropped = false;
    for record in records {
        let id = record.id;
        match load_image(layout, &state, record, pinned) {
            Ok(entry) => {
                state.images.insert(id, entry);
            }
            Err(why) => {
                tracing::warn!(image = %id, why, "dropped a damaged image; it is pulled again when needed");
                dropped = true;
            }
        }
    }
    if dropped {
        durable::write_json(&layout.images_file(), VERSION, &state.records(), Sync::Disk)?;
    }
    Ok(state)
}

fn entries(dir: &Path) -> Result<Vec<String>> {
    fs::read_dir(dir)
        .map_err(Error::io("list", dir))?
        .map(|item| {
            item.map(|i| i.file_name().to_string_lossy().into_owned()).map_err(Error::io("list", dir))
        })
        .collect()
}

/// What is to be done about a layer without a good record.
enum Use {
    /// Nobody has it mounted.
    None,
    /// It is as good as when it was mounted in this boot, and this is its record.
    Known(Box<LayerRecord>),
    /// It is mounted, and no image tells what it is.
    Unknown,
}

fn use_of(
    layout: &Layout,
    name: &str,
    images: &[ImageRecord],
    rootfs: &BTreeMap<String, RootfsRecord>,
) -> Result<Use> {
    let mounted = rootfs.values().filter(|r| overlay::is_mounted(&r.target)).flat_map(|r| &r.chain);
    let Some(chain) = mounted.into_iter().find(|c| Layout::layer_name(c) == name).copied() else {
        return Ok(Use::None);
    };
    let files = layout.layer_fs(&chain);
    if !files.is_dir() {
        return Ok(Use::None);
    }
    let known = images.iter().find_map(|image| {
        let at = image.chain.iter().position(|c| *c == chain)?;
        let config = layout.read_content(&image.id).ok()?;
        let (_, diffs) = manifest::parse_config(&config, image.chain.len(), name).ok()?;
        Some((*diffs.get(at)?, at.checked_sub(1).map(|below| image.chain[below])))
    });
    let Some((diff, parent)) = known else { return Ok(Use::Unknown) };
    let usage = measure(&files)?;
    let record = LayerRecord { chain, diff, parent, usage, unsynced_since: Some(boot_id()) };
    Ok(Use::Known(Box::new(record)))
}

fn load_layers(
    layout: &Layout,
    images: &[ImageRecord],
    rootfs: &BTreeMap<String, RootfsRecord>,
) -> Result<HashMap<Digest, LayerRecord>> {
    let boot = boot_id();
    let mut layers = HashMap::new();
    for name in entries(&layout.layers())? {
        if name == "empty" {
            continue;
        }
        let dir = layout.layers().join(&name);
        let why = match durable::read_json::<LayerRecord>(&dir.join("layer.json"), VERSION) {
            Ok(Some(r)) if r.unsynced_since.as_ref().is_some_and(|b| *b != boot) => {
                "the machine went down before it was on disk".to_owned()
            }
            Ok(Some(r)) if Layout::layer_name(&r.chain) != name || !dir.join("fs").is_dir() => {
                "its record does not fit".to_owned()
            }
            Ok(Some(r)) => {
                layers.insert(r.chain, r);
                continue;
            }
            Ok(None) => "it has no record".to_owned(),
            // An older program does not throw away what a newer one made.
            Err(e @ durable::Error::Version { .. }) => return Err(e.into()),
            Err(e) => e.to_string(),
        };
        match use_of(layout, &name, images, rootfs)? {
            Use::Known(record) => {
                tracing::warn!(layer = name, why, "wrote the record of a layer in use anew");
                durable::write_json(&dir.join("layer.json"), VERSION, &*record, Sync::PageCache)?;
                layers.insert(record.chain, *record);
            }
            Use::Unknown => {
                tracing::warn!(layer = name, why, "a damaged layer is in use; a later start drops it");
            }
            Use::None => {
                tracing::warn!(layer = name, why, "dropped a damaged layer");
                layout.discard(&dir)?;
            }
        }
    }
    Ok(layers)
}

fn load_rootfs(layout: &Layout) -> Result<BTreeMap<String, RootfsRecord>> {
    let mut all = BTreeMap::new();
    for key in entries(&layout.root.join("rootfs"))? {
        let dir = layout.rootfs(&key);
        match durable::read_json::<RootfsRecord>(&dir.join("rootfs.json"), VERSION) {
            Ok(Some(r)) => {
                all.insert(key, r);
            }
            Err(e @ durable::Error::Version { .. }) => return Err(e.into()),
            damaged => {
                tracing::warn!(key, ?damaged, "dropped a damaged root file system");
                layout.discard(&dir)?;
            }
        }
    }
    Ok(all)
}

fn load_image(
    layout: &Layout,
    state: &State,
    record: ImageRecord,
    pinned: &[String],
) -> Result<Entry, String> {
    if let Some(missing) = record.chain.iter().find(|c| !state.layers.contains_key(c)) {
        return Err(format!("its layer {missing} is missing"));
    }
    let manifest_len = layout.read_content(&record.manifest)?.len();
    let config = layout.read_content(&record.id)?;
    let name = record.id.to_string();
    let (parsed, _) =
        manifest::parse_config(&config, record.chain.len(), &name).map_err(|e| e.to_string())?;
    Ok(Entry::new(record, parsed, (manifest_len + config.len()) as u64, pinned))
}
