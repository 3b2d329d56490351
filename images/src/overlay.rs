//! Mounts layers as one file system.

use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
};

/// One overlay to mount.
#[derive(Debug)]
pub(crate) struct Overlay<'a> {
    /// What the mount table calls it: the folder with its record, which tells whose it is when the record is damaged.
    pub source: &'a Path,
    /// The folder that holds all layers; `lower` is relative to it.
    pub layers: &'a Path,
    /// Topmost first. At least two, or one and `upper`.
    pub lower: Vec<PathBuf>,
    /// The writable layer and its work folder, absolute or relative to `layers`.
    pub upper: Option<(PathBuf, PathBuf)>,
    pub readonly: bool,
    pub extra: &'a [(String, String)],
    pub target: &'a Path,
}

/// Mounts with one option per layer, which has no limit on their number (Linux 6.5), else with all in one page.
pub(crate) fn mount(overlay: &Overlay<'_>) -> Result<(), String> {
    match mount_by_layer(overlay) {
        Ok(()) => Ok(()),
        Err(Step { errno: Errno::INVAL | Errno::NOSYS | Errno::PERM, too_old: true, text }) => {
            mount_in_one_page(overlay).map_err(|e| format!("{e}; by layer: {text}"))
        }
        Err(step) => Err(step.text),
    }
}

struct Step {
    errno: Errno,
    /// The kernel may not know `lowerdir+`, or have no such call at all. Before Linux 6.5 overlayfs collects all options and
    /// finds the unknown one when the file system is made.
    too_old: bool,
    text: String,
}

fn mount_by_layer(o: &Overlay<'_>) -> Result<(), Step> {
    let step = |what: &'static str, too_old| {
        move |errno: Errno| Step { errno, too_old, text: format!("{what}: {}", std::io::Error::from(errno)) }
    };
    let fs = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(step("no overlay file system", true))?;
    let why = |what, too_old| {
        let fs = &fs;
        move |errno| {
            let mut s = step(what, too_old)(errno);
            if let Some(log) = kernel_says(fs) {
                s.text = format!("{} ({log})", s.text);
            }
            s
        }
    };
    fsconfig_set_string(&fs, "source", o.source).map_err(why("source", false))?;
    for (i, lower) in o.lower.iter().enumerate() {
        fsconfig_set_string(&fs, "lowerdir+", &*o.layers.join(lower))
            .map_err(why("a lower layer", i == 0))?;
    }
    if let Some((upper, work)) = &o.upper {
        fsconfig_set_string(&fs, "upperdir", &*o.layers.join(upper))
            .map_err(why("the upper layer", false))?;
        fsconfig_set_string(&fs, "workdir", &*o.layers.join(work)).map_err(why("the work folder", false))?;
        // The writable layer dies with the container; syncing it on unmount would only cost time.
        fsconfig_set_flag(&fs, "volatile").map_err(why("volatile", false))?;
    }
    for (key, value) in o.extra {
        if value.is_empty() {
            fsconfig_set_flag(&fs, key.as_str()).map_err(why("an extra option", false))?;
        } else {
            fsconfig_set_string(&fs, key.as_str(), value.as_str()).map_err(why("an extra option", false))?;
        }
    }
    fsconfig_create(&fs).map_err(why("create", true))?;
    let attributes = if o.readonly { MountAttrFlags::MOUNT_ATTR_RDONLY } else { MountAttrFlags::empty() };
    let mount = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(why("mount", false))?;
    move_mount(&mount, "", CWD, o.target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(step("attach", false))
}

/// The messages that the kernel keeps for this file system context.
fn kernel_says(fs: &rustix::fd::OwnedFd) -> Option<String> {
    let mut out = Vec::new();
    let mut buf = [0u8; 512];
    while let Ok(n) = rustix::io::read(fs, &mut buf) {
        if n == 0 || out.len() > 2048 {
            break;
        }
        if !out.is_empty() {
            out.extend_from_slice(b"; ");
        }
        out.extend_from_slice(buf[..n].trim_ascii());
    }
    (!out.is_empty()).then(|| String::from_utf8_lossy(&out).into_owned())
}

/// An option as `mount(2)` takes it. SELinux labels may hold commas, and only they are read with quotes.
fn word(key: &str, value: &str) -> String {
    match (key, value) {
        (key, "") => key.to_owned(),
        ("context", label) => format!("context=\"{label}\""),
        (key, value) => format!("{key}={value}"),
    }
}

/// `mount(2)` takes at most a page of options, so the paths are relative to the layers' folder. The working directory
/// belongs to the whole process, hence a thread with its own.
fn mount_in_one_page(o: &Overlay<'_>) -> Result<(), String> {
    let lower: Vec<_> = o.lower.iter().map(|l| l.display().to_string()).collect();
    let mut data = format!("lowerdir={}", lower.join(":"));
    if let Some((upper, work)) = &o.upper {
        data.push_str(&format!(",upperdir={},workdir={},volatile", upper.display(), work.display()));
    }
    for (key, value) in o.extra {
        data.push(',');
        data.push_str(&word(key, value));
    }
    if data.len() >= 4096 {
        return Err(format!(
            "{} layers are too many for this kernel; Linux 6.5 or newer has no limit",
            lower.len()
        ));
    }
    let data = std::ffi::CString::new(data).map_err(|_| "an option holds a NUL byte".to_owned())?;
    let flags = if o.readonly { MountFlags::RDONLY } else { MountFlags::empty() };
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            crate::unshare::own_working_directory().map_err(|e| format!("unshare: {e}"))?;
            rustix::process::chdir(o.layers).map_err(|e| format!("{}: {e}", o.layers.display()))?;
            rustix::mount::mount(o.source, o.target, "overlay", flags, &*data)
                .map_err(|e| format!("mount: {e}"))
        });
        worker.join().unwrap_or_else(|_| Err("the mounting thread panicked".to_owned()))
    })
}

/// Whether `target` is an overlay of this store.
pub(crate) fn is_mounted(target: &Path) -> bool {
    let (Ok(here), Some(up)) =
        (rustix::fs::stat(target), target.parent().and_then(|p| rustix::fs::stat(p).ok()))
    else {
        return false;
    };
    here.st_dev != up.st_dev
}

/// Detaches everything mounted at `target`; nothing there is fine.
pub(crate) fn unmount_all(target: &Path) -> rustix::io::Result<()> {
    loop {
        match rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR) => return Ok(()),
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_in_one_page() {
        assert_eq!(word("metacopy", "off"), "metacopy=off");
        assert_eq!(word("userxattr", ""), "userxattr");
        assert_eq!(word("context", "u:r:t:s0:c1,c2"), "context=\"u:r:t:s0:c1,c2\"");
    }
}
