//! What the store knows in memory, and how it gets it from disk. The disk is the truth; this is its index.

use std::cell::OnceCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use orlop_base::durable::{self, Sync};

use crate::layout::{
    ImageRecord, LayerRecord, Layout, ROOTFS_RECORD, RootfsRecord, VERSION, boot_id, keep_damaged, measure,
};
use crate::mounts::{self, Mounted};
use crate::snapshot::check_key;
use crate::{Digest, Error, Image, Reference, Result, manifest, overlay};

/// Before the name of a layer that runs somewhere, but is of no use for anything new: nobody knows what it is.
const KEPT: &str = "kept-";
/// The image of a root file system whose record is gone.
const UNKNOWN: &str = "unknown";

#[derive(Default)]
pub(crate) struct State {
    /// By the config's digest.
    pub images: BTreeMap<Digest, Entry>,
    /// Unpacked layers by chain id.
    pub layers: HashMap<Digest, LayerRecord>,
    pub rootfs: BTreeMap<String, RootfsRecord>,
    /// Layers of pulls and imports in progress, with the number of those.
    pub pins: HashMap<Digest, usize>,
    /// When the last of those ended.
    pub released: HashMap<Digest, Instant>,
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
    let records = load_records(layout)?;
    let witness = Witness { layout, images: &records, table: OnceCell::new() };
    let rootfs = load_rootfs(&witness)?;
    let layers = load_layers(&witness, &rootfs)?;
    let mut state = State { layers, rootfs, ..State::default() };
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
        layout.write_images(&state.records())?;
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

/// A file's data, or what is wrong with it. One that a newer program made is an error: it must not be thrown away.
fn read<T: serde::de::DeserializeOwned>(file: &Path) -> Result<Result<T, String>> {
    Ok(match durable::read_json(file, VERSION) {
        Ok(Some(data)) => Ok(data),
        Ok(None) => Err("it is missing".to_owned()),
        Err(e @ durable::Error::Version { .. }) => return Err(e.into()),
        Err(durable::Error::Json { source, .. }) => Err(format!("it is damaged: {source}")),
        Err(durable::Error::Io { source, .. }) => Err(format!("it cannot be read: {source}")),
        Err(e) => Err(e.to_string()),
    })
}

/// The images as they were written last.
fn load_records(layout: &Layout) -> Result<Vec<ImageRecord>> {
    let file = layout.images_file();
    let why = match read(&file)? {
        Ok(records) => return Ok(records),
        Err(why) => why,
    };
    let copy = read::<Vec<ImageRecord>>(&layout.images_copy())?.ok();
    let kept = keep_damaged(&file)?;
    match &copy {
        Some(all) => {
            tracing::warn!(file = %file.display(), why, ?kept, images = all.len(), "took the list of images from its copy");
        }
        // Otherwise the store is new.
        None if kept.is_some() => {
            tracing::warn!(file = %file.display(), why, ?kept, "the list of images is lost; they are pulled again when needed");
        }
        None => {}
    }
    if copy.is_none() {
        // It may be in the way.
        keep_damaged(&layout.images_copy())?;
    }
    if copy.is_some() || kept.is_some() {
        layout.write_images(copy.as_deref().unwrap_or_default())?;
    }
    Ok(copy.unwrap_or_default())
}

/// What else tells of root file systems and layers than their own records.
struct Witness<'a> {
    layout: &'a Layout,
    images: &'a [ImageRecord],
    table: OnceCell<Vec<Mounted>>,
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

impl Witness<'_> {
    /// Overlays in the mount table, which is looked at only when something is damaged.
    fn table(&self) -> Result<&[Mounted]> {
        if let Some(table) = self.table.get() {
            return Ok(table);
        }
        let table = mounts::overlays(&self.layout.root)?;
        Ok(self.table.get_or_init(|| table))
    }

    /// The chain id of the layer that has this folder's name.
    fn chain_id(&self, name: &str) -> Option<Digest> {
        let chains = self.images.iter().flat_map(|i| &i.chain);
        let own = || {
            let record = read::<LayerRecord>(&self.layout.layers().join(name).join("layer.json")).ok()?;
            record.ok().map(|r| r.chain)
        };
        chains.copied().find(|c| Layout::layer_name(c) == name).or_else(own)
    }

    fn use_of(&self, name: &str, rootfs: &BTreeMap<String, RootfsRecord>) -> Result<Use> {
        let plain = name.strip_prefix(KEPT).unwrap_or(name);
        let mounted = rootfs.values().filter(|r| overlay::is_mounted(&r.target)).flat_map(|r| &r.chain);
        let chain = mounted.into_iter().find(|c| Layout::layer_name(c) == plain).copied();
        let files = self.layout.layers().join(name).join("fs");
        let in_use = chain.is_some() || self.table()?.iter().any(|m| m.layers.iter().any(|l| l == plain));
        if !in_use || !files.is_dir() {
            return Ok(Use::None);
        }
        let known = self.images.iter().find_map(|image| {
            let at = image.chain.iter().position(|c| Layout::layer_name(c) == name)?;
            let config = self.layout.read_content(&image.id).ok()?;
            let (_, diffs) = manifest::parse_config(&config, image.chain.len(), name).ok()?;
            let parent = at.checked_sub(1).map(|below| image.chain[below]);
            Some((image.chain[at], *diffs.get(at)?, parent))
        });
        let Some((chain, diff, parent)) = known else { return Ok(Use::Unknown) };
        let usage = measure(&files)?;
        let record = LayerRecord { chain, diff, parent, usage, unsynced_since: Some(boot_id()) };
        Ok(Use::Known(Box::new(record)))
    }

    /// What can be known of the root file system `key` without its record; `None` when there is nothing to lose.
    fn rootfs(&self, key: &str) -> Result<Option<RootfsRecord>> {
        let dir = self.layout.rootfs(key);
        let upper = dir.join("upper").is_dir();
        let mount = self.table()?.iter().find(|m| m.is_of(&dir));
        if mount.is_none() && !upper {
            return Ok(None);
        }
        let chain: Vec<Digest> =
            mount.iter().flat_map(|m| &m.layers).filter_map(|name| self.chain_id(name)).collect();
        let image = self.images.iter().find(|i| !chain.is_empty() && i.chain == chain);
        Ok(Some(RootfsRecord {
            image: image.map_or_else(|| UNKNOWN.to_owned(), |i| i.id.to_string()),
            chain,
            target: mount.map_or_else(PathBuf::new, |m| m.target.clone()),
            readonly: mount.map_or(!upper, |m| m.readonly),
            mount_points: mount.is_some_and(|m| m.mount_points),
            extra: Vec::new(),
            user_namespace: None,
            owners_changed: mount.is_some_and(|m| m.metacopy),
        }))
    }
}

fn load_layers(
    witness: &Witness<'_>,
    rootfs: &BTreeMap<String, RootfsRecord>,
) -> Result<HashMap<Digest, LayerRecord>> {
    let layout = witness.layout;
    let boot = boot_id();
    let mut layers = HashMap::new();
    for name in entries(&layout.layers())? {
        if name == "empty" {
            continue;
        }
        let dir = layout.layers().join(&name);
        let file = dir.join("layer.json");
        let why = match read::<LayerRecord>(&file)? {
            Ok(r) if r.unsynced_since.as_ref().is_some_and(|b| *b != boot) => {
                "the machine went down before it was on disk".to_owned()
            }
            Ok(r) if Layout::layer_name(&r.chain) != name || !dir.join("fs").is_dir() => {
                "its record does not fit".to_owned()
            }
            Ok(r) => {
                layers.insert(r.chain, r);
                continue;
            }
            Err(why) => why,
        };
        match witness.use_of(&name, rootfs)? {
            Use::Known(record) => {
                let kept = keep_damaged(&file)?;
                tracing::warn!(layer = name, why, ?kept, "wrote the record of a layer in use anew");
                durable::write_json(&file, VERSION, &*record, Sync::PageCache)?;
                layers.insert(record.chain, *record);
            }
            Use::Unknown => {
                tracing::warn!(layer = name, why, "a damaged layer is in use; a later start drops it");
                if !name.starts_with(KEPT) {
                    // Its name must be free for the same layer when that is pulled again. What is mounted goes along.
                    let to = layout.layers().join(format!("{KEPT}{name}"));
                    fs::rename(&dir, &to).map_err(Error::io("rename", &dir))?;
                }
            }
            Use::None => {
                tracing::warn!(layer = name, why, "dropped a damaged layer");
                layout.discard(&dir)?;
            }
        }
    }
    Ok(layers)
}

/// A container may be running on what a damaged record was about: only its owner, who asks for it to be removed, knows that it is not
/// needed.
fn load_rootfs(witness: &Witness<'_>) -> Result<BTreeMap<String, RootfsRecord>> {
    let layout = witness.layout;
    let mut all = BTreeMap::new();
    for key in entries(&layout.root.join("rootfs"))? {
        let dir = layout.rootfs(&key);
        let file = dir.join(ROOTFS_RECORD);
        let why = match read(&file)? {
            Ok(record) => {
                all.insert(key, record);
                continue;
            }
            Err(why) => why,
        };
        // Nobody could ask for the removal of what has no proper name.
        let known = if check_key(&key).is_ok() { witness.rootfs(&key)? } else { None };
        let Some(record) = known else {
            tracing::warn!(key, why, "dropped a damaged root file system");
            layout.discard(&dir)?;
            continue;
        };
        let kept = keep_damaged(&file)?;
        let (target, image) = (record.target.display(), &record.image);
        tracing::warn!(key, why, ?kept, %target, image, "wrote the record of a root file system anew");
        durable::write_json(&file, VERSION, &record, Sync::PageCache)?;
        all.insert(key, record);
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
