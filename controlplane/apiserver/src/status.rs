//! `metav1.Status`: how every failure leaves the API server.
//!
//! Reasons, codes and the shape of `details` follow the Kubernetes API conventions, because client libraries
//! branch on them (`IsNotFound`, `IsConflict`, …).

use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};
use serde::{Deserialize, Serialize};

use crate::registry::Body;

/// A Kubernetes `Status` object that describes a failure (or, rarely, a success without an object). `apiVersion`
/// and the empty `metadata` are only part of the JSON form.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Always `Status`; kept so that a Status read from elsewhere can be told from another object.
    #[serde(default)]
    pub kind: String,
    /// `Success` or `Failure`.
    pub status: String,
    /// What a person reads.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// What a program reads, in CamelCase.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// The object the failure is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<Box<Details>>,
    /// HTTP status code.
    pub code: u16,
}

/// The JSON form.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Wire<'a> {
    api_version: &'static str,
    metadata: Empty,
    #[serde(flatten)]
    status: &'a Status,
}

#[derive(Serialize)]
struct Empty {}

/// The object a failure is about, and its causes.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Details {
    /// Name of the object.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// API group of the object.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub group: String,
    /// Resource or kind of the object.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub kind: String,
    /// UID of the object.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// One entry for each invalid field.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<Cause>,
    /// Seconds after which a retry makes sense; 0 = not said.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub retry_after_seconds: u32,
}

/// One reason of a failure.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
pub struct Cause {
    /// For example `FieldValueInvalid`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// What a person reads.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Path of the field, for example `spec.containers[0].name`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub field: String,
}

fn is_zero(v: &u32) -> bool {
    *v == 0
}

/// `resource.group`, or only `resource` in the core group, as upstream prints it in messages.
pub fn qualified(group: &str, resource: &str) -> String {
    if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") }
}

impl Status {
    /// A failure with any code and reason.
    pub fn failure(code: u16, reason: &str, message: impl Into<String>) -> Status {
        Status {
            kind: "Status".into(),
            status: "Failure".into(),
            message: message.into(),
            reason: reason.into(),
            details: None,
            code,
        }
    }

    /// A success that carries no object, as answered to a finished delete.
    pub fn success(group: &str, resource: &str, name: &str, uid: &str) -> Status {
        let mut status = Status::failure(200, "", "");
        status.status = "Success".into();
        status.details = Some(Box::new(Details {
            name: name.into(),
            group: group.into(),
            kind: resource.into(),
            uid: uid.into(),
            ..Details::default()
        }));
        status
    }

    fn about(mut self, group: &str, resource: &str, name: &str) -> Status {
        self.details = Some(Box::new(Details {
            name: name.into(),
            group: group.into(),
            kind: resource.into(),
            ..Details::default()
        }));
        self
    }

    fn with_cause(mut self, reason: &str, message: &str) -> Status {
        let details = self.details.get_or_insert_default();
        details.causes.push(Cause { reason: reason.into(), message: message.into(), field: String::new() });
        self
    }

    /// Tells the client to come back after `seconds`.
    pub fn retry_after(mut self, seconds: u32) -> Status {
        self.details.get_or_insert_default().retry_after_seconds = seconds;
        self
    }

    /// 404: the named object does not exist.
    pub fn not_found(group: &str, resource: &str, name: &str) -> Status {
        Status::failure(404, "NotFound", format!("{} {name:?} not found", qualified(group, resource)))
            .about(group, resource, name)
    }

    /// 404: there is nothing at this path.
    pub fn no_such_path() -> Status {
        Status::failure(404, "NotFound", "the server could not find the requested resource")
    }

    /// 409: an object of this name exists.
    pub fn already_exists(group: &str, resource: &str, name: &str) -> Status {
        Status::failure(
            409,
            "AlreadyExists",
            format!("{} {name:?} already exists", qualified(group, resource)),
        )
        .about(group, resource, name)
    }

    /// 409: the operation does not fit the present state of the object.
    pub fn conflict(group: &str, resource: &str, name: &str, why: &str) -> Status {
        let message =
            format!("Operation cannot be fulfilled on {} {name:?}: {why}", qualified(group, resource));
        Status::failure(409, "Conflict", message).about(group, resource, name)
    }

    /// 409: a server-side apply met fields of other managers.
    pub fn apply_conflict(message: impl Into<String>, causes: Vec<Cause>) -> Status {
        let mut status = Status::failure(409, "Conflict", message);
        status.details = Some(Box::new(Details { causes, ..Details::default() }));
        status
    }

    /// 422: validation failed; `kind` is the CamelCase kind.
    pub fn invalid(group: &str, kind: &str, name: &str, causes: Vec<Cause>) -> Status {
        let list: Vec<String> = causes.iter().map(|c| format!("{}: {}", c.field, c.message)).collect();
        let text = if list.len() == 1 { list[0].clone() } else { format!("[{}]", list.join(", ")) };
        let mut status = Status::failure(
            422,
            "Invalid",
            format!("{} {name:?} is invalid: {text}", qualified(group, kind)),
        )
        .about(group, kind, name);
        if let Some(details) = &mut status.details {
            details.causes = causes;
        }
        status
    }

    /// 403: the user may not do this.
    pub fn forbidden(group: &str, resource: &str, name: &str, why: &str) -> Status {
        let what = qualified(group, resource);
        let message = if name.is_empty() {
            format!("{what} is forbidden: {why}")
        } else {
            format!("{what} {name:?} is forbidden: {why}")
        };
        Status::failure(403, "Forbidden", message).about(group, resource, name)
    }

    /// 401: no or wrong credentials.
    pub fn unauthorized() -> Status {
        Status::failure(401, "Unauthorized", "Unauthorized")
    }

    /// 400: the request makes no sense.
    pub fn bad_request(message: impl Into<String>) -> Status {
        Status::failure(400, "BadRequest", message)
    }

    /// 400: a field holds something of another type.
    pub fn unreadable(version: &str, kind: &str, got: &str, path: &str, expected: &str) -> Status {
        Status::bad_request(format!(
            "{kind} in version {version:?} cannot be handled as a {kind}: json: cannot unmarshal {got} into field {path} of type {expected}"
        ))
    }

    /// 410: the resource version asked for is compacted away; clients list again.
    pub fn expired(message: impl Into<String>) -> Status {
        Status::failure(410, "Expired", message)
    }

    /// 410: the object or version is gone for good.
    pub fn gone(message: impl Into<String>) -> Status {
        Status::failure(410, "Gone", message)
    }

    /// 405: the resource does not support the method.
    pub fn method_not_allowed(group: &str, resource: &str, verb: &str) -> Status {
        let message =
            format!("{verb} is not supported on resources of kind {:?}", qualified(group, resource));
        Status::failure(405, "MethodNotAllowed", message).about(group, resource, "")
    }

    /// 415: the body's encoding is not understood.
    pub fn unsupported_media_type(message: impl Into<String>) -> Status {
        Status::failure(415, "UnsupportedMediaType", message)
    }

    /// 406: no encoding that the client accepts can be produced.
    pub fn not_acceptable(message: impl Into<String>) -> Status {
        Status::failure(406, "NotAcceptable", message)
    }

    /// 413: the body is larger than the server takes.
    pub fn too_large(limit_bytes: usize) -> Status {
        Status::failure(413, "RequestEntityTooLarge", format!("limit is {limit_bytes} bytes"))
    }

    /// 429: come back after `seconds`.
    pub fn too_many_requests(message: impl Into<String>, seconds: u32) -> Status {
        Status::failure(429, "TooManyRequests", message).retry_after(seconds)
    }

    /// 500: something inside broke.
    pub fn internal(message: impl std::fmt::Display) -> Status {
        let text = message.to_string();
        Status::failure(500, "InternalError", format!("Internal error occurred: {text}"))
            .with_cause("", &text)
    }

    /// 503: a part that is needed does not answer now.
    pub fn unavailable(message: impl Into<String>) -> Status {
        Status::failure(503, "ServiceUnavailable", message)
    }

    /// 504: the server gave up; the client may retry after `seconds`.
    pub fn timeout(message: impl Into<String>, seconds: u32) -> Status {
        Status::failure(504, "Timeout", message).retry_after(seconds)
    }

    /// 504: the requested resource version is newer than what the server has.
    pub fn too_large_resource_version(requested: u64, current: u64) -> Status {
        Status::timeout(format!("Too large resource version: {requested}, current: {current}"), 1)
            .with_cause("ResourceVersionTooLarge", "Too large resource version")
    }

    /// Whether this is a 404.
    pub fn is_not_found(&self) -> bool {
        self.code == 404
    }

    /// Whether this is a 409 because of a concurrent change.
    pub fn is_conflict(&self) -> bool {
        self.code == 409 && self.reason == "Conflict"
    }

    /// Whether this is a 409 because the object exists.
    pub fn is_already_exists(&self) -> bool {
        self.reason == "AlreadyExists"
    }

    /// The JSON form.
    pub fn to_json(&self) -> Bytes {
        // A struct of strings and numbers always serialises.
        let wire = Wire { api_version: "v1", metadata: Empty {}, status: self };
        serde_json::to_vec(&wire).map(Bytes::from).unwrap_or_default()
    }

    /// The HTTP answer.
    pub fn into_response(self) -> http::Response<Body> {
        let mut response = http::Response::new(Body::from(self.to_json()));
        *response.status_mut() = StatusCode::from_u16(self.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(details) = &self.details
            && details.retry_after_seconds > 0
        {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(details.retry_after_seconds));
        }
        response
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({}, {})", self.message, self.reason, self.code)
    }
}

impl std::error::Error for Status {}

impl From<Status> for http::Response<Body> {
    fn from(status: Status) -> Self {
        status.into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_read_as_upstream_writes_them() {
        assert_eq!(
            Status::not_found("apps", "deployments", "web").message,
            "deployments.apps \"web\" not found"
        );
        assert_eq!(Status::already_exists("", "pods", "a").message, "pods \"a\" already exists");
        let one = Cause {
            reason: "FieldValueRequired".into(),
            message: "Required value".into(),
            field: "spec.x".into(),
        };
        let status = Status::invalid("", "Pod", "a", vec![one.clone()]);
        assert_eq!(status.message, "Pod \"a\" is invalid: spec.x: Required value");
        let status = Status::invalid("apps", "Deployment", "a", vec![one.clone(), one]);
        assert_eq!(
            status.message,
            "Deployment.apps \"a\" is invalid: [spec.x: Required value, spec.x: Required value]"
        );
        assert_eq!(status.code, 422);
    }

    #[test]
    fn json_form_has_the_standard_fields() {
        let v: serde_json::Value =
            serde_json::from_slice(&Status::not_found("", "pods", "a").to_json()).expect("json");
        assert_eq!(v["kind"], "Status");
        assert_eq!(v["apiVersion"], "v1");
        assert_eq!(v["details"]["kind"], "pods");
        assert_eq!(v["code"], 404);
    }
}
