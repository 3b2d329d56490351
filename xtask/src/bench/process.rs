//! What the kernel says about processes.

use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Asks a process to end, and kills it when it does not within ten seconds.
pub fn end(child: &mut Child) {
    let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM);
    let asked = Instant::now();
    while matches!(child.try_wait(), Ok(None)) && asked.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = child.kill();
    let _ = child.wait();
}

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

fn status(pid: u32, key: &str) -> f64 {
    kib(&std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default(), key) / 1024.0
}

/// Forgets the highest resident set size so far; gives the present one in MiB.
pub fn reset_peak(pid: u32) -> f64 {
    // A kernel without it leaves the peak since the start, which makes the figure worse, not better.
    let _ = std::fs::write(format!("/proc/{pid}/clear_refs"), "5");
    status(pid, "VmRSS:")
}

/// The highest resident set size in MiB since [`reset_peak`].
pub fn peak(pid: u32) -> f64 {
    status(pid, "VmHWM:")
}

/// User and system time so far.
pub fn cpu(pid: u32) -> Duration {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = text.rsplit(')').next().unwrap_or_default();
    // The 14th and 15th field of the line, in hundredths of a second.
    let ticks =
        |i: usize| after_name.split_whitespace().nth(i).and_then(|f| f.parse::<u64>().ok()).unwrap_or(0);
    Duration::from_millis((ticks(11) + ticks(12)) * 10)
}
