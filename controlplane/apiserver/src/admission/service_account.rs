//! ServiceAccount: pods get an account, the account's pull secrets and the projected token volume kube-api-access-xxxxx.

use std::time::Duration;

use rand::Rng;
use serde_json::{Value, json};

use super::{Context, forbidden, is_mirror, items, list_mut, text};
use crate::registry::Attributes;
use crate::status::Status;

const MOUNT_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const VOLUME_PREFIX: &str = "kube-api-access-";
/// The default account of a fresh namespace is made by a controller, which may need a moment.
const DEFAULT_PATIENCE: Duration = Duration::from_millis(1500);
const RETRY: Duration = Duration::from_millis(25);
/// Upstream's alphabet for generated names: no vowels, so that no words come out.
const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

async fn account(c: &Context, a: &Attributes, name: &str) -> Result<Value, Status> {
    let started = tokio::time::Instant::now();
    loop {
        match c.registry.get("", "serviceaccounts", &a.info.namespace, name).await {
            Ok(account) => return Ok(account),
            Err(e) if e.is_not_found() && name == "default" && started.elapsed() < DEFAULT_PATIENCE => {
                tokio::time::sleep(RETRY).await;
            }
            Err(e) => {
                let namespace = &a.info.namespace;
                let why = format!("error looking up service account {namespace}/{name}: {}", e.message);
                return Err(forbidden(a, why));
            }
        }
    }
}

pub(super) async fn admit(c: &Context, a: &mut Attributes) -> Result<(), Status> {
    let Some(pod) = &mut a.object else { return Ok(()) };
    if is_mirror(pod) {
        return Ok(());
    }
    if text(pod, "/spec/serviceAccountName").is_empty() {
        pod["spec"]["serviceAccountName"] = json!("default");
    }
    let name = text(pod, "/spec/serviceAccountName").to_owned();
    // The old name of the field is kept for old clients.
    pod["spec"]["serviceAccount"] = json!(name);
    let account = account(c, a, &name).await?;
    if let Some(pod) = &mut a.object {
        equip(pod, &account, &suffix());
    }
    Ok(())
}

fn suffix() -> String {
    let mut rng = rand::rng();
    (0..5).map(|_| ALPHABET[rng.random_range(0..ALPHABET.len())] as char).collect()
}

/// Gives the pod what its account brings: token volume and pull secrets.
fn equip(pod: &mut Value, account: &Value, suffix: &str) {
    let wish = |v: &Value, pointer: &str| v.pointer(pointer).and_then(Value::as_bool);
    let automount = wish(pod, "/spec/automountServiceAccountToken")
        .or_else(|| wish(account, "/automountServiceAccountToken"))
        .unwrap_or(true);
    if automount {
        mount_token(pod, suffix);
    }
    let pulls: Vec<Value> = items(account, "/imagePullSecrets").map(|s| json!({"name": s["name"]})).collect();
    if items(pod, "/spec/imagePullSecrets").next().is_none() && !pulls.is_empty() {
        pod["spec"]["imagePullSecrets"] = Value::Array(pulls);
    }
}

fn mount_token(pod: &mut Value, suffix: &str) {
    let existing = items(pod, "/spec/volumes")
        .map(|v| text(v, "/name"))
        .find(|n| n.starts_with(VOLUME_PREFIX))
        .map(str::to_owned);
    let volume = existing.clone().unwrap_or_else(|| format!("{VOLUME_PREFIX}{suffix}"));
    let mut needed = false;
    for list in ["initContainers", "containers"] {
        let Some(containers) = pod["spec"].get_mut(list).and_then(Value::as_array_mut) else { continue };
        for container in containers {
            // A mount of one's own at this place stands for "no token here".
            if items(container, "/volumeMounts").any(|m| text(m, "/mountPath") == MOUNT_PATH) {
                continue;
            }
            let mount = json!({"name": volume, "readOnly": true, "mountPath": MOUNT_PATH});
            list_mut(container, "volumeMounts").push(mount);
            needed = true;
        }
    }
    if needed && existing.is_none() {
        list_mut(&mut pod["spec"], "volumes").push(json!({"name": volume, "projected": {"defaultMode": 0o644, "sources": [
            {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
            {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}},
        ]}}));
    }
}

pub(super) async fn validate(c: &Context, a: &Attributes) -> Result<(), Status> {
    let Some(pod) = &a.object else { return Ok(()) };
    let name = text(pod, "/spec/serviceAccountName");
    if is_mirror(pod) {
        return match mirror_fault(pod) {
            Some(why) => Err(forbidden(a, why)),
            None => Ok(()),
        };
    }
    if name.is_empty() {
        let pod_name = text(pod, "/metadata/name");
        return Err(forbidden(
            a,
            format!("no service account specified for pod {}/{pod_name}", a.info.namespace),
        ));
    }
    account(c, a, name).await.map(|_| ())
}

/// What a mirror pod may not refer to.
fn mirror_fault(pod: &Value) -> Option<&'static str> {
    use crate::authz::node::{Kind, references};
    let references = references(pod);
    if references.iter().any(|(k, _)| *k == Kind::ServiceAccount) {
        return Some("a mirror pod may not reference service accounts");
    }
    if references.iter().any(|(k, _)| *k == Kind::Secret) {
        return Some("a mirror pod may not reference secrets");
    }
    let token = items(pod, "/spec/volumes")
        .any(|v| items(v, "/projected/sources").any(|s| s.get("serviceAccountToken").is_some()));
    token.then_some("a mirror pod may not use ServiceAccountToken volume projections")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_volume_goes_to_each_container_without_one() {
        let mut pod = json!({"spec": {"containers": [{"name": "a"}, {"name": "b", "volumeMounts": [{"name": "x", "mountPath": MOUNT_PATH}]}],
            "initContainers": [{"name": "i"}]}});
        equip(&mut pod, &json!({"imagePullSecrets": [{"name": "p"}]}), "abcde");
        assert_eq!(pod["spec"]["volumes"][0]["name"], "kube-api-access-abcde");
        assert_eq!(pod["spec"]["volumes"][0]["projected"]["sources"].as_array().unwrap().len(), 3);
        assert_eq!(pod["spec"]["containers"][0]["volumeMounts"][0]["mountPath"], MOUNT_PATH);
        assert_eq!(pod["spec"]["containers"][1]["volumeMounts"].as_array().unwrap().len(), 1);
        assert_eq!(pod["spec"]["initContainers"][0]["volumeMounts"][0]["readOnly"], true);
        assert_eq!(pod["spec"]["imagePullSecrets"], json!([{"name": "p"}]));
        let before = pod.clone();
        equip(&mut pod, &json!({}), "other");
        assert_eq!(pod, before, "a second run changes nothing");
    }

    #[test]
    fn wishes_against_the_token() {
        for (pod_wish, account_wish, want) in [
            (None, None, true),
            (Some(false), None, false),
            (None, Some(false), false),
            (Some(true), Some(false), true),
        ] {
            let mut pod = json!({"spec": {"containers": [{"name": "a"}]}});
            if let Some(w) = pod_wish {
                pod["spec"]["automountServiceAccountToken"] = json!(w);
            }
            let account = account_wish.map_or(json!({}), |w| json!({"automountServiceAccountToken": w}));
            equip(&mut pod, &account, "abcde");
            assert_eq!(pod["spec"].get("volumes").is_some(), want, "{pod_wish:?} {account_wish:?}");
        }
    }

    #[test]
    fn mirror_pods_refer_to_nothing() {
        assert_eq!(mirror_fault(&json!({"spec": {}})), None);
        assert!(mirror_fault(&json!({"spec": {"serviceAccountName": "a"}})).is_some());
        assert!(mirror_fault(&json!({"spec": {"volumes": [{"secret": {"secretName": "s"}}]}})).is_some());
        let token = json!({"spec": {"volumes": [{"projected": {"sources": [{"serviceAccountToken": {}}]}}]}});
        assert!(mirror_fault(&token).is_some());
    }
}
