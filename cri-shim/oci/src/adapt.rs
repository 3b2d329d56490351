//! Pure: what of a runtime spec is changed or taken apart before it is carried out, and what is refused at once.

use std::path::PathBuf;

use oci_spec::runtime::{Hook, LinuxNamespaceType, LinuxSeccomp, Process, Spec};

use crate::{Error, Kind};

/// A change that was made, for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Adaptation {
    /// This process may not lower its oom_score_adj so far (no CAP_SYS_RESOURCE): the kernel's value stays.
    OomScoreAdjDropped(i32),
    /// The terminal flag follows the request, not the file.
    TerminalSet(bool),
    /// This process may not raise that limit (no CAP_SYS_RESOURCE): its own hard limit stays.
    RlimitClamped(String),
}

/// Our part.
pub(crate) struct Taken {
    pub process: Process,
    pub seccomp: Option<LinuxSeccomp>,
    pub hooks: Later,
    /// Container id, host id, size; empty without a user namespace.
    pub uid_map: Vec<(u32, u32, u32)>,
    pub cgroup_path: PathBuf,
}

/// Hooks that do not run while the container is created.
#[derive(Debug, Default)]
pub(crate) struct Later {
    pub start_container: Vec<Hook>,
    pub poststart: Vec<Hook>,
    pub poststop: Vec<Hook>,
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(Kind::Invalid, "spec", message, libc::EINVAL)
}

pub(crate) fn take(spec: &mut Spec, id: &str, tty: bool) -> Result<(Taken, Vec<Adaptation>), Error> {
    let mut done = Vec::new();
    let Some(mut process) = spec.process().clone() else { return Err(invalid("the spec has no process")) };
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(invalid("the process has no arguments"));
    }
    let user = process.user();
    let mut ids =
        [user.uid(), user.gid()].into_iter().chain(user.additional_gids().iter().flatten().copied());
    if ids.any(|id| id == u32::MAX) {
        return Err(invalid("user and group ids end at 4294967294; for the kernel the next one is none"));
    }
    if spec.root().is_none() {
        return Err(invalid("the spec has no root"));
    }
    let Some(linux) = spec.linux().clone() else { return Err(invalid("the spec has no linux section")) };
    let own = |t| linux.namespaces().iter().flatten().any(|n| n.typ() == t && n.path().is_none());
    let joined = |t| linux.namespaces().iter().flatten().any(|n| n.typ() == t && n.path().is_some());
    if own(LinuxNamespaceType::User) {
        return Err(invalid("a user namespace is the sandbox's: give its path"));
    }
    if !own(LinuxNamespaceType::Mount) {
        return Err(invalid("a container needs a mount namespace of its own"));
    }
    if linux.time_offsets().as_ref().is_some_and(|o| !o.is_empty()) || linux.net_devices().is_some() {
        return Err(invalid("time offsets and network devices are not supported"));
    }
    if linux.intel_rdt().is_some() {
        return Err(invalid("Intel RDT is not supported"));
    }
    if process.terminal().unwrap_or(false) != tty {
        process.set_terminal(Some(tty));
        done.push(Adaptation::TerminalSet(tty));
    }
    let uid_map = match joined(LinuxNamespaceType::User) {
        true => {
            linux.uid_mappings().iter().flatten().map(|m| (m.container_id(), m.host_id(), m.size())).collect()
        }
        false => Vec::new(),
    };
    if joined(LinuxNamespaceType::User) && uid_map.is_empty() {
        return Err(invalid("a container with a user namespace needs its id mappings"));
    }
    let cgroup_path = linux.cgroups_path().clone().unwrap_or_else(|| PathBuf::from("/").join(id));
    let seccomp = linux.seccomp().clone();
    let hooks = take_hooks(spec)?;
    spec.set_process(Some(process.clone()));
    Ok((Taken { process, seccomp, hooks, uid_map, cgroup_path }, done))
}

/// Gives the SELinux label of the container's own mounts to each of them that takes one, so that whoever mounts need not know which:
/// neither copies of the host's nor the kernel's own files, which are labelled by the policy alone. Without SELinux no mount has one.
pub(crate) fn label_mounts(spec: &mut Spec, selinux: bool) {
    let Some(mut linux) = spec.linux().clone() else { return };
    let Some(label) = linux.mount_label().clone().filter(|l| !l.is_empty()) else { return };
    if !selinux {
        linux.set_mount_label(None);
        spec.set_linux(Some(linux));
        return;
    }
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for m in &mut mounts {
        let mut options = m.options().clone().unwrap_or_default();
        let copy = options.iter().any(|o| matches!(o.as_str(), "bind" | "rbind"));
        let kind = m.typ().as_deref().unwrap_or("bind");
        let policys = matches!(kind, "bind" | "proc" | "sysfs" | "mqueue" | "cgroup" | "cgroup2");
        if copy || policys || options.iter().any(|o| o.starts_with("context=")) {
            continue;
        }
        options.push(format!("context={label}"));
        m.set_options(Some(options));
    }
    spec.set_mounts(Some(mounts));
}

/// Leaves those that run at creation.
fn take_hooks(spec: &mut Spec) -> Result<Later, Error> {
    let Some(mut hooks) = spec.hooks().clone() else { return Ok(Later::default()) };
    #[allow(deprecated)]
    let at_creation = [hooks.prestart(), hooks.create_runtime(), hooks.create_container()];
    let rest = at_creation.iter().any(|h| h.as_ref().is_some_and(|h| !h.is_empty()));
    let later = [hooks.start_container(), hooks.poststart(), hooks.poststop()];
    for h in at_creation.into_iter().chain(later).flatten().flatten() {
        if !h.path().is_absolute() {
            return Err(invalid(format!("the path of hook {} is not absolute", h.path().display())));
        }
        if h.timeout().is_some_and(|t| t < 1) {
            return Err(invalid(format!("hook {} has a timeout below a second", h.path().display())));
        }
    }
    let [start_container, poststart, poststop] = later.map(|h| h.clone().unwrap_or_default());
    hooks.set_start_container(None).set_poststart(None).set_poststop(None);
    spec.set_hooks(rest.then_some(hooks));
    Ok(Later { start_container, poststart, poststop })
}

/// Whether the container's own init ends all its processes: a PID namespace made for it (no path).
pub(crate) fn has_own_pid_namespace(spec: &Spec) -> bool {
    spec.linux()
        .as_ref()
        .and_then(|l| l.namespaces().as_ref())
        .is_some_and(|all| all.iter().any(|n| n.typ() == LinuxNamespaceType::Pid && n.path().is_none()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn spec(process: Value, linux: Value) -> Spec {
        let mut all = json!({
            "ociVersion": "1.2.0", "root": {"path": "/r"},
            "process": {"cwd": "/w", "args": ["a"], "user": {"uid": 7, "gid": 8}},
            "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "network", "path": "/n"}]},
        });
        for (section, more) in [("process", process), ("linux", linux)] {
            for (k, v) in more.as_object().expect("an object") {
                all[section][k] = v.clone();
            }
        }
        serde_json::from_value(all).expect("a spec")
    }

    #[test]
    fn our_part_is_taken_out() {
        let mut s = spec(
            json!({"noNewPrivileges": true, "terminal": true, "env": ["A=b"],
                "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 2}], "capabilities": {"bounding": ["CAP_KILL"]}}),
            json!({"seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}}),
        );
        let (taken, done) = take(&mut s, "id", false).unwrap();
        assert_eq!(done, [Adaptation::TerminalSet(false)]);
        assert_eq!((taken.process.user().uid(), taken.process.no_new_privileges()), (7, Some(true)));
        assert!(taken.seccomp.is_some() && taken.process.rlimits().is_some());
        assert_eq!(taken.cgroup_path, PathBuf::from("/id"));
        assert_eq!(s.process().as_ref().unwrap().terminal(), Some(false));
        assert!(s.hooks().is_none());
        assert!(has_own_pid_namespace(&s));
    }

    /// Setting an id to -1 leaves it as it was: root's.
    #[test]
    fn ids_that_are_none_are_refused() {
        let none = u32::MAX;
        for (user, good) in [
            (json!({"uid": none - 1, "gid": none - 1, "additionalGids": [none - 1]}), true),
            (json!({"uid": none, "gid": 1}), false),
            (json!({"uid": 1, "gid": none}), false),
            (json!({"uid": 1, "gid": 1, "additionalGids": [1, none]}), false),
        ] {
            let taken = take(&mut spec(json!({"user": user}), json!({})), "id", false);
            assert_eq!(taken.is_ok(), good, "{user}");
        }
    }

    #[test]
    fn labels_of_mounts() {
        let labelled = |selinux: bool| {
            let mut all =
                serde_json::to_value(spec(json!({}), json!({"mountLabel": "u:r:t:s0:c1,c2"}))).unwrap();
            all["mounts"] = json!([
                {"destination": "/dev", "type": "tmpfs", "options": ["nosuid"]},
                {"destination": "/dev/pts", "type": "devpts"},
                {"destination": "/proc", "type": "proc"},
                {"destination": "/dev/mqueue", "type": "mqueue"},
                {"destination": "/v", "type": "none", "source": "/v", "options": ["rbind"]},
                {"destination": "/w", "source": "/w"},
                {"destination": "/t", "type": "tmpfs", "options": ["context=own"]},
            ]);
            let mut s: Spec = serde_json::from_value(all).unwrap();
            label_mounts(&mut s, selinux);
            let context = |m: &oci_spec::runtime::Mount| {
                m.options().iter().flatten().find_map(|o| o.strip_prefix("context=").map(str::to_owned))
            };
            let got: Vec<_> = s.mounts().iter().flatten().map(context).collect();
            got
        };
        let own = || Some("u:r:t:s0:c1,c2".to_owned());
        assert_eq!(labelled(true), [own(), own(), None, None, None, None, Some("own".into())]);
        assert_eq!(labelled(false), [None, None, None, None, None, None, Some("own".into())]);
    }

    #[test]
    fn hooks() {
        let with = |hooks: Value| {
            let mut all = serde_json::to_value(spec(json!({}), json!({}))).unwrap();
            all["hooks"] = hooks;
            let mut s: Spec = serde_json::from_value(all).unwrap();
            take(&mut s, "id", false).map(|(t, _)| {
                let later = [t.hooks.start_container, t.hooks.poststart, t.hooks.poststop].map(|h| h.len());
                (later, s.hooks().is_some())
            })
        };
        assert_eq!(with(json!({"startContainer": [{"path": "/a"}]})), Ok(([1, 0, 0], false)));
        assert_eq!(
            with(json!({"startContainer": [{"path": "/a"}], "createRuntime": [{"path": "/b"}]})),
            Ok(([1, 0, 0], true))
        );
        let after = json!({"poststart": [{"path": "/a", "timeout": 1}], "poststop": [{"path": "/a"}, {"path": "/b"}]});
        assert_eq!(with(after), Ok(([0, 1, 2], false)));
        for bad in
            [json!({"path": "a"}), json!({"path": "/a", "timeout": 0}), json!({"path": "/a", "timeout": -1})]
        {
            for at in ["prestart", "createContainer", "poststop"] {
                assert!(with(json!({at: [bad]})).is_err(), "{at} {bad}");
            }
        }
    }

    #[test]
    fn refusals() {
        let namespaces = |extra: Value| {
            let mut all = json!([{"type": "mount"}]);
            all.as_array_mut().unwrap().push(extra);
            json!({"namespaces": all})
        };
        let cases = [
            (json!({"args": []}), json!({})),
            (json!({}), json!({"namespaces": []})),
            (json!({}), namespaces(json!({"type": "user"}))),
            (json!({}), json!({"intelRdt": {"closID": "c"}})),
            (json!({}), namespaces(json!({"type": "user", "path": "/u"}))),
        ];
        for (process, linux) in cases {
            let e = take(&mut spec(process.clone(), linux.clone()), "id", false).map(|_| ()).unwrap_err();
            assert_eq!(e.kind, Kind::Invalid, "{process} {linux}");
        }
        let mut mapped = namespaces(json!({"type": "user", "path": "/u"}));
        mapped["uidMappings"] = json!([{"containerID": 0, "hostID": 5000, "size": 10}]);
        assert_eq!(take(&mut spec(json!({}), mapped), "id", false).unwrap().0.uid_map, [(0, 5000, 10)]);
    }
}
