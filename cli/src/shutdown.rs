//! SIGTERM and SIGINT end a daemon in order.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::Failure;

/// A token that the first SIGTERM or SIGINT cancels.
pub fn on_signal() -> Result<CancellationToken, Failure> {
    let stop = CancellationToken::new();
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let token = stop.clone();
    // Lives as long as the process: there is nobody to await it.
    std::mem::drop(tokio::task::spawn(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        token.cancel();
    }));
    Ok(stop)
}
