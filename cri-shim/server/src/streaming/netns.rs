//! Work inside another network namespace, on a thread that ends with it.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::sync::oneshot;

/// Runs `work` in the namespace pinned at `pin`. The thread is not reused: it never comes back out of the namespace.
pub(crate) async fn inside<T, F>(pin: PathBuf, work: F) -> io::Result<T>
where
    F: FnOnce() -> io::Result<T> + Send + 'static,
    T: Send + 'static,
{
    let (tell, told) = oneshot::channel();
    std::thread::Builder::new().name("netns".into()).stack_size(128 << 10).spawn(move || {
        let result = File::open(&pin)
            .and_then(|ns| {
                use std::os::fd::AsFd;
                move_into_link_name_space(ns.as_fd(), Some(LinkNameSpaceType::Network))
                    .map_err(io::Error::from)
            })
            .and_then(|()| work());
        // Nobody waiting any more is fine.
        let _ = tell.send(result);
    })?;
    told.await.unwrap_or_else(|_| Err(io::Error::other("the thread in the pod's namespace died")))
}
