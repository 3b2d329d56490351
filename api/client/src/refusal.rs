//! A watch's user that lacks a right: told when it lasts and not at every try, as only somebody else can give the right.

use std::time::{Duration, Instant};

use kube::runtime::watcher;

/// An API server that starts refuses everything until it has read who may do what, which is no news to anybody.
const LASTING: Duration = Duration::from_secs(2);
/// Tries are less than this apart (kube's default backoff: 30 seconds and as much again at random).
const APART: Duration = Duration::from_secs(180);

/// Whether the API server refuses a watch.
#[derive(Debug, Default)]
pub struct Refusal {
    current: Option<Current>,
}

#[derive(Debug)]
struct Current {
    first: Instant,
    last: Instant,
    told: bool,
}

impl Refusal {
    /// What the API server says when the user lacks the right, once: `None` for other failures, for a refusal that may pass, and for
    /// the same until [`Refusal::answered`].
    pub fn begins<'a>(&mut self, e: &'a watcher::Error) -> Option<&'a str> {
        self.begins_at(e, Instant::now())
    }

    fn begins_at<'a>(&mut self, e: &'a watcher::Error, now: Instant) -> Option<&'a str> {
        let message = message(e)?;
        // A watch that goes on where it was says nothing until something changes.
        self.current.take_if(|c| now.duration_since(c.last) > APART);
        let current = self.current.get_or_insert(Current { first: now, last: now, told: false });
        current.last = now;
        let lasts = now.duration_since(current.first) >= LASTING;
        (lasts && !std::mem::replace(&mut current.told, true)).then_some(message)
    }

    /// The API server has answered: the next refusal is a new one.
    pub fn answered(&mut self) {
        self.current = None;
    }
}

/// What the API server says when the user lacks a right; pure.
pub fn message(e: &watcher::Error) -> Option<&str> {
    let status = match e {
        watcher::Error::InitialListFailed(kube::Error::Api(s))
        | watcher::Error::WatchStartFailed(kube::Error::Api(s))
        | watcher::Error::WatchFailed(kube::Error::Api(s))
        | watcher::Error::WatchError(s) => s,
        _ => return None,
    };
    (status.code == 403).then_some(&status.message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_right_is_told_once_when_it_lasts() {
        let failed = |code: u16| {
            let status = kube::core::Status::failure("secrets is forbidden", "Forbidden").with_code(code);
            watcher::Error::InitialListFailed(kube::Error::Api(status.boxed()))
        };
        let start = Instant::now();
        let mut refusal = Refusal::default();
        let mut told = |code: u16, seconds: u64| {
            refusal.begins_at(&failed(code), start + Duration::from_secs(seconds)).map(str::to_owned)
        };
        let text = Some("secrets is forbidden".to_owned());
        assert_eq!([told(500, 0), told(403, 10), told(500, 20)], [None, None, None]);
        assert_eq!([told(403, 21), told(403, 22), told(500, 23)], [text.clone(), None, None]);
        // Of one that passed without an answer, nothing is left; one that goes on for long is still the same.
        assert_eq!([told(403, 400), told(403, 402), told(403, 500)], [None, text.clone(), None]);
        refusal.answered();
        let mut told =
            |seconds: u64| refusal.begins_at(&failed(403), start + Duration::from_secs(seconds)).is_some();
        assert_eq!([told(501), told(502), told(503)], [false, false, true]);
    }
}
