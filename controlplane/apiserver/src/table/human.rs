//! Times and lists as people read them in tables.

use jiff::Timestamp;
use serde_json::Value;

use crate::value;

/// The time since an RFC 3339 time stamp, short.
pub fn age(stamp: &str) -> String {
    match stamp.parse::<Timestamp>() {
        Ok(t) => duration(Timestamp::now().as_second() - t.as_second()),
        Err(_) => "<unknown>".into(),
    }
}

/// The time between two stamps; `to` may be empty for now.
pub fn between(from: &str, to: &str) -> String {
    let Ok(start) = from.parse::<Timestamp>() else { return String::new() };
    let end = to.parse::<Timestamp>().unwrap_or_else(|_| Timestamp::now());
    duration(end.as_second() - start.as_second())
}

/// Seconds in at most two units, as kubectl shows ages.
pub fn duration(seconds: i64) -> String {
    const MINUTE: i64 = 60;
    const HOUR: i64 = 60 * MINUTE;
    const DAY: i64 = 24 * HOUR;
    const YEAR: i64 = 365 * DAY;
    let two = |big: i64, unit: &str, small: i64, small_unit: &str| {
        if small == 0 { format!("{big}{unit}") } else { format!("{big}{unit}{small}{small_unit}") }
    };
    match seconds {
        s if s < -1 => "<invalid>".into(),
        s if s < 0 => "0s".into(),
        s if s < 2 * MINUTE => format!("{s}s"),
        s if s < 10 * MINUTE => two(s / MINUTE, "m", s % MINUTE, "s"),
        s if s < 3 * HOUR => format!("{}m", s / MINUTE),
        s if s < 8 * HOUR => two(s / HOUR, "h", s % HOUR / MINUTE, "m"),
        s if s < 2 * DAY => format!("{}h", s / HOUR),
        s if s < 8 * DAY => two(s / DAY, "d", s % DAY / HOUR, "h"),
        s if s < 2 * YEAR => format!("{}d", s / DAY),
        s if s < 8 * YEAR => two(s / YEAR, "y", s % YEAR / DAY, "d"),
        s => format!("{}y", s / YEAR),
    }
}

/// A text, or `<none>`.
pub fn or_none(text: &str) -> Value {
    Value::from(if text.is_empty() { "<none>" } else { text })
}

/// Labels of a map as `a=b,c=d`, or `<none>`.
pub fn labels(v: &Value, path: &str) -> Value {
    let parts: Vec<String> = value::string_map(v, path).iter().map(|(k, v)| format!("{k}={v}")).collect();
    or_none(&parts.join(","))
}

/// A label selector as kubectl prints it, or `<none>`.
pub fn selector(v: &Value, path: &str) -> Value {
    let mut parts: Vec<String> = value::string_map(v, &format!("{path}.matchLabels"))
        .iter()
        .map(|(k, v)| format!("{k}={v}"))
        .collect();
    for e in value::list(v, &format!("{path}.matchExpressions")) {
        let key = value::text(e, "key");
        let mut values: Vec<&str> = value::list(e, "values").iter().filter_map(Value::as_str).collect();
        values.sort_unstable();
        let values = values.join(",");
        parts.push(match value::text(e, "operator") {
            "In" => format!("{key} in ({values})"),
            "NotIn" => format!("{key} notin ({values})"),
            "Exists" => key.to_owned(),
            _ => format!("!{key}"),
        });
    }
    or_none(&parts.join(","))
}

/// Names and images of containers at a path.
pub fn containers(v: &Value, path: &str) -> (Value, Value) {
    let pick = |field: &str| -> String {
        value::list(v, path).iter().map(|c| value::text(c, field)).collect::<Vec<_>>().join(",")
    };
    (pick("name").into(), pick("image").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (s, want) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (150, "2m30s"),
            (3599, "59m"),
            (4 * 3600 + 60, "4h1m"),
            (3 * 86400, "3d"),
            (3 * 86400 + 3600, "3d1h"),
            (400 * 86400, "400d"),
        ] {
            assert_eq!(duration(s), want, "{s}");
        }
    }
}
