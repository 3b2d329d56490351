//! JSON patch, JSON merge patch and strategic merge patch: pure functions from an object and a patch to an object.

use http::HeaderMap;
use serde_json::Value;

use crate::{codec, status::Status};

mod strategic;

pub use strategic::merge as strategic_merge;

/// Operations that one JSON patch may hold, as upstream limits it.
const MAX_OPERATIONS: usize = 10_000;

/// The kinds of patches, told by Content-Type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatchType {
    /// RFC 6902.
    Json,
    /// RFC 7386.
    Merge,
    /// Kubernetes' own, which knows list keys.
    Strategic,
    /// Server-side apply.
    Apply,
}

impl PatchType {
    /// From the Content-Type header.
    ///
    /// # Errors
    /// 415 for anything else.
    pub fn of(headers: &HeaderMap) -> Result<PatchType, Status> {
        match codec::content_type(headers).as_str() {
            "application/json-patch+json" => Ok(PatchType::Json),
            "application/merge-patch+json" => Ok(PatchType::Merge),
            "application/strategic-merge-patch+json" => Ok(PatchType::Strategic),
            "application/apply-patch+yaml" => Ok(PatchType::Apply),
            _ => Err(Status::unsupported_media_type(
                "the body of the request was in an unknown format - accepted media types include: application/json-patch+json, \
                 application/merge-patch+json, application/strategic-merge-patch+json, application/apply-patch+yaml",
            )),
        }
    }
}

/// A parsed patch.
#[derive(Clone, Debug)]
pub enum Patch {
    /// RFC 6902.
    Json(json_patch::Patch),
    /// RFC 7386.
    Merge(Value),
    /// Strategic merge.
    Strategic(Value),
}

impl Patch {
    /// Parses a patch body.
    ///
    /// # Errors
    /// 400 when it is malformed, 413 when it has too many operations.
    pub fn parse(kind: PatchType, body: &[u8]) -> Result<Patch, Status> {
        let bad = |e: serde_json::Error| Status::bad_request(format!("error decoding patch: {e}"));
        match kind {
            PatchType::Json => {
                let patch: json_patch::Patch = serde_json::from_slice(body).map_err(bad)?;
                if patch.0.len() > MAX_OPERATIONS {
                    return Err(Status::too_large(MAX_OPERATIONS));
                }
                Ok(Patch::Json(patch))
            }
            PatchType::Merge => Ok(Patch::Merge(object(serde_json::from_slice(body).map_err(bad)?)?)),
            PatchType::Strategic => Ok(Patch::Strategic(object(serde_json::from_slice(body).map_err(bad)?)?)),
            PatchType::Apply => {
                Err(Status::unsupported_media_type("server-side apply is not supported on this endpoint"))
            }
        }
    }

    /// The patched object. `type_name` tells list keys to strategic merge; kinds without a schema do not support it.
    ///
    /// # Errors
    /// 422 when the patch does not fit the object.
    pub fn apply(&self, current: &Value, type_name: Option<&'static str>) -> Result<Value, Status> {
        let unfit = |why: String| {
            Status::failure(
                422,
                "Invalid",
                format!("the server rejected our request due to an error in our request: {why}"),
            )
        };
        let mut v = current.clone();
        match self {
            Patch::Json(patch) => json_patch::patch(&mut v, patch).map_err(|e| unfit(e.to_string()))?,
            Patch::Merge(patch) => json_patch::merge(&mut v, patch),
            Patch::Strategic(patch) => {
                let type_name = type_name.ok_or_else(|| {
                    Status::unsupported_media_type(
                        "strategic merge patch is not supported for custom resources; use a merge patch",
                    )
                })?;
                strategic_merge(&mut v, patch, type_name).map_err(unfit)?;
            }
        }
        Ok(v)
    }
}

fn object(v: Value) -> Result<Value, Status> {
    if v.is_object() {
        Ok(v)
    } else {
        Err(Status::bad_request("error decoding patch: a patch must be an object"))
    }
}
