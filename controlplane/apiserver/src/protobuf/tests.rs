use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2, bytes.len() as u8];
    out.extend(bytes);
    out
}

fn envelope(version: &str, kind: &str, raw: &[u8]) -> Vec<u8> {
    let meta = [field(1, version.as_bytes()), field(2, kind.as_bytes())].concat();
    [MAGIC.to_vec(), field(1, &meta), field(2, raw)].concat()
}

#[track_caller]
fn round_trip(object: Value) {
    let bytes = encode(&object).expect("has a protobuf form");
    assert_eq!(decode(&bytes).expect("reads what it wrote"), object);
}

#[test]
fn a_review_and_a_token_request() {
    let attributes = [field(1, b"ns"), field(2, b"get"), field(5, b"pods")].concat();
    let raw = [field(1, &[]), field(2, &field(1, &attributes))].concat();
    let got = decode(&envelope("authorization.k8s.io/v1", "SelfSubjectAccessReview", &raw)).unwrap();
    assert_eq!(
        got["spec"]["resourceAttributes"],
        json!({"namespace": "ns", "verb": "get", "resource": "pods"})
    );
    assert_eq!(got["kind"], "SelfSubjectAccessReview");
    let mut spec = field(1, b"aud");
    spec.extend([4 << 3, 0xd8, 0x04]);
    let got = decode(&envelope("authentication.k8s.io/v1", "TokenRequest", &field(2, &spec))).unwrap();
    assert_eq!(got["spec"], json!({"audiences": ["aud"], "expirationSeconds": 600}));
}

/// Zeros that typed clients always send are no values; zeros behind pointers are.
#[test]
fn zeros_are_kept_only_where_they_were_set() {
    // metadata: name "a", generateName "", generation 0, deletionGracePeriodSeconds 0 (a pointer), creationTimestamp empty.
    let meta = [&field(1, b"a")[..], &field(2, b""), &[7 << 3, 0], &field(8, b""), &[10 << 3, 0]].concat();
    let got = decode(&envelope("v1", "Namespace", &field(1, &meta))).unwrap();
    assert_eq!(got["metadata"], json!({"name": "a", "deletionGracePeriodSeconds": 0}));
}

#[test]
fn pointers_maps_and_inlined_messages() {
    // replicas is a pointer: a zero was meant. minReadySeconds is none: a zero says nothing.
    let spec = [vec![1 << 3, 0], vec![5 << 3, 0]].concat();
    let got = decode(&envelope("apps/v1", "Deployment", &field(2, &spec))).expect("deployment");
    assert_eq!(got["spec"], json!({"replicas": 0}));

    let data = [field(1, b"k"), field(2, b"v")].concat();
    let raw = [field(1, &field(1, b"m")), field(2, &data)].concat();
    let got = decode(&envelope("v1", "ConfigMap", &raw)).expect("map");
    assert_eq!((got["metadata"]["name"].as_str(), &got["data"]), (Some("m"), &json!({"k": "v"})));

    let path = field(1, &field(1, b"/x"));
    let volume = [field(1, b"v"), field(2, &path)].concat();
    let got = decode(&envelope("v1", "Pod", &field(2, &field(1, &volume)))).expect("pod");
    assert_eq!(got["spec"]["volumes"], json!([{"name": "v", "hostPath": {"path": "/x"}}]));
}

#[test]
fn the_special_types_round_trip() {
    round_trip(json!({
        "kind": "Pod", "apiVersion": "v1",
        "metadata": {
            "name": "a", "labels": {"x": "", "y": "z"}, "creationTimestamp": "2026-01-02T03:04:05Z",
            "managedFields": [{"manager": "m", "operation": "Update", "fieldsV1": {"f:spec": {".": {}}}}],
            "ownerReferences": [{"apiVersion": "v1", "kind": "K", "name": "n", "uid": "u", "controller": false}],
        },
        "spec": {
            "volumes": [{"name": "e", "emptyDir": {"sizeLimit": "1Gi"}}, {"name": "s", "secret": {"secretName": "x", "defaultMode": 420}}],
            "containers": [{
                "name": "c",
                "resources": {"limits": {"cpu": "100m"}},
                "envFrom": [{"configMapRef": {"name": "m", "optional": false}}],
                "livenessProbe": {"httpGet": {"path": "/", "port": "http"}, "periodSeconds": 3},
                "readinessProbe": {"tcpSocket": {"port": -1}},
                "securityContext": {"runAsUser": 0, "privileged": false},
            }],
            "ephemeralContainers": [{"name": "d", "image": "i", "resources": {}, "targetContainerName": "c"}],
            "terminationGracePeriodSeconds": 0,
        },
        "status": {},
    }));
    round_trip(
        json!({"kind": "Secret", "apiVersion": "v1", "metadata": {}, "data": {"k": "AAEC", "empty": ""}, "type": "Opaque"}),
    );
    round_trip(json!({"kind": "Lease", "apiVersion": "coordination.k8s.io/v1", "metadata": {"name": "a"},
        "spec": {"renewTime": "2026-01-02T03:04:05.678901Z", "leaseDurationSeconds": 40}}));
    round_trip(
        json!({"kind": "ControllerRevision", "apiVersion": "apps/v1", "metadata": {}, "revision": 3, "data": {"spec": [1, null, "x"]}}),
    );
    round_trip(
        json!({"kind": "SubjectAccessReview", "apiVersion": "authorization.k8s.io/v1", "metadata": {},
        "spec": {"extra": {"a": ["b", ""]}}, "status": {"allowed": false}}),
    );
    round_trip(
        json!({"kind": "ValidatingWebhookConfiguration", "apiVersion": "admissionregistration.k8s.io/v1", "metadata": {},
        "webhooks": [{"name": "w", "clientConfig": {"caBundle": "AA=="}, "rules": [{"operations": ["*"], "apiGroups": [""], "resources": ["pods"]}]}]}),
    );
}

#[test]
fn schemas_of_custom_resources_round_trip() {
    let schema = json!({"type": "object", "additionalProperties": false, "x-kubernetes-preserve-unknown-fields": true, "properties": {
        "a": {"type": "array", "items": {"type": "string", "default": "x"}, "maximum": 1.5},
        "b": {"additionalProperties": {"type": "integer", "enum": [1, "two"]}},
        "c": {"items": [{"type": "null"}], "dependencies": {"d": ["e"], "f": {"type": "string"}}},
    }});
    let object = json!({"kind": "CustomResourceDefinition", "apiVersion": "apiextensions.k8s.io/v1", "metadata": {},
        "spec": {"group": "g", "names": {"plural": "ps", "kind": "P"}, "scope": "Cluster",
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": schema}}]}});
    round_trip(object);
}

#[test]
fn kinds_without_this_form_are_told_apart() {
    let custom = json!({"kind": "Widget", "apiVersion": "example.com/v1"});
    assert!(matches!(encode(&custom), Err(Error::Kind { .. })));
    assert!(matches!(decode(&envelope("example.com/v1", "Widget", &[])), Err(Error::Kind { .. })));
    let wrong = json!({"kind": "Pod", "apiVersion": "v1", "spec": {"hostNetwork": "yes"}});
    assert_eq!(encode(&wrong), Err(Error::Field("hostNetwork")));
}

#[test]
fn a_list_is_its_items_and_a_frame_tells_its_length() {
    let item = json!({"metadata": {"name": "a"}, "data": {"k": "v"}});
    let mut list =
        List::new("v1", "ConfigMapList", "ConfigMap", &json!({"resourceVersion": "7"})).expect("known");
    list.push(&item).expect("fits");
    let bytes = list.finish().concat();
    let got = decode(&bytes).expect("a list");
    let want = json!({"kind": "ConfigMapList", "apiVersion": "v1", "metadata": {"resourceVersion": "7"}, "items": [item]});
    assert_eq!(got, want);
    assert_eq!(encode(&want).expect("a list"), bytes);

    let event = frame("ADDED", &bytes);
    assert_eq!(event[..4], ((event.len() - 4) as u32).to_be_bytes());
    assert_eq!(event[4..11], *b"\x0a\x05ADDED");
}

#[test]
fn nesting_is_bounded() {
    let mut schema = json!({"type": "string"});
    for _ in 0..200 {
        schema = json!({"not": schema});
    }
    let object = json!({"kind": "CustomResourceDefinition", "apiVersion": "apiextensions.k8s.io/v1",
        "spec": {"versions": [{"schema": {"openAPIV3Schema": schema}}]}});
    assert_eq!(encode(&object), Err(Error::Depth));
    // RawExtension items of v1 List, each an envelope with a list again.
    let mut bytes = envelope("v1", "List", &[]);
    for _ in 0..200 {
        let mut raw = Vec::new();
        encode::bytes(&mut raw, 1, &bytes);
        let mut item = Vec::new();
        encode::bytes(&mut item, 2, &raw);
        bytes = encode::open("v1", "List", item.len());
        bytes.extend(item);
    }
    assert!(decode(&bytes).is_err());
}

#[test]
fn bad_bytes_are_errors() {
    assert_eq!(decode(b"{}"), Err(Error::Magic));
    let good = envelope("v1", "ConfigMap", &field(1, &field(1, b"aud")));
    for end in MAGIC.len()..good.len() {
        let _ = decode(&good[..end]);
    }
    assert_eq!(decode(&good[..good.len() - 1]), Err(Error::Truncated));
}

const KINDS: &[(&str, &str)] = &[
    ("v1", "Pod"),
    ("v1", "Secret"),
    ("v1", "List"),
    ("apps/v1", "DeploymentList"),
    ("coordination.k8s.io/v1", "Lease"),
    ("apiextensions.k8s.io/v1", "CustomResourceDefinition"),
    ("authorization.k8s.io/v1", "SubjectAccessReview"),
    ("resource.k8s.io/v1", "ResourceClaim"),
];

/// Messages whose fields are random but well formed, so that more than the first byte is looked at.
fn messages() -> impl Strategy<Value = Vec<u8>> {
    let leaf = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..12),
        "[a-z0-9]{0,8}".prop_map(String::into_bytes),
        Just(Vec::new()),
    ];
    leaf.prop_recursive(7, 60, 5, |inner| {
        let one = (1u32..20, inner, any::<u64>(), any::<bool>()).prop_map(|(n, content, value, plain)| {
            let mut out = Vec::new();
            if plain {
                encode::number(&mut out, n, value)
            } else {
                encode::bytes(&mut out, n, &content)
            }
            out
        });
        proptest::collection::vec(one, 0..5).prop_map(|fields| fields.concat())
    })
}

proptest! {
    #[test]
    fn random_bytes_never_panic(raw in proptest::collection::vec(any::<u8>(), 0..200), kind in 0..KINDS.len()) {
        let _ = decode(&raw);
        let (version, kind) = KINDS[kind];
        let mut bytes = encode::open(version, kind, raw.len());
        bytes.extend(&raw);
        let _ = decode(&bytes);
    }

    #[test]
    fn what_is_read_can_be_written_and_read_again(raw in messages(), kind in 0..KINDS.len()) {
        let (version, kind) = KINDS[kind];
        let mut bytes = encode::open(version, kind, raw.len());
        bytes.extend(&raw);
        if let Ok(object) = decode(&bytes)
            && let Ok(again) = encode(&object)
        {
            let once = decode(&again).expect("reads what it wrote");
            let twice = decode(&encode(&once).expect("writes what it read")).expect("reads what it wrote");
            prop_assert_eq!(once, twice);
        }
    }
}
