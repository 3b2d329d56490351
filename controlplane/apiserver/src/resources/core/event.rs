//! Events. `core/v1` is the stored form; `events.k8s.io/v1` names the same fields differently.

use serde_json::Value;

use crate::{
    resources::{Column, Conversion, Strategy, col, wide},
    table::human,
    value,
};

pub(in crate::resources) struct Event;

/// Stored name and the name in events.k8s.io.
const RENAMED: &[(&str, &str)] = &[
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("reportingComponent", "reportingController"),
];

/// Between the stored form and events.k8s.io/v1.
pub(in crate::resources) const EVENTS_CONVERSION: Conversion = Conversion {
    serve: |v| {
        rename(v, |(stored, served)| (stored, served));
        value::set(v, "apiVersion", "events.k8s.io/v1");
        value::default(v, "eventTime", Value::Null);
    },
    store: |v| rename(v, |(stored, served)| (served, stored)),
};

fn rename(v: &mut Value, direction: impl Fn((&'static str, &'static str)) -> (&'static str, &'static str)) {
    for pair in RENAMED {
        let (from, to) = direction(*pair);
        if let Some(field) = value::remove(v, from) {
            value::set(v, to, field);
        }
    }
}

impl Strategy for Event {
    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[
            col("Last Seen"),
            col("Type"),
            col("Reason"),
            col("Object"),
            wide("Subobject"),
            wide("Source"),
            col("Message"),
            wide("First Seen"),
            wide("Count"),
            wide("Name"),
        ];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let o = if object.get("regarding").is_some() {
            let mut stored = object.clone();
            (EVENTS_CONVERSION.store)(&mut stored);
            std::borrow::Cow::Owned(stored)
        } else {
            std::borrow::Cow::Borrowed(object)
        };
        let time = |path: &str| {
            let stamps = [
                value::text(&o, path),
                value::text(&o, "eventTime"),
                value::text(&o, "metadata.creationTimestamp"),
            ];
            let first = stamps.into_iter().find(|s| !s.is_empty());
            first.map_or_else(|| "<unknown>".to_owned(), human::age)
        };
        let last = match value::text(&o, "series.lastObservedTime") {
            "" => time("lastTimestamp"),
            at => human::age(at),
        };
        let target = format!(
            "{}/{}",
            value::text(&o, "involvedObject.kind").to_lowercase(),
            value::text(&o, "involvedObject.name")
        );
        let mut source = value::text(&o, "source.component").to_owned();
        if source.is_empty() {
            source = value::text(&o, "reportingComponent").to_owned();
        }
        let host = value::text(&o, "source.host");
        if !host.is_empty() {
            source = format!("{source}, {host}");
        }
        let count = value::int(&o, "series.count").or(value::int(&o, "count")).unwrap_or(1).max(1);
        vec![
            last.into(),
            value::text(&o, "type").into(),
            value::text(&o, "reason").into(),
            target.into(),
            value::text(&o, "involvedObject.fieldPath").into(),
            source.into(),
            value::text(&o, "message").trim().into(),
            time("firstTimestamp").into(),
            count.to_string().into(),
            value::text(&o, "metadata.name").into(),
        ]
    }

    fn shows_age(&self) -> bool {
        false
    }

    fn shows_name(&self) -> bool {
        false
    }

    fn selectable(&self) -> &'static [&'static str] {
        &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "source",
            "type",
            "regarding.kind",
            "regarding.namespace",
            "regarding.name",
            "regarding.uid",
            "regarding.apiVersion",
            "regarding.resourceVersion",
            "regarding.fieldPath",
            "reportingController",
        ]
    }

    fn select(&self, object: &Value, path: &str) -> String {
        let path = path.replace("regarding.", "involvedObject.");
        match path.as_str() {
            "source" if value::text(object, "source.component").is_empty() => {
                value::text(object, "reportingComponent").to_owned()
            }
            "source" => value::text(object, "source.component").to_owned(),
            "reportingController" => value::text(object, "reportingComponent").to_owned(),
            path => value::text(object, path).to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_select_by_their_own_field_names() {
        let stored =
            serde_json::json!({"involvedObject": {"name": "p", "fieldPath": "f"}, "reportingComponent": "c"});
        for (path, wanted) in [
            ("involvedObject.name", "p"),
            ("regarding.name", "p"),
            ("regarding.fieldPath", "f"),
            ("reportingComponent", "c"),
            ("reportingController", "c"),
            ("source", "c"),
        ] {
            assert!(Event.selectable().contains(&path), "{path}");
            assert_eq!(Event.select(&stored, path), wanted, "{path}");
        }
    }
}
