//! The server as its clients see it: kubectl, tokens, refusals, health.

use std::time::Duration;

use crate::support::{Cluster, err, ok, out};
use orlop_apiserver::Error;
use orlop_base::supervise::Ready;
use orlop_base::testkit::wait_until;
use tokio_util::sync::CancellationToken;

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_as_administrator() {
    let c = Cluster::start().await;
    let namespaces = ok(c.kubectl(&["get", "ns", "-o", "name"]).await);
    for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
        assert!(namespaces.contains(&format!("namespace/{name}")), "{namespaces}");
    }
    assert!(ok(c.kubectl(&["version"]).await).contains("+orlop"));
    assert_eq!(
        ok(c.kubectl(&["get", "svc", "kubernetes", "-o", "jsonpath={.spec.clusterIP}"]).await),
        "10.96.0.1"
    );
    let port = c.config.listen.port().to_string();
    let slice =
        ok(c.kubectl(&["get", "endpointslice", "kubernetes", "-o", "jsonpath={.ports[0].port}"]).await);
    assert_eq!(slice, port);
    assert!(
        ok(c.kubectl(&["describe", "clusterrole", "system:aggregate-to-view"]).await).contains("pods/log")
    );
    assert_eq!(ok(c.kubectl(&["auth", "can-i", "create", "nodes"]).await), "yes");
    assert!(ok(c.kubectl(&["auth", "whoami"]).await).contains("system:masters"));
    assert_eq!(ok(c.kubectl(&["get", "--raw", "/readyz"]).await), "ok");
    assert!(ok(c.kubectl(&["get", "--raw", "/livez?verbose"]).await).contains("[+]ping ok"));
    assert!(ok(c.kubectl(&["get", "--raw", "/metrics"]).await).contains("apiserver_request_total"));
    assert!(ok(c.kubectl(&["get", "--raw", "/openid/v1/jwks"]).await).contains("ES256"));
    let denied = c.kubectl(&["delete", "ns", "kube-system"]).await;
    assert!(err(&denied).contains("this namespace may not be deleted"), "{}", err(&denied));
    let map = r#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"a"}}"#;
    let missing = c.kubectl_with(&["create", "--validate=false", "-n", "nowhere", "-f", "-"], map).await;
    assert!(err(&missing).contains("namespaces \"nowhere\" not found"), "{}", err(&missing));
    c.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_and_rbac() {
    let c = Cluster::start().await;
    c.create("v1", "ServiceAccount", "bot", "").await;
    let token = ok(c.kubectl(&["create", "token", "bot"]).await);
    let who = ok(c.kubectl_token(&token, &["auth", "whoami"]).await);
    assert!(
        who.contains("system:serviceaccount:default:bot") && who.contains("system:serviceaccounts:default"),
        "{who}"
    );
    let denied = c.kubectl_token(&token, &["get", "pods"]).await;
    let text = err(&denied);
    let want = "pods is forbidden: User \"system:serviceaccount:default:bot\" cannot list resource \"pods\" in API group \"\" in the namespace \"default\"";
    assert!(text.contains(want), "{text}");

    c.bind("bot", "ClusterRole", "view", "User", "system:serviceaccount:default:bot").await;
    wait_until("the binding counts", Duration::from_secs(30), async || {
        let listed = c.kubectl_token(&token, &["get", "pods"]).await;
        listed.status.success().then_some(())
    })
    .await;
    assert_eq!(out(&c.kubectl_token(&token, &["auth", "can-i", "list", "secrets"]).await), "no");
    let as_jane = c.kubectl(&["--as", "jane", "--as-group", "dev", "auth", "can-i", "get", "pods"]).await;
    assert_eq!(out(&as_jane), "no");
    assert!(ok(c.kubectl_token("jane-token", &["auth", "whoami"]).await).contains("dev"));
    for bad in ["nonsense", "a.b.c", &format!("{token}x")] {
        let refused = c.kubectl_token(bad, &["get", "pods"]).await;
        assert!(
            err(&refused).contains("must be logged in") || err(&refused).contains("Unauthorized"),
            "{}",
            err(&refused)
        );
    }
    ok(c.kubectl(&["delete", "serviceaccount", "bot"]).await);
    let gone = c.kubectl_token(&token, &["get", "pods"]).await;
    assert!(
        err(&gone).contains("must be logged in") || err(&gone).contains("Unauthorized"),
        "{}",
        err(&gone)
    );
    let short = c.kubectl(&["create", "token", "default", "--duration=1m"]).await;
    assert!(!short.status.success());
    c.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_past_health() {
    let c = Cluster::start().await;
    let ca = c.config.pki_dir().join("ca.crt").display().to_string();
    let ask = async |path: &str, extra: &[&str]| {
        let url = format!("{}{path}", c.url);
        let mut args = vec!["-s", "-o", "/dev/null", "-w", "%{http_code}", "--cacert", &ca, &url];
        args.extend(extra);
        let output =
            tokio::process::Command::new("curl").args(&args).output().await.expect("curl is installed");
        out(&output)
    };
    for (path, want) in [
        ("/healthz", "200"),
        ("/readyz?verbose", "200"),
        ("/version", "200"),
        ("/api", "401"),
        ("/api/v1/pods", "401"),
        ("/metrics", "401"),
        ("/api/v1/namespaces/kube-public/configmaps/cluster-info", "200"),
        ("/api/v1/namespaces/kube-public/configmaps/other", "401"),
        ("/healthz/nothing", "403"),
    ] {
        assert_eq!(ask(path, &[]).await, want, "{path}");
    }
    assert_eq!(ask("/healthz", &["-H", "Authorization: Bearer wrong"]).await, "401");
    // A certificate of another authority is no reason for a broken handshake.
    let foreign = tempfile::tempdir().expect("a temporary folder");
    let other = orlop_apiserver::pki::Pki::open(foreign.path(), &["localhost".to_owned()].into())
        .expect("another PKI");
    std::fs::write(foreign.path().join("c.pem"), &other.kubelet_client.cert_pem).expect("written");
    std::fs::write(foreign.path().join("k.pem"), &other.kubelet_client.key_pem).expect("written");
    let (cert, key) = (
        foreign.path().join("c.pem").display().to_string(),
        foreign.path().join("k.pem").display().to_string(),
    );
    assert_eq!(ask("/api/v1/pods", &["--cert", &cert, "--key", &key]).await, "401");
    let big = foreign.path().join("big");
    std::fs::write(&big, vec![b'x'; 4 << 20]).expect("written");
    let jane = [
        "--http1.1",
        "-H",
        "Authorization: Bearer jane-token",
        "-H",
        "Content-Type: application/json",
        "--data-binary",
    ];
    let body = format!("@{}", big.display());
    let mut args = jane.to_vec();
    args.push(&body);
    assert_eq!(ask("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", &args).await, "413");
    c.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn admission_equips_pods() {
    let c = Cluster::start().await;
    c.create("v1", "ServiceAccount", "default", "").await;
    let pod = r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p"},"spec":{"containers":[{"name":"c","image":"i"}]}}"#;
    ok(c.kubectl_with(&["create", "--validate=false", "-f", "-"], pod).await);
    let get = async |path: &str| ok(c.kubectl(&["get", "pod", "p", "-o", &format!("jsonpath={path}")]).await);
    assert_eq!(get("{.spec.serviceAccountName}").await, "default");
    assert!(get("{.spec.volumes[0].name}").await.starts_with("kube-api-access-"));
    assert_eq!(
        get("{.spec.containers[0].volumeMounts[0].mountPath}").await,
        "/var/run/secrets/kubernetes.io/serviceaccount"
    );
    assert_eq!(get("{.spec.priority}").await, "0");
    assert!(get("{.spec.tolerations[*].key}").await.contains("node.kubernetes.io/unreachable"));
    ok(c.kubectl(&["label", "ns", "default", "pod-security.kubernetes.io/enforce=baseline"]).await);
    let bad = pod
        .replace("\"name\":\"p\"", "\"name\":\"q\"")
        .replace("\"spec\":{", "\"spec\":{\"hostNetwork\":true,");
    let refused = c.kubectl_with(&["create", "--validate=false", "-f", "-"], &bad).await;
    assert!(
        err(&refused).contains("violates PodSecurity \"baseline:latest\": host namespaces"),
        "{}",
        err(&refused)
    );
    let logs = c.kubectl(&["logs", "p"]).await;
    assert!(err(&logs).contains("does not have a host assigned"), "{}", err(&logs));
    c.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_identity_and_objects_and_a_second_server_is_refused() {
    let c = Cluster::start().await;
    c.create("v1", "ConfigMap", "kept", "").await;
    c.create("v1", "ServiceAccount", "bot", "").await;
    let token = ok(c.kubectl(&["create", "token", "bot"]).await);
    let taken = orlop_apiserver::run(c.config.clone(), Ready::default(), CancellationToken::new()).await;
    match taken {
        Err(e @ Error::Transport(_)) => assert!(e.to_string().contains("the port is taken"), "{e}"),
        other => panic!("{other:?}"),
    }
    let mut elsewhere = crate::support::config(&c.dir);
    elsewhere.data_dir = c.config.data_dir.clone();
    let locked = orlop_apiserver::run(elsewhere, Ready::default(), CancellationToken::new()).await;
    assert!(matches!(locked, Err(Error::Data(_))), "{locked:?}");

    let (config, temp) = c.stop().await;
    let c = Cluster::start_with(config, temp).await;
    ok(c.kubectl(&["get", "configmap", "kept"]).await);
    ok(c.kubectl_token(&token, &["auth", "whoami"]).await);
    c.stop().await;
}
