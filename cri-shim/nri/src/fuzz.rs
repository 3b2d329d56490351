//! Fuzz target: what plugins send. Known good bytes are mutated and cut anywhere; what arrives is put together as if it were the
//! answer of a plugin. The gate runs a fixed number of cases; for longer: `PROPTEST_CASES=1000000 cargo test --release -p orlop-nri
//! fuzz`.

use orlop_fuzz::{cases, cuts, mutated};
use proptest::prelude::*;
use prost::Message as _;

use crate::api;
use crate::merge::{Creation, Updates};
use crate::mux::{Decoder, Stream, encode};
use crate::ttrpc::{Message, wire};

fn adjustment() -> api::ContainerAdjustment {
    let memory = api::LinuxMemory { limit: Some(api::OptionalInt64 { value: -1 }), ..Default::default() };
    let resources = api::LinuxResources {
        memory: Some(memory),
        unified: [("memory.high".to_owned(), "1".to_owned())].into(),
        ..Default::default()
    };
    api::ContainerAdjustment {
        annotations: [("-a".to_owned(), String::new()), ("a".to_owned(), "1".to_owned())].into(),
        mounts: vec![api::Mount { destination: "-/a".into(), ..Default::default() }],
        env: vec![api::KeyValue { key: "-".into(), value: "x".into() }],
        args: vec![String::new(), "a".into()],
        linux: Some(api::LinuxContainerAdjustment { resources: Some(resources), ..Default::default() }),
        ..Default::default()
    }
}

fn update(id: &str) -> api::ContainerUpdate {
    let linux = adjustment().linux.and_then(|l| l.resources);
    api::ContainerUpdate {
        container_id: id.into(),
        linux: Some(api::LinuxContainerUpdate { resources: linux }),
        ignore_failure: true,
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let call = |method: &str, payload: Vec<u8>| wire::Request {
        service: "nri.pkg.api.v1alpha1.Runtime".into(),
        method: method.into(),
        payload,
        timeout_nano: 1,
    };
    let register = api::RegisterPluginRequest {
        plugin_name: "a".into(),
        plugin_idx: "10".into(),
        nri_version: "v0.12.5".into(),
    };
    let updates = api::UpdateContainersRequest { update: vec![update("c")], evict: Vec::new() };
    let create = api::CreateContainerResponse {
        adjust: Some(adjustment()),
        update: vec![update("c"), update("new")],
        evict: Vec::new(),
    };
    let mut out = vec![
        encode(Stream::Runtime, &Message::request(1, &call("RegisterPlugin", register.encode_to_vec()))),
        encode(Stream::Runtime, &Message::request(3, &call("UpdateContainers", updates.encode_to_vec()))),
        encode(Stream::Plugin, &Message::response(1, Ok(create.encode_to_vec()))),
        encode(Stream::Plugin, &Message::response(3, Err((2, "no".into())))),
        encode(Stream::Plugin, &Message::response(5, Ok(vec![0; 9000]))),
    ];
    out.push(out.concat());
    out
}

const WORDS: &[&[u8]] = &[
    b"\0\0\0\0",
    b"\0\0\0\x01",
    b"\0\0\0\x02",
    b"\xff\xff\xff\xff",
    b"\0\x40\0\x0a",
    b"\0\x40\0\x0b",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    b"\x0a\x00",
];

/// Whatever it says, nothing of the container's own identity changes, and each value has one owner.
fn judge(payload: &[u8]) {
    if let Ok(answer) = api::CreateContainerResponse::decode(payload) {
        let container =
            api::Container { id: "new".into(), pod_sandbox_id: "pod".into(), ..Default::default() };
        let mut creation = Creation::new(container);
        let first = creation.apply("10-a", answer.clone());
        let set = first.is_ok() && !creation.adjust.mounts.is_empty();
        assert_eq!(
            (creation.container.id.as_str(), creation.container.pod_sandbox_id.as_str()),
            ("new", "pod")
        );
        assert!(creation.updates.others.iter().all(|u| u.container_id != "new"));
        let again = creation.apply("20-b", answer.clone());
        let sets_mount =
            answer.adjust.is_some_and(|a| a.mounts.iter().any(|m| !m.destination.starts_with('-')));
        let takes_away = creation.adjust.mounts.iter().any(|m| m.destination.starts_with('-'));
        assert!(!(set && sets_mount && !takes_away) || again.is_err());
    }
    if let Ok(request) = api::UpdateContainersRequest::decode(payload) {
        // Errors are answers, too.
        let _ = Updates::requested("c", api::LinuxResources::default()).apply("10-a", request.update);
    }
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn fuzz_plugin_bytes(bytes in mutated(seeds(), WORDS), cuts in cuts()) {
        let (mut decoder, mut got) = (Decoder::default(), Vec::new());
        let mut cuts = cuts.into_iter().cycle();
        let mut at = 0;
        while at < bytes.len() {
            let end = (at + cuts.next().unwrap_or(1)).min(bytes.len());
            if decoder.feed(&bytes[at..end], &mut got).is_err() {
                break;
            }
            at = end;
        }
        prop_assert!(decoder.held() + got.iter().map(|(_, m)| m.payload.len()).sum::<usize>() <= bytes.len());
        for (_, message) in &got {
            if let Ok(response) = wire::Response::decode(&*message.payload) {
                judge(&response.payload);
            }
            if let Ok(request) = wire::Request::decode(&*message.payload) {
                judge(&request.payload);
            }
        }
    }
}
