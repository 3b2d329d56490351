//! The embedded engine against the conformance suite, across restarts and crashes.

use std::{collections::BTreeMap, path::Path, time::Duration};

use bytes::Bytes;
use orlop_base::supervise::TaskGroup;
use orlop_store::{
    Error, Expect, Outcome, Range, Store, Write,
    embedded::{Embedded, Options},
    testsuite,
};
use proptest::prelude::*;
use tokio_util::sync::CancellationToken;

fn quick() -> Options {
    Options { expiry_interval: Duration::from_millis(200), ..Options::default() }
}

async fn open(dir: &Path) -> Embedded {
    let tasks = TaskGroup::new(&CancellationToken::new());
    Embedded::open(dir, quick(), &tasks).await.unwrap_or_else(|e| panic!("open: {e}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conforms() {
    testsuite::conformance(|| async {
        let dir = tempfile::tempdir().expect("temporary folder").keep();
        let store = open(&dir).await;
        // The files are deleted while they are open, so nothing stays behind.
        std::fs::remove_dir_all(&dir).expect("remove");
        store
    })
    .await;
}

#[tokio::test]
async fn a_second_owner_and_another_version_are_refused() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let tasks = TaskGroup::new(&CancellationToken::new());
    let first = Embedded::open(dir.path(), quick(), &tasks).await.expect("open");
    assert!(matches!(Embedded::open(dir.path(), quick(), &tasks).await, Err(Error::InUse { .. })));
    drop(first);
    tasks.stop_token().cancel();
    tasks.run_until_stopped(Duration::from_secs(5)).await.expect("stop");

    std::fs::write(dir.path().join("version.json"), r#"{"version":99,"data":{"engine":"embedded"}}"#)
        .expect("write");
    let tasks = TaskGroup::new(&CancellationToken::new());
    let refused = Embedded::open(dir.path(), quick(), &tasks).await.err().expect("refused");
    assert!(matches!(refused, Error::Version { found: 99, wanted: 1, .. }), "{refused}");
}

#[tokio::test]
async fn data_and_revisions_survive_a_restart() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let mut revision = 0;
    for round in 0..3 {
        let tasks = TaskGroup::new(&CancellationToken::new());
        let store = loop {
            // The writer thread of the previous round lets go of the file a moment after the last handle is dropped.
            match Embedded::open(dir.path(), quick(), &tasks).await {
                Ok(store) => break store,
                Err(Error::InUse { .. } | Error::Storage { .. }) => {
                    tokio::time::sleep(Duration::from_millis(10)).await
                }
                Err(e) => panic!("{e}"),
            }
        };
        assert_eq!(
            store.list(&Range { prefix: "/".into(), ..Range::default() }).await.expect("list").records.len(),
            round
        );
        assert!(store.current_revision().await.expect("revision") >= revision);
        let write = Write::Put { value: Bytes::from_static(b"v"), ttl: None };
        let done = store.compare_and_swap(&format!("/{round}"), Expect::Absent, write).await.expect("write");
        let Outcome::Committed(r) = done else { panic!("{done:?}") };
        assert!(r > revision);
        revision = r;
        drop(store);
        tasks.stop_token().cancel();
        tasks.run_until_stopped(Duration::from_secs(5)).await.expect("stop");
    }
}

#[derive(Clone, Debug)]
enum Step {
    Put(u8, u16),
    Delete(u8),
    Compact(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..5u8, any::<u16>()).prop_map(|(k, v)| Step::Put(k, v)),
        2 => (0..5u8).prop_map(Step::Delete),
        1 => any::<u8>().prop_map(Step::Compact),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// Every readable revision shows what a plain map showed at that time, whatever was written and compacted.
    #[test]
    fn every_readable_revision_is_true(steps in proptest::collection::vec(step(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("runtime");
        runtime.block_on(async {
            let dir = tempfile::tempdir().expect("temporary folder");
            let store = open(dir.path()).await;
            let mut model: BTreeMap<String, String> = BTreeMap::new();
            let mut history = BTreeMap::from([(1u64, model.clone())]);
            let mut compacted = 0;
            for step in steps {
                let (key, write) = match step {
                    Step::Put(k, v) => (format!("/m/{k}"), Some(v.to_string())),
                    Step::Delete(k) => (format!("/m/{k}"), None),
                    Step::Compact(back) => {
                        let current = store.current_revision().await.expect("revision");
                        let to = current.saturating_sub(u64::from(back % 8));
                        store.compact(to).await.expect("compact");
                        compacted = compacted.max(to);
                        continue;
                    }
                };
                let present = store.get(&key).await.expect("get");
                let expect = present.map_or(Expect::Absent, |r| Expect::Revision(r.revision));
                let change = match &write {
                    Some(v) => Write::Put { value: Bytes::from(v.clone()), ttl: None },
                    None if matches!(expect, Expect::Absent) => continue,
                    None => Write::Delete,
                };
                let Outcome::Committed(revision) = store.compare_and_swap(&key, expect, change).await.expect("write") else {
                    panic!("one writer cannot conflict");
                };
                match write {
                    Some(v) => model.insert(key, v),
                    None => model.remove(&key),
                };
                history.insert(revision, model.clone());
            }
            for (revision, wanted) in history {
                let range = Range { prefix: "/m/".into(), revision, ..Range::default() };
                match store.list(&range).await {
                    Ok(page) => {
                        let got: BTreeMap<String, String> = page
                            .records
                            .iter()
                            .map(|r| (r.key.to_string(), String::from_utf8_lossy(&r.value).into_owned()))
                            .collect();
                        assert_eq!(got, wanted, "at revision {revision}");
                    }
                    Err(Error::Compacted { .. }) => assert!(revision < compacted),
                    Err(e) => panic!("{e}"),
                }
            }
        });
    }
}

/// Not a promise of a number, but of its reason: writers that wait at the same time share a flush.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_writes_share_flushes() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let store = open(dir.path()).await;
    let write = |key: String| {
        let store = store.clone();
        async move {
            let put = Write::Put { value: Bytes::from(vec![b'x'; 1500]), ttl: None };
            store.compare_and_swap(&key, Expect::Absent, put).await.expect("write")
        }
    };
    let begun = std::time::Instant::now();
    for i in 0..200 {
        write(format!("/one/{i}")).await;
    }
    let alone = begun.elapsed();
    let begun = std::time::Instant::now();
    futures::future::join_all((0..2000).map(|i| write(format!("/many/{i}")))).await;
    let together = begun.elapsed();
    println!(
        "{:.0} writes/s at one client, {:.0} at many",
        200.0 / alone.as_secs_f64(),
        2000.0 / together.as_secs_f64()
    );
    assert!(together < alone * 5, "2000 concurrent writes took {together:?}, 200 one by one {alone:?}");
}
