//! What tests of several crates need. Not used by daemons.

use std::net::{Ipv4Addr, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Polls `check` every 10 ms until it gives a value; panics with `what` after `limit`. Tests wait for states, never for times.
pub async fn wait_until<T, F, Fut>(what: &str, limit: Duration, mut check: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let start = Instant::now();
    loop {
        if let Some(v) = check().await {
            return v;
        }
        assert!(start.elapsed() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A name that no other test on this machine has: `prefix` + process id + counter, at most 15 bytes for prefixes of up to 4.
pub fn unique_name(prefix: &str) -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{prefix}{:x}-{:x}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Ports for [`free_port`]: below those that the kernel gives to connections, beside the fixed ones of end-to-end tests.
const PORTS: std::ops::Range<u16> = 20_000..30_000;

/// A port on which nobody listens and which no other caller, in any process of this network namespace, gets until this
/// process ends. A port that is merely free at the moment may be taken by a connection of another test before its server starts.
pub fn free_port() -> u16 {
    let count = u32::from(PORTS.end - PORTS.start);
    let first = std::process::id().wrapping_mul(97) % count;
    (0..count)
        .map(|n| PORTS.start + ((first + n) % count) as u16)
        .find(|&port| {
            let name = SocketAddr::from_abstract_name(format!("orlop-test-port-{port}"));
            let Ok(claim) = name.and_then(|n| UnixDatagram::bind_addr(&n)) else { return false };
            // Also a port that a program outside of these tests uses stays claimed, so that it is not tried again.
            std::mem::forget(claim);
            nobody_listens(port)
        })
        .unwrap_or_else(|| panic!("every port of {PORTS:?} is taken"))
}

/// Binds and does not listen: a process that another thread is just starting holds copies of this one's sockets until its exec, and
/// a copy of a listening one would keep the caller from the port for that long.
fn nobody_listens(port: u16) -> bool {
    use rustix::net::{AddressFamily, SocketAddrV4, SocketFlags, SocketType, sockopt};
    rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .and_then(|socket| {
            sockopt::set_socket_reuseaddr(&socket, true)?;
            rustix::net::bind(&socket, &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port))
        })
        .is_ok()
}

/// An IPv4 network of 256 addresses, as `10.200.7.0/24`, of which this network namespace has no route and which no other caller,
/// in any process of it, gets until this process ends. What a killed test has left does not stand in the way.
pub fn free_network() -> String {
    let routes = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
    // The kernel prints addresses as a little-endian machine reads them: the first byte is the last one in the text.
    let taken = |third: u8| {
        let ends = format!("{third:02X}C80A");
        routes
            .lines()
            .filter_map(|l| l.split_whitespace().nth(1))
            .any(|destination| destination.ends_with(&ends))
    };
    let first = std::process::id() as u8;
    (0..=u8::MAX)
        .map(|n| first.wrapping_add(n))
        .find(|&third| {
            let name = SocketAddr::from_abstract_name(format!("orlop-test-network-{third}"));
            let Ok(claim) = name.and_then(|n| UnixDatagram::bind_addr(&n)) else { return false };
            std::mem::forget(claim);
            !taken(third)
        })
        .map(|third| format!("10.200.{third}.0/24"))
        .unwrap_or_else(|| panic!("every network of 10.200.0.0/16 is taken"))
}

/// A program that cargo built beside the calling test, or the one that the environment variable `variable` names; panics with
/// `remedy` when there is none.
pub fn built_program(name: &str, variable: &str, remedy: &str) -> PathBuf {
    if let Some(path) = std::env::var_os(variable) {
        return path.into();
    }
    let exe = std::env::current_exe().unwrap_or_default();
    let path = exe.ancestors().nth(2).unwrap_or(Path::new("")).join(name);
    assert!(path.exists(), "{} is missing: {remedy}", path.display());
    path
}

/// Where the first byte of an [`elf_program`]'s code lies.
pub const ELF_CODE: u32 = 0x40_0078;

/// A static x86-64 program that consists of `code`, all of it readable and executable; it must end by a system call.
pub fn elf_program(code: &[u8]) -> Vec<u8> {
    let start = u64::from(ELF_CODE);
    // The file header of elf(5), one program header, the code.
    let header_len = 0x78;
    let mut out = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    out.extend([2u16, 62].iter().flat_map(|v| v.to_le_bytes()));
    out.extend(1u32.to_le_bytes());
    out.extend([start, 64, 0].iter().flat_map(|v| v.to_le_bytes()));
    out.extend(0u32.to_le_bytes());
    out.extend([64u16, 56, 1, 0, 0, 0].iter().flat_map(|v| v.to_le_bytes()));
    out.extend([1u32, 5].iter().flat_map(|v| v.to_le_bytes()));
    let (len, at) = (header_len + code.len() as u64, start - header_len);
    out.extend([0, at, at, len, len, 0x1000].iter().flat_map(|v| v.to_le_bytes()));
    out.extend(code);
    out
}

/// Debian's docker-registry on a port of its own; ends when dropped.
pub struct DockerRegistry {
    /// `127.0.0.1:port`; speaks plain HTTP.
    pub address: String,
    child: Child,
}

impl DockerRegistry {
    /// Starts it with its configuration and blobs in `dir`; returns when it accepts connections.
    pub fn start(dir: &Path) -> DockerRegistry {
        let address = format!("127.0.0.1:{}", free_port());
        let config = dir.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {address}\n",
            dir.join("registry").display()
        );
        std::fs::write(&config, text).unwrap_or_else(|e| panic!("cannot write {}: {e}", config.display()));
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("cannot run docker-registry: {e}; apt-get install docker-registry"));
        let mut registry = DockerRegistry { address, child };
        let start = Instant::now();
        while TcpStream::connect(&registry.address).is_err() {
            let ended = registry.child.try_wait().ok().flatten();
            assert!(ended.is_none(), "docker-registry ended: {ended:?}");
            assert!(start.elapsed() < Duration::from_secs(60), "docker-registry does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        registry
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn ports_are_given_once_and_can_be_bound() {
        let ports: Vec<u16> = (0..20).map(|_| free_port()).collect();
        let listeners: Vec<_> =
            ports.iter().map(|p| TcpListener::bind((Ipv4Addr::LOCALHOST, *p)).unwrap()).collect();
        assert!(ports.iter().all(|p| PORTS.contains(p)), "{ports:?}");
        assert_eq!(listeners.len(), 20);
        // Whether or not somebody listens there now.
        drop(listeners);
        assert!(!ports.contains(&free_port()));
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn a_program_of_bytes_runs() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        // edi = ELF_CODE's lowest byte - 0x36 = 0x42; exit(edi)
        let code = [0x8d, 0x3d, 0xfa, 0xff, 0xff, 0xff, 0x83, 0xef, 0x36, 0xb8, 0x3c, 0, 0, 0, 0x0f, 0x05];
        std::fs::write(&program, elf_program(&code)).unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        // A copy, which no other thread's fork can hold open for writing.
        let status = Command::new("sh").args(["-c", "cp $0 $0.copy && exec $0.copy"]).arg(&program).status();
        let status = status.unwrap();
        assert_eq!(status.code(), Some(0x42), "{status}");
    }

    #[test]
    fn networks_are_given_once() {
        let networks: std::collections::BTreeSet<String> = (0..5).map(|_| free_network()).collect();
        assert_eq!(networks.len(), 5);
        assert!(networks.iter().all(|n| n.starts_with("10.200.") && n.ends_with(".0/24")), "{networks:?}");
    }
}
