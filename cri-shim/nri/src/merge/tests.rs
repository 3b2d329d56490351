use super::*;

fn container() -> api::Container {
    api::Container {
        id: "new".into(),
        env: vec!["A=image".into(), "B=1".into()],
        args: vec!["sleep".into()],
        mounts: vec![mount("/data", "/host")],
        annotations: [("k".to_owned(), "pod's".to_owned())].into(),
        ..Default::default()
    }
}

fn mount(destination: &str, source: &str) -> api::Mount {
    api::Mount { destination: destination.into(), source: source.into(), ..Default::default() }
}

fn env(key: &str, value: &str) -> api::KeyValue {
    api::KeyValue { key: key.into(), value: value.into() }
}

fn adjusting(adjust: api::ContainerAdjustment) -> api::CreateContainerResponse {
    api::CreateContainerResponse { adjust: Some(adjust), ..Default::default() }
}

fn limit(value: i64) -> api::LinuxResources {
    let memory = api::LinuxMemory { limit: Some(api::OptionalInt64 { value }), ..Default::default() };
    api::LinuxResources { memory: Some(memory), ..Default::default() }
}

fn update(id: &str, resources: api::LinuxResources, ignore_failure: bool) -> api::ContainerUpdate {
    let linux = Some(api::LinuxContainerUpdate { resources: Some(resources) });
    api::ContainerUpdate { container_id: id.into(), linux, ignore_failure }
}

fn limit_of(r: &api::LinuxResources) -> Option<i64> {
    r.memory?.limit.map(|l| l.value)
}

#[test]
fn the_next_plugin_sees_what_the_first_made() {
    let mut c = Creation::new(container());
    let first = api::ContainerAdjustment {
        env: vec![env("A", "first"), env("-B", "")],
        mounts: vec![mount("-/data", ""), mount("/new", "/x")],
        args: vec!["true".into()],
        annotations: [("-k".to_owned(), String::new()), ("own".to_owned(), "1".to_owned())].into(),
        linux: Some(api::LinuxContainerAdjustment { resources: Some(limit(7)), ..Default::default() }),
        ..Default::default()
    };
    c.apply("10-a", adjusting(first)).unwrap();
    assert_eq!(c.container.env, ["A=first"]);
    assert_eq!(c.container.mounts, [mount("/new", "/x")]);
    assert_eq!(c.container.args, ["true"]);
    assert_eq!(c.container.annotations, [("own".to_owned(), "1".to_owned())].into());
    assert_eq!(limit_of(c.container.linux.as_ref().unwrap().resources.as_ref().unwrap()), Some(7));
    let keys: Vec<_> = c.adjust.env.iter().map(|e| e.key.as_str()).collect();
    assert_eq!(keys, ["-B", "A"]);
    assert_eq!(c.adjust.mounts, [mount("-/data", ""), mount("/new", "/x")]);
    assert_eq!(limit_of(c.adjust.linux.as_ref().unwrap().resources.as_ref().unwrap()), Some(7));
    assert_eq!(c.updates.owners.of("new", Field::Env, Some("A")), Some("10-a"));
    assert_eq!(c.updates.owners.all("new"), ["10-a"]);
}

#[test]
fn two_plugins_over_one_field_are_an_error_that_names_both() {
    let field = |what: api::ContainerAdjustment| {
        let mut c = Creation::new(container());
        c.apply("10-a", adjusting(what.clone())).unwrap();
        // Another plugin's other fields are no conflict, and neither is the same plugin's mark of removal.
        c.apply("20-b", adjusting(api::ContainerAdjustment::default())).unwrap();
        c.apply("20-b", adjusting(what)).unwrap_err().to_string()
    };
    let linux =
        |l: api::LinuxContainerAdjustment| api::ContainerAdjustment { linux: Some(l), ..Default::default() };
    let cases = [
        (
            "environment variable X",
            api::ContainerAdjustment { env: vec![env("X", "1")], ..Default::default() },
        ),
        ("mount /m", api::ContainerAdjustment { mounts: vec![mount("/m", "/")], ..Default::default() }),
        ("arguments", api::ContainerAdjustment { args: vec!["x".into()], ..Default::default() }),
        (
            "resource limit RLIMIT_CPU",
            api::ContainerAdjustment {
                rlimits: vec![api::PosixRlimit { r#type: "RLIMIT_CPU".into(), hard: 1, soft: 1 }],
                ..Default::default()
            },
        ),
        (
            "memory limit",
            linux(api::LinuxContainerAdjustment { resources: Some(limit(1)), ..Default::default() }),
        ),
        (
            "cgroup path",
            linux(api::LinuxContainerAdjustment { cgroups_path: "/x".into(), ..Default::default() }),
        ),
        (
            "OOM score adjustment",
            linux(api::LinuxContainerAdjustment {
                oom_score_adj: Some(api::OptionalInt { value: 5 }),
                ..Default::default()
            }),
        ),
    ];
    for (says, what) in cases {
        let e = field(what);
        assert!(e.contains("10-a") && e.contains("20-b") && e.contains(says), "{says}: {e}");
    }
}

#[test]
fn what_a_plugin_takes_away_first_it_may_set() {
    let mut c = Creation::new(container());
    let set = |args: &[&str]| {
        adjusting(api::ContainerAdjustment {
            env: vec![env("X", args[args.len() - 1])],
            args: args.iter().map(|a| (*a).to_owned()).collect(),
            ..Default::default()
        })
    };
    c.apply("10-a", set(&["one"])).unwrap();
    let mut over = set(&["", "two"]);
    over.adjust.as_mut().unwrap().env.push(env("-X", ""));
    c.apply("20-b", over).unwrap();
    assert_eq!(
        (c.container.args.clone(), c.adjust.args.clone()),
        (vec!["two".to_owned()], vec!["two".to_owned()])
    );
    assert!(c.container.env.contains(&"X=two".to_owned()) && !c.container.env.contains(&"X=one".to_owned()));
    let keys: Vec<_> = c.adjust.env.iter().map(|e| e.key.as_str()).collect();
    assert_eq!(keys, ["-X", "X"]);
    // Hooks add up.
    let hook = api::Hooks {
        poststop: vec![api::Hook { path: "/h".into(), ..Default::default() }],
        ..Default::default()
    };
    for plugin in ["30-c", "40-d"] {
        c.apply(
            plugin,
            adjusting(api::ContainerAdjustment { hooks: Some(hook.clone()), ..Default::default() }),
        )
        .unwrap();
    }
    assert_eq!(c.adjust.hooks.unwrap().poststop.len(), 2);
    assert_eq!(c.updates.owners.of("new", Field::OciHooks, None), Some("30-c,40-d"));
}

#[test]
fn updates() {
    let mut u = Updates::requested("asked", limit(1));
    u.apply("10-a", vec![update("asked", limit(2), false), update("other", limit(3), true)]).unwrap();
    assert_eq!(limit_of(&u.requested.as_ref().unwrap().1), Some(2));
    // A conflict that may be ignored changes nothing; another is an error.
    u.apply("20-b", vec![update("asked", limit(9), true)]).unwrap();
    assert_eq!(limit_of(&u.requested.as_ref().unwrap().1), Some(2));
    assert!(u.apply("20-b", vec![update("asked", limit(9), false)]).is_err());
    let pids = api::LinuxResources { pids: Some(api::LinuxPids { limit: 5 }), ..Default::default() };
    u.apply("20-b", vec![update("other", pids, false)]).unwrap();
    let [other] = u.others.as_slice() else { panic!("{:?}", u.others) };
    let resources = other.linux.as_ref().unwrap().resources.as_ref().unwrap();
    assert_eq!(
        (limit_of(resources), resources.pids.unwrap().limit, other.ignore_failure),
        (Some(3), 5, false)
    );
    let mut c = Creation::new(container());
    let of_itself =
        api::CreateContainerResponse { update: vec![update("new", limit(1), true)], ..Default::default() };
    assert!(c.apply("10-a", of_itself).unwrap_err().to_string().contains("10-a"));
}
