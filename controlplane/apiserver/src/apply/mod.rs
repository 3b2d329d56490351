//! Field ownership: who set which field, and server-side apply on top of it.

use serde_json::Value;

use crate::{registry::options::WriteOptions, resources::Resource};

/// Keeps `metadata.managedFields` of an object that is about to be stored.
pub fn track(
    _resource: &Resource,
    _api_version: String,
    object: &mut Value,
    old: Option<&Value>,
    _options: &WriteOptions,
    _subresource: &str,
) {
    if let Some(old) = old {
        crate::value::carry(object, old, "metadata.managedFields");
    }
}
