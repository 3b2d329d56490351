//! batch/v1: Jobs and CronJobs.

use serde_json::{Value, json};

use super::{
    Column, Resource, Strategy, col, num,
    pod_template::{default_template, validate_template},
    wide,
};
use crate::{
    table::human,
    validation::{Errors, selector_matches_template},
    value,
};

pub(super) fn resources() -> Vec<Resource> {
    vec![
        Resource::new("batch", "v1", "CronJob", "cronjobs", CronJob)
            .short(&["cj"])
            .category(&["all"])
            .with_status()
            .generation(),
        Resource::new("batch", "v1", "Job", "jobs", Job).category(&["all"]).with_status().generation(),
    ]
}

const POLICIES: &[&str] = &["Never", "OnFailure"];
const UID_LABEL: &str = "batch.kubernetes.io/controller-uid";
const NAME_LABEL: &str = "batch.kubernetes.io/job-name";

fn default_job_spec(object: &mut Value, at: &str) {
    let path = |p: &str| format!("{at}.{p}");
    if !value::has(object, &path("completions")) && !value::has(object, &path("parallelism")) {
        value::set(object, &path("completions"), 1);
    }
    value::default(object, &path("parallelism"), 1);
    let indexed_limit = value::has(object, &path("backoffLimitPerIndex"));
    value::default(object, &path("backoffLimit"), if indexed_limit { i64::from(i32::MAX) } else { 6 });
    value::default_text(object, &path("completionMode"), "NonIndexed");
    value::default(object, &path("suspend"), false);
    let failed_only = value::has(object, &path("podFailurePolicy"));
    value::default_text(
        object,
        &path("podReplacementPolicy"),
        if failed_only { "Failed" } else { "TerminatingOrFailed" },
    );
    default_template(object, &path("template"));
}

fn validate_job_spec(object: &Value, at: &str, errors: &mut Errors) {
    for field in
        ["parallelism", "completions", "backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished"]
    {
        errors.not_negative(object, &format!("{at}.{field}"));
    }
    errors.one_of(object, &format!("{at}.completionMode"), &["Indexed", "NonIndexed"]);
    validate_template(object, &format!("{at}.template"), POLICIES, errors);
}

struct Job;

impl Strategy for Job {
    fn defaults(&self, object: &mut Value) {
        default_job_spec(object, "spec");
    }

    fn prepare_create(&self, object: &mut Value) {
        if value::flag(object, "spec.manualSelector") {
            return;
        }
        // The selector is the Job's own UID, so that no other Job's pods fit it.
        let uid = value::text(object, "metadata.uid").to_owned();
        let name = value::text(object, "metadata.name").to_owned();
        let labels = value::ensure_map(object, "spec.template.metadata.labels");
        for key in [UID_LABEL, "controller-uid"] {
            labels.insert(key.into(), uid.clone().into());
        }
        if !name.is_empty() {
            for key in [NAME_LABEL, "job-name"] {
                labels.insert(key.into(), name.clone().into());
            }
        }
        let mut selector = json!({});
        selector[UID_LABEL] = uid.into();
        value::set(object, "spec.selector.matchLabels", selector);
        value::default(object, "spec.manualSelector", false);
    }

    fn validate(&self, object: &Value, errors: &mut Errors) {
        validate_job_spec(object, "spec", errors);
        selector_matches_template(object, errors);
    }

    fn validate_update(&self, new: &Value, old: &Value, errors: &mut Errors) {
        self.validate(new, errors);
        errors.immutable(new, old, "spec.selector");
        errors.immutable(new, old, "spec.completionMode");
        if value::text(new, "spec.completionMode") != "Indexed" {
            errors.immutable(new, old, "spec.completions");
        }
        if !value::flag(old, "spec.suspend") {
            errors.immutable(new, old, "spec.template");
        }
    }

    fn orphans_by_default(&self) -> bool {
        true
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[
            col("Status"),
            col("Completions"),
            col("Duration"),
            col("Age"),
            wide("Containers"),
            wide("Images"),
            wide("Selector"),
        ];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let done = value::int(object, "status.succeeded").unwrap_or(0);
        let completions = match (
            value::int(object, "spec.completions"),
            value::int(object, "spec.parallelism").unwrap_or(0),
        ) {
            (Some(n), _) => format!("{done}/{n}"),
            (None, p) if p > 1 => format!("{done}/1 of {p}"),
            (None, _) => format!("{done}/1"),
        };
        let has = |kind: &str| {
            value::list(object, "status.conditions")
                .iter()
                .any(|c| value::text(c, "type") == kind && value::text(c, "status") == "True")
        };
        let status = match () {
            () if has("Complete") => "Complete",
            () if has("Failed") => "Failed",
            () if value::has(object, "metadata.deletionTimestamp") => "Terminating",
            () if has("Suspended") => "Suspended",
            () if has("FailureTarget") => "FailureTarget",
            () if has("SuccessCriteriaMet") => "SuccessCriteriaMet",
            () => "Running",
        };
        let duration = human::between(
            value::text(object, "status.startTime"),
            value::text(object, "status.completionTime"),
        );
        let (names, images) = human::containers(object, "spec.template.spec.containers");
        vec![
            status.into(),
            completions.into(),
            duration.into(),
            names,
            images,
            human::selector(object, "spec.selector"),
        ]
    }

    fn selectable(&self) -> &'static [&'static str] {
        &["status.successful"]
    }

    fn select(&self, object: &Value, _path: &str) -> String {
        value::int(object, "status.succeeded").unwrap_or(0).to_string()
    }
}

struct CronJob;

impl Strategy for CronJob {
    fn defaults(&self, object: &mut Value) {
        value::default_text(object, "spec.concurrencyPolicy", "Allow");
        value::default(object, "spec.suspend", false);
        value::default(object, "spec.successfulJobsHistoryLimit", 3);
        value::default(object, "spec.failedJobsHistoryLimit", 1);
        if value::has(object, "spec.jobTemplate.spec") {
            default_template(object, "spec.jobTemplate.spec.template");
        }
    }

    fn validate(&self, object: &Value, errors: &mut Errors) {
        let schedule = value::text(object, "spec.schedule");
        if schedule.is_empty() {
            errors.required("spec.schedule", "");
        } else if !schedule.starts_with('@') && schedule.split_whitespace().count() != 5 {
            let detail = format!(
                "expected exactly 5 fields, found {}: [{schedule}]",
                schedule.split_whitespace().count()
            );
            errors.invalid("spec.schedule", &schedule.into(), &detail);
        }
        if value::text(object, "metadata.name").len() > 52 {
            errors.invalid(
                "metadata.name",
                &value::text(object, "metadata.name").into(),
                "must be no more than 52 characters",
            );
        }
        errors.one_of(object, "spec.concurrencyPolicy", &["Allow", "Forbid", "Replace"]);
        validate_template(object, "spec.jobTemplate.spec.template", POLICIES, errors);
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[
            col("Schedule"),
            col("Timezone"),
            col("Suspend"),
            num("Active"),
            col("Last Schedule"),
            col("Age"),
            wide("Containers"),
            wide("Images"),
            wide("Selector"),
        ];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let last = match value::text(object, "status.lastScheduleTime") {
            "" => "<none>".to_owned(),
            at => human::age(at),
        };
        let suspend = if value::flag(object, "spec.suspend") { "True" } else { "False" };
        let (names, images) = human::containers(object, "spec.jobTemplate.spec.template.spec.containers");
        vec![
            value::text(object, "spec.schedule").into(),
            human::or_none(value::text(object, "spec.timeZone")),
            suspend.into(),
            value::list(object, "status.active").len().into(),
            last.into(),
            names,
            images,
            human::selector(object, "spec.jobTemplate.spec.selector"),
        ]
    }
}
