//! Exponential back-off as a value: the caller keeps the clock.

use std::time::Duration;

/// Doubles from `base` to `max`, and starts again after the thing went well for `reset_after`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    pub base: Duration,
    pub max: Duration,
}

impl Backoff {
    /// Container restarts: 10 s doubling to 300 s.
    pub const CRASH_LOOP: Backoff = Backoff { base: Duration::from_secs(10), max: Duration::from_secs(300) };
    /// Work queues: 5 ms doubling to 1,000 s.
    pub const QUEUE: Backoff = Backoff { base: Duration::from_millis(5), max: Duration::from_secs(1000) };

    /// How long to wait after `failures` failures in a row; zero for none.
    pub fn delay(&self, failures: u32) -> Duration {
        if failures == 0 {
            return Duration::ZERO;
        }
        let factor = 1u64.checked_shl(failures - 1).unwrap_or(u64::MAX);
        let nanos = (self.base.as_nanos() as u64).saturating_mul(factor);
        Duration::from_nanos(nanos).min(self.max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_the_limit() {
        let b = Backoff::CRASH_LOOP;
        let secs: Vec<u64> = (0..8).map(|n| b.delay(n).as_secs()).collect();
        assert_eq!(secs, [0, 10, 20, 40, 80, 160, 300, 300]);
        assert_eq!(b.delay(u32::MAX), b.max);
    }
}
