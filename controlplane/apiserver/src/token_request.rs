//! serviceaccounts/token: makes a token for an account, optionally bound to a pod, node or secret.

use http::{Response, StatusCode};
use serde_json::{Value, json};

use crate::authn::service_account::{Bound, Reference};
use crate::handler::{Server, json_response, parse_object};
use crate::registry::{ApiRequest, Attributes, Body, Operation};
use crate::status::{Cause, Status};

const MIN_SECONDS: u64 = 600;
const MAX_SECONDS: u64 = 1 << 32;
const DEFAULT_SECONDS: u64 = 3600;
/// What the injected volume asks for. Such tokens live a year, so that clients which never reload the file keep working (as upstream).
const INJECTED_SECONDS: u64 = 3607;
const EXTENDED_SECONDS: u64 = 365 * 24 * 3600;

fn text<'a>(v: &'a Value, pointer: &str) -> &'a str {
    v.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn invalid(name: &str, field: &str, message: &str) -> Status {
    let cause = Cause { reason: "FieldValueInvalid".into(), message: message.into(), field: field.into() };
    Status::invalid("authentication.k8s.io", "TokenRequest", name, vec![cause])
}

/// Answers a POST to the subresource.
///
/// # Errors
/// 404 for an unknown account, 422 for a bad lifetime, 409 when a bound object has another UID.
pub async fn create(server: &Server, request: &ApiRequest) -> Result<Response<Body>, Status> {
    let (namespace, name) = (request.info.namespace.as_str(), request.info.name.as_str());
    let mut object = parse_object(request, "authentication.k8s.io", "TokenRequest")?;
    for (pointer, field, want) in
        [("/metadata/name", "metadata.name", name), ("/metadata/namespace", "metadata.namespace", namespace)]
    {
        let have = text(&object, pointer);
        if !have.is_empty() && have != want {
            return Err(invalid(name, field, "must match the service account if specified"));
        }
    }
    let account = server.registry.get("", "serviceaccounts", namespace, name).await?;
    let seconds = match object.pointer("/spec/expirationSeconds") {
        None | Some(Value::Null) => DEFAULT_SECONDS,
        Some(v) => v.as_u64().unwrap_or(0),
    };
    if seconds < MIN_SECONDS {
        return Err(invalid(
            name,
            "spec.expirationSeconds",
            "may not specify a duration less than 10 minutes",
        ));
    }
    if seconds > MAX_SECONDS {
        return Err(invalid(
            name,
            "spec.expirationSeconds",
            "may not specify a duration larger than 2^32 seconds",
        ));
    }
    let own = server.authenticator.service_accounts.audiences();
    let asked = object.pointer("/spec/audiences").and_then(Value::as_array);
    let mut audiences: Vec<String> =
        asked.into_iter().flatten().filter_map(|a| a.as_str().map(str::to_owned)).collect();
    if audiences.is_empty() {
        audiences = own.to_vec();
    }
    let for_kubernetes = audiences.iter().all(|a| own.contains(a));
    object["apiVersion"] = json!("authentication.k8s.io/v1");
    object["kind"] = json!("TokenRequest");
    object["metadata"]["name"] = json!(name);
    object["metadata"]["namespace"] = json!(namespace);
    object["spec"]["audiences"] = json!(audiences);
    object["spec"]["expirationSeconds"] = json!(seconds);
    admit(server, request, &object).await?;

    let mut bound = Bound {
        namespace: namespace.to_owned(),
        serviceaccount: Reference { name: name.to_owned(), uid: text(&account, "/metadata/uid").to_owned() },
        ..Bound::default()
    };
    bind(server, namespace, name, &object, &mut bound).await?;
    let mut life = seconds;
    if bound.pod.is_some() && seconds == INJECTED_SECONDS && for_kubernetes {
        bound.warnafter = Some(jsonwebtoken::get_current_timestamp() + seconds);
        life = EXTENDED_SECONDS;
    }
    let now = jiff::Timestamp::now();
    let token =
        server.authenticator.service_accounts.sign(audiences, life, bound).map_err(Status::internal)?;
    let expiry = jiff::Timestamp::from_second(now.as_second().saturating_add(seconds as i64))
        .map_err(Status::internal)?;
    object["metadata"]["creationTimestamp"] = json!(rfc3339(now));
    object["status"] = json!({"token": token, "expirationTimestamp": rfc3339(expiry)});
    Ok(json_response(StatusCode::CREATED, &object))
}

fn rfc3339(t: jiff::Timestamp) -> String {
    t.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Admission sees token requests too: it keeps a node from making tokens for pods that it does not run.
async fn admit(server: &Server, request: &ApiRequest, object: &Value) -> Result<(), Status> {
    if request.user.name == "system:apiserver" {
        return Ok(());
    }
    let mut attributes = Attributes {
        operation: Operation::Create,
        user: request.user.clone(),
        info: request.info.clone(),
        kind: "TokenRequest".to_owned(),
        object: Some(object.clone()),
        old_object: None,
        dry_run: false,
        options: Value::Null,
        warnings: Vec::new(),
    };
    server.admission.admit(&mut attributes).await?;
    server.admission.validate(&mut attributes).await
}

async fn bind(
    server: &Server,
    namespace: &str,
    account: &str,
    object: &Value,
    bound: &mut Bound,
) -> Result<(), Status> {
    let Some(reference) = object.pointer("/spec/boundObjectRef").filter(|r| r.is_object()) else {
        return Ok(());
    };
    let (kind, name, uid) = (text(reference, "/kind"), text(reference, "/name"), text(reference, "/uid"));
    let get = async |resource: &str, namespace: &str| {
        let target = server.registry.get("", resource, namespace, name).await?;
        let have = text(&target, "/metadata/uid").to_owned();
        if !uid.is_empty() && uid != have {
            let why = format!(
                "the UID in the bound object reference ({uid}) does not match the UID in record. The object might have been deleted and then recreated"
            );
            return Err(Status::conflict("", resource, name, &why));
        }
        Ok((target, Reference { name: name.to_owned(), uid: have }))
    };
    match kind {
        "Pod" => {
            let (pod, reference) = get("pods", namespace).await?;
            if text(&pod, "/spec/serviceAccountName") != account {
                return Err(Status::bad_request(format!(
                    "cannot bind token for serviceaccount {account:?} to pod running with different serviceaccount name."
                )));
            }
            let node = text(&pod, "/spec/nodeName");
            if !node.is_empty() {
                let object = server.registry.get("", "nodes", "", node).await;
                let uid = object.map(|n| text(&n, "/metadata/uid").to_owned()).unwrap_or_default();
                bound.node = Some(Reference { name: node.to_owned(), uid });
            }
            bound.pod = Some(reference);
        }
        "Node" => bound.node = Some(get("nodes", "").await?.1),
        "Secret" => bound.secret = Some(get("secrets", namespace).await?.1),
        other => return Err(Status::bad_request(format!("cannot bind token to object of type {other:?}"))),
    }
    Ok(())
}
