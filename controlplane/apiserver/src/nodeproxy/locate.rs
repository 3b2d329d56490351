//! Where a proxied request goes: pure functions from objects to addresses and paths.

use serde_json::Value;

use crate::status::Status;

/// Kubelets that do not say otherwise listen here.
const KUBELET_PORT: u16 = 10250;

/// A place to connect to and what to ask for there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub host: String,
    pub port: u16,
    pub tls: Tls,
    pub path_and_query: String,
    /// For messages: "node n1" or "10.0.0.1:80".
    pub what: String,
}

/// How to secure the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tls {
    None,
    /// Our client certificate, the other side verified against the cluster CA.
    Kubelet,
    /// No verification: `https:` in the name of a pod or service proxy, as upstream.
    Unverified,
}

impl Target {
    /// The Host header.
    pub fn host_header(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

fn text<'a>(v: &'a Value, pointer: &str) -> &'a str {
    v.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn items<'a>(v: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    v.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

/// Splits `scheme:name:port`, where scheme and port may be left out.
pub fn split_name(id: &str) -> (&str, &str, &str) {
    match id.split(':').collect::<Vec<_>>().as_slice() {
        [name, port] => ("", name, port),
        [scheme, name, port] => (scheme, name, port),
        _ => ("", id, ""),
    }
}

/// What follows `/proxy` in a path, still encoded; begins with a slash.
pub fn path_after_proxy(path: &str) -> String {
    let segments: Vec<&str> = path.split('/').collect();
    // "", api, v1, [namespaces, NS,] RESOURCE, NAME, proxy, …
    let at = if segments.get(3) == Some(&"namespaces") { 8 } else { 6 };
    format!("/{}", segments.get(at..).map(|s| s.join("/")).unwrap_or_default())
}

/// A path up to and including `/proxy`.
pub fn path_of_proxy(path: &str) -> String {
    let rest = path_after_proxy(path);
    let below = if path.ends_with(&rest) { rest.as_str() } else { "" };
    path[..path.len() - below.len()].to_owned()
}

fn with_query(path: &str, query: &str) -> String {
    if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") }
}

/// The kubelet of a node.
pub fn kubelet(node: &Value, path: &str, query: &str) -> Result<Target, Status> {
    let name = text(node, "/metadata/name");
    let address = ["InternalIP", "ExternalIP", "Hostname"].iter().find_map(|kind| {
        items(node, "/status/addresses")
            .find(|a| text(a, "/type") == *kind)
            .map(|a| text(a, "/address"))
            .filter(|a| !a.is_empty())
    });
    let Some(host) = address else {
        return Err(Status::unavailable(format!(
            "no preferred addresses found for node {name}; it has not reported yet"
        )));
    };
    let port =
        node.pointer("/status/daemonEndpoints/kubeletEndpoint/Port").and_then(Value::as_u64).unwrap_or(0);
    let port = u16::try_from(port).ok().filter(|p| *p != 0).unwrap_or(KUBELET_PORT);
    Ok(Target {
        host: host.to_owned(),
        port,
        tls: Tls::Kubelet,
        path_and_query: with_query(path, query),
        what: format!("the kubelet of node {name} at {host}:{port}"),
    })
}

/// A pod or service endpoint.
pub fn plain(scheme: &str, ip: &str, port: u16, path: &str, query: &str) -> Target {
    Target {
        host: ip.to_owned(),
        port,
        tls: if scheme == "https" { Tls::Unverified } else { Tls::None },
        path_and_query: with_query(path, query),
        what: format!("{ip}:{port}"),
    }
}

/// Address and port for pods/proxy. Without a port the first container port counts, else 80.
pub fn pod_address(pod: &Value, port: &str) -> Result<(String, u16), Status> {
    let ip = text(pod, "/status/podIP");
    if ip.is_empty() {
        return Err(Status::bad_request("address not allowed: the pod has no IP yet"));
    }
    let mut ports = items(pod, "/spec/containers").flat_map(|c| items(c, "/ports"));
    let number = match port {
        "" => ports.next().and_then(|p| p["containerPort"].as_u64()).unwrap_or(80),
        _ => match port.parse::<u64>() {
            Ok(n) => n,
            Err(_) => ports
                .find(|p| text(p, "/name") == port)
                .and_then(|p| p["containerPort"].as_u64())
                .ok_or_else(|| Status::bad_request(format!("no port named {port:?} in the pod")))?,
        },
    };
    let number = u16::try_from(number).ok().filter(|n| *n != 0);
    Ok((ip.to_owned(), number.ok_or_else(|| Status::bad_request(format!("invalid port {port:?}")))?))
}

/// All ready endpoints of a service port. Never empty.
pub fn endpoints(service: &Value, slices: &[Value], port: &str) -> Result<Vec<(String, u16)>, Status> {
    let name = text(service, "/metadata/name");
    let ports: Vec<&Value> = items(service, "/spec/ports").collect();
    let chosen = match port {
        "" if ports.len() == 1 => Some(ports[0]),
        "" => ports.iter().find(|p| text(p, "/name").is_empty()).copied(),
        _ => ports
            .iter()
            .find(|p| text(p, "/name") == port || p["port"].as_u64().is_some_and(|n| n.to_string() == port))
            .copied(),
    };
    let Some(chosen) = chosen else {
        return Err(Status::unavailable(format!("no service port {port:?} found for service {name:?}")));
    };
    let port_name = text(chosen, "/name");
    let mut all = Vec::new();
    for slice in slices.iter().filter(|s| text(s, "/metadata/labels/kubernetes.io~1service-name") == name) {
        let number =
            items(slice, "/ports").find(|p| text(p, "/name") == port_name).and_then(|p| p["port"].as_u64());
        let Some(number) = number.and_then(|n| u16::try_from(n).ok()) else { continue };
        for endpoint in
            items(slice, "/endpoints").filter(|e| e.pointer("/conditions/ready") != Some(&Value::Bool(false)))
        {
            all.extend(
                items(endpoint, "/addresses").filter_map(|a| Some((a.as_str()?.to_owned(), number))).take(1),
            );
        }
    }
    if all.is_empty() {
        return Err(Status::unavailable(format!("no endpoints available for service {name:?}")));
    }
    Ok(all)
}

/// The kubelet's path and query for a pod's streaming subresource.
pub fn kubelet_request(pod: &Value, subresource: &str, query: &str) -> Result<(String, String), Status> {
    let (namespace, name) = (text(pod, "/metadata/namespace"), text(pod, "/metadata/name"));
    let params: Vec<(String, String)> = url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
    let one = |key: &str| params.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str()).unwrap_or_default();
    let mut out = url::form_urlencoded::Serializer::new(String::new());
    match subresource {
        "portforward" => {
            for (_, port) in params.iter().filter(|(k, _)| k == "ports") {
                out.append_pair("port", port);
            }
            Ok((format!("/portForward/{namespace}/{name}"), out.finish()))
        }
        "log" => {
            let container = choose_container(pod, one("container"))?;
            for key in ["follow", "previous", "timestamps"] {
                if truthy(one(key)) {
                    out.append_pair(key, "true");
                }
            }
            for key in ["sinceSeconds", "tailLines", "limitBytes"] {
                let value = one(key);
                if value.is_empty() {
                    continue;
                }
                if !value.parse::<i64>().is_ok_and(|n| n >= i64::from(key != "tailLines")) {
                    return Err(Status::failure(
                        422,
                        "Invalid",
                        format!("PodLogOptions {name:?} is invalid: {key}: Invalid value: {value:?}"),
                    ));
                }
                out.append_pair(key, value);
            }
            for key in ["sinceTime", "stream"] {
                if !one(key).is_empty() {
                    out.append_pair(key, one(key));
                }
            }
            if !one("sinceTime").is_empty() && !one("sinceSeconds").is_empty() {
                return Err(Status::failure(
                    422,
                    "Invalid",
                    "at most one of `sinceTime` or `sinceSeconds` may be specified",
                ));
            }
            Ok((format!("/containerLogs/{namespace}/{name}/{container}"), out.finish()))
        }
        _ => {
            let phase = text(pod, "/status/phase");
            if matches!(phase, "Succeeded" | "Failed") {
                let message =
                    format!("cannot exec into a container in a completed pod; current phase is {phase}");
                return Err(Status::bad_request(message));
            }
            let container = choose_container(pod, one("container"))?;
            let default_on = |key: &str| {
                if one(key).is_empty() {
                    subresource == "attach" && key == "stdout"
                } else {
                    truthy(one(key))
                }
            };
            for (from, to) in [("stdin", "input"), ("stdout", "output"), ("stderr", "error"), ("tty", "tty")]
            {
                if default_on(from) {
                    out.append_pair(to, "1");
                }
            }
            if subresource == "exec" {
                let commands: Vec<_> = params.iter().filter(|(k, _)| k == "command").collect();
                if commands.is_empty() {
                    return Err(Status::bad_request(
                        "you must specify at least one command for the container",
                    ));
                }
                for (_, command) in commands {
                    out.append_pair("command", command);
                }
            }
            Ok((format!("/{subresource}/{namespace}/{name}/{container}"), out.finish()))
        }
    }
}

fn truthy(value: &str) -> bool {
    matches!(value, "true" | "1" | "True" | "TRUE" | "t" | "T")
}

/// The container that a request means: the one named, the only one, or the one that the pod's default-container annotation names.
fn choose_container(pod: &Value, wanted: &str) -> Result<String, Status> {
    let name = text(pod, "/metadata/name");
    let names = |list: &str| -> Vec<&str> { items(pod, list).map(|c| text(c, "/name")).collect() };
    let (main, init, ephemeral) =
        (names("/spec/containers"), names("/spec/initContainers"), names("/spec/ephemeralContainers"));
    if !wanted.is_empty() {
        if main.iter().chain(&init).chain(&ephemeral).any(|n| *n == wanted) {
            return Ok(wanted.to_owned());
        }
        return Err(Status::bad_request(format!("container {wanted} is not valid for pod {name}")));
    }
    if let [only] = main.as_slice() {
        return Ok((*only).to_owned());
    }
    let default = text(pod, "/metadata/annotations/kubectl.kubernetes.io~1default-container");
    if main.contains(&default) {
        return Ok(default.to_owned());
    }
    let mut message =
        format!("a container name must be specified for pod {name}, choose one of: [{}]", main.join(" "));
    if !init.is_empty() {
        message.push_str(&format!(" or one of the init containers: [{}]", init.join(" ")));
    }
    Err(Status::bad_request(message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(containers: &[&str]) -> Value {
        let list: Vec<Value> = containers
            .iter()
            .map(|c| json!({"name": c, "ports": [{"name": "web", "containerPort": 8080}]}))
            .collect();
        json!({"metadata": {"name": "p", "namespace": "d"}, "spec": {"containers": list}, "status": {"podIP": "10.0.0.1"}})
    }

    #[test]
    fn kubelet_requests() {
        let ask = |p: &Value, sub: &str, q: &str| kubelet_request(p, sub, q).map_err(|e| e.message);
        let one = pod(&["c"]);
        assert_eq!(
            ask(&one, "log", "follow=true&tailLines=0").unwrap(),
            ("/containerLogs/d/p/c".into(), "follow=true&tailLines=0".into())
        );
        assert_eq!(
            ask(&one, "exec", "command=ls&command=-l+a&stdin=true&stdout=true&tty=false").unwrap(),
            ("/exec/d/p/c".into(), "input=1&output=1&command=ls&command=-l+a".into())
        );
        assert_eq!(ask(&one, "portforward", "ports=80&ports=81").unwrap().1, "port=80&port=81");
        assert!(ask(&one, "exec", "stdout=true").unwrap_err().contains("at least one command"));
        assert!(ask(&one, "log", "container=x").unwrap_err().contains("container x is not valid for pod p"));
        assert!(ask(&one, "log", "tailLines=-1").unwrap_err().contains("tailLines"));
        let mut two = pod(&["a", "b"]);
        assert!(ask(&two, "log", "").unwrap_err().contains("choose one of: [a b]"));
        two["metadata"]["annotations"] = json!({"kubectl.kubernetes.io/default-container": "b"});
        assert_eq!(ask(&two, "log", "").unwrap().0, "/containerLogs/d/p/b");
        two["status"]["phase"] = json!("Failed");
        assert!(ask(&two, "exec", "command=a").unwrap_err().contains("completed pod"));
    }

    #[test]
    fn addresses() {
        let node = json!({"metadata": {"name": "n"}, "status": {"addresses": [{"type": "Hostname", "address": "h"}, {"type": "InternalIP", "address": "1.2.3.4"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 10251}}}});
        let t = kubelet(&node, "/stats/summary", "a=b").unwrap();
        assert_eq!(
            (t.host.as_str(), t.port, t.path_and_query.as_str()),
            ("1.2.3.4", 10251, "/stats/summary?a=b")
        );
        assert_eq!(kubelet(&json!({"metadata": {"name": "n"}}), "/", "").unwrap_err().code, 503);
        assert_eq!(pod_address(&pod(&["c"]), "").unwrap().1, 8080);
        assert_eq!(pod_address(&pod(&["c"]), "web").unwrap().1, 8080);
        assert_eq!(pod_address(&pod(&["c"]), "9").unwrap().1, 9);
        assert!(pod_address(&pod(&["c"]), "no").is_err() && pod_address(&pod(&["c"]), "70000").is_err());
    }

    #[test]
    fn names_and_paths() {
        assert_eq!(split_name("a"), ("", "a", ""));
        assert_eq!(split_name("a:80"), ("", "a", "80"));
        assert_eq!(split_name("https:a:"), ("https", "a", ""));
        assert_eq!(path_after_proxy("/api/v1/nodes/n/proxy/stats/summary"), "/stats/summary");
        assert_eq!(path_after_proxy("/api/v1/namespaces/d/pods/p/proxy"), "/");
        assert_eq!(path_after_proxy("/api/v1/namespaces/d/pods/p/proxy/a%2Fb/"), "/a%2Fb/");
    }

    #[test]
    fn service_endpoints() {
        let service = json!({"metadata": {"name": "s"}, "spec": {"ports": [{"name": "http", "port": 80}]}});
        let slice = json!({"metadata": {"labels": {"kubernetes.io/service-name": "s"}}, "ports": [{"name": "http", "port": 8080}],
            "endpoints": [{"addresses": ["10.0.0.1"], "conditions": {"ready": true}}, {"addresses": ["10.0.0.2"], "conditions": {"ready": false}}]});
        assert_eq!(
            endpoints(&service, std::slice::from_ref(&slice), "80").unwrap(),
            [("10.0.0.1".to_owned(), 8080)]
        );
        assert_eq!(endpoints(&service, &[slice], "x").unwrap_err().code, 503);
        assert_eq!(endpoints(&service, &[], "http").unwrap_err().code, 503);
    }
}
