//! Pods with `hostUsers: false` (KEP-127): root inside is nobody outside, and volumes' files belong to whom they should on both
//! sides.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use orlop_test_vms::{Cluster, wait_for};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const IMAGE: &str = "orlop.local/busybox:1";

fn pod(name: &str, more: Value) -> String {
    let container = |name: &str, script: &str, user: i64| {
        json!({
            "name": name, "image": IMAGE, "imagePullPolicy": "Never", "command": ["sh", "-c", script],
            "securityContext": {"runAsUser": user},
            "volumeMounts": [
                {"name": "scratch", "mountPath": "/scratch"}, {"name": "memory", "mountPath": "/memory"},
                {"name": "settings", "mountPath": "/settings"}, {"name": "secret", "mountPath": "/secret"},
            ],
        })
    };
    let mut p = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {
            "hostUsers": false, "terminationGracePeriodSeconds": 1, "securityContext": {"fsGroup": 2000},
            "volumes": [
                {"name": "scratch", "emptyDir": {}}, {"name": "memory", "emptyDir": {"medium": "Memory"}},
                {"name": "settings", "configMap": {"name": "settings"}},
                {"name": "secret", "secret": {"secretName": "secret", "defaultMode": 0o400}},
            ],
            "containers": [
                container("root", "echo begun; trap exit TERM; while [ ! -e /scratch/end ]; do sleep 0.1; done; rm /scratch/end", 0),
                container("user", "trap exit TERM; while :; do sleep 0.1; done", 1000),
            ],
        },
    });
    for (field, value) in more.as_object().into_iter().flatten() {
        p["spec"][field] = value.clone();
    }
    p.to_string()
}

fn in_container(c: &Cluster, pod: &str, container: &str, script: &str) -> String {
    c.kubectl(&["exec", pod, "-c", container, "--", "sh", "-c", script]).trim().to_owned()
}

/// First id outside, and how many, of users inside.
fn range(c: &Cluster, pod: &str, container: &str) -> (u32, u32) {
    let map = in_container(c, pod, container, "cat /proc/self/uid_map");
    assert_eq!(in_container(c, pod, container, "cat /proc/self/gid_map"), map);
    let numbers: Vec<u32> = map.split_whitespace().map(|n| n.parse().expect("numbers")).collect();
    assert_eq!((numbers.len(), numbers[0]), (3, 0), "one range that begins with root: {map}");
    (numbers[1], numbers[2])
}

fn events(c: &Cluster, pod: &str) -> String {
    c.kubectl(&[
        "get",
        "events",
        "--field-selector",
        &format!("involvedObject.name={pod}"),
        "-o",
        "jsonpath={.items[*].message}",
    ])
}

#[test]
fn root_of_a_pod_is_nobody_outside() {
    let mut c = Cluster::prepare(47);
    c.import(&c.busybox(IMAGE, &["sh"]));
    c.add_args(&["--runtime-handler", "other=/usr/sbin/runc"]);
    c.up();
    c.wait_ready();
    let features = "jsonpath={.items[0].status.runtimeHandlers[?(@.name==\"\")].features.userNamespaces}";
    assert_eq!(c.kubectl(&["get", "nodes", "-o", features]), "true");
    c.kubectl(&["create", "configmap", "settings", "--from-literal=greeting=hello"]);
    c.kubectl(&["create", "secret", "generic", "secret", "--from-literal=word=sesame"]);
    c.apply(&pod("one", json!({})));
    c.apply(&pod("two", json!({})));
    c.kubectl(&["wait", "--for=condition=Ready", "pod/one", "pod/two", "--timeout=60s"]);

    let (first, length) = range(&c, "one", "root");
    assert!(first >= 65536 && first.is_multiple_of(65536) && length == 65536, "{length} from {first}");
    assert_eq!(range(&c, "one", "user"), (first, length), "one range for all containers of a pod");
    assert_ne!(range(&c, "two", "root").0, first, "another pod has other ids");
    assert_eq!(c.kubectl(&["logs", "one", "-c", "root"]), "begun\n");
    owners(&c, first);
    kept(&mut c, (first, length));
    refused(&c);

    let uid = c.kubectl(&["get", "pod", "one", "-o", "jsonpath={.metadata.uid}"]);
    c.kubectl(&["delete", "pod", "one", "two", "--timeout=60s"]);
    let dir = c.path("kubelet/pods").join(uid);
    wait_for("the pod's folder is gone", SOON, || (!dir.exists()).then_some(()));
    c.take_down();
}

/// Whom files belong to, inside and outside.
fn owners(c: &Cluster, first: u32) {
    let inside =
        |container: &str, path: &str| in_container(c, "one", container, &format!("stat -c %u:%g {path}"));
    for volume in ["scratch", "memory"] {
        in_container(c, "one", "root", &format!("touch /{volume}/root"));
        in_container(c, "one", "user", &format!("touch /{volume}/user"));
        assert_eq!(inside("user", &format!("/{volume}/root")), "0:2000");
        assert_eq!(inside("root", &format!("/{volume}/user")), "1000:2000");
    }
    assert_eq!(in_container(c, "one", "user", "cat /settings/greeting /secret/word"), "hellosesame");
    assert_eq!(inside("root", "/settings/..data/greeting"), "0:2000");
    assert_eq!(inside("root", "/secret/..data/word"), "0:2000");
    assert_eq!(inside("root", "/bin/busybox"), "0:0", "the image's files are root's");
    assert_eq!(inside("root", "/etc/hosts"), "0:0");
    assert_eq!(in_container(c, "one", "root", "echo x > /tmp/own && cat /tmp/own"), "x");

    // Outside the volume's files have the ids that they have inside, the processes have not.
    let uid = c.kubectl(&["get", "pod", "one", "-o", "jsonpath={.metadata.uid}"]);
    let volume = c.path("kubelet/pods").join(uid).join("volumes/kubernetes.io~empty-dir/scratch");
    for (file, owner) in [("root", 0), ("user", 1000)] {
        let meta = fs::metadata(volume.join(file)).expect("the container's file");
        assert_eq!((meta.uid(), meta.gid()), (owner, 2000), "{file}");
    }
    for (container, user) in [("root", first), ("user", first + 1000)] {
        let list: Value = serde_json::from_str(&c.crictl(&[
            "ps",
            "--name",
            container,
            "--label",
            "io.kubernetes.pod.name=one",
            "-o",
            "json",
        ]))
        .unwrap();
        let id = list["containers"][0]["id"].as_str().expect("a container").to_owned();
        let info: Value = serde_json::from_str(&c.crictl(&["inspect", &id])).unwrap();
        let status = fs::read_to_string(format!("/proc/{}/status", info["info"]["pid"])).unwrap();
        let ids = status.lines().find(|l| l.starts_with("Uid:")).unwrap_or_default();
        assert!(
            ids.split_whitespace().skip(1).all(|id| id == user.to_string()),
            "{container}: {ids}, not {user}"
        );
    }
}

/// The range outlives the daemon, and a container's restart.
fn kept(c: &mut Cluster, range_before: (u32, u32)) {
    c.kill();
    c.up();
    // The node's status is still that of before.
    wait_for("the container is told to end", SOON, || {
        c.kubectl_output(&["exec", "one", "-c", "root", "--", "touch", "/scratch/end"])
            .status
            .success()
            .then_some(())
    });
    wait_for("the container runs again", SOON, || {
        let of = |field: &str| format!("{{.status.containerStatuses[?(@.name==\"root\")].{field}}}");
        let path = format!("jsonpath={}:{}", of("restartCount"), of("ready"));
        let said = c.kubectl(&["get", "pod", "one", "-o", &path]);
        (said.ends_with(":true") && !said.starts_with("0:")).then_some(())
    });
    assert_eq!(range(c, "one", "root"), range_before);
    assert_eq!(in_container(c, "one", "root", "stat -c %u:%g /scratch/user"), "1000:2000");
}

/// What cannot be had is said.
fn refused(c: &Cluster) {
    let file = c.path("bad.json");
    let apply = |text: String| {
        fs::write(&file, text).unwrap();
        c.kubectl_fails(&["apply", "-f", &file.to_string_lossy()])
    };
    let said = apply(pod("bad", json!({"hostPID": true})));
    assert!(said.contains("spec.hostPID: Forbidden: when `hostUsers` is false"), "{said}");

    let class = json!({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "other"}, "handler": "other"});
    c.apply(&class.to_string());
    c.apply(&pod("other", json!({"runtimeClassName": "other"})));
    let why =
        "can't set `spec.hostUsers: false`, RuntimeClass handler \"other\" does not support user namespaces";
    wait_for("the pod's event says why", SOON, || events(c, "other").contains(why).then_some(()));
    c.kubectl(&["delete", "pod", "other", "--grace-period=0", "--force"]);
}
