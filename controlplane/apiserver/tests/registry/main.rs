//! The registry over a real store, asked as the transport asks it.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Uri, header};
use http_body_util::BodyExt;
use orlop_apiserver::{
    registry::{ApiRequest, Body, Options, Registry},
    request_info::{RequestInfo, UserInfo},
};
use orlop_base::supervise::TaskGroup;
use orlop_store::{
    Store,
    embedded::{self, Embedded},
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

struct Server {
    registry: Registry,
    store: Embedded,
    _dir: tempfile::TempDir,
}

impl Server {
    async fn start() -> Server {
        let dir = tempfile::tempdir().expect("temporary folder");
        let tasks = TaskGroup::new(&CancellationToken::new());
        let store = Embedded::open(dir.path(), embedded::Options::default(), &tasks).await.expect("store");
        let registry = Registry::new(Arc::new(store.clone()), Options::new(tasks)).await.expect("registry");
        Server { registry, store, _dir: dir }
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(header::HeaderName, &'static str)],
        body: Bytes,
    ) -> http::Response<Body> {
        let uri: Uri = path.parse().expect("uri");
        let info = RequestInfo::parse(&method, &uri).expect("request info");
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(name, HeaderValue::from_static(value));
        }
        let request = ApiRequest { method, uri, headers: map, body, info, user: UserInfo::apiserver() };
        self.registry.handle(request).await
    }

    async fn json(&self, method: Method, path: &str, body: Value) -> (u16, Value) {
        let bytes = if body.is_null() { Bytes::new() } else { Bytes::from(body.to_string()) };
        let kind = if method == Method::PATCH { "application/merge-patch+json" } else { "application/json" };
        let response = self.send(method, path, &[(header::CONTENT_TYPE, kind)], bytes).await;
        let code = response.status().as_u16();
        let body = response.into_body().collect().await;
        (code, serde_json::from_slice(&body).unwrap_or(Value::Null))
    }

    async fn ok(&self, method: Method, path: &str, body: Value) -> Value {
        let (code, v) = self.json(method.clone(), path, body).await;
        assert!((200..300).contains(&code), "{method} {path}: {code} {v}");
        v
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        self.json(Method::GET, path, Value::Null).await
    }

    async fn watch(&self, path: &str) -> Watch {
        let response = self.send(Method::GET, path, &[], Bytes::new()).await;
        assert_eq!(response.status(), 200, "{path}");
        Watch { body: response.into_body() }
    }

    async fn config_map(&self, name: &str, data: &str) -> Value {
        self.ok(
            Method::POST,
            MAPS,
            json!({"metadata": {"name": name, "labels": {"of": data}}, "data": {"x": data}}),
        )
        .await
    }
}

struct Watch {
    body: Body,
}

impl Watch {
    async fn next(&mut self) -> Option<Value> {
        let frame = tokio::time::timeout(Duration::from_secs(10), self.body.frame())
            .await
            .expect("an event within 10 s")?;
        let bytes = frame.expect("infallible").into_data().expect("data");
        Some(serde_json::from_slice(&bytes).expect("one event in one frame"))
    }

    /// Type and name of the next event.
    async fn seen(&mut self) -> (String, String) {
        let event = self.next().await.expect("an event");
        let name = event["object"]["metadata"]["name"].as_str().unwrap_or("").to_owned();
        (event["type"].as_str().unwrap_or("").to_owned(), name)
    }
}

const MAPS: &str = "/api/v1/namespaces/a/configmaps";
const PODS: &str = "/api/v1/namespaces/a/pods";

fn version(v: &Value) -> u64 {
    v["metadata"]["resourceVersion"].as_str().and_then(|r| r.parse().ok()).expect("a resource version")
}

fn names(list: &Value) -> Vec<&str> {
    list["items"]
        .as_array()
        .expect("items")
        .iter()
        .map(|i| i["metadata"]["name"].as_str().unwrap_or(""))
        .collect()
}

fn pair(kind: &str, name: &str) -> (String, String) {
    (kind.to_owned(), name.to_owned())
}

#[tokio::test]
async fn an_object_lives_and_dies() {
    let s = Server::start().await;
    let made = s.config_map("one", "1").await;
    assert!(made["metadata"]["uid"].as_str().is_some_and(|u| u.len() == 36));
    assert_eq!(made["metadata"]["namespace"], "a");
    let (code, again) = s.json(Method::POST, MAPS, json!({"metadata": {"name": "one"}})).await;
    assert_eq!((code, again["reason"].as_str()), (409, Some("AlreadyExists")));

    let mut changed = made.clone();
    changed["data"]["x"] = "2".into();
    let put = s.ok(Method::PUT, &format!("{MAPS}/one"), changed.clone()).await;
    assert!(version(&put) > version(&made));
    let (code, stale) = s.json(Method::PUT, &format!("{MAPS}/one"), changed).await;
    assert_eq!((code, stale["reason"].as_str()), (409, Some("Conflict")));
    let same = s.ok(Method::PUT, &format!("{MAPS}/one"), put.clone()).await;
    assert_eq!(version(&same), version(&put), "writing what is there is no write");

    let patched = s.ok(Method::PATCH, &format!("{MAPS}/one"), json!({"data": {"y": "3"}})).await;
    assert_eq!(patched["data"], json!({"x": "2", "y": "3"}));
    let (_, dry) =
        s.json(Method::PATCH, &format!("{MAPS}/one?dryRun=All"), json!({"data": {"z": "4"}})).await;
    assert_eq!(dry["data"]["z"], "4");
    assert_eq!(s.get(&format!("{MAPS}/one")).await.1["data"], patched["data"]);

    let (code, refused) =
        s.json(Method::DELETE, &format!("{MAPS}/one"), json!({"preconditions": {"uid": "other"}})).await;
    assert_eq!((code, refused["reason"].as_str()), (409, Some("Conflict")));
    let gone = s.ok(Method::DELETE, &format!("{MAPS}/one"), Value::Null).await;
    assert_eq!(gone["status"], "Success");
    assert_eq!(s.get(&format!("{MAPS}/one")).await.0, 404);
}

#[tokio::test]
async fn names_are_generated_and_bodies_checked() {
    let s = Server::start().await;
    let made = s.ok(Method::POST, MAPS, json!({"metadata": {"generateName": "gen-"}})).await;
    let name = made["metadata"]["name"].as_str().expect("name");
    assert!(name.starts_with("gen-") && name.len() == 9, "{name}");
    for (body, code, want) in [
        (json!({"metadata": {"name": "Bad_Name"}}), 422, "metadata.name: Invalid value: \"Bad_Name\""),
        (json!({"metadata": {}}), 422, "metadata.name: Required value"),
        (
            json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "x"}}),
            400,
            "expected kind ConfigMap",
        ),
        (
            json!({"metadata": {"name": "x", "namespace": "b"}}),
            400,
            "namespace of the provided object does not match",
        ),
        (
            json!({"metadata": {"name": "x"}, "data": {"a": 1}}),
            400,
            "cannot unmarshal number into field data.a of type string",
        ),
    ] {
        let (got, status) = s.json(Method::POST, MAPS, body).await;
        let message = status["message"].as_str().unwrap_or("");
        assert!(got == code && message.contains(want), "{got} {message}");
    }
    let strict = json!({"metadata": {"name": "x"}, "dta": {}});
    let (code, status) =
        s.json(Method::POST, &format!("{MAPS}?fieldValidation=Strict"), strict.clone()).await;
    assert!(
        code == 400 && status["message"].as_str().is_some_and(|m| m.contains("unknown field \"dta\"")),
        "{status}"
    );
    let response = s.send(Method::POST, MAPS, &[], Bytes::from(strict.to_string())).await;
    assert_eq!(response.status(), 201);
    let warning = response.headers()[header::WARNING].to_str().expect("text");
    assert_eq!(warning, "299 - \"unknown field \\\"dta\\\"\"");
}

#[tokio::test]
async fn lists_page_select_and_stay_at_their_revision() {
    let s = Server::start().await;
    for i in 0..7 {
        s.config_map(&format!("m{i}"), if i % 2 == 0 { "even" } else { "odd" }).await;
    }
    let (_, first) = s.get(&format!("{MAPS}?limit=3")).await;
    assert_eq!(names(&first), ["m0", "m1", "m2"]);
    s.config_map("m9", "late").await;
    assert_eq!(first["metadata"]["remainingItemCount"], 4);
    let token = first["metadata"]["continue"].as_str().expect("a continue token");
    let (_, second) = s.get(&format!("{MAPS}?limit=10&continue={token}")).await;
    assert_eq!(
        names(&second),
        ["m3", "m4", "m5", "m6"],
        "a continued list shows the state of its first page"
    );
    assert_eq!(version(&second), version(&first));
    assert!(second["metadata"]["remainingItemCount"].is_null());

    assert_eq!(names(&s.get(&format!("{MAPS}?labelSelector=of%3Dodd")).await.1), ["m1", "m3", "m5"]);
    let (_, page) = s.get(&format!("{MAPS}?labelSelector=of%3Dodd&limit=2")).await;
    assert_eq!(names(&page), ["m1", "m3"]);
    assert!(page["metadata"]["continue"].is_string());
    assert!(page["metadata"]["remainingItemCount"].is_null(), "unknown with a selector");
    assert_eq!(names(&s.get(&format!("{MAPS}?fieldSelector=metadata.name%3Dm4")).await.1), ["m4"]);
    assert_eq!(s.get(&format!("{MAPS}?fieldSelector=data.x%3Dy")).await.0, 400);
    assert_eq!(s.get(&format!("{MAPS}?resourceVersion=999999")).await.0, 504);

    let at = version(&first);
    s.store.compact(s.store.current_revision().await.expect("revision")).await.expect("compact");
    let (code, status) = s.get(&format!("{MAPS}?resourceVersion={at}&resourceVersionMatch=Exact")).await;
    assert_eq!((code, status["reason"].as_str()), (410, Some("Expired")));
    assert_eq!(s.get(&format!("{MAPS}?limit=3&continue={token}")).await.0, 410);
}

#[tokio::test]
async fn watches_replay_follow_and_translate_selectors() {
    let s = Server::start().await;
    let base = version(&s.config_map("m0", "x").await);
    s.config_map("m1", "x").await;
    let mut all = s.watch(&format!("{MAPS}?watch=true&resourceVersion={base}")).await;
    let mut some = s.watch(&format!("{MAPS}?watch=true&labelSelector=of%3Dx")).await;
    assert_eq!(all.seen().await, pair("ADDED", "m1"));
    assert_eq!([some.seen().await, some.seen().await], [pair("ADDED", "m0"), pair("ADDED", "m1")]);

    s.ok(Method::PATCH, &format!("{MAPS}/m0"), json!({"metadata": {"labels": {"of": "y"}}})).await;
    assert_eq!(all.seen().await, pair("MODIFIED", "m0"));
    assert_eq!(some.seen().await, pair("DELETED", "m0"), "it left the selection");
    s.ok(Method::PATCH, &format!("{MAPS}/m0"), json!({"metadata": {"labels": {"of": "x"}}})).await;
    assert_eq!(some.seen().await, pair("ADDED", "m0"), "and came back");
    assert_eq!(all.seen().await, pair("MODIFIED", "m0"));
    let before = version(&s.get(&format!("{MAPS}/m0")).await.1);
    s.ok(Method::DELETE, &format!("{MAPS}/m0"), Value::Null).await;
    let gone = all.next().await.expect("event");
    assert_eq!(gone["type"], "DELETED");
    assert!(version(&gone["object"]) > before, "a deletion shows its own revision");

    // A watch from before what the cache in memory knows is served from the store, until that is compacted.
    let mut old = s.watch(&format!("{MAPS}?watch=true&resourceVersion={}", base - 1)).await;
    assert_eq!(old.seen().await, pair("ADDED", "m0"));
    let now = s.store.current_revision().await.expect("revision");
    s.store.compact(now).await.expect("compact");
    let mut expired = s.watch(&format!("{MAPS}?watch=true&resourceVersion={}", base - 1)).await;
    let event = expired.next().await.expect("event");
    assert_eq!((event["type"].as_str(), event["object"]["code"].as_u64()), (Some("ERROR"), Some(410)));
}

#[tokio::test]
async fn a_streaming_list_ends_with_its_bookmark() {
    let s = Server::start().await;
    s.config_map("m0", "x").await;
    let query = "watch=true&sendInitialEvents=true&allowWatchBookmarks=true&resourceVersionMatch=NotOlderThan&timeoutSeconds=1";
    let mut w = s.watch(&format!("{MAPS}?{query}")).await;
    assert_eq!(w.seen().await, pair("ADDED", "m0"));
    let bookmark = w.next().await.expect("bookmark");
    assert_eq!(bookmark["type"], "BOOKMARK");
    assert_eq!(bookmark["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
    assert_eq!(version(&bookmark["object"]), s.store.current_revision().await.expect("revision"));
    assert!(w.next().await.is_none(), "the watch ends after its timeout");
}

#[tokio::test]
async fn concurrent_patches_all_land() {
    let s = Server::start().await;
    s.config_map("m", "x").await;
    let patch = |i: usize| {
        let s = &s;
        async move { s.ok(Method::PATCH, &format!("{MAPS}/m"), json!({"data": {format!("k{i}"): "v"}})).await }
    };
    futures::future::join_all((0..8).map(patch)).await;
    let (_, m) = s.get(&format!("{MAPS}/m")).await;
    assert_eq!(m["data"].as_object().expect("data").len(), 9);
}

#[tokio::test]
async fn pods_are_bound_run_and_stopped() {
    let s = Server::start().await;
    let pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "x"}]}, "status": {"phase": "Running"}});
    let made = s.ok(Method::POST, PODS, pod.clone()).await;
    assert_eq!(made["status"]["phase"], "Pending", "a user cannot set the status");
    assert_eq!(made["status"]["qosClass"], "BestEffort");
    assert_eq!(made["spec"]["terminationGracePeriodSeconds"], 30);

    let binding = json!({"metadata": {"name": "p"}, "target": {"kind": "Node", "name": "n1"}});
    assert_eq!(s.json(Method::POST, &format!("{PODS}/p/binding"), binding.clone()).await.0, 201);
    assert_eq!(s.json(Method::POST, &format!("{PODS}/p/binding"), binding).await.0, 409);
    let (_, on_node) = s.get("/api/v1/pods?fieldSelector=spec.nodeName%3Dn1").await;
    assert_eq!(names(&on_node), ["p"]);

    let status =
        json!({"status": {"phase": "Running", "podIP": "10.0.0.1"}, "spec": {"nodeName": "elsewhere"}});
    let running = s.ok(Method::PATCH, &format!("{PODS}/p/status"), status).await;
    assert_eq!(
        (running["status"]["phase"].as_str(), running["spec"]["nodeName"].as_str()),
        (Some("Running"), Some("n1"))
    );
    let (code, refused) =
        s.json(Method::PATCH, &format!("{PODS}/p"), json!({"spec": {"nodeName": "n2"}})).await;
    assert_eq!(code, 422, "{refused}");

    let marked = s.ok(Method::DELETE, &format!("{PODS}/p"), Value::Null).await;
    assert_eq!(marked["metadata"]["deletionGracePeriodSeconds"], 30);
    let now = s.ok(Method::DELETE, &format!("{PODS}/p"), json!({"gracePeriodSeconds": 0})).await;
    assert_eq!(now["status"], "Success");
    assert_eq!(s.get(&format!("{PODS}/p")).await.0, 404);
}

#[tokio::test]
async fn finalizers_hold_an_object_until_they_go() {
    let s = Server::start().await;
    s.ok(Method::POST, MAPS, json!({"metadata": {"name": "m", "finalizers": ["example.com/held"]}})).await;
    let marked = s.ok(Method::DELETE, &format!("{MAPS}/m"), Value::Null).await;
    assert!(marked["metadata"]["deletionTimestamp"].is_string());
    assert_eq!(s.get(&format!("{MAPS}/m")).await.0, 200);
    s.ok(Method::PATCH, &format!("{MAPS}/m"), json!({"metadata": {"finalizers": null}})).await;
    assert_eq!(s.get(&format!("{MAPS}/m")).await.0, 404);

    s.ok(Method::POST, "/api/v1/namespaces", json!({"metadata": {"name": "n"}})).await;
    let marked = s.ok(Method::DELETE, "/api/v1/namespaces/n", Value::Null).await;
    assert_eq!(marked["status"]["phase"], "Terminating");
    let mut finalized = s.get("/api/v1/namespaces/n").await.1;
    finalized["spec"]["finalizers"] = json!([]);
    s.ok(Method::PUT, "/api/v1/namespaces/n/finalize", finalized).await;
    assert_eq!(s.get("/api/v1/namespaces/n").await.0, 404);
}

#[tokio::test]
async fn scale_and_generation() {
    let s = Server::start().await;
    let path = "/apis/apps/v1/namespaces/a/deployments";
    let d = json!({"metadata": {"name": "d"}, "spec": {"selector": {"matchLabels": {"a": "b"}},
        "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "x"}]}}}});
    let made = s.ok(Method::POST, path, d).await;
    assert_eq!(
        (made["metadata"]["generation"].as_i64(), made["spec"]["replicas"].as_i64()),
        (Some(1), Some(1))
    );
    let scale = s.ok(Method::GET, &format!("{path}/d/scale"), Value::Null).await;
    assert_eq!((scale["kind"].as_str(), scale["status"]["selector"].as_str()), (Some("Scale"), Some("a=b")));
    let scaled = s.ok(Method::PATCH, &format!("{path}/d/scale"), json!({"spec": {"replicas": 4}})).await;
    assert_eq!(scaled["spec"]["replicas"], 4);
    let (_, now) = s.get(&format!("{path}/d")).await;
    assert_eq!(
        (now["metadata"]["generation"].as_i64(), now["spec"]["replicas"].as_i64()),
        (Some(2), Some(4))
    );
    let status =
        s.ok(Method::PATCH, &format!("{path}/d/status"), json!({"status": {"readyReplicas": 1}})).await;
    assert_eq!(status["metadata"]["generation"], 2, "a status is no new generation");
    let selector = json!({"spec": {"selector": {"matchLabels": {"z": "y"}}, "template": {"metadata": {"labels": {"z": "y"}}}}});
    assert_eq!(s.json(Method::PATCH, &format!("{path}/d"), selector).await.0, 422);
}

#[tokio::test]
async fn service_addresses_survive_a_restart() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let tasks = TaskGroup::new(&CancellationToken::new());
    let store = Embedded::open(dir.path(), embedded::Options::default(), &tasks).await.expect("store");
    let mut options = Options::new(tasks);
    options.service_cidr = "10.9.0.0/29".parse().expect("network");
    let make = |registry: Registry, i: usize| async move {
        let service = json!({"metadata": {"name": format!("s{i}")}, "spec": {"ports": [{"port": 80}]}});
        registry
            .create("", "services", "a", service)
            .await
            .map(|s| s["spec"]["clusterIP"].as_str().unwrap_or("").to_owned())
    };
    let mut seen = std::collections::BTreeSet::new();
    for i in 0..6 {
        // A new registry for each: the addresses must come from what is stored.
        let registry = Registry::new(Arc::new(store.clone()), options.clone()).await.expect("registry");
        assert!(seen.insert(make(registry, i).await.expect("free")));
    }
    let registry = Registry::new(Arc::new(store.clone()), options).await.expect("registry");
    assert_eq!(make(registry.clone(), 7).await.expect_err("full").code, 422);
    registry.delete("", "services", "a", "s3").await.expect("delete");
    assert!(seen.contains(&make(registry, 8).await.expect("freed")));
}

#[tokio::test]
async fn apply_creates_merges_and_clashes() {
    let s = Server::start().await;
    let send = |manager: &'static str, data: &'static str| {
        let body = format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: m}}\ndata: {{{data}}}\n");
        let path = format!("{MAPS}/m?fieldManager={manager}");
        let s = &s;
        async move {
            let response = s
                .send(
                    Method::PATCH,
                    &path,
                    &[(header::CONTENT_TYPE, "application/apply-patch+yaml")],
                    body.into(),
                )
                .await;
            let code = response.status().as_u16();
            (code, serde_json::from_slice::<Value>(&response.into_body().collect().await).expect("json"))
        }
    };
    assert_eq!(send("one", "a: x").await.0, 201);
    assert_eq!(send("two", "b: v").await.0, 200);
    let (code, status) = send("two", "a: z").await;
    assert_eq!((code, status["details"]["causes"][0]["field"].as_str()), (409, Some(".data.a")));
    let (_, m) = send("one", "c: w").await;
    assert_eq!(m["data"], json!({"b": "v", "c": "w"}), "what a manager stops setting goes");
}

#[tokio::test]
async fn tables_partial_objects_yaml_and_gzip() {
    let s = Server::start().await;
    s.config_map("m", "x").await;
    let ask = |accept: &'static str| {
        let s = &s;
        async move {
            s.send(Method::GET, MAPS, &[(header::ACCEPT, accept)], Bytes::new())
                .await
                .into_body()
                .collect()
                .await
        }
    };
    let table: Value =
        serde_json::from_slice(&ask("application/json;as=Table;v=v1;g=meta.k8s.io").await).expect("json");
    assert_eq!(table["columnDefinitions"][1]["name"], "Data");
    assert_eq!(table["rows"][0]["cells"], json!(["m", 1, table["rows"][0]["cells"][2]]));
    let partial: Value = serde_json::from_slice(
        &ask("application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io").await,
    )
    .expect("json");
    assert!(partial["items"][0]["metadata"]["uid"].is_string() && partial["items"][0].get("data").is_none());
    assert!(String::from_utf8_lossy(&ask("application/yaml").await).contains("kind: ConfigMapList"));

    s.ok(Method::POST, MAPS, json!({"metadata": {"name": "big"}, "data": {"x": "y".repeat(200_000)}})).await;
    let response = s.send(Method::GET, MAPS, &[(header::ACCEPT_ENCODING, "gzip")], Bytes::new()).await;
    assert_eq!(response.headers()[header::CONTENT_ENCODING], "gzip");
    assert!(response.into_body().collect().await.len() < 20_000);
}

#[tokio::test]
async fn events_have_two_names_and_collections_are_deleted() {
    let s = Server::start().await;
    let event = json!({"metadata": {"name": "e"}, "involvedObject": {"kind": "Pod", "name": "p"}, "reason": "Started", "message": "hello"});
    s.ok(Method::POST, "/api/v1/namespaces/a/events", event).await;
    let (_, new) = s.get("/apis/events.k8s.io/v1/namespaces/a/events/e").await;
    assert_eq!((new["note"].as_str(), new["regarding"]["name"].as_str()), (Some("hello"), Some("p")));
    let (_, found) =
        s.get("/api/v1/events?fieldSelector=involvedObject.name%3Dp,involvedObject.kind%3DPod").await;
    assert_eq!(names(&found), ["e"]);

    for i in 0..3 {
        s.config_map(&format!("m{i}"), if i == 0 { "keep" } else { "drop" }).await;
    }
    s.ok(Method::DELETE, &format!("{MAPS}?labelSelector=of%3Ddrop"), Value::Null).await;
    assert_eq!(names(&s.get(MAPS).await.1), ["m0"]);
}

/// Answers come in protobuf where it is preferred and the kind has it; a Table has not.
#[tokio::test]
async fn protobuf_is_answered_to_those_who_prefer_it() {
    const BINARY: &str = "application/vnd.kubernetes.protobuf";
    let s = Server::start().await;
    s.ok(Method::POST, "/api/v1/namespaces", json!({"metadata": {"name": "pb"}})).await;
    let get = async |path: &str, accept: &'static str| {
        let response = s.send(Method::GET, path, &[(header::ACCEPT, accept)], Bytes::new()).await;
        let media = response.headers()[header::CONTENT_TYPE].to_str().expect("text").to_owned();
        (media, response.into_body())
    };
    let both = "application/vnd.kubernetes.protobuf,application/json";
    let (media, body) = get("/api/v1/namespaces/pb", both).await;
    assert_eq!((media.as_str(), &body.collect().await[..4]), (BINARY, &b"k8s\0"[..]));
    let (media, body) = get("/api/v1/namespaces", both).await;
    assert_eq!((media.as_str(), &body.collect().await[..4]), (BINARY, &b"k8s\0"[..]));
    let table = "application/vnd.kubernetes.protobuf;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1;g=meta.k8s.io";
    assert_eq!(get("/api/v1/namespaces", table).await.0, "application/json");

    let (media, mut body) = get("/api/v1/namespaces?watch=true", both).await;
    assert_eq!(media, format!("{BINARY};stream=watch"));
    let event = tokio::time::timeout(Duration::from_secs(10), body.frame())
        .await
        .expect("an event within 10 s")
        .expect("an event")
        .expect("no error")
        .into_data()
        .expect("data");
    assert_eq!(event[..4], (event.len() as u32 - 4).to_be_bytes());
    assert_eq!(event[4..11], *b"\x0a\x05ADDED");
}

#[tokio::test]
async fn approval_and_status_of_a_certificate_request_take_annotations_too() {
    const ALL: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
    let s = Server::start().await;
    let request = json!({"metadata": {"name": "r"}, "spec": {"signerName": "example.com/s", "usages": ["any"],
        "request": "LS0tLS1CRUdJTiBDRVJUSUZJQ0FURSBSRVFVRVNULS0tLS0K"}});
    s.ok(Method::POST, ALL, request).await;
    for (endpoint, status) in [
        ("approval", json!({"conditions": [{"type": "x", "status": "True", "reason": "r"}]})),
        ("status", json!({"certificate": null})),
    ] {
        let patch = json!({"metadata": {"annotations": {endpoint: "true"}}, "status": status});
        let patched = s.ok(Method::PATCH, &format!("{ALL}/r/{endpoint}"), patch).await;
        assert_eq!(patched["metadata"]["annotations"][endpoint], "true");
        assert_eq!(patched["status"]["conditions"][0]["type"], "x");
        assert!(patched["status"]["conditions"][0]["lastTransitionTime"].is_string());
    }
}
