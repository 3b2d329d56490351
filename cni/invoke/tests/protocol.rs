//! The execution protocol against plugins that are shell scripts: obedient, broken, slow and killed ones.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use orlop_cni_invoke::{Attachment, Builtin, Cni, Error, Neighbours, PodNetwork, PortMapping};
use orlop_cni_types::{Answer, Call, Command};
use serde_json::{Value, json};

struct Fixture {
    dir: tempfile::TempDir,
}

/// Logs its environment and input as one line of JSON, then does what `BEHAVIOUR` for the command says.
const SCRIPT: &str = r#"#!/bin/sh
input=$(cat)
echo "{\"plugin\":\"$(basename $0)\",\"command\":\"$CNI_COMMAND\",\"id\":\"$CNI_CONTAINERID\",\"netns\":\"$CNI_NETNS\",\"if\":\"$CNI_IFNAME\",\"args\":\"$CNI_ARGS\",\"input\":$input}" >> DIR/log
[ -e "DIR/$CNI_COMMAND-$(basename $0)" ] && . "DIR/$CNI_COMMAND-$(basename $0)"
case "$CNI_COMMAND" in
ADD) echo '{"cniVersion":"1.0.0","ips":[{"address":"10.1.2.3/24"}],"unknown":1}' ;;
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.0.0"]}' ;;
esac
"#;

impl Fixture {
    fn new(plugins: &[Value]) -> Fixture {
        let f = Fixture { dir: tempfile::tempdir().unwrap() };
        for sub in ["bin", "conf"] {
            std::fs::create_dir(f.path(sub)).unwrap();
        }
        for p in plugins {
            let path = f.path("bin").join(p["type"].as_str().unwrap());
            std::fs::write(&path, SCRIPT.replace("DIR", f.dir.path().to_str().unwrap())).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        }
        f.configure(&json!({"cniVersion": "1.1.0", "name": "net", "plugins": plugins}));
        f
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn configure(&self, conf: &Value) {
        std::fs::write(self.path("conf/10.conflist"), conf.to_string()).unwrap();
    }

    fn cni(&self) -> Cni {
        Cni::with_limit(
            self.path("conf"),
            vec![self.path("none"), self.path("bin")],
            self.path("cache"),
            Duration::from_secs(30),
        )
    }

    fn behave(&self, command: &str, plugin: &str, shell: &str) {
        std::fs::write(self.path(&format!("{command}-{plugin}")), shell).unwrap();
    }

    fn log(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path("log")).unwrap_or_default();
        text.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect()
    }

    fn calls(&self) -> Vec<String> {
        self.log().iter().map(|l| format!("{} {}", l["command"], l["plugin"]).replace('"', "")).collect()
    }
}

fn pod(id: &str) -> PodNetwork {
    PodNetwork {
        container_id: id.into(),
        netns: "/proc/self/ns/net".into(),
        ifname: "eth0".into(),
        pod_name: "p".into(),
        pod_namespace: "ns".into(),
        pod_uid: "u".into(),
        ..PodNetwork::default()
    }
}

#[tokio::test]
async fn parameters_chaining_and_cache() {
    let f = Fixture::new(&[
        json!({"type": "one", "capabilities": {"portMappings": true}, "own": true}),
        json!({"type": "two"}),
    ]);
    let mapping =
        PortMapping { host_port: 80, container_port: 8080, protocol: "tcp".into(), host_ip: String::new() };
    let pod = PodNetwork { port_mappings: vec![mapping], mac: Some("m".into()), ..pod("c1") };
    let r = f.cni().add(&pod).await.unwrap();
    assert_eq!(r.pod_ips("eth0"), ["10.1.2.3".parse::<std::net::IpAddr>().unwrap()]);
    let log = f.log();
    assert_eq!(f.calls(), ["ADD one", "ADD two"]);
    assert_eq!(
        (&log[0]["id"], &log[0]["netns"], &log[0]["if"]),
        (&json!("c1"), &json!("/proc/self/ns/net"), &json!("eth0"))
    );
    let args =
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=p;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u";
    assert_eq!(log[0]["args"], args);
    let runtime = json!({"portMappings": [{"hostPort": 80, "containerPort": 8080, "protocol": "tcp"}]});
    assert_eq!(
        log[0]["input"],
        json!({"cniVersion": "1.1.0", "name": "net", "type": "one", "own": true, "runtimeConfig": runtime})
    );
    assert_eq!(log[1]["input"].get("runtimeConfig"), None);
    assert_eq!(log[1]["input"]["prevResult"]["unknown"], 1, "what we do not know is passed on");

    // Another process, another configuration: DEL and CHECK use what ADD used.
    f.configure(&json!({"cniVersion": "1.1.0", "name": "net", "plugins": [{"type": "other"}]}));
    f.cni().check(&pod).await.unwrap();
    assert_eq!(f.cni().attachments(), vec![pod.clone()]);
    let gone = PodNetwork { netns: "/no/such/netns".into(), ..pod.clone() };
    f.cni().del(&gone).await.unwrap();
    assert_eq!(f.calls()[2..], ["CHECK one", "CHECK two", "DEL two", "DEL one"]);
    let log = f.log();
    assert_eq!(log[5]["netns"], "");
    assert_eq!(log[5]["input"]["prevResult"]["unknown"], 1);
    assert_eq!(log[5]["input"]["runtimeConfig"], runtime);
    assert!(f.cni().attachments().is_empty());
    assert!(matches!(f.cni().check(&pod).await, Err(Error::NotAttached { .. })));
}

#[tokio::test]
async fn del_is_idempotent_and_needs_no_configuration() {
    let f = Fixture::new(&[json!({"type": "one"})]);
    f.cni().del(&pod("never")).await.unwrap();
    let file = std::fs::read_dir(f.path("conf")).unwrap().next().unwrap().unwrap().path();
    std::fs::write(&file, "{broken").unwrap();
    assert!(matches!(f.cni().add(&pod("never")).await, Err(Error::BrokenConfig { .. })));
    f.cni().del(&pod("never")).await.unwrap();
    std::fs::remove_dir_all(f.path("conf")).unwrap();
    f.cni().del(&pod("never")).await.unwrap();
    assert!(matches!(f.cni().status().await, Err(Error::NoConfig { .. })));
    assert!(matches!(f.cni().add(&pod("a")).await, Err(Error::NoConfig { .. })));
}

#[tokio::test]
async fn a_failed_add_is_rolled_back() {
    let f = Fixture::new(&[json!({"type": "one"}), json!({"type": "two"}), json!({"type": "three"})]);
    f.behave("ADD", "two", r#"echo '{"cniVersion":"1.0.0","code":11,"msg":"busy","details":"try"}'; exit 1"#);
    let e = f.cni().add(&pod("a")).await.unwrap_err();
    assert!(matches!(&e, Error::Plugin { source, .. } if source.code == 11), "{e:?}");
    assert!(e.is_retryable());
    assert_eq!(orlop_base::telemetry::chain(&e), "CNI plugin two failed ADD: busy: try (code 11)");
    assert_eq!(f.calls(), ["ADD one", "ADD two", "DEL three", "DEL two", "DEL one"]);
    assert!(f.cni().attachments().is_empty());

    // What cannot be rolled back stays on record, and GC gets it later.
    f.behave("DEL", "one", "exit 3");
    f.cni().add(&pod("a")).await.unwrap_err();
    assert_eq!(f.cni().attachments().len(), 1);
    assert!(f.cni().gc(&[]).await.is_err());
    f.behave("DEL", "one", "");
    f.cni().gc(&[]).await.unwrap();
    assert!(f.cni().attachments().is_empty());

    // A configuration that fails both is corrected: DEL no longer needs it.
    f.behave("DEL", "two", "exit 3");
    f.cni().add(&pod("b")).await.unwrap_err();
    f.cni().del(&pod("b")).await.unwrap_err();
    f.configure(&json!({"cniVersion": "1.1.0", "name": "net", "plugins": [{"type": "one"}]}));
    f.cni().del(&pod("b")).await.unwrap();
    assert!(f.cni().attachments().is_empty());
}

#[tokio::test]
async fn broken_plugins_give_typed_errors() {
    let f = Fixture::new(&[json!({"type": "one"})]);
    let cni =
        Cni::with_limit(f.path("conf"), vec![f.path("bin")], f.path("cache"), Duration::from_millis(700));
    type Check = fn(&Error) -> bool;
    let cases: [(&str, Check); 9] = [
        (
            "echo garbage; echo why >&2; exit 4",
            |e| matches!(e, Error::Garbage { exit: 4, output, stderr, .. } if output == "garbage" && stderr.0 == "why"),
        ),
        ("exit 1", |e| matches!(e, Error::Garbage { exit: 1, .. })),
        ("echo '{\"a\":1}'; exit 1", |e| matches!(e, Error::Garbage { .. })),
        ("echo '{x'; exit 0", |e| matches!(e, Error::NotJson { .. })),
        ("exit 0", |e| matches!(e, Error::BadResult { .. })),
        ("echo '{\"cniVersion\":\"0.2.0\"}'; exit 0", |e| matches!(e, Error::BadResult { .. })),
        ("kill -9 $$", |e| matches!(e, Error::Killed { signal: 9, .. })),
        ("sleep 30", |e| matches!(e, Error::Timeout { .. })),
        ("yes garbage", |e| matches!(e, Error::TooMuchOutput { .. })),
    ];
    for (shell, expected) in cases {
        f.behave("ADD", "one", shell);
        let start = Instant::now();
        let e = cni.add(&pod("a")).await.unwrap_err();
        assert!(expected(&e), "{shell}: {e:?}");
        assert!(start.elapsed() < Duration::from_secs(25), "{shell}");
        assert!(!e.to_string().contains('\n'));
    }
    std::fs::remove_file(f.path("bin/one")).unwrap();
    assert!(matches!(cni.status().await, Err(Error::PluginNotFound { .. })));
    std::fs::write(f.path("bin/one"), "#!/no/such/shell\n").unwrap();
    assert!(matches!(cni.add(&pod("a")).await, Err(Error::Start { .. })));
}

/// The CRI's Status, which asks for it, is waited for by all that a node does.
#[tokio::test]
async fn a_hanging_status_is_not_waited_for_like_an_add() {
    let f = Fixture::new(&[json!({"type": "one"})]);
    f.behave("STATUS", "one", "sleep 100");
    match f.cni().status().await {
        Err(Error::Timeout { limit, .. }) => assert_eq!(limit, Duration::from_secs(10)),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn status_version_and_gc() {
    let f = Fixture::new(&[json!({"type": "one"})]);
    let cni = f.cni();
    cni.status().await.unwrap();
    assert_eq!(cni.plugin_versions("one").await.unwrap(), ["0.4.0", "1.0.0"]);
    f.behave("STATUS", "one", r#"echo '{"code":50,"msg":"starting"}'; exit 1"#);
    assert!(matches!(cni.status().await, Err(Error::Plugin { source, .. }) if source.code == 50));

    for id in ["a", "b"] {
        cni.add(&pod(id)).await.unwrap();
    }
    let valid = [Attachment { container_id: "b".into(), ifname: "eth0".into() }];
    cni.gc(&valid).await.unwrap();
    assert_eq!(cni.attachments().len(), 1);
    let last = f.log().pop().unwrap();
    assert_eq!(last["command"], "GC");
    assert_eq!(last["input"]["cni.dev/valid-attachments"], json!([{"containerID": "b", "ifname": "eth0"}]));

    // Versions and switches that have no such command.
    for (version, switch) in [("0.3.1", "x"), ("1.1.0", "disableCheck")] {
        f.configure(&json!({"cniVersion": version, "name": "net", switch: true, "disableGC": true, "plugins": [{"type": "one"}]}));
        f.behave("STATUS", "one", if version == "1.1.0" { "" } else { "exit 1" });
        cni.add(&pod("c")).await.unwrap();
        let before = f.calls().len();
        cni.check(&pod("c")).await.unwrap();
        cni.status().await.unwrap();
        cni.gc(&[Attachment { container_id: "b".into(), ifname: "eth0".into() }]).await.unwrap();
        assert!(!f.calls()[before..].iter().any(|c| c.starts_with("CHECK") || c.starts_with("GC")));
    }
}

#[tokio::test]
async fn collecting_spares_what_others_attached() {
    let f = Fixture::new(&[json!({"type": "one"})]);
    let neighbours = Neighbours { registry: Some(f.path("registry")), libcni: Some(f.path("libcni")) };
    let server = |cache: &str| {
        Cni::among(
            f.path("conf"),
            vec![f.path("bin")],
            f.path(cache),
            Duration::from_secs(5),
            neighbours.clone(),
            None,
        )
    };
    let (ours, theirs) = (server("ours"), server("theirs"));
    ours.add(&pod("a")).await.unwrap();
    ours.add(&pod("stale")).await.unwrap();
    theirs.add(&pod("b")).await.unwrap();
    let results = f.path("libcni/results");
    std::fs::create_dir_all(&results).unwrap();
    for (id, network) in [("c", "net"), ("d", "net-other")] {
        let result = json!({"kind": "cniCacheV1", "containerId": id, "ifName": "eth0", "networkName": network, "config": ""});
        std::fs::write(results.join(format!("{network}-{id}-eth0")), result.to_string()).unwrap();
    }
    let of = |id: &str| Attachment { container_id: id.into(), ifname: "eth0".into() };
    let valid = || {
        let last = f.log().pop().unwrap();
        assert_eq!(last["command"], "GC");
        let list = last["input"]["cni.dev/valid-attachments"].as_array().unwrap().clone();
        list.iter().map(|a| a["containerID"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    ours.gc(&[of("a")]).await.unwrap();
    assert_eq!(valid(), ["a", "b", "c"]);
    assert_eq!(theirs.attachments().len(), 1);
    assert_eq!(ours.attachments().len(), 1);
    // Who cannot be asked may have anything attached.
    std::fs::write(results.join("net-e-eth0"), "{").unwrap();
    let calls = f.calls().len();
    assert!(matches!(ours.gc(&[of("a")]).await, Err(Error::Neighbours { .. })));
    assert_eq!(f.calls().len(), calls);
    std::fs::remove_dir_all(results).unwrap();
    // One that has gone for good leaves nothing to keep.
    theirs.del(&pod("b")).await.unwrap();
    std::fs::remove_dir_all(f.path("theirs")).unwrap();
    ours.gc(&[of("a")]).await.unwrap();
    assert_eq!(valid(), ["a"]);
    // Nor one of another network that was deleted with its folder.
    std::fs::create_dir(f.path("registry/other")).unwrap();
    std::fs::write(f.path("registry/other/0"), f.path("deleted").to_str().unwrap()).unwrap();
    theirs.leave();
    ours.leave();
    assert!(!f.path("registry").exists(), "the last one takes the folder with it");
}

#[tokio::test]
async fn one_operation_for_a_container_at_a_time_but_pods_in_parallel() {
    let f = Fixture::new(&[json!({"type": "one"})]);
    let dir = f.dir.path().to_str().unwrap();
    // Ends only once three run at the same time.
    let together = "echo x >> DIR/begun; while [ $(wc -l < DIR/begun) -lt 3 ]; do sleep 0.01; done";
    f.behave("ADD", "one", &together.replace("DIR", dir));
    let cni = f.cni();
    let (pa, pb, pc) = (pod("a"), pod("b"), pod("c"));
    let (a, b, c) = tokio::join!(cni.add(&pa), cni.add(&pb), cni.add(&pc));
    assert!(a.is_ok() && b.is_ok() && c.is_ok(), "{a:?} {b:?} {c:?}");
    let alone = "mkdir DIR/busy || touch DIR/overlap; sleep 0.1; rmdir DIR/busy".replace("DIR", dir);
    for command in ["ADD", "DEL"] {
        f.behave(command, "one", &alone);
    }
    let (x, y) = tokio::join!(cni.add(&pa), cni.del(&pa));
    assert!(x.is_ok() && y.is_ok(), "{x:?} {y:?}");
    assert!(!f.path("overlap").exists(), "both ran at once");
    let order = f.calls().split_off(3);
    assert!(order == ["ADD one", "DEL one"] || order == ["DEL one", "ADD one"], "{order:?}");
}

fn with_builtin(f: &Fixture, call: fn(&Call) -> Answer) -> Cni {
    Cni::among(
        f.path("conf"),
        vec![f.path("bin")],
        f.path("cache"),
        Duration::from_secs(5),
        Neighbours::default(),
        Some(Builtin { name: "inside", call, program_dir: f.path("nowhere") }),
    )
}

#[tokio::test]
async fn a_builtin_plugin_may_panic() {
    let f = Fixture::new(&[]);
    f.configure(&json!({"cniVersion": "1.1.0", "name": "net", "plugins": [{"type": "inside"}]}));
    let cni = with_builtin(&f, |call| match call.command {
        Command::Add => panic!("a bug"),
        _ => Answer { result: Ok(None), notes: Vec::new() },
    });
    cni.status().await.unwrap();
    let e = cni.add(&pod("c")).await.unwrap_err();
    assert!(matches!(&e, Error::Panicked { command: Command::Add, .. }), "{e:?}");
    assert!(cni.attachments().is_empty(), "undone by DEL");
    cni.del(&pod("c")).await.unwrap();
}

#[tokio::test]
async fn a_builtin_plugin_is_waited_for() {
    use std::sync::atomic::{AtomicU32, Ordering};
    // What ADD and DEL have begun and ended.
    static BEGUN: AtomicU32 = AtomicU32::new(0);
    static ENDED: AtomicU32 = AtomicU32::new(0);
    let f = Fixture::new(&[]);
    f.configure(&json!({"cniVersion": "1.1.0", "name": "net", "plugins": [{"type": "inside"}]}));
    let cni = with_builtin(&f, |call| {
        match call.command {
            Command::Add => {
                BEGUN.fetch_add(1, Ordering::SeqCst);
                while BEGUN.load(Ordering::SeqCst) == 1 {
                    std::thread::sleep(Duration::from_millis(1));
                }
                ENDED.fetch_add(1, Ordering::SeqCst);
            }
            _ => assert_eq!(ENDED.load(Ordering::SeqCst), 1, "DEL during ADD"),
        }
        let result = json!({"cniVersion": "1.1.0", "ips": [{"address": "10.1.2.3/24"}]});
        Answer { result: Ok(Some(result)), notes: vec!["a note".into()] }
    });
    let pod = pod("c");
    // Dropped while its plugin is at work.
    let dropped = tokio::time::timeout(Duration::from_millis(1), cni.add(&pod)).await;
    while BEGUN.load(Ordering::SeqCst) == 0 {
        assert!(dropped.is_err());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let del = cni.del(&pod);
    let go = async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        BEGUN.fetch_add(1, Ordering::SeqCst);
    };
    tokio::join!(del, go).0.unwrap();
    assert_eq!(ENDED.load(Ordering::SeqCst), 1);
}
