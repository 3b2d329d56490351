//! The archive's files beside criu's images, in the forms that CRI-O, containerd and checkpointctl share.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use orlop_proto::cri;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::store::ContainerRecord;

/// What the files say.
pub(super) struct Facts {
    /// The container's config.json.
    pub spec: Vec<u8>,
    pub status: cri::ContainerStatus,
    pub container: Arc<ContainerRecord>,
    pub runtime: String,
    pub now: jiff::Timestamp,
}

fn time(nanoseconds: i64) -> String {
    jiff::Timestamp::from_nanosecond(nanoseconds.into()).unwrap_or_default().to_string()
}

/// `config.dump`.
fn config(f: &Facts) -> Value {
    let image = f.status.image.as_ref().map(|i| i.image.as_str()).unwrap_or_default();
    json!({
        "id": f.container.id,
        "name": f.container.metadata().name,
        "rootfsImage": image,
        "rootfsImageRef": f.status.image_ref,
        "rootfsImageName": image,
        "runtime": f.runtime,
        "createdTime": time(f.container.created_at_ns),
        "checkpointedTime": f.now.to_string(),
        // Go's zero time.
        "restoredTime": "0001-01-01T00:00:00Z",
        "restored": false,
    })
}

/// `status.dump`: the CRI's ContainerStatus as its Go form is written as JSON.
fn status_dump(s: &cri::ContainerStatus) -> Value {
    let metadata = s.metadata.clone().unwrap_or_default();
    let image = s.image.clone().unwrap_or_default();
    let mounts: Vec<Value> = s
        .mounts
        .iter()
        .map(|m| {
            json!({
                "container_path": m.container_path,
                "host_path": m.host_path,
                "readonly": m.readonly,
                "propagation": m.propagation,
            })
        })
        .collect();
    json!({
        "id": s.id,
        "metadata": {"name": metadata.name, "attempt": metadata.attempt},
        "state": s.state,
        "created_at": s.created_at,
        "started_at": s.started_at,
        "image": {"image": image.image, "user_specified_image": image.user_specified_image},
        "image_ref": s.image_ref,
        "image_id": s.image_id,
        "labels": s.labels,
        "annotations": s.annotations,
        "mounts": mounts,
        "log_path": s.log_path,
    })
}

/// `status`, which checkpointctl reads for the times of a container of neither CRI-O nor Podman.
fn status(c: &ContainerRecord) -> Value {
    json!({
        "Version": "v1",
        "Pid": c.pid,
        "CreatedAt": c.created_at_ns,
        "StartedAt": c.started_at_ns,
        "FinishedAt": c.finished_at_ns,
        "ExitCode": c.exit_code,
        "Reason": c.reason,
        "Message": c.message,
    })
}

/// `bind.mounts`: what must be there, and of what kind, before a restore.
fn bind_mounts(mounts: &[cri::Mount]) -> Value {
    let one = |m: &cri::Mount| {
        // A volume whose source has gone since, or that is an image's content.
        let meta = fs::metadata(&m.host_path).ok()?;
        Some(json!({
            "source": m.host_path,
            "destination": m.container_path,
            "file_type": if meta.is_dir() { "directory" } else { "file" },
            "permissions": meta.mode() & 0o7777,
        }))
    };
    mounts.iter().filter(|m| !m.host_path.is_empty()).filter_map(one).collect()
}

fn put(dir: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = dir.join(name);
    fs::write(&path, bytes).map_err(Error::io("write", &path))
}

/// Writes all but the images, the changed files and [`write_deleted`]'s. Blocking, and without end where a volume's server hangs.
pub(super) fn write(dir: &Path, f: &Facts, deadline: Instant) -> Result<()> {
    for (name, value) in [
        ("config.dump", config(f)),
        ("status.dump", status_dump(&f.status)),
        ("status", status(&f.container)),
        ("bind.mounts", bind_mounts(&f.container.config.mounts)),
    ] {
        put(dir, name, value.to_string().as_bytes())?;
    }
    put(dir, "spec.dump", &f.spec)?;
    let log = Path::new(&f.container.log_path);
    // The monitor follows no link there either.
    if let Ok(m) = fs::symlink_metadata(log)
        && m.is_file()
    {
        let to = dir.join("container.log");
        let mut out = super::create(&to, deadline)?;
        // The container goes on writing.
        let copied = File::open(log).and_then(|l| io::copy(&mut l.take(m.len()), &mut out));
        copied.and_then(|_| out.flush()).map_err(Error::io("copy the log to", &to))?;
    }
    Ok(())
}

/// `deleted.files`.
pub(super) fn write_deleted(dir: &Path, deleted: &[PathBuf]) -> Result<()> {
    let names: Vec<String> = deleted.iter().map(|p| p.to_string_lossy().into_owned()).collect();
    put(dir, "deleted.files", json!(names).to_string().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_rfc_3339() {
        assert_eq!(time(1_700_000_000_500_000_000), "2023-11-14T22:13:20.5Z");
    }
}
