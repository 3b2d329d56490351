//! DefaultStorageClass: a claim that names no class gets the newest default class.

use serde_json::{Value, json};

use super::{Context, text};
use crate::registry::Attributes;
use crate::status::Status;

pub(super) async fn admit(c: &Context, a: &mut Attributes) -> Result<(), Status> {
    let Some(claim) = &mut a.object else { return Ok(()) };
    // An empty name is a statement: no class.
    let named = claim.pointer("/spec/storageClassName").is_some_and(|v| !v.is_null())
        || claim.pointer("/metadata/annotations/volume.beta.kubernetes.io~1storage-class").is_some();
    if named {
        return Ok(());
    }
    let classes = match c.registry.list("storage.k8s.io", "storageclasses", "").await {
        Ok(classes) => classes,
        Err(e) if e.is_not_found() => return Ok(()),
        Err(e) => return Err(e),
    };
    if let Some(class) = default_of(&classes) {
        claim["spec"]["storageClassName"] = json!(class);
    }
    Ok(())
}

fn default_of(classes: &[Value]) -> Option<&str> {
    let marked = |c: &&Value| {
        ["storageclass.kubernetes.io~1is-default-class", "storageclass.beta.kubernetes.io~1is-default-class"]
            .iter()
            .any(|key| text(c, &format!("/metadata/annotations/{key}")) == "true")
    };
    // RFC 3339 in UTC sorts as text; among equals the first name wins.
    let key = |c: &&Value| {
        (
            text(c, "/metadata/creationTimestamp").to_owned(),
            std::cmp::Reverse(text(c, "/metadata/name").to_owned()),
        )
    };
    classes.iter().filter(marked).max_by_key(key).map(|c| text(c, "/metadata/name"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_default_wins() {
        let class = |name: &str, created: &str, default: &str| {
            json!({"metadata": {"name": name, "creationTimestamp": created,
                "annotations": {"storageclass.kubernetes.io/is-default-class": default}}})
        };
        let all = [
            class("a", "2026-01-01T00:00:00Z", "true"),
            class("b", "2026-02-01T00:00:00Z", "true"),
            class("c", "2026-03-01T00:00:00Z", "false"),
        ];
        assert_eq!(default_of(&all), Some("b"));
        assert_eq!(default_of(&all[2..]), None);
    }
}
