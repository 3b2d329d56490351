//! TaintNodesByCondition: a new node takes no pods until it has shown that it is ready.

use serde_json::{Value, json};

use super::{items, list_mut, text};
use crate::registry::Attributes;

const NOT_READY: &str = "node.kubernetes.io/not-ready";

pub(super) fn admit(a: &mut Attributes) {
    if let Some(node) = &mut a.object {
        taint(node);
    }
}

fn taint(node: &mut Value) {
    let has = items(node, "/spec/taints")
        .any(|t| text(t, "/key") == NOT_READY && text(t, "/effect") == "NoSchedule");
    if !has {
        if !node["spec"].is_object() {
            node["spec"] = json!({});
        }
        list_mut(&mut node["spec"], "taints").push(json!({"key": NOT_READY, "effect": "NoSchedule"}));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn once() {
        let mut node = json!({});
        taint(&mut node);
        taint(&mut node);
        assert_eq!(node["spec"]["taints"], json!([{"key": NOT_READY, "effect": "NoSchedule"}]));
    }
}
