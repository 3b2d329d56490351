//! The mounts of a container: its volumes, the managed hosts file and the termination log.

use std::collections::HashMap;
use std::path::PathBuf;

use k8s_openapi::api::core::v1::{Container, VolumeMount};
use orlop_proto::cri::{ImageSpec, Mount, MountPropagation};

use super::exec::Job;
use crate::spec::container::termination_path;
use crate::spec::env::expand;
use crate::spec::field::NodeFacts;
use crate::spec::{hosts, sandbox};
use crate::volumes::{self, Mounted, subpath};

/// Builds the list; the error text is for the container's status.
pub async fn build(
    job: &Job,
    c: &Container,
    env: &[(String, String)],
    attempt: u32,
    facts: &NodeFacts,
) -> Result<Vec<Mount>, String> {
    let values: HashMap<String, String> = env.iter().cloned().collect();
    let mut mounts = Vec::new();
    for (i, vm) in c.volume_mounts.iter().flatten().enumerate() {
        mounts.push(volume(job, c, (i, vm), &values).await?);
    }
    let has = |path: &str| mounts.iter().any(|m: &Mount| m.container_path == path);
    if !has("/etc/hosts") {
        mounts.push(hosts_file(job, facts)?);
    }
    let termination = termination_path(c).to_owned();
    if !mounts.iter().any(|m| m.container_path == termination) {
        mounts.push(termination_file(job, c, attempt, termination)?);
    }
    Ok(mounts)
}

fn propagation(vm: &VolumeMount) -> i32 {
    match vm.mount_propagation.as_deref() {
        Some("HostToContainer") => MountPropagation::PropagationHostToContainer as i32,
        Some("Bidirectional") => MountPropagation::PropagationBidirectional as i32,
        _ => MountPropagation::PropagationPrivate as i32,
    }
}

async fn volume(
    job: &Job,
    c: &Container,
    (index, vm): (usize, &VolumeMount),
    values: &HashMap<String, String>,
) -> Result<Mount, String> {
    let mounted = job
        .volumes
        .by_name
        .get(&vm.name)
        .ok_or_else(|| format!("volume {:?} is not declared by the pod", vm.name))?;
    let sub = match (&vm.sub_path, &vm.sub_path_expr) {
        (_, Some(e)) if !e.is_empty() => {
            let path = expand(e, values);
            if path.contains("$(") {
                return Err(format!("failed to expand subPathExpr of volume {:?}: {e}", vm.name));
            }
            path
        }
        (Some(s), _) => s.clone(),
        _ => String::new(),
    };
    let read_only = vm.read_only == Some(true);
    // Paths in a container are absolute for the runtime.
    let container_path = match vm.mount_path.starts_with('/') {
        true => vm.mount_path.clone(),
        false => format!("/{}", vm.mount_path),
    };
    match mounted {
        Mounted::Image { reference, .. } => Ok(Mount {
            container_path,
            readonly: true,
            image: Some(ImageSpec {
                image: reference.clone(),
                user_specified_image: reference.clone(),
                ..Default::default()
            }),
            image_sub_path: sub,
            ..Default::default()
        }),
        Mounted::Host { path, read_only: always, own } => {
            let host_path =
                if sub.is_empty() { path.clone() } else { pin(job, c, index, vm, path.clone(), sub).await? };
            let recursive = read_only && vm.recursive_read_only.as_deref().is_some_and(|r| r != "Disabled");
            Ok(Mount {
                container_path,
                host_path: host_path.to_string_lossy().into_owned(),
                readonly: read_only || *always,
                propagation: propagation(vm),
                // Where the kernel has SELinux; the node's own files keep their labels.
                selinux_relabel: *own,
                recursive_read_only: recursive && vm.recursive_read_only.as_deref() == Some("Enabled"),
                ..Default::default()
            })
        }
    }
}

async fn pin(
    job: &Job,
    c: &Container,
    index: usize,
    vm: &VolumeMount,
    volume: PathBuf,
    sub: String,
) -> Result<PathBuf, String> {
    let pin = job
        .ctx
        .config
        .pod_dir(&job.uid)
        .join("volume-subpaths")
        .join(&vm.name)
        .join(&c.name)
        .join(index.to_string());
    let at = pin.clone();
    let bound = volumes::blocking(move || subpath::bind(&volume, &sub, &at)).await;
    bound.map_err(|e| {
        format!(
            "failed to prepare subPath for volumeMount {:?} of container {:?}: {}",
            vm.name,
            c.name,
            orlop_base::telemetry::chain(&e)
        )
    })?;
    Ok(pin)
}

fn hosts_file(job: &Job, facts: &NodeFacts) -> Result<Mount, String> {
    let path = job.ctx.config.pod_dir(&job.uid).join("etc-hosts");
    let spec = job.pod.spec.as_ref();
    let aliases = spec.and_then(|s| s.host_aliases.clone()).unwrap_or_default();
    let text = if spec.and_then(|s| s.host_network) == Some(true) {
        hosts::from_node(&std::fs::read_to_string("/etc/hosts").unwrap_or_default(), &aliases)
    } else {
        let (name, domain) = sandbox::host_and_domain(&job.pod, &job.ctx.config.kubelet.cluster_domain);
        hosts::managed(&facts.pod_ips, &name, &domain, &aliases)
    };
    let fail = |e: std::io::Error| format!("cannot write {}: {e}", path.display());
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(fail)?;
    }
    // Running containers have this very file mounted, so it is written in place.
    if std::fs::read_to_string(&path).ok().as_deref() != Some(&text) {
        std::fs::write(&path, text).map_err(fail)?;
    }
    Ok(Mount {
        container_path: "/etc/hosts".into(),
        host_path: path.to_string_lossy().into_owned(),
        selinux_relabel: true,
        ..Default::default()
    })
}

fn termination_file(job: &Job, c: &Container, attempt: u32, container_path: String) -> Result<Mount, String> {
    use std::os::unix::fs::PermissionsExt;
    let dir = job.ctx.config.pod_dir(&job.uid).join("containers").join(&c.name);
    let sandbox = job.observed.ready_sandbox().map_or(0, |s| s.attempt);
    let path = dir.join(format!("{sandbox}-{attempt}"));
    let fail = |e: std::io::Error| format!("cannot write {}: {e}", path.display());
    std::fs::create_dir_all(&dir).map_err(fail)?;
    std::fs::write(&path, b"").map_err(fail)?;
    // The container's user is not known here.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).map_err(fail)?;
    let host_path = path.to_string_lossy().into_owned();
    Ok(Mount { container_path, host_path, selinux_relabel: true, ..Default::default() })
}
