//! Pure: what a container's first process will do, taken from its spec. A spec that asks for more than that is refused by name.

use std::path::{Component, Path, PathBuf};

use nix::sched::CloneFlags;
use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceType, LinuxNamespaceType, Mount as SpecMount, Spec};
use rustix::mount::{MountAttrFlags, MountPropagationFlags};

use crate::schedule::Schedule;
use crate::{Error, Kind, sysctl_file};

/// How a mount passes mounts on, with all below it if `recursive`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Propagation {
    pub flags: MountPropagationFlags,
    pub recursive: bool,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A folder or file of the host.
    Bind { path: PathBuf, recursive: bool },
    /// A new file system with its options.
    New { kind: String, source: String, options: Vec<(String, Option<String>)> },
    /// The container's own cgroup, version 2.
    Cgroup,
}

/// One entry of the spec's mount table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    /// Below the container's root; absolute, without dots.
    pub at: PathBuf,
    pub source: Source,
    pub attributes: MountAttrFlags,
    /// Set on everything below, too.
    pub recursive_attributes: MountAttrFlags,
    /// Cleared there.
    pub recursive_clear: MountAttrFlags,
    pub propagation: Option<Propagation>,
}

/// A device node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub at: PathBuf,
    pub kind: NodeKind,
    pub major: u32,
    pub minor: u32,
    pub mode: u32,
    pub owner: (u32, u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NodeKind {
    Character,
    Block,
    Fifo,
}

/// Everything but who the process becomes.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Plan {
    /// Namespaces to join, by their files.
    pub join: Vec<(PathBuf, CloneFlags)>,
    /// Namespaces to make, the mount namespace among them.
    pub make: CloneFlags,
    /// What mounts of the host do to the container's while it is set up, and its own root's afterwards.
    pub host_propagation: MountPropagationFlags,
    pub root_propagation: Option<MountPropagationFlags>,
    pub mounts: Vec<Mount>,
    /// /dev is the container's own, so that nodes and links are made in it.
    pub own_dev: bool,
    pub nodes: Vec<Node>,
    pub readonly_root: bool,
    pub masked: Vec<PathBuf>,
    pub readonly: Vec<PathBuf>,
    pub cwd: PathBuf,
    pub hostname: Option<String>,
    pub domainname: Option<String>,
    pub sysctls: Vec<Sysctl>,
    pub schedule: Schedule,
    /// The SELinux label of file systems that are made for the container alone.
    pub mount_label: Option<String>,
}

impl Plan {
    pub(crate) fn of(spec: &Spec) -> Result<Plan, Error> {
        let linux = spec.linux().as_ref().ok_or_else(|| refused("a spec without a linux section"))?;
        let process = spec.process().as_ref().ok_or_else(|| refused("a spec without a process"))?;
        let root = spec.root().as_ref().ok_or_else(|| refused("a spec without a root"))?;
        for (asked, what) in [
            (linux.personality().is_some(), "a personality"),
            (linux.memory_policy().is_some(), "a memory policy"),
            (process.exec_cpu_affinity().is_some(), "CPU affinity of execs"),
        ] {
            if asked {
                return Err(refused(what));
            }
        }
        let (host_propagation, root_propagation) = match linux.rootfs_propagation().as_deref() {
            None | Some("" | "slave" | "rslave") => (MountPropagationFlags::DOWNSTREAM, None),
            Some("shared") => (MountPropagationFlags::SHARED, Some(MountPropagationFlags::SHARED)),
            Some("private") => (MountPropagationFlags::PRIVATE, None),
            Some("unbindable") => {
                (MountPropagationFlags::DOWNSTREAM, Some(MountPropagationFlags::UNBINDABLE))
            }
            Some(other) => return Err(refused(&format!("root propagation {other:?}"))),
        };
        let mounts = spec.mounts().iter().flatten().map(mount).collect::<Result<Vec<_>, _>>()?;
        let dev = mounts.iter().rfind(|m| m.at == Path::new("/dev"));
        if dev.is_some_and(|d| d.attributes.contains(MountAttrFlags::MOUNT_ATTR_RDONLY)) {
            return Err(refused("a read-only /dev"));
        }
        // The host's own /dev, or a volume in its place, stays as it is.
        let own_dev = !dev.is_some_and(|d| matches!(d.source, Source::Bind { .. }));
        let given = linux.devices().iter().flatten().map(node).collect::<Result<Vec<_>, _>>()?;
        let mut nodes: Vec<Node> = standard_nodes().filter(|n| !given.iter().any(|g| g.at == n.at)).collect();
        nodes.extend(given);
        let mut plan = Plan {
            join: Vec::new(),
            make: CloneFlags::empty(),
            host_propagation,
            root_propagation,
            mounts,
            own_dev,
            nodes,
            readonly_root: root.readonly().unwrap_or(false),
            masked: paths(linux.masked_paths()),
            readonly: paths(linux.readonly_paths()),
            cwd: process.cwd().clone(),
            hostname: spec.hostname().clone(),
            domainname: spec.domainname().clone(),
            sysctls: sysctls(linux)?,
            schedule: Schedule::of(process)?,
            mount_label: linux.mount_label().clone().filter(|l| !l.is_empty()),
        };
        for n in linux.namespaces().iter().flatten() {
            let flag = match n.typ() {
                // These are the helper's: they count for its fork.
                LinuxNamespaceType::User | LinuxNamespaceType::Pid => continue,
                LinuxNamespaceType::Time => return Err(refused("a time namespace")),
                LinuxNamespaceType::Mount => CloneFlags::CLONE_NEWNS,
                LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
                LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
                LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
                LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
            };
            match n.path() {
                Some(path) => plan.join.push((path.clone(), flag)),
                None => plan.make |= flag,
            }
        }
        Ok(plan)
    }
}

/// A kernel setting of one of the container's namespaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sysctl {
    pub name: String,
    pub file: PathBuf,
    pub value: String,
    /// The file's name below /proc/self/ns.
    pub namespace: &'static str,
}

fn sysctls(linux: &Linux) -> Result<Vec<Sysctl>, Error> {
    let one = |(name, value): (&String, &String)| {
        let invalid = |text: String| Error::new(Kind::Invalid, "sysctl", text, libc::EINVAL);
        let (of, file) = sysctl_file(name).map_err(invalid)?;
        let (kind, namespace) = match of {
            CloneFlags::CLONE_NEWNET => (LinuxNamespaceType::Network, "net"),
            CloneFlags::CLONE_NEWIPC => (LinuxNamespaceType::Ipc, "ipc"),
            _ => (LinuxNamespaceType::Uts, "uts"),
        };
        if !linux.namespaces().iter().flatten().any(|n| n.typ() == kind) {
            return Err(invalid(format!(
                "{name} would be the host's: the container has no {namespace} namespace"
            )));
        }
        Ok(Sysctl { name: name.clone(), file, value: value.clone(), namespace })
    };
    let mut all = linux.sysctl().iter().flatten().map(one).collect::<Result<Vec<_>, _>>()?;
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

fn refused(what: &str) -> Error {
    Error::new(Kind::Invalid, "spec", format!("{what} is not supported"), libc::EINVAL)
}

fn paths(given: &Option<Vec<String>>) -> Vec<PathBuf> {
    given.iter().flatten().map(PathBuf::from).collect()
}

/// Absolute and free of dots, as a path below some root; `None` for a relative one.
fn clean(path: &Path) -> Option<PathBuf> {
    let mut out = PathBuf::from("/");
    let mut parts = path.components();
    if parts.next() != Some(Component::RootDir) {
        return None;
    }
    for c in parts {
        match c {
            Component::Normal(n) => out.push(n),
            Component::ParentDir => drop(out.pop()),
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(out)
}

enum Word {
    Set(MountAttrFlags),
    SetBelow(MountAttrFlags),
    ClearBelow(MountAttrFlags),
    Clear(MountAttrFlags),
    Propagate(MountPropagationFlags, bool),
    Bind(bool),
    Nothing,
    /// Of the whole file system, wherever it is mounted: says nothing of a bind mount, as with mount(2).
    FileSystem,
    Option,
}

fn word(option: &str) -> Option<Word> {
    use MountAttrFlags as A;
    use MountPropagationFlags as P;
    Some(match option {
        "defaults" => Word::Nothing,
        "bind" => Word::Bind(false),
        "rbind" => Word::Bind(true),
        "ro" => Word::Set(A::MOUNT_ATTR_RDONLY),
        "rw" => Word::Clear(A::MOUNT_ATTR_RDONLY),
        "rro" => Word::SetBelow(A::MOUNT_ATTR_RDONLY),
        "nosuid" => Word::Set(A::MOUNT_ATTR_NOSUID),
        "suid" => Word::Clear(A::MOUNT_ATTR_NOSUID),
        "nodev" => Word::Set(A::MOUNT_ATTR_NODEV),
        "dev" => Word::Clear(A::MOUNT_ATTR_NODEV),
        "noexec" => Word::Set(A::MOUNT_ATTR_NOEXEC),
        "exec" => Word::Clear(A::MOUNT_ATTR_NOEXEC),
        "noatime" => Word::Set(A::MOUNT_ATTR_NOATIME),
        "atime" => Word::Clear(A::MOUNT_ATTR_NOATIME),
        "strictatime" => Word::Set(A::MOUNT_ATTR_STRICTATIME),
        "nodiratime" => Word::Set(A::MOUNT_ATTR_NODIRATIME),
        "relatime" => Word::Nothing,
        "private" => Word::Propagate(P::PRIVATE, false),
        "rprivate" => Word::Propagate(P::PRIVATE, true),
        "slave" => Word::Propagate(P::DOWNSTREAM, false),
        "rslave" => Word::Propagate(P::DOWNSTREAM, true),
        "shared" => Word::Propagate(P::SHARED, false),
        "rshared" => Word::Propagate(P::SHARED, true),
        "unbindable" => Word::Propagate(P::UNBINDABLE, false),
        "runbindable" => Word::Propagate(P::UNBINDABLE, true),
        "rnosuid" => Word::SetBelow(A::MOUNT_ATTR_NOSUID),
        "rnodev" => Word::SetBelow(A::MOUNT_ATTR_NODEV),
        "rnoexec" => Word::SetBelow(A::MOUNT_ATTR_NOEXEC),
        "rnoatime" => Word::SetBelow(A::MOUNT_ATTR_NOATIME),
        "rstrictatime" => Word::SetBelow(A::MOUNT_ATTR_STRICTATIME),
        "rnodiratime" => Word::SetBelow(A::MOUNT_ATTR_NODIRATIME),
        "nosymfollow" => Word::Set(A::MOUNT_ATTR_NOSYMFOLLOW),
        "rnosymfollow" => Word::SetBelow(A::MOUNT_ATTR_NOSYMFOLLOW),
        "rrw" => Word::ClearBelow(A::MOUNT_ATTR_RDONLY),
        "rsuid" => Word::ClearBelow(A::MOUNT_ATTR_NOSUID),
        "rdev" => Word::ClearBelow(A::MOUNT_ATTR_NODEV),
        "rexec" => Word::ClearBelow(A::MOUNT_ATTR_NOEXEC),
        "rdiratime" => Word::ClearBelow(A::MOUNT_ATTR_NODIRATIME),
        "rsymfollow" => Word::ClearBelow(A::MOUNT_ATTR_NOSYMFOLLOW),
        "sync" | "dirsync" | "lazytime" | "mand" => Word::FileSystem,
        // What mounts are anyhow.
        "symfollow" | "async" | "nomand" | "loud" | "silent" | "rrelatime" | "norelatime"
        | "nostrictatime" | "diratime" | "nolazytime" | "noiversion" => Word::Nothing,
        "idmap" | "ridmap" | "remount" | "tmpcopyup" | "ratime" | "rnorelatime" | "rnostrictatime"
        | "iversion" => {
            return None;
        }
        _ => Word::Option,
    })
}

fn mount(m: &SpecMount) -> Result<Mount, Error> {
    let place = m.destination().display();
    let at = clean(m.destination()).filter(|at| at != Path::new("/"));
    let mut out = Mount {
        at: at.ok_or_else(|| refused(&format!("a mount at {place}")))?,
        source: Source::Cgroup,
        attributes: MountAttrFlags::empty(),
        recursive_attributes: MountAttrFlags::empty(),
        recursive_clear: MountAttrFlags::empty(),
        propagation: None,
    };
    let mut bind = None;
    let mut options = Vec::new();
    let mut whole = Vec::new();
    for o in m.options().iter().flatten() {
        match word(o).ok_or_else(|| refused(&format!("mount option {o:?} of {place}")))? {
            Word::Nothing => {}
            Word::Set(flag) => out.attributes |= flag,
            Word::SetBelow(flag) => {
                out.recursive_attributes |= flag;
                out.recursive_clear &= !flag;
            }
            Word::ClearBelow(flag) => {
                out.recursive_attributes &= !flag;
                out.recursive_clear |= flag;
            }
            Word::FileSystem => whole.push((o.clone(), None)),
            Word::Clear(flag) => out.attributes &= !flag,
            Word::Propagate(flags, recursive) => out.propagation = Some(Propagation { flags, recursive }),
            Word::Bind(recursive) => bind = Some(recursive),
            Word::Option => options.push(match o.split_once('=') {
                Some((k, v)) => (k.to_owned(), Some(v.to_owned())),
                None => (o.clone(), None),
            }),
        }
    }
    if m.uid_mappings().is_some() || m.gid_mappings().is_some() {
        return Err(refused(&format!("an id mapping of the mount at {place}")));
    }
    let no_options = |options: &[(String, Option<String>)]| match options.first() {
        Some((o, _)) => Err(refused(&format!("mount option {o:?} of {place}"))),
        None => Ok(()),
    };
    let kind = m.typ().clone().unwrap_or_else(|| "bind".to_owned());
    if bind.is_some() || kind == "bind" {
        no_options(&options)?;
        let path = m.source().clone().filter(|p| p.is_absolute());
        let path = path.ok_or_else(|| refused(&format!("a relative source of the mount at {place}")))?;
        out.source = Source::Bind { path, recursive: bind.unwrap_or(false) };
        return Ok(out);
    }
    if kind != "cgroup" {
        options.extend(whole);
        let source = m.source().as_ref().map_or(kind.clone(), |s| s.to_string_lossy().into_owned());
        out.source = Source::New { kind, source, options };
    } else {
        no_options(&options)?;
    }
    Ok(out)
}

fn node(d: &LinuxDevice) -> Result<Node, Error> {
    let bad = || refused(&format!("device {}", d.path().display()));
    let at = clean(d.path()).filter(|p| p.starts_with("/dev") && p != Path::new("/dev")).ok_or_else(bad)?;
    let (kind, standard_mode) = match d.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => (NodeKind::Character, 0o666),
        LinuxDeviceType::B => (NodeKind::Block, 0o666),
        LinuxDeviceType::P => (NodeKind::Fifo, 0o666),
        LinuxDeviceType::A => return Err(bad()),
    };
    Ok(Node {
        at,
        kind,
        major: u32::try_from(d.major()).map_err(|_| bad())?,
        minor: u32::try_from(d.minor()).map_err(|_| bad())?,
        mode: d.file_mode().unwrap_or(standard_mode) & 0o7777,
        owner: (d.uid().unwrap_or(0), d.gid().unwrap_or(0)),
    })
}

/// The devices that every container has (OCI runtime spec, config-linux, "Default Devices").
fn standard_nodes() -> impl Iterator<Item = Node> {
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("tty", 5, 0), ("urandom", 1, 9), ("random", 1, 8)]
        .into_iter()
        .map(|(name, major, minor)| Node {
            at: Path::new("/dev").join(name),
            kind: NodeKind::Character,
            major,
            minor,
            mode: 0o666,
            owner: (0, 0),
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn spec(change: Value) -> Spec {
        let mut all = json!({
            "ociVersion": "1.2.0", "root": {"path": "/r"},
            "process": {"cwd": "/w", "args": ["a"], "user": {"uid": 7, "gid": 8}},
            "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "network", "path": "/n"}]},
        });
        for (section, more) in change.as_object().expect("an object") {
            match more.as_object() {
                Some(fields) if section != "hooks" => {
                    for (k, v) in fields {
                        all[section][k] = v.clone();
                    }
                }
                _ => all[section] = more.clone(),
            }
        }
        serde_json::from_value(all).expect("a spec")
    }

    fn mount_of(m: Value) -> Result<Mount, Error> {
        Plan::of(&spec(json!({"mounts": [m]}))).map(|mut p| p.mounts.remove(0))
    }

    #[test]
    fn namespaces_and_paths() {
        let p = Plan::of(&spec(json!({"linux": {"maskedPaths": ["/m"], "readonlyPaths": ["/o"]}}))).unwrap();
        assert_eq!(p.join, [(PathBuf::from("/n"), CloneFlags::CLONE_NEWNET)]);
        assert_eq!(p.make, CloneFlags::CLONE_NEWNS);
        assert_eq!((p.masked, p.readonly), (vec!["/m".into()], vec!["/o".into()]));
        assert_eq!((p.cwd, p.own_dev, p.nodes.len()), ("/w".into(), true, 6));
    }

    #[test]
    fn what_is_rare_is_refused_by_name() {
        for (rare, named) in [
            (json!({"linux": {"sysctl": {"vm.swappiness": "1"}}}), "the whole machine's"),
            (json!({"linux": {"sysctl": {"kernel.shmmax": "1"}}}), "no ipc namespace"),
            (json!({"linux": {"personality": {"domain": "LINUX"}}}), "personality"),
            (json!({"linux": {"rootfsPropagation": "odd"}}), "odd"),
            (
                json!({"mounts": [{"destination": "/a", "type": "tmpfs", "options": ["tmpcopyup"]}]}),
                "tmpcopyup",
            ),
            (json!({"mounts": [{"destination": "/a", "source": "/b", "options": ["bind", "odd"]}]}), "odd"),
            (
                json!({"mounts": [{"destination": "/a", "source": "/b", "options": ["bind", "ridmap"]}]}),
                "ridmap",
            ),
            (json!({"mounts": [{"destination": "/a", "source": "b", "options": ["bind"]}]}), "relative"),
            (json!({"mounts": [{"destination": "a", "source": "/b", "options": ["bind"]}]}), "a mount at a"),
            (
                json!({"mounts": [{"destination": "/a/..", "source": "/b", "options": ["bind"]}]}),
                "a mount at",
            ),
            (json!({"mounts": [{"destination": "/dev", "type": "tmpfs", "options": ["ro"]}]}), "/dev"),
            (
                json!({"linux": {"devices": [{"path": "/etc/x", "type": "c", "major": 1, "minor": 1}]}}),
                "/etc/x",
            ),
        ] {
            let e = Plan::of(&spec(rare.clone())).expect_err("refused");
            assert!(e.kind == Kind::Invalid && e.message.contains(named), "{rare}: {e}");
        }
        let named = Plan::of(&spec(json!({"hostname": "h", "domainname": "d"}))).unwrap();
        assert_eq!((named.hostname.as_deref(), named.domainname.as_deref()), (Some("h"), Some("d")));
    }

    #[test]
    fn sysctls_of_its_namespaces() {
        let p = Plan::of(&spec(json!({"linux": {"sysctl": {"net.core.somaxconn": "7"}}}))).unwrap();
        let file = PathBuf::from("/proc/sys/net/core/somaxconn");
        let (name, value) = ("net.core.somaxconn".to_owned(), "7".to_owned());
        assert_eq!(p.sysctls, [Sysctl { name, file, value, namespace: "net" }]);
    }

    #[test]
    fn labels() {
        let p = Plan::of(&spec(
            json!({"linux": {"mountLabel": "u:r:t:s0"}, "process": {"selinuxLabel": "u:r:p:s0"}}),
        ));
        assert_eq!(p.unwrap().mount_label.as_deref(), Some("u:r:t:s0"));
        assert_eq!(Plan::of(&spec(json!({"linux": {"mountLabel": ""}}))).unwrap().mount_label, None);
    }

    #[test]
    fn mounts() {
        let m = mount_of(json!({"destination": "/a/../b", "type": "bind", "source": "/s",
            "options": ["rbind", "rslave", "rw", "rro", "nosuid"]}))
        .unwrap();
        assert_eq!((m.at, m.source), ("/b".into(), Source::Bind { path: "/s".into(), recursive: true }));
        assert_eq!(m.attributes, MountAttrFlags::MOUNT_ATTR_NOSUID);
        assert_eq!(m.recursive_attributes, MountAttrFlags::MOUNT_ATTR_RDONLY);
        assert_eq!(
            m.propagation,
            Some(Propagation { flags: MountPropagationFlags::DOWNSTREAM, recursive: true })
        );
        let m = mount_of(json!({"destination": "/t", "type": "tmpfs", "source": "tmpfs",
            "options": ["mode=755", "size=64k", "ro"]}))
        .unwrap();
        let options = vec![("mode".into(), Some("755".into())), ("size".into(), Some("64k".into()))];
        assert_eq!(m.source, Source::New { kind: "tmpfs".into(), source: "tmpfs".into(), options });
        assert_eq!(m.attributes, MountAttrFlags::MOUNT_ATTR_RDONLY);
        let with = |kind: &str, options: Value| {
            mount_of(json!({"destination": "/t", "type": kind, "source": "/s", "options": options})).unwrap()
        };
        let m = with("tmpfs", json!(["sync", "lazytime", "noexec"]));
        let options = vec![("sync".into(), None), ("lazytime".into(), None)];
        assert_eq!(m.source, Source::New { kind: "tmpfs".into(), source: "/s".into(), options });
        let m = with("bind", json!(["rbind", "sync", "rro", "rrw", "rnodev"]));
        assert_eq!(m.source, Source::Bind { path: "/s".into(), recursive: true });
        assert_eq!(m.recursive_clear, MountAttrFlags::MOUNT_ATTR_RDONLY, "the last word counts");
        assert_eq!(m.recursive_attributes, MountAttrFlags::MOUNT_ATTR_NODEV);
        let m =
            mount_of(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"})).unwrap();
        assert_eq!(m.source, Source::Cgroup);
    }

    #[test]
    fn devices() {
        let p = Plan::of(&spec(json!({"linux": {"devices": [
            {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o600, "uid": 5},
            {"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200}]}})))
        .unwrap();
        assert_eq!(p.nodes.len(), 7);
        let null = p.nodes.iter().find(|n| n.at == Path::new("/dev/null")).unwrap();
        assert_eq!((null.mode, null.owner), (0o600, (5, 0)));
        let host = json!({"mounts": [{"destination": "/dev", "source": "/dev", "options": ["rbind"]}]});
        assert!(!Plan::of(&spec(host)).unwrap().own_dev, "the host's /dev stays as it is");
    }
}
