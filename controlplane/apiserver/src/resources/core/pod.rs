//! Pods.

use serde_json::{Value, json};

use crate::{
    resources::{Column, Strategy, col, pod_template, wide},
    table::human,
    validation::Errors,
    value,
};

pub(super) struct Pod;

impl Strategy for Pod {
    fn defaults(&self, object: &mut Value) {
        if let Some(spec) = object.get_mut("spec") {
            pod_template::default_spec(spec);
            value::default(spec, "enableServiceLinks", true);
        }
    }

    fn prepare_create(&self, object: &mut Value) {
        let qos = qos_class(object);
        value::set(object, "status", json!({"phase": "Pending", "qosClass": qos}));
        if !value::list(object, "spec.schedulingGates").is_empty() {
            let condition = json!({"type": "PodScheduled", "status": "False", "reason": "SchedulingGated", "lastProbeTime": null,
                "lastTransitionTime": null, "message": "Scheduling is blocked due to non-empty scheduling gates"});
            value::set(object, "status.conditions", json!([condition]));
        }
    }

    fn prepare_status(&self, new: &mut Value, old: &Value) {
        // The class follows from the spec, which this endpoint does not change.
        if value::has(old, "status.qosClass") {
            value::carry(new, old, "status.qosClass");
        }
    }

    fn validate(&self, object: &Value, errors: &mut Errors) {
        match object.get("spec") {
            Some(spec) => pod_template::validate_spec(spec, "spec", errors),
            None => errors.required("spec.containers", ""),
        }
        if !value::list(object, "spec.ephemeralContainers").is_empty() && !value::has(object, "metadata.uid")
        {
            errors.forbidden("spec.ephemeralContainers", "cannot be set on create");
        }
    }

    fn validate_update(&self, new: &Value, old: &Value, errors: &mut Errors) {
        if let Some(spec) = new.get("spec") {
            pod_template::validate_spec(spec, "spec", errors);
        }
        if comparable(new, old) != comparable(old, old) {
            errors.forbidden(
                "spec",
                "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,\
                 `spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),\
                 `spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)",
            );
        }
        let lasting = |t: &Value| {
            let mut t = t.clone();
            value::remove(&mut t, "tolerationSeconds");
            t
        };
        let kept: Vec<Value> = value::list(new, "spec.tolerations").iter().map(lasting).collect();
        for t in value::list(old, "spec.tolerations") {
            if !kept.contains(&lasting(t)) {
                errors.forbidden(
                    "spec.tolerations",
                    "existing toleration can not be modified except its tolerationSeconds",
                );
            }
        }
    }

    fn grace_period(&self, object: &Value, requested: Option<i64>) -> Option<i64> {
        // A pod that is on no node, or has ended, has nothing to stop.
        if value::text(object, "spec.nodeName").is_empty()
            || matches!(value::text(object, "status.phase"), "Failed" | "Succeeded")
        {
            return Some(0);
        }
        let own = value::int(object, "spec.terminationGracePeriodSeconds").unwrap_or(30);
        Some(requested.unwrap_or(own)).map(|g| if g < 0 { 1 } else { g })
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[
            col("Ready"),
            col("Status"),
            col("Restarts"),
            col("Age"),
            wide("IP"),
            wide("Node"),
            wide("Nominated Node"),
            wide("Readiness Gates"),
        ];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let s = summary(object);
        let restarts = match s.last_restart.as_str() {
            "" => s.restarts.to_string(),
            at => format!("{} ({} ago)", s.restarts, human::age(at)),
        };
        vec![
            format!("{}/{}", s.ready, s.total).into(),
            s.reason.into(),
            restarts.into(),
            human::or_none(value::text(object, "status.podIP")),
            human::or_none(value::text(object, "spec.nodeName")),
            human::or_none(value::text(object, "status.nominatedNodeName")),
            readiness_gates(object),
        ]
    }

    fn selectable(&self) -> &'static [&'static str] {
        &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.nominatedNodeName",
        ]
    }

    fn select(&self, object: &Value, path: &str) -> String {
        match path {
            "spec.hostNetwork" => value::flag(object, path).to_string(),
            _ => value::text(object, path).to_owned(),
        }
    }
}

/// The class that requests and limits put a pod in, read from JSON before the pod is stored.
fn qos_class(object: &Value) -> &'static str {
    let zero = |v: &Value| {
        v.as_str().and_then(|t| t.parse::<orlop_api::quantity::Amount>().ok()).is_none_or(|a| a.is_zero())
    };
    let mut any = false;
    let mut guaranteed = true;
    let lists = ["spec.containers", "spec.initContainers"];
    for c in lists.iter().flat_map(|l| value::list(object, l)) {
        for name in ["cpu", "memory"] {
            let of = |part: &str| value::map(c, part).and_then(|m| m.get(name)).filter(|v| !zero(v)).cloned();
            let limit = of("resources.limits");
            let request = of("resources.requests").or_else(|| limit.clone());
            any |= limit.is_some() || request.is_some();
            guaranteed &= limit.is_some() && limit == request;
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

/// The spec with all that may change replaced by what `old` has.
fn comparable(pod: &Value, old: &Value) -> Value {
    let mut spec = json!({"spec": pod.get("spec").cloned().unwrap_or_default()});
    for path in [
        "spec.activeDeadlineSeconds",
        "spec.tolerations",
        "spec.terminationGracePeriodSeconds",
        "spec.nodeName",
        "spec.schedulingGates",
        "spec.ephemeralContainers",
        "spec.resources",
    ] {
        // The narrow endpoints (binding, ephemeralcontainers, resize) see to their fields themselves; the object endpoint may
        // not set a node once there is one.
        if path == "spec.nodeName" && !value::text(old, path).is_empty() {
            continue;
        }
        value::carry(&mut spec, old, path);
    }
    if !value::list(pod, "spec.schedulingGates").is_empty()
        || !value::list(old, "spec.schedulingGates").is_empty()
    {
        value::carry(&mut spec, old, "spec.nodeSelector");
        value::carry(&mut spec, old, "spec.affinity");
    }
    for list in ["spec.containers", "spec.initContainers"] {
        for (i, c) in value::list_mut(&mut spec, list).iter_mut().enumerate() {
            if let Some(o) = value::list(old, list).get(i) {
                for field in ["image", "resources", "resizePolicy"] {
                    value::carry(c, o, field);
                }
            }
        }
    }
    spec
}

#[derive(Debug, Default)]
struct Summary {
    ready: usize,
    total: usize,
    restarts: i64,
    last_restart: String,
    reason: String,
}

fn terminated(state: &Value) -> String {
    let reason = value::text(state, "reason");
    let signal = value::int(state, "signal").unwrap_or(0);
    if !reason.is_empty() {
        reason.to_owned()
    } else if signal != 0 {
        format!("Signal:{signal}")
    } else {
        format!("ExitCode:{}", value::int(state, "exitCode").unwrap_or(0))
    }
}

fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a Value> {
    value::list(object, "status.conditions").iter().find(|c| value::text(c, "type") == kind)
}

/// What READY, STATUS and RESTARTS are made of.
fn summary(pod: &Value) -> Summary {
    let mut s = Summary { total: value::list(pod, "spec.containers").len(), ..Summary::default() };
    s.reason = match value::text(pod, "status.reason") {
        "" => value::text(pod, "status.phase").to_owned(),
        reason => reason.to_owned(),
    };
    if condition(pod, "PodScheduled").is_some_and(|c| value::text(c, "reason") == "SchedulingGated") {
        s.reason = "SchedulingGated".into();
    }
    let sidecars: Vec<&str> = value::list(pod, "spec.initContainers")
        .iter()
        .filter(|c| value::text(c, "restartPolicy") == "Always")
        .map(|c| value::text(c, "name"))
        .collect();
    s.total += sidecars.len();
    let initializing = init_summary(pod, &sidecars, &mut s);
    if !initializing || condition(pod, "Initialized").is_some_and(|c| value::text(c, "status") == "True") {
        container_summary(pod, &mut s);
    }
    if value::has(pod, "metadata.deletionTimestamp") {
        if value::text(pod, "status.reason") == "NodeLost" {
            s.reason = "Unknown".into();
        } else if !matches!(value::text(pod, "status.phase"), "Failed" | "Succeeded") {
            s.reason = "Terminating".into();
        }
    }
    s
}

fn later(s: &mut Summary, status: &Value) {
    let at = value::text(status, "lastState.terminated.finishedAt");
    if at > s.last_restart.as_str() {
        s.last_restart = at.to_owned();
    }
}

/// Returns whether init containers still have to run.
fn init_summary(pod: &Value, sidecars: &[&str], s: &mut Summary) -> bool {
    let count = value::list(pod, "spec.initContainers").len();
    let mut restarts = 0;
    for (i, status) in value::list(pod, "status.initContainerStatuses").iter().enumerate() {
        restarts += value::int(status, "restartCount").unwrap_or(0);
        later(s, status);
        let sidecar = sidecars.contains(&value::text(status, "name"));
        if sidecar && value::flag(status, "started") {
            s.restarts += value::int(status, "restartCount").unwrap_or(0);
            s.ready += usize::from(value::flag(status, "ready"));
            continue;
        }
        if value::int(status, "state.terminated.exitCode") == Some(0) {
            continue;
        }
        s.restarts = restarts;
        s.reason = if let Some(t) = value::at(status, "state.terminated") {
            format!("Init:{}", terminated(t))
        } else {
            match value::text(status, "state.waiting.reason") {
                "" | "PodInitializing" => format!("Init:{i}/{count}"),
                reason => format!("Init:{reason}"),
            }
        };
        return true;
    }
    false
}

fn container_summary(pod: &Value, s: &mut Summary) {
    let mut running = false;
    for status in value::list(pod, "status.containerStatuses").iter().rev() {
        s.restarts += value::int(status, "restartCount").unwrap_or(0);
        later(s, status);
        let waiting = value::text(status, "state.waiting.reason");
        if !waiting.is_empty() {
            s.reason = waiting.to_owned();
        } else if let Some(t) = value::at(status, "state.terminated") {
            s.reason = terminated(t);
        } else if value::flag(status, "ready") && value::has(status, "state.running") {
            running = true;
            s.ready += 1;
        }
    }
    if s.reason == "Completed" && running {
        let ready = condition(pod, "Ready").is_some_and(|c| value::text(c, "status") == "True");
        s.reason = if ready { "Running".into() } else { "NotReady".into() };
    }
}

fn readiness_gates(pod: &Value) -> Value {
    let gates = value::list(pod, "spec.readinessGates");
    if gates.is_empty() {
        return "<none>".into();
    }
    let met = gates.iter().filter(|g| {
        condition(pod, value::text(g, "conditionType")).is_some_and(|c| value::text(c, "status") == "True")
    });
    format!("{}/{}", met.count(), gates.len()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tolerations_may_be_added_and_their_seconds_changed() {
        let pod = |tolerations: Value| json!({"spec": {"containers": [{"name": "a", "image": "i"}], "tolerations": tolerations}});
        let old =
            pod(json!([{"key": "k", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}]));
        let accepted = |tolerations: Value| {
            let mut errors = Errors::default();
            Pod.validate_update(&pod(tolerations), &old, &mut errors);
            !format!("{errors:?}").contains("existing toleration")
        };
        assert!(accepted(
            json!([{"key": "k", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 1}, {"key": "x"}])
        ));
        assert!(!accepted(json!([{"key": "x", "operator": "Exists", "effect": "NoExecute"}])));
    }

    #[test]
    fn the_status_column_tells_what_is_wrong() {
        let pod = |status: Value| json!({"metadata": {}, "spec": {"containers": [{"name": "a"}], "initContainers": [{"name": "i"}]}, "status": status});
        for (status, ready, reason) in [
            (json!({"phase": "Pending"}), "0/1", "Pending"),
            (
                json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "state": {"running": {}}}]}),
                "0/1",
                "Init:0/1",
            ),
            (
                json!({"phase": "Running", "initContainerStatuses": [{"name": "i", "state": {"terminated": {"exitCode": 0}}}],
                    "containerStatuses": [{"ready": true, "state": {"running": {}}}]}),
                "1/1",
                "Running",
            ),
            (
                json!({"phase": "Running", "initContainerStatuses": [{"name": "i", "state": {"terminated": {"exitCode": 0}}}],
                    "containerStatuses": [{"restartCount": 3, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}),
                "0/1",
                "CrashLoopBackOff",
            ),
            (json!({"phase": "Failed", "reason": "Evicted"}), "0/1", "Evicted"),
        ] {
            let s = summary(&pod(status));
            assert_eq!((format!("{}/{}", s.ready, s.total).as_str(), s.reason.as_str()), (ready, reason));
        }
    }

    #[test]
    fn only_some_of_a_pod_may_change() {
        let old = json!({"spec": {"containers": [{"name": "a", "image": "1"}], "nodeName": "n"}});
        let mut image = old.clone();
        image["spec"]["containers"][0]["image"] = "2".into();
        let mut node = old.clone();
        node["spec"]["nodeName"] = "m".into();
        for (new, refused) in [(image, false), (node, true)] {
            assert_eq!(comparable(&new, &old) != comparable(&old, &old), refused, "{new}");
        }
    }

    #[test]
    fn qos() {
        let pod = |resources: Value| json!({"spec": {"containers": [{"resources": resources}]}});
        assert_eq!(qos_class(&pod(json!({}))), "BestEffort");
        assert_eq!(qos_class(&pod(json!({"requests": {"cpu": "1"}}))), "Burstable");
        assert_eq!(qos_class(&pod(json!({"limits": {"cpu": "1", "memory": "1Gi"}}))), "Guaranteed");
    }
}
