//! CheckpointContainer (KEP-2008): criu writes the container's processes down while they stand still, and the container goes on.
//! The archive has the files of CRI-O and containerd, so that their tools (checkpointctl) read it.
//!
//! criu is run by this server and not by the pod's monitor: nothing that it starts becomes the monitor's child, and a monitor that
//! waits for nobody stays small.

mod criu;
mod documents;
mod nftables;
mod tool;
mod work;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use orlop_proto::cri;
use tokio::task::spawn_blocking;
use tokio::time::timeout_at;

pub(crate) use work::end_left_over;

use self::tool::Tool;
use self::work::{Undo, Work};
use crate::error::{Error, Result};
use crate::runtime::Runtime;
use crate::store::{Container, ContainerPhase, Sandbox};

/// For callers that name no limit: the kubelet's own for a request.
const DEFAULT_LIMIT: Duration = Duration::from_secs(120);
/// Whatever a caller names: nothing else can be done to the container in the meantime.
const LONGEST: Duration = Duration::from_secs(3600);

/// Pure: the archive's path.
fn location(text: &str) -> Result<PathBuf> {
    let path = PathBuf::from(text);
    if !path.is_absolute() || path.file_name().is_none() || text.ends_with('/') {
        return Err(Error::Invalid(format!(
            "the location {text:?} of a checkpoint is no absolute file name"
        )));
    }
    Ok(path)
}

/// Pure: the CRI counts in seconds; zero leaves it to the runtime. At most [`LONGEST`].
fn limit(seconds: i64) -> Result<Duration> {
    match u64::try_from(seconds) {
        Ok(0) => Ok(DEFAULT_LIMIT),
        Ok(s) => Ok(Duration::from_secs(s).min(LONGEST)),
        Err(_) => Err(Error::Invalid(format!("a checkpoint cannot end within {seconds} s"))),
    }
}

/// A file that takes no more once the time is over, so that a large archive ends with its request.
struct Until<W> {
    inner: W,
    deadline: Instant,
}

impl<W: Write> Write for Until<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if Instant::now() >= self.deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A new file for the owner alone.
fn create(path: &Path, deadline: Instant) -> Result<Until<BufWriter<File>>> {
    let file = File::options().write(true).create_new(true).mode(0o600).open(path);
    let file = file.map_err(Error::io("create", path))?;
    Ok(Until { inner: BufWriter::with_capacity(256 << 10, file), deadline })
}

fn joined<T>(done: std::result::Result<T, tokio::task::JoinError>) -> Result<T> {
    done.map_err(|e| Error::Internal(format!("a checkpoint's work ended early: {e}")))
}

impl Runtime {
    pub async fn checkpoint_container(
        self: &Arc<Self>,
        request: cri::CheckpointContainerRequest,
    ) -> Result<cri::CheckpointContainerResponse> {
        let container = self.store.container(&request.container_id)?;
        let location = location(&request.location)?;
        let limit = limit(request.timeout)?;
        let sandbox = self.store.sandbox(&container.sandbox_id)?;
        let deadline = Instant::now() + limit;
        let this = self.clone();
        self.detached(async move {
            let late = || Error::CheckpointTimeout { id: container.id.clone(), seconds: limit.as_secs() };
            let held = timeout_at(deadline.into(), container.op.lock()).await;
            let _held = held.map_err(|_| late())?;
            let done = this.checkpoint(&sandbox, &container, &location, deadline).await;
            match done {
                // Whatever the last step was that could not go on.
                Err(_) if Instant::now() >= deadline => Err(late()),
                other => other.map(|()| cri::CheckpointContainerResponse {}),
            }
        })
        .await
    }

    async fn checkpoint(
        &self,
        sandbox: &Sandbox,
        container: &Container,
        location: &Path,
        deadline: Instant,
    ) -> Result<()> {
        let record = container.in_phase(&[ContainerPhase::Running], "checkpoint it")?;
        let pod = sandbox.record();
        let handler = pod.runtime_handler.as_str();
        let tool = Tool::of(self, handler, &sandbox.id)?;
        tool.check(deadline).await?;
        let bundle = self.config.bundle_dir(&sandbox.id, &container.id);
        let path = bundle.join("config.json");
        let spec_json = fs::read(&path).map_err(Error::io("read", &path))?;
        let spec: oci_spec::runtime::Spec = serde_json::from_slice(&spec_json)
            .map_err(|e| Error::Internal(format!("{} does not parse: {e}", path.display())))?;
        let group = crate::stats::cgroup::host_path(&record.cgroups_path);
        let work = Work::begin(
            &self.config.transfer_dir(),
            &container.id,
            Undo {
                freezer: crate::facts::cgroup_dir(self.facts.cgroup_v2, "freezer", &group),
                pid: record.pid,
                network: criu::pinned(&spec, oci_spec::runtime::LinuxNamespaceType::Network),
                partial: location.with_file_name(format!(".checkpoint-{}.partial", container.id)),
            },
        )
        .await?;
        let done = async {
            self.dump(container, &tool, &work, spec, deadline).await?;
            work.undo.thaw();
            let said = documents::Facts {
                spec: spec_json,
                status: self.container_status_of(container),
                container: record,
                runtime: if handler.is_empty() { crate::status::RUNTIME } else { handler }.to_owned(),
                now: jiff::Timestamp::now(),
            };
            let folder = work.archive();
            // Asks the volumes' file systems, too.
            let written = spawn_blocking(move || documents::write(&folder, &said, deadline));
            let out_of_time = |_| Error::Internal("the container's volumes cannot be looked at".into());
            joined(timeout_at(deadline.into(), written).await.map_err(out_of_time)?)??;
            archive(&work, location, deadline).await
        }
        .await;
        work.end().await;
        done?;
        tracing::info!(container = %container.id, archive = %location.display(), "wrote a checkpoint");
        Ok(())
    }

    /// Leaves the container frozen, so that memory and files belong to the same moment; the caller lets it go on.
    async fn dump(
        &self,
        container: &Container,
        tool: &Tool,
        work: &Work,
        spec: oci_spec::runtime::Spec,
        deadline: Instant,
    ) -> Result<()> {
        let pid = work.undo.pid;
        let out_of_time = |_| Error::Internal("the container's mounts cannot be looked at".into());
        // Asks file systems of the container, one of which a process of the container itself may serve.
        let looked = timeout_at(deadline.into(), spawn_blocking(move || criu::Seen::of(pid, &spec)));
        let seen = joined(looked.await.map_err(out_of_time)?)??;
        let descriptors = work.images().join("descriptors.json");
        fs::write(&descriptors, seen.descriptors()).map_err(Error::io("write", &descriptors))?;
        work.undo.freeze(deadline).await?;
        tool.run(&container.id, work, &seen, deadline).await?;
        let archive = work.archive();
        let out = create(&archive.join("rootfs-diff.tar"), deadline)?;
        let (mut out, deleted) = self.images.rootfs_changes(&container.id, out).await?;
        out.flush().map_err(Error::io("write", &archive))?;
        documents::write_deleted(&archive, &deleted)
    }
}

/// One file at `location`, in one step: a reader never sees half of it.
async fn archive(work: &Work, location: &Path, deadline: Instant) -> Result<()> {
    let (from, partial, location) = (work.archive(), work.undo.partial.clone(), location.to_owned());
    let packed = spawn_blocking(move || {
        let out = create(&partial, deadline)?;
        let mut out = orlop_images::pack_folder(&from, out)?;
        out.flush().map_err(Error::io("write", &partial))?;
        let file = out.inner.into_inner().map_err(|e| Error::io("write", &partial)(e.into_error()))?;
        file.sync_all().map_err(Error::io("write", &partial))?;
        fs::rename(&partial, &location).map_err(Error::io("create", &location))
    });
    joined(packed.await)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_checked() {
        assert!(location("/var/lib/kubelet/checkpoints/a.tar").is_ok());
        for bad in ["", "a.tar", "/", "/a/..", "/a/"] {
            assert!(location(bad).is_err(), "{bad}");
        }
        assert_eq!(limit(0).unwrap(), DEFAULT_LIMIT);
        assert_eq!(limit(3).unwrap(), Duration::from_secs(3));
        assert_eq!(limit(i64::MAX).unwrap(), LONGEST);
        assert!(limit(-1).is_err());
    }

    #[test]
    fn nothing_is_written_after_the_deadline() {
        let mut out = Until { inner: Vec::new(), deadline: Instant::now() };
        assert_eq!(out.write(b"x").unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(out.inner.is_empty());
    }
}
