//! Resources as the CRI, NRI and OCI have them. Pure.

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxPids, LinuxResources};
use orlop_nri::api::{self, Field};
use orlop_proto::cri;
use serde_json::json;

use crate::error::{Error, Result};
use crate::facts::Facts;

/// Who asked for a field, for errors.
pub(super) type Who<'a> = &'a dyn Fn(Field, Option<&str>) -> String;

/// What a plugin asks for and cannot have.
pub(super) fn refused(who: String, what: &str, why: &str) -> Error {
    Error::Invalid(format!("NRI plugin {who} asks for {what}: {why}"))
}

/// In NRI's form; what is not given stays absent.
pub(super) fn to_nri(r: &cri::LinuxContainerResources) -> api::LinuxResources {
    let some = |value: i64| (value != 0).then_some(api::OptionalInt64 { value });
    let unsigned =
        |v: i64| u64::try_from(v).ok().filter(|v| *v != 0).map(|value| api::OptionalUInt64 { value });
    api::LinuxResources {
        memory: Some(api::LinuxMemory {
            limit: some(r.memory_limit_in_bytes),
            swap: some(r.memory_swap_limit_in_bytes),
            ..Default::default()
        }),
        cpu: Some(api::LinuxCpu {
            shares: unsigned(r.cpu_shares),
            quota: some(r.cpu_quota),
            period: unsigned(r.cpu_period),
            cpus: r.cpuset_cpus.clone(),
            mems: r.cpuset_mems.clone(),
            ..Default::default()
        }),
        hugepage_limits: r
            .hugepage_limits
            .iter()
            .map(|h| api::HugepageLimit { page_size: h.page_size.clone(), limit: h.limit })
            .collect(),
        unified: r.unified.clone(),
        ..Default::default()
    }
}

/// What plugins want over what is held; the fields that the CRI has too.
pub(super) fn overlay(
    held: &cri::LinuxContainerResources,
    given: &api::LinuxResources,
    facts: &Facts,
    who: Who,
) -> Result<cri::LinuxContainerResources> {
    for (class, field, what) in [
        (&given.blockio_class, Field::BlockioClass, "a block I/O class"),
        (&given.rdt_class, Field::RdtClass, "an RDT class"),
    ] {
        if class.as_ref().is_some_and(|c| !c.value.is_empty()) {
            return Err(refused(who(field, None), what, "this node has no classes"));
        }
    }
    let signed = |value: u64, field: Field| {
        i64::try_from(value)
            .map_err(|_| refused(who(field, None), &value.to_string(), "no limit is so large"))
    };
    let mut out = held.clone();
    if let Some(cpu) = &given.cpu {
        if let Some(v) = cpu.shares {
            out.cpu_shares = signed(v.value, Field::CpuShares)?;
        }
        if let Some(v) = cpu.period {
            out.cpu_period = signed(v.value, Field::CpuPeriod)?;
        }
        if let Some(v) = cpu.quota {
            out.cpu_quota = v.value;
        }
        for (to, from) in [(&mut out.cpuset_cpus, &cpu.cpus), (&mut out.cpuset_mems, &cpu.mems)] {
            if !from.is_empty() {
                to.clone_from(from);
            }
        }
    }
    if let Some(memory) = &given.memory {
        if let Some(limit) = memory.limit.map(|l| l.value) {
            // A container that could not swap still cannot; a limit of both below that of memory is none the kernel takes.
            let (swap, old) = (held.memory_swap_limit_in_bytes, held.memory_limit_in_bytes);
            if swap > 0 && (swap == old || swap < limit) {
                out.memory_swap_limit_in_bytes = limit;
            }
            out.memory_limit_in_bytes = limit;
        }
        if let Some(swap) = memory.swap {
            out.memory_swap_limit_in_bytes = swap.value;
        }
    }
    if let Some(limit) = given.hugepage_limits.first().filter(|_| !facts.hugetlb) {
        let what = format!("a limit of huge pages of {}", limit.page_size);
        // The kubelet names all sizes with a limit of 0 everywhere.
        if limit.limit != 0 {
            let owner = who(Field::HugepageLimits, Some(&limit.page_size));
            return Err(refused(owner, &what, "this machine cannot limit them"));
        }
    }
    for limit in &given.hugepage_limits {
        out.hugepage_limits.retain(|held| held.page_size != limit.page_size);
        let (page_size, limit) = (limit.page_size.clone(), limit.limit);
        out.hugepage_limits.push(cri::HugepageLimit { page_size, limit });
    }
    for (file, value) in &given.unified {
        if !facts.cgroup_v2 && held.unified.get(file) != Some(value) {
            let owner = who(Field::CgroupsUnified, Some(file));
            return Err(refused(
                owner,
                &format!("the cgroup file {file}"),
                "this machine has cgroup version 1",
            ));
        }
        out.unified.insert(file.clone(), value.clone());
    }
    Ok(out)
}

/// The fields that the CRI does not have. They are written when asked for and kept by the kernel, not in our records.
pub(super) fn extend(oci: &mut LinuxResources, given: &api::LinuxResources, who: Who) -> Result<()> {
    if let Some(m) = &given.memory {
        let mut memory = (*oci.memory()).unwrap_or_default();
        if let Some(v) = m.reservation {
            memory.set_reservation(Some(v.value));
        }
        if let Some(v) = m.kernel {
            memory.set_kernel(Some(v.value));
        }
        if let Some(v) = m.kernel_tcp {
            memory.set_kernel_tcp(Some(v.value));
        }
        if let Some(v) = m.swappiness {
            memory.set_swappiness(Some(v.value));
        }
        if let Some(v) = m.disable_oom_killer {
            memory.set_disable_oom_killer(Some(v.value));
        }
        if let Some(v) = m.use_hierarchy {
            memory.set_use_hierarchy(Some(v.value));
        }
        if memory != Default::default() {
            oci.set_memory(Some(memory));
        }
    }
    if let Some(c) = &given.cpu {
        let mut cpu = oci.cpu().clone().unwrap_or_default();
        if let Some(v) = c.realtime_runtime {
            cpu.set_realtime_runtime(Some(v.value));
        }
        if let Some(v) = c.realtime_period {
            cpu.set_realtime_period(Some(v.value));
        }
        oci.set_cpu(Some(cpu));
    }
    if let Some(p) = given.pids {
        let mut pids = LinuxPids::default();
        pids.set_limit(p.limit);
        oci.set_pids(Some(pids));
    }
    if !given.devices.is_empty() {
        let mut rules = oci.devices().clone().unwrap_or_default();
        for d in &given.devices {
            rules.push(rule(d).ok_or_else(|| {
                refused(
                    who(Field::Devices, None),
                    &format!("the device rule {:?} {}", d.r#type, d.access),
                    "it is not valid",
                )
            })?);
        }
        oci.set_devices(Some(rules));
    }
    Ok(())
}

fn rule(d: &api::LinuxDeviceCgroup) -> Option<LinuxDeviceCgroup> {
    let mut rule = json!({"allow": d.allow, "access": d.access});
    if !d.r#type.is_empty() {
        rule["type"] = d.r#type.as_str().into();
    }
    if let Some(major) = d.major {
        rule["major"] = major.value.into();
    }
    if let Some(minor) = d.minor {
        rule["minor"] = minor.value.into();
    }
    serde_json::from_value(rule).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(_: Field, _: Option<&str>) -> String {
        "10-a".into()
    }

    fn memory(limit: i64, swap: Option<i64>) -> api::LinuxResources {
        let some = |value| api::OptionalInt64 { value };
        let memory =
            api::LinuxMemory { limit: Some(some(limit)), swap: swap.map(some), ..Default::default() };
        api::LinuxResources { memory: Some(memory), ..Default::default() }
    }

    #[test]
    fn the_limit_of_swap_follows_that_of_memory() {
        for (limit, swap, given, given_swap, want) in [
            (100, 100, 200, None, (200, 200)),
            (100, 100, 50, None, (50, 50)),
            (100, 150, 120, None, (120, 150)),
            (100, 150, 200, None, (200, 200)),
            (100, 0, 200, None, (200, 0)),
            (100, 100, 200, Some(300), (200, 300)),
            (0, 0, 200, None, (200, 0)),
        ] {
            let held = cri::LinuxContainerResources {
                memory_limit_in_bytes: limit,
                memory_swap_limit_in_bytes: swap,
                cpu_shares: 5,
                ..Default::default()
            };
            let out = overlay(&held, &memory(given, given_swap), &Facts::default(), &who).unwrap();
            assert_eq!(
                (out.memory_limit_in_bytes, out.memory_swap_limit_in_bytes),
                want,
                "{limit} {swap} {given}"
            );
            assert_eq!(out.cpu_shares, 5);
        }
    }

    #[test]
    fn what_this_machine_lacks_is_refused_by_name() {
        let of = |given: api::LinuxResources| {
            overlay(&Default::default(), &given, &Facts::default(), &who).unwrap_err().to_string()
        };
        let class = || Some(api::OptionalString { value: "gold".into() });
        for (given, says) in [
            (api::LinuxResources { blockio_class: class(), ..Default::default() }, "block I/O class"),
            (api::LinuxResources { rdt_class: class(), ..Default::default() }, "RDT class"),
            (
                api::LinuxResources {
                    unified: [("memory.high".to_owned(), "1".to_owned())].into(),
                    ..Default::default()
                },
                "memory.high",
            ),
            (
                api::LinuxResources {
                    hugepage_limits: vec![api::HugepageLimit { page_size: "2MB".into(), limit: 1 }],
                    ..Default::default()
                },
                "2MB",
            ),
        ] {
            let e = of(given);
            assert!(e.contains("10-a") && e.contains(says), "{e}");
        }
    }

    #[test]
    fn what_the_cri_has_comes_back() {
        let held = cri::LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: -1,
            cpu_shares: 2,
            memory_limit_in_bytes: 7,
            memory_swap_limit_in_bytes: 9,
            cpuset_cpus: "0".into(),
            cpuset_mems: "0".into(),
            hugepage_limits: vec![cri::HugepageLimit { page_size: "2MB".into(), limit: 0 }],
            ..Default::default()
        };
        assert_eq!(overlay(&held, &to_nri(&held), &Facts::default(), &who).unwrap(), held);
        let mut oci = LinuxResources::default();
        let given = api::LinuxResources { pids: Some(api::LinuxPids { limit: 5 }), ..Default::default() };
        extend(&mut oci, &given, &who).unwrap();
        assert_eq!(oci.pids().map(|p| p.limit()), Some(5));
    }
}
