//! The system's part of `metadata`: identity, times, names, generations.

use jiff::{RoundMode, Timestamp, TimestampRound, Unit};
use rand::Rng;
use serde_json::Value;

use crate::{status::Status, value};

/// Letters of generated names: no vowels, so no words.
const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
/// A generated name is at most this long before its random part is added.
const GENERATE_LIMIT: usize = 58;

/// Now, in whole seconds, as API objects carry it.
pub fn now() -> String {
    stamp(Timestamp::now())
}

/// A time in whole seconds, never later than the time itself: clients compute with what has passed since.
pub fn stamp(t: Timestamp) -> String {
    let whole = TimestampRound::new().smallest(Unit::Second).mode(RoundMode::Floor);
    t.round(whole).unwrap_or(t).to_string()
}

/// A new name from `generateName`.
pub fn generate_name(base: &str) -> String {
    let mut rng = rand::rng();
    let mut name: String = base.chars().take(GENERATE_LIMIT).collect();
    for _ in 0..5 {
        name.push(LETTERS[rng.random_range(0..LETTERS.len())] as char);
    }
    name
}

/// A random version 4 UUID.
pub fn new_uid() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// Prepares the metadata of a new object, except for its name.
pub fn begin(object: &mut Value, generation: bool) {
    let meta = value::ensure_map(object, "metadata");
    for key in
        ["deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "resourceVersion", "generation"]
    {
        meta.remove(key);
    }
    meta.insert("uid".into(), new_uid().into());
    meta.insert("creationTimestamp".into(), now().into());
    if generation {
        meta.insert("generation".into(), 1.into());
    }
}

/// Carries over what only the system sets.
pub fn carry(new: &mut Value, old: &Value) {
    for path in [
        "metadata.uid",
        "metadata.creationTimestamp",
        "metadata.deletionTimestamp",
        "metadata.deletionGracePeriodSeconds",
        "metadata.generation",
        "metadata.name",
        "metadata.namespace",
        "metadata.generateName",
    ] {
        if path != "metadata.generateName" || !value::has(new, path) {
            value::carry(new, old, path);
        }
    }
    value::remove(new, "metadata.selfLink");
}

/// Makes the namespace of the body agree with that of the path.
pub fn check_namespace(object: &mut Value, namespace: &str) -> Result<(), Status> {
    match value::text(object, "metadata.namespace") {
        "" if namespace.is_empty() => {
            value::remove(object, "metadata.namespace");
            Ok(())
        }
        "" => {
            value::set(object, "metadata.namespace", namespace);
            Ok(())
        }
        same if same == namespace => Ok(()),
        // Upstream drops the namespace of cluster-scoped objects without a word.
        _ if namespace.is_empty() => {
            value::remove(object, "metadata.namespace");
            Ok(())
        }
        _ => Err(Status::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        )),
    }
}

/// Drops empty maps and lists of metadata, which mean the same as absent ones.
pub fn tidy(object: &mut Value) {
    for key in ["labels", "annotations", "finalizers", "ownerReferences"] {
        let path = format!("metadata.{key}");
        let empty = match value::at(object, &path) {
            Some(Value::Object(m)) => m.is_empty(),
            Some(Value::Array(a)) => a.is_empty(),
            _ => false,
        };
        if empty {
            value::remove(object, &path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_never_lies_in_the_future() {
        for (time, stamped) in [
            ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z"),
            ("2026-01-01T00:00:05.999999999Z", "2026-01-01T00:00:05Z"),
            ("1969-12-31T23:59:58.5Z", "1969-12-31T23:59:58Z"),
        ] {
            assert_eq!(stamp(time.parse().unwrap()), stamped);
        }
    }
}
