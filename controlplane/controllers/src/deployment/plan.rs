//! How many pods each ReplicaSet of a Deployment should have: pure.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// A count or a percentage of `total`, rounded up or down.
fn resolve(v: Option<&IntOrString>, total: i32, round_up: bool, default: &str) -> i32 {
    let fallback = IntOrString::String(default.to_owned());
    match v.unwrap_or(&fallback) {
        IntOrString::Int(n) => *n,
        IntOrString::String(s) => {
            let percent: i64 = s.trim_end_matches('%').parse().unwrap_or(0);
            let scaled = percent * total as i64;
            (if round_up { (scaled + 99) / 100 } else { scaled / 100 }) as i32
        }
    }
}

/// How many pods may exist beyond, and be missing from, the wanted number. Both zero would never get anywhere.
pub(super) fn fenceposts(d: &Deployment) -> (i32, i32) {
    let spec = d.spec.as_ref();
    let total = spec.and_then(|s| s.replicas).unwrap_or(1);
    let rolling = spec.and_then(|s| s.strategy.as_ref()).and_then(|s| s.rolling_update.as_ref());
    let surge = resolve(rolling.and_then(|r| r.max_surge.as_ref()), total, true, "25%");
    let unavailable = resolve(rolling.and_then(|r| r.max_unavailable.as_ref()), total, false, "25%");
    if surge == 0 && unavailable == 0 { (0, 1) } else { (surge, unavailable.min(total)) }
}

pub(super) fn is_recreate(d: &Deployment) -> bool {
    let strategy = d.spec.as_ref().and_then(|s| s.strategy.as_ref());
    strategy.and_then(|s| s.type_.as_deref()) == Some("Recreate")
}

/// The numbers of one ReplicaSet that matter for rolling.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct SetState {
    pub(super) name: String,
    /// spec.replicas.
    pub(super) wanted: i32,
    /// status.replicas, ready and available.
    pub(super) actual: i32,
    pub(super) available: i32,
    pub(super) created: i64,
}

/// The new sizes of the sets, by name; sets that stay as they are do not appear.
pub(super) type Sizes = BTreeMap<String, i32>;

/// One step of a rolling update: up with the new set as far as the surge allows, down with the old ones as far as
/// availability allows, unhealthy pods first.
fn rolling(total: i32, surge: i32, unavailable: i32, new: &SetState, old: &[SetState]) -> Sizes {
    let mut sizes = Sizes::new();
    let existing: i32 = new.wanted + old.iter().map(|s| s.wanted).sum::<i32>();
    if new.wanted > total {
        sizes.insert(new.name.clone(), total);
        return sizes;
    }
    if new.wanted < total {
        let room = (total + surge - existing).max(0);
        let next = new.wanted + room.min(total - new.wanted);
        if next != new.wanted {
            sizes.insert(new.name.clone(), next);
            return sizes;
        }
    }
    let min_available = total - unavailable;
    let new_unavailable = new.wanted - new.available;
    let mut may_go = existing - min_available - new_unavailable;
    let mut old: Vec<SetState> = old.iter().filter(|s| s.wanted > 0).cloned().collect();
    old.sort_by_key(|s| (s.created, s.name.clone()));
    // Pods that do not serve can go without anybody noticing.
    for s in &mut old {
        let unhealthy = (s.wanted - s.available).min(may_go).max(0);
        if unhealthy > 0 {
            s.wanted -= unhealthy;
            may_go -= unhealthy;
            sizes.insert(s.name.clone(), s.wanted);
        }
    }
    let available: i32 = new.available + old.iter().map(|s| s.available.min(s.wanted)).sum::<i32>();
    let mut healthy = (available - min_available).min(may_go);
    for s in &mut old {
        let n = healthy.min(s.wanted).max(0);
        if n > 0 {
            s.wanted -= n;
            healthy -= n;
            sizes.insert(s.name.clone(), s.wanted);
        }
    }
    sizes
}

/// Spreads a change of the Deployment's size over several active sets in proportion to theirs (a paused or unfinished rollout).
fn proportional(allowed: i32, sets: &[SetState]) -> Sizes {
    let active: Vec<&SetState> = sets.iter().filter(|s| s.wanted > 0).collect();
    let current: i32 = active.iter().map(|s| s.wanted).sum();
    let mut left = allowed - current;
    let mut sizes = Sizes::new();
    if left == 0 || current == 0 {
        return sizes;
    }
    let mut order = active.clone();
    order.sort_by_key(|s| (std::cmp::Reverse(s.wanted), s.created));
    for (i, s) in order.iter().enumerate() {
        let share = if i + 1 == order.len() {
            left
        } else {
            let exact = (allowed - current) as f64 * s.wanted as f64 / current as f64;
            (exact.round() as i32).clamp(left.min(0), left.max(0))
        };
        if share != 0 {
            sizes.insert(s.name.clone(), (s.wanted + share).max(0));
            left -= share;
        }
    }
    sizes
}

/// What the Deployment's sets should become.
pub(super) fn plan(
    d: &Deployment,
    new: Option<&SetState>,
    old: &[SetState],
    scaled: bool,
    old_pods_running: bool,
) -> Sizes {
    let spec = d.spec.as_ref();
    let total = spec.and_then(|s| s.replicas).unwrap_or(1);
    let (surge, unavailable) = fenceposts(d);
    let paused = spec.and_then(|s| s.paused) == Some(true);
    let Some(new) = new else {
        let active: Vec<SetState> = old.iter().filter(|s| s.wanted > 0).cloned().collect();
        return match active.as_slice() {
            [only] if paused && only.wanted != total => Sizes::from([(only.name.clone(), total)]),
            many if paused && scaled && many.len() > 1 => proportional(total + surge, many),
            _ => Sizes::new(),
        };
    };
    let old_active = old.iter().any(|s| s.wanted > 0);
    if !old_active && new.wanted != total {
        return Sizes::from([(new.name.clone(), total)]);
    }
    if (paused || scaled) && old_active {
        let mut all = old.to_vec();
        all.push(new.clone());
        let allowed = if total > 0 && !is_recreate(d) { total + surge } else { total };
        return if scaled { proportional(allowed, &all) } else { Sizes::new() };
    }
    if paused {
        return Sizes::new();
    }
    if is_recreate(d) {
        if old_active {
            return old.iter().filter(|s| s.wanted > 0).map(|s| (s.name.clone(), 0)).collect();
        }
        return if !old_pods_running && new.wanted != total {
            Sizes::from([(new.name.clone(), total)])
        } else {
            Sizes::new()
        };
    }
    rolling(total, surge, unavailable, new, old)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn deployment(spec: serde_json::Value) -> Deployment {
        let mut v =
            json!({"selector": {"matchLabels": {"a": "b"}}, "template": {"spec": {"containers": []}}});
        v.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        serde_json::from_value(json!({"metadata": {"name": "d"}, "spec": v})).unwrap()
    }

    fn set(name: &str, wanted: i32, available: i32) -> SetState {
        SetState { name: name.into(), wanted, actual: wanted, available, created: 0 }
    }

    #[test]
    fn percentages_round_as_upstream_does() {
        let d = deployment(json!({"replicas": 10}));
        assert_eq!(fenceposts(&d), (3, 2));
        let d = deployment(
            json!({"replicas": 3, "strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": "0%"}}}),
        );
        assert_eq!(fenceposts(&d), (0, 1));
    }

    #[test]
    fn rolling_steps() {
        // (total, surge, unavailable, new, old) -> sizes
        for (name, total, surge, unavailable, new, old, want) in [
            ("surge first", 10, 3, 2, set("n", 0, 0), set("o", 10, 10), vec![("n", 3)]),
            ("then old down to the minimum", 10, 3, 2, set("n", 3, 0), set("o", 10, 10), vec![("o", 8)]),
            ("new ones available", 10, 3, 2, set("n", 5, 5), set("o", 8, 8), vec![("o", 3)]),
            ("broken old pods go first", 10, 3, 2, set("n", 3, 0), set("o", 10, 4), vec![("o", 8)]),
            ("done", 10, 3, 2, set("n", 10, 10), set("o", 0, 0), vec![]),
            ("too many", 3, 1, 0, set("n", 5, 5), set("o", 0, 0), vec![("n", 3)]),
        ] {
            let got = rolling(total, surge, unavailable, &new, &[old]);
            let want: Sizes = want.into_iter().map(|(n, s)| (n.to_owned(), s)).collect();
            assert_eq!(got, want, "{name}");
        }
    }

    proptest::proptest! {
        /// Whatever pods become available when, a rolling update never leaves its bounds and gets there.
        #[test]
        fn rolling_keeps_its_bounds(total in 1i32..12, surge in 0i32..4, unavailable in 0i32..4, seed in proptest::collection::vec(0i32..3, 40)) {
            let unavailable = if surge == 0 && unavailable == 0 { 1 } else { unavailable.min(total) };
            let (mut new, mut old) = (set("n", 0, 0), set("o", total, total));
            for step in seed.iter().chain(std::iter::repeat_n(&3, 60)) {
                for (name, size) in rolling(total, surge, unavailable, &new, std::slice::from_ref(&old)) {
                    let s = if name == "n" { &mut new } else { &mut old };
                    s.wanted = size;
                    s.available = s.available.min(size);
                }
                proptest::prop_assert!(new.wanted + old.wanted <= total + surge);
                proptest::prop_assert!(new.available + old.available >= total - unavailable);
                new.available = (new.available + step).min(new.wanted);
            }
            proptest::prop_assert_eq!((new.wanted, old.wanted), (total, 0));
        }
    }

    #[test]
    fn recreate_waits_for_the_old_pods() {
        let d = deployment(json!({"replicas": 2, "strategy": {"type": "Recreate"}}));
        assert_eq!(
            plan(&d, Some(&set("n", 0, 0)), &[set("o", 2, 2)], false, true),
            Sizes::from([("o".into(), 0)])
        );
        assert_eq!(
            plan(&d, Some(&set("n", 0, 0)), &[set("o", 0, 0)], false, false),
            Sizes::from([("n".into(), 2)])
        );
    }

    #[test]
    fn scaling_during_a_rollout_is_proportional() {
        let d = deployment(json!({"replicas": 20}));
        let sizes = plan(&d, Some(&set("n", 5, 5)), &[set("o", 8, 8)], true, false);
        assert_eq!(sizes.values().sum::<i32>(), 25);
        assert!(sizes["o"] > sizes["n"]);
    }
}
