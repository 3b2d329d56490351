//! The container's mounts. Every path below its root is looked up by the kernel within that root (openat2), so that no link of the
//! image leads out of it, and is used by descriptor from then on, so that nobody can exchange it in between
//! (CVE-2025-31133, CVE-2025-52565, CVE-2025-52881).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, StatxFlags, XattrFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
};

use super::Failure;
use super::plan::{Mount, Propagation, Source};
use crate::sys;

const PROC_SUPER_MAGIC: i64 = 0x9fa0;
/// Where something may be mounted on the container's /proc: single files that tools such as lxcfs replace.
const ALLOWED_ON_PROC: [&str; 11] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/net/dev",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
];

/// The container's root folder.
pub(super) struct Root(pub OwnedFd);

const PLACE: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

impl Root {
    /// Every path of a plan is absolute and clean.
    fn below(at: &Path) -> &Path {
        match at.strip_prefix("/") {
            Ok(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        }
    }

    pub(super) fn find(&self, at: &Path) -> rustix::io::Result<OwnedFd> {
        self.find_with(at, PLACE, ResolveFlags::empty())
    }

    fn find_with(&self, at: &Path, how: OFlags, more: ResolveFlags) -> rustix::io::Result<OwnedFd> {
        let within = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | more;
        loop {
            // A rename elsewhere on the machine may disturb the walk.
            match rustix::fs::openat2(&self.0, Self::below(at), how, Mode::empty(), within) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return other,
            }
        }
    }

    /// The folder, made with those above it where they are missing.
    pub(super) fn folder(&self, at: &Path) -> rustix::io::Result<OwnedFd> {
        match self.find_with(at, PLACE | OFlags::DIRECTORY, ResolveFlags::empty()) {
            Err(Errno::NOENT) => {}
            other => return other,
        }
        let (Some(above), Some(name)) = (at.parent(), at.file_name()) else { return Err(Errno::NOENT) };
        let above = self.folder(above)?;
        match rustix::fs::mkdirat(&above, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(e),
        }
        self.find_with(at, PLACE | OFlags::DIRECTORY, ResolveFlags::empty())
    }

    /// The file, made where it is missing.
    pub(super) fn file(&self, at: &Path) -> rustix::io::Result<OwnedFd> {
        match self.find(at) {
            Err(Errno::NOENT) => {}
            other => return other,
        }
        let (Some(above), Some(name)) = (at.parent(), at.file_name()) else { return Err(Errno::NOENT) };
        let above = self.folder(above)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
        match rustix::fs::openat(&above, name, flags, Mode::from_raw_mode(0o644)) {
            Ok(_) | Err(Errno::EXIST) => self.find(at),
            Err(e) => Err(e),
        }
    }

    fn place(&self, m: &Mount, folder: bool) -> io::Result<OwnedFd> {
        let is_kernels = matches!(&m.source, Source::New { kind, .. } if kind == "proc" || kind == "sysfs");
        let mut at = if folder { self.folder(&m.at)? } else { self.file(&m.at)? };
        if is_kernels {
            // No funny business with links: what is looked for there by name must be there.
            at = self.find_with(&m.at, PLACE | OFlags::DIRECTORY, ResolveFlags::NO_SYMLINKS)?;
        }
        let on_proc = rustix::fs::fstatfs(&at)?.f_type as i64 == PROC_SUPER_MAGIC;
        if on_proc && !is_kernels && !ALLOWED_ON_PROC.iter().any(|p| Path::new(p) == m.at) {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "nothing may be mounted inside /proc",
            ));
        }
        Ok(at)
    }
}

pub(super) fn attach(mount: impl AsFd, at: impl AsFd) -> rustix::io::Result<()> {
    let by_descriptor = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(mount, "", at, "", by_descriptor)
}

/// A copy of the mount, or the part of it, that lies at a descriptor; belongs to no namespace yet.
pub(super) fn copy_of(of: impl AsFd, recursive: bool) -> rustix::io::Result<OwnedFd> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    rustix::mount::open_tree(of, "", flags)
}

/// What a bind mount will show, with whether that is a folder. In a helper that is about to lose the host's rights this is done
/// ahead of time.
pub(crate) fn open_source(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let place = rustix::fs::openat(CWD, path, PLACE, Mode::empty())?;
    Ok(copy_of(&place, recursive)?)
}

fn is_folder(fd: impl AsFd) -> io::Result<bool> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode) == FileType::Directory)
}

fn new_file_system(
    kind: &str,
    source: &str,
    options: &[(String, Option<String>)],
    attributes: MountAttrFlags,
) -> rustix::io::Result<OwnedFd> {
    use rustix::mount::{fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen};
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", source)?;
    for (key, value) in options.iter().filter(|(k, _)| !k.is_empty()) {
        match value {
            Some(v) => fsconfig_set_string(&context, key.as_str(), v.as_str())?,
            None => fsconfig_set_flag(&context, key.as_str())?,
        }
    }
    fsconfig_create(&context)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

fn set(mount: &OwnedFd, attributes: MountAttrFlags, recursive: bool) -> io::Result<()> {
    if attributes.is_empty() {
        return Ok(());
    }
    let bits = u64::from(attributes.bits());
    let clear = if bits & libc::MOUNT_ATTR__ATIME != 0 { libc::MOUNT_ATTR__ATIME } else { 0 };
    sys::set_mount(mount.as_fd(), bits, clear, 0, recursive)
}

fn propagate(mount: &OwnedFd, p: Propagation) -> io::Result<()> {
    sys::set_mount(mount.as_fd(), 0, 0, u64::from(p.flags.bits()), p.recursive)
}

/// Mounts one entry. `label`: the SELinux label of the container's own file systems. `opened`: the source, where that was opened
/// before.
pub(super) fn mount(
    root: &Root,
    m: &Mount,
    label: Option<&str>,
    opened: Option<OwnedFd>,
) -> Result<(), Failure> {
    let from = match &m.source {
        Source::Bind { path, .. } => format!(" from {}", path.display()),
        _ => String::new(),
    };
    let failed = |e: io::Error| Failure::io("mount", format!("cannot mount {}{from}", m.at.display()), &e);
    mount_one(root, m, label, opened).map_err(failed)
}

fn mount_one(root: &Root, m: &Mount, label: Option<&str>, opened: Option<OwnedFd>) -> io::Result<()> {
    let tree = match &m.source {
        Source::New { kind, source, options } => {
            let tree = new_file_system(kind, source, options, m.attributes)?;
            if let (Some(label), "mqueue") = (label, kind.as_str()) {
                label_root(&tree, label)?;
            }
            tree
        }
        Source::Cgroup => match new_file_system("cgroup2", "cgroup", &[], m.attributes) {
            Ok(tree) => tree,
            // Not allowed in some user namespaces: the group's folder itself.
            Err(_) => {
                let tree = open_source(&own_group()?, true)?;
                set(&tree, m.attributes, false)?;
                tree
            }
        },
        Source::Bind { path, recursive } => {
            let tree = match opened {
                Some(tree) => tree,
                None => open_source(path, *recursive)?,
            };
            set(&tree, m.attributes, false)?;
            tree
        }
    };
    set(&tree, m.recursive_attributes, true)?;
    if !m.recursive_clear.is_empty() {
        sys::set_mount(tree.as_fd(), 0, u64::from(m.recursive_clear.bits()), 0, true)?;
    }
    if let Some(p) = m.propagation {
        propagate(&tree, p)?;
    }
    let at = root.place(m, is_folder(&tree)?)?;
    Ok(attach(&tree, &at)?)
}

/// For file systems that take no label when they are mounted. Before [`enter`], as it goes by the host's /proc.
fn label_root(tree: &OwnedFd, label: &str) -> io::Result<()> {
    let path = format!("/proc/self/fd/{}", tree.as_raw_fd());
    match rustix::fs::setxattr(path, "security.selinux", label.as_bytes(), XattrFlags::empty()) {
        // The policy labels them by another rule.
        Err(Errno::OPNOTSUPP) => Ok(()),
        other => Ok(other?),
    }
}

/// The folder of the caller's cgroup, version 2.
fn own_group() -> io::Result<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/cgroup")?;
    let path = text.lines().find_map(|l| l.strip_prefix("0::/")).unwrap_or_default();
    Ok(Path::new("/sys/fs/cgroup").join(path))
}

/// Decides what mounts of the host do from now on, and makes sure that `rootfs` is a mount of its own that can become the root.
pub(super) fn open_root(rootfs: &Path, host: MountPropagationFlags) -> io::Result<Root> {
    rustix::mount::mount_change("/", host | MountPropagationFlags::REC)?;
    let folder = rustix::fs::openat(CWD, rootfs, PLACE | OFlags::DIRECTORY, Mode::empty())?;
    if host.contains(MountPropagationFlags::SHARED) {
        // Neither the new root nor the mount it lies on may be shared when the root changes.
        let private = Propagation { flags: MountPropagationFlags::PRIVATE, recursive: false };
        propagate(&mount_above(rootfs)?, private)?;
    }
    // A mount of the host cannot become the root: below a user namespace it is locked to its place, and its parent may be shared.
    let tree = copy_of(&folder, true)?;
    attach(&tree, &folder)?;
    Ok(Root(tree))
}

fn is_mount(fd: impl AsFd) -> io::Result<bool> {
    let s = rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::empty())?;
    Ok(s.stx_attributes.contains(rustix::fs::StatxAttributes::MOUNT_ROOT))
}

/// The mount that a path lies on, at its own root.
fn mount_above(path: &Path) -> io::Result<OwnedFd> {
    for at in path.ancestors() {
        let fd = rustix::fs::openat(CWD, at, PLACE, Mode::empty())?;
        if is_mount(&fd)? {
            return Ok(fd);
        }
    }
    Err(Errno::INVAL.into())
}

/// The container's root becomes the process's. What was the root before is gone from its sight.
pub(super) fn enter(root: &Root, host: MountPropagationFlags) -> io::Result<()> {
    let before = rustix::fs::openat(CWD, "/", PLACE | OFlags::DIRECTORY, Mode::empty())?;
    rustix::process::fchdir(&root.0)?;
    // The old root comes to lie above the new one.
    rustix::process::pivot_root(".", ".")?;
    rustix::process::fchdir(&before)?;
    if host.contains(MountPropagationFlags::SHARED) {
        // The host must not hear of the unmounting.
        rustix::mount::mount_change(".", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
    }
    rustix::mount::unmount(".", rustix::mount::UnmountFlags::DETACH)?;
    rustix::process::chdir("/")?;
    Ok(())
}

/// After [`enter`]: nothing of the root itself can be changed.
pub(super) fn make_root_readonly() -> io::Result<()> {
    let root = rustix::fs::openat(CWD, "/", PLACE | OFlags::DIRECTORY, Mode::empty())?;
    set(&root, MountAttrFlags::MOUNT_ATTR_RDONLY, false)
}

fn present(path: &Path) -> io::Result<Option<OwnedFd>> {
    loop {
        match rustix::fs::openat2(CWD, path, PLACE, Mode::empty(), ResolveFlags::NO_MAGICLINKS) {
            Ok(fd) => return Ok(Some(fd)),
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// After [`enter`]: what is at `path` can be read only. A path that is not there needs nothing.
pub(super) fn make_readonly(path: &Path) -> io::Result<()> {
    let Some(at) = present(path)? else { return Ok(()) };
    let tree = copy_of(&at, true)?;
    let closed = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    set(&tree, closed, false)?;
    Ok(attach(&tree, &at)?)
}

/// After [`enter`]: hides files behind the null device `null` and folders behind one empty folder.
pub(super) fn mask(paths: &[PathBuf], null: BorrowedFd<'_>, label: Option<&str>) -> Result<(), Failure> {
    let options: Vec<_> = label.map(|l| ("context".to_owned(), Some(l.to_owned()))).into_iter().collect();
    let mut empty: Option<OwnedFd> = None;
    for path in paths {
        let failed = |e: io::Error| Failure::io("mount", format!("cannot mask {}", path.display()), &e);
        let Some(at) = present(path).map_err(failed)? else { continue };
        let hide = || -> io::Result<Option<OwnedFd>> {
            if !is_folder(&at)? {
                attach(copy_of(null, false)?, &at)?;
                return Ok(None);
            }
            match &empty {
                Some(first) => attach(copy_of(first, false)?, &at)?,
                None => {
                    let readonly = MountAttrFlags::MOUNT_ATTR_RDONLY;
                    let new = new_file_system("tmpfs", "tmpfs", &options, readonly)?;
                    attach(&new, &at)?;
                    return Ok(Some(new));
                }
            }
            Ok(None)
        };
        if let Some(new) = hide().map_err(failed)? {
            empty = Some(new);
        }
    }
    Ok(())
}
