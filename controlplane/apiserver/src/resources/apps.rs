//! apps/v1 and core's ReplicationController.

use serde_json::{Value, json};

use super::{
    Column, Plain, Resource, Strategy, col, num,
    pod_template::{default_template, validate_template},
    wide,
};
use crate::{
    table::human,
    validation::{Errors, selector_matches_template},
    value,
};

pub(super) fn resources() -> Vec<Resource> {
    let v1 = "v1";
    vec![
        Resource::new("apps", v1, "ControllerRevision", "controllerrevisions", ControllerRevision),
        Resource::new("apps", v1, "DaemonSet", "daemonsets", DaemonSet)
            .short(&["ds"])
            .category(&["all"])
            .with_status()
            .generation(),
        Resource::new("apps", v1, "Deployment", "deployments", Deployment)
            .short(&["deploy"])
            .category(&["all"])
            .with_status()
            .generation()
            .scaled("spec.selector"),
        Resource::new("apps", v1, "ReplicaSet", "replicasets", ReplicaSet)
            .short(&["rs"])
            .category(&["all"])
            .with_status()
            .generation()
            .scaled("spec.selector"),
        Resource::new("apps", v1, "StatefulSet", "statefulsets", StatefulSet)
            .short(&["sts"])
            .category(&["all"])
            .with_status()
            .generation()
            .scaled("spec.selector"),
    ]
}

const ALWAYS: &[&str] = &["Always"];

fn int(object: &Value, path: &str) -> Value {
    value::int(object, path).unwrap_or(0).into()
}

/// Containers, images and selector: the wide columns of everything with a pod template.
fn template_cells(object: &Value) -> [Value; 3] {
    let (names, images) = human::containers(object, "spec.template.spec.containers");
    [names, images, human::selector(object, "spec.selector")]
}

fn immutable_selector(new: &Value, old: &Value, errors: &mut Errors) {
    errors.immutable(new, old, "spec.selector");
}

struct Deployment;

impl Strategy for Deployment {
    fn defaults(&self, object: &mut Value) {
        value::default(object, "spec.replicas", 1);
        value::default_text(object, "spec.strategy.type", "RollingUpdate");
        if value::text(object, "spec.strategy.type") == "RollingUpdate" {
            value::default(object, "spec.strategy.rollingUpdate.maxUnavailable", "25%");
            value::default(object, "spec.strategy.rollingUpdate.maxSurge", "25%");
        }
        value::default(object, "spec.revisionHistoryLimit", 10);
        value::default(object, "spec.progressDeadlineSeconds", 600);
        default_template(object, "spec.template");
    }

    fn validate(&self, object: &Value, errors: &mut Errors) {
        errors.not_negative(object, "spec.replicas");
        errors.not_negative(object, "spec.minReadySeconds");
        errors.not_negative(object, "spec.revisionHistoryLimit");
        selector_matches_template(object, errors);
        validate_template(object, "spec.template", ALWAYS, errors);
        errors.one_of(object, "spec.strategy.type", &["Recreate", "RollingUpdate"]);
        if value::text(object, "spec.strategy.type") == "Recreate"
            && value::has(object, "spec.strategy.rollingUpdate")
        {
            errors.forbidden(
                "spec.strategy.rollingUpdate",
                "may not be specified when strategy `type` is 'Recreate'",
            );
        }
        let zero = |path| matches!(value::at(object, path), Some(v) if *v == json!(0) || *v == json!("0%"));
        if zero("spec.strategy.rollingUpdate.maxUnavailable") && zero("spec.strategy.rollingUpdate.maxSurge")
        {
            errors.invalid(
                "spec.strategy.rollingUpdate.maxUnavailable",
                &json!(0),
                "may not be 0 when `maxSurge` is 0",
            );
        }
        let deadline = value::int(object, "spec.progressDeadlineSeconds").unwrap_or(600);
        if deadline <= value::int(object, "spec.minReadySeconds").unwrap_or(0) {
            errors.invalid(
                "spec.progressDeadlineSeconds",
                &deadline.into(),
                "must be greater than minReadySeconds",
            );
        }
    }

    fn validate_update(&self, new: &Value, old: &Value, errors: &mut Errors) {
        self.validate(new, errors);
        immutable_selector(new, old, errors);
    }

    fn generation_changes(&self, new: &Value, old: &Value) -> bool {
        // Annotations count here, because they are copied to ReplicaSets.
        new.get("spec") != old.get("spec")
            || value::at(new, "metadata.annotations") != value::at(old, "metadata.annotations")
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[
            col("Ready"),
            num("Up-to-date"),
            num("Available"),
            col("Age"),
            wide("Containers"),
            wide("Images"),
            wide("Selector"),
        ];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let ready = format!(
            "{}/{}",
            value::int(object, "status.readyReplicas").unwrap_or(0),
            value::int(object, "spec.replicas").unwrap_or(0)
        );
        let mut cells = vec![
            ready.into(),
            int(object, "status.updatedReplicas"),
            int(object, "status.availableReplicas"),
        ];
        cells.extend(template_cells(object));
        cells
    }
}

struct ReplicaSet;

impl Strategy for ReplicaSet {
    fn defaults(&self, object: &mut Value) {
        value::default(object, "spec.replicas", 1);
        default_template(object, "spec.template");
    }

    fn validate(&self, object: &Value, errors: &mut Errors) {
        errors.not_negative(object, "spec.replicas");
        errors.not_negative(object, "spec.minReadySeconds");
        selector_matches_template(object, errors);
        validate_template(object, "spec.template", ALWAYS, errors);
    }

    fn validate_update(&self, new: &Value, old: &Value, errors: &mut Errors) {
        self.validate(new, errors);
        immutable_selector(new, old, errors);
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[
            num("Desired"),
            num("Current"),
            num("Ready"),
            col("Age"),
            wide("Containers"),
            wide("Images"),
            wide("Selector"),
        ];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let mut cells = vec![
            int(object, "spec.replicas"),
            int(object, "status.replicas"),
            int(object, "status.readyReplicas"),
        ];
        cells.extend(template_cells(object));
        cells
    }

    fn selectable(&self) -> &'static [&'static str] {
        &["status.replicas"]
    }

    fn select(&self, object: &Value, path: &str) -> String {
        value::int(object, path).unwrap_or(0).to_string()
    }
}

/// core/v1 ReplicationController: its selector is a plain map of labels.
pub(super) struct ReplicationController;

impl Strategy for ReplicationController {
    fn defaults(&self, object: &mut Value) {
        value::default(object, "spec.replicas", 1);
        let labels = value::at(object, "spec.template.metadata.labels").cloned();
        if let Some(labels) = labels {
            value::default(object, "spec.selector", labels.clone());
            value::default(object, "metadata.labels", labels);
        }
        default_template(object, "spec.template");
    }

    fn validate(&self, object: &Value, errors: &mut Errors) {
        errors.not_negative(object, "spec.replicas");
        let selector = value::string_map(object, "spec.selector");
        let labels = value::string_map(object, "spec.template.metadata.labels");
        if selector.is_empty() {
            errors.required("spec.selector", "");
        } else if !selector.iter().all(|(k, v)| labels.get(k) == Some(v)) {
            let shown = value::at(object, "spec.template.metadata.labels").cloned().unwrap_or_default();
            errors.invalid(
                "spec.template.metadata.labels",
                &shown,
                "`selector` does not match template `labels`",
            );
        }
        validate_template(object, "spec.template", ALWAYS, errors);
    }

    fn orphans_by_default(&self) -> bool {
        true
    }

    fn columns(&self) -> &'static [Column] {
        ReplicaSet.columns()
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let mut cells = vec![
            int(object, "spec.replicas"),
            int(object, "status.replicas"),
            int(object, "status.readyReplicas"),
        ];
        let (names, images) = human::containers(object, "spec.template.spec.containers");
        cells.extend([names, images, human::labels(object, "spec.selector")]);
        cells
    }

    fn selectable(&self) -> &'static [&'static str] {
        &["status.replicas"]
    }

    fn select(&self, object: &Value, path: &str) -> String {
        value::int(object, path).unwrap_or(0).to_string()
    }
}

struct StatefulSet;

impl Strategy for StatefulSet {
    fn defaults(&self, object: &mut Value) {
        value::default(object, "spec.replicas", 1);
        value::default_text(object, "spec.podManagementPolicy", "OrderedReady");
        value::default_text(object, "spec.updateStrategy.type", "RollingUpdate");
        if value::text(object, "spec.updateStrategy.type") == "RollingUpdate" {
            value::default(object, "spec.updateStrategy.rollingUpdate.partition", 0);
        }
        value::default(object, "spec.revisionHistoryLimit", 10);
        value::default_text(object, "spec.persistentVolumeClaimRetentionPolicy.whenDeleted", "Retain");
        value::default_text(object, "spec.persistentVolumeClaimRetentionPolicy.whenScaled", "Retain");
        for claim in value::list_mut(object, "spec.volumeClaimTemplates") {
            value::default_text(claim, "apiVersion", "v1");
            value::default_text(claim, "kind", "PersistentVolumeClaim");
            value::default_text(claim, "spec.volumeMode", "Filesystem");
            value::default_text(claim, "status.phase", "Pending");
        }
        default_template(object, "spec.template");
    }

    fn validate(&self, object: &Value, errors: &mut Errors) {
        errors.not_negative(object, "spec.replicas");
        errors.one_of(object, "spec.podManagementPolicy", &["OrderedReady", "Parallel"]);
        errors.one_of(object, "spec.updateStrategy.type", &["OnDelete", "RollingUpdate"]);
        selector_matches_template(object, errors);
        validate_template(object, "spec.template", ALWAYS, errors);
    }

    fn validate_update(&self, new: &Value, old: &Value, errors: &mut Errors) {
        self.validate(new, errors);
        let fixed = |v: &Value| {
            let mut s = json!({"spec": v.get("spec").cloned().unwrap_or_default()});
            for path in [
                "replicas",
                "ordinals",
                "template",
                "updateStrategy",
                "persistentVolumeClaimRetentionPolicy",
                "minReadySeconds",
                "revisionHistoryLimit",
            ] {
                value::remove(&mut s, &format!("spec.{path}"));
            }
            s
        };
        if fixed(new) != fixed(old) {
            errors.forbidden(
                "spec",
                "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', \
                 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden",
            );
        }
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[col("Ready"), col("Age"), wide("Containers"), wide("Images")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let ready = format!(
            "{}/{}",
            value::int(object, "status.readyReplicas").unwrap_or(0),
            value::int(object, "spec.replicas").unwrap_or(0)
        );
        let [names, images, _] = template_cells(object);
        vec![ready.into(), names, images]
    }
}

struct DaemonSet;

impl Strategy for DaemonSet {
    fn defaults(&self, object: &mut Value) {
        value::default_text(object, "spec.updateStrategy.type", "RollingUpdate");
        if value::text(object, "spec.updateStrategy.type") == "RollingUpdate" {
            value::default(object, "spec.updateStrategy.rollingUpdate.maxUnavailable", 1);
            value::default(object, "spec.updateStrategy.rollingUpdate.maxSurge", 0);
        }
        value::default(object, "spec.revisionHistoryLimit", 10);
        default_template(object, "spec.template");
    }

    fn validate(&self, object: &Value, errors: &mut Errors) {
        errors.one_of(object, "spec.updateStrategy.type", &["OnDelete", "RollingUpdate"]);
        selector_matches_template(object, errors);
        validate_template(object, "spec.template", ALWAYS, errors);
    }

    fn validate_update(&self, new: &Value, old: &Value, errors: &mut Errors) {
        self.validate(new, errors);
        immutable_selector(new, old, errors);
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[
            num("Desired"),
            num("Current"),
            num("Ready"),
            num("Up-to-date"),
            num("Available"),
            col("Node Selector"),
            col("Age"),
            wide("Containers"),
            wide("Images"),
            wide("Selector"),
        ];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let mut cells = vec![
            int(object, "status.desiredNumberScheduled"),
            int(object, "status.currentNumberScheduled"),
            int(object, "status.numberReady"),
            int(object, "status.updatedNumberScheduled"),
            int(object, "status.numberAvailable"),
            human::labels(object, "spec.template.spec.nodeSelector"),
        ];
        cells.extend(template_cells(object));
        cells
    }
}

struct ControllerRevision;

impl Strategy for ControllerRevision {
    fn validate_update(&self, new: &Value, old: &Value, errors: &mut Errors) {
        Plain.validate_update(new, old, errors);
        errors.immutable(new, old, "data");
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[col("Controller"), num("Revision")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let owner =
            value::list(object, "metadata.ownerReferences").iter().find(|o| value::flag(o, "controller"));
        let controller = owner.map_or(String::new(), |o| {
            let group = value::text(o, "apiVersion").split_once('/').map_or("", |(g, _)| g);
            let kind = value::text(o, "kind").to_lowercase();
            let kind = if group.is_empty() { kind } else { format!("{kind}.{group}") };
            format!("{kind}/{}", value::text(o, "name"))
        });
        vec![human::or_none(&controller), int(object, "revision")]
    }
}
