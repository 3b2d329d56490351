//! Field errors in upstream's wording, and the checks that every kind shares.

use serde_json::Value;

use crate::{status::Cause, value};

pub mod meta;
pub mod names;

/// Collects what is wrong with an object.
#[derive(Debug, Default)]
pub struct Errors {
    causes: Vec<Cause>,
}

impl Errors {
    /// No error so far.
    pub fn is_empty(&self) -> bool {
        self.causes.is_empty()
    }

    /// All causes, in the order found.
    pub fn into_causes(self) -> Vec<Cause> {
        self.causes
    }

    fn push(&mut self, reason: &str, field: &str, message: String) {
        self.causes.push(Cause { reason: reason.into(), message, field: field.into() });
    }

    /// A field that must be there is not. `detail` may be empty.
    pub fn required(&mut self, field: &str, detail: &str) {
        let colon = if detail.is_empty() { "" } else { ": " };
        self.push("FieldValueRequired", field, format!("Required value{colon}{detail}"));
    }

    /// A value breaks a rule.
    pub fn invalid(&mut self, field: &str, value: &Value, detail: &str) {
        self.push("FieldValueInvalid", field, format!("Invalid value: {}: {detail}", shown(value)));
    }

    /// A value is none of the allowed ones.
    pub fn not_supported(&mut self, field: &str, value: &Value, allowed: &[&str]) {
        let list: Vec<String> = allowed.iter().map(|a| format!("{a:?}")).collect();
        let message = format!("Unsupported value: {}: supported values: {}", shown(value), list.join(", "));
        self.push("FieldValueNotSupported", field, message);
    }

    /// A value that must be unique is there twice.
    pub fn duplicate(&mut self, field: &str, value: &Value) {
        self.push("FieldValueDuplicate", field, format!("Duplicate value: {}", shown(value)));
    }

    /// Nothing may be here.
    pub fn forbidden(&mut self, field: &str, detail: &str) {
        self.push("FieldValueForbidden", field, format!("Forbidden: {detail}"));
    }

    /// The thing named does not exist.
    pub fn not_found(&mut self, field: &str, value: &Value) {
        self.push("FieldValueNotFound", field, format!("Not found: {}", shown(value)));
    }

    /// A text or map is too long.
    pub fn too_long(&mut self, field: &str, limit: usize) {
        self.push("FieldValueTooLong", field, format!("Too long: may not be more than {limit} bytes"));
    }

    /// Requires the field to be unchanged.
    pub fn immutable(&mut self, new: &Value, old: &Value, path: &str) {
        let (n, o) = (value::at(new, path), value::at(old, path));
        if n != o {
            self.invalid(path, n.unwrap_or(&Value::Null), "field is immutable");
        }
    }

    /// Requires the value at `path` to be one of `allowed`; absence is fine.
    pub fn one_of(&mut self, object: &Value, path: &str, allowed: &[&str]) {
        if let Some(v) = value::at(object, path)
            && !v.as_str().is_some_and(|s| allowed.contains(&s))
        {
            self.not_supported(path, v, allowed);
        }
    }

    /// Requires the number at `path`, if any, not to be negative.
    pub fn not_negative(&mut self, object: &Value, path: &str) {
        if let Some(n) = value::int(object, path)
            && n < 0
        {
            self.invalid(path, &Value::from(n), "must be greater than or equal to 0");
        }
    }

    /// Applies a check that returns what is wrong with a text.
    pub fn check(&mut self, field: &str, text: &str, problems: Vec<String>) {
        for problem in problems {
            self.invalid(field, &Value::from(text), &problem);
        }
    }
}

/// A value as messages show it.
fn shown(v: &Value) -> String {
    match v {
        Value::Null => "null".into(),
        Value::String(s) => format!("{s:?}"),
        other => other.to_string(),
    }
}

/// A label selector (`matchLabels`, `matchExpressions`) at `path`.
pub fn label_selector(object: &Value, path: &str, errors: &mut Errors) {
    let Some(selector) = value::at(object, path) else { return };
    for (k, v) in value::map(selector, "matchLabels").into_iter().flatten() {
        errors.check(&format!("{path}.matchLabels"), k, names::qualified_name(k));
        let v = v.as_str().unwrap_or("");
        errors.check(&format!("{path}.matchLabels"), v, names::label_value(v));
    }
    for (i, e) in value::list(selector, "matchExpressions").iter().enumerate() {
        let at = format!("{path}.matchExpressions[{i}]");
        let key = value::text(e, "key");
        errors.check(&format!("{at}.key"), key, names::qualified_name(key));
        let values = value::list(e, "values");
        match value::text(e, "operator") {
            "In" | "NotIn" if values.is_empty() => {
                errors.required(
                    &format!("{at}.values"),
                    "must be specified when `operator` is 'In' or 'NotIn'",
                );
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                errors.forbidden(
                    &format!("{at}.values"),
                    "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
                );
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            other => {
                errors.invalid(&format!("{at}.operator"), &other.into(), "not a valid selector operator")
            }
        }
    }
}

/// Reads a label selector from JSON.
pub fn selector_of(v: &Value) -> Option<orlop_api::selector::Selector> {
    let typed = serde_json::from_value(v.clone()).ok()?;
    orlop_api::selector::Selector::from_label_selector(&typed).ok()
}

/// `spec.selector` must not be empty and must match the pod template's labels.
pub fn selector_matches_template(object: &Value, errors: &mut Errors) {
    match value::at(object, "spec.selector") {
        None => errors.required("spec.selector", ""),
        Some(selector) => {
            let before = errors.causes.len();
            label_selector(object, "spec.selector", errors);
            if selector.as_object().is_none_or(|s| s.is_empty()) {
                errors.invalid("spec.selector", selector, "empty selector is invalid for deployment");
            } else if errors.causes.len() == before
                && let Some(s) = selector_of(selector)
                && !s.matches(&value::string_map(object, "spec.template.metadata.labels"))
            {
                let labels =
                    value::at(object, "spec.template.metadata.labels").cloned().unwrap_or(Value::Null);
                errors.invalid(
                    "spec.template.metadata.labels",
                    &labels,
                    "`selector` does not match template `labels`",
                );
            }
        }
    }
}

/// A port number at `path`.
pub fn port(object: &Value, path: &str, shown_path: &str, errors: &mut Errors) {
    if let Some(n) = value::int(object, path)
        && !(1..=65535).contains(&n)
    {
        errors.invalid(shown_path, &n.into(), "must be between 1 and 65535, inclusive");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn messages() {
        let mut e = Errors::default();
        e.required("spec.a", "");
        e.not_supported("spec.b", &json!("x"), &["TCP", "UDP"]);
        e.invalid("spec.c", &json!(0), "must be between 1 and 65535, inclusive");
        let texts: Vec<String> =
            e.into_causes().into_iter().map(|c| format!("{}: {}", c.field, c.message)).collect();
        assert_eq!(
            texts,
            [
                "spec.a: Required value",
                "spec.b: Unsupported value: \"x\": supported values: \"TCP\", \"UDP\"",
                "spec.c: Invalid value: 0: must be between 1 and 65535, inclusive",
            ]
        );
    }

    #[test]
    fn template_must_match_selector() {
        let mut e = Errors::default();
        let ok = json!({"spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b", "c": "d"}}}}});
        selector_matches_template(&ok, &mut e);
        assert!(e.is_empty());
        let bad = json!({"spec": {"selector": {"matchLabels": {"a": "x"}}, "template": {"metadata": {"labels": {"a": "b"}}}}});
        selector_matches_template(&bad, &mut e);
        assert_eq!(e.into_causes()[0].field, "spec.template.metadata.labels");
    }
}
