//! DefaultTolerationSeconds: a pod stays five minutes on a node that is not ready or unreachable, unless it says otherwise.

use serde_json::{Value, json};

use super::{items, list_mut, text};
use crate::registry::Attributes;

const TAINTS: [&str; 2] = ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"];
const SECONDS: i64 = 300;

pub(super) fn admit(a: &mut Attributes) {
    if let Some(pod) = &mut a.object {
        add(pod);
    }
}

fn add(pod: &mut Value) {
    for taint in TAINTS {
        let tolerated = items(pod, "/spec/tolerations").any(|t| {
            let key = text(t, "/key");
            (key.is_empty() || key == taint) && matches!(text(t, "/effect"), "" | "NoExecute")
        });
        if !tolerated {
            let toleration = json!({"key": taint, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": SECONDS});
            list_mut(&mut pod["spec"], "tolerations").push(toleration);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tolerations_are_added_once() {
        let mut pod = json!({"spec": {"tolerations": [{"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 1}]}});
        add(&mut pod);
        assert_eq!(pod["spec"]["tolerations"].as_array().unwrap().len(), 2);
        add(&mut pod);
        assert_eq!(pod["spec"]["tolerations"].as_array().unwrap().len(), 2);
        let mut all = json!({"spec": {"tolerations": [{"operator": "Exists"}]}});
        add(&mut all);
        assert_eq!(all["spec"]["tolerations"].as_array().unwrap().len(), 1);
    }
}
