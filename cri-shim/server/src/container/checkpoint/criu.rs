//! What criu must be told of a container: which of its mounts and namespaces are not the container's own, so that it neither looks
//! into them nor makes them anew. Keys are those of runc, for archives that another runtime restores.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags};

use super::work::Work;
use crate::error::{Error, Result};
use crate::mounts::unescape;

const NULL: &str = "/dev/null";

/// The container as it is before it stands still.
#[derive(Debug)]
pub(super) struct Seen {
    pid: u32,
    /// External mounts: where, and the key by which a restore finds what to mount there.
    mounts: Vec<(PathBuf, PathBuf)>,
    /// Namespaces, and the terminal whose other end the monitor has; as criu's `--external` has them.
    others: Vec<String>,
    /// What the first three descriptors of the first process are.
    streams: Vec<String>,
}

/// One line of mountinfo.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    id: u64,
    parent: u64,
    at: PathBuf,
    kind: String,
}

fn parse(mountinfo: &str) -> Vec<Mount> {
    let line = |l: &str| {
        let fields: Vec<&str> = l.split(' ').collect();
        let dash = fields.iter().skip(6).position(|f| *f == "-")? + 6;
        Some(Mount {
            id: fields.first()?.parse().ok()?,
            parent: fields.get(1)?.parse().ok()?,
            at: unescape(fields.get(4)?),
            kind: (*fields.get(dash + 1)?).to_owned(),
        })
    };
    mountinfo.lines().filter_map(line).collect()
}

/// Mounts by what the spec says of them.
#[derive(Debug, Default)]
struct Told {
    binds: HashSet<u64>,
    /// Files behind the null device.
    masks: HashSet<u64>,
    /// Made in the container.
    own: HashSet<u64>,
}

/// Pure: everything on a mount from outside is from outside as well, unless the spec has put it there.
fn externals(table: &[Mount], told: &Told) -> Vec<(PathBuf, PathBuf)> {
    let mut external: HashSet<u64> = told.binds.clone();
    // Devices and groups of the host; of a terminal as /dev/console criu looks for the other end, which the monitor has.
    let from_outside =
        |m: &Mount| matches!(m.kind.as_str(), "devtmpfs" | "cgroup" | "devpts") && !told.own.contains(&m.id);
    external.extend(table.iter().filter(|m| from_outside(m)).map(|m| m.id));
    // A mount may be listed before the one that it lies on.
    loop {
        let more: Vec<u64> = table
            .iter()
            .filter(|m| external.contains(&m.parent) && !external.contains(&m.id))
            .map(|m| m.id)
            .filter(|id| !told.own.contains(id) && !told.masks.contains(id))
            .collect();
        if more.is_empty() {
            break;
        }
        external.extend(more);
    }
    let key = |m: &Mount| {
        if m.at == Path::new("/") {
            None
        } else if told.masks.contains(&m.id) {
            Some(PathBuf::from(NULL))
        } else {
            external.contains(&m.id).then(|| m.at.clone())
        }
    };
    table.iter().filter_map(|m| Some((m.at.clone(), key(m)?))).collect()
}

/// The container's root, looked into without following a link out of it.
struct Root(OwnedFd);

struct Place {
    mount: u64,
    is_null: bool,
}

impl Root {
    fn of(pid: u32) -> Result<Root> {
        let path = PathBuf::from(format!("/proc/{pid}/root"));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, &path, flags, Mode::empty());
        root.map(Root).map_err(|e| Error::io("open", &path)(e.into()))
    }

    /// What is mounted at `path` itself; `None`: nothing.
    fn mounted_at(&self, path: &Path) -> Option<Place> {
        let below = path.strip_prefix("/").unwrap_or(path);
        let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let at = rustix::fs::openat2(&self.0, below, flags, Mode::empty(), how).ok()?;
        let wanted = StatxFlags::TYPE | StatxFlags::MNT_ID;
        let s = rustix::fs::statx(&at, "", AtFlags::EMPTY_PATH, wanted).ok()?;
        let kind = FileType::from_raw_mode(s.stx_mode.into());
        s.stx_attributes.contains(StatxAttributes::MOUNT_ROOT).then_some(Place {
            mount: s.stx_mnt_id,
            is_null: kind == FileType::CharacterDevice && (s.stx_rdev_major, s.stx_rdev_minor) == (1, 3),
        })
    }
}

fn told(root: &Root, spec: &Spec) -> Told {
    let mut told = Told::default();
    let mount_at = |p: &Path| root.mounted_at(p);
    for m in spec.mounts().iter().flatten() {
        let Some(place) = mount_at(m.destination()) else { continue };
        let options = m.options().as_deref().unwrap_or_default();
        let is_bind = m.typ().as_deref() == Some("bind")
            || options.iter().any(|o| matches!(o.as_str(), "bind" | "rbind"));
        let set = if is_bind { &mut told.binds } else { &mut told.own };
        set.insert(place.mount);
    }
    let Some(linux) = spec.linux() else { return told };
    let devices = linux.devices().iter().flatten().map(|d| d.path());
    told.binds.extend(devices.filter_map(|p| mount_at(p)).map(|p| p.mount));
    for path in linux.masked_paths().iter().flatten() {
        let Some(place) = mount_at(Path::new(path)) else { continue };
        let set = if place.is_null { &mut told.masks } else { &mut told.own };
        set.insert(place.mount);
    }
    let readonly = linux.readonly_paths().iter().flatten();
    let readonly = readonly.filter_map(|p| mount_at(Path::new(p))).map(|p| p.mount);
    told.own.extend(readonly.filter(|m| !told.binds.contains(m)));
    told
}

/// Where a namespace that the container shares with its pod is pinned.
pub(super) fn pinned(spec: &Spec, kind: LinuxNamespaceType) -> Option<PathBuf> {
    let all = spec.linux().as_ref()?.namespaces().as_ref()?;
    all.iter().find(|n| n.typ() == kind)?.path().clone()
}

/// A pseudo terminal of the container as criu names it.
fn terminal(m: &fs::Metadata) -> Option<String> {
    // The majors of devpts (admin-guide/devices.txt, "Unix98 PTY slaves").
    let is_slave = m.file_type().is_char_device() && (136..=143).contains(&rustix::fs::major(m.rdev()));
    is_slave.then(|| format!("tty[{:x}:{:x}]", m.rdev(), m.dev()))
}

impl Seen {
    /// Blocking.
    pub fn of(pid: u32, spec: &Spec) -> Result<Seen> {
        let path = PathBuf::from(format!("/proc/{pid}/mountinfo"));
        let table = parse(&fs::read_to_string(&path).map_err(Error::io("read", &path))?);
        let told = told(&Root::of(pid)?, spec);
        let mut others = Vec::new();
        for (kind, name, key) in [
            (LinuxNamespaceType::Network, "net", "extRootNetNS"),
            (LinuxNamespaceType::Pid, "pid", "extRootPidNS"),
        ] {
            if let Some(pin) = pinned(spec, kind) {
                let inode = fs::metadata(&pin).map_err(Error::io("find", &pin))?.ino();
                others.push(format!("{name}[{inode}]:{key}"));
            }
        }
        let path = |fd: u32| format!("/proc/{pid}/fd/{fd}");
        let stream = |fd| fs::read_link(path(fd)).unwrap_or_default().to_string_lossy().into_owned();
        let streams = (0..3).map(stream).collect();
        let mut terminals: Vec<String> =
            (0..3).filter_map(|fd| fs::metadata(path(fd)).ok()).filter_map(|m| terminal(&m)).collect();
        terminals.dedup();
        others.extend(terminals);
        Ok(Seen { pid, mounts: externals(&table, &told), others, streams })
    }

    /// `descriptors.json`, by which runc finds the streams again.
    pub fn descriptors(&self) -> String {
        serde_json::json!(self.streams).to_string()
    }
}

/// Pure: criu's command line.
pub(super) fn arguments(work: &Work, seen: &Seen) -> Vec<OsString> {
    let mut out: Vec<OsString> = vec!["dump".into(), "--tree".into(), seen.pid.to_string().into()];
    for (flag, value) in [
        ("--images-dir", work.images()),
        ("--work-dir", work.archive()),
        ("--freeze-cgroup", work.undo.freezer.clone()),
    ] {
        out.extend([flag.into(), value.into()]);
    }
    let fixed = [
        "--log-file",
        "dump.log",
        "-v4",
        "--leave-running",
        "--file-locks",
        "--manage-cgroups=soft",
        // Needs no program beside criu, and the pods' own network rules are nf_tables as well.
        "--network-lock",
        "nftables",
    ];
    out.extend(fixed.map(OsString::from));
    for (at, key) in &seen.mounts {
        let text = [b"mnt[", at.as_os_str().as_bytes(), b"]:", key.as_os_str().as_bytes()].concat();
        out.extend(["--external".into(), std::os::unix::ffi::OsStringExt::from_vec(text)]);
    }
    for other in &seen.others {
        out.extend(["--external".into(), other.into()]);
    }
    out
}

/// Pure: the last line of a criu log that says what went wrong, rather than that something did.
pub(super) fn last_error(log: &str) -> Option<String> {
    const EMPTY: [&str; 3] =
        ["Dumping FAILED", "Could not initialize kernel features detection", "exited, status"];
    let errors = log.lines().filter_map(|l| l.split_once("Error ("));
    let texts: Vec<&str> = errors.map(|(_, l)| l.split_once("): ").map_or(l, |(_, text)| text)).collect();
    let last = texts.iter().rev().find(|t| !EMPTY.iter().any(|e| t.starts_with(e))).or(texts.last())?;
    Some(last.trim().chars().take(500).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
100 90 0:50 / / rw,relatime - overlay orlop rw
101 100 0:51 / /proc rw - proc proc rw
102 100 0:52 / /dev rw - tmpfs tmpfs rw
103 102 0:53 / /dev/shm rw - tmpfs shm rw
104 100 8:1 /a\\040b /data rw master:7 - ext4 /dev/sda rw
105 104 8:2 / /data/below rw - ext4 /dev/sdb rw
106 101 0:52 /null /proc/kcore rw - tmpfs tmpfs rw
107 101 0:51 /sys /proc/sys ro - proc proc rw
108 104 0:54 / /data/own rw - tmpfs tmpfs rw
109 102 0:5 /null /dev/fuse rw - devtmpfs udev rw
111 102 0:55 / /dev/pts rw - devpts devpts rw
112 102 0:55 /0 /dev/console rw - devpts devpts rw
110 100 0:60 / /made\\040inside rw - tmpfs x rw
";

    #[test]
    fn only_what_comes_from_outside_is_external() {
        let told = Told {
            binds: HashSet::from([103, 104]),
            masks: HashSet::from([106]),
            own: HashSet::from([101, 102, 107, 108, 111]),
        };
        let table = parse(TABLE);
        assert_eq!(table[12].at, Path::new("/made inside"));
        let found: Vec<(String, String)> = externals(&table, &told)
            .into_iter()
            .map(|(a, k)| (a.display().to_string(), k.display().to_string()))
            .collect();
        let want = [
            ("/dev/shm", "/dev/shm"),
            ("/data", "/data"),
            ("/data/below", "/data/below"),
            ("/proc/kcore", "/dev/null"),
            ("/dev/fuse", "/dev/fuse"),
            ("/dev/console", "/dev/console"),
        ];
        assert_eq!(found, want.map(|(a, k)| (a.to_owned(), k.to_owned())));
    }

    #[test]
    fn the_error_that_says_something() {
        let log = "(00.1) mnt: fine\n\
            (00.2) Error (criu/mount.c:1088): mnt: Mount 919 ./data (master_id: 30) has unreachable sharing.\n\
            (00.2) Error (criu/util.c:642): exited, status=1\n\
            (00.3) Error (criu/cr-dump.c:2111): Dumping FAILED.\n";
        assert_eq!(
            last_error(log).unwrap(),
            "mnt: Mount 919 ./data (master_id: 30) has unreachable sharing."
        );
        let only = "(00.3) Error (criu/cr-dump.c:2111): Dumping FAILED.\n";
        assert_eq!(last_error(only).unwrap(), "Dumping FAILED.");
        assert_eq!(last_error("(00.1) all well\n"), None);
    }
}
