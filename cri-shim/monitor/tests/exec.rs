//! Exec: synchronous, streaming, with limits and with clients that vanish.

mod common;

use std::time::{Duration, Instant};

use common::*;
use orlop_proto::monitor::{client_frame::Body as Ask, server_frame::Body, *};
use serde_json::json;

fn request(args: &[&str]) -> Exec {
    Exec { container_id: "a".into(), process: process(args, json!({})), ..Default::default() }
}

fn stream(args: &[&str]) -> Exec {
    Exec { stream: true, stdin: true, stdout: true, stderr: true, ..request(args) }
}

#[test]
fn synchronous() {
    let pod = Pod::new("exec");
    let mut c = pod.client();
    pod.create(&mut c, "a", &["sleep", "1000"], json!({}));
    assert_eq!(c.failure(Ask::Exec(request(&["true"]))).kind, FailureKind::WrongState as i32);
    c.start("a");
    let d = c.exec_sync("a", &["sh", "-c", "echo out; echo err >&2; exit 5"]);
    assert_eq!(
        (d.exit_code, &d.stdout[..], &d.stderr[..], d.timed_out),
        (5, &b"out\n"[..], &b"err\n"[..], false)
    );
    assert_eq!(c.exec_sync("a", &["sh", "-c", "kill -9 $$"]).exit_code, 137);
    // In the container's own namespaces and cgroup, as its own session.
    let d = c.exec_sync("a", &["sh", "-c", "cat /proc/1/cmdline | tr '\\0' ' '; ls /proc/self/fd | wc -l; grep -c orlopmon /proc/self/cgroup"]);
    let text = String::from_utf8(d.stdout).unwrap();
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[0].starts_with("sleep 1000"), "{text}");
    // Nothing of the monitor's descriptors: 0, 1, 2 and the folder being listed.
    assert!(lines[0].ends_with(" 4"), "{text}");
    assert!(lines[1].parse::<u32>().unwrap() >= 1, "{text}");
    let f = c.failure(Ask::Exec(request(&["no-such-program"])));
    assert_eq!((f.kind, f.stage.as_str(), f.errno), (FailureKind::Runtime as i32, "exec", 2), "{f:?}");
    let mut bad = request(&["true"]);
    bad.process = b"{".to_vec();
    assert_eq!(c.failure(Ask::Exec(bad)).kind, FailureKind::Invalid as i32);
    let mut user = request(&["id", "-u"]);
    user.process =
        process(&["sh", "-c", "id -u; echo x > /proc/self/fd/2"], json!({"user": {"uid": 1234, "gid": 5}}));
    let d = c.exec_with(user);
    assert_eq!((&d.stdout[..], d.exit_code), (&b"1234\n"[..], 0), "{}", String::from_utf8_lossy(&d.stderr));
    pod.finish();
}

#[test]
fn a_quick_process_does_not_overtake_the_answer() {
    let pod = Pod::new("execquick");
    let mut c = pod.client();
    pod.create_started(&mut c, "a", &["sleep", "1000"]);
    for _ in 0..40 {
        let mut s = pod.client();
        s.send(Ask::Exec(stream(&["echo", "quick"])));
        let first = s.recv().expect("an answer").body.unwrap();
        assert!(matches!(first, Body::StreamStarted(_)), "{first:?} came before the stream was set up");
        assert_eq!(s.stream_to_end(), (b"quick\n".to_vec(), Vec::new(), 0));
    }
    pod.finish();
}

/// The monitor is held still from the exec's fork until its program has written, so that it finds everything at once. Where it was
/// held too early for the program or too late for the answer, it is tried again.
#[test]
fn a_terminal_does_not_overtake_the_answer() {
    use nix::sys::signal::Signal;
    use nix::sys::socket::{MsgFlags, recv};
    let pod = Pod::new("exectty");
    let mut c = pod.client();
    pod.create_started(&mut c, "a", &["sleep", "1000"]);
    let monitor = pod.monitor_pid();
    let proc = |name: &str| std::fs::read_to_string(format!("/proc/{monitor}/{name}")).unwrap_or_default();
    let children = || proc(&format!("task/{monitor}/children")).split_whitespace().count();
    let signal = |s| nix::sys::signal::kill(nix::unistd::Pid::from_raw(monitor), s).unwrap();
    let written = pod.dir.join("rootfs/tmp/written");
    let within = |limit, check: &dyn Fn() -> bool| {
        let begun = Instant::now();
        while !check() && begun.elapsed() < limit {
            std::thread::sleep(Duration::from_micros(200));
        }
        check()
    };
    let (begun, mut tried, mut held) = (Instant::now(), 0, 0);
    while held < 5 {
        assert!(begun.elapsed() < Duration::from_secs(60), "held in time {held} times of {tried}");
        wait_until(|| children() == 1);
        let _ = std::fs::remove_file(&written);
        let mut s = pod.client();
        let script = "echo quick; echo >/tmp/written; sleep 0.2";
        s.send(Ask::Exec(Exec { tty: true, ..stream(&["sh", "-c", script]) }));
        let forked = Instant::now();
        while children() == 1 && forked.elapsed() < Duration::from_secs(1) {}
        signal(Signal::SIGSTOP);
        wait_until(|| proc("stat").rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')));
        let has_written = within(Duration::from_millis(500), &|| written.exists());
        let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let answered = recv(std::os::fd::AsRawFd::as_raw_fd(&s.socket), &mut [0], peek).is_ok();
        tried += 1;
        held += u32::from(has_written && !answered);
        signal(Signal::SIGCONT);
        let first = s.recv().expect("an answer").body.unwrap();
        assert!(matches!(first, Body::StreamStarted(_)), "{first:?} came before the stream was set up");
        assert_eq!(s.stream_to_end(), (b"quick\r\n".to_vec(), Vec::new(), 0));
    }
    println!("held in time {held} times of {tried}");
    pod.finish();
}

#[test]
fn limits() {
    let pod = Pod::new("execlimits");
    let mut c = pod.client();
    pod.create_started(&mut c, "a", &["sleep", "1000"]);
    let begun = Instant::now();
    let d =
        c.exec_with(Exec { timeout_ms: 300, ..request(&["sh", "-c", "echo before; sleep 60 & sleep 60"]) });
    assert!(d.timed_out && d.stdout == b"before\n", "{d:?}");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    // A child that keeps the pipe does not hold the answer back.
    let begun = Instant::now();
    let d = c.exec_sync("a", &["sh", "-c", "sleep 60 & echo hi"]);
    assert_eq!((&d.stdout[..], d.exit_code), (&b"hi\n"[..], 0));
    assert!(begun.elapsed() < Duration::from_secs(30));
    let d = c.exec_with(Exec {
        output_limit: 1000,
        ..request(&["sh", "-c", "head -c 5000 /dev/zero; head -c 10 /dev/zero >&2"])
    });
    assert_eq!((d.stdout.len(), d.stderr.len(), d.exit_code), (1000, 10, 0));
    let d = c.exec_sync("a", &["sh", "-c", "head -c 20000000 /dev/zero"]);
    assert_eq!((d.stdout.len(), d.exit_code), (16 << 20, 0));
    // Many at once on one connection, answered as they finish.
    let ids: Vec<u64> =
        (0..20).map(|i| c.send(Ask::Exec(request(&["sh", "-c", &format!("exit {i}")])))).collect();
    for (i, id) in ids.into_iter().enumerate() {
        match c.wait(id) {
            Body::ExecDone(d) => assert_eq!(d.exit_code, i as i32),
            other => panic!("{other:?}"),
        }
    }
    pod.finish();
}

#[test]
fn streaming() {
    let pod = Pod::new("execstream");
    let mut c = pod.client();
    pod.create_started(&mut c, "a", &["sleep", "1000"]);
    let mut s = pod.client();
    s.send(Ask::Exec(stream(&["sh", "-c", "cat; echo done >&2; exit 4"])));
    // Sent before the process exists: kept for it.
    s.send(Ask::Stdin(b"hello ".to_vec()));
    s.send(Ask::Stdin(b"there".to_vec()));
    s.send(Ask::CloseStdin(CloseStdin {}));
    assert_eq!(s.stream_to_end(), (b"hello there".to_vec(), b"done\n".to_vec(), 4));
    assert!(s.recv().is_none(), "the connection ends with the stream");
    // More than any buffer in between, both ways.
    let mut s = pod.client();
    s.send(Ask::Exec(stream(&["cat"])));
    let mut writer = Client { socket: s.socket.try_clone().unwrap(), ..Client::raw(&pod.dir) };
    let sender = std::thread::spawn(move || {
        for i in 0..100u8 {
            writer.send(Ask::Stdin(vec![i; 100_000]));
        }
        writer.send(Ask::CloseStdin(CloseStdin {}));
    });
    std::thread::sleep(Duration::from_millis(300));
    let (out, _, code) = s.stream_to_end();
    sender.join().unwrap();
    assert_eq!((out.len(), code), (10_000_000, 0));
    assert!(out.chunks(100_000).enumerate().all(|(i, c)| c.iter().all(|b| *b == i as u8)));
    // A client that reads nothing holds up only itself.
    let mut slow = pod.client();
    slow.send(Ask::Exec(stream(&["yes"])));
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(c.exec_sync("a", &["echo", "x"]).stdout, b"x\n");
    drop(slow);
    wait_until(|| {
        let d = c.exec_sync("a", &["ps", "-o", "comm"]);
        !String::from_utf8_lossy(&d.stdout).contains("yes")
    });
    pod.finish();
}

#[test]
fn vanished_clients_leave_no_process() {
    let pod = Pod::new("execgone");
    let mut c = pod.client();
    pod.create_started(&mut c, "a", &["sleep", "1000"]);
    for delay in [0, 1, 3, 5, 10, 30] {
        let mut s = pod.client();
        s.send(Ask::Exec(stream(&["sleep", "777"])));
        std::thread::sleep(Duration::from_millis(delay));
        drop(s);
        let mut s = pod.client();
        s.send(Ask::Exec(request(&["sleep", "777"])));
        std::thread::sleep(Duration::from_millis(delay));
    }
    wait_until(|| {
        let d = c.exec_sync("a", &["ps", "-o", "args"]);
        !String::from_utf8_lossy(&d.stdout).contains("777")
    });
    pod.finish();
}

#[test]
fn terminals() {
    let pod = Pod::new("exectty");
    let mut c = pod.client();
    pod.create_started(&mut c, "a", &["sleep", "1000"]);
    let mut s = pod.client();
    s.send(Ask::Exec(Exec { tty: true, ..stream(&["sh"]) }));
    s.send(Ask::Resize(Resize { width: 77, height: 33 }));
    s.send(Ask::Stdin(b"stty size; tty; id -u > /dev/tty; echo e''nd\n".to_vec()));
    let text = s.stream_until("end");
    assert!(text.contains("33 77") && text.contains("/dev/pts/"), "{text}");
    s.send(Ask::Stdin(b"exit 9\n".to_vec()));
    let (_, err, code) = s.stream_to_end();
    assert_eq!((code, err.len()), (9, 0));
    // The last bytes before the end are there, every time.
    for _ in 0..20 {
        let mut s = pod.client();
        s.send(Ask::Exec(Exec { tty: true, ..stream(&["sh", "-c", "seq 1 2000"]) }));
        let (out, _, code) = s.stream_to_end();
        let text = String::from_utf8(out).unwrap();
        assert!(text.ends_with("1999\r\n2000\r\n") && text.starts_with("1\r\n"), "{}", text.len());
        assert_eq!(code, 0);
    }
    // Closing the terminal's client hangs up what runs in it.
    let mut s = pod.client();
    s.send(Ask::Exec(Exec { tty: true, ..stream(&["sh", "-c", "echo up; sleep 777"]) }));
    s.stream_until("up");
    drop(s);
    wait_until(|| !String::from_utf8_lossy(&c.exec_sync("a", &["ps", "-o", "args"]).stdout).contains("777"));
    pod.finish();
}

/// A client that is suspended, with too little left to count as stuck.
#[test]
fn what_nobody_reads_does_not_keep_the_monitor() {
    let pod = Pod::new("linger");
    let mut c = pod.client();
    pod.create_started(&mut c, "a", &["sleep", "1000"]);
    let mut suspended = pod.client();
    suspended.send(Ask::Exec(stream(&["head", "-c", "800000", "/dev/zero"])));
    match suspended.recv().expect("an answer").body.unwrap() {
        Body::StreamStarted(_) => {}
        other => panic!("{other:?}"),
    }
    wait_until(|| {
        let d = c.exec_sync("a", &["ps", "-o", "comm"]);
        !String::from_utf8_lossy(&d.stdout).contains("head")
    });
    pod.finish();
}

#[test]
fn execs_and_attaches_leave_places_for_other_requests() {
    let pod = Pod::new("places");
    let mut c = pod.client();
    pod.create_started(&mut c, "a", &["sleep", "1000"]);
    let attach = || Ask::Attach(Attach { container_id: "a".into(), stdout: true, ..Default::default() });
    let mut attached = Vec::new();
    // This client and the attached ones have the places for those that last.
    while attached.len() < 511 {
        let mut s = pod.client();
        match s.call(attach()) {
            Body::StreamStarted(_) => attached.push(s),
            other => panic!("{other:?} after {}", attached.len()),
        }
    }
    for refused in [attach(), Ask::Exec(request(&["true"])), Ask::Exec(stream(&["true"]))] {
        let mut s = pod.client();
        let f = s.failure(refused);
        assert!(f.message.contains("too many attaches and execs"), "{f:?}");
        // And nothing else is.
        assert_eq!(s.container("a").phase, ContainerPhase::Running as i32);
    }
    attached.pop();
    wait_until(|| matches!(pod.client().call(attach()), Body::StreamStarted(_)));
    drop(attached);
    // The same for descriptors, which are fewer where the limit is low.
    let monitor = rustix::process::Pid::from_raw(pod.monitor_pid()).unwrap();
    let files = rustix::process::Resource::Nofile;
    let limit = rustix::process::Rlimit { current: Some(128), ..rustix::process::getrlimit(files) };
    rustix::process::prlimit(Some(monitor), files, limit).unwrap();
    let mut running = Vec::new();
    let refusal = loop {
        let mut s = pod.client();
        match s.call(Ask::Exec(stream(&["sleep", "100"]))) {
            Body::StreamStarted(_) => running.push(s),
            // The attached ones may not all be gone yet.
            Body::Failure(_) if running.is_empty() => {}
            other => break other,
        }
    };
    assert!(
        matches!(&refusal, Body::Failure(f) if f.message.contains("too many attaches and execs")),
        "{refusal:?}"
    );
    assert_eq!(pod.client().container("a").phase, ContainerPhase::Running as i32);
    drop(running);
    pod.finish();
}
