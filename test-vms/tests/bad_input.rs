//! What a running cluster is given that it cannot use: each thing is said where a user looks for it, the rest goes on, and
//! nothing half-made stays. One cluster serves all steps.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use orlop_base::testkit::free_port;
use orlop_test_vms::{Cluster, wait_for};

const SOON: Duration = Duration::from_secs(30);

fn pod(name: &str, image: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  terminationGracePeriodSeconds: 0\n  \
         tolerations: [{{operator: Exists}}]\n  containers: [{{name: c, image: '{image}'}}]\n"
    )
}

const DEMO: &str = "orlop.local/demo-web:latest";

/// The message of the first event about an object with this reason that says `text`.
fn event(c: &Cluster, object: &str, reason: &str, text: &str) -> String {
    let select = format!("--field-selector=involvedObject.name={object},reason={reason}");
    let path = "jsonpath={range .items[*]}{.message}{\"\\n\"}{end}";
    wait_for(&format!("a {reason} event of {object} that says {text:?}"), SOON, || {
        let messages = c.kubectl(&["get", "events", &select, "-o", path]);
        messages.lines().find(|m| m.contains(text)).map(str::to_owned)
    })
}

fn running(c: &Cluster, name: &str) {
    wait_for(&format!("pod {name} runs"), SOON, || {
        let out = c.kubectl_output(&["get", "pod", name, "-o", "jsonpath={.status.phase}"]);
        (out.stdout == b"Running").then_some(())
    });
}

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn what_cannot_be_used_is_explained_and_leaves_nothing() {
    let mut c = Cluster::prepare(40);
    let kubelet = c.path("kubelet.yaml");
    let text = std::fs::read_to_string(&kubelet).unwrap();
    std::fs::write(&kubelet, format!("{text}maxPodz: 3\n")).unwrap();
    let manifests = c.path("manifests");
    std::fs::create_dir_all(&manifests).unwrap();
    std::fs::write(manifests.join("broken.yaml"), "kind: Pod\nmetadata: {name: x\n").unwrap();
    std::fs::write(
        manifests.join("good.yaml"),
        pod("static", DEMO).replace("'}]", "', imagePullPolicy: Never}]"),
    )
    .unwrap();
    c.up();
    c.wait_ready();

    static_pods(&c);
    misspelt_configuration(&c);
    network_configuration(&c);
    unreachable_registry(&c);
    damaged_image(&c);
    malformed_objects(&c);
}

fn static_pods(c: &Cluster) {
    running(c, "static-node40");
    let log = std::fs::read_to_string(c.log()).unwrap();
    let line = log.lines().find(|l| l.contains("broken.yaml")).expect("a line about the broken manifest");
    assert!(
        line.contains("static pod manifest is not usable") && line.contains("unclosed bracket"),
        "{line}"
    );
}

fn misspelt_configuration(c: &Cluster) {
    let log = std::fs::read_to_string(c.log()).unwrap();
    let line = log.lines().find(|l| l.contains("maxPodz")).expect("a line about the misspelt field");
    assert!(line.contains("have no effect"), "{line}");
}

fn network_configuration(c: &Cluster) {
    let file = c.path("cni/10-orlop.conflist");
    let good = std::fs::read_to_string(&file).unwrap();
    let sandboxes = c.path("run/cri/s");
    let before = names(&sandboxes);
    std::fs::write(&file, "{\"name\": \"x\", plugins").unwrap();
    c.apply(&pod("netless", DEMO).replace("'}]", "', imagePullPolicy: Never}]"));
    let message = event(c, "netless", "FailedCreatePodSandBox", "10-orlop.conflist");
    assert_eq!(message.matches("is broken").count(), 1, "said once: {message}");
    let ready = "jsonpath={.items[0].status.conditions[?(@.type==\"Ready\")]}";
    wait_for("the node says why it is not ready", SOON, || {
        let state = c.kubectl(&["get", "nodes", "-o", ready]);
        (state.contains("\"False\"")
            && state.contains("NetworkPluginNotReady")
            && state.contains("10-orlop.conflist"))
        .then_some(())
    });
    assert_eq!(names(&sandboxes), before, "failed sandboxes left something behind");
    std::fs::write(&file, good).unwrap();
    wait_for("the node is ready again", SOON, || {
        c.kubectl(&["get", "nodes", "-o", ready]).contains("\"True\"").then_some(())
    });
    running(c, "netless");
    c.kubectl(&["delete", "pod", "netless", "--wait=true"]);
}

fn waiting(c: &Cluster, name: &str) -> String {
    let path = "jsonpath={.status.containerStatuses[0].state.waiting}";
    wait_for(&format!("pod {name} waits for its image"), SOON, || {
        let state = c.kubectl(&["get", "pod", name, "-o", path]);
        let reasons = ["ErrImagePull", "RegistryUnavailable", "ImagePullBackOff"];
        reasons.iter().any(|r| state.contains(r)).then_some(state)
    })
}

fn unreachable_registry(c: &Cluster) {
    let port = free_port();
    c.apply(&pod("unreachable", &format!("127.0.0.1:{port}/x:1")));
    let says = format!("cannot reach registry 127.0.0.1:{port}");
    let message = event(c, "unreachable", "Failed", &says);
    assert!(message.starts_with("Failed to pull image ") && message.contains("refused"), "{message}");
    assert!(waiting(c, "unreachable").contains(&says));
    c.kubectl(&["delete", "pod", "unreachable"]);
}

/// sha256 of "good", which the registry below promises, and of "evil", which it sends.
const GOOD: &str = "sha256:770e607624d689265ca6c44884d0807d9b054d23c473c106c72be9de08b7376c";
const EVIL: &str = "sha256:b5c1fb2efc6d6b4674c2fdcc48ce01b43a3b7c03763c0c3355de0099ee0f8c73";

/// One connection to a registry whose blobs are not what its manifest says.
fn serve(stream: TcpStream) {
    let manifest = format!(
        "{{\"schemaVersion\":2,\"mediaType\":\"application/vnd.oci.image.manifest.v1+json\",\
         \"config\":{{\"mediaType\":\"application/vnd.oci.image.config.v1+json\",\"digest\":\"{GOOD}\",\"size\":4}},\"layers\":[]}}"
    );
    let Ok(mut out) = stream.try_clone() else { return };
    let mut path = String::new();
    for line in BufReader::new(stream).lines().map_while(Result::ok) {
        if let Some(p) = line.strip_prefix("GET ").or_else(|| line.strip_prefix("HEAD ")) {
            path = p.split(' ').next().unwrap_or_default().to_owned();
        }
        if !line.is_empty() {
            continue;
        }
        let (kind, body) = match &path {
            p if p.contains("/manifests/") => {
                ("application/vnd.oci.image.manifest.v1+json", manifest.as_str())
            }
            p if p.contains("/blobs/") => ("application/octet-stream", "evil"),
            _ => ("application/json", "{}"),
        };
        let head =
            format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n", body.len());
        if out.write_all(head.as_bytes()).and_then(|()| out.write_all(body.as_bytes())).is_err() {
            return;
        }
    }
}

fn damaged_image(c: &Cluster) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        listener.incoming().flatten().for_each(|s| drop(std::thread::spawn(|| serve(s))))
    });
    let content = c.path("data/images/content");
    let before = names(&content);
    c.apply(&pod("damaged", &format!("127.0.0.1:{port}/x:1")));
    let message = event(c, "damaged", "Failed", "digest");
    assert!(message.contains(GOOD) && message.contains(EVIL), "both digests are named: {message}");
    assert!(waiting(c, "damaged").contains(EVIL));
    c.kubectl(&["delete", "pod", "damaged"]);
    assert!(!c.crictl(&["images"]).contains(&format!("127.0.0.1:{port}")));
    assert_eq!(names(&content), before, "something of the damaged image stayed");
}

fn malformed_objects(c: &Cluster) {
    let file = c.path("malformed");
    let path = file.to_string_lossy().into_owned();
    let refused = |text: &str, args: &[&str]| {
        std::fs::write(&file, text).unwrap();
        c.kubectl_fails(args)
    };
    let apply = ["apply", "-f", &path];
    let said = refused(&pod("a", DEMO).replace("image:", "imagee:"), &apply);
    assert!(said.contains("unknown field \"spec.containers[0].imagee\""), "{said}");
    let said = refused(&pod("a", DEMO).replace("GracePeriodSeconds: 0", "GracePeriodSeconds: soon"), &apply);
    assert!(said.contains("spec.terminationGracePeriodSeconds"), "{said}");
    let said = refused(&pod("A_b", DEMO).replace("name: c,", "name: 'c d',"), &apply);
    assert!(
        said.contains("metadata.name: Invalid value") && said.contains("spec.containers[0].name"),
        "{said}"
    );
    let twice = pod("a", DEMO).replace("kind: Pod\n", "kind: Pod\nkind: Pod\n");
    let said = refused(&twice, &["create", "--raw", "/api/v1/namespaces/default/pods", "-f", &path]);
    assert!(said.contains("Error from server") || said.contains("error"), "{said}");
    let said =
        refused("{\"kind\": \"Pod\",", &["create", "--raw", "/api/v1/namespaces/default/pods", "-f", &path]);
    assert!(said.contains("BadRequest"), "{said}");
    assert_eq!(c.kubectl(&["get", "pods", "-o", "name"]), "pod/static-node40\n");
}
