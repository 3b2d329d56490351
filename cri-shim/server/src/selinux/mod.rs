//! SELinux, where the kernel has it and a policy is loaded. Containers' processes and files get labels ([`label`]); what a label may do
//! is the policy's.

pub(crate) mod label;
mod relabel;

use std::fs;
use std::path::Path;

use label::{CATEGORIES, Defaults, Labels, config_value, level, level_of};
use orlop_base::telemetry::chain;
use orlop_proto::cri;
pub(crate) use relabel::{label_file, relabel};

use crate::error::{Error, Result};
use crate::runtime::Runtime;

const FILE_SYSTEM: &str = "/sys/fs/selinux";
const CONFIG: &str = "/etc/selinux/config";
/// Wins over the policy's own.
const CONTEXTS: &str = "/usr/share/containers/selinux/contexts";

/// Whether the kernel has SELinux with a policy. Before one is loaded everything is labelled `kernel`.
pub(crate) fn is_on() -> bool {
    // Who may not look is confined by it.
    Path::new(FILE_SYSTEM).join("enforce").try_exists().unwrap_or(true)
        && fs::read("/proc/self/attr/current").is_ok_and(|label| !label.starts_with(b"kernel\0"))
}

/// What the policy's files name for containers, whether the policy has it or not.
fn named() -> Option<Defaults> {
    let of_policy = || {
        let config = fs::read_to_string(CONFIG).ok()?;
        let policy = config_value(&config, "SELINUXTYPE")?;
        fs::read_to_string(format!("/etc/selinux/{policy}/contexts/lxc_contexts")).ok()
    };
    Defaults::parse(&fs::read_to_string(CONTEXTS).ok().or_else(of_policy)?)
}

/// The policy's labels for containers. Asked anew each time: modules come and go while the server runs. Debian's policy names labels whose
/// types are in a module that its package does not have.
fn defaults() -> Option<Defaults> {
    // Only a clear no counts: whatever else goes wrong, containers without labels are not the answer.
    named().filter(|d| !d.both().iter().any(|l| matches!(check(l), Err(Error::Invalid(_)))))
}

/// Asks the kernel. Where the policy does not let this server ask, the kernel's answer comes when the label is set.
fn check(label: &str) -> Result<()> {
    let file = Path::new(FILE_SYSTEM).join("context");
    // The kernel wants all of it in one write.
    match fs::write(&file, label) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Err(Error::Invalid(format!(
            "the SELinux policy of this node does not know the label {label}; correct seLinuxOptions"
        ))),
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => Ok(()),
        other => other.map_err(Error::io("ask for a label at", &file)),
    }
}

fn check_both(labels: &Labels) -> Result<()> {
    [&labels.process, &labels.mount].into_iter().filter(|l| !l.is_empty()).try_for_each(|l| check(l))
}

/// The name under which the levels of pods are taken.
fn name_of(level: &str) -> String {
    format!("SELinux level {level}")
}

/// Gives the images' folder the label of files that all containers may read, unless it has it. A container's root file system has its
/// own label, but the kernel also asks whether it may map the files below (mprotect on overlayfs).
pub(crate) async fn label_images(dir: &Path) {
    if !is_on() {
        return;
    }
    let Some(defaults) = defaults() else {
        let named = named().map(|d| d.both().join(" and ")).unwrap_or_default();
        tracing::warn!(
            named,
            "this node's SELinux policy has no labels for containers: they run in this server's domain unless they ask for user, role and type; load a policy module for containers"
        );
        return;
    };
    let Some(label) = defaults.readonly() else { return };
    if relabel::label_of(dir).as_deref() == Some(&label) {
        return;
    }
    tracing::info!(dir = %dir.display(), label, "labelling the images' files");
    let dir = dir.to_owned();
    // There may be many.
    let done = tokio::task::spawn_blocking(move || relabel(&dir, &label)).await;
    if let Ok(Err(e)) = done {
        tracing::warn!(error = %chain(&e), "the images' files keep their SELinux label; containers may not be allowed to read them");
    }
}

impl Runtime {
    /// A level that no other pod has, reserved for `id` until its names are released.
    fn draw_level(&self, id: &str) -> Result<String> {
        // Far fewer pods run on a node than there are levels (523,776).
        for _ in 0..10_000 {
            let Some(level) = level(rand::random::<u32>() % CATEGORIES, rand::random::<u32>() % CATEGORIES)
            else {
                continue;
            };
            if self.store.names.reserve(&name_of(&level), id).is_ok() {
                return Ok(level);
            }
        }
        Err(Error::TooMany("no SELinux level is free for another pod".into()))
    }

    /// Keeps the level of a pod from being drawn for another.
    pub fn keep_level(&self, labels: &Labels, id: &str) {
        if let Some(level) = level_of(&labels.process) {
            // Several pods may have asked for the same.
            let _ = self.store.names.reserve(&name_of(level), id);
        }
    }

    /// Labels of a new pod; empty without SELinux.
    pub fn sandbox_labels(&self, config: &cri::PodSandboxConfig, id: &str) -> Result<Labels> {
        if !self.facts.selinux {
            return Ok(Labels::default());
        }
        let security = config.linux.as_ref().and_then(|l| l.security_context.as_ref());
        let asked = security.and_then(|s| s.selinux_options.as_ref());
        let labels = label::for_sandbox(defaults().as_ref(), asked, || self.draw_level(id))?;
        check_both(&labels)?;
        self.keep_level(&labels, id);
        Ok(labels)
    }

    /// Labels of a new container; empty without SELinux.
    pub fn container_labels(&self, config: &cri::ContainerConfig, pod: &Labels) -> Result<Labels> {
        if !self.facts.selinux {
            return Ok(Labels::default());
        }
        let security = crate::container::spec::security(config);
        let asked = security.selinux_options.as_ref();
        let labels = label::for_container(defaults().as_ref(), asked, pod, security.privileged)?;
        check_both(&labels)?;
        Ok(labels)
    }
}
