//! The right to transfer and unpack a layer, of which a store has a few.

use std::io;
use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::{Mutex, MutexGuard, OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::{Error, Result};

/// One of the store's slots. While its layer waits for another one's memory, somebody else has it.
pub(crate) struct Slot {
    all: Arc<Semaphore>,
    held: Option<OwnedSemaphorePermit>,
    stop: CancellationToken,
    runtime: Handle,
}

impl Slot {
    /// Waits for one; `stop` ends what it waits for later.
    pub async fn take(all: &Arc<Semaphore>, stop: CancellationToken) -> Result<Slot> {
        let held = all.clone().acquire_owned().await.map_err(|_| Error::Cancelled)?;
        Ok(Slot { all: all.clone(), held: Some(held), stop, runtime: Handle::current() })
    }

    /// Waits for `one` without the slot, and has it again afterwards. Blocking code.
    ///
    /// Whoever has `one` may wait for a slot, as nobody who has a slot waits for `one`.
    pub fn wait_for(&mut self, one: &'static Mutex<()>) -> io::Result<MutexGuard<'static, ()>> {
        if let Ok(got) = one.try_lock() {
            return Ok(got);
        }
        self.held = None;
        let both = async {
            let got = one.lock().await;
            self.all.clone().acquire_owned().await.map(|held| (got, held))
        };
        match self.runtime.block_on(self.stop.run_until_cancelled(both)) {
            Some(Ok((got, held))) => {
                self.held = Some(held);
                Ok(got)
            }
            _ => Err(io::Error::other(Error::Cancelled)),
        }
    }
}
