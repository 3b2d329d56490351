//! What the kernel says about processes.

use std::path::Path;

/// Proportional set size in MiB; 0 of a process that is gone.
pub fn pss(pid: u32) -> f64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    kib(&rollup, "Pss:") / 1024.0
}

fn kib(text: &str, key: &str) -> f64 {
    let found =
        text.lines().find_map(|l| l.strip_prefix(key)?.trim().strip_suffix(" kB")?.trim().parse().ok());
    found.unwrap_or(0.0)
}

/// Processes whose command line names both the program and the folder.
pub fn find(program: &str, folder: &Path) -> Vec<u32> {
    let folder = folder.to_string_lossy().into_owned();
    let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter_map(|e| e.file_name().to_string_lossy().parse().ok())
        .filter(|pid: &u32| {
            let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = line.replace('\0', " ");
            line.split(' ').next().is_some_and(|p| p.ends_with(program)) && line.contains(&folder)
        })
        .collect()
}

/// Mean proportional set size in MiB, and how many they are.
pub fn mean_pss(pids: &[u32]) -> (f64, usize) {
    let sum: f64 = pids.iter().map(|p| pss(*p)).sum();
    (if pids.is_empty() { 0.0 } else { sum / pids.len() as f64 }, pids.len())
}
