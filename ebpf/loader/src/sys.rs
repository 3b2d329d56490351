//! The bpf(2) calls that aya does not offer: links as plain descriptors that are created, updated and inspected.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const OBJ_PIN: libc::c_int = 6;
const OBJ_GET: libc::c_int = 7;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const LINK_CREATE: libc::c_int = 28;
const LINK_UPDATE: libc::c_int = 29;
const LINK_DETACH: libc::c_int = 34;
const MAP_LOOKUP_BATCH: libc::c_int = 24;
const MAP_UPDATE_BATCH: libc::c_int = 26;

/// Attach points (enum bpf_attach_type).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum AttachType {
    Connect4 = 10,
    Connect6 = 11,
    Sendmsg4 = 14,
    Sendmsg6 = 15,
    Recvmsg4 = 19,
    Recvmsg6 = 20,
    Peername4 = 29,
    Peername6 = 30,
    Release = 34,
    Xdp = 37,
    TcxIngress = 46,
    TcxEgress = 47,
}

/// XDP by the driver itself. By the stack it would cost more than it saves, and could not tell checksums that are not
/// filled in yet.
const XDP_DRIVER: u32 = 4;

#[repr(C)]
#[derive(Default)]
struct Create {
    prog_fd: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    rest: [u64; 4],
}

#[repr(C)]
#[derive(Default)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct Update {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

#[repr(C)]
#[derive(Default)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct InfoByFd {
    fd: u32,
    info_len: u32,
    info: u64,
}

/// The head of struct bpf_link_info.
#[repr(C)]
#[derive(Default, Clone, Copy, Debug)]
pub struct LinkInfo {
    pub kind: u32,
    pub id: u32,
    pub program: u32,
    pad: u32,
    /// For cgroup links the cgroup's id; for tcx and XDP links the interface index in the lower half, 0 when it is gone.
    pub target: u64,
    pub attach_type: u32,
    rest: [u32; 13],
}

fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<RawFd> {
    // SAFETY: attr is a plain C struct that lives through the call and whose size is given; pointers inside it are
    // made from references that outlive the call in the functions below.
    let r =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), std::mem::size_of::<T>()) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r as RawFd) }
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just returned this descriptor to us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// Attaches a program; `target` is a cgroup's descriptor or an interface index. Detached when the last descriptor and
/// pin are gone.
pub fn link_create(program: BorrowedFd<'_>, target: u32, attach: AttachType) -> io::Result<OwnedFd> {
    let mut attr = Create {
        prog_fd: program.as_raw_fd() as u32,
        target,
        attach_type: attach as u32,
        flags: if attach == AttachType::Xdp { XDP_DRIVER } else { 0 },
        ..Create::default()
    };
    bpf(LINK_CREATE, &mut attr).map(owned)
}

/// Replaces a link's program in one step. ENOLINK: what it was attached to is gone.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = Update {
        link_fd: link.as_raw_fd() as u32,
        new_prog_fd: program.as_raw_fd() as u32,
        ..Update::default()
    };
    bpf(LINK_UPDATE, &mut attr).map(drop)
}

/// Detaches now. Without it a link whose last pin goes is let go by the kernel some time later, after a grace period.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = Update { link_fd: link.as_raw_fd() as u32, ..Update::default() };
    bpf(LINK_DETACH, &mut attr).map(drop)
}

pub fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let mut info = LinkInfo::default();
    let mut attr = InfoByFd {
        fd: link.as_raw_fd() as u32,
        info_len: std::mem::size_of::<LinkInfo>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    bpf(OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = Object { path: path.as_ptr() as u64, fd: object.as_raw_fd() as u32, flags: 0 };
    bpf(OBJ_PIN, &mut attr).map(drop)
}

pub fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = Object { path: path.as_ptr() as u64, ..Object::default() };
    bpf(OBJ_GET, &mut attr).map(owned)
}

/// All entries of a map of at most `capacity` entries.
pub fn lookup_batch<K: aya::Pod, V: aya::Pod>(map: BorrowedFd<'_>, capacity: u32) -> io::Result<Vec<(K, V)>> {
    let mut out = Vec::new();
    lookup_batches(map, capacity, 1, |k, v: &[V]| out.push((k, v[0])))?;
    Ok(out)
}

/// Passes on all entries of a map of at most `capacity` entries, which has so many values for each key: one, or one of every
/// possible CPU.
pub fn lookup_batches<K: aya::Pod, V: aya::Pod>(
    map: BorrowedFd<'_>,
    capacity: u32,
    values_each: usize,
    mut each: impl FnMut(K, &[V]),
) -> io::Result<()> {
    // A batch must hold the longest bucket; few are longer than one or two.
    let step = (4096 / values_each.max(1)).max(256);
    let mut keys: Vec<std::mem::MaybeUninit<K>> = Vec::with_capacity(step);
    let mut values: Vec<std::mem::MaybeUninit<V>> = Vec::with_capacity(step * values_each);
    let (mut position, mut first, mut seen) = (0u64, true, 0);
    while first || seen <= capacity as usize {
        let mut next = 0u64;
        let mut attr = Batch {
            in_batch: if first { 0 } else { std::ptr::from_ref(&position) as u64 },
            out_batch: std::ptr::from_mut(&mut next) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: step as u32,
            map_fd: map.as_raw_fd() as u32,
            ..Batch::default()
        };
        let end = match bpf(MAP_LOOKUP_BATCH, &mut attr) {
            Ok(_) => false,
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => true,
            Err(e) => return Err(e),
        };
        let count = (attr.count as usize).min(step);
        for i in 0..count {
            // SAFETY: within the capacity reserved above, and the kernel has filled `count` of them with plain data, with
            // `values_each` values for each.
            let (key, of_key) = unsafe {
                let of_key = values.as_ptr().add(i * values_each).cast::<V>();
                (*keys.as_ptr().add(i).cast::<K>(), std::slice::from_raw_parts(of_key, values_each))
            };
            each(key, of_key);
        }
        seen += count;
        if end {
            break;
        }
        (position, first) = (next, false);
    }
    Ok(())
}

/// Adds or replaces entries, in this order. `values` has the same number for each key: one, or one of every possible CPU.
/// After an error any number of them is there.
pub fn update_batch<K: aya::Pod, V: aya::Pod>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> io::Result<()> {
    if keys.is_empty() {
        return Ok(());
    }
    if values.is_empty() || !values.len().is_multiple_of(keys.len()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut attr = Batch {
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count: keys.len() as u32,
        map_fd: map.as_raw_fd() as u32,
        ..Batch::default()
    };
    bpf(MAP_UPDATE_BATCH, &mut attr).map(drop)
}

/// The cookie of this process's network namespace, which programs compare with that of a socket.
pub fn netns_cookie() -> io::Result<u64> {
    let socket =
        std::net::UdpSocket::bind("127.0.0.1:0").or_else(|_| std::net::UdpSocket::bind("[::1]:0"))?;
    let mut cookie = 0u64;
    let mut len = std::mem::size_of::<u64>() as libc::socklen_t;
    // SAFETY: value and length describe `cookie`.
    let r = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &mut len,
        )
    };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}
