//! Priority: a pod's priority and preemption policy come from its PriorityClass; only one class is the default.

use serde_json::{Value, json};

use super::{Context, forbidden, is, text};
use crate::registry::{Attributes, Operation};
use crate::status::Status;

const GROUP: &str = "scheduling.k8s.io";

pub(super) async fn admit(c: &Context, a: &mut Attributes) -> Result<(), Status> {
    let Some(pod) = &a.object else { return Ok(()) };
    let class = match text(pod, "/spec/priorityClassName") {
        "" => default_class(&c.registry.list(GROUP, "priorityclasses", "").await?).cloned(),
        name => match c.registry.get(GROUP, "priorityclasses", "", name).await {
            Ok(class) => Some(class),
            Err(e) if e.is_not_found() => {
                return Err(forbidden(a, format!("no PriorityClass with name {name} was found")));
            }
            Err(e) => return Err(e),
        },
    };
    let Some(pod) = &mut a.object else { return Ok(()) };
    resolve(pod, class.as_ref()).map_err(|why| forbidden(a, why))
}

fn default_class(classes: &[Value]) -> Option<&Value> {
    let defaults = classes.iter().filter(|c| c["globalDefault"] == true);
    // Two can come to be by a race; then the lower counts.
    defaults.min_by_key(|c| c["value"].as_i64().unwrap_or_default())
}

/// Writes what the class (`None`: no default exists) gives; refuses a pod that claims something else.
fn resolve(pod: &mut Value, class: Option<&Value>) -> Result<(), String> {
    let priority = class.and_then(|c| c["value"].as_i64()).unwrap_or(0);
    let policy = class.map_or("PreemptLowerPriority", |c| text(c, "/preemptionPolicy"));
    let spec = &mut pod["spec"];
    if let Some(claimed) = spec["priority"].as_i64()
        && claimed != priority
    {
        return Err(format!(
            "the integer value of priority ({claimed}) must not be provided in pod spec; priority admission controller computed {priority} from the given PriorityClass name"
        ));
    }
    let claimed = text(spec, "/preemptionPolicy");
    if !policy.is_empty() && !claimed.is_empty() && claimed != policy {
        return Err(format!(
            "the string value of PreemptionPolicy ({claimed}) must not be provided in pod spec; priority admission controller computed {policy} from the given PriorityClass name"
        ));
    }
    if let Some(class) = class {
        spec["priorityClassName"] = class["metadata"]["name"].clone();
    }
    spec["priority"] = json!(priority);
    if !policy.is_empty() {
        spec["preemptionPolicy"] = json!(policy);
    }
    Ok(())
}

/// An update that leaves the fields out does not mean to clear them.
pub(super) fn keep(a: &mut Attributes) {
    let (Some(pod), Some(old)) = (&mut a.object, &a.old_object) else { return };
    for field in ["priority", "preemptionPolicy"] {
        if pod["spec"].get(field).is_none_or(Value::is_null)
            && let Some(value) = old["spec"].get(field).filter(|v| !v.is_null())
        {
            pod["spec"][field] = value.clone();
        }
    }
}

pub(super) async fn validate_class(c: &Context, a: &Attributes) -> Result<(), Status> {
    if !is(a, GROUP, "priorityclasses") || !matches!(a.operation, Operation::Create | Operation::Update) {
        return Ok(());
    }
    let Some(class) = a.object.as_ref().filter(|o| o["globalDefault"] == true) else { return Ok(()) };
    let classes = c.registry.list(GROUP, "priorityclasses", "").await?;
    if let Some(other) = default_class(&classes) {
        let name = text(other, "/metadata/name");
        if a.operation == Operation::Create || name != text(class, "/metadata/name") {
            let why =
                format!("PriorityClass {name} is already marked as default. Only one default can exist");
            return Err(forbidden(a, why));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolution() {
        let class = json!({"metadata": {"name": "high"}, "value": 1000, "preemptionPolicy": "Never"});
        let mut pod = json!({"spec": {"priorityClassName": "high"}});
        resolve(&mut pod, Some(&class)).unwrap();
        assert_eq!(
            (&pod["spec"]["priority"], &pod["spec"]["preemptionPolicy"]),
            (&json!(1000), &json!("Never"))
        );
        let mut plain = json!({"spec": {}});
        resolve(&mut plain, None).unwrap();
        assert_eq!(plain["spec"], json!({"priority": 0, "preemptionPolicy": "PreemptLowerPriority"}));
        assert!(resolve(&mut json!({"spec": {"priority": 5}}), None).is_err());
        assert!(resolve(&mut json!({"spec": {"preemptionPolicy": "Never"}}), None).is_err());
    }

    #[test]
    fn the_lowest_default_counts() {
        let classes = [
            json!({"globalDefault": true, "value": 5}),
            json!({"globalDefault": true, "value": 2}),
            json!({"value": 1}),
        ];
        assert_eq!(default_class(&classes).unwrap()["value"], 2);
    }
}
