//! The right to transfer and unpack a layer, of which a store has a few.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{Mutex as AsyncMutex, MutexGuard, oneshot};
use tokio_util::sync::CancellationToken;

use crate::{Error, Result};

/// Slots above the usual number, for pulls that have none: a registry that is slow does not stop the pulls from others.
const SPARE: usize = 5;

/// All slots of a store. Whose pull has the fewest comes first, then who has waited longest.
pub(crate) struct Slots {
    limit: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    pulls: u64,
    taken: usize,
    by_pull: HashMap<u64, usize>,
    waiting: Vec<Waiting>,
}

struct Waiting {
    pull: u64,
    tell: oneshot::Sender<Permit>,
}

struct Permit {
    slots: Arc<Slots>,
    pull: u64,
}

impl Drop for Permit {
    fn drop(&mut self) {
        {
            let mut state = self.slots.state.lock();
            state.taken -= 1;
            if let Some(n) = state.by_pull.get_mut(&self.pull) {
                *n -= 1;
                if *n == 0 {
                    state.by_pull.remove(&self.pull);
                }
            }
        }
        self.slots.grant();
    }
}

impl State {
    fn has(&self, pull: u64) -> usize {
        self.by_pull.get(&pull).copied().unwrap_or(0)
    }

    /// Who gets a slot now.
    fn next(&mut self, limit: usize) -> Option<Waiting> {
        self.waiting.retain(|w| !w.tell.is_closed());
        // Of several with the fewest this is the first.
        let (at, has) =
            self.waiting.iter().map(|w| self.has(w.pull)).enumerate().min_by_key(|(_, has)| *has)?;
        let room = if has == 0 { limit + SPARE } else { limit };
        (self.taken < room).then(|| self.waiting.remove(at))
    }
}

impl Slots {
    pub fn new(limit: usize) -> Arc<Slots> {
        Arc::new(Slots { limit: limit.max(1), state: Mutex::default() })
    }

    /// A number for a pull, which has its slots by it.
    pub fn pull(&self) -> u64 {
        let mut state = self.state.lock();
        state.pulls += 1;
        state.pulls
    }

    /// Whether a pull waits that has no slot at all.
    pub fn starving(&self) -> bool {
        let state = self.state.lock();
        state.waiting.iter().any(|w| !w.tell.is_closed() && state.has(w.pull) == 0)
    }

    fn grant(self: &Arc<Self>) {
        let mut granted = Vec::new();
        {
            let mut state = self.state.lock();
            while let Some(Waiting { pull, tell }) = state.next(self.limit) {
                state.taken += 1;
                *state.by_pull.entry(pull).or_default() += 1;
                granted.push((tell, Permit { slots: self.clone(), pull }));
            }
        }
        for (tell, permit) in granted {
            // Whoever has gone away gives it back by that.
            let _ = tell.send(permit);
        }
    }

    async fn acquire(self: &Arc<Self>, pull: u64) -> Result<Permit> {
        let (tell, told) = oneshot::channel();
        self.state.lock().waiting.push(Waiting { pull, tell });
        self.grant();
        told.await.map_err(|_| Error::Cancelled)
    }

    #[cfg(test)]
    pub fn taken(&self) -> usize {
        self.state.lock().taken
    }
}

/// One of the store's slots. While its layer waits for another one's memory, somebody else has it.
pub(crate) struct Slot {
    all: Arc<Slots>,
    pull: u64,
    held: Option<Permit>,
    stop: CancellationToken,
    runtime: Handle,
}

impl Slot {
    /// Waits for one; `stop` ends what it waits for later.
    pub async fn take(all: &Arc<Slots>, pull: u64, stop: CancellationToken) -> Result<Slot> {
        let held = Some(all.acquire(pull).await?);
        Ok(Slot { all: all.clone(), pull, held, stop, runtime: Handle::current() })
    }

    /// Waits for `one` without the slot, and has it again afterwards. Blocking code.
    ///
    /// Whoever has `one` may wait for a slot, as nobody who has a slot waits for `one`.
    pub fn wait_for(&mut self, one: &'static AsyncMutex<()>) -> io::Result<MutexGuard<'static, ()>> {
        if let Ok(got) = one.try_lock() {
            return Ok(got);
        }
        self.held = None;
        let both = async {
            let got = one.lock().await;
            self.all.acquire(self.pull).await.map(|held| (got, held))
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

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn no_pull_is_kept_from_a_slot_by_others() {
        let slots = Slots::new(2);
        let (a, b) = (slots.pull(), slots.pull());
        let take = |pull| Slot::take(&slots, pull, CancellationToken::new()).boxed();
        let (one, two) = (take(a).await.unwrap(), take(a).await.unwrap());
        let (mut third, mut of_b) = (take(a), take(b));
        assert!(futures::poll!(&mut third).is_pending());
        assert!(!slots.starving());
        // One above the limit, but not two.
        let first_of_b = of_b.as_mut().await.unwrap();
        let mut second_of_b = take(b);
        assert!(futures::poll!(&mut second_of_b).is_pending());
        assert_eq!(slots.taken(), 3);
        // The first that comes back is above the limit.
        drop(one);
        assert!(futures::poll!(&mut third).is_pending());
        drop(two);
        // The pull with none before the one that has one, though it came later.
        let third = third.await.unwrap();
        assert!(futures::poll!(&mut second_of_b).is_pending());
        drop((third, first_of_b));
        drop(second_of_b.await.unwrap());
        assert_eq!(slots.taken(), 0);
    }

    #[tokio::test]
    async fn there_is_an_end_to_spare_slots() {
        let slots = Slots::new(1);
        let take = || {
            let (slots, pull) = (slots.clone(), slots.pull());
            async move { Slot::take(&slots, pull, CancellationToken::new()).await.unwrap() }.boxed()
        };
        let mut held = Vec::new();
        for _ in 0..1 + SPARE {
            held.push(take().await);
        }
        let (mut one, mut other) = (take(), take());
        assert!(futures::poll!(&mut one).is_pending() && futures::poll!(&mut other).is_pending());
        assert!(slots.starving());
        // Who goes away while it waits is passed over.
        drop(one);
        held.pop();
        drop(other.await);
        assert!(!slots.starving());
        drop(held);
        assert_eq!(slots.taken(), 0);
    }
}
