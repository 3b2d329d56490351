//! Tables: what goes in, what the spec says.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use oci_spec::image::{ConfigBuilder, ImageConfiguration, ImageConfigurationBuilder, RootFsBuilder};
use oci_spec::runtime::{Capability, LinuxNamespaceType, Spec};
use orlop_proto::cri;

use super::mounts::Resolved;
use super::*;

struct Case {
    config: cri::ContainerConfig,
    sandbox: cri::PodSandboxConfig,
    image: ImageConfiguration,
    namespaces: Namespaces,
    user: User,
    facts: Facts,
    mounts: Vec<Resolved>,
    apparmor: Option<String>,
    selinux: crate::selinux::label::Labels,
}

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|s| (*s).to_owned()).collect()
}

fn image(entrypoint: &[&str], cmd: &[&str], env: &[&str], dir: &str) -> ImageConfiguration {
    let config = ConfigBuilder::default()
        .entrypoint(strings(entrypoint))
        .cmd(strings(cmd))
        .env(strings(env))
        .working_dir(dir.to_owned())
        .build()
        .unwrap();
    ImageConfigurationBuilder::default()
        .architecture(oci_spec::image::Arch::Amd64)
        .os(oci_spec::image::Os::Linux)
        .config(config)
        .rootfs(RootFsBuilder::default().typ("layers").diff_ids(Vec::new()).build().unwrap())
        .build()
        .unwrap()
}

impl Default for Case {
    fn default() -> Self {
        Case {
            config: cri::ContainerConfig {
                metadata: Some(cri::ContainerMetadata { name: "c".into(), attempt: 0 }),
                command: strings(&["/bin/true"]),
                linux: Some(Default::default()),
                ..Default::default()
            },
            sandbox: cri::PodSandboxConfig::default(),
            image: image(&[], &[], &[], ""),
            namespaces: Namespaces {
                net: Some("/n/net".into()),
                ipc: Some("/n/ipc".into()),
                uts: Some("/n/uts".into()),
                pid: PidNamespace::Own,
                user: None,
            },
            user: User::default(),
            facts: Facts {
                capabilities: crate::facts::CAPABILITIES.into(),
                least_oom_score_adj: -1000,
                ..Default::default()
            },
            mounts: Vec::new(),
            apparmor: None,
            selinux: Default::default(),
        }
    }
}

impl Case {
    fn security(&mut self) -> &mut cri::LinuxContainerSecurityContext {
        self.config.linux.get_or_insert_default().security_context.get_or_insert_default()
    }

    fn resources(&mut self) -> &mut cri::LinuxContainerResources {
        self.config.linux.get_or_insert_default().resources.get_or_insert_default()
    }

    fn try_spec(&self) -> Result<Spec> {
        generate(&Input {
            sandbox_id: "sid",
            config: &self.config,
            sandbox: &self.sandbox,
            image: &self.image,
            rootfs: Path::new("/r"),
            namespaces: self.namespaces.clone(),
            files: SandboxFiles {
                resolv_conf: "/s/resolv.conf".into(),
                hostname: "/s/hostname".into(),
                hosts: "/s/hosts".into(),
                shm: "/s/shm".into(),
            },
            hostname: "web-0",
            user: &self.user,
            mounts: &self.mounts,
            devices: &[],
            cgroups_path: "/kubepods/podx/cid",
            localhost_seccomp: None,
            apparmor: self.apparmor.clone(),
            selinux: &self.selinux,
            facts: &self.facts,
        })
    }

    fn spec(&self) -> Spec {
        self.try_spec().unwrap()
    }
}

#[test]
fn arguments() {
    // command, args, entrypoint, cmd, result
    type Row = [&'static [&'static str]; 4];
    let table: &[(Row, Option<&[&str]>)] = &[
        ([&["a"], &[], &["e"], &["c"]], Some(&["a"])),
        ([&["a"], &["b"], &["e"], &["c"]], Some(&["a", "b"])),
        ([&[], &["b"], &["e"], &["c"]], Some(&["e", "b"])),
        ([&[], &[], &["e"], &["c"]], Some(&["e", "c"])),
        ([&[], &[], &[], &["c"]], Some(&["c"])),
        ([&[], &[], &["e"], &[]], Some(&["e"])),
        ([&[], &["b"], &[], &["c"]], Some(&["b"])),
        ([&[], &[], &[], &[]], None),
        ([&["a\0b"], &[], &[], &[]], None),
    ];
    for ([command, args, entrypoint, cmd], want) in table {
        let config =
            cri::ContainerConfig { command: strings(command), args: strings(args), ..Default::default() };
        let got = process::args(&config, &strings(entrypoint), &strings(cmd)).ok();
        assert_eq!(got, want.map(strings), "{command:?} {args:?} {entrypoint:?} {cmd:?}");
    }
}

#[test]
fn environment_of_the_container_wins() {
    let mut case =
        Case { image: image(&[], &[], &["A=image", "B=image", "PATH=/x", "junk"], ""), ..Default::default() };
    case.config.tty = true;
    case.config.envs = [("A", "own"), ("E", ""), ("A", "last")]
        .map(|(k, v)| cri::KeyValue { key: k.into(), value: v.into() })
        .to_vec();
    let spec = case.spec();
    let env = spec.process().as_ref().unwrap().env().clone().unwrap();
    assert_eq!(env, strings(&["PATH=/x", "HOSTNAME=web-0", "TERM=xterm", "A=last", "B=image", "E="]));
    case.config.envs = vec![cri::KeyValue { key: "A=B".into(), value: vec![] }];
    assert!(case.try_spec().is_err());
}

#[test]
fn working_directory() {
    for (own, images, want) in [
        ("", "", Some("/")),
        ("", "/img", Some("/img")),
        ("/own", "/img", Some("/own")),
        ("rel", "", None),
        ("/proc/self/fd/8", "", None),
    ] {
        let mut case = Case { image: image(&[], &[], &[], images), ..Default::default() };
        case.config.working_dir = own.into();
        let got = case.try_spec().ok().map(|s| s.process().as_ref().unwrap().cwd().clone());
        assert_eq!(got, want.map(PathBuf::from), "{own:?} {images:?}");
    }
}

#[test]
fn capability_sets() {
    let add = |add: &[&str], drop: &[&str], privileged: bool, lacking: &[Capability]| {
        let mut case = Case::default();
        case.security().privileged = privileged;
        case.security().capabilities = Some(cri::Capability {
            add_capabilities: strings(add),
            drop_capabilities: strings(drop),
            add_ambient_capabilities: vec![],
        });
        lacking.iter().for_each(|c| {
            case.facts.capabilities.remove(c);
        });
        case.try_spec().ok().map(|s| {
            s.process().as_ref().unwrap().capabilities().as_ref().unwrap().bounding().clone().unwrap()
        })
    };
    assert_eq!(add(&[], &[], false, &[]).unwrap().len(), 14);
    assert_eq!(add(&[], &["ALL"], false, &[]).unwrap().len(), 0);
    assert_eq!(add(&["NET_ADMIN"], &["ALL"], false, &[]).unwrap(), HashSet::from([Capability::NetAdmin]));
    assert_eq!(add(&["cap_sys_time"], &["CHOWN"], false, &[]).unwrap().len(), 14);
    assert_eq!(add(&["ALL"], &["SYS_ADMIN"], false, &[]).unwrap().len(), 40);
    assert_eq!(add(&[], &[], true, &[Capability::SysResource]).unwrap().len(), 40);
    // Upstream's: what is dropped is gone, and what is not known changes nothing.
    assert_eq!(add(&["NET_ADMIN"], &["NET_ADMIN", "CHOWN"], false, &[]).unwrap().len(), 13);
    assert_eq!(add(&["NET_ADMIN"], &["ALL", "NET_ADMIN"], false, &[]).unwrap().len(), 0);
    assert_eq!(add(&["ALL"], &["ALL"], false, &[]).unwrap().len(), 0);
    assert_eq!(add(&["NO_SUCH"], &["NO_SUCH"], false, &[]).unwrap().len(), 14);
}

#[test]
fn namespaces_are_joined_made_or_left() {
    let kinds = |case: &Case| {
        let spec = case.spec();
        let list = spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
        list.iter().map(|n| (n.typ(), n.path().clone())).collect::<Vec<_>>()
    };
    let mut case = Case::default();
    let pod = kinds(&case);
    assert!(pod.contains(&(LinuxNamespaceType::Network, Some("/n/net".into()))));
    assert!(pod.contains(&(LinuxNamespaceType::Pid, None)));
    assert!(pod.contains(&(LinuxNamespaceType::Mount, None)));
    case.namespaces.pid = PidNamespace::Join("/n/pid".into());
    assert!(kinds(&case).contains(&(LinuxNamespaceType::Pid, Some("/n/pid".into()))));
    case.namespaces = Namespaces { pid: PidNamespace::Host, ..Default::default() };
    assert_eq!(kinds(&case), [(LinuxNamespaceType::Mount, None)]);
    case.facts.cgroup_v2 = true;
    assert!(kinds(&case).contains(&(LinuxNamespaceType::Cgroup, None)));
}

#[test]
fn mounts_of_the_kubelet_replace_ours_and_parents_come_first() {
    let mount = |at: &str, from: &str, readonly| cri::Mount {
        container_path: at.into(),
        host_path: from.into(),
        readonly,
        ..Default::default()
    };
    let mounts = [mount("/a/b", "/h1", true), mount("/a", "/h2", false), mount("/etc/hosts", "/h3", false)]
        .iter()
        .map(|m| Resolved::new(m, m.host_path.clone().into()).unwrap())
        .collect();
    let case = Case { mounts, ..Default::default() };
    let spec = case.spec();
    let list = spec.mounts().as_ref().unwrap();
    let at = |d: &str| list.iter().position(|m| m.destination() == Path::new(d)).unwrap();
    assert!(at("/a") < at("/a/b"));
    assert!(at("/dev") < at("/dev/shm"));
    assert_eq!(list.iter().filter(|m| m.destination() == Path::new("/etc/hosts")).count(), 1);
    assert_eq!(list[at("/etc/hosts")].source(), &Some("/h3".into()));
    assert_eq!(list[at("/a/b")].options().clone().unwrap(), strings(&["rbind", "rprivate", "ro"]));
}

#[test]
fn nothing_of_ours_is_made_in_the_hosts_dev_and_sys() {
    for (at, gone, stays) in [
        ("/dev", &["/dev/pts", "/dev/mqueue"][..], &["/dev/shm", "/sys/fs/cgroup", "/proc"][..]),
        ("/sys", &["/sys/fs/cgroup"], &["/dev/pts", "/proc"]),
        ("/sys/fs", &["/sys/fs/cgroup"], &["/sys", "/dev/pts"]),
        ("/etc", &[], &["/etc/hosts", "/dev/pts"]),
    ] {
        let mut case = Case::default();
        let given = cri::Mount { container_path: at.into(), ..Default::default() };
        case.mounts = vec![Resolved::new(&given, at.into()).unwrap()];
        let spec = case.spec();
        let all: Vec<&Path> =
            spec.mounts().as_ref().unwrap().iter().map(|m| m.destination().as_path()).collect();
        let below = |d: &&&str| all.iter().any(|a| a.starts_with(d));
        assert!(!gone.iter().any(|d| below(&d)), "{at}: {all:?}");
        assert!(stays.iter().all(|d| below(&d)), "{at}: {all:?}");
    }
}

#[test]
fn mounts_that_make_no_sense_are_refused() {
    let base = cri::Mount { container_path: "/a".into(), ..Default::default() };
    let cases = [
        cri::Mount { container_path: "a".into(), ..base.clone() },
        cri::Mount { container_path: "/a/../b".into(), ..base.clone() },
        cri::Mount { recursive_read_only: true, ..base.clone() },
        cri::Mount { recursive_read_only: true, readonly: true, propagation: 2, ..base.clone() },
    ];
    for m in cases {
        assert!(Resolved::new(&m, "/x".into()).is_err(), "{m:?}");
    }
    let ok = cri::Mount { recursive_read_only: true, readonly: true, ..base };
    assert!(Resolved::new(&ok, "/x".into()).is_ok());
}

#[test]
fn propagation_of_the_root_follows_the_mounts() {
    for (modes, want) in [(vec![0], None), (vec![0, 1], Some("slave")), (vec![1, 2], Some("shared"))] {
        let mounts = modes
            .iter()
            .map(|p| cri::Mount { container_path: format!("/m{p}"), propagation: *p, ..Default::default() })
            .map(|m| Resolved::new(&m, "/x".into()).unwrap())
            .collect();
        let case = Case { mounts, ..Default::default() };
        let got = case.spec().linux().as_ref().unwrap().rootfs_propagation().clone();
        assert_eq!(got.as_deref(), want);
    }
}

#[test]
fn resource_limits() {
    let mut case = Case::default();
    *case.resources() = cri::LinuxContainerResources {
        cpu_shares: 102,
        cpu_quota: 5000,
        cpu_period: 100_000,
        memory_limit_in_bytes: 1 << 20,
        oom_score_adj: -500,
        ..Default::default()
    };
    let of = |case: &Case| {
        let spec = case.spec();
        let r = spec.linux().as_ref().unwrap().resources().clone().unwrap();
        let oom = spec.process().as_ref().unwrap().oom_score_adj();
        (
            r.cpu().as_ref().unwrap().shares(),
            r.memory().as_ref().unwrap().limit(),
            r.memory().as_ref().unwrap().swap(),
            oom,
        )
    };
    assert_eq!(of(&case), (Some(102), Some(1 << 20), None, Some(-500)));
    case.facts.swap_accounting = true;
    case.facts.least_oom_score_adj = 0;
    assert_eq!(of(&case), (Some(102), Some(1 << 20), Some(1 << 20), Some(0)));
    case.resources().cpu_shares = -1;
    assert!(case.try_spec().is_err());
}

#[test]
fn huge_pages_are_limited_where_the_kernel_can() {
    let mut case = Case::default();
    let limits = [("2MB", 4 << 20), ("1GB", 0)];
    case.resources().hugepage_limits =
        limits.map(|(size, limit)| cri::HugepageLimit { page_size: size.into(), limit }).to_vec();
    let of = |case: &Case| {
        let spec = case.spec();
        let limits = spec.linux().as_ref().unwrap().resources().as_ref().unwrap().hugepage_limits().clone();
        limits.map(|all| all.iter().map(|l| (l.page_size().clone(), l.limit())).collect::<Vec<_>>())
    };
    assert_eq!(of(&case), None);
    case.facts.hugetlb = true;
    assert_eq!(of(&case), Some(vec![("2MB".to_owned(), 4 << 20), ("1GB".to_owned(), 0)]));
}

/// CVE-2024-3154, CVE-2023-6476: annotations of a pod are no way to change what the runtime does.
#[test]
fn annotations_of_others_do_not_reach_the_runtime() {
    let mut case = Case::default();
    let foreign = [
        "org.systemd.property.DeviceAllow",
        "io.kubernetes.cri-o.UnifiedCgroup.main",
        "run.oci.handler",
        "org.criu.config",
        "module.wasm.image/variant",
    ];
    for name in foreign {
        case.config.annotations.insert(name.into(), "x".into());
        case.sandbox.annotations.insert(name.into(), "x".into());
    }
    let spec = case.spec();
    let names: Vec<_> = spec.annotations().iter().flatten().map(|(k, _)| k.clone()).collect();
    assert!(names.iter().all(|n| n.starts_with("io.kubernetes.cri.")), "{names:?}");
}

#[test]
fn privileged_sees_everything() {
    let mut case = Case::default();
    case.security().privileged = true;
    case.security().seccomp = Some(cri::SecurityProfile::default());
    case.security().masked_paths = strings(&["/proc/kcore"]);
    let spec = case.spec();
    let linux = spec.linux().as_ref().unwrap();
    assert!(linux.masked_paths().clone().unwrap_or_default().is_empty());
    assert!(linux.seccomp().is_none());
    assert!(linux.resources().as_ref().unwrap().devices().as_ref().unwrap()[0].allow());
    let sys = spec.mounts().as_ref().unwrap().iter().find(|m| m.destination() == Path::new("/sys")).unwrap();
    assert!(sys.options().as_ref().unwrap().contains(&"rw".to_owned()));
}

#[test]
fn paths_are_hidden_unless_a_user_namespace_allows_otherwise() {
    let masked = |case: &Case| case.spec().linux().as_ref().unwrap().masked_paths().clone().unwrap();
    let mut case = Case::default();
    assert!(masked(&case).contains(&"/proc/kcore".to_owned()));
    case.security().masked_paths = strings(&["/only"]);
    assert_eq!(masked(&case), strings(&["/only"]));
    case.security().masked_paths.clear();
    case.namespaces.user = Some("/n/user".into());
    assert!(masked(&case).is_empty());
}

#[test]
fn profile_and_labels() {
    let mut case = Case::default();
    let of = |case: &Case| {
        let spec = case.spec();
        let process = spec.process().as_ref().unwrap();
        let mount = spec.linux().as_ref().unwrap().mount_label().clone();
        (process.apparmor_profile().clone(), process.selinux_label().clone(), mount)
    };
    assert_eq!(of(&case), (None, None, None));
    case.apparmor = Some("p".into());
    case.selinux.process = "u:r:t:s0".into();
    case.selinux.mount = "u:r:f:s0".into();
    assert_eq!(of(&case), (Some("p".into()), Some("u:r:t:s0".into()), Some("u:r:f:s0".into())));
}

#[test]
fn cgroup_paths() {
    use CgroupDriver::*;
    for (driver, parent, want) in [
        (Cgroupfs, "/kubepods/podx", "/kubepods/podx/id"),
        (Cgroupfs, "", "/orlop/id"),
        (Systemd, "/kubepods.slice/kubepods-podx.slice", "kubepods-podx.slice:orlop:id"),
        (Systemd, "kubepods-podx.slice", "kubepods-podx.slice:orlop:id"),
        (Systemd, "", "system.slice:orlop:id"),
    ] {
        assert_eq!(super::cgroups_path(driver, parent, "/orlop", "id"), want);
    }
}

#[test]
fn an_update_keeps_what_it_does_not_name() {
    let held = cri::LinuxContainerResources {
        cpu_shares: 2,
        memory_limit_in_bytes: 5,
        cpuset_cpus: "0".into(),
        ..Default::default()
    };
    let update = cri::LinuxContainerResources { cpu_shares: 9, ..Default::default() };
    let merged = resources::merge(&held, &update);
    assert_eq!((merged.cpu_shares, merged.memory_limit_in_bytes, merged.cpuset_cpus.as_str()), (9, 5, "0"));
}
