//! One machine, one cluster: the demo, kubectl, kills, and nothing left behind. The steps share a cluster because each
//! needs what the one before it made; each says what it shows when it fails.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use orlop_test_vms::footprint::Footprint;
use orlop_test_vms::{Cluster, http_get, program, root, wait_for};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);

/// The demo's manifest with addresses of this cluster.
fn demo(c: &Cluster, node_port: u16) -> String {
    let text = std::fs::read_to_string(root().join("deploy/demo/demo.yaml")).unwrap();
    text.replace("10.96.0.80", &c.service_ip(80)).replace("30080", &node_port.to_string())
}

fn json(c: &Cluster, args: &[&str]) -> Value {
    let mut all = args.to_vec();
    all.extend(["-o", "json"]);
    serde_json::from_str(&c.kubectl(&all)).unwrap()
}

fn ready_pods(c: &Cluster) -> BTreeSet<String> {
    let list = json(c, &["-n", "demo", "get", "pods", "-l", "app=web"]);
    let pods = list["items"].as_array().unwrap();
    let ready = |p: &&Value| {
        let conditions = p["status"]["conditions"].as_array().cloned().unwrap_or_default();
        p["metadata"]["deletionTimestamp"].is_null()
            && conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True")
    };
    pods.iter().filter(ready).map(|p| p["metadata"]["name"].as_str().unwrap().to_owned()).collect()
}

/// The pods that answer at an address, seen over many connections.
fn who_answers(address: &str) -> BTreeSet<String> {
    let names = (0..60).filter_map(|_| http_get(address));
    names.filter_map(|b| b.split_whitespace().next().map(str::to_owned)).collect()
}

/// Host process ids of all containers of a pod, from the runtime.
fn container_pids(c: &Cluster) -> Vec<(String, u64)> {
    let list: Value = serde_json::from_str(&c.crictl(&["ps", "-o", "json"])).unwrap();
    let mut all: Vec<(String, u64)> = list["containers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|k| {
            let id = k["id"].as_str().unwrap().to_owned();
            let info: Value = serde_json::from_str(&c.crictl(&["inspect", &id])).unwrap();
            (id, info["info"]["pid"].as_u64().expect("crictl inspect shows the process id"))
        })
        .collect();
    all.sort();
    all
}

#[test]
fn a_cluster_on_one_machine() {
    let before = Footprint::take();
    let mut c = Cluster::prepare(1);
    c.import(&c.busybox("orlop.local/busybox:1", &["sh"]));
    c.add_args(&["--proxy-nodeport-address", "127.0.0.0/8"]);
    c.up();
    c.wait_ready();
    let node_port = 30181;
    let (service, port) = (format!("{}:80", c.service_ip(80)), format!("127.0.0.1:{node_port}"));

    the_demo_answers(&c, node_port, &service, &port);
    the_proxy_has_its_flags(&c);
    kubectl_shows_and_changes(&c);
    commands_and_streams(&c);
    names_resolve(&c);
    a_dead_process_is_restarted(&c, &service);
    a_deleted_pod_is_replaced(&c, &service);
    bad_manifests_are_explained(&c);
    kills_lose_nothing(&mut c, &service);
    a_second_up_is_refused(&c);

    c.take_down();
    let left = before.left_by(&Footprint::take());
    assert!(left.is_empty(), "orlop down left:\n{}", left.join("\n"));
}

fn the_demo_answers(c: &Cluster, node_port: u16, service: &str, port: &str) {
    c.apply(&demo(c, node_port));
    c.kubectl(&["-n", "demo", "rollout", "status", "deployment/web", "--timeout=60s"]);
    let pods = ready_pods(c);
    assert_eq!(pods.len(), 2, "two replicas are ready");
    wait_for("the Service reaches both replicas", SOON, || (who_answers(service) == pods).then_some(()));
    assert_eq!(who_answers(port), pods, "the node port reaches both replicas");
    let body = http_get(service).unwrap();
    assert!(
        body.contains("hello from the orlop") && body.contains("node1"),
        "ConfigMap and downward API: {body}"
    );
}

fn the_proxy_has_its_flags(c: &Cluster) {
    let dir = format!("/sys/fs/bpf{}", c.cgroup());
    let out = Command::new(program("orlop")).args(["proxy", "status", "--bpf-dir", &dir]).output();
    let status = String::from_utf8(out.unwrap().stdout).unwrap();
    let addresses = status.lines().find_map(|l| l.strip_prefix("node ports answer on"));
    assert_eq!(addresses.map(str::trim), Some("127.0.0.1"), "{status}");
}

fn kubectl_shows_and_changes(c: &Cluster) {
    let wide = c.kubectl(&["-n", "demo", "get", "pods", "-o", "wide"]);
    assert!(
        wide.starts_with("NAME") && wide.contains("READY") && wide.contains("1/1") && wide.contains("node1"),
        "{wide}"
    );
    assert!(c.kubectl(&["get", "nodes", "-o", "wide"]).contains("Ready"));
    assert!(c.kubectl(&["-n", "demo", "get", "deploy,rs,svc,endpointslices"]).contains("2/2"));
    assert!(c.kubectl(&["get", "pods", "-A", "--field-selector", "status.phase=Running"]).contains("web-"));
    assert!(c.kubectl_output(&["get", "pods", "-A", "-l", "app=none"]).stdout.is_empty());
    let described = c.kubectl(&["-n", "demo", "describe", "deployment", "web"]);
    assert!(described.contains("ScalingReplicaSet") && described.contains("2 desired"), "{described}");
    let pod = ready_pods(c).into_iter().next().unwrap();
    let described = c.kubectl(&["-n", "demo", "describe", "pod", &pod]);
    assert!(
        described.contains("Started") && described.contains("Scheduled"),
        "events are there: {described}"
    );
    assert!(c.kubectl(&["api-resources"]).contains("deployments"));
    let explained = c.kubectl(&["explain", "pod.spec.containers.livenessProbe"]);
    for words in [
        "FIELD: livenessProbe <Probe>",
        "Periodic probe of container liveness.",
        "How often (in seconds) to perform",
    ] {
        assert!(explained.contains(words) && !explained.contains("<no description>"), "{explained}");
    }
    c.kubectl(&["-n", "demo", "scale", "deployment/web", "--replicas=3"]);
    wait_for("three replicas", SOON, || (ready_pods(c).len() == 3).then_some(()));
    c.kubectl(&[
        "-n",
        "demo",
        "patch",
        "deployment",
        "web",
        "--type=json",
        "-p",
        r#"[{"op":"replace","path":"/spec/replicas","value":2}]"#,
    ]);
    wait_for("two replicas", SOON, || (ready_pods(c).len() == 2).then_some(()));
    c.kubectl(&[
        "-n",
        "demo",
        "patch",
        "deployment",
        "web",
        "-p",
        r#"{"spec":{"template":{"metadata":{"annotations":{"step":"two"}}}}}"#,
    ]);
    c.kubectl(&["-n", "demo", "rollout", "status", "deployment/web", "--timeout=60s"]);
    assert!(c.kubectl(&["-n", "demo", "rollout", "history", "deployment/web"]).contains('2'));
    wait_for("the old pods are gone", SOON, || {
        let list = json(c, &["-n", "demo", "get", "pods"]);
        (list["items"].as_array().unwrap().len() == 2).then_some(())
    });
    // A watch that sees what comes after it began.
    let mut watch = c.kubectl_command();
    let mut watch = watch
        .args(["-n", "demo", "get", "configmaps", "-w", "--no-headers"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    c.kubectl(&["-n", "demo", "create", "configmap", "seen", "--from-literal=a=b"]);
    let seen = lines.by_ref().map_while(Result::ok).any(|l| l.starts_with("seen "));
    watch.kill().unwrap();
    watch.wait().unwrap();
    assert!(seen, "the watch began with {first:?} and saw the new object");
}

const SHELL: &str = "
apiVersion: v1
kind: Pod
metadata: {name: shell, namespace: demo}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: sh
      image: orlop.local/busybox:1
      imagePullPolicy: Never
      command: [sh, -c, 'echo started; trap exit TERM; while :; do sleep 1 & wait; done']
    - name: counter
      image: orlop.local/busybox:1
      imagePullPolicy: Never
      command: [sh, -c, 'i=0; trap exit TERM; while :; do echo $i; i=$((i+1)); usleep 10000; done']
";

fn commands_and_streams(c: &Cluster) {
    c.apply(SHELL);
    c.kubectl(&["-n", "demo", "wait", "--for=condition=Ready", "pod/shell", "--timeout=60s"]);
    assert_eq!(c.kubectl(&["-n", "demo", "logs", "shell", "-c", "sh"]), "started\n");
    assert_eq!(c.kubectl(&["-n", "demo", "exec", "shell", "-c", "sh", "--", "echo", "hello"]), "hello\n");
    let failed = c.kubectl_output(&["-n", "demo", "exec", "shell", "-c", "sh", "--", "sh", "-c", "exit 7"]);
    assert_eq!(failed.status.code(), Some(7), "the command's exit code comes through");
    // stdin, half-closed.
    let mut cat = c.kubectl_command();
    let mut cat = cat
        .args(["-n", "demo", "exec", "-i", "shell", "-c", "sh", "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    cat.stdin.take().unwrap().write_all(b"through stdin").unwrap();
    let mut out = String::new();
    cat.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    assert!(cat.wait().unwrap().success());
    assert_eq!(out, "through stdin");
    // A terminal: script(1) gives kubectl one.
    let tty = Command::new("script")
        .args([
            "-qec",
            &format!(
                "kubectl --kubeconfig {} -n demo exec -it shell -c sh -- sh -c 'test -t 0 && echo is a tty'",
                c.kubeconfig().display()
            ),
            "/dev/null",
        ])
        .stdin(Stdio::null())
        .output()
        .expect("script(1) is there");
    assert!(String::from_utf8_lossy(&tty.stdout).contains("is a tty"), "{tty:?}");
    // Files in and out.
    let (there, back) = (c.path("there.txt"), c.path("back.txt"));
    std::fs::write(&there, "copied").unwrap();
    c.kubectl(&["-n", "demo", "cp", "-c", "sh", &there.to_string_lossy(), "shell:/tmp/file"]);
    c.kubectl(&["-n", "demo", "cp", "-c", "sh", "shell:/tmp/file", &back.to_string_lossy()]);
    assert_eq!(std::fs::read_to_string(&back).unwrap(), "copied");
    // Follow ends with the reader, not with the log.
    let mut follow = c.kubectl_command();
    let mut follow = follow
        .args(["-n", "demo", "logs", "-f", "shell", "-c", "counter", "--tail=1"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let numbers: Vec<u64> = BufReader::new(follow.stdout.take().unwrap())
        .lines()
        .take(50)
        .map(|l| l.unwrap().parse().unwrap())
        .collect();
    follow.kill().unwrap();
    follow.wait().unwrap();
    assert!(
        numbers.windows(2).all(|w| w[1] == w[0] + 1),
        "followed lines are in order without gaps: {numbers:?}"
    );
    // A forwarded port.
    let pod = ready_pods(c).into_iter().next().unwrap();
    let mut forward = c.kubectl_command();
    let mut forward = forward
        .args(["-n", "demo", "port-forward", &format!("pod/{pod}"), "18991:8080"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = String::new();
    // Kept open: kubectl ends when nobody reads what it says.
    let mut said = BufReader::new(forward.stdout.take().unwrap());
    said.read_line(&mut first).unwrap();
    let body = http_get("127.0.0.1:18991");
    forward.kill().unwrap();
    forward.wait().unwrap();
    assert!(body.is_some_and(|b| b.starts_with(&pod)), "{first}");
}

fn names_resolve(c: &Cluster) {
    let sh = |script: &str| c.kubectl(&["-n", "demo", "exec", "shell", "-c", "sh", "--", "sh", "-c", script]);
    let answer = sh("nslookup web.demo.svc.cluster.local");
    assert!(answer.contains(&c.service_ip(80)), "{answer}");
    let body = sh("wget -q -O - http://web/");
    assert!(body.contains("hello from the orlop"), "a pod reaches the Service by its short name: {body}");
    let all = sh("for i in $(seq 40); do wget -q -O - http://web/; done");
    let seen: BTreeSet<String> = all
        .lines()
        .filter_map(|l| l.split_whitespace().next())
        .filter(|w| w.starts_with("web-"))
        .map(str::to_owned)
        .collect();
    assert_eq!(seen, ready_pods(c), "a pod reaches both replicas: {all}");
    let token = sh("ls /var/run/secrets/kubernetes.io/serviceaccount");
    assert!(token.contains("token") && token.contains("ca.crt"), "{token}");
}

fn a_dead_process_is_restarted(c: &Cluster, service: &str) {
    let pod = ready_pods(c).into_iter().next().unwrap();
    let restarts = |c: &Cluster| {
        json(c, &["-n", "demo", "get", "pod", &pod])["status"]["containerStatuses"][0]["restartCount"]
            .as_u64()
            .unwrap()
    };
    let before = restarts(c);
    let list: Value = serde_json::from_str(&c.crictl(&[
        "ps",
        "-o",
        "json",
        "--label",
        &format!("io.kubernetes.pod.name={pod}"),
    ]))
    .unwrap();
    let id = list["containers"][0]["id"].as_str().unwrap().to_owned();
    let info: Value = serde_json::from_str(&c.crictl(&["inspect", &id])).unwrap();
    let pid = info["info"]["pid"].as_i64().unwrap() as i32;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    wait_for("the container runs again", SOON, || {
        (restarts(c) == before + 1 && ready_pods(c).contains(&pod)).then_some(())
    });
    assert!(c.kubectl(&["-n", "demo", "logs", &pod, "--previous"]).contains("serving on"));
    wait_for("it serves again", SOON, || who_answers(service).contains(&pod).then_some(()));
}

fn a_deleted_pod_is_replaced(c: &Cluster, service: &str) {
    let before = ready_pods(c);
    let victim = before.iter().next().unwrap();
    c.kubectl(&["-n", "demo", "delete", "pod", victim]);
    let after = wait_for("a new pod is ready", SOON, || {
        let now = ready_pods(c);
        (now.len() == 2 && !now.contains(victim)).then_some(now)
    });
    wait_for("the Service follows", SOON, || (who_answers(service) == after).then_some(()));
}

fn bad_manifests_are_explained(c: &Cluster) {
    let bad = c.path("bad.yaml");
    std::fs::write(
        &bad,
        "apiVersion: v1\nkind: Pod\nmetadata: {name: UPPER}\nspec: {containers: [{name: a, image: b}]}\n",
    )
    .unwrap();
    let said = c.kubectl_fails(&["apply", "-f", &bad.to_string_lossy()]);
    assert!(said.contains("metadata.name") && said.contains("UPPER"), "{said}");
    std::fs::write(
        &bad,
        "apiVersion: v1\nkind: Pod\nmetadata: {name: typo}\nspec: {containers: [{name: a, imagee: b}]}\n",
    )
    .unwrap();
    let said = c.kubectl_fails(&["apply", "-f", &bad.to_string_lossy()]);
    assert!(said.contains("imagee"), "{said}");
    // An image that nobody has: the pod says why it does not start.
    c.kubectl(&["-n", "demo", "run", "nowhere", "--image=127.0.0.1:1/none:1", "--restart=Never"]);
    let reason = wait_for("the reason shows", SOON, || {
        let pod = json(c, &["-n", "demo", "get", "pod", "nowhere"]);
        let r =
            pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"].as_str().map(str::to_owned);
        r.filter(|r| r == "RegistryUnavailable" || r == "ImagePullBackOff")
    });
    assert!(!reason.is_empty());
    c.kubectl(&["-n", "demo", "delete", "pod", "nowhere", "--grace-period=0", "--force"]);
}

/// The numbers that the counter has logged, as kubectl shows them.
fn counted(c: &Cluster) -> Vec<u64> {
    let text = c.kubectl(&["-n", "demo", "logs", "shell", "-c", "counter"]);
    text.lines().map(|l| l.parse().unwrap_or_else(|_| panic!("broken line {l:?}"))).collect()
}

fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    std::fs::File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
    bytes
}

fn kills_lose_nothing(c: &mut Cluster, service: &str) {
    let before = container_pids(c);
    let restarts = |c: &Cluster| {
        let list = json(c, &["-n", "demo", "get", "pods"]);
        let statuses = list["items"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|p| p["status"]["containerStatuses"].as_array().cloned().unwrap_or_default());
        statuses.map(|s| s["restartCount"].as_u64().unwrap()).sum::<u64>()
    };
    let restarts_before = restarts(c);
    // At any distance from the start of the daemon: while it serves, adopts, has just begun.
    for (round, moment) in random_bytes::<5>().into_iter().enumerate() {
        let delay = Duration::from_millis(u64::from(moment) * 6);
        eprintln!("round {round}: killed {delay:?} after its start");
        std::thread::sleep(delay);
        c.kill();
        for _ in 0..20 {
            assert!(http_get(service).is_some(), "the Service answers during outage {round}");
            std::thread::sleep(Duration::from_millis(20));
        }
        c.up();
    }
    c.wait_ready();
    wait_for("both replicas are ready as before", SOON, || (ready_pods(c).len() == 2).then_some(()));
    assert_eq!(container_pids(c), before, "no container was restarted");
    assert_eq!(restarts(c), restarts_before);
    let numbers = counted(c);
    assert!(numbers.windows(2).all(|w| w[1] == w[0] + 1), "a line of the counter was lost or repeated");
    c.kubectl(&[
        "-n",
        "demo",
        "run",
        "after",
        "--image=orlop.local/busybox:1",
        "--image-pull-policy=Never",
        "--restart=Never",
        "--",
        "true",
    ]);
    wait_for("new pods run", SOON, || {
        (json(c, &["-n", "demo", "get", "pod", "after"])["status"]["phase"] == "Succeeded").then_some(())
    });
}

fn a_second_up_is_refused(c: &Cluster) {
    for detach in [&[][..], &["--detach"]] {
        let out = c.command("up").args(detach).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && said.contains("runs already"), "{detach:?}: {said}");
    }
}
