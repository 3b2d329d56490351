//! The reviews: questions about tokens and rights that are answered at once and never stored.

use std::collections::BTreeMap;

use http::{Response, StatusCode};
use serde_json::{Value, json};

use crate::authz::{Attributes, Decision};
use crate::handler::{Server, json_response, parse_object};
use crate::registry::{ApiRequest, Body};
use crate::request_info::UserInfo;
use crate::status::Status;

fn text<'a>(v: &'a Value, pointer: &str) -> &'a str {
    v.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn strings(v: Option<&Value>) -> Vec<String> {
    v.and_then(Value::as_array).into_iter().flatten().filter_map(|s| s.as_str().map(str::to_owned)).collect()
}

/// Answers a POST to one of the two review groups.
///
/// # Errors
/// 400 for a question without sense, 404 for an unknown review.
pub async fn create(server: &Server, request: &ApiRequest) -> Result<Response<Body>, Status> {
    let info = &request.info;
    if info.api_version != "v1" || !info.subresource.is_empty() {
        return Err(Status::no_such_path());
    }
    let kind = match (info.api_group.as_str(), info.resource.as_str()) {
        ("authentication.k8s.io", "tokenreviews") => "TokenReview",
        ("authentication.k8s.io", "selfsubjectreviews") => "SelfSubjectReview",
        ("authorization.k8s.io", "subjectaccessreviews") => "SubjectAccessReview",
        ("authorization.k8s.io", "localsubjectaccessreviews") => "LocalSubjectAccessReview",
        ("authorization.k8s.io", "selfsubjectaccessreviews") => "SelfSubjectAccessReview",
        ("authorization.k8s.io", "selfsubjectrulesreviews") => "SelfSubjectRulesReview",
        _ => return Err(Status::no_such_path()),
    };
    let (shape, _) = crate::codec::negotiate(&request.headers)?;
    if shape != crate::codec::Shape::Objects {
        return Err(Status::not_acceptable(
            "only the following media types are accepted: application/json, application/yaml, application/vnd.kubernetes.protobuf",
        ));
    }
    let mut object = parse_object(request, &info.api_group, kind)?;
    let given = text(&object, "/kind");
    if !given.is_empty() && given != kind {
        return Err(Status::bad_request(format!("{given} in the body does not match {kind}")));
    }
    let spec = object.get("spec").cloned().unwrap_or_else(|| json!({}));
    object["status"] = match kind {
        "TokenReview" => token_review(server, &spec).await?,
        "SelfSubjectReview" => json!({"userInfo": user_value(&request.user)}),
        "SelfSubjectAccessReview" => access(server, &request.user, &spec)?,
        "SelfSubjectRulesReview" => rules(server, &request.user, text(&spec, "/namespace"))?,
        "LocalSubjectAccessReview" => {
            if text(&spec, "/resourceAttributes/namespace") != info.namespace {
                return Err(Status::bad_request(
                    "spec.resourceAttributes.namespace must match the request's namespace",
                ));
            }
            access(server, &spec_user(&spec)?, &spec)?
        }
        _ => access(server, &spec_user(&spec)?, &spec)?,
    };
    object["apiVersion"] = json!(format!("{}/v1", info.api_group));
    object["kind"] = json!(kind);
    if !object["metadata"].is_object() {
        object["metadata"] = json!({"creationTimestamp": null});
    }
    Ok(json_response(StatusCode::CREATED, &object))
}

fn user_value(user: &UserInfo) -> Value {
    let mut v = json!({"username": user.name, "groups": user.groups});
    if !user.uid.is_empty() {
        v["uid"] = json!(user.uid);
    }
    if !user.extra.is_empty() {
        v["extra"] = json!(user.extra);
    }
    v
}

async fn token_review(server: &Server, spec: &Value) -> Result<Value, Status> {
    let token = text(spec, "/token");
    if token.is_empty() {
        return Err(Status::bad_request("token is required for TokenReview in authentication"));
    }
    let audiences = strings(spec.get("audiences"));
    match server.authenticator.authenticate_token(token, &audiences).await {
        Ok(a) => {
            let mut status = json!({"authenticated": true, "user": user_value(&a.user)});
            let good = if audiences.is_empty() {
                server.authenticator.service_accounts.audiences().to_vec()
            } else {
                a.audiences
            };
            status["audiences"] = json!(good);
            Ok(status)
        }
        Err(e) => Ok(json!({"user": {}, "error": e.to_string()})),
    }
}

fn spec_user(spec: &Value) -> Result<UserInfo, Status> {
    let user = UserInfo {
        name: text(spec, "/user").to_owned(),
        uid: text(spec, "/uid").to_owned(),
        groups: strings(spec.get("groups")),
        extra: spec
            .get("extra")
            .and_then(Value::as_object)
            .map(|m| m.iter().map(|(k, v)| (k.clone(), strings(Some(v)))).collect::<BTreeMap<_, _>>())
            .unwrap_or_default(),
    };
    if user.name.is_empty() && user.groups.is_empty() {
        return Err(Status::bad_request("at least one of spec.user or spec.groups must be specified"));
    }
    Ok(user)
}

fn access(server: &Server, user: &UserInfo, spec: &Value) -> Result<Value, Status> {
    let resource = spec.get("resourceAttributes").filter(|v| v.is_object());
    let path = spec.get("nonResourceAttributes").filter(|v| v.is_object());
    let selector;
    let attributes = match (resource, path) {
        (Some(r), None) => {
            selector = selector_text(r);
            Attributes {
                user,
                verb: text(r, "/verb"),
                group: text(r, "/group"),
                resource: text(r, "/resource"),
                subresource: text(r, "/subresource"),
                namespace: text(r, "/namespace"),
                name: text(r, "/name"),
                path: "",
                is_resource: true,
                field_selector: &selector,
            }
        }
        (None, Some(p)) => Attributes {
            path: text(p, "/path"),
            is_resource: false,
            ..Attributes::resource(user, text(p, "/verb"), "", "", "", "")
        },
        _ => {
            return Err(Status::bad_request(
                "exactly one of spec.nonResourceAttributes or spec.resourceAttributes must be specified",
            ));
        }
    };
    Ok(match server.authorizer.authorize(&attributes) {
        Decision::Allow(reason) => json!({"allowed": true, "reason": reason}),
        Decision::NoOpinion(reason) if reason.is_empty() => json!({"allowed": false}),
        Decision::NoOpinion(reason) => json!({"allowed": false, "reason": reason}),
    })
}

/// The field selector of a review, from its raw form or its requirements.
fn selector_text(resource: &Value) -> String {
    let raw = text(resource, "/fieldSelector/rawSelector");
    if !raw.is_empty() {
        return raw.to_owned();
    }
    let requirements = resource.pointer("/fieldSelector/requirements").and_then(Value::as_array);
    let terms: Vec<String> = requirements
        .into_iter()
        .flatten()
        .filter(|r| text(r, "/operator") == "In")
        .filter_map(|r| match strings(r.get("values")).as_slice() {
            [one] => Some(format!("{}={one}", text(r, "/key"))),
            _ => None,
        })
        .collect();
    terms.join(",")
}

fn rules(server: &Server, user: &UserInfo, namespace: &str) -> Result<Value, Status> {
    if namespace.is_empty() {
        return Err(Status::bad_request("no namespace on request"));
    }
    let mut resource = Vec::new();
    let mut paths = Vec::new();
    if user.in_group("system:masters") {
        resource.push(json!({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}));
        paths.push(json!({"verbs": ["*"], "nonResourceURLs": ["*"]}));
    }
    for rule in server.authorizer.rules_for(user, namespace) {
        if rule.non_resource_urls.is_empty() {
            resource.push(json!(rule));
        } else {
            paths.push(json!({"verbs": rule.verbs, "nonResourceURLs": rule.non_resource_urls}));
        }
    }
    Ok(json!({"resourceRules": resource, "nonResourceRules": paths, "incomplete": false}))
}
