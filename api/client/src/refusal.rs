//! A watch's user that lacks a right: told when it begins and not at every try, as only somebody else can give the right.

use kube::runtime::watcher;

/// Whether the API server refuses a watch.
#[derive(Debug, Default)]
pub struct Refusal {
    refused: bool,
}

impl Refusal {
    /// What the API server says when the user lacks the right, once: `None` for other failures, and for the same until
    /// [`Refusal::answered`].
    pub fn begins<'a>(&mut self, e: &'a watcher::Error) -> Option<&'a str> {
        let message = message(e)?;
        (!std::mem::replace(&mut self.refused, true)).then_some(message)
    }

    /// The API server has answered: the next refusal is a new one.
    pub fn answered(&mut self) {
        self.refused = false;
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
    fn a_missing_right_is_told_once() {
        let failed = |code: u16| {
            let status = kube::core::Status::failure("secrets is forbidden", "Forbidden").with_code(code);
            watcher::Error::InitialListFailed(kube::Error::Api(status.boxed()))
        };
        let mut refusal = Refusal::default();
        assert_eq!(refusal.begins(&failed(500)), None);
        assert_eq!(refusal.begins(&failed(403)), Some("secrets is forbidden"));
        assert_eq!(refusal.begins(&failed(403)), None);
        assert_eq!(refusal.begins(&failed(500)), None);
        refusal.answered();
        assert_eq!(refusal.begins(&failed(403)), Some("secrets is forbidden"));
    }
}
