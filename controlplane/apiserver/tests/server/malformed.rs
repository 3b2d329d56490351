//! Objects that are not what their kind says are refused with the field's path, whichever handler answers them: one that got
//! through would end a handler, or break the watches of all typed clients.

use crate::support::{Cluster, err, ok};

#[tokio::test(flavor = "multi_thread")]
async fn wrong_types_are_refused_by_path() {
    let c = Cluster::start().await;
    let token = "/api/v1/namespaces/default/serviceaccounts/bot/token";
    let review = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
    let head = r#""apiVersion":"authentication.k8s.io/v1","kind":"TokenRequest""#;
    c.create("v1", "ServiceAccount", "bot", "").await;
    c.create("v1", "Service", "svc", r#","spec":{"ports":[{"port":80}]}"#).await;
    for (path, body, says) in [
        (token, format!(r#"{{{head},"metadata":1.5,"spec":{{}}}}"#), "field metadata of type object"),
        (token, format!(r#"{{{head},"spec":[null]}}"#), "field spec of type object"),
        (token, format!(r#"{{{head},"spec":{{"audiences":"a"}}}}"#), "field spec.audiences of type array"),
        (
            review,
            r#"{"spec":{"resourceAttributes":[]}}"#.into(),
            "field spec.resourceAttributes of type object",
        ),
        (
            "/api/v1/namespaces/default/pods",
            r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"},"status":{"startTime":"yesterday"}}"#
                .into(),
            "cannot unmarshal string into field status.startTime of type time",
        ),
    ] {
        let refused = c.kubectl_with(&["create", "--raw", path, "-f", "-"], &body).await;
        assert!(err(&refused).contains(says), "{path}: {}", err(&refused));
    }
    let patch = |text| ["patch", "service", "svc", "--subresource=status", "--type=merge", "-p", text];
    let mistimed =
        r#"{"status":{"conditions":[{"type":"a","status":"True","reason":"b","lastTransitionTime":1}]}}"#;
    let mistimed = c.kubectl(&patch(mistimed)).await;
    assert!(
        err(&mistimed).contains("status.conditions[0].lastTransitionTime of type time"),
        "{}",
        err(&mistimed)
    );
    ok(c.kubectl(&patch(r#"{"status":{"conditions":[{"type":"a","status":"True","reason":"b"}]}}"#)).await);
    let whole = r#"{"status":{"conditions":[{"type":"a","status":"True","reason":"b","lastTransitionTime":"2026-01-02T03:04:05Z"}]}}"#;
    ok(c.kubectl(&patch(whole)).await);
    // What client-go sends: the answer's fields are there, empty.
    let empty = format!(
        r#"{{{head},"metadata":{{"creationTimestamp":null}},"spec":{{"audiences":null}},"status":{{"token":"","expirationTimestamp":null}}}}"#
    );
    assert!(
        ok(c.kubectl_with(&["create", "--raw", token, "-f", "-"], &empty).await)
            .contains("expirationTimestamp")
    );
    c.stop().await;
}
