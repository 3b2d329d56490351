//! One layer from transferred bytes to a folder that is complete and verified. Blocking code.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use orlop_base::durable::{self, Sync};
use orlop_base::failpoint;

use crate::layout::{Ingest, LayerRecord, Layout, VERSION};
use crate::needs::Needs;
use crate::unpack::{self, Slot, Stream};
use crate::{Algorithm, Digest, Error, Result, tree};

/// A layer to fetch, with what it must turn out to be.
#[derive(Clone, Debug)]
pub(crate) struct LayerPlan {
    /// Digest of the bytes as transferred. Unknown for docker archives, which name layers by file.
    pub digest: Option<Digest>,
    /// Length as transferred; with an unknown digest not checked.
    pub size: u64,
    pub diff: Digest,
    pub chain: Digest,
    /// Chain id of the layer below.
    pub parent: Option<Digest>,
}

/// For error texts.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    pub reference: String,
    pub from: String,
}

/// An unpacked, verified layer that is not visible yet.
pub(crate) struct Unfinished {
    dir: Ingest,
    blob: Option<Ingest>,
    /// Digest and size as transferred.
    pub blob_digest: Digest,
    needs: Needs,
}

/// Unpacks `stream` and verifies it, digests included. Leaves nothing behind when it fails.
pub(crate) fn unpack_layer(
    layout: &Layout,
    plan: &LayerPlan,
    origin: &Origin,
    keep_blob: bool,
    stream: Stream,
    mut slot: Slot,
) -> Result<Unfinished> {
    let dir = layout.ingest();
    let fs_dir = dir.path.join("fs");
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(&fs_dir)
        .map_err(Error::io("create", &fs_dir))?;
    let root = tree::open(&fs_dir).map_err(Error::sys("open", &fs_dir))?;
    // The umask does not count.
    rustix::fs::fchmod(&root, rustix::fs::Mode::from(0o755))
        .map_err(Error::sys("set the mode of", &fs_dir))?;
    let blob = keep_blob.then(|| layout.ingest());
    let copy = match &blob {
        Some(b) => Some(File::create_new(&b.path).map_err(Error::io("create", &b.path))?),
        None => None,
    };
    let (used, read) = unpack::decompress_while(
        stream,
        copy,
        (plan.digest.map_or(Algorithm::Sha256, |d| d.algorithm()), plan.diff.algorithm()),
        Some(&mut slot),
        |tar| {
            let (unpacked, rest) = unpack::unpack(tar, root.as_fd())?;
            let (diff, _) = rest.finish(&AtomicBool::new(false)).map_err(unpack::Error::Read)?;
            Ok((unpacked, diff))
        },
        // A full disk is no fault of the stream.
        |result| matches!(result, Err(unpack::Error::Io { .. })),
    );
    failpoint::pass("images.unpacked").map_err(|e| Error::io("unpack", &dir.path)(io::Error::other(e)))?;
    let unpack_error = |e| Error::Unpack {
        reference: origin.reference.clone(),
        layer: plan.digest.unwrap_or(plan.diff).to_string(),
        source: Arc::new(e),
    };
    let (blob_digest, size) = match (read, &used) {
        (Ok(read), _) => read,
        (Err(_), Err(unpack::Error::Io { .. })) => {
            return Err(used.map_err(unpack_error).err().unwrap_or(Error::Cancelled));
        }
        (Err(e), _) => {
            return Err(match e.downcast::<Error>() {
                Ok(inner) => inner,
                Err(e) => unpack_error(unpack::Error::Read(e)),
            });
        }
    };
    let mismatch = |what: &str, expected: Digest, actual: Digest| Error::DigestMismatch {
        what: what.to_owned(),
        reference: origin.reference.clone(),
        origin: origin.from.clone(),
        expected: expected.to_string(),
        actual: actual.to_string(),
    };
    if let Some(expected) = plan.digest
        && expected != blob_digest
    {
        return Err(mismatch("a layer", expected, blob_digest));
    }
    let (unpacked, diff) = used.map_err(unpack_error)?;
    if diff != plan.diff {
        return Err(mismatch("an uncompressed layer", plan.diff, diff));
    }
    // A copy that could not be written in full is dropped.
    let blob = blob.filter(|b| fs::metadata(&b.path).is_ok_and(|m| m.len() == size));
    Ok(Unfinished { dir, blob, blob_digest, needs: Needs::keep(layout, unpacked)? })
}

/// Makes a layer visible, once all below it are. `lower` are their chain ids, bottom first.
pub(crate) fn commit_layer(
    layout: &Layout,
    plan: &LayerPlan,
    lower: &[Digest],
    origin: &Origin,
    layer: Unfinished,
) -> Result<LayerRecord> {
    let fs_dir = layer.dir.path.join("fs");
    let unpacked = layer.needs.take()?;
    if !(unpacked.inherit.is_empty() && unpacked.borrow.is_empty()) {
        let root = tree::open(&fs_dir).map_err(Error::sys("open", &fs_dir))?;
        // A bounded number of descriptors: images have at most a few hundred layers.
        let lower = lower
            .iter()
            .rev()
            .map(|chain| {
                let path = layout.layer_fs(chain);
                tree::open(&path).map_err(Error::sys("open", &path))
            })
            .collect::<Result<Vec<_>>>()?;
        unpack::borrow_from_lower(root.as_fd(), &lower, &unpacked).map_err(|e| Error::Unpack {
            reference: origin.reference.clone(),
            layer: layer.blob_digest.to_string(),
            source: Arc::new(e),
        })?;
    }
    let record = LayerRecord {
        chain: plan.chain,
        diff: plan.diff,
        parent: plan.parent,
        usage: unpacked.usage,
        unsynced_since: Some(crate::layout::boot_id()),
    };
    durable::write_json(&layer.dir.path.join("layer.json"), VERSION, &record, Sync::PageCache)?;
    if let Some(blob) = &layer.blob {
        let to = layout.content(&layer.blob_digest);
        fs::rename(&blob.path, &to).map_err(Error::io("create", &to))?;
    }
    failpoint::pass("images.commit").map_err(|e| Error::io("commit", &fs_dir)(io::Error::other(e)))?;
    let to = layout.layer(&plan.chain);
    fs::rename(&layer.dir.path, &to).map_err(Error::io("create", &to))?;
    Ok(record)
}

/// Puts layers on disk, and says so in their records.
pub(crate) fn settle(layout: &Layout, records: &[LayerRecord]) -> Result<()> {
    let dir = File::open(&layout.root).map_err(Error::io("open", &layout.root))?;
    rustix::fs::syncfs(&dir).map_err(Error::sys("sync", &layout.root))?;
    for record in records {
        let path = layout.layer(&record.chain);
        if !path.exists() {
            continue; // Removed meanwhile.
        }
        let record = LayerRecord { unsynced_since: None, ..record.clone() };
        // If this gets lost, the layer is fetched again.
        durable::write_json(&path.join("layer.json"), VERSION, &record, Sync::PageCache)?;
    }
    Ok(())
}
