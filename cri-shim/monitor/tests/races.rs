//! The published escapes as they are really done: somebody who shares a volume with the container exchanges links in it, thousands of
//! times a second, while containers are created and executed into. What is refused is safe; what is created must be closed.

mod common;

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use common::*;
use orlop_proto::monitor::{client_frame::Body as Ask, server_frame::Body, *};
use rustix::fs::{CWD, FileType, Mode, RenameFlags, makedev, mknodat, renameat_with};
use serde_json::{Value, json};

const ROUNDS: usize = 24;
const PROC_SUPER_MAGIC: i64 = 0x9fa0;
const MASKED: [&str; 2] = ["/proc/kcore", "/proc/keys"];

/// One race at a time: two on two processors leave the containers' side so little time that hardly an exchange comes at the wrong
/// moment.
static ALONE: Mutex<()> = Mutex::new(());

/// A loop that exchanges the names of each pair until its end.
struct Race {
    _alone: MutexGuard<'static, ()>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Race {
    fn of(pairs: Vec<(PathBuf, PathBuf)>) -> Race {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let (stop, swaps) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (ended, count) = (stop.clone(), swaps.clone());
        let thread = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                for (a, b) in &pairs {
                    renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).expect("an exchange");
                }
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        wait_until(|| swaps.load(Ordering::Relaxed) > 10);
        Race { _alone: alone, stop, thread: Some(thread) }
    }
}

impl Drop for Race {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || matches!(ended, Some(Ok(()))), "the race broke off");
    }
}

/// A folder of the host that no container has as a volume: whatever reaches it shows.
struct Outside {
    dir: PathBuf,
    before: Vec<String>,
}

impl Outside {
    fn of(pod: &Pod) -> Outside {
        let dir = pod.dir.join("outside");
        fs::create_dir_all(dir.join("folder")).unwrap();
        for name in ["file", "ptmx", "folder/file"] {
            fs::write(dir.join(name), "the host's").unwrap();
        }
        let before = look(&dir);
        Outside { dir, before }
    }

    fn check(&self) {
        assert_eq!(look(&self.dir), self.before, "the host's folder was changed");
    }
}

/// All that lies in a folder, with kind, owner and content.
fn look(dir: &Path) -> Vec<String> {
    let mut out = Vec::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let (path, m) = (entry.path(), fs::symlink_metadata(entry.path()).unwrap());
        let text = if m.is_file() { fs::read_to_string(&path).unwrap() } else { String::new() };
        out.push(format!("{} {:o} {}:{} {text}", path.display(), m.mode(), m.uid(), m.gid()));
        if m.is_dir() {
            out.extend(look(&path));
        }
    }
    out.sort();
    out
}

fn is_null(path: &str) -> bool {
    fs::metadata(path).is_ok_and(|m| m.file_type().is_char_device() && m.rdev() == makedev(1, 3))
}

/// A container that exists is closed: its /proc is the kernel's, with nothing on it but what closes it.
fn check_closed(pid: u32, outside: &Outside) {
    let root = format!("/proc/{pid}/root");
    let file_system = rustix::fs::statfs(format!("{root}/proc")).unwrap().f_type as i64;
    assert_eq!(file_system, PROC_SUPER_MAGIC, "the container's /proc");
    for path in MASKED.into_iter().filter(|p| Path::new(p).exists()) {
        assert!(is_null(&format!("{root}{path}")), "{path} can be seen");
    }
    let table = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    let mut readonly = false;
    for line in table.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let kind = line.split_once(" - ").map_or("", |(_, fs)| fs.split(' ').next().unwrap_or_default());
        assert!(
            !fields[3].starts_with(outside.dir.to_str().unwrap()),
            "the host's folder is mounted: {line}"
        );
        readonly |= fields[4] == "/proc/sys" && fields[5].split(',').any(|o| o == "ro");
        if fields[4].starts_with("/proc") {
            assert!(kind == "proc" || MASKED.contains(&fields[4]), "on the container's /proc: {line}");
        }
    }
    assert!(readonly, "/proc/sys can be written:\n{table}");
}

fn closed(mut spec: Value) -> Value {
    spec["linux"]["maskedPaths"] = json!(MASKED);
    spec["linux"]["readonlyPaths"] = json!(["/proc/sys"]);
    spec
}

fn volume(from: &Path, at: &str) -> Value {
    json!({"destination": at, "type": "bind", "source": from, "options": ["rbind", "rprivate"]})
}

fn usual_mounts() -> Vec<Value> {
    vec![
        json!({"destination": "/proc", "type": "proc", "source": "proc"}),
        json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]}),
        json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]}),
    ]
}

/// Without hooks, and with some, for which the first process waits between the mounts and its new root.
fn both_ways(name: &str, try_in: impl Fn(&Pod)) {
    for hooked in [false, true] {
        let mut pod = Pod::new(name);
        pod.hooked = hooked;
        try_in(&pod);
        pod.finish();
    }
}

/// The process of the container, unless it is refused.
fn attempt(c: &mut Client, request: CreateContainer) -> Option<u32> {
    match c.call(Ask::CreateContainer(request)) {
        Body::ContainerCreated(r) => Some(r.pid),
        Body::Failure(f) => {
            println!("refused: {}", f.message);
            None
        }
        other => panic!("{other:?}"),
    }
}

/// CVE-2025-31133: the volume is the container's /dev, and its null device becomes a link to a file of /proc again and again. What
/// masks paths is the device nevertheless.
#[test]
fn cve_2025_31133_the_null_device_is_exchanged() {
    let pod = Pod::new("racenull");
    let (mut c, outside) = (pod.client(), Outside::of(&pod));
    let vol = pod.dir.join("vol");
    fs::create_dir(&vol).unwrap();
    mknodat(CWD, vol.join("null"), FileType::CharacterDevice, Mode::from(0o666), makedev(1, 3)).unwrap();
    symlink("/proc/sys/kernel/shm_rmid_forced", vol.join("other")).unwrap();
    let race = Race::of(vec![(vol.join("null"), vol.join("other"))]);
    let mut mounts = usual_mounts();
    mounts.truncate(1);
    mounts.push(volume(&vol, "/dev"));
    let (mut made, mut tried) = (0, 0);
    while made < ROUNDS {
        tried += 1;
        assert!(tried < ROUNDS * 100, "all are refused");
        let request = pod.bundle("a", &["sleep", "100"], closed(json!({"mounts": mounts})));
        let Some(pid) = attempt(&mut c, request) else { continue };
        made += 1;
        check_closed(pid, &outside);
        assert!(is_null(&format!("/proc/{pid}/fd/0")));
        c.start("a");
        assert_eq!(c.exec_sync("a", &["cat", "/proc/keys"]).stdout, b"");
        c.delete("a");
    }
    drop(race);
    outside.check();
    pod.finish();
}

/// CVE-2025-52565: the volume is the container's /dev, and the folder of its terminals, the multiplexer and the console become
/// others. The terminal is one all the same, and what is masked stays so.
#[test]
fn cve_2025_52565_terminals_are_exchanged() {
    let pod = Pod::new("racetty");
    let (mut c, outside) = (pod.client(), Outside::of(&pod));
    let vol = pod.dir.join("vol");
    for folder in ["pts", "pts2"] {
        fs::create_dir_all(vol.join(folder)).unwrap();
    }
    mknodat(CWD, vol.join("null"), FileType::CharacterDevice, Mode::from(0o666), makedev(1, 3)).unwrap();
    let target = "/proc/sys/kernel/shm_rmid_forced";
    for name in ["pts2/ptmx", "pts2/0", "pts2/1", "console2", "ptmx2"] {
        symlink(target, vol.join(name)).unwrap();
    }
    symlink("pts/ptmx", vol.join("ptmx")).unwrap();
    fs::write(vol.join("console"), "").unwrap();
    let pair = |a: &str| (vol.join(a), vol.join(format!("{a}2")));
    let mut mounts = usual_mounts();
    mounts[1] = volume(&vol, "/dev");
    let (mut made, mut tried) = (0, 0);
    // A folder that becomes another is missed by most; so few are enough.
    while made < ROUNDS / 2 {
        tried += 1;
        assert!(tried < ROUNDS * 100, "all are refused");
        let race = Race::of(match tried % 3 {
            0 => vec![pair("pts"), pair("console"), pair("ptmx")],
            1 => vec![pair("console")],
            _ => vec![pair("pts")],
        });
        let spec = closed(json!({"mounts": mounts, "process": {"terminal": true}}));
        let request = CreateContainer { tty: true, ..pod.bundle("a", &["sleep", "100"], spec) };
        if let Some(pid) = attempt(&mut c, request) {
            made += 1;
            check_closed(pid, &outside);
            for fd in 0..3 {
                let m = fs::metadata(format!("/proc/{pid}/fd/{fd}")).unwrap();
                assert!(m.file_type().is_char_device() && rustix::fs::major(m.rdev()) == 136, "{m:?}");
            }
            c.start("a");
            let exec = Exec {
                container_id: "a".into(),
                process: process(&["cat", "/proc/keys"], json!({})),
                tty: true,
                ..Default::default()
            };
            match c.call(Ask::Exec(exec)) {
                Body::ExecDone(d) => assert_eq!(d.stdout, b""),
                Body::Failure(_) => {}
                other => panic!("{other:?}"),
            }
            c.delete("a");
        }
        drop(race);
    }
    outside.check();
    pod.finish();
}

/// CVE-2025-52881: where a volume goes becomes a link to places in /proc, so that what the runtime and its programs write there
/// would go elsewhere, and what is masked would lie open.
#[test]
fn cve_2025_52881_nothing_comes_to_lie_on_proc() {
    both_ways("raceproc", |pod| {
        let (mut c, outside) = (pod.client(), Outside::of(pod));
        let (vol, fake) = (pod.dir.join("vol"), pod.dir.join("fake"));
        fs::create_dir_all(fake.join("self/attr")).unwrap();
        fs::create_dir_all(vol.join("x")).unwrap();
        fs::write(fake.join("self/attr/exec"), "").unwrap();
        let mut made = 0;
        for (i, to) in ["/proc", "/proc/sys", "/proc/self/attr", "/proc/self"].iter().enumerate() {
            let link = vol.join(format!("link{i}"));
            symlink(to, &link).unwrap();
            let race = Race::of(vec![(vol.join("x"), link)]);
            for _ in 0..ROUNDS / 4 {
                let mut mounts = usual_mounts();
                mounts.extend([volume(&vol, "/v"), volume(&fake, "/v/x")]);
                let request = pod.bundle("a", &["sleep", "100"], closed(json!({"mounts": mounts})));
                if let Some(pid) = attempt(&mut c, request) {
                    made += 1;
                    check_closed(pid, &outside);
                    c.delete("a");
                }
            }
            drop(race);
            // Back to the folder, whichever it is now.
            if fs::symlink_metadata(vol.join("x")).unwrap().is_symlink() {
                let link = vol.join(format!("link{i}"));
                renameat_with(CWD, vol.join("x"), CWD, link, RenameFlags::EXCHANGE).unwrap();
            }
        }
        println!("{made} were created");
        outside.check();
        assert_eq!(fs::read_to_string(fake.join("self/attr/exec")).unwrap(), "");
    });
}

/// CVE-2021-30465 and its kind: where a volume goes, the working directory and the place of a device become links to the host's
/// folder, by name and by descriptor.
#[test]
fn volumes_and_folders_stay_inside_while_links_are_exchanged() {
    both_ways("raceinside", |pod| {
        let (mut c, outside) = (pod.client(), Outside::of(pod));
        let (vol, given) = (pod.dir.join("vol"), pod.dir.join("given"));
        fs::create_dir(&given).unwrap();
        for folder in ["at", "cwd", "dev"] {
            fs::create_dir_all(vol.join(folder)).unwrap();
        }
        fs::write(vol.join("cwd/inside"), "").unwrap();
        let far = format!("../../../../../../../../../../..{}", outside.dir.display());
        for (name, to) in
            [("at2", outside.dir.to_str().unwrap()), ("cwd2", "/proc/self/fd/5"), ("dev2", &far)]
        {
            symlink(to, vol.join(name)).unwrap();
        }
        let pair = |a: &str| (vol.join(a), vol.join(format!("{a}2")));
        let race = Race::of(vec![pair("at"), pair("cwd"), pair("dev")]);
        let inside = fs::metadata(vol.join("cwd").parent().unwrap()).unwrap().dev();
        for round in 0..ROUNDS {
            let mut mounts = usual_mounts();
            mounts.extend([volume(&vol, "/v"), volume(&given, "/v/at/new"), volume(&vol, "/dev/v")]);
            let mut spec = closed(json!({"mounts": mounts}));
            // By name and by descriptor, alternately.
            spec["process"] = json!({"cwd": if round % 2 == 0 { "/v/cwd" } else { "/v/at/deep" }});
            spec["linux"]["devices"] = json!([{"path": "/dev/v/dev/zero", "type": "c", "major": 1, "minor": 5,
                "uid": 1234, "gid": 1234}]);
            let request = pod.bundle("a", &["sleep", "100"], spec);
            if let Some(pid) = attempt(&mut c, request) {
                check_closed(pid, &outside);
                assert_eq!(fs::metadata(format!("/proc/{pid}/cwd")).unwrap().dev(), inside);
                c.start("a");
                for _ in 0..3 {
                    let exec = Exec {
                        container_id: "a".into(),
                        process: process(&["ls"], json!({"cwd": "/v/cwd"})),
                        ..Default::default()
                    };
                    match c.call(Ask::Exec(exec)) {
                        Body::ExecDone(d) => assert_eq!(d.stdout, b"inside\n"),
                        Body::Failure(_) => {}
                        other => panic!("{other:?}"),
                    }
                }
                c.delete("a");
            }
            outside.check();
        }
        drop(race);
    });
}

/// CVE-2026-41579: an image's /dev that is a link. The links and nodes of every container are made before its root is closed.
#[test]
fn cve_2026_41579_an_images_dev_leads_nowhere_else() {
    both_ways("devlink", |pod| {
        let (mut c, outside) = (pod.client(), Outside::of(pod));
        let dev = pod.dir.join("rootfs/dev");
        fs::remove_dir(&dev).unwrap();
        // The image has a folder where it leads, so that it leads to something in the image, too.
        let same = pod.dir.join("rootfs").join(outside.dir.strip_prefix("/").unwrap());
        fs::create_dir_all(same).unwrap();
        for to in
            [outside.dir.display().to_string(), format!("../../../../../../..{}", outside.dir.display())]
        {
            symlink(&to, &dev).unwrap();
            let request = pod.bundle("a", &["sleep", "100"], closed(json!({"mounts": usual_mounts()})));
            let pid = attempt(&mut c, request).expect("one inside the image");
            check_closed(pid, &outside);
            c.delete("a");
            outside.check();
            fs::remove_file(&dev).unwrap();
        }
    });
}

/// CVE-2016-9962, CVE-2019-5736: what becomes an exec is in the container's PID namespace while it still is the monitor's program.
/// Somebody who looks at every new process all the time can neither see nor write that program, nor its descriptors.
#[test]
fn cve_2019_5736_an_exec_is_watched_from_its_fork_on() {
    let pod = Pod::new("raceexe");
    let mut c = pod.client();
    let script = "echo ready; while :; do for p in /proc/[0-9]*; do \
        e=$(readlink $p/exe) || continue; [ $e = /bin/busybox ] && continue; echo exe $e; \
        echo x 2>/dev/null >>$p/exe && echo written; ls $p/fd; done; done 2>/dev/null";
    pod.create_started(&mut c, "a", &["sh", "-c", script]);
    wait_until(|| !pod.log("a").is_empty());
    for _ in 0..100 {
        assert_eq!(c.exec_sync("a", &["true"]).exit_code, 0);
    }
    let said: Vec<String> = pod.log("a").into_iter().map(|l| l.2).collect();
    assert_eq!(said, ["ready"]);
    assert!(c.container("a").phase == ContainerPhase::Running as i32);
    pod.finish();
}

/// What an image has in the place of its users' list holds no start up, nor an exec.
#[test]
fn a_list_of_users_that_never_ends_is_not_waited_for() {
    both_ways("passwd", |pod| {
        let mut c = pod.client();
        let list = pod.dir.join("rootfs/etc/passwd");
        mknodat(CWD, &list, FileType::Fifo, Mode::from(0o644), 0).unwrap();
        let env = json!({"process": {"env": ["PATH=/bin"]}});
        pod.create(&mut c, "a", &["sh", "-c", "echo $HOME; exec sleep 100"], env.clone());
        c.start("a");
        wait_until(|| pod.log("a").iter().any(|l| l.2 == "/"));
        let exec = Exec {
            container_id: "a".into(),
            process: process(&["sh", "-c", "echo $HOME"], env["process"].clone()),
            ..Default::default()
        };
        assert_eq!(c.exec_with(exec).stdout, b"/\n");
    });
}
