//! User namespaces of pods (KEP-127): a pod with `hostUsers: false` gets a range of the node's user and group ids to itself,
//! which stays its own until nothing of it runs.
//!
//! The range lies in the pod's folder in the form of upstream's kubelet, so that either can take over the other's pods.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use k8s_openapi::api::core::v1::PodSpec;
use orlop_base::durable::{self, Sync};
use orlop_proto::cri::{self, NamespaceMode};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::error::Error as AgentError;

/// Ranges are a multiple of this long and begin at a multiple of their length.
pub const UNIT: u32 = 65536;
/// Whose subordinate ids (subuid(5), subgid(5)) pods get; without such a user all ids but the first range are theirs.
const USER: &str = "kubelet";
const FILE: &str = "userns";

/// Why a pod gets no ids.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no ids are free for the pod's user namespace: {0} pods have all of the node's")]
    Exhausted(usize),
    #[error("{path} does not say which ids the pod has: {why}; delete the pod", path = path.display())]
    Record { path: PathBuf, why: String },
    #[error(
        "the pod gets no ids, as they may be those of pod {uid}, whose own are not known: {why}; delete that pod"
    )]
    Unknown { uid: String, why: String },
    #[error("the pod gets no ids, as they may be another's: {why}; mend this and restart the agent")]
    Unlisted { why: String },
    #[error("cannot record the pod's ids")]
    Write(#[from] durable::Error),
    #[error("cannot {what} {path}", path = path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
}

/// The ids that pods get, as ranges of one length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ranges {
    first: u32,
    length: u32,
    count: u32,
}

impl Ranges {
    /// `subordinate` is the first id and the number of ids; pure.
    fn new(subordinate: Option<(u32, u32)>, length: u32, max_pods: u32) -> Result<Ranges, String> {
        // The kernel maps no range that holds the last id: it stands for "none".
        let (first, all) = subordinate.unwrap_or((length, u32::MAX - length));
        if !first.is_multiple_of(length) || first < length {
            return Err(format!("they begin at {first}, which must be a multiple of {length} and above 0"));
        }
        if subordinate.is_some() && !all.is_multiple_of(length) {
            return Err(format!("they are {all}, which must be a multiple of {length}"));
        }
        let count = all.min(u32::MAX - first) / length;
        if count < max_pods {
            return Err(format!("they are enough for {count} pods of {length} ids, maxPods is {max_pods}"));
        }
        Ok(Ranges { first, length, count })
    }

    fn start(self, index: u32) -> u32 {
        self.first + index * self.length
    }

    fn span(self, index: u32) -> Span {
        Span::of(self.start(index), self.length)
    }

    fn index(self, start: u32) -> Option<u32> {
        let behind = start.checked_sub(self.first)?;
        let index = behind / self.length;
        (behind.is_multiple_of(self.length) && index < self.count).then_some(index)
    }
}

/// Ids of the node, the last one not included.
#[derive(Clone, Copy)]
struct Span {
    from: u64,
    to: u64,
}

impl Span {
    fn of(first: u32, length: u32) -> Span {
        Span { from: first.into(), to: u64::from(first) + u64::from(length) }
    }

    fn overlaps(self, other: Span) -> bool {
        self.from < other.to && other.from < self.to
    }
}

/// The file in the pod's folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    uid_mappings: Vec<Mapping>,
    gid_mappings: Vec<Mapping>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mapping {
    host_id: u32,
    container_id: u32,
    length: u32,
}

impl Mapping {
    fn into_cri(self) -> cri::IdMapping {
        cri::IdMapping { host_id: self.host_id, container_id: self.container_id, length: self.length }
    }
}

impl Record {
    fn of(ranges: Ranges, index: u32) -> Record {
        let map = Mapping { host_id: ranges.start(index), container_id: 0, length: ranges.length };
        Record { uid_mappings: vec![map], gid_mappings: vec![map] }
    }

    /// Which of the ranges it names; pure.
    fn index(&self, ranges: Ranges) -> Result<u32, String> {
        let [map] = self.uid_mappings.as_slice() else {
            return Err("it must have one mapping of users".into());
        };
        if self.gid_mappings != self.uid_mappings || map.container_id != 0 {
            return Err("users and groups must have the same mapping, of 0".into());
        }
        let index = ranges.index(map.host_id).filter(|_| map.length == ranges.length);
        index.ok_or_else(|| format!("{} ids from {} are not of this node", map.length, map.host_id))
    }
}

/// Which pod has which ids; cloning is cheap.
#[derive(Clone)]
pub struct UserNamespaces(Arc<Inner>);

struct Inner {
    ranges: Ranges,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    by_pod: HashMap<String, Ids>,
    /// Why not all pods are in the map.
    unlisted: Option<String>,
}

/// What a pod has.
enum Ids {
    /// The range with this index.
    Range(u32),
    /// Others, as when ranges had another length before the agent was restarted.
    Foreign(Record),
    /// Any, for this reason.
    Unknown(String),
}

impl Taken {
    /// What all pods but this one have.
    fn others(&self, uid: &str, ranges: Ranges) -> Vec<Span> {
        let others = self.by_pod.iter().filter(|(u, _)| *u != uid);
        others.flat_map(|(_, ids)| ids.spans(ranges)).collect()
    }

    /// The index of a range for the pod: its own, or else one that nobody has, looked for from index `from` on; pure.
    fn choose(&self, uid: &str, known: Option<u32>, ranges: Ranges, from: u32) -> Result<u32, Error> {
        let others = self.others(uid, ranges);
        let free = |i: &u32| !others.iter().any(|o| o.overlaps(ranges.span(*i)));
        let own = match self.by_pod.get(uid) {
            Some(Ids::Range(i)) => Some(*i),
            _ => known.filter(free),
        };
        if let Some(own) = own {
            return Ok(own);
        }
        if let Some(why) = self.unlisted.clone() {
            return Err(Error::Unlisted { why });
        }
        for (other, ids) in &self.by_pod {
            if let Ids::Unknown(why) = ids
                && other != uid
            {
                return Err(Error::Unknown { uid: other.clone(), why: why.clone() });
            }
        }
        (from..ranges.count).chain(0..from).find(free).ok_or(Error::Exhausted(others.len()))
    }
}

impl Ids {
    fn spans(&self, ranges: Ranges) -> Vec<Span> {
        match self {
            Ids::Range(i) => vec![ranges.span(*i)],
            Ids::Foreign(r) => {
                let all = r.uid_mappings.iter().chain(&r.gid_mappings);
                all.map(|m| Span::of(m.host_id, m.length)).collect()
            }
            Ids::Unknown(_) => Vec::new(),
        }
    }
}

impl UserNamespaces {
    /// Reads what the node has and what its pods have of it. Blocking code.
    pub fn open(config: &Config) -> Result<UserNamespaces, AgentError> {
        let k = &config.kubelet;
        let length = k.user_namespaces.ids_per_pod();
        let bad = |why: String| AgentError::SubordinateIds { user: USER, why };
        let ranges = Ranges::new(subordinate_ids().map_err(bad)?, length, k.max_pods).map_err(bad)?;
        let mut taken = Taken::default();
        let pods = config.root_dir.join("pods");
        // Not fatal: pods that share the node's ids run without knowing.
        if let Err(e) = list(&pods, ranges, &mut taken.by_pod) {
            let why = format!("cannot list {}: {e}", pods.display());
            tracing::warn!(%why, "no pod gets a user namespace");
            taken.unlisted = Some(why);
        }
        Ok(UserNamespaces(Arc::new(Inner { ranges, taken: Mutex::new(taken) })))
    }

    /// What the pod has been given.
    pub fn of(&self, uid: &str) -> Option<cri::UserNamespace> {
        let ranges = self.0.ranges;
        let record = match self.0.taken.lock().by_pod.get(uid)? {
            Ids::Range(index) => Record::of(ranges, *index),
            // Its sandbox runs with these.
            Ids::Foreign(record) => record.clone(),
            Ids::Unknown(_) => return None,
        };
        let cri = |map: Vec<Mapping>| map.into_iter().map(Mapping::into_cri).collect();
        let (uids, gids) = (cri(record.uid_mappings), cri(record.gid_mappings));
        Some(cri::UserNamespace { mode: NamespaceMode::Pod as i32, uids, gids })
    }

    /// Gives the pod ids unless it has some; on disk when this returns. Blocking code.
    pub fn take(&self, uid: &str, pod_dir: &Path) -> Result<(), Error> {
        let ranges = self.0.ranges;
        let misfit = |why| Error::Record { path: pod_dir.join(FILE), why };
        let known = read(pod_dir)?.map(|r| r.index(ranges)).transpose().map_err(misfit)?;
        let (index, before) = {
            let mut taken = self.0.taken.lock();
            // Anywhere, so that files that a pod leaves behind seldom belong to the next one.
            let from = rand::random_range(0..ranges.count);
            let index = taken.choose(uid, known, ranges, from)?;
            (index, taken.by_pod.insert(uid.to_owned(), Ids::Range(index)))
        };
        if known == Some(index) {
            return Ok(());
        }
        let written = write(pod_dir, &Record::of(ranges, index));
        if written.is_err() && before.is_none() {
            self.0.taken.lock().by_pod.remove(uid);
        }
        written
    }

    /// Nothing of the pod runs any more: another may have its ids.
    pub fn release(&self, uid: &str, pod_dir: &Path) {
        // First the file: after a crash in between the ids are free as well.
        match std::fs::remove_file(pod_dir.join(FILE)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%uid, error = %e, "the pod's ids stay its own");
            }
            _ => drop(self.0.taken.lock().by_pod.remove(uid)),
        }
    }
}

/// What the pods of the folder have, as far as their records say.
fn list(pods: &Path, ranges: Ranges, by_pod: &mut HashMap<String, Ids>) -> io::Result<()> {
    let listing = match std::fs::read_dir(pods) {
        Ok(l) => l,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    for e in listing {
        let e = e?;
        let uid = e.file_name().to_string_lossy().into_owned();
        let ids = match read(&e.path()) {
            Ok(None) => continue,
            Ok(Some(record)) => match record.index(ranges) {
                Ok(index) => Ids::Range(index),
                Err(why) => {
                    tracing::warn!(%uid, %why, "the pod's ids do not fit; they stay its own until it is deleted");
                    Ids::Foreign(record)
                }
            },
            Err(e) => {
                let why = orlop_base::telemetry::chain(&e).to_string();
                tracing::warn!(%uid, %why, "the pod's ids are not known; no other pod gets a user namespace until it is deleted");
                Ids::Unknown(why)
            }
        };
        by_pod.insert(uid, ids);
    }
    Ok(())
}

fn read(pod_dir: &Path) -> Result<Option<Record>, Error> {
    let path = pod_dir.join(FILE);
    let bytes = match std::fs::read(&path) {
        Ok(b) => b,
        // Without a folder it is no pod.
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(source) => return Err(Error::Io { what: "read", path, source }),
    };
    let record = serde_json::from_slice(&bytes);
    record.map(Some).map_err(|e| Error::Record { path, why: e.to_string() })
}

fn write(pod_dir: &Path, record: &Record) -> Result<(), Error> {
    let bytes = serde_json::to_vec(record).unwrap_or_default();
    std::fs::create_dir_all(pod_dir).map_err(|source| Error::Io {
        what: "create",
        path: pod_dir.to_owned(),
        source,
    })?;
    Ok(durable::write_atomic(&pod_dir.join(FILE), &bytes, 0o600, Sync::Disk)?)
}

/// First id and number of the user's subordinate ids, as getsubids(1) gives them: they may come from a directory service. As
/// upstream, `None` without the user or the program.
fn subordinate_ids() -> Result<Option<(u32, u32)>, String> {
    let user = nix::unistd::User::from_name(USER).map_err(|e| format!("cannot look the user up: {e}"))?;
    if user.is_none() {
        return Ok(None);
    }
    let ask = |options: &[&str]| {
        let out = Command::new("getsubids").args(options).arg(USER).output();
        match out {
            Ok(o) if o.status.success() => Ok(Some(String::from_utf8_lossy(&o.stdout).into_owned())),
            Ok(o) => Err(format!("getsubids: {}", String::from_utf8_lossy(&o.stderr).trim())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(format!("getsubids: {e}")),
        }
    };
    match (ask(&[])?, ask(&["-g"])?) {
        (Some(users), Some(groups)) if users == groups => parse_subids(&users).map(Some),
        (Some(_), Some(_)) => Err("those of users and of groups differ".into()),
        _ => Ok(None),
    }
}

/// `0: kubelet 65536 7208960`: one line, one range.
fn parse_subids(text: &str) -> Result<(u32, u32), String> {
    let mut lines = text.trim().lines();
    let (Some(line), None) = (lines.next(), lines.next()) else {
        return Err(format!("{} ranges are given, one is wanted", text.trim().lines().count()));
    };
    let words: Vec<&str> = line.split_whitespace().collect();
    let numbers = match words.as_slice() {
        [_, _, first, count] => first.parse().ok().zip(count.parse().ok()),
        _ => None,
    };
    numbers.ok_or_else(|| format!("getsubids says {line:?}"))
}

/// What cannot be had together with `hostUsers: false`; pure. The API server refuses it as well, but manifests come without one.
pub fn refused(spec: &PodSpec) -> Option<String> {
    let own = spec.host_users == Some(false);
    let shared = [("hostNetwork", spec.host_network), ("hostPID", spec.host_pid), ("hostIPC", spec.host_ipc)];
    if let Some((field, _)) = shared.into_iter().find(|(_, on)| own && *on == Some(true)) {
        return Some(format!("{field} cannot be set when hostUsers is false"));
    }
    let containers = || spec.containers.iter().chain(spec.init_containers.iter().flatten());
    if own && containers().any(|c| c.volume_devices.as_ref().is_some_and(|d| !d.is_empty())) {
        return Some("volumeDevices cannot be set when hostUsers is false".into());
    }
    let unmasked = |c: &k8s_openapi::api::core::v1::Container| {
        c.security_context.as_ref().and_then(|s| s.proc_mount.as_deref()) == Some("Unmasked")
    };
    (!own && containers().any(unmasked)).then(|| "procMount: Unmasked needs hostUsers: false".into())
}

/// Why the runtime cannot give a pod of this handler a user namespace, in upstream's words; pure.
pub fn unsupported(handlers: &[(String, bool, bool)], handler: &str) -> Option<String> {
    let what = match handler {
        "" => "can't set `spec.hostUsers: false`, runtime does not support user namespaces".to_owned(),
        name => format!(
            "can't set `spec.hostUsers: false`, RuntimeClass handler {name:?} does not support user namespaces"
        ),
    };
    match handlers.iter().find(|(name, ..)| name == handler) {
        Some((_, _, true)) => None,
        Some(_) => Some(what),
        // Runtimes that are older than the question say nothing of handlers.
        None if handlers.is_empty() => Some(what),
        None => Some(format!("{what}: the handler {handler:?} is not known")),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use serde_json::json;

    fn table(ranges: Ranges) -> UserNamespaces {
        UserNamespaces(Arc::new(Inner { ranges, taken: Mutex::default() }))
    }

    #[test]
    fn ranges_of_the_node() {
        let all = Ranges::new(None, UNIT, 110).unwrap();
        assert_eq!((all.first, all.count), (65536, 65534));
        assert!(all.start(all.count - 1).checked_add(UNIT).is_some(), "the last id is nobody's");
        assert_eq!((all.index(65536 * 3), all.index(65536 * 3 + 1), all.index(0)), (Some(2), None, None));
        assert_eq!(Ranges::new(Some((65536, 65536 * 110)), UNIT, 110).unwrap().count, 110);
        for (subordinate, length, says) in [
            (Some((65537, 65536 * 110)), UNIT, "begin at 65537"),
            (Some((0, 65536 * 110)), UNIT, "above 0"),
            (Some((65536, 100)), UNIT, "they are 100"),
            (Some((65536, 65536 * 109)), UNIT, "109 pods"),
            (None, 1 << 30, "pods of"),
        ] {
            let said = Ranges::new(subordinate, length, 110).unwrap_err();
            assert!(said.contains(says), "{said}");
        }
        assert_eq!(parse_subids("0: kubelet 65536 7208960\n").unwrap(), (65536, 7_208_960));
        for bad in ["", "0: kubelet 1 2\n1: kubelet 3 4\n", "0: kubelet x 2", "kubelet 1 2"] {
            assert!(parse_subids(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn pods_keep_their_ids_and_share_none() {
        let t = tempfile::tempdir().unwrap();
        let mut config = Config::new("n", None);
        config.root_dir = t.path().to_owned();
        config.kubelet.max_pods = 3;
        let dir = |uid: &str| config.pod_dir(uid);
        let three = Ranges::new(Some((65536, 3 * 65536)), UNIT, 3).unwrap();
        let users = table(three);
        for uid in ["a", "b", "c"] {
            users.take(uid, &dir(uid)).unwrap();
        }
        let firsts: HashSet<u32> =
            ["a", "b", "c"].iter().map(|u| users.of(u).unwrap().uids[0].host_id).collect();
        assert_eq!(firsts, HashSet::from([65536, 131_072, 196_608]));
        let said = users.take("d", &dir("d")).unwrap_err().to_string();
        assert!(said.contains("3 pods have all"), "{said}");

        // Another agent on the same folders.
        let again = UserNamespaces::open(&config).unwrap();
        for uid in ["a", "b", "c"] {
            assert_eq!(again.of(uid), users.of(uid));
            again.take(uid, &dir(uid)).unwrap();
            assert_eq!(again.of(uid), users.of(uid));
        }
        users.release("b", &dir("b"));
        users.take("d", &dir("d")).unwrap();
        assert_eq!(users.of("d"), again.of("b"));
        assert_eq!(users.of("b"), None);
    }

    #[test]
    fn ids_of_another_length_stay_the_pods_own() {
        let t = tempfile::tempdir().unwrap();
        let mut config = Config::new("n", None);
        config.root_dir = t.path().to_owned();
        config.kubelet.max_pods = 3;
        let dir = |uid: &str| config.pod_dir(uid);
        // Before: six short ranges, of which the third and the fourth are pods'.
        let short = Ranges::new(Some((131_072, 6 * 65536)), UNIT, 3).unwrap();
        for (uid, index) in [("a", 2), ("b", 3)] {
            write(&dir(uid), &Record::of(short, index)).unwrap();
        }
        // No pod's.
        std::fs::write(t.path().join("pods/file"), "").unwrap();
        let long = Ranges::new(Some((131_072, 6 * 65536)), 2 * UNIT, 3).unwrap();
        let mut by_pod = HashMap::new();
        list(&t.path().join("pods"), long, &mut by_pod).unwrap();
        let users = UserNamespaces(Arc::new(Inner {
            ranges: long,
            taken: Mutex::new(Taken { by_pod, unlisted: None }),
        }));
        let own = users.of("b").unwrap().uids[0];
        assert_eq!((own.host_id, own.length), (327_680, UNIT));
        let said = users.take("b", &dir("b")).unwrap_err().to_string();
        assert!(said.contains("not of this node") && said.contains("delete the pod"), "{said}");
        for uid in ["c", "d"] {
            users.take(uid, &dir(uid)).unwrap();
            assert_ne!(users.of(uid).unwrap().uids[0].host_id, 262_144, "of a or b");
        }
        // The first short range of the long one is b's still after a has gone.
        assert!(matches!(users.take("e", &dir("e")), Err(Error::Exhausted(_))));
        users.release("a", &dir("a"));
        assert!(matches!(users.take("e", &dir("e")), Err(Error::Exhausted(_))));
        users.release("b", &dir("b"));
        users.take("e", &dir("e")).unwrap();
        assert_eq!(users.of("e").unwrap().uids[0].host_id, 262_144);
    }

    #[test]
    fn none_are_given_away_while_somebodys_are_not_known() {
        let t = tempfile::tempdir().unwrap();
        let mut config = Config::new("n", None);
        config.root_dir = t.path().to_owned();
        config.kubelet.max_pods = 3;
        let dir = |uid: &str| config.pod_dir(uid);
        UserNamespaces::open(&config).unwrap().take("old", &dir("old")).unwrap();
        std::fs::create_dir_all(dir("broken")).unwrap();
        std::fs::write(dir("broken").join(FILE), "{").unwrap();
        let users = UserNamespaces::open(&config).unwrap();
        users.take("old", &dir("old")).unwrap();
        let said = users.take("new", &dir("new")).unwrap_err().to_string();
        assert!(said.contains("those of pod broken") && said.contains("delete that pod"), "{said}");
        assert!(!dir("new").join(FILE).exists());
        users.release("broken", &dir("broken"));
        users.take("new", &dir("new")).unwrap();

        // A folder that cannot be listed.
        let pods = t.path().join("pods");
        std::fs::rename(&pods, t.path().join("aside")).unwrap();
        std::fs::write(&pods, "").unwrap();
        let users = UserNamespaces::open(&config).unwrap();
        let said = users.take("new", &dir("new")).unwrap_err().to_string();
        assert!(said.contains("cannot list") && said.contains("restart the agent"), "{said}");
    }

    #[test]
    fn a_broken_record_is_named() {
        let t = tempfile::tempdir().unwrap();
        let ranges = Ranges::new(None, UNIT, 3).unwrap();
        let one = |host: u32, inside: u32| json!([{"hostId": host, "containerId": inside, "length": 65536}]);
        for bad in [
            json!({}),
            json!({"uidMappings": [], "gidMappings": []}),
            json!({"uidMappings": one(65536, 0), "gidMappings": one(131_072, 0)}),
            json!({"uidMappings": one(65536, 1), "gidMappings": one(65536, 1)}),
            json!({"uidMappings": one(5, 0), "gidMappings": one(5, 0)}),
        ] {
            std::fs::write(t.path().join(FILE), bad.to_string()).unwrap();
            let said = table(ranges).take("a", t.path()).unwrap_err().to_string();
            assert!(said.contains("userns") && said.contains("delete the pod"), "{bad}: {said}");
        }
        let good = json!({"uidMappings": one(65536, 0), "gidMappings": one(65536, 0)}).to_string();
        std::fs::write(t.path().join(FILE), good).unwrap();
        let users = table(ranges);
        users.take("a", t.path()).unwrap();
        assert_eq!(users.of("a").unwrap().gids[0].host_id, 65536);
    }

    #[test]
    fn what_does_not_go_together() {
        let of = |spec: serde_json::Value| {
            let mut spec = spec;
            let containers = json!([{"name": "c"}]);
            spec["containers"] = spec.get("containers").cloned().unwrap_or(containers);
            refused(&serde_json::from_value(spec).unwrap())
        };
        let unmasked = json!([{"name": "c", "securityContext": {"procMount": "Unmasked"}}]);
        let raw = json!([{"name": "c", "volumeDevices": [{"name": "d", "devicePath": "/d"}]}]);
        assert_eq!(of(json!({"hostUsers": false})), None);
        assert_eq!(of(json!({"hostUsers": true, "hostNetwork": true})), None);
        assert_eq!(of(json!({"hostUsers": false, "containers": unmasked})), None);
        for (spec, says) in [
            (json!({"hostUsers": false, "hostNetwork": true}), "hostNetwork cannot"),
            (json!({"hostUsers": false, "hostPID": true}), "hostPID cannot"),
            (json!({"hostUsers": false, "hostIPC": true}), "hostIPC cannot"),
            (json!({"hostUsers": false, "containers": raw}), "volumeDevices cannot"),
            (json!({"containers": unmasked}), "procMount: Unmasked needs"),
        ] {
            let said = of(spec).unwrap();
            assert!(said.starts_with(says), "{said}");
        }
    }

    #[test]
    fn runtimes_say_whether_they_can() {
        let handlers = [(String::new(), true, true), ("old".to_owned(), true, false)];
        assert_eq!(unsupported(&handlers, ""), None);
        assert!(unsupported(&handlers, "old").unwrap().contains("handler \"old\" does not support"));
        assert!(unsupported(&handlers, "new").unwrap().ends_with("the handler \"new\" is not known"));
        assert!(unsupported(&[], "").unwrap().ends_with("runtime does not support user namespaces"));
    }
}
