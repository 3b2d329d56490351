//! Everything the CRI server is told from outside.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Who makes cgroups: the runtime itself, or systemd on its request (`RuntimeConfig` tells the kubelet which).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum CgroupDriver {
    /// Folders below each hierarchy's mount; `cgroup_parent` is a path.
    #[default]
    Cgroupfs,
    /// Transient scopes; `cgroup_parent` is a slice.
    Systemd,
}

/// An OCI runtime of a RuntimeClass: a program with the command line of runc.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OciRuntime {
    /// Absolute.
    pub program: PathBuf,
    /// Before the command.
    pub args: Vec<String>,
}

/// A handler's name and what stands for it: `NAME=PROGRAM [ARGUMENT]...`, separated by blanks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handler(pub String, pub OciRuntime);

impl FromStr for Handler {
    type Err = String;

    fn from_str(text: &str) -> Result<Handler, String> {
        let form = || format!("{text:?} is not of the form NAME=/PROGRAM [ARGUMENT]...");
        let (name, command) = text.split_once('=').ok_or_else(form)?;
        let mut words = command.split_whitespace();
        let program = words.next().map(PathBuf::from).filter(|p| p.is_absolute()).ok_or_else(form)?;
        // RuntimeClass handlers are DNS labels (node.k8s.io/v1, RuntimeClass.handler).
        let is_label = !name.is_empty()
            && name.len() <= 63
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !name.starts_with('-')
            && !name.ends_with('-');
        if !is_label {
            return Err(format!("{name:?} cannot be a RuntimeClass handler: it is no DNS label"));
        }
        if name == crate::status::RUNTIME {
            return Err(format!("the handler {name:?} is this server's own"));
        }
        Ok(Handler(name.to_owned(), OciRuntime { program, args: words.map(str::to_owned).collect() }))
    }
}

/// The server's configuration. Nothing else is read from the environment.
#[derive(Clone, Debug)]
pub struct Config {
    /// The unix socket of both CRI services.
    pub listen: PathBuf,
    /// Records of sandboxes and containers. Outlives a reboot.
    pub state_dir: PathBuf,
    /// Monitors' sockets, namespaces, bundles. Does not outlive a reboot. Keep it short: `<run_dir>/s/<64>/monitor.sock` should
    /// stay below 108 bytes for other tools that want to connect.
    pub run_dir: PathBuf,
    /// The image store's folder.
    pub images_dir: PathBuf,
    /// How registries are reached.
    pub images: orlop_images::Options,
    /// The `orlop-monitor` program.
    pub monitor: PathBuf,
    /// The criu program; one that is not named is looked up where programs usually are.
    pub criu: Option<PathBuf>,
    pub cni_conf_dir: PathBuf,
    pub cni_bin_dirs: Vec<PathBuf>,
    /// Our own plugin, as a part of this program.
    pub cni_builtin: Option<orlop_cni_invoke::Builtin>,
    pub cni_cache_dir: PathBuf,
    /// Where other runtimes of this machine tell which networks they use, so that collecting garbage spares their pods.
    pub cni_neighbours: orlop_cni_invoke::Neighbours,
    /// How long one run of a plugin may take.
    pub cni_timeout: Duration,
    /// Where exec, attach and port-forward connections arrive. Loopback unless the kubelet is elsewhere; port 0 takes a free one.
    pub streaming_listen: SocketAddr,
    /// A stream without traffic in either direction is ended after this long.
    pub streaming_idle_timeout: Duration,
    pub cgroup_driver: CgroupDriver,
    /// The parent of cgroups of sandboxes that name none: a path, or a slice with the systemd driver.
    pub default_cgroup_parent: String,
    /// OCI runtimes that RuntimeClasses may name, by handler, beside this server's own.
    pub runtimes: BTreeMap<String, OciRuntime>,
    /// Where `Localhost` seccomp profiles with a relative name are looked up.
    pub seccomp_profile_root: PathBuf,
    /// Folders with CDI spec files; a later one counts more.
    pub cdi_spec_dirs: Vec<PathBuf>,
    /// NRI plugins; `None` has none. The default has none, since the places of plugins are the machine's, not a server's.
    pub nri: Option<orlop_nri::Config>,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            listen: "/run/orlop/cri.sock".into(),
            state_dir: "/var/lib/orlop/cri".into(),
            run_dir: "/run/orlop/cri".into(),
            images_dir: "/var/lib/orlop/images".into(),
            images: orlop_images::Options::default(),
            monitor: "/usr/local/bin/orlop-monitor".into(),
            criu: None,
            cni_conf_dir: "/etc/cni/net.d".into(),
            cni_bin_dirs: vec!["/opt/cni/bin".into()],
            cni_builtin: None,
            cni_cache_dir: "/var/lib/orlop/cri/cni".into(),
            cni_neighbours: orlop_cni_invoke::Neighbours {
                // The same for every server of the machine, wherever it keeps its own files.
                registry: Some("/run/orlop-cni-networks".into()),
                libcni: Some("/var/lib/cni".into()),
            },
            cni_timeout: Duration::from_secs(60),
            streaming_listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            streaming_idle_timeout: Duration::from_secs(4 * 3600),
            cgroup_driver: CgroupDriver::Cgroupfs,
            default_cgroup_parent: "/orlop".into(),
            runtimes: BTreeMap::new(),
            seccomp_profile_root: "/var/lib/kubelet/seccomp".into(),
            cdi_spec_dirs: crate::container::cdi::default_dirs(),
            nri: None,
        }
    }
}

/// NRI plugins at upstream's places.
pub fn nri_defaults() -> orlop_nri::Config {
    orlop_nri::Config::new(crate::status::RUNTIME, env!("CARGO_PKG_VERSION"))
}

impl Config {
    pub(crate) fn sandbox_state_dir(&self, id: &str) -> PathBuf {
        self.state_dir.join("sandboxes").join(id)
    }

    pub(crate) fn container_state_dir(&self, id: &str) -> PathBuf {
        self.state_dir.join("containers").join(id)
    }

    /// Where folders of records are made before they come to their place.
    pub(crate) fn workshop_dir(&self, kind: &str) -> PathBuf {
        self.state_dir.join("new").join(kind)
    }

    /// Archives on their way into or out of the image store. Beside the records rather than in the run folder, which may lie in memory.
    pub(crate) fn transfer_dir(&self) -> PathBuf {
        self.state_dir.join("transfer")
    }

    /// The folder handed to the monitor.
    pub(crate) fn sandbox_run_dir(&self, id: &str) -> PathBuf {
        self.run_dir.join("s").join(id)
    }

    pub(crate) fn bundle_dir(&self, sandbox: &str, container: &str) -> PathBuf {
        self.sandbox_run_dir(sandbox).join("bundles").join(container)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handlers() {
        let Handler(name, runtime) = "runc=/usr/sbin/runc --debug -x".parse().unwrap();
        assert_eq!((name.as_str(), runtime.program.to_str()), ("runc", Some("/usr/sbin/runc")));
        assert_eq!(runtime.args, ["--debug", "-x"]);
        for bad in ["runc", "runc=", "runc=runc", "=/runc", "Run_c=/runc", "orlop=/runc", "-a=/runc"] {
            assert!(bad.parse::<Handler>().is_err(), "{bad}");
        }
    }
}
