//! Devices by the Container Device Interface (CDI specification 1.0): a vendor describes in a file what a device takes, the
//! kubelet names the device, and the runtime edits the OCI spec accordingly.
//!
//! The folders are read whenever a container names a device: that is rare, and a driver may have rewritten them just now.

mod edit;
mod format;

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use orlop_proto::cri;

use crate::error::{Error, Result};
use format::File;

/// Annotations that name devices for runtimes older than the CRI's own field.
const ANNOTATION: &str = "cdi.k8s.io/";

fn invalid(text: String) -> Error {
    Error::Invalid(text)
}

/// The devices a container names, each once: the CRI's field first, then annotations by their key.
pub(crate) fn requested(config: &cri::ContainerConfig) -> Result<Vec<String>> {
    let mut all: Vec<String> = config.cdi_devices.iter().map(|d| d.name.clone()).collect();
    let mut annotations: Vec<_> =
        config.annotations.iter().filter(|(k, _)| k.starts_with(ANNOTATION)).collect();
    annotations.sort();
    for (_, value) in annotations {
        all.extend(value.split(',').map(|name| name.trim().to_owned()));
    }
    for name in &all {
        format::qualified(name).map_err(|e| invalid(format!("CDI device: {e}")))?;
    }
    let mut seen = HashSet::new();
    all.retain(|name| seen.insert(name.clone()));
    Ok(all)
}

/// One spec file that could be read.
struct Known {
    path: PathBuf,
    /// Of its folder; the higher wins.
    priority: usize,
    file: File,
}

/// All that the folders hold.
#[derive(Default)]
struct Registry {
    known: Vec<Known>,
    /// Files that cannot be used, and why.
    broken: Vec<String>,
}

impl Registry {
    /// Later folders count more than earlier ones. A missing folder is empty.
    fn read(dirs: &[PathBuf]) -> Registry {
        let mut out = Registry::default();
        for (priority, dir) in dirs.iter().enumerate() {
            let mut paths: Vec<PathBuf> =
                fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
            paths.sort();
            for path in paths {
                let json = match path.extension().and_then(|e| e.to_str()) {
                    Some("json") => true,
                    Some("yaml") => false,
                    _ => continue,
                };
                let parsed = fs::read_to_string(&path)
                    .map_err(|e| e.to_string())
                    .and_then(|text| File::parse(&text, json));
                match parsed {
                    Ok(file) => out.known.push(Known { path, priority, file }),
                    Err(why) => out.broken.push(format!("{}: {why}", path.display())),
                }
            }
        }
        out
    }

    /// Where `name` is: the file's place in the list and the device's in it.
    fn find(&self, name: &str, dirs: &[PathBuf]) -> Result<(usize, usize)> {
        let mut found: Vec<(usize, usize)> = Vec::new();
        for (at, k) in self.known.iter().enumerate() {
            let Some(device) = name.strip_prefix(&k.file.kind).and_then(|rest| rest.strip_prefix('=')) else {
                continue;
            };
            if let Some(d) = k.file.devices.iter().position(|d| d.name == device) {
                found.push((at, d));
            }
        }
        let best = found.iter().map(|(at, _)| self.known[*at].priority).max();
        found.retain(|(at, _)| Some(self.known[*at].priority) == best);
        match found.as_slice() {
            [one] => Ok(*one),
            [] => {
                let dirs: Vec<_> = dirs.iter().map(|d| d.display().to_string()).collect();
                let mut text = format!("CDI device {name} is in no spec file of {}", dirs.join(", "));
                if !self.broken.is_empty() {
                    text.push_str(&format!("; not usable: {}", self.broken.join("; ")));
                }
                Err(invalid(text))
            }
            several => {
                let files: Vec<_> =
                    several.iter().map(|(at, _)| self.known[*at].path.display().to_string()).collect();
                Err(invalid(format!("CDI device {name} is in several files: {}", files.join(", "))))
            }
        }
    }
}

/// Edits `spec` for the devices `names`. Either all are there or nothing is changed.
pub(crate) fn inject(spec: &mut Spec, names: &[String], dirs: &[PathBuf]) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let registry = Registry::read(dirs);
    let places = names.iter().map(|n| registry.find(n, dirs)).collect::<Result<Vec<_>>>()?;
    let mut edited = HashSet::new();
    for (name, (at, device)) in names.iter().zip(places) {
        let file = &registry.known[at].file;
        let context = |e: Error| invalid(format!("CDI device {name}: {e}"));
        if edited.insert(at) {
            edit::apply(&file.container_edits, spec).map_err(context)?;
        }
        edit::apply(&file.devices[device].container_edits, spec).map_err(context)?;
    }
    edit::order_mounts(spec);
    Ok(())
}

/// The folders that the specification names, the second for what drivers write at run time.
pub(crate) fn default_dirs() -> Vec<PathBuf> {
    ["/etc/cdi", "/var/run/cdi"].map(|d| Path::new(d).to_owned()).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec() -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.2.0", "root": {"path": "/r"},
            "process": {"cwd": "/", "args": ["a"], "env": ["A=old"], "user": {"uid": 7, "gid": 8}},
            "mounts": [{"destination": "/a/b", "source": "/x", "type": "bind"}],
            "linux": {"resources": {"devices": [{"allow": false, "access": "rwm"}]}},
        }))
        .unwrap()
    }

    fn put(dir: &Path, name: &str, kind: &str, device: &str, edits: serde_json::Value) {
        let text = json!({"cdiVersion": "1.0.0", "kind": kind, "containerEdits": {"env": ["ALL=1"]},
            "devices": [{"name": device, "containerEdits": edits}]});
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join(name), text.to_string()).unwrap();
    }

    #[test]
    fn everything_a_file_may_ask_for() {
        let dir = tempfile::tempdir().unwrap();
        let edits = json!({
            "env": ["A=new", "B=2"],
            "deviceNodes": [{"path": "/dev/mine", "hostPath": "/dev/null", "permissions": "rw"},
                {"path": "/dev/made", "type": "c", "major": 5, "minor": 6, "fileMode": 384, "uid": 0, "gid": 0}],
            "mounts": [{"hostPath": "/lib", "containerPath": "/a", "options": ["ro", "rbind"]}],
            "hooks": [{"hookName": "createContainer", "path": "/bin/hook", "args": ["hook", "x"], "timeout": 3}],
            "additionalGids": [0, 44, 44],
            "intelRdt": {"closID": "c", "enableMBM": true},
        });
        put(dir.path(), "a.json", "v.com/dev", "one", edits);
        let dirs = [dir.path().join("missing"), dir.path().to_owned()];
        let mut s = spec();
        inject(&mut s, &["v.com/dev=one".into()], &dirs).unwrap();
        let p = s.process().as_ref().unwrap();
        assert_eq!(p.env().clone().unwrap(), ["A=new", "ALL=1", "B=2"]);
        assert_eq!(p.user().additional_gids().clone().unwrap(), [44]);
        let linux = s.linux().as_ref().unwrap();
        let nodes = linux.devices().as_ref().unwrap();
        // Of the host where the file does not say; the process's where nothing says whose it is.
        assert_eq!(
            (nodes[0].major(), nodes[0].minor(), nodes[0].uid(), nodes[0].gid()),
            (1, 3, Some(7), Some(8))
        );
        assert_eq!((nodes[1].major(), nodes[1].file_mode(), nodes[1].uid()), (5, Some(0o600), Some(0)));
        let rules = linux.resources().as_ref().unwrap().devices().clone().unwrap();
        assert_eq!(rules.len(), 3);
        assert_eq!((rules[1].allow(), rules[1].access().as_deref()), (true, Some("rw")));
        let mounts: Vec<_> =
            s.mounts().iter().flatten().map(|m| m.destination().display().to_string()).collect();
        assert_eq!(mounts, ["/a", "/a/b"]);
        let hooks = s.hooks().as_ref().unwrap().create_container().clone().unwrap();
        assert_eq!((hooks[0].path().to_str(), hooks[0].timeout()), (Some("/bin/hook"), Some(3)));
        assert_eq!(linux.intel_rdt().as_ref().unwrap().clos_id().as_deref(), Some("c"));
    }

    #[test]
    fn which_file_counts() {
        let dir = tempfile::tempdir().unwrap();
        let (low, high) = (dir.path().join("low"), dir.path().join("high"));
        put(&low, "a.json", "v/c", "d", json!({"env": ["FROM=low"]}));
        put(&high, "a.json", "v/c", "d", json!({"env": ["FROM=high"]}));
        put(&low, "x.json", "v/x", "d", json!({}));
        put(&low, "y.json", "v/x", "d", json!({}));
        fs::write(low.join("broken.json"), "{").unwrap();
        let dirs = [low, high];
        let mut s = spec();
        inject(&mut s, &["v/c=d".into()], &dirs).unwrap();
        assert!(s.process().as_ref().unwrap().env().as_ref().unwrap().contains(&"FROM=high".to_owned()));
        let before = spec();
        for (name, says) in
            [("v/x=d", "several files"), ("v/c=none", "broken.json"), ("w/c=d", "no spec file")]
        {
            let mut s = before.clone();
            let e = inject(&mut s, &["v/c=d".into(), name.into()], &dirs).unwrap_err();
            assert!(e.to_string().contains(says) && e.to_string().contains(name), "{e}");
            assert_eq!(s, before);
        }
    }

    #[test]
    fn devices_by_field_and_annotation() {
        let mut config = cri::ContainerConfig {
            cdi_devices: vec![cri::CdiDevice { name: "v/c=1".into() }],
            ..Default::default()
        };
        config.annotations.insert("cdi.k8s.io/b".into(), "v/c=3,v/c=1".into());
        config.annotations.insert("cdi.k8s.io/a".into(), "v/c=2".into());
        config.annotations.insert("other".into(), "v/c=9".into());
        assert_eq!(requested(&config).unwrap(), ["v/c=1", "v/c=2", "v/c=3"]);
        config.annotations.insert("cdi.k8s.io/c".into(), "nonsense".into());
        assert!(requested(&config).is_err());
    }
}
