//! What the handlers of one request share.

use std::sync::Arc;

use http::{HeaderMap, header};
use serde_json::Value;

use super::{
    ApiRequest, Attributes, Operation,
    options::{FieldValidation, Query, WriteOptions},
    respond::Wanted,
};
use crate::{
    codec::{self, Encoding, Shape},
    resources::Resource,
    schema::{self, Extent},
    status::Status,
    table::Include,
    value,
    watch_cache::Selection,
};

/// One request on one resource.
pub(super) struct Context {
    pub request: ApiRequest,
    /// The version that the client speaks.
    pub resource: Arc<Resource>,
    /// The version that is stored.
    pub stored: Arc<Resource>,
    pub query: Query,
    pub wanted: Wanted,
    pub warnings: Vec<String>,
}

impl Context {
    /// What a list, a watch or a deletion of many is about.
    pub fn selection(&self) -> Result<Selection, Status> {
        let (labels, fields) = (self.query.text("labelSelector"), self.query.text("fieldSelector"));
        Selection::parse(&self.resource, self.namespace(), labels, fields)
    }

    pub fn namespace(&self) -> &str {
        if self.resource.namespaced { &self.request.info.namespace } else { "" }
    }

    pub fn name(&self) -> &str {
        &self.request.info.name
    }

    pub fn write_options(&self) -> Result<WriteOptions, Status> {
        let agent =
            self.request.headers.get(header::USER_AGENT).and_then(|v| v.to_str().ok()).unwrap_or("unknown");
        WriteOptions::parse(&self.query, agent)
    }

    /// Decodes the body as an object of this resource.
    pub fn body(&mut self, options: &WriteOptions) -> Result<Value, Status> {
        let decoded = codec::decode(&self.request.headers, &self.request.body)?;
        let resource = self.resource.clone();
        let mut object = decoded.value;
        check_kind(&mut object, &resource.api_version(), &resource.kind)?;
        self.conform(&mut object, &resource, decoded.duplicates, options.validation, Extent::Whole)?;
        Ok(object)
    }

    /// Fits an object to the schema of its kind, and tells about fields that do not belong there.
    pub fn conform(
        &mut self,
        object: &mut Value,
        resource: &Resource,
        duplicates: Vec<String>,
        validation: FieldValidation,
        extent: Extent,
    ) -> Result<(), Status> {
        let Some(type_name) = resource.type_name else {
            value::drop_nulls(object);
            return Ok(());
        };
        let found = schema::conform(object, type_name, extent)
            .map_err(|e| Status::unreadable(&resource.version, &resource.kind, e.got, &e.path, e.expected))?;
        let mut problems: Vec<String> =
            found.unknown.iter().map(|f| format!("unknown field {f:?}")).collect();
        problems.extend(duplicates.iter().map(|f| format!("duplicate field {f:?}")));
        match validation {
            FieldValidation::Strict if !problems.is_empty() => Err(Status::bad_request(format!(
                "{} in version {:?} cannot be handled as a {}: strict decoding error: {}",
                resource.kind,
                resource.version,
                resource.kind,
                problems.join(", ")
            ))),
            FieldValidation::Warn => {
                self.warnings.append(&mut problems);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Attributes for admission.
    pub fn attributes(
        &self,
        operation: Operation,
        kind: &str,
        object: Option<Value>,
        old_object: Option<Value>,
        dry_run: bool,
    ) -> Attributes {
        Attributes {
            operation,
            user: self.request.user.clone(),
            info: self.request.info.clone(),
            kind: kind.to_owned(),
            object,
            old_object,
            dry_run,
            options: Value::Null,
            warnings: Vec::new(),
        }
    }
}

/// Refuses a body of another kind; a body without kind and version gets them.
pub(super) fn check_kind(object: &mut Value, api_version: &str, kind: &str) -> Result<(), Status> {
    if !object.is_object() {
        return Err(Status::bad_request("the body must be an object"));
    }
    let (got_version, got_kind) =
        (value::text(object, "apiVersion").to_owned(), value::text(object, "kind").to_owned());
    if (got_version.is_empty() || got_version == api_version) && (got_kind.is_empty() || got_kind == kind) {
        value::set(object, "apiVersion", api_version);
        value::set(object, "kind", kind);
        return Ok(());
    }
    if got_version != api_version {
        return Err(Status::bad_request(format!(
            "the API version in the data ({got_version}) does not match the expected API version ({api_version})"
        )));
    }
    Err(Status::bad_request(format!(
        "the object provided is unrecognized: expected kind {kind}, got {got_kind}"
    )))
}

/// What the client accepts.
pub(super) fn wanted(headers: &HeaderMap, query: &Query) -> Result<Wanted, Status> {
    let (shape, encoding) = codec::negotiate(headers)?;
    let gzip = headers
        .get(header::ACCEPT_ENCODING)
        .and_then(|v| v.to_str().ok())
        .is_some_and(|v| v.contains("gzip"));
    Ok(Wanted { shape, encoding, gzip, include: Include::parse(query.text("includeObject")) })
}

/// Plain JSON objects, for in-process use and bodies that are not stored.
pub(super) const JSON: Wanted =
    Wanted { shape: Shape::Objects, encoding: Encoding::Json, gzip: false, include: Include::Metadata };
