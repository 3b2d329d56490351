//! A folder becomes an OCI image archive; the same folder and settings give the same bytes.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use oci_spec::image::{Arch, Config, History, ImageConfiguration, Os, RootFs};

use crate::export::{ArchiveWriter, manifest_json};
use crate::layout::LayerBlob;
use crate::pack::{Deletions, Style, pack};
use crate::reference::Hasher;
use crate::{Algorithm, Digest, Error, Reference, Result, manifest};

/// What to build.
#[derive(Clone, Debug)]
pub struct Build {
    /// The folder that becomes the root file system, as one layer.
    pub rootfs: PathBuf,
    /// Name and tag that an import gives the image.
    pub name: String,
    /// Entrypoint, env, user and the rest of the run settings.
    pub config: Config,
    /// Seconds since the epoch, for the image and every file in it.
    pub created: u64,
    /// All files belong to root, whoever owns the folder.
    pub root_owned: bool,
}

/// Builds an image into the OCI layout archive `out`. Returns its id. Blocking code.
pub fn build(spec: &Build, out: &Path) -> Result<String> {
    let reference = Reference::parse(&spec.name)?;
    let name = reference.tagged().ok_or_else(|| Error::Reference {
        text: spec.name.clone(),
        why: "a built image needs a name with a tag",
    })?;
    if !spec.rootfs.is_dir() {
        return Err(Error::Io {
            what: "read the folder",
            path: spec.rootfs.clone(),
            source: std::sync::Arc::new(std::io::ErrorKind::NotADirectory.into()),
        });
    }
    let dir = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut layer_file = tempfile::NamedTempFile::new_in(dir).map_err(Error::io("create a file in", dir))?;
    let style = Style {
        mtime: Some(spec.created),
        root_owned: spec.root_owned,
        deletions: Deletions::None,
        holes: false,
    };
    let (layer, diff) = compress(&spec.rootfs, layer_file.as_file_mut(), style)?;
    let created = timestamp(spec.created);
    let mut rootfs = RootFs::default();
    rootfs.set_diff_ids(vec![diff.to_string()]);
    rootfs.set_typ("layers".to_owned());
    let mut history = History::default();
    history.set_created(Some(created.clone()));
    history.set_created_by(Some("orlop image build".to_owned()));
    let mut config = ImageConfiguration::default();
    config.set_created(Some(created));
    config.set_architecture(Arch::from(manifest::host_architecture()));
    config.set_os(Os::Linux);
    config.set_config(Some(spec.config.clone()));
    config.set_rootfs(rootfs);
    config.set_history(Some(vec![history]));
    let config = canonical_json(&config)?;
    let id = Digest::of(&config);
    let manifest = manifest_json(id, config.len() as u64, std::slice::from_ref(&layer));
    let mut archive = ArchiveWriter::create(out)?;
    archive.blob(
        &layer.digest,
        layer.size,
        &mut File::open(layer_file.path()).map_err(Error::io("read", layer_file.path()))?,
    )?;
    archive.blob(&id, config.len() as u64, &mut &config[..])?;
    archive.image(&manifest, &[name])?;
    archive.finish()?;
    Ok(id.to_string())
}

/// Maps have no order of their own in memory; a sorted document has the same bytes every time.
pub(crate) fn canonical_json(config: &ImageConfiguration) -> Result<Vec<u8>> {
    let bad = |e: serde_json::Error| Error::Malformed {
        what: "the image config".into(),
        reference: "this build".into(),
        why: e.to_string(),
    };
    let value = serde_json::to_value(config).map_err(bad)?;
    serde_json::to_vec(&value).map_err(bad)
}

fn timestamp(seconds: u64) -> String {
    i64::try_from(seconds)
        .ok()
        .and_then(|s| jiff::Timestamp::from_second(s).ok())
        .unwrap_or(jiff::Timestamp::UNIX_EPOCH)
        .to_string()
}

/// Packs `dir` as a gzip layer into `out`; gives its description and diff id.
pub(crate) fn compress(dir: &Path, out: &mut File, style: Style) -> Result<(LayerBlob, Digest)> {
    let hashed = HashedWriter::new(BufWriter::with_capacity(256 << 10, out));
    let gzip = flate2::GzBuilder::new().mtime(0).write(hashed, flate2::Compression::new(6));
    let tar = pack(dir, HashedWriter::new(gzip), style)?;
    let (gzip, diff, _) = tar.finish();
    let (mut file, digest, size) = gzip.finish().map_err(Error::io("pack", dir))?.finish();
    file.flush().map_err(Error::io("pack", dir))?;
    let media_type = "application/vnd.oci.image.layer.v1.tar+gzip".to_owned();
    Ok((LayerBlob { digest, size, media_type }, diff))
}

struct HashedWriter<W> {
    inner: W,
    hasher: Hasher,
    count: u64,
}

impl<W> HashedWriter<W> {
    fn new(inner: W) -> Self {
        HashedWriter { inner, hasher: Algorithm::Sha256.hasher(), count: 0 }
    }

    fn finish(self) -> (W, Digest, u64) {
        (self.inner, self.hasher.finish(), self.count)
    }
}

impl<W: Write> Write for HashedWriter<W> {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        let n = self.inner.write(buf)?;
        self.hasher.update(&buf[..n]);
        self.count += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}
