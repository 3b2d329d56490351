//! Fuzz target: what clients send. Known good frames are mutated and cut anywhere; proptest shrinks what fails. The gate runs a
//! fixed number of cases; for longer: `PROPTEST_CASES=1000000 cargo test --release -p orlop-monitor fuzz`.

use std::path::Path;

use orlop_fuzz::{cases, cuts, mutated};
use orlop_proto::monitor::{
    Attach, ClientFrame, CreateContainer, CreateSandbox, DeleteContainer, Exec, Hello, IdMap, OciRuntime,
    Resize, SignalContainer, UpdateContainer, client_frame::Body,
};
use proptest::prelude::*;

use crate::frame::{Decoder, MAX_FRAME, encode};
use crate::sandbox;

fn seeds() -> Vec<Vec<u8>> {
    let id = || "c".to_owned();
    let map = IdMap { container_id: 0, host_id: 100_000, size: 65_536 };
    let sysctls =
        ["net.ipv4.ip_forward", "net/ipv4/conf/eth0.100/rp_filter", "kernel.shmmax", "fs.mqueue.msg_max"];
    let bodies = vec![
        Body::Hello(Hello { version: 2 }),
        Body::CreateSandbox(CreateSandbox {
            sandbox_id: id(),
            hostname: "host".into(),
            new_net: true,
            new_ipc: true,
            shared_pid: true,
            uid_map: vec![map],
            gid_map: vec![map],
            sysctls: sysctls.map(|s| (s.to_owned(), "1".to_owned())).into(),
            cgroup_path: "/a/b".into(),
            oom_score_adj: -998,
            ..Default::default()
        }),
        Body::CreateContainer(CreateContainer {
            container_id: id(),
            bundle: "/b".into(),
            log_path: "/l".into(),
            tty: true,
            log_line_limit: 5,
            runtime: Some(OciRuntime { program: "/usr/bin/runc".into(), args: vec!["--debug".into()] }),
            ..Default::default()
        }),
        Body::SignalContainer(SignalContainer { container_id: id(), signal: 15, all: true }),
        Body::DeleteContainer(DeleteContainer { container_id: id(), force: true }),
        Body::UpdateContainer(UpdateContainer { container_id: id(), linux_resources: b"{}".to_vec() }),
        Body::Exec(Exec {
            container_id: id(),
            process: b"{\"args\":[]}".to_vec(),
            timeout_ms: 7,
            ..Default::default()
        }),
        Body::Attach(Attach { container_id: id(), stdin: true, ..Default::default() }),
        Body::Stdin(vec![0, 255, 10]),
        Body::Resize(Resize { width: 80, height: 24 }),
    ];
    let one = |(i, body): (usize, &Body)| {
        let mut out = Vec::new();
        encode(&ClientFrame { id: i as u64, body: Some(body.clone()) }, &mut out);
        out
    };
    let mut out: Vec<Vec<u8>> = bodies.iter().enumerate().map(one).collect();
    out.push(out.concat());
    out
}

const WORDS: &[&[u8]] = &[
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\0\x40\0\0",
    b"\0\x40\0\x01",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80",
    b"..",
    b"net/../../etc/passwd",
    b"net..ipv4",
    b"\x0a\x00",
];

/// What is decided about a request before anything is done.
fn judge(frame: &ClientFrame) {
    let Some(Body::CreateSandbox(r)) = &frame.body else { return };
    assert!(sandbox::wanted(r).len() <= 5);
    for name in r.sysctls.keys() {
        if let Ok(file) = sandbox::sysctl_file(name, r) {
            assert!(file.starts_with("/proc/sys") && file != Path::new("/proc/sys"), "{name:?}");
            assert!(!file.components().any(|c| c == std::path::Component::ParentDir), "{name:?}");
        }
    }
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn fuzz_client_frames(bytes in mutated(seeds(), WORDS), cuts in cuts()) {
        let mut decoder = Decoder::default();
        let mut cuts = cuts.into_iter().cycle();
        let (mut at, mut frames) = (0, 0);
        'all: while at < bytes.len() {
            let end = (at + cuts.next().unwrap_or(1)).min(bytes.len());
            decoder.feed(&bytes[at..end]);
            at = end;
            loop {
                match decoder.next::<ClientFrame>() {
                    Ok(Some(frame)) => {
                        frames += 1;
                        judge(&frame);
                    }
                    Ok(None) => break,
                    Err(_) => break 'all,
                }
            }
        }
        // Each frame takes four bytes at least; what is held never exceeds what came.
        prop_assert!(frames <= bytes.len() / 4);
        prop_assert!(decoder.held() <= bytes.len() && decoder.held() <= MAX_FRAME + 4);
    }
}
