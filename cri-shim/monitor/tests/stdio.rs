//! Logs, attach, terminals and clients that do not keep up.

mod common;

use common::*;
use orlop_proto::monitor::{client_frame::Body as Ask, server_frame::Body, *};
use serde_json::json;

fn attach(c: &mut Client, id: &str, stdin: bool) {
    let a = Attach { container_id: id.into(), stdin, stdout: true, stderr: true };
    match c.call(Ask::Attach(a)) {
        Body::StreamStarted(_) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_counter_survives_rotation() {
    let pod = Pod::new("rotate");
    let mut c = pod.client();
    let script = "i=0; while :; do echo $i; i=$((i+1)); usleep 10000; done";
    pod.create_started(&mut c, "a", &["sh", "-c", script]);
    let mut files = Vec::new();
    for n in 0..8 {
        wait_until(|| std::fs::metadata(pod.log_path("a")).unwrap().len() > 0);
        let rotated = pod.dir.join(format!("rotated.{n}"));
        std::fs::rename(pod.log_path("a"), &rotated).unwrap();
        files.push(rotated);
        // Lines written between the rename and this go to the renamed file.
        c.done(Ask::ReopenLog(ReopenLog { container_id: "a".into() }));
        assert!(pod.log_path("a").exists());
    }
    wait_until(|| std::fs::metadata(pod.log_path("a")).unwrap().len() > 0);
    c.signal("a", 9);
    c.wait_exit("a");
    files.push(pod.log_path("a"));
    let all: Vec<String> = files
        .iter()
        .flat_map(|f| parse_log(f))
        .map(|(_, tag, t)| {
            assert_eq!(tag, "F");
            t
        })
        .collect();
    assert_eq!(all, (0..all.len()).map(|i| i.to_string()).collect::<Vec<_>>());
    assert!(all.len() >= files.len(), "each file has lines");
    pod.finish();
}

#[test]
fn long_lines_are_split_and_nothing_is_lost() {
    let pod = Pod::new("lines");
    let mut c = pod.client();
    pod.create_started(
        &mut c,
        "a",
        &["sh", "-c", "head -c 40000 /dev/zero | tr '\\0' x; echo; seq 1 30000; seq 1 500 >&2"],
    );
    c.wait_exit("a");
    let log = pod.log("a");
    let xs: Vec<_> = log.iter().filter(|l| l.2.starts_with('x')).map(|l| (l.1.as_str(), l.2.len())).collect();
    assert_eq!(xs, [("P", 16384), ("P", 16384), ("F", 40000 - 2 * 16384)]);
    let numbers = |s: &str| {
        log.iter()
            .filter(|l| l.0 == s && !l.2.starts_with('x'))
            .map(|l| l.2.parse::<u32>().unwrap())
            .collect::<Vec<_>>()
    };
    assert_eq!(numbers("stdout"), (1..=30000).collect::<Vec<_>>());
    assert_eq!(numbers("stderr"), (1..=500).collect::<Vec<_>>());
    pod.finish();
}

#[test]
fn attach_gives_input_and_output_to_several() {
    let pod = Pod::new("attach");
    let mut c = pod.client();
    let mut r =
        pod.bundle("a", &["sh", "-c", "while read l; do echo got $l; echo err >&2; done; exit 6"], json!({}));
    (r.stdin, r.stdin_once) = (true, true);
    create(&mut c, r);
    let (mut one, mut two, mut mute) = (pod.client(), pod.client(), pod.client());
    attach(&mut one, "a", true);
    attach(&mut two, "a", false);
    mute.call(Ask::Attach(Attach { container_id: "a".into(), ..Default::default() }));
    c.start("a");
    one.send(Ask::Stdin(b"abc\n".to_vec()));
    two.send(Ask::Stdin(b"not mine\n".to_vec()));
    one.stream_until("got abc\n");
    // The end of the first client's stdin is the container's.
    one.send(Ask::Stdin(b"last\n".to_vec()));
    one.send(Ask::CloseStdin(CloseStdin {}));
    let (out, err, code) = two.stream_to_end();
    assert_eq!((out, err, code), (b"got abc\ngot last\n".to_vec(), b"err\nerr\n".to_vec(), 6));
    assert_eq!(mute.stream_to_end(), (vec![], vec![], 6));
    assert_eq!(pod.log("a").len(), 4);
    let f = pod.client().failure(Ask::Attach(Attach { container_id: "a".into(), ..Default::default() }));
    assert_eq!(f.kind, FailureKind::WrongState as i32);
    pod.finish();
}

#[test]
fn stdin_once_ends_with_its_client() {
    let pod = Pod::new("once");
    let mut c = pod.client();
    for (id, once) in [("once", true), ("open", false)] {
        let mut r = pod.bundle(id, &["sh", "-c", "cat; exit 2"], json!({}));
        (r.stdin, r.stdin_once) = (true, once);
        create(&mut c, r);
        c.start(id);
        let mut a = pod.client();
        attach(&mut a, id, true);
        a.send(Ask::Stdin(b"x\n".to_vec()));
        a.stream_until("x\n");
    }
    assert_eq!(c.wait_exit("once").exit_code, 2);
    assert_eq!(c.container("open").phase, ContainerPhase::Running as i32);
    pod.finish();
}

#[test]
fn terminal() {
    let pod = Pod::new("tty");
    let mut c = pod.client();
    let mut r = pod.bundle("a", &["sh"], json!({"process": {"user": {"uid": 1000, "gid": 1000}}}));
    (r.tty, r.stdin) = (true, true);
    create(&mut c, r);
    let mut a = pod.client();
    attach(&mut a, "a", true);
    a.send(Ask::Resize(Resize { width: 101, height: 42 }));
    c.start("a");
    a.send(Ask::Stdin(b"stty size; echo to-tty > /dev/tty; echo re > $(tty); echo e''nd\n".to_vec()));
    let text = a.stream_until("end");
    assert!(text.contains("42 101") && text.contains("to-tty") && text.contains("\nre\r"), "{text}");
    a.send(Ask::Stdin(b"exit 3\n".to_vec()));
    assert_eq!(a.stream_to_end().2, 3);
    assert_eq!(c.wait_exit("a").exit_code, 3);
    assert!(pod.log("a").iter().any(|l| l.0 == "stdout" && l.2.contains("42 101")));
    pod.finish();
}

#[test]
fn a_slow_client_blocks_nobody_for_ever() {
    let pod = Pod::new("slow");
    let mut c = pod.client();
    pod.create(&mut c, "a", &["sh", "-c", "while :; do seq 1 20000; done"], json!({}));
    pod.create(&mut c, "b", &["sh", "-c", "while :; do echo tick; usleep 20000; done"], json!({}));
    let mut deaf = pod.client();
    attach(&mut deaf, "a", false);
    c.start("a");
    c.start("b");
    // The flood stops at the deaf client's bound; the other container does not notice: it says ten lines meanwhile.
    let size = || std::fs::metadata(pod.log_path("a")).unwrap().len();
    let mut held = 0;
    wait_until(|| {
        held = size();
        let ticks = pod.log("b").len();
        wait_until(|| pod.log("b").len() >= ticks + 10);
        held > 0 && size() == held
    });
    assert_eq!(c.exec_sync("a", &["echo", "x"]).stdout, b"x\n");
    // After its patience the monitor cuts the client off and the container goes on.
    wait_until(|| size() > held);
    c.delete("a");
    pod.finish();
}

#[test]
fn users_may_reopen_their_streams() {
    let pod = Pod::new("reopen");
    let mut c = pod.client();
    let user = json!({"process": {"user": {"uid": 1000, "gid": 1000}}});
    pod.create(&mut c, "a", &["sh", "-c", "echo a > /proc/self/fd/1; echo b > /proc/self/fd/2"], user);
    c.start("a");
    assert_eq!(c.wait_exit("a").exit_code, 0);
    assert_eq!(pod.log("a").len(), 2);
    pod.finish();
}
