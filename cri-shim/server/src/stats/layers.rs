//! What writable layers hold. Each look walks all files of a layer, and the kubelet asks every ten seconds, by several RPCs.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use orlop_images::Usage;
use parking_lot::Mutex;

use crate::runtime::{Runtime, now_ns};

/// How long a look counts: as long as upstream runtimes'.
const FRESH: Duration = Duration::from_secs(10);

/// What a layer held, and when.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Layer {
    pub usage: Usage,
    pub at_ns: i64,
}

/// The last look at each layer.
#[derive(Default)]
pub(crate) struct Layers(Mutex<HashMap<String, (Instant, Layer)>>);

impl Layers {
    fn get(&self, key: &str, now: Instant) -> Option<Layer> {
        let looks = self.0.lock();
        looks.get(key).filter(|(then, _)| now.duration_since(*then) < FRESH).map(|(_, layer)| *layer)
    }

    /// Forgets what counts no more, and so what belongs to layers that are gone.
    fn put(&self, key: &str, now: Instant, layer: Layer) {
        let mut looks = self.0.lock();
        looks.retain(|_, (then, _)| now.duration_since(*then) < FRESH);
        looks.insert(key.to_owned(), (now, layer));
    }
}

impl Runtime {
    /// What the writable layer of `key` holds; `None` when there is none, as while its container is being removed.
    pub async fn layer(&self, key: &str) -> Option<Layer> {
        if let Some(layer) = self.layers.get(key, Instant::now()) {
            return Some(layer);
        }
        let usage = self.images.rootfs_usage(key).await.ok()?;
        let layer = Layer { usage, at_ns: now_ns() };
        self.layers.put(key, Instant::now(), layer);
        Some(layer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_counts_for_a_while() {
        let (layers, begin) = (Layers::default(), Instant::now());
        let of = |bytes| Layer { usage: Usage { bytes, inodes: 1 }, at_ns: 0 };
        assert_eq!(layers.get("a", begin), None);
        layers.put("a", begin, of(1));
        assert_eq!(layers.get("a", begin + FRESH / 2), Some(of(1)));
        assert_eq!(layers.get("a", begin + FRESH), None);
        layers.put("b", begin + FRESH, of(2));
        assert_eq!(layers.0.lock().len(), 1, "what is old is forgotten");
    }
}
