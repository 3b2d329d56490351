//! System calls without a wrapper that fits: forks, the seccomp filter, the device program. `unsafe` lives here.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::unistd::Pid;

use crate::seccomp::Filter;

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Forks a sibling: a child of the caller's parent, which reaps it. `into`: the cgroup (v2) in which it begins.
///
/// The caller must be single-threaded, and the child must end by [`crate::helper::leave`] or execve.
pub(crate) fn fork_sibling(into: Option<BorrowedFd<'_>>) -> io::Result<Option<Pid>> {
    // A sibling's end is told as the caller's own.
    fork(libc::CLONE_PARENT as u64, 0, into)
}

/// Forks a child; the rest as for [`fork_sibling`].
pub(crate) fn fork_child(into: Option<BorrowedFd<'_>>) -> io::Result<Option<Pid>> {
    fork(0, libc::SIGCHLD as u64, into)
}

fn fork(flags: u64, signal: u64, into: Option<BorrowedFd<'_>>) -> io::Result<Option<Pid>> {
    // The first fields of struct clone_args; the kernel takes the length along.
    let mut args = [0u64; 11];
    args[0] = flags;
    args[4] = signal;
    if let Some(fd) = into {
        args[0] |= CLONE_INTO_CGROUP;
        args[10] = fd.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM and a stack this is fork; the process is single-threaded (documented above), so no lock is held by
    // a thread that the child lacks. `args` outlives the call and is as long as is said.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, args.as_ptr(), size_of_val(&args)) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        pid => Ok(Some(Pid::from_raw(pid as i32))),
    }
}

/// Installs a filter for the calling process. Needs no_new_privs or CAP_SYS_ADMIN. The listener of one that has any goes to
/// `courier`, a socket, by the very next system call, since the filter may hold back each until somebody answers.
pub(crate) fn load_filter(filter: &Filter, courier: Option<RawFd>) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: filter.program.len() as u16,
        // The kernel only reads.
        filter: filter.program.as_ptr().cast_mut(),
    };
    let mut byte = *b"l";
    let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: byte.len() };
    // Room for one header and one descriptor, aligned as the header has to be.
    let mut control = [0usize; 4];
    // SAFETY: all zero is an empty message; CMSG_SPACE and CMSG_LEN only compute. The first header lies in `control`, which is
    // longer than CMSG_SPACE(4).
    let (mut message, slot) = unsafe {
        let mut message: libc::mmsghdr = std::mem::zeroed();
        message.msg_hdr.msg_iov = &mut part;
        message.msg_hdr.msg_iovlen = 1;
        message.msg_hdr.msg_control = control.as_mut_ptr().cast();
        message.msg_hdr.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as _;
        let header = libc::CMSG_FIRSTHDR(&message.msg_hdr);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as _;
        (message, libc::CMSG_DATA(header).cast::<RawFd>())
    };
    // SAFETY: `program` and what it points to outlive the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            filter.flags,
            &program as *const libc::sock_fprog,
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    let Some(courier) = courier.filter(|_| filter.notifies()) else { return Ok(()) };
    // SAFETY: `slot` is inside `control`; the message and what it points to outlive the call. The descriptor is this process's
    // own, which nobody uses here; its close may wait for whoever answers.
    unsafe {
        slot.write_unaligned(done as RawFd);
        let sent = libc::syscall(libc::SYS_sendmmsg, courier, &raw mut message, 1, libc::MSG_NOSIGNAL);
        if sent != 1 {
            return Err(io::Error::last_os_error());
        }
        libc::close(done as RawFd);
    }
    Ok(())
}

/// Whether the calling process's bounding set has the capability of that number; `None` when the kernel knows none.
pub(crate) fn in_bounding_set(number: u32) -> Option<bool> {
    // SAFETY: plain integers.
    match unsafe { libc::prctl(libc::PR_CAPBSET_READ, libc::c_ulong::from(number), 0, 0, 0) } {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

/// Takes the capability of that number from the calling process's bounding set.
pub(crate) fn drop_from_bounding_set(number: u32) -> io::Result<()> {
    // SAFETY: plain integers.
    match unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number), 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What sched_setattr(2) takes, without the length at its beginning.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct SchedulerAttributes {
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

/// For the calling process.
pub(crate) fn set_scheduler(a: &SchedulerAttributes) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    let attributes = Attributes {
        size: size_of::<Attributes>() as u32,
        policy: a.policy,
        flags: a.flags,
        nice: a.nice,
        priority: a.priority,
        runtime: a.runtime,
        deadline: a.deadline,
        period: a.period,
    };
    // SAFETY: the struct outlives the call and is as long as it says.
    let done = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// For the calling process: class and priority as ioprio_set(2) has them.
pub(crate) fn set_io_priority(value: i32) -> io::Result<()> {
    const WHO_PROCESS: i32 = 1;
    // SAFETY: plain integers.
    let done = unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, value) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The caller's controlling terminal becomes the one that is its standard input.
pub(crate) fn take_terminal() -> io::Result<()> {
    // SAFETY: an integer argument.
    if unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Of the calling process's UTS namespace.
pub(crate) fn set_host_name(name: &str) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes as is said.
    if unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The NIS domain name of the calling process's UTS namespace.
pub(crate) fn set_domain_name(name: &str) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes as is said.
    if unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Every descriptor from this number on is closed by execve.
pub(crate) fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: changes a flag of descriptors, closes none.
    let done = unsafe { libc::close_range(first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

/// The first fields of the load variant of union bpf_attr, up to the last one used.
#[repr(C)]
struct LoadProgram {
    program_type: u32,
    instructions: u32,
    code: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

/// The attach variant of union bpf_attr.
#[repr(C)]
struct AttachProgram {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<i32> {
    // SAFETY: the attributes and what they point to outlive the call and are as long as is said.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, attributes as *const T, size_of::<T>()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done as i32) }
}

/// Loads an eBPF program of the cgroup device type.
pub(crate) fn load_device_program(code: &[u64]) -> io::Result<OwnedFd> {
    let mut name = [0u8; 16];
    name[..13].copy_from_slice(b"orlop_devices");
    let fd = bpf(
        BPF_PROG_LOAD,
        &LoadProgram {
            program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
            instructions: code.len() as u32,
            code: code.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
            log_level: 0,
            log_size: 0,
            log: 0,
            kernel_version: 0,
            flags: 0,
            name,
            interface: 0,
            attach_type: BPF_CGROUP_DEVICE,
        },
    )?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches it to a cgroup; programs of the cgroups above go on to count.
pub(crate) fn attach_device_program(cgroup: RawFd, program: RawFd) -> io::Result<()> {
    let attributes = AttachProgram {
        target: cgroup as u32,
        program: program as u32,
        attach_type: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    bpf(BPF_PROG_ATTACH, &attributes).map(|_| ())
}

/// Changes a mount's attributes and propagation, with those of all below it if `recursive`.
pub(crate) fn set_mount(
    mount: BorrowedFd<'_>,
    set: u64,
    clear: u64,
    propagation: u64,
    recursive: bool,
) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: set, attr_clr: clear, propagation, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path and the struct outlive the call and are as long as is said.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &attributes as *const libc::mount_attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
