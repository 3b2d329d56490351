//! A cgroup and a folder of pins of the test's own, removed on drop.

use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;

use orlop_ebpf_loader::{Config, Sizes, probe, purge};

/// Tests of one binary share the process, and a process is in one cgroup.
static USERS: Mutex<usize> = Mutex::new(0);

pub struct Place {
    config: Config,
    root: PathBuf,
    cgroup: PathBuf,
    home: PathBuf,
}

impl Place {
    /// Moves this process into a cgroup of its own.
    pub fn new(prefix: &str) -> Place {
        let root =
            probe::cgroup2().expect("cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified");
        let cgroup = root.join(format!("ebpf-test-{}", std::process::id()));
        let mut users = USERS.lock().unwrap();
        if *users == 0 {
            fs::create_dir_all(&cgroup).expect("run as root");
            fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string()).unwrap();
        }
        *users += 1;
        let home = std::env::temp_dir().join(orlop_base::testkit::unique_name(&format!("ebpf-{prefix}")));
        let sizes = Sizes {
            frontends: 1024,
            slots: 1024,
            backends: 1024,
            connections: 1024,
            sockets: 1024,
            ..Sizes::default()
        };
        let config =
            Config { pins: home.join("bpf"), cgroup: Some(cgroup.clone()), sizes, ..Config::default() };
        Place { config, root, cgroup, home }
    }

    pub fn config(&self) -> Config {
        self.config.clone()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = purge(&self.config);
        let _ = fs::remove_dir_all(&self.home);
        let mut users = USERS.lock().unwrap_or_else(|e| e.into_inner());
        *users -= 1;
        if *users == 0 {
            let _ = fs::write(self.root.join("cgroup.procs"), std::process::id().to_string());
            let _ = fs::remove_dir(&self.cgroup);
        }
    }
}
