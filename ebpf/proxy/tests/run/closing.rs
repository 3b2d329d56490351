//! Sockets of backends that are gone are closed beside the syncing: it does not hold that up, and is not lost with the proxy.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::*;

/// Sockets that are to be closed at a time.
const MANY: usize = 3_000;

/// A connection whose socket is locked: its owner sends from memory that is not there yet, and the kernel waits for that. Dropping it
/// gives the owner the memory.
struct Locked {
    _memory: OwnedFd,
}

#[repr(C)]
struct Handshake {
    api: u64,
    features: u64,
    calls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    length: u64,
    mode: u64,
    calls: u64,
}

impl Locked {
    fn new(socket: TcpStream) -> Locked {
        const PAGE: usize = 4096;
        const API: u64 = 0xaa;
        const SAY_API: u64 = 0xc018_aa3f;
        const REGISTER: u64 = 0xc020_aa00;
        const MISSING: u64 = 1;
        // SAFETY: the descriptor is ours alone when it is one; the requests are as the kernel has them and live through the calls;
        // the memory is new and stays.
        let (memory, page) = unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK);
            assert!(fd >= 0, "userfaultfd: {}; run as root", io::Error::last_os_error());
            let memory = OwnedFd::from_raw_fd(fd as i32);
            let mut say = Handshake { api: API, features: 0, calls: 0 };
            assert_eq!(libc::ioctl(memory.as_raw_fd(), SAY_API as _, &raw mut say), 0);
            let (access, kind) =
                (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let page = libc::mmap(std::ptr::null_mut(), PAGE, access, kind, -1, 0);
            assert_ne!(page, libc::MAP_FAILED);
            let mut r = Register { start: page as u64, length: PAGE as u64, mode: MISSING, calls: 0 };
            assert_eq!(libc::ioctl(memory.as_raw_fd(), REGISTER as _, &raw mut r), 0);
            (memory, page as usize)
        };
        std::thread::spawn(move || {
            // SAFETY: the memory stays mapped.
            unsafe { libc::send(socket.as_raw_fd(), page as *const _, PAGE, libc::MSG_NOSIGNAL) };
        });
        let mut asks = [PollFd::new(memory.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut asks, 30_000u16).unwrap(), 1, "the kernel asks for the memory");
        Locked { _memory: memory }
    }
}

/// Whether the thread of a process that closes sockets waits for one in the kernel.
fn closer_waits(process: u32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{process}/task")) else { return false };
    threads.flatten().any(|t| {
        let stat = std::fs::read_to_string(t.path().join("stat")).unwrap_or_default();
        stat.contains("(close-sockets) D ")
    })
}

/// Takes connections and keeps them.
fn keeps(ip: [u8; 4]) -> SocketAddr {
    let l = TcpListener::bind(SocketAddr::from((ip, 0))).unwrap();
    let at = l.local_addr().unwrap();
    std::thread::spawn(move || l.incoming().flatten().collect::<Vec<_>>());
    at
}

/// One endpoint, at this address.
fn at(service: &str, endpoint: SocketAddr) -> serde_json::Value {
    let mut s = slice(service, endpoint.port());
    s["endpoints"][0]["addresses"] = json!([endpoint.ip().to_string()]);
    s
}

fn connect(to: &str) -> TcpStream {
    TcpStream::connect_timeout(&to.parse().unwrap(), PATIENCE).unwrap()
}

fn value(page: &str, name: &str) -> u64 {
    let line = page.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{name}: {page}")).parse().unwrap()
}

async fn all_closed(sockets: &[TcpStream]) {
    wait_until("all are closed", PATIENCE, || async { sockets.iter().all(tcp_error).then_some(()) }).await;
}

/// As many files as this process may have.
fn more_files() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn syncing_goes_on_while_sockets_are_closed() {
    more_files();
    let _alone = ALONE.lock().await;
    let api = FakeApi::start().await;
    let mut place = Place::new(api.address);
    place.config.datapath.sizes.sockets = 65_536;
    let stays = server("stays", SocketAddr::from(([127, 0, 0, 1], 0)));
    let [gone, later] = [keeps([127, 0, 0, 2]), keeps([127, 0, 0, 3])];
    for (name, ip, endpoint) in [("gone", "127.96.60.1", gone), ("later", "127.96.60.2", later)] {
        api.put("services", service(name, ip, json!({})));
        api.put("endpointslices", at(name, endpoint));
    }
    let (stop, task) = start(&place.config).await;
    let pages = place.config.health_address.unwrap();
    let mut open: Vec<TcpStream> = (0..MANY).map(|_| connect("127.96.60.1:80")).collect();
    let locked = Locked::new(connect("127.96.60.1:80"));
    open.push(connect("127.96.60.2:80"));
    api.put("endpointslices", at("gone", stays));
    let me = std::process::id();
    wait_until("the closing is stuck", PATIENCE, || async { closer_waits(me).then_some(()) }).await;

    // Services come, change and go; another backend, too.
    api.put("endpointslices", at("later", stays));
    for i in 1..=10 {
        let (name, ip) = (format!("new{i}"), format!("127.96.61.{i}"));
        api.put("services", service(&name, &ip, json!({})));
        api.put("endpointslices", at(&name, stays));
        wait_until("the new one answers", PATIENCE, || async { ask(&format!("{ip}:80")).ok() }).await;
        api.delete("services", &name);
        wait_until("it is gone", PATIENCE, || async { ask(&format!("{ip}:80")).err() }).await;
    }
    for ip in ["127.96.60.1", "127.96.60.2"] {
        wait_until("the other endpoint answers", PATIENCE, || async {
            (ask(&format!("{ip}:80")).ok()? == "stays").then_some(())
        })
        .await;
    }
    for path in ["/healthz", "/livez"] {
        let page = health(pages, path).await;
        assert!(page.starts_with("HTTP/1.1 200"), "{path}: {page}");
    }
    let page = health(pages, "/metrics").await;
    assert_eq!(value(&page, "orlop_proxy_closed_sockets_total"), 0, "none of the {MANY} is told of yet");
    assert!(closer_waits(me), "all of this was beside it");

    drop(locked);
    all_closed(&open).await;
    let all = open.len() as u64 + 1;
    wait_until("all are counted", PATIENCE, || async {
        (value(&health(pages, "/metrics").await, "orlop_proxy_closed_sockets_total") == all).then_some(())
    })
    .await;
    stop.cancel();
    task.await.unwrap().unwrap();
}

/// Sockets that a proxy has not come to when it is killed are closed by the next one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sockets_are_closed_though_the_proxy_is_killed_meanwhile() {
    more_files();
    let _alone = ALONE.lock().await;
    let api = FakeApi::start().await;
    let place = Place::new(api.address);
    let stays = server("stays", SocketAddr::from(([127, 0, 0, 1], 0)));
    api.put("services", service("gone", "127.96.62.1", json!({})));
    api.put("endpointslices", at("gone", keeps([127, 0, 0, 2])));
    let mut proxy = Killed::start(&place).await;
    // The kernel lists them in no order of ours.
    let open: Vec<TcpStream> = (0..MANY).map(|_| connect("127.96.62.1:80")).collect();
    let locked = Locked::new(connect("127.96.62.1:80"));
    api.put("endpointslices", at("gone", stays));
    let process = proxy.0.id();
    wait_until("the closing is stuck", PATIENCE, || async { closer_waits(process).then_some(()) }).await;
    // The kernel ends it when it gets there.
    proxy.0.kill().unwrap();
    drop(locked);
    proxy.0.wait().unwrap();
    let left = open.iter().filter(|s| !tcp_error(s)).count();
    println!("{left} of {MANY} were left open");
    proxy = Killed::start(&place).await;
    all_closed(&open).await;
    drop(proxy);
}
