//! Which AppArmor profile a container is to have (KEP-24). Pure.

use k8s_openapi::api::core::v1::{AppArmorProfile, Container, Pod};

/// Before Kubernetes 1.30 profiles were named by annotations, one per container. Static pods may still have them.
const ANNOTATION: &str = "container.apparmor.security.beta.kubernetes.io/";

fn of_annotation(value: &str) -> Option<AppArmorProfile> {
    let (kind, name) = match value {
        "runtime/default" => ("RuntimeDefault", None),
        "unconfined" => ("Unconfined", None),
        _ => ("Localhost", Some(value.strip_prefix("localhost/")?.to_owned())),
    };
    Some(AppArmorProfile { type_: kind.to_owned(), localhost_profile: name })
}

/// The container's own, then the annotation's, then the pod's.
pub fn profile(pod: &Pod, c: &Container) -> Option<AppArmorProfile> {
    let own = c.security_context.as_ref().and_then(|s| s.app_armor_profile.clone());
    let annotated = || {
        let all = pod.metadata.annotations.as_ref()?;
        of_annotation(all.get(&format!("{ANNOTATION}{}", c.name))?)
    };
    let of_pod = || pod.spec.as_ref()?.security_context.as_ref()?.app_armor_profile.clone();
    own.or_else(annotated).or_else(of_pod)
}

fn containers(pod: &Pod) -> impl Iterator<Item = &Container> {
    // Ephemeral ones come later than the question whether the pod fits this node.
    pod.spec.iter().flat_map(|s| s.containers.iter().chain(s.init_containers.iter().flatten()))
}

/// Why a node cannot run the pod, as upstream says it. `enabled`: whether the kernel has AppArmor.
pub fn refusal(pod: &Pod, enabled: bool) -> Option<String> {
    let confined: Vec<AppArmorProfile> =
        containers(pod).filter_map(|c| profile(pod, c)).filter(|p| p.type_ != "Unconfined").collect();
    if confined.is_empty() {
        return None;
    }
    if !enabled {
        return Some("Cannot enforce AppArmor: AppArmor is not enabled on the host".into());
    }
    let nameless = |p: &AppArmorProfile| {
        p.type_ == "Localhost" && p.localhost_profile.as_deref().unwrap_or_default().trim().is_empty()
    };
    confined
        .iter()
        .any(nameless)
        .then(|| "Cannot enforce AppArmor: a Localhost profile needs the profile's name".into())
}

/// Whether the kernel has AppArmor.
pub fn is_enabled() -> bool {
    std::fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|s| s.trim() == "Y")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(annotation: Option<&str>, of_pod: Value, own: Value) -> Pod {
        let annotations = annotation.map(|a| json!({format!("{ANNOTATION}c"): a})).unwrap_or(json!({}));
        serde_json::from_value(json!({"metadata": {"annotations": annotations}, "spec": {
            "securityContext": {"appArmorProfile": of_pod},
            "containers": [{"name": "c", "securityContext": {"appArmorProfile": own}}]}}))
        .unwrap()
    }

    fn of(p: &Pod) -> Option<(String, Option<String>)> {
        profile(p, &p.spec.as_ref().unwrap().containers[0]).map(|p| (p.type_, p.localhost_profile))
    }

    #[test]
    fn the_nearest_profile_counts() {
        let (default, none) = (json!({"type": "RuntimeDefault"}), Value::Null);
        let local = json!({"type": "Localhost", "localhostProfile": "mine"});
        let mine = Some(("Localhost".to_owned(), Some("mine".to_owned())));
        assert_eq!(of(&pod(Some("unconfined"), default.clone(), local.clone())), mine);
        assert_eq!(of(&pod(Some("localhost/mine"), default.clone(), none.clone())), mine);
        assert_eq!(of(&pod(None, local.clone(), none.clone())), mine);
        assert_eq!(of(&pod(Some("odd"), local, none.clone())), mine, "an annotation without meaning");
        assert_eq!(
            of(&pod(Some("runtime/default"), none.clone(), none.clone())),
            Some(("RuntimeDefault".to_owned(), None))
        );
        assert_eq!(of(&pod(None, none.clone(), none)), None);
    }

    #[test]
    fn pods_that_a_node_cannot_confine_are_refused() {
        let none = Value::Null;
        let unconfined = pod(None, json!({"type": "Unconfined"}), none.clone());
        let confined = pod(None, none.clone(), json!({"type": "RuntimeDefault"}));
        let nameless = pod(Some("localhost/"), none.clone(), none.clone());
        assert_eq!(refusal(&unconfined, false), None);
        assert!(refusal(&confined, false).is_some_and(|m| m.contains("not enabled on the host")));
        assert_eq!(refusal(&confined, true), None);
        assert!(refusal(&nameless, true).is_some_and(|m| m.contains("name")));
    }
}
