//! OpenAPI documents, made from the schema when they are asked for.

use http::{HeaderMap, Response, Uri};

use crate::{registry::Body, resources::ResourceTable, status::Status};

/// Answers `/openapi/…`.
///
/// # Errors
/// 404 for groups that are not served.
pub fn answer(
    _table: &ResourceTable,
    _path: &str,
    _uri: &Uri,
    _headers: &HeaderMap,
) -> Result<Option<Response<Body>>, Status> {
    Ok(None)
}
