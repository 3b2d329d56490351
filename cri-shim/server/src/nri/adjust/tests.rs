use super::*;

fn spec() -> Spec {
    serde_json::from_value(json!({
        "ociVersion": "1.2.0", "root": {"path": "/r"},
        "process": {"cwd": "/", "args": ["a"], "env": ["A=old", "B=1"], "user": {"uid": 0, "gid": 0}},
        "annotations": {"own": "1", "gone": "1"},
        "mounts": [{"destination": "/a/b", "source": "/x", "type": "bind"}, {"destination": "/gone", "source": "/x"}],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [{"type": "mount"}, {"type": "pid"}],
            "devices": [{"path": "/dev/x", "type": "c", "major": 1, "minor": 3}],
        },
    }))
    .unwrap()
}

fn with(given: &api::ContainerAdjustment, own: bool) -> Result<Spec> {
    let owners = Owners::default();
    adjust(&spec(), given, &Target { id: "c", owners: &owners, own, least_oom_score_adj: 0 })
}

fn linux(linux: api::LinuxContainerAdjustment) -> api::ContainerAdjustment {
    api::ContainerAdjustment { linux: Some(linux), ..Default::default() }
}

fn mount(destination: &str, options: &[&str]) -> api::Mount {
    api::Mount {
        destination: destination.into(),
        source: "/".into(),
        r#type: "bind".into(),
        options: options.iter().map(|o| (*o).to_owned()).collect(),
    }
}

#[test]
fn everything_arrives_in_the_spec() {
    let env = |key: &str, value: &str| api::KeyValue { key: key.into(), value: value.into() };
    let device = |path: &str| api::LinuxDevice {
        path: path.into(),
        r#type: "c".into(),
        major: 1,
        minor: 5,
        file_mode: Some(api::OptionalFileMode { value: 0o2_0600 }),
        ..Default::default()
    };
    let hook =
        api::Hook { path: "/h".into(), timeout: Some(api::OptionalInt { value: 3 }), ..Default::default() };
    let namespace = |kind: &str, path: &str| api::LinuxNamespace { r#type: kind.into(), path: path.into() };
    let policy = api::LinuxSeccomp {
        default_action: "SCMP_ACT_ALLOW".into(),
        syscalls: vec![api::LinuxSyscall {
            names: vec!["mkdir".into()],
            action: "SCMP_ACT_ERRNO".into(),
            errno_ret: Some(api::OptionalUInt32 { value: 1 }),
            ..Default::default()
        }],
        ..Default::default()
    };
    let given = api::ContainerAdjustment {
        annotations: [("-gone".to_owned(), String::new()), ("new".to_owned(), "2".to_owned())].into(),
        mounts: vec![mount("-/gone", &[]), mount("/a", &["rbind", "ro"])],
        env: vec![env("-B", ""), env("A", "new"), env("C", "x=y")],
        hooks: Some(api::Hooks { create_runtime: vec![hook], ..Default::default() }),
        rlimits: vec![api::PosixRlimit { r#type: "RLIMIT_NOFILE".into(), hard: 9, soft: 8 }],
        args: vec!["b".into(), "c".into()],
        linux: Some(api::LinuxContainerAdjustment {
            devices: vec![device("-/dev/x"), device("/dev/y")],
            oom_score_adj: Some(api::OptionalInt { value: -500 }),
            seccomp_policy: Some(policy),
            namespaces: vec![namespace("-pid", ""), namespace("ipc", "/p")],
            sysctl: [("-kernel.none".to_owned(), String::new())].into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let got = serde_json::to_value(with(&given, true).unwrap()).unwrap();
    assert_eq!(got["annotations"], json!({"own": "1", "new": "2"}));
    assert_eq!(got["process"]["env"], json!(["A=new", "C=x=y"]));
    assert_eq!(got["process"]["args"], json!(["b", "c"]));
    assert_eq!(got["process"]["rlimits"], json!([{"type": "RLIMIT_NOFILE", "hard": 9, "soft": 8}]));
    // No lower than may be.
    assert_eq!(got["process"]["oomScoreAdj"], 0);
    let places: Vec<_> = got["mounts"].as_array().unwrap().iter().map(|m| m["destination"].clone()).collect();
    assert_eq!(places, ["/a", "/a/b"]);
    assert_eq!(got["hooks"]["createRuntime"], json!([{"path": "/h", "timeout": 3}]));
    let devices = got["linux"]["devices"].as_array().unwrap();
    assert_eq!(
        (devices.len(), &devices[0]["path"], &devices[0]["fileMode"]),
        (1, &json!("/dev/y"), &json!(0o600))
    );
    let rules = got["linux"]["resources"]["devices"].as_array().unwrap();
    assert_eq!((rules.len(), &rules[1]["minor"], &rules[1]["allow"]), (2, &json!(5), &json!(true)));
    assert_eq!(got["linux"]["namespaces"], json!([{"type": "mount"}, {"type": "ipc", "path": "/p"}]));
    assert_eq!(got["linux"]["seccomp"]["syscalls"][0]["errnoRet"], 1);
    assert!(with(&api::ContainerAdjustment::default(), true).unwrap() == spec());
}

#[test]
fn what_our_runtime_lacks_is_refused_and_left_to_others() {
    let none = api::LinuxContainerAdjustment::default;
    let rdt =
        api::LinuxRdt { clos_id: Some(api::OptionalString { value: "x".into() }), ..Default::default() };
    for (says, given) in [
        ("Intel RDT", api::LinuxContainerAdjustment { rdt: Some(rdt), ..none() }),
        (
            "network device, eth7",
            api::LinuxContainerAdjustment {
                net_devices: [("eth7".to_owned(), api::LinuxNetDevice { name: "eth1".into() })].into(),
                ..none()
            },
        ),
    ] {
        let given = linux(given);
        let e = with(&given, true).unwrap_err().to_string();
        assert!(e.contains(says), "{e}");
        with(&given, false).unwrap();
    }
}

#[test]
fn what_the_cri_has_not_and_the_runtime_does() {
    let given = api::LinuxContainerAdjustment {
        sysctl: [("kernel.msgmax".to_owned(), "1".to_owned())].into(),
        io_priority: Some(api::LinuxIoPriority {
            class: api::IoPrioClass::IoprioClassBe as i32,
            priority: 4,
        }),
        scheduler: Some(api::LinuxScheduler {
            policy: api::LinuxSchedulerPolicy::SchedBatch as i32,
            nice: 5,
            flags: (0..7).collect(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let spec = serde_json::to_value(with(&linux(given), true).unwrap()).unwrap();
    assert_eq!(spec["linux"]["sysctl"], json!({"kernel.msgmax": "1"}));
    assert_eq!(spec["process"]["ioPriority"], json!({"class": "IOPRIO_CLASS_BE", "priority": 4}));
    let s = &spec["process"]["scheduler"];
    assert_eq!((&s["policy"], &s["nice"]), (&json!("SCHED_BATCH"), &json!(5)));
    assert_eq!(s["flags"].as_array().unwrap().len(), 7, "{s}");
}

#[test]
fn nonsense_is_refused() {
    let key = |key: &str| api::ContainerAdjustment {
        env: vec![api::KeyValue { key: key.into(), value: "1".into() }],
        ..Default::default()
    };
    let at = |m: api::Mount| api::ContainerAdjustment { mounts: vec![m], ..Default::default() };
    let seccomp = api::LinuxSeccomp { default_action: "SCMP_ACT_NONE".into(), ..Default::default() };
    for given in [
        key(""),
        key("A=B"),
        key("A\0"),
        at(mount("a", &[])),
        at(mount("/a/../b", &[])),
        linux(api::LinuxContainerAdjustment { seccomp_policy: Some(seccomp), ..Default::default() }),
    ] {
        assert!(with(&given, true).is_err(), "{given:?}");
    }
}
