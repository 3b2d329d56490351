//! Whether the node takes a pod that was bound to it: the last check, in case the scheduler did not know better.

use k8s_openapi::api::core::v1::Pod;
use orlop_api::pod::{Resources, is_finished, requests};
use orlop_api::quantity::Amount;

use crate::context::Context;

/// The first resource of which there is not enough: name, wanted, used, there is. Pure.
pub fn lacking(
    wanted: &Resources,
    others: &[Resources],
    allocatable: &std::collections::BTreeMap<String, Amount>,
) -> Option<(String, Amount, Amount, Amount)> {
    let of = |r: &Resources, k: &str| r.get(k).copied().unwrap_or_default();
    for (name, amount) in wanted.iter().filter(|(_, a)| !a.is_zero()) {
        // Resources that the node does not count (such as devices later) are for their manager to judge.
        let Some(total) = allocatable.get(name) else { continue };
        let used: Amount = others.iter().map(|o| of(o, name)).sum();
        if used + *amount > *total {
            return Some((name.clone(), *amount, used, *total));
        }
    }
    None
}

/// Reason and message of a refusal. Static pods are not refused: they are the operator's word.
pub fn check(ctx: &Context, pod: &Pod) -> Option<(String, String)> {
    if crate::pods::is_static(pod) || pod.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let spec = pod.spec.as_ref()?;
    if spec.os.as_ref().is_some_and(|os| os.name != "linux") {
        return Some((
            "PodOSNotSupported".into(),
            "Failed to admit pod as the OS field doesn't match node OS".into(),
        ));
    }
    if let Some(message) = crate::spec::apparmor::refusal(pod, crate::spec::apparmor::is_enabled()) {
        return Some(("AppArmor".into(), message));
    }
    let others: Vec<_> = ctx
        .pods
        .list()
        .into_iter()
        .filter(|p| p.metadata.uid != pod.metadata.uid && !is_finished(p))
        .collect();
    let allocatable = ctx.node.allocatable();
    let max = allocatable.get("pods").map_or(0, |a| a.units());
    if others.len() as i64 >= max {
        return Some((
            "OutOfpods".into(),
            format!(
                "Node didn't have enough resource: pods, requested: 1, used: {}, capacity: {max}",
                others.len()
            ),
        ));
    }
    let used: Vec<Resources> = others.iter().filter_map(|p| p.spec.as_ref().map(requests)).collect();
    let (name, wanted, used, total) = lacking(&requests(spec), &used, &allocatable)?;
    let show = |a: Amount| if name == "cpu" { a.milli() } else { a.units() };
    let message = format!(
        "Node didn't have enough resource: {name}, requested: {}, used: {}, capacity: {}",
        show(wanted),
        show(used),
        show(total)
    );
    Some((format!("OutOf{name}"), message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lacking() {
        let r = |cpu: i64| Resources::from([("cpu".to_owned(), Amount::from_milli(cpu))]);
        let total = std::collections::BTreeMap::from([("cpu".to_owned(), Amount::from_units(1))]);
        assert!(lacking(&r(500), &[r(500)], &total).is_none());
        assert_eq!(lacking(&r(501), &[r(500)], &total).unwrap().0, "cpu");
        assert!(lacking(&r(0), &[r(5000)], &total).is_none());
    }
}
