//! autoscaling: HorizontalPodAutoscalers. `v2` is stored; `v1` knows only the CPU target.

use serde_json::{Value, json};

use super::{Column, Conversion, Resource, Strategy, col, num};
use crate::{validation::Errors, value};

pub(super) fn resources() -> Vec<Resource> {
    let row = |version| {
        Resource::new(
            "autoscaling",
            version,
            "HorizontalPodAutoscaler",
            "horizontalpodautoscalers",
            Autoscaler,
        )
        .short(&["hpa"])
        .category(&["all"])
        .with_status()
    };
    let v2 = row("v2");
    let v1 = row("v1").stored_by(&v2, V1);
    vec![v2, v1]
}

fn cpu_target(m: &Value) -> bool {
    value::text(m, "type") == "Resource" && value::text(m, "resource.name") == "cpu"
}

const METRICS: &str = "autoscaling.alpha.kubernetes.io/metrics";

/// Other metrics than CPU travel in an annotation, so that a v1 client does not lose them.
const V1: Conversion = Conversion {
    serve: |v| {
        value::set(v, "apiVersion", "autoscaling/v1");
        if let Some(Value::Array(metrics)) = value::remove(v, "spec.metrics") {
            let (cpu, other): (Vec<Value>, Vec<Value>) = metrics
                .into_iter()
                .partition(|m| cpu_target(m) && value::has(m, "resource.target.averageUtilization"));
            if let Some(n) = cpu.first().and_then(|m| value::int(m, "resource.target.averageUtilization")) {
                value::set(v, "spec.targetCPUUtilizationPercentage", n);
            }
            if !other.is_empty() {
                let text = Value::Array(other).to_string();
                value::ensure_map(v, "metadata.annotations").insert(METRICS.into(), text.into());
            }
        }
        if let Some(Value::Array(current)) = value::remove(v, "status.currentMetrics")
            && let Some(n) = current
                .iter()
                .find(|m| cpu_target(m))
                .and_then(|m| value::int(m, "resource.current.averageUtilization"))
        {
            value::set(v, "status.currentCPUUtilizationPercentage", n);
        }
        value::remove(v, "spec.behavior");
        value::remove(v, "status.conditions");
    },
    store: |v| {
        let mut metrics = Vec::new();
        if let Some(n) = value::remove(v, "spec.targetCPUUtilizationPercentage") {
            metrics.push(json!({"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": n}}}));
        }
        let kept = value::at_mut(v, "metadata.annotations")
            .and_then(Value::as_object_mut)
            .and_then(|a| a.remove(METRICS));
        if let Some(Ok(Value::Array(other))) = kept.as_ref().and_then(Value::as_str).map(serde_json::from_str)
        {
            metrics.extend(other);
        }
        if !metrics.is_empty() {
            value::set(v, "spec.metrics", metrics);
        }
        if let Some(n) = value::remove(v, "status.currentCPUUtilizationPercentage") {
            let current = json!({"type": "Resource", "resource": {"name": "cpu", "current": {"averageUtilization": n, "averageValue": "0"}}});
            value::set(v, "status.currentMetrics", vec![current]);
        }
    },
};

struct Autoscaler;

impl Strategy for Autoscaler {
    fn defaults(&self, object: &mut Value) {
        value::default(object, "spec.minReplicas", 1);
        if value::list(object, "spec.metrics").is_empty() {
            let cpu = json!({"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}}});
            value::set(object, "spec.metrics", vec![cpu]);
        }
    }

    fn validate(&self, object: &Value, errors: &mut Errors) {
        let (min, max) = (
            value::int(object, "spec.minReplicas").unwrap_or(1),
            value::int(object, "spec.maxReplicas").unwrap_or(0),
        );
        if max < 1 {
            errors.invalid("spec.maxReplicas", &max.into(), "must be greater than 0");
        } else if max < min {
            errors.invalid("spec.maxReplicas", &max.into(), "must be greater than or equal to `minReplicas`");
        }
        for path in ["spec.scaleTargetRef.kind", "spec.scaleTargetRef.name"] {
            if value::text(object, path).is_empty() {
                errors.required(path, "");
            }
        }
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] =
            &[col("Reference"), col("Targets"), num("MinPods"), num("MaxPods"), num("Replicas")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let reference = format!(
            "{}/{}",
            value::text(object, "spec.scaleTargetRef.kind"),
            value::text(object, "spec.scaleTargetRef.name")
        );
        let targets: Vec<String> = value::list(object, "spec.metrics")
            .iter()
            .enumerate()
            .map(|(i, m)| {
                let kind = value::text(m, "type").to_lowercase();
                let name = value::text(m, &format!("{kind}.name"));
                let now = value::list(object, "status.currentMetrics").get(i);
                let now = now.and_then(|c| value::int(c, &format!("{kind}.current.averageUtilization")));
                let target = value::int(m, &format!("{kind}.target.averageUtilization"));
                let shown = |n: Option<i64>| n.map_or("<unknown>".to_owned(), |n| format!("{n}%"));
                let wanted = match target {
                    Some(_) => shown(target),
                    None => value::text(m, &format!("{kind}.target.averageValue")).to_owned(),
                };
                format!("{name}: {}/{wanted}", shown(now))
            })
            .collect();
        vec![
            reference.into(),
            targets.join(", ").into(),
            value::int(object, "spec.minReplicas").map_or("<unset>".into(), Value::from),
            value::int(object, "spec.maxReplicas").unwrap_or(0).into(),
            value::int(object, "status.currentReplicas").unwrap_or(0).into(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v1_keeps_what_it_cannot_show() {
        let v2 = json!({"apiVersion": "autoscaling/v2", "metadata": {"name": "a"}, "spec": {"maxReplicas": 3, "metrics": [
            {"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 50}}},
            {"type": "Resource", "resource": {"name": "memory", "target": {"type": "AverageValue", "averageValue": "1Gi"}}},
        ]}});
        let mut v = v2.clone();
        (V1.serve)(&mut v);
        assert_eq!(v["spec"]["targetCPUUtilizationPercentage"], 50);
        (V1.store)(&mut v);
        assert_eq!(v["spec"], v2["spec"]);
    }
}
