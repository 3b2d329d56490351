//! Clients that prefer protobuf: kubectl's typed commands, and lists and watches asked for in that encoding.

use crate::support::{Cluster, ok};

/// These commands build typed objects and send them as protobuf.
#[tokio::test(flavor = "multi_thread")]
async fn kubectl_creates_typed_objects() {
    let c = Cluster::start().await;
    for args in [
        "create namespace n",
        "create serviceaccount sa",
        "create configmap cm --from-literal=k=v",
        "create secret generic s --from-literal=k=v",
        "create role r --verb=get,list --resource=pods",
        "create clusterrole cr --verb=get --non-resource-url=/healthz",
        "create rolebinding rb --clusterrole=view --serviceaccount=default:sa",
        "create clusterrolebinding crb --clusterrole=view --group=g",
        "create deployment d --image=busybox --replicas=2 --port=80 -- sleep 1",
        "create service clusterip svc --tcp=80:8080",
        "create service nodeport np --tcp=80:http",
        "create job j --image=busybox -- true",
        "create cronjob cj --image=busybox --schedule=*/5_*_*_*_* -- true",
        "create quota q --hard=cpu=1,pods=2",
        "create poddisruptionbudget pdb --selector=app=d --min-available=50%",
        "create priorityclass pc --value=100 --description=x",
        "create ingress in --rule=a.example/x*=svc:80",
    ] {
        // `_` stands for a space within an argument.
        let args: Vec<String> = args.split(' ').map(|a| a.replace('_', " ")).collect();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        ok(c.kubectl(&args).await);
    }
    for (object, path, want) in [
        ("configmap/cm", "{.data.k}", "v"),
        ("secret/s", "{.data.k}", "dg=="),
        ("rolebinding/rb", "{.roleRef.name} {.subjects[0].name}", "view sa"),
        (
            "deployment/d",
            "{.spec.replicas} {.spec.template.spec.containers[0].command}",
            "2 [\"sleep\",\"1\"]",
        ),
        ("service/svc", "{.spec.ports[0].targetPort} {.spec.type}", "8080 ClusterIP"),
        ("service/np", "{.spec.ports[0].targetPort}", "http"),
        ("cronjob/cj", "{.spec.schedule}", "*/5 * * * *"),
        ("quota/q", "{.spec.hard.cpu}", "1"),
        ("pdb/pdb", "{.spec.minAvailable}", "50%"),
        ("ingress/in", "{.spec.rules[0].http.paths[0].pathType}", "Prefix"),
    ] {
        let got = ok(c.kubectl(&["get", object, "-o", &format!("jsonpath={path}")]).await);
        assert_eq!(got, want, "{object}");
    }
    ok(c.kubectl(&["scale", "deployment/d", "--replicas=3"]).await);
    assert_eq!(ok(c.kubectl(&["get", "deployment/d", "-o", "jsonpath={.spec.replicas}"]).await), "3");
    ok(c.kubectl(&["delete", "configmap/cm", "secret/s", "--wait=false"]).await);
    c.stop().await;
}
