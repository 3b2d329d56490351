//! What every engine must do. An engine's tests call [`conformance`] with a function that makes an empty store.

use std::{future::Future, time::Duration};

use bytes::Bytes;

use crate::{Error, Event, Expect, Outcome, Range, Revision, Store, Watch, WatchItem, Write};

fn put(value: &str) -> Write {
    Write::Put { value: Bytes::copy_from_slice(value.as_bytes()), ttl: None }
}

async fn write(store: &dyn Store, key: &str, expect: Expect, write: Write) -> Revision {
    match store.compare_and_swap(key, expect, write).await {
        Ok(Outcome::Committed(revision)) => revision,
        other => panic!("{key}: expected a committed write, got {other:?}"),
    }
}

async fn keys(store: &dyn Store, range: &Range) -> Vec<String> {
    let page = store.list(range).await.unwrap_or_else(|e| panic!("list {range:?}: {e}"));
    page.records.iter().map(|r| format!("{}={}", r.key, String::from_utf8_lossy(&r.value))).collect()
}

async fn next(watch: &mut Watch) -> Result<WatchItem, Error> {
    match tokio::time::timeout(Duration::from_secs(10), watch.items.recv()).await {
        Ok(Some(item)) => item,
        Ok(None) => panic!("the watch ended"),
        Err(_) => panic!("the watch delivered nothing for 10 s"),
    }
}

/// The next `n` events.
async fn events(watch: &mut Watch, n: usize) -> Vec<Event> {
    let mut all = Vec::new();
    while all.len() < n {
        if let WatchItem::Events(batch) = next(watch).await.unwrap_or_else(|e| panic!("watch: {e}")) {
            all.extend(batch);
        }
    }
    assert_eq!(all.len(), n, "more events than expected: {all:?}");
    all
}

/// Runs every case, each on a store of its own.
pub async fn conformance<S, F, Fut>(make: F)
where
    S: Store,
    F: Fn() -> Fut,
    Fut: Future<Output = S>,
{
    compare_and_swap(&make().await).await;
    lists(&make().await).await;
    past_revisions(&make().await).await;
    watches(&make().await).await;
    compaction(&make().await).await;
    time_to_live(&make().await).await;
    concurrent_writers(&make().await).await;
}

async fn compare_and_swap(store: &dyn Store) {
    let start = store.current_revision().await.expect("revision");
    let first = write(store, "/r/a", Expect::Absent, put("1")).await;
    assert_eq!(first, start + 1);
    let record = store.get("/r/a").await.expect("get").expect("there");
    assert_eq!((record.revision, record.created, &record.value[..]), (first, first, &b"1"[..]));

    let clash = store.compare_and_swap("/r/a", Expect::Absent, put("x")).await.expect("answer");
    assert_eq!(clash, Outcome::Conflict(Some(record.clone())));
    let second = write(store, "/r/a", Expect::Revision(first), put("2")).await;
    let record = store.get("/r/a").await.expect("get").expect("there");
    assert_eq!((record.revision, record.created), (second, first));
    let stale = store.compare_and_swap("/r/a", Expect::Revision(first), Write::Delete).await.expect("answer");
    assert_eq!(stale, Outcome::Conflict(Some(record)));
    assert_eq!(
        store.current_revision().await.expect("revision"),
        second,
        "a refused write takes no revision"
    );

    let gone = write(store, "/r/a", Expect::Revision(second), Write::Delete).await;
    assert_eq!(gone, second + 1, "a deletion takes a revision");
    assert_eq!(store.get("/r/a").await.expect("get"), None);
    let missing = store.compare_and_swap("/r/a", Expect::Revision(second), put("3")).await.expect("answer");
    assert_eq!(missing, Outcome::Conflict(None));
    let again = write(store, "/r/a", Expect::Absent, put("4")).await;
    assert_eq!(store.get("/r/a").await.expect("get").expect("there").created, again);
}

async fn lists(store: &dyn Store) {
    for name in ["b", "a", "d", "c"] {
        write(store, &format!("/r/{name}"), Expect::Absent, put(name)).await;
    }
    write(store, "/r0/other", Expect::Absent, put("x")).await;
    let all = Range { prefix: "/r/".into(), ..Range::default() };
    assert_eq!(keys(store, &all).await, ["/r/a=a", "/r/b=b", "/r/c=c", "/r/d=d"]);
    assert_eq!(store.count(&all).await.expect("count"), 4);
    assert_eq!(store.count(&Range { prefix: "/none/".into(), ..Range::default() }).await.expect("count"), 0);

    let page = store.list(&Range { limit: 3, ..all.clone() }).await.expect("list");
    assert!(page.more);
    assert_eq!(page.records.len(), 3);
    let rest = Range { after: Some("/r/c".into()), limit: 3, revision: page.revision, ..all.clone() };
    write(store, "/r/e", Expect::Absent, put("late")).await;
    let page = store.list(&rest).await.expect("list");
    assert!(!page.more, "a continued list does not see later writes");
    assert_eq!(page.records.len(), 1);
    assert_eq!(store.count(&rest).await.expect("count"), 1, "nor does a count");
    let exact = store.list(&Range { limit: 5, ..all }).await.expect("list");
    assert!(!exact.more, "a full page with nothing behind it is the last");
}

async fn past_revisions(store: &dyn Store) {
    let one = write(store, "/r/a", Expect::Absent, put("1")).await;
    let two = write(store, "/r/a", Expect::Revision(one), put("2")).await;
    let three = write(store, "/r/b", Expect::Absent, put("1")).await;
    let four = write(store, "/r/a", Expect::Revision(two), Write::Delete).await;
    let at = |revision| Range { prefix: "/r/".into(), revision, ..Range::default() };
    assert_eq!(keys(store, &at(one)).await, ["/r/a=1"]);
    assert_eq!(keys(store, &at(two)).await, ["/r/a=2"]);
    assert_eq!(keys(store, &at(three)).await, ["/r/a=2", "/r/b=1"]);
    assert_eq!(keys(store, &at(four)).await, ["/r/b=1"]);
    for (revision, count) in [(one, 1), (two, 1), (three, 2), (four, 1)] {
        assert_eq!(store.count(&at(revision)).await.expect("count"), count, "at {revision}");
    }
    assert!(matches!(store.list(&at(four + 100)).await, Err(Error::Future { .. })));
}

async fn watches(store: &dyn Store) {
    let base = write(store, "/r/a", Expect::Absent, put("1")).await;
    let two = write(store, "/r/a", Expect::Revision(base), put("2")).await;
    let mut replay = store.watch("/r/", base).await.expect("watch");
    let mut live = store.watch("/r/", 0).await.expect("watch");
    let got = events(&mut replay, 1).await;
    assert_eq!((got[0].revision, got[0].created, got[0].value.as_deref()), (two, base, Some(&b"2"[..])));
    assert_eq!(
        next(&mut replay).await.expect("item"),
        WatchItem::Progress(two),
        "the end of the history is told"
    );

    let elsewhere = write(store, "/q/x", Expect::Absent, put("q")).await;
    let three = write(store, "/r/b", Expect::Absent, put("b")).await;
    let four = write(store, "/r/a", Expect::Revision(two), Write::Delete).await;
    assert!(elsewhere < three);
    for watch in [&mut replay, &mut live] {
        let got = events(watch, 2).await;
        assert_eq!((&*got[0].key, got[0].revision, got[0].created), ("/r/b", three, three));
        assert_eq!((&*got[1].key, got[1].revision, &got[1].value), ("/r/a", four, &None));
    }
    let last = write(store, "/q/y", Expect::Absent, put("q")).await;
    loop {
        match next(&mut live).await.expect("item") {
            WatchItem::Progress(r) if r >= last => break,
            WatchItem::Progress(_) => {}
            WatchItem::Events(e) => panic!("nothing happened under the prefix: {e:?}"),
        }
    }
}

async fn compaction(store: &dyn Store) {
    let one = write(store, "/r/a", Expect::Absent, put("1")).await;
    let two = write(store, "/r/a", Expect::Revision(one), put("2")).await;
    let three = write(store, "/r/b", Expect::Absent, put("b")).await;
    let four = write(store, "/r/b", Expect::Revision(three), Write::Delete).await;
    let five = write(store, "/r/c", Expect::Absent, put("c")).await;
    store.compact(four).await.expect("compact");
    assert_eq!(store.compacted_revision().await.expect("revision"), four);
    let at = |revision| Range { prefix: "/r/".into(), revision, ..Range::default() };
    assert!(matches!(store.list(&at(two)).await, Err(Error::Compacted { .. })));
    assert_eq!(keys(store, &at(four)).await, ["/r/a=2"]);
    assert_eq!(keys(store, &at(0)).await, ["/r/a=2", "/r/c=c"]);
    assert!(matches!(store.watch("/r/", two).await, Err(Error::Compacted { .. })));
    let mut watch = store.watch("/r/", four).await.expect("watch");
    assert_eq!(events(&mut watch, 1).await[0].revision, five);
    store.compact(one).await.expect("an older compaction is no error");
}

async fn time_to_live(store: &dyn Store) {
    let short = Write::Put { value: Bytes::from_static(b"e"), ttl: Some(Duration::from_secs(1)) };
    let gone = write(store, "/r/gone", Expect::Absent, short.clone()).await;
    let kept = write(store, "/r/kept", Expect::Absent, short).await;
    write(store, "/r/kept", Expect::Revision(kept), put("stays")).await;
    let mut watch = store.watch("/r/", gone + 2).await.expect("watch");
    let got = events(&mut watch, 1).await;
    assert_eq!((&*got[0].key, &got[0].value), ("/r/gone", &None));
    assert_eq!(keys(store, &Range { prefix: "/r/".into(), ..Range::default() }).await, ["/r/kept=stays"]);
}

async fn concurrent_writers(store: &dyn Store) {
    let start = store.current_revision().await.expect("revision");
    write(store, "/r/n", Expect::Absent, put("0")).await;
    let add = || async {
        for _ in 0..20 {
            loop {
                let now = store.get("/r/n").await.expect("get").expect("there");
                let n: u64 = String::from_utf8_lossy(&now.value).parse().expect("number");
                let next = put(&(n + 1).to_string());
                let done = store
                    .compare_and_swap("/r/n", Expect::Revision(now.revision), next)
                    .await
                    .expect("answer");
                if matches!(done, Outcome::Committed(_)) {
                    break;
                }
            }
        }
    };
    futures::join!(add(), add(), add(), add());
    let record = store.get("/r/n").await.expect("get").expect("there");
    assert_eq!(&record.value[..], b"80");
    assert_eq!(record.revision, start + 81, "revisions have no holes");
    let mut watch = store.watch("/r/", start).await.expect("watch");
    let got = events(&mut watch, 81).await;
    assert!(got.windows(2).all(|w| w[0].revision + 1 == w[1].revision), "events are in order");
}
