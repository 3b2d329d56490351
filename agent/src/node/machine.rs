//! The machine under the node: size, kernel, operating system.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use orlop_api::quantity::Amount;

use crate::config::{Config, KubeletConfiguration};

/// Facts that do not change while the agent runs.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    pub cpus: i64,
    /// Bytes.
    pub memory: i64,
    /// Bytes of the file system that holds the root directory.
    pub storage: i64,
    pub hugepages: BTreeMap<String, i64>,
    pub max_pods: u32,
    pub machine_id: String,
    pub system_uuid: String,
    pub boot_id: String,
    pub kernel: String,
    pub os_image: String,
    pub architecture: &'static str,
}

fn word(path: &str) -> String {
    fs::read_to_string(path).map(|t| t.trim().to_owned()).unwrap_or_default()
}

/// A line `Name: N kB` of /proc/meminfo in bytes.
pub fn meminfo(text: &str, name: &str) -> Option<i64> {
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse::<i64>().ok().map(|kb| kb * 1024)
}

fn os_image() -> String {
    let text = word("/etc/os-release");
    let name = text.lines().find_map(|l| l.strip_prefix("PRETTY_NAME="));
    name.map(|n| n.trim_matches('"').to_owned()).unwrap_or_else(|| "Linux".into())
}

/// Total and available bytes, total and free inodes of the file system at a path.
pub fn file_system(path: &Path) -> Option<(u64, u64, u64, u64)> {
    let mut at = path;
    while !at.exists() {
        at = at.parent()?;
    }
    let s = rustix::fs::statvfs(at).ok()?;
    Some((s.f_blocks * s.f_frsize, s.f_bavail * s.f_frsize, s.f_files, s.f_favail))
}

fn hugepages() -> BTreeMap<String, i64> {
    let mut out = BTreeMap::new();
    for e in fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten() {
        let name = e.file_name().to_string_lossy().into_owned();
        let size = name
            .strip_prefix("hugepages-")
            .and_then(|n| n.strip_suffix("kB"))
            .and_then(|n| n.parse::<i64>().ok());
        let count = word(&e.path().join("nr_hugepages").to_string_lossy()).parse::<i64>().ok();
        if let (Some(kb), Some(count)) = (size, count) {
            let unit =
                if kb % (1 << 20) == 0 { format!("{}Gi", kb >> 20) } else { format!("{}Mi", kb >> 10) };
            out.insert(format!("hugepages-{unit}"), kb * 1024 * count);
        }
    }
    out
}

impl Machine {
    pub fn read(config: &Config) -> Machine {
        let memory = meminfo(&word("/proc/meminfo"), "MemTotal").unwrap_or_default();
        Machine {
            cpus: std::thread::available_parallelism().map_or(1, |n| n.get() as i64),
            memory,
            storage: file_system(&config.root_dir).map_or(0, |s| s.0 as i64),
            hugepages: hugepages(),
            max_pods: config.kubelet.max_pods,
            machine_id: word("/etc/machine-id"),
            system_uuid: Some(word("/sys/class/dmi/id/product_uuid"))
                .filter(|u| !u.is_empty())
                .unwrap_or_else(|| word("/etc/machine-id")),
            boot_id: word("/proc/sys/kernel/random/boot_id"),
            kernel: word("/proc/sys/kernel/osrelease"),
            os_image: os_image(),
            architecture: match std::env::consts::ARCH {
                "x86_64" => "amd64",
                "aarch64" => "arm64",
                other => other,
            },
        }
    }

    /// What the machine has.
    pub fn capacity(&self) -> BTreeMap<String, Amount> {
        let mut c = BTreeMap::from([
            ("cpu".to_owned(), Amount::from_units(self.cpus)),
            ("memory".to_owned(), Amount::from_units(self.memory)),
            ("ephemeral-storage".to_owned(), Amount::from_units(self.storage)),
            ("pods".to_owned(), Amount::from_units(i64::from(self.max_pods))),
        ]);
        c.extend(self.hugepages.iter().map(|(k, v)| (k.clone(), Amount::from_units(*v))));
        c
    }

    /// What pods may use of the machine: capacity less reservations and the hard eviction thresholds.
    pub fn allocatable(&self, k: &KubeletConfiguration) -> BTreeMap<String, Amount> {
        let mut all = self.available(k);
        let signals = [("memory.available", "memory"), ("nodefs.available", "ephemeral-storage")];
        let capacity = self.capacity();
        for (signal, resource) in signals {
            let (Some(t), Some(left), Some(total)) =
                (k.eviction_hard.get(signal), all.get(resource).copied(), capacity.get(resource))
            else {
                continue;
            };
            let reserve = match t.strip_suffix('%').and_then(|p| p.parse::<f64>().ok()) {
                Some(percent) => Amount::from_units((total.units() as f64 * percent / 100.0) as i64),
                None => t.parse().unwrap_or_default(),
            };
            all.insert(resource.to_owned(), (left - reserve).max(Amount::ZERO));
        }
        all
    }

    /// Capacity less what is reserved for the system and the agents.
    pub fn available(&self, k: &KubeletConfiguration) -> BTreeMap<String, Amount> {
        let mut all = self.capacity();
        for reserved in [&k.system_reserved, &k.kube_reserved] {
            for (resource, text) in reserved {
                if let (Some(total), Ok(amount)) = (all.get(resource).copied(), text.parse::<Amount>()) {
                    all.insert(resource.clone(), (total - amount).max(Amount::ZERO));
                }
            }
        }
        all
    }
}

/// How many processes and threads the kernel allows.
pub fn process_ids() -> Option<i64> {
    let limits = ["/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max"];
    limits.iter().filter_map(|f| word(f).parse().ok()).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocatable_is_less_than_capacity() {
        let m = Machine { cpus: 2, memory: 1 << 30, storage: 1000, max_pods: 110, ..Default::default() };
        let mut k = KubeletConfiguration::default();
        k.kube_reserved.insert("cpu".into(), "500m".into());
        let a = m.allocatable(&k);
        assert_eq!(a["cpu"].milli(), 1500);
        assert_eq!(a["memory"].units(), (1 << 30) - (100 << 20));
        assert_eq!(a["ephemeral-storage"].units(), 900);
        assert_eq!(a["pods"].units(), 110);
    }

    #[test]
    fn meminfo_lines() {
        let text = "MemTotal:       1024 kB\nMemAvailable:    512 kB\n";
        assert_eq!(meminfo(text, "MemAvailable"), Some(512 << 10));
        assert_eq!(meminfo(text, "Mem"), None);
    }
}
