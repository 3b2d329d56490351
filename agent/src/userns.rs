//! User namespaces of pods (KEP-127): a pod with `hostUsers: false` gets a range of the node's user and group ids to itself,
//! which stays its own until nothing of it runs.
//!
//! The range lies in the pod's folder in the form of upstream's kubelet, so that either can take over the other's pods.

use std::collections::{HashMap, HashSet};
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

    fn index(self, start: u32) -> Option<u32> {
        let behind = start.checked_sub(self.first)?;
        let index = behind / self.length;
        (behind.is_multiple_of(self.length) && index < self.count).then_some(index)
    }
}

/// The file in the pod's folder.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
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
    /// Index of the range by the pod's uid.
    taken: Mutex<HashMap<String, u32>>,
}

impl UserNamespaces {
    /// Reads what the node has and what its pods have of it. Blocking code.
    pub fn open(config: &Config) -> Result<UserNamespaces, AgentError> {
        let k = &config.kubelet;
        let length = k.user_namespaces.ids_per_pod();
        let bad = |why: String| AgentError::SubordinateIds { user: USER, why };
        let ranges = Ranges::new(subordinate_ids().map_err(bad)?, length, k.max_pods).map_err(bad)?;
        let mut taken = HashMap::new();
        for e in std::fs::read_dir(config.root_dir.join("pods")).into_iter().flatten().flatten() {
            match read(&e.path(), ranges) {
                Ok(index) => taken.extend(e.file_name().into_string().ok().zip(index)),
                // Not fatal: it is the pod's own trouble, which is told when its containers start.
                Err(e) => {
                    tracing::warn!(error = %orlop_base::telemetry::chain(&e), "a pod's ids are not known")
                }
            }
        }
        Ok(UserNamespaces(Arc::new(Inner { ranges, taken: Mutex::new(taken) })))
    }

    /// What the pod has been given.
    pub fn of(&self, uid: &str) -> Option<cri::UserNamespace> {
        let index = *self.0.taken.lock().get(uid)?;
        let ranges = self.0.ranges;
        let map =
            vec![cri::IdMapping { host_id: ranges.start(index), container_id: 0, length: ranges.length }];
        Some(cri::UserNamespace { mode: NamespaceMode::Pod as i32, uids: map.clone(), gids: map })
    }

    /// Gives the pod ids unless it has some; on disk when this returns. Blocking code.
    pub fn take(&self, uid: &str, pod_dir: &Path) -> Result<(), Error> {
        let ranges = self.0.ranges;
        let known = read(pod_dir, ranges)?;
        let index = {
            let mut taken = self.0.taken.lock();
            let others: HashSet<u32> = taken.iter().filter(|(u, _)| *u != uid).map(|(_, i)| *i).collect();
            let own = taken.get(uid).copied().or(known.filter(|k| !others.contains(k)));
            // Anywhere, so that files that a pod leaves behind seldom belong to the next one.
            let from = rand::random_range(0..ranges.count);
            let free = own.or_else(|| (from..ranges.count).chain(0..from).find(|i| !others.contains(i)));
            let index = free.ok_or(Error::Exhausted(others.len()))?;
            taken.insert(uid.to_owned(), index);
            index
        };
        if known == Some(index) {
            return Ok(());
        }
        let written = write(pod_dir, &Record::of(ranges, index));
        if written.is_err() {
            self.0.taken.lock().remove(uid);
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
            _ => drop(self.0.taken.lock().remove(uid)),
        }
    }
}

fn read(pod_dir: &Path, ranges: Ranges) -> Result<Option<u32>, Error> {
    let path = pod_dir.join(FILE);
    let bytes = match std::fs::read(&path) {
        Ok(b) => b,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(Error::Io { what: "read", path, source }),
    };
    let record: Result<Record, String> = serde_json::from_slice(&bytes).map_err(|e| e.to_string());
    record.and_then(|r| r.index(ranges)).map(Some).map_err(|why| Error::Record { path, why })
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
