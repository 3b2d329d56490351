//! Hooks after a container's start and after its end (OCI runtime spec, "Lifecycle"). Both run in the runtime's namespaces. Those at
//! its creation belong to [`crate::create`] and [`crate::init`].

use std::fs;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use libcontainer::container::{ContainerStatus, State};
use libcontainer::hooks::run_hooks;
use oci_spec::runtime::Hook;

use crate::kept::Kept;
use crate::ops::{Outcome, check_id};
use crate::{Error, Helper, Kind, convert, helper};

/// What a poststop hook without a limit may take, in seconds.
const EACH: i64 = 20;
/// What all poststop hooks of a container may take; then each that is left gets a second. Whoever cleans up after a monitor has a
/// minute, and must get done.
const ALL: Duration = Duration::from_secs(40);

/// Runs the poststart hooks of a container, in their order. The first that fails is the error.
pub fn poststart(root: &Path, id: &str, init: i32) -> Result<Helper, Error> {
    check_id(id)?;
    helper::run(&[], || {
        let done = Kept::load(root, id).and_then(|kept| {
            let state = kept.state(ContainerStatus::Running, Some(init));
            let failed = |text| Error::new(Kind::Runtime, "hook", format!("poststart hook {text}"), 0);
            kept.poststart.iter().try_for_each(|h| run(h.clone(), &state).map_err(failed))
        });
        (done.map(|()| Outcome::Done), None)
    })
}

/// Runs the poststop hooks of a container that is gone, once whoever else removes it; what failed, for the log.
///
/// The file that holds them is locked meanwhile and removed at the end: somebody else who comes to the same waits and finds nothing
/// left to do, and what somebody left undone who was killed is done again.
pub(crate) fn poststop(root: &Path, id: &str) -> Vec<String> {
    let at = Kept::path(root, id);
    let failed = |what: &str, e: &std::io::Error| vec![format!("cannot {what} {}: {e}", at.display())];
    let mut file = match fs::File::open(&at) {
        Ok(f) => f,
        Err(e) if e.kind() == ErrorKind::NotFound => return Vec::new(),
        Err(e) => return failed("open", &e),
    };
    let mut bytes = Vec::new();
    let taken = file.lock().and_then(|()| file.metadata()).and_then(|m| {
        file.read_to_end(&mut bytes)?;
        Ok(m.nlink() > 0)
    });
    match taken {
        Ok(true) => {}
        Ok(false) => return Vec::new(),
        Err(e) => return failed("read", &e),
    }
    let mut warnings = match Kept::parse(&bytes) {
        Ok(kept) => run_each(&kept.poststop, &kept.state(ContainerStatus::Stopped, None)),
        Err(e) => vec![format!("{}: {e}", at.display())],
    };
    if let Err(e) = fs::remove_file(&at) {
        warnings.extend(failed("remove", &e));
    }
    warnings
}

/// All of them, whatever becomes of the others.
fn run_each(hooks: &[Hook], state: &State) -> Vec<String> {
    let end = Instant::now() + ALL;
    let limited = |h: &Hook| {
        let left = end.saturating_duration_since(Instant::now()).as_secs() as i64;
        let mut h = h.clone();
        h.set_timeout(Some(h.timeout().unwrap_or(EACH).min(left).max(1)));
        h
    };
    hooks
        .iter()
        .filter_map(|h| run(limited(h), state).err())
        .map(|text| format!("poststop hook {text}"))
        .collect()
}

fn run(hook: Hook, state: &State) -> Result<(), String> {
    let path = hook.path().clone();
    run_hooks(Some(&vec![hook]), Some(state), None, None, None)
        .map_err(|e| format!("{}: {}", path.display(), convert::chain(&e)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(root: &Path, poststop: serde_json::Value) {
        let spec = serde_json::from_value(serde_json::json!({"ociVersion": "1.2.0"})).unwrap();
        let state = crate::kept::state("a", Path::new("/b"), &spec);
        let hooks = serde_json::from_value(poststop).unwrap();
        Kept::new(state, None, Vec::new(), hooks).unwrap().save(root).unwrap();
    }

    #[test]
    fn poststop_hooks_run_once_and_all_of_them() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let script = format!("cat >> {}", out.display());
        let hook = |script: &str| serde_json::json!({"path": "/bin/sh", "args": ["sh", "-c", script]});
        let mut slow = hook("exec /bin/sleep 100");
        slow["timeout"] = 1.into();
        kept(dir.path(), serde_json::json!([hook("exit 3"), slow, {"path": "/nonexistent"}, hook(&script)]));
        // At the same time, as a monitor's helper that outlives it and whoever cleans up after the monitor.
        let runs: Vec<Vec<String>> = std::thread::scope(|s| {
            let threads: Vec<_> = (0..3).map(|_| s.spawn(|| poststop(dir.path(), "a"))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let mut warnings: Vec<_> = runs.into_iter().filter(|w| !w.is_empty()).collect();
        let warnings = warnings.pop().filter(|_| warnings.is_empty()).expect("warnings of one run");
        let [exit, timeout, missing] = &warnings[..] else { panic!("{warnings:?}") };
        assert!(exit.contains("/bin/sh") && exit.contains('3'), "{exit}");
        assert!(timeout.contains("timeout") && missing.contains("/nonexistent"), "{warnings:?}");
        let told: serde_json::Value = serde_json::from_slice(&fs::read(&out).unwrap()).unwrap();
        assert_eq!(
            (&told["id"], &told["status"], &told["bundle"]),
            (&"a".into(), &"stopped".into(), &"/b".into())
        );
        assert!(told.get("pid").is_none(), "{told}");
        assert!(poststop(dir.path(), "a").is_empty() && !Kept::path(dir.path(), "a").exists());
        // A file that was being written when its writer was killed.
        fs::write(Kept::path(dir.path(), "a"), "{").unwrap();
        assert_eq!(poststop(dir.path(), "a").len(), 1);
        assert!(!Kept::path(dir.path(), "a").exists());
    }
}
