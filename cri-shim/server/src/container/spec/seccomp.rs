//! System call filters.
//!
//! `RuntimeDefault` is a list of what may be called, so that a call of a newer kernel is refused until somebody has looked at it.
//! A container that holds the capability a call belongs to may make that one as well.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Arch, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder,
    LinuxSeccompOperator, LinuxSyscall,
};
use orlop_proto::cri;
use orlop_proto::cri::security_profile::ProfileType;

use super::{Input, invalid};
use crate::error::{Error, Result};

/// The profile a container asks for. The older path form is understood: `runtime/default`, `docker/default`, `unconfined`,
/// `localhost/<path>`.
pub(crate) fn requested(security: &cri::LinuxContainerSecurityContext) -> Option<cri::SecurityProfile> {
    if security.seccomp.is_some() {
        return security.seccomp.clone();
    }
    #[allow(deprecated)]
    let path = security.seccomp_profile_path.as_str();
    let profile = |kind: ProfileType, localhost_ref: &str| {
        Some(cri::SecurityProfile { profile_type: kind as i32, localhost_ref: localhost_ref.to_owned() })
    };
    match path {
        "" => None,
        "runtime/default" | "docker/default" => profile(ProfileType::RuntimeDefault, ""),
        "unconfined" => profile(ProfileType::Unconfined, ""),
        other => profile(ProfileType::Localhost, other.strip_prefix("localhost/").unwrap_or(other)),
    }
}

/// Reads a localhost profile, when one is asked for.
pub(crate) fn read_localhost(
    security: &cri::LinuxContainerSecurityContext,
    root: &Path,
) -> Result<Option<LinuxSeccomp>> {
    let Some(profile) = requested(security).filter(|p| p.profile_type() == ProfileType::Localhost) else {
        return Ok(None);
    };
    if security.privileged {
        return Ok(None);
    }
    if profile.localhost_ref.is_empty() {
        return Err(invalid("a localhost seccomp profile needs a path"));
    }
    let given = PathBuf::from(&profile.localhost_ref);
    let path = if given.is_absolute() { given } else { root.join(given) };
    let text = std::fs::read(&path).map_err(Error::io("read seccomp profile", &path))?;
    let parsed = serde_json::from_slice(&text)
        .map_err(|e| invalid(format!("seccomp profile {} is not valid: {e}", path.display())))?;
    Ok(Some(parsed))
}

pub(super) fn choose(
    input: &Input,
    security: &cri::LinuxContainerSecurityContext,
) -> Result<Option<LinuxSeccomp>> {
    if security.privileged {
        return Ok(None);
    }
    match requested(security).map(|p| p.profile_type()) {
        None | Some(ProfileType::Unconfined) => Ok(None),
        Some(ProfileType::Localhost) => Ok(input.localhost_seccomp.clone()),
        Some(ProfileType::RuntimeDefault) => {
            let held = super::capabilities::capabilities(security, &input.facts.capabilities);
            runtime_default(held.bounding().as_ref().unwrap_or(&HashSet::new())).map(Some)
        }
    }
}

/// What every container may call, by subject. Calls whose effect is bounded by other means (capabilities, namespaces, limits) are
/// here, too.
const ALLOWED: [&str; 11] = [
    // Files.
    "access chdir chmod chown chown32 close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2 fadvise64 \
     fadvise64_64 fallocate fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64 fdatasync flock fstat \
     fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futimesat getcwd getdents getdents64 ioctl lchown \
     lchown32 link linkat _llseek lseek lstat lstat64 mkdir mkdirat mknod mknodat name_to_handle_at newfstatat open openat \
     openat2 pipe pipe2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv rename \
     renameat renameat2 rmdir sendfile sendfile64 splice stat stat64 statfs statfs64 statx symlink symlinkat sync \
     sync_file_range sync_file_range2 arm_sync_file_range arm_fadvise64_64 syncfs tee truncate truncate64 umask unlink \
     unlinkat utime utimensat utimensat_time64 utimes vmsplice write writev cachestat statmount listmount",
    // Attributes.
    "fgetxattr flistxattr fremovexattr fsetxattr getxattr getxattrat lgetxattr listxattr listxattrat llistxattr \
     lremovexattr lsetxattr removexattr removexattrat setxattr setxattrat",
    // Waiting for files.
    "epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 \
     fanotify_mark inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents \
     io_pgetevents io_pgetevents_time64 io_setup io_submit _newselect poll ppoll ppoll_time64 pselect6 pselect6_time64 \
     select signalfd signalfd4",
    // Memory.
    "brk madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 mlockall mmap mmap2 mprotect \
     mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect process_mrelease remap_file_pages \
     cacheflush",
    // Processes.
    "arch_prctl capget capset execve execveat exit exit_group fork getegid getegid32 geteuid geteuid32 getgid getgid32 \
     getgroups getgroups32 getpgid getpgrp getpid getppid getpriority getresgid getresgid32 getresuid getresuid32 getrlimit \
     getrusage getsid gettid getuid getuid32 get_robust_list get_thread_area ioprio_get ioprio_set modify_ldt pidfd_open \
     pidfd_send_signal prctl prlimit64 rseq sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr \
     sched_getparam sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr \
     sched_setparam sched_setscheduler sched_yield setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups \
     setgroups32 setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid setreuid32 \
     setrlimit setsid setuid setuid32 set_robust_list set_thread_area set_tid_address set_tls times ugetrlimit vfork wait4 \
     waitid waitpid getcpu breakpoint",
    // Signals.
    "alarm kill pause restart_syscall rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend \
     rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo sigaction sigaltstack signal sigpending sigprocmask sigreturn \
     sigsuspend tgkill tkill",
    // Locks and messages.
    "futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake ipc mq_getsetattr mq_notify mq_open mq_timedreceive \
     mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink msgctl msgget msgrcv msgsnd semctl semget semop \
     semtimedop semtimedop_time64 shmat shmctl shmdt shmget",
    // Sockets.
    "accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom recvmmsg recvmmsg_time64 recvmsg \
     send sendmmsg sendmsg sendto setsockopt shutdown socketcall socketpair",
    // Time.
    "adjtimex clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep \
     clock_nanosleep_time64 getitimer gettimeofday nanosleep setitimer time timer_create timer_delete timer_getoverrun \
     timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime timerfd_gettime64 \
     timerfd_settime timerfd_settime64",
    // The rest.
    "getrandom landlock_add_rule landlock_create_ruleset landlock_restrict_self lsm_get_self_attr lsm_list_modules \
     lsm_set_self_attr riscv_hwprobe seccomp sysinfo uname uretprobe",
    // Tracing of one's own processes, which the kernel guards itself.
    "process_vm_readv process_vm_writev ptrace",
];

/// Also allowed when the capability is held.
const GUARDED: &[(Capability, &[&str])] = &[
    (
        Capability::SysAdmin,
        &[
            "bpf",
            "clone",
            "clone3",
            "fanotify_init",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "lookup_dcookie",
            "mount",
            "mount_setattr",
            "move_mount",
            "open_tree",
            "perf_event_open",
            "pivot_root",
            "quotactl",
            "quotactl_fd",
            "setdomainname",
            "sethostname",
            "setns",
            "swapoff",
            "swapon",
            "syslog",
            "umount",
            "umount2",
            "unshare",
        ],
    ),
    (Capability::Bpf, &["bpf"]),
    (Capability::Perfmon, &["perf_event_open"]),
    (Capability::Syslog, &["syslog"]),
    (Capability::SysModule, &["init_module", "finit_module", "delete_module"]),
    (Capability::SysBoot, &["reboot"]),
    (Capability::SysChroot, &["chroot"]),
    (Capability::SysTime, &["settimeofday", "stime", "clock_settime", "clock_settime64"]),
    (Capability::SysPacct, &["acct"]),
    (Capability::SysRawio, &["iopl", "ioperm"]),
    (Capability::SysTtyConfig, &["vhangup"]),
    (Capability::DacReadSearch, &["open_by_handle_at"]),
    (Capability::SysNice, &["get_mempolicy", "mbind", "set_mempolicy", "set_mempolicy_home_node"]),
    (Capability::SysPtrace, &["kcmp", "pidfd_getfd", "process_madvise"]),
];

/// PER_LINUX and PER_LINUX32, each also with UNAME26, and the question which one is in force.
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
const AF_VSOCK: u64 = 40;
/// CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}.
const CLONE_NEW_ANY: u64 = 0x7e02_0000;

fn rule(
    action: LinuxSeccompAction,
    names: &[&str],
    errno: Option<u32>,
    args: Option<Vec<LinuxSeccompArg>>,
) -> LinuxSyscall {
    let mut rule = LinuxSyscall::default();
    rule.set_names(names.iter().map(|n| (*n).to_owned()).collect())
        .set_action(action)
        .set_errno_ret(errno)
        .set_args(args);
    rule
}

fn allow(names: &[&str], args: Option<Vec<LinuxSeccompArg>>) -> LinuxSyscall {
    rule(LinuxSeccompAction::ScmpActAllow, names, None, args)
}

fn arg(
    index: usize,
    value: u64,
    value_two: Option<u64>,
    op: LinuxSeccompOperator,
) -> Result<LinuxSeccompArg> {
    let builder = LinuxSeccompArgBuilder::default().index(index).value(value).op(op);
    let builder = match value_two {
        Some(two) => builder.value_two(two),
        None => builder,
    };
    builder.build().map_err(|e| Error::Internal(format!("seccomp argument: {e}")))
}

/// Our default profile for a container that holds `capabilities`. Calls that are newer than all that it names are unknown (ENOSYS),
/// others that it does not name are refused (EPERM).
pub(crate) fn runtime_default(capabilities: &HashSet<Capability>) -> Result<LinuxSeccomp> {
    let common: Vec<&str> = ALLOWED.iter().flat_map(|names| names.split_whitespace()).collect();
    let mut rules = vec![allow(&common, None)];
    for (capability, names) in GUARDED {
        if capabilities.contains(capability) {
            rules.push(allow(names, None));
        }
    }
    if !capabilities.contains(&Capability::SysAdmin) {
        let none = arg(0, CLONE_NEW_ANY, Some(0), LinuxSeccompOperator::ScmpCmpMaskedEq)?;
        rules.push(allow(&["clone"], Some(vec![none])));
        // Its flags lie in memory where a filter cannot look; libc falls back to clone.
        rules.push(rule(LinuxSeccompAction::ScmpActErrno, &["clone3"], Some(ENOSYS), None));
    }
    for value in PERSONALITIES {
        let this = arg(0, value, None, LinuxSeccompOperator::ScmpCmpEq)?;
        rules.push(allow(&["personality"], Some(vec![this])));
    }
    let no_vsock = arg(0, AF_VSOCK, None, LinuxSeccompOperator::ScmpCmpNe)?;
    rules.push(allow(&["socket"], Some(vec![no_vsock])));
    let mut profile = LinuxSeccomp::default();
    profile
        .set_default_action(LinuxSeccompAction::ScmpActErrno)
        .set_default_errno_ret(Some(EPERM))
        .set_architectures(Some(architectures()))
        .set_syscalls(Some(rules));
    Ok(profile)
}

fn architectures() -> Vec<Arch> {
    if cfg!(target_arch = "aarch64") {
        vec![Arch::ScmpArchAarch64, Arch::ScmpArchArm]
    } else {
        vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(profile: &LinuxSeccomp, name: &str) -> bool {
        profile.syscalls().iter().flatten().any(|r| {
            r.args().is_none()
                && r.action() == LinuxSeccompAction::ScmpActAllow
                && r.names().iter().any(|n| n == name)
        })
    }

    #[test]
    fn a_capability_opens_its_calls() {
        let none = runtime_default(&HashSet::new()).unwrap();
        for name in
            ["mount", "bpf", "keyctl", "clone", "clone3", "chroot", "io_uring_setup", "a_call_of_tomorrow"]
        {
            assert!(!allowed(&none, name), "{name}");
        }
        assert!(allowed(&none, "read") && allowed(&none, "ptrace"));
        let admin = runtime_default(&HashSet::from([Capability::SysAdmin])).unwrap();
        for name in ["mount", "bpf", "clone", "clone3"] {
            assert!(allowed(&admin, name), "{name}");
        }
        assert!(!allowed(&admin, "init_module") && !allowed(&admin, "keyctl"));
        let chroot = runtime_default(&HashSet::from([Capability::SysChroot])).unwrap();
        assert!(allowed(&chroot, "chroot") && !allowed(&chroot, "mount"));
    }

    #[test]
    fn no_call_is_named_twice() {
        let mut names: Vec<&str> = ALLOWED.iter().flat_map(|names| names.split_whitespace()).collect();
        names.sort_unstable();
        let doubles: Vec<_> = names.windows(2).filter(|w| w[0] == w[1]).collect();
        assert!(doubles.is_empty(), "{doubles:?}");
    }

    /// A name that no kernel has would allow nothing and be seen by nobody.
    #[test]
    fn names_are_of_calls() {
        let mut known: HashSet<&str> = syscalls::x86_64::Sysno::iter().map(|s| s.name()).collect();
        known.extend(syscalls::x86::Sysno::iter().map(|s| s.name()));
        known.extend(syscalls::aarch64::Sysno::iter().map(|s| s.name()));
        known.extend(syscalls::arm::Sysno::iter().map(|s| s.name()));
        // Of 32-bit ARM alone, for which the library has no numbers, and of RISC-V.
        known.extend(["breakpoint", "cacheflush", "set_tls", "sync_file_range2", "riscv_hwprobe"]);
        let guarded = GUARDED.iter().flat_map(|(_, names)| names.iter().copied());
        let named = ALLOWED.iter().flat_map(|names| names.split_whitespace()).chain(guarded);
        let unknown: Vec<&str> = named.filter(|n| !known.contains(n)).collect();
        assert!(unknown.is_empty(), "{unknown:?}");
    }

    #[test]
    fn the_old_path_form() {
        for (path, want) in [
            ("", None),
            ("runtime/default", Some((ProfileType::RuntimeDefault, ""))),
            ("unconfined", Some((ProfileType::Unconfined, ""))),
            ("localhost/a.json", Some((ProfileType::Localhost, "a.json"))),
        ] {
            #[allow(deprecated)]
            let s = cri::LinuxContainerSecurityContext {
                seccomp_profile_path: path.into(),
                ..Default::default()
            };
            let got = requested(&s).map(|p| (p.profile_type(), p.localhost_ref));
            assert_eq!(got, want.map(|(k, r)| (k, r.to_owned())), "{path}");
        }
    }
}
