//! Named places where a test can make the program fail. Set by `ORLOP_FAILPOINTS="name=action;name=action"`, with the
//! actions `error` (the place returns an error), `kill` (SIGKILL to this process), `sleep(MS)`, each optionally `N*action`
//! to act only on the N-th pass. Unset, a place costs one relaxed load.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

/// Returned by a place whose action is `error`.
#[derive(Debug, thiserror::Error)]
#[error("failpoint {0} is set to fail")]
pub struct Failed(pub String);

#[derive(Clone, Debug, PartialEq)]
enum Action {
    Error,
    Kill,
    Sleep(Duration),
}

#[derive(Debug)]
struct Point {
    action: Action,
    /// 0: every pass; n: acts on the n-th pass from now.
    on_pass: u32,
    passes: u32,
}

static ACTIVE: AtomicBool = AtomicBool::new(false);
static POINTS: OnceLock<Mutex<HashMap<String, Point>>> = OnceLock::new();

fn parse(text: &str) -> Result<HashMap<String, Point>, String> {
    let mut points = HashMap::new();
    for item in text.split(';').map(str::trim).filter(|s| !s.is_empty()) {
        let (name, spec) = item.split_once('=').ok_or_else(|| format!("failpoint {item:?} has no '='"))?;
        let (on_pass, spec) = match spec.split_once('*') {
            Some((n, rest)) => {
                (n.parse().map_err(|_| format!("failpoint {item:?}: {n:?} is no number"))?, rest)
            }
            None => (0, spec),
        };
        let action = match spec {
            "error" => Action::Error,
            "kill" => Action::Kill,
            s => {
                match s.strip_prefix("sleep(").and_then(|s| s.strip_suffix(')')).and_then(|s| s.parse().ok())
                {
                    Some(ms) => Action::Sleep(Duration::from_millis(ms)),
                    None => return Err(format!("failpoint {item:?}: unknown action {s:?}")),
                }
            }
        };
        points.insert(name.to_owned(), Point { action, on_pass, passes: 0 });
    }
    Ok(points)
}

/// Reads `ORLOP_FAILPOINTS` once; called at the start of a program.
pub fn init_from_env() -> Result<(), String> {
    if let Ok(text) = std::env::var("ORLOP_FAILPOINTS") {
        set(&text)?;
    }
    Ok(())
}

/// Replaces all failpoints by those of `text`.
pub fn set(text: &str) -> Result<(), String> {
    let points = parse(text)?;
    ACTIVE.store(!points.is_empty(), Ordering::Relaxed);
    *POINTS.get_or_init(Default::default).lock().unwrap_or_else(|e| e.into_inner()) = points;
    Ok(())
}

/// Marks a place. Blocks the thread for `sleep`, so keep it off latency-critical async paths.
pub fn pass(name: &str) -> Result<(), Failed> {
    if !ACTIVE.load(Ordering::Relaxed) {
        return Ok(());
    }
    let action = {
        let mut points = POINTS.get_or_init(Default::default).lock().unwrap_or_else(|e| e.into_inner());
        let Some(p) = points.get_mut(name) else { return Ok(()) };
        p.passes += 1;
        if p.on_pass != 0 && p.on_pass != p.passes {
            return Ok(());
        }
        p.action.clone()
    };
    match action {
        Action::Error => Err(Failed(name.to_owned())),
        Action::Kill => {
            let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
            Ok(())
        }
        Action::Sleep(d) => {
            std::thread::sleep(d);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grammar() {
        let p = parse("a=error; b=2*sleep(5)").unwrap();
        assert_eq!(p["a"].action, Action::Error);
        assert_eq!((p["b"].on_pass, &p["b"].action), (2, &Action::Sleep(Duration::from_millis(5))));
        assert!(parse("a").is_err());
        assert!(parse("a=explode").is_err());
    }
}
