//! What people do with kubectl all day, against one cluster: each step names the command that failed.

use std::process::Stdio;
use std::time::Duration;

use orlop_test_vms::{Cluster, http_get, root, wait_for};

const SOON: Duration = Duration::from_secs(30);
const ROLLED: [&str; 4] = ["rollout", "status", "deployment/web", "--timeout=60s"];

/// The demo in the default namespace of this cluster.
fn demo(c: &Cluster) -> String {
    let text = std::fs::read_to_string(root().join("deploy/demo/demo.yaml")).unwrap();
    let text = text.replace("10.96.0.80", &c.service_ip(80)).replace("30080", "31042");
    text.replace("namespace: demo", "namespace: default")
}

/// The exit code and all output of kubectl.
fn outcome(c: &Cluster, args: &[&str]) -> (i32, String) {
    let out = c.kubectl_output(args);
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    (out.status.code().unwrap_or(-1), text)
}

#[test]
fn the_commands_of_every_day() {
    let c = Cluster::start(42);
    c.apply(&demo(&c));
    c.kubectl(&ROLLED);
    looking(&c);
    changing(&c);
    rolling(&c);
    deleting(&c);
    nodes(&c);
    rights(&c);
}

fn looking(c: &Cluster) {
    for (args, says) in [
        (&["get", "pods", "-o", "wide"][..], "node42"),
        (&["get", "pods", "-A", "--sort-by=.metadata.creationTimestamp"], "web-"),
        (&["get", "deployment", "web", "-o", "yaml"], "kind: Deployment"),
        (&["get", "pods", "-o", "custom-columns=N:.metadata.name,I:.spec.containers[*].image"], "demo-web"),
        (&["get", "events", "--field-selector=reason=Scheduled"], "Successfully assigned"),
        (&["describe", "pod", "-l", "app=web"], "Readiness:"),
        (&["describe", "deployment", "web"], "RollingUpdateStrategy:"),
        (&["describe", "service", "web"], "Endpoints:"),
        (&["describe", "configmap", "web"], "hello from the orlop"),
        (&["describe", "node", "node42"], "Non-terminated Pods:"),
        (&["describe", "namespace", "demo"], "Active"),
        (&["logs", "-l", "app=web", "--all-containers", "--prefix", "--timestamps", "--since=1h"], ""),
        (&["api-versions"], "apps/v1"),
        (&["cluster-info"], "control plane"),
        (&["wait", "--for=condition=Available", "deployment/web", "--timeout=10s"], "condition met"),
        (&["explain", "deployment.spec.strategy"], "The deployment strategy to use to replace"),
        (&["get", "--raw", "/api/v1/namespaces/default/services/web:http/proxy/"], "hello from the orlop"),
    ] {
        let said = c.kubectl(args);
        assert!(said.contains(says), "kubectl {args:?}: {said}");
    }
    // KEP-2008, through the API server, which has to be given the right. criu refuses some kernels; its reason is told then.
    c.kubectl(&["create", "clusterrole", "checkpoints", "--verb=create", "--resource=nodes/checkpoint"]);
    let user = "--user=kube-apiserver-kubelet-client";
    c.kubectl(&["create", "clusterrolebinding", "checkpoints", "--clusterrole=checkpoints", user]);
    let pod = c.kubectl(&["get", "pods", "-l", "app=web", "-o", "jsonpath={.items[0].metadata.name}"]);
    let path = format!("/api/v1/nodes/node42/proxy/checkpoint/default/{pod}/web?timeout=60");
    let (code, said) = outcome(c, &["create", "--raw", &path, "-f", "/dev/null"]);
    let check = std::process::Command::new("criu").arg("check").output();
    let check = check.unwrap_or_else(|e| panic!("criu: {e}; install it: scripts/deps.sh test"));
    if check.status.success() {
        assert!(code == 0 && said.contains("/checkpoints/checkpoint-web-"), "{said}");
    } else {
        let known = String::from_utf8_lossy(&check.stderr).into_owned();
        // Each as "Error (FILE:LINE): REASON".
        let mut reasons = known.lines().filter_map(|l| l.split_once("): ")).map(|(_, reason)| reason.trim());
        let told = said.contains("criu could not checkpoint container") && reasons.any(|r| said.contains(r));
        assert!(code == 1 && told, "{said}, not one of {known}");
    }
    let (code, said) = outcome(c, &["top", "node"]);
    assert!(code == 1 && said.contains("Metrics API not available"), "{said}");
}

fn changing(c: &Cluster) {
    let edit = c
        .kubectl_command()
        .args(["edit", "configmap", "web"])
        .env("EDITOR", "sed -i s/hello/servus/")
        .output();
    assert!(edit.unwrap().status.success(), "kubectl edit");
    assert!(c.kubectl(&["get", "configmap", "web", "-o", "yaml"]).contains("servus"));
    c.kubectl(&["label", "deployment", "web", "tier=front"]);
    c.kubectl(&["annotate", "deployment", "web", "note=x"]);
    assert!(c.kubectl(&["get", "deployment", "-l", "tier=front", "-o", "name"]).contains("web"));
    c.kubectl(&["label", "deployment", "web", "tier-"]);
    std::fs::write(c.path("demo.yaml"), demo(c)).unwrap();
    let file = c.path("demo.yaml").to_string_lossy().into_owned();
    let (code, said) = outcome(c, &["diff", "-f", &file]);
    assert!(code == 1 && said.contains("+  greeting: hello from the orlop"), "{said}");
    let dry = c.kubectl(&["apply", "--dry-run=server", "-f", &file]);
    assert!(dry.contains("configmap/web configured (server dry run)"), "{dry}");
    assert!(
        c.kubectl(&["get", "configmap", "web", "-o", "yaml"]).contains("servus"),
        "a dry run changes nothing"
    );
    c.kubectl(&["replace", "-f", &file]);
    let one = "{\"apiVersion\":\"v1\",\"kind\":\"ConfigMap\",\"metadata\":{\"name\":\"ssa\"},\"data\":{\"a\":\"1\"}}";
    std::fs::write(c.path("ssa.json"), one).unwrap();
    let ssa = c.path("ssa.json").to_string_lossy().into_owned();
    c.kubectl(&["apply", "--server-side", "-f", &ssa]);
    c.kubectl(&["patch", "configmap", "ssa", "-p", "{\"data\":{\"a\":\"2\"}}"]);
    let (code, said) = outcome(c, &["apply", "--server-side", "-f", &ssa]);
    assert!(code == 1 && said.contains("conflict with \"kubectl-patch\" using v1: .data.a"), "{said}");
    c.kubectl(&["apply", "--server-side", "--force-conflicts", "-f", &ssa]);
    c.kubectl(&["autoscale", "deployment", "web", "--min=1", "--max=3", "--cpu-percent=50"]);
    assert!(c.kubectl(&["get", "hpa"]).contains("Deployment/web"));
    c.kubectl(&["delete", "hpa", "web"]);
    c.kubectl(&["expose", "deployment", "web", "--name=again", "--port=81", "--target-port=8080"]);
    let ip = c.kubectl(&["get", "service", "again", "-o", "jsonpath={.spec.clusterIP}"]);
    wait_for("the exposed Service answers", SOON, || http_get(&format!("{ip}:81")));
}

fn rolling(c: &Cluster) {
    c.kubectl(&["set", "image", "deployment/web", "web=orlop.local/nothing:1"]);
    let (code, said) = outcome(c, &["rollout", "status", "deployment/web", "--timeout=1s"]);
    assert!(code == 1 && said.contains("timed out"), "{said}");
    c.kubectl(&["rollout", "undo", "deployment/web"]);
    c.kubectl(&ROLLED);
    c.kubectl(&["rollout", "pause", "deployment/web"]);
    c.kubectl(&["set", "env", "deployment/web", "A=b"]);
    let (code, _) = outcome(c, &["rollout", "status", "deployment/web", "--timeout=1s"]);
    assert_eq!(code, 1, "a paused rollout does not go on");
    c.kubectl(&["rollout", "resume", "deployment/web"]);
    c.kubectl(&["rollout", "restart", "deployment/web"]);
    c.kubectl(&ROLLED);
    let history = c.kubectl(&["rollout", "history", "deployment/web"]);
    assert!(history.lines().count() >= 4, "{history}");
    let (code, said) = outcome(c, &["scale", "deployment/web", "--replicas=0", "--current-replicas=7"]);
    assert!(code == 1 && said.contains("Expected replicas to be 7, was 2"), "{said}");
}

fn deleting(c: &Cluster) {
    let mut watch = c.kubectl_command();
    watch.args(["get", "pods", "-w", "-o", "name"]).stdout(Stdio::piped()).stdin(Stdio::null());
    let mut watch = watch.spawn().unwrap();
    c.kubectl(&["delete", "deployment", "web", "--cascade=orphan"]);
    assert!(c.kubectl(&["get", "replicasets,pods", "-o", "name"]).contains("pod/web-"), "orphans stay");
    c.apply(&demo(c));
    c.kubectl(&ROLLED);
    c.kubectl(&["delete", "deployment", "web", "--cascade=foreground", "--timeout=30s"]);
    assert_eq!(c.kubectl(&["get", "replicasets,pods", "-o", "name"]), "", "foreground waits for all");
    c.apply(&demo(c));
    c.kubectl(&ROLLED);
    c.kubectl(&["delete", "deployment", "web", "--cascade=background"]);
    wait_for("the garbage collector is done", SOON, || {
        c.kubectl(&["get", "replicasets,pods", "-o", "name"]).is_empty().then_some(())
    });
    watch.kill().unwrap();
    let seen = watch.wait_with_output().unwrap();
    assert!(String::from_utf8_lossy(&seen.stdout).lines().count() > 8, "the watch saw pods come and go");
    c.apply(&demo(c));
    c.kubectl(&ROLLED);
}

fn nodes(c: &Cluster) {
    c.kubectl(&["taint", "node", "node42", "k=v:PreferNoSchedule"]);
    c.kubectl(&["taint", "node", "node42", "k-"]);
    c.kubectl(&["drain", "node42", "--ignore-daemonsets", "--timeout=30s"]);
    let pods = c.kubectl(&["get", "pods", "-o", "jsonpath={.items[*].status.phase}"]);
    assert_eq!(pods, "Pending Pending", "nothing runs on a drained node");
    c.kubectl(&["uncordon", "node42"]);
    c.kubectl(&ROLLED);
}

fn rights(c: &Cluster) {
    c.kubectl(&["create", "role", "reader", "--verb=get,list", "--resource=pods"]);
    c.kubectl(&["create", "rolebinding", "reader", "--role=reader", "--serviceaccount=default:default"]);
    let user = "--as=system:serviceaccount:default:default";
    assert_eq!(c.kubectl(&["auth", "can-i", "list", "pods", user]), "yes\n");
    let (code, said) = outcome(c, &["auth", "can-i", "delete", "pods", user]);
    assert_eq!((code, said.as_str()), (1, "no\n"));
    let token = c.kubectl(&["create", "token", "default"]);
    let server = c.kubectl(&["config", "view", "-o", "jsonpath={.clusters[0].cluster.server}"]);
    let own =
        ["--kubeconfig=/dev/null", "--insecure-skip-tls-verify", "--server", &server, "--token", &token];
    assert!(c.kubectl(&[&own[..], &["get", "pods"]].concat()).contains("web-"));
    let (code, said) = outcome(c, &[&own[..], &["delete", "pods", "--all"]].concat());
    assert!(code == 1 && said.contains("\"system:serviceaccount:default:default\" cannot delete"), "{said}");
}
