//! The proxy on a cluster whose control plane is not ours to change: a user with the system:node-proxier role is enough, and
//! a right that is missing is said once.

use std::path::PathBuf;
use std::time::Duration;

use orlop_test_vms::place::Place;
use orlop_test_vms::{program, run, wait_for};

const PATIENCE: Duration = Duration::from_secs(60);

fn start_server(place: &mut Place) {
    let mut server = place.inside(program("orlop"));
    server.args(["server", "--listen", "127.0.0.1:6443", "--advertise-address", "127.0.0.1"]);
    for (flag, name) in
        [("--data-dir", "data"), ("--write-kubeconfig", "admin"), ("--manifests", "manifests")]
    {
        server.arg(flag).arg(place.path(name));
    }
    place.start("server", server);
    wait_for("the API server answers", PATIENCE, || {
        let mut c = place.kubectl(&["get", "clusterrole", "system:node-proxier"]);
        c.output().ok()?.status.success().then_some(())
    });
}

/// A kubeconfig of a new service account.
fn user(place: &Place, name: &str) -> PathBuf {
    run(&mut place.kubectl(&["create", "serviceaccount", name]));
    let token = run(&mut place.kubectl(&["create", "token", name]));
    let config = run(&mut place.kubectl(&["config", "view", "--raw", "--output", "json"]));
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["users"][0]["user"] = serde_json::json!({"token": token.trim()});
    let path = place.path(name);
    std::fs::write(&path, config.to_string()).unwrap();
    path
}

fn bind(place: &Place, role: &str, user: &str) {
    let [name, role, user] = [
        format!("{user}-{role}"),
        format!("--clusterrole={role}"),
        format!("--serviceaccount=default:{user}"),
    ];
    run(&mut place.kubectl(&["create", "clusterrolebinding", &name, &role, &user]));
}

const OBJECTS: &str = r#"
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {topology.kubernetes.io/zone: here}}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: "", port: 8080}]
endpoints:
- {addresses: [10.9.9.1], zone: here, hints: {forZones: [{name: here}]}}
- {addresses: [10.9.9.2], zone: there, hints: {forZones: [{name: there}]}}
"#;

#[test]
fn the_role_of_kube_proxy_is_enough_and_a_missing_right_is_said_once() {
    let mut place = Place::new();
    start_server(&mut place);
    place.apply(OBJECTS);

    let some = ["create", "clusterrole", "some", "--verb=list,watch", "--resource=services,nodes"];
    run(&mut place.kubectl(&some));
    let user = user(&place, "px");
    bind(&place, "some", "px");
    place.start_proxy(&user);
    wait_for("the proxy says what it lacks", PATIENCE, || {
        let said = place.said("proxy");
        (said.contains("refuses the proxy's user") && said.contains("servicecidrs")).then_some(())
    });

    // Given what it lacks, it goes on by itself.
    run(&mut place.kubectl(&["delete", "clusterrolebinding", "px-some"]));
    bind(&place, "system:node-proxier", "px");
    place.wait_healthy();
    let said = place.said("proxy");
    let (ranges, lines): (Vec<&str>, Vec<&str>) =
        said.lines().filter(|l| l.contains("forbidden")).partition(|l| l.contains("servicecidrs"));
    assert!(ranges.len() == 1 && ranges[0].contains("WARN"), "it goes on without the Service range:\n{said}");
    assert_eq!(lines.len(), 1, "{said}");
    assert!(
        lines[0].contains("endpointslices")
            && lines[0].contains("refuses the proxy's user")
            && lines[0].contains("system:node-proxier"),
        "{said}"
    );

    // Services, endpoints and the node have been read.
    let shown = place.ask_proxy(&["backends"]);
    assert!(shown.contains("10.9.9.1") && !shown.contains("10.9.9.2"), "the node's zone decides:\n{shown}");
}
