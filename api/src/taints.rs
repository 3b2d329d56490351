//! Taints and tolerations.

use k8s_openapi::api::core::v1::{Taint, Toleration};

/// The taint that a node carries until it is Ready.
pub const NOT_READY: &str = "node.kubernetes.io/not-ready";
/// The taint of a node that nobody has heard of for too long.
pub const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
/// The taint of a cordoned node.
pub const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";

/// Whether a toleration covers a taint: an empty effect covers all effects, an empty key with Exists all taints.
pub fn tolerates(t: &Toleration, taint: &Taint) -> bool {
    let key = t.key.as_deref().unwrap_or_default();
    let exists = t.operator.as_deref() == Some("Exists");
    let effect_ok = t.effect.as_deref().is_none_or(|e| e.is_empty() || e == taint.effect);
    let key_ok = key == taint.key || (key.is_empty() && exists);
    let value_ok =
        exists || t.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default();
    effect_ok && key_ok && value_ok
}

/// The first taint with one of `effects` that nothing tolerates.
pub fn untolerated<'a>(
    taints: &'a [Taint],
    tolerations: &[Toleration],
    effects: &[&str],
) -> Option<&'a Taint> {
    taints
        .iter()
        .filter(|t| effects.contains(&t.effect.as_str()))
        .find(|taint| !tolerations.iter().any(|t| tolerates(t, taint)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tol(key: &str, op: &str, value: &str, effect: &str) -> Toleration {
        let s = |v: &str| (!v.is_empty()).then(|| v.to_owned());
        Toleration { key: s(key), operator: s(op), value: s(value), effect: s(effect), ..Default::default() }
    }

    #[test]
    fn table() {
        let taint = Taint {
            key: "k".into(),
            value: Some("v".into()),
            effect: "NoSchedule".into(),
            ..Default::default()
        };
        for (t, want) in [
            (tol("k", "", "v", "NoSchedule"), true),
            (tol("k", "Equal", "w", ""), false),
            (tol("k", "Exists", "", ""), true),
            (tol("", "Exists", "", ""), true),
            (tol("", "Exists", "", "NoExecute"), false),
            (tol("x", "Exists", "", ""), false),
        ] {
            assert_eq!(tolerates(&t, &taint), want, "{t:?}");
        }
    }
}
