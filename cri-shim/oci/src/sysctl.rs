//! Pure: which kernel settings belong to a namespace rather than to the machine.

use std::path::{Path, PathBuf};

use nix::sched::CloneFlags;

/// A setting's file, and the namespace whose it is. The error says what is wrong with the name.
pub fn sysctl_file(name: &str) -> Result<(CloneFlags, PathBuf), String> {
    // Both separators are in use; in the slash form a dot belongs to the name (an interface such as eth0.100).
    let rel = if name.contains('/') { name.to_owned() } else { name.replace('.', "/") };
    if rel.is_empty() || rel.split('/').any(|p| p.is_empty() || p == "." || p == "..") || rel.contains('\0') {
        return Err(format!("{name:?} is no sysctl"));
    }
    let of = match rel.as_str() {
        s if s.starts_with("net/") => CloneFlags::CLONE_NEWNET,
        s if s.starts_with("fs/mqueue/") => CloneFlags::CLONE_NEWIPC,
        s if s.starts_with("kernel/shm") || s.starts_with("kernel/msg") || s == "kernel/sem" => {
            CloneFlags::CLONE_NEWIPC
        }
        "kernel/hostname" | "kernel/domainname" => CloneFlags::CLONE_NEWUTS,
        _ => return Err(format!("{name} is the whole machine's")),
    };
    Ok((of, Path::new("/proc/sys").join(rel)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let of = |n: &str| sysctl_file(n).map(|(of, p)| (of, p.display().to_string()));
        let (net, ipc) = (CloneFlags::CLONE_NEWNET, CloneFlags::CLONE_NEWIPC);
        for (name, want, file) in [
            ("net.ipv4.ip_forward", net, "/proc/sys/net/ipv4/ip_forward"),
            ("net/ipv4/conf/eth0.100/rp_filter", net, "/proc/sys/net/ipv4/conf/eth0.100/rp_filter"),
            ("kernel.shmmax", ipc, "/proc/sys/kernel/shmmax"),
            ("fs.mqueue.msg_max", ipc, "/proc/sys/fs/mqueue/msg_max"),
            ("kernel.domainname", CloneFlags::CLONE_NEWUTS, "/proc/sys/kernel/domainname"),
        ] {
            assert_eq!(of(name), Ok((want, file.to_owned())));
        }
        for bad in ["", "kernel.panic", "net/../kernel/panic", "net..x", "vm.swappiness", "kernel.semaphore"]
        {
            assert!(of(bad).is_err(), "{bad}");
        }
    }
}
