//! Transfers at the same time: of several layers, of one image by several callers, and of callers that go away.

use std::sync::{Arc, Condvar, Mutex};

use orlop_base::testkit::wait_until;
use orlop_images::{Digest, Options};

use crate::fake::*;
use crate::support::*;

/// A registry with one image that answers for a layer only when as many of them as it wants have been asked for together.
#[derive(Default)]
struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    wanted: usize,
    waiting: usize,
    most: usize,
    /// Somebody waited in vain.
    missed: bool,
}

impl Gate {
    fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        state.waiting += 1;
        state.most = state.most.max(state.waiting);
        self.changed.notify_all();
        let waited = self.changed.wait_timeout_while(state, PATIENCE, |s| s.most < s.wanted);
        let (mut state, late) = waited.unwrap();
        state.missed |= late.timed_out();
        state.waiting -= 1;
    }

    /// From now on so many must come together.
    fn want(&self, wanted: usize) {
        *self.state.lock().unwrap() = State { wanted, ..State::default() };
    }

    fn open(&self) {
        self.state.lock().unwrap().wanted = 0;
        self.changed.notify_all();
    }
}

fn guarded(layers: Vec<Blob>, gate: Arc<Gate>) -> Fake {
    let config = config(&layers);
    let manifest = manifest(&config, &layers).to_string().into_bytes();
    Fake::start(Box::new(move |r, _| {
        if let Some(layer) = layers.iter().find(|l| r.line.contains(&l.digest.hex())) {
            gate.pass();
            return response("200 OK", "", layer.bytes.len(), &layer.bytes);
        }
        serve(&r.line, &(manifest.clone(), config.clone(), layers[0].clone()))
    }))
}

fn layers(count: usize) -> Vec<Blob> {
    (0..count).map(|i| gzip(tar_of(&[(&format!("f{i}"), format!("{i}").as_bytes())]))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_many_layers_come_at_once_over_all_pulls_and_no_more() {
    for limit in [1, 3, 5] {
        let gate = Arc::new(Gate::default());
        gate.want(limit);
        let place = Place::new();
        let store = place.open_with(Options { parallel_layers: limit, ..Options::default() }).await;
        // Two images with layers of their own: the second has one layer in any case.
        let all = layers(14);
        let (one, two) = (guarded(all[..7].to_vec(), gate.clone()), guarded(all[7..].to_vec(), gate.clone()));
        let (one, two) = (format!("{}/a:v1", one.address), format!("{}/b:v1", two.address));
        let (one, two) = tokio::join!(store.pull(&one, None), store.pull(&two, None));
        assert_ne!(one.unwrap().id, two.unwrap().id);
        let state = gate.state.lock().unwrap();
        assert!((limit..=limit + 1).contains(&state.most) && !state.missed, "{limit}: {}", state.most);
    }
}

/// An image whose registry keeps everybody waiting does not stop the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_registry_does_not_stop_other_pulls() {
    let gate = Arc::new(Gate::default());
    gate.want(usize::MAX);
    let all = layers(12);
    let slow = guarded(all[..6].to_vec(), gate.clone());
    let quick_gate = Arc::new(Gate::default());
    let quick = guarded(all[6..].to_vec(), quick_gate);
    let place = Place::new();
    let store = place.open().await;
    let limit = Options::default().parallel_layers;
    let waiting = || gate.state.lock().unwrap().waiting;
    let pulling = {
        let (store, name) = (store.clone(), format!("{}/a:v1", slow.address));
        tokio::spawn(async move { store.pull(&name, None).await })
    };
    wait_until("it has all slots", PATIENCE, || async { (waiting() == limit).then_some(()) }).await;
    store.pull(&format!("{}/b:v1", quick.address), None).await.unwrap();
    assert!(waiting() == limit && !gate.state.lock().unwrap().missed);
    gate.open();
    pulling.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_ends_with_the_last_who_wants_it() {
    let gate = Arc::new(Gate::default());
    let all = layers(1);
    let hex = Digest::of(&all[0].bytes).hex();
    let fake = guarded(all, gate.clone());
    let name = format!("{}/a:v1", fake.address);
    let asked = |times: usize| {
        let gate = &gate;
        async move {
            wait_until("the layer is asked for", PATIENCE, || async {
                (gate.state.lock().unwrap().waiting == times).then_some(())
            })
            .await
        }
    };
    let place = Place::new();
    let store = place.open().await;
    let start = || {
        let (store, name) = (store.clone(), name.clone());
        tokio::spawn(async move { store.pull(&name, None).await })
    };
    // All go away: what was begun is gone, and it can be begun again.
    gate.want(usize::MAX);
    let (one, two) = (start(), start());
    asked(1).await;
    one.abort();
    two.abort();
    assert!(one.await.unwrap_err().is_cancelled() && two.await.unwrap_err().is_cancelled());
    wait_until("nothing is left of it", PATIENCE, || async { (place.count("ingest") == 0).then_some(()) })
        .await;
    gate.open();
    asked(0).await;
    // One of two goes away: the other gets it, from the same transfer.
    gate.want(usize::MAX);
    let before = fake.requests(&hex).len();
    let first = start();
    asked(1).await;
    let second = start();
    tokio::task::yield_now().await;
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    gate.open();
    second.await.unwrap().unwrap();
    let again = fake.requests(&hex).len() - before;
    // The second may have come too late for the first, and began anew; not a third time.
    assert!((1..=2).contains(&again), "{again}");
    assert_eq!((place.count("ingest"), store.list().len()), (0, 1));
}
