//! Pods and containers in NRI's form. Pure.

use orlop_nri::api;
use orlop_proto::cri;
use serde_json::Value;

use super::resources::to_nri;
use crate::store::{ContainerPhase, ContainerRecord, SandboxRecord};

/// A pod. `namespaces` are the pinned ones, by OCI's names.
pub(super) fn pod(
    record: &SandboxRecord,
    cgroups_path: String,
    namespaces: Vec<(&'static str, String)>,
) -> api::PodSandbox {
    let (meta, config) = (record.metadata(), &*record.config);
    let linux = config.linux.clone().unwrap_or_default();
    let resources = linux.resources.as_ref().map(to_nri);
    api::PodSandbox {
        id: record.id.clone(),
        name: meta.name,
        uid: meta.uid,
        namespace: meta.namespace,
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        runtime_handler: record.runtime_handler.clone(),
        linux: Some(api::LinuxPodSandbox {
            pod_overhead: linux.overhead.as_ref().map(to_nri),
            pod_resources: resources.clone(),
            cgroup_parent: linux.cgroup_parent,
            cgroups_path,
            namespaces: namespaces
                .into_iter()
                .map(|(kind, path)| api::LinuxNamespace { r#type: kind.to_owned(), path })
                .collect(),
            resources,
        }),
        pid: record.init_pid,
        ips: record.ips.clone(),
    }
}

/// A container by its record and, as long as it is there, its OCI spec.
pub(super) fn container(record: &ContainerRecord, spec: Option<&Value>) -> api::Container {
    let config = &*record.config;
    let mut annotations = config.annotations.clone();
    let mut out = api::Container {
        id: record.id.clone(),
        pod_sandbox_id: record.sandbox_id.clone(),
        name: record.metadata().name,
        state: match record.phase {
            ContainerPhase::Creating | ContainerPhase::Created => api::ContainerState::ContainerCreated,
            ContainerPhase::Running => api::ContainerState::ContainerRunning,
            ContainerPhase::Exited => api::ContainerState::ContainerStopped,
        } as i32,
        labels: config.labels.clone(),
        pid: record.pid,
        created_at: record.created_at_ns,
        started_at: record.started_at_ns,
        finished_at: record.finished_at_ns,
        exit_code: record.exit_code,
        status_reason: record.reason.clone(),
        status_message: record.message.clone(),
        cdi_devices: config.cdi_devices.iter().map(|d| api::CdiDevice { name: d.name.clone() }).collect(),
        user: Some(api::User {
            uid: record.user.uid,
            gid: record.user.gid,
            additional_gids: record.user.groups.clone(),
        }),
        image: Some(image(record)),
        ..Default::default()
    };
    let mut linux = spec.map(|spec| {
        annotations.extend(texts(&spec["annotations"]));
        from_spec(spec, &mut out);
        linux(spec)
    });
    let held = linux.get_or_insert_default();
    held.cgroups_path.clone_from(&record.cgroups_path);
    held.seccomp_profile =
        config.linux.as_ref().and_then(|l| l.security_context.as_ref()?.seccomp.as_ref()).map(|p| {
            api::SecurityProfile { profile_type: p.profile_type, localhost_ref: p.localhost_ref.clone() }
        });
    let in_force = to_nri(&record.resources);
    let resources = held.resources.get_or_insert_default();
    // What an update has changed stands in the record.
    if record.phase != ContainerPhase::Creating {
        let cri = |r: &api::LinuxResources| (r.memory, r.cpu.clone());
        let (memory, cpu) = cri(&in_force);
        if let (Some(m), Some(to)) = (memory, &mut resources.memory) {
            (to.limit, to.swap) = (m.limit.or(to.limit), m.swap.or(to.swap));
        }
        if let (Some(c), Some(to)) = (cpu, &mut resources.cpu) {
            (to.shares, to.quota, to.period) =
                (c.shares.or(to.shares), c.quota.or(to.quota), c.period.or(to.period));
            if !c.cpus.is_empty() {
                to.cpus = c.cpus;
            }
            if !c.mems.is_empty() {
                to.mems = c.mems;
            }
        }
    }
    out.linux = linux;
    out.annotations = annotations;
    out
}

fn image(record: &ContainerRecord) -> api::Image {
    let named = record.config.image.clone().unwrap_or_default();
    let cri::ImageSpec { image, user_specified_image, .. } = named;
    api::Image {
        name: if user_specified_image.is_empty() { image } else { user_specified_image },
        digest: record.image_ref.split_once('@').map(|(_, digest)| digest.to_owned()).unwrap_or_default(),
        config_digest: record.image_id.clone(),
    }
}

fn text(v: &Value) -> String {
    v.as_str().unwrap_or_default().to_owned()
}

fn list(v: &Value) -> Vec<String> {
    each(v).map(text).collect()
}

fn each(v: &Value) -> impl Iterator<Item = &Value> {
    v.as_array().into_iter().flatten()
}

fn texts(v: &Value) -> std::collections::HashMap<String, String> {
    v.as_object().into_iter().flatten().map(|(k, v)| (k.clone(), text(v))).collect()
}

fn int(v: &Value) -> Option<api::OptionalInt64> {
    v.as_i64().map(|value| api::OptionalInt64 { value })
}

fn unsigned(v: &Value) -> Option<api::OptionalUInt64> {
    v.as_u64().map(|value| api::OptionalUInt64 { value })
}

fn flag(v: &Value) -> Option<api::OptionalBool> {
    v.as_bool().map(|value| api::OptionalBool { value })
}

fn small(v: &Value) -> Option<u32> {
    v.as_u64().and_then(|v| u32::try_from(v).ok())
}

fn from_spec(spec: &Value, out: &mut api::Container) {
    let process = &spec["process"];
    out.args = list(&process["args"]);
    out.env = list(&process["env"]);
    out.rlimits = each(&process["rlimits"])
        .map(|l| api::PosixRlimit {
            r#type: text(&l["type"]),
            hard: l["hard"].as_u64().unwrap_or_default(),
            soft: l["soft"].as_u64().unwrap_or_default(),
        })
        .collect();
    out.mounts = each(&spec["mounts"])
        .map(|m| api::Mount {
            destination: text(&m["destination"]),
            r#type: text(&m["type"]),
            source: text(&m["source"]),
            options: list(&m["options"]),
        })
        .collect();
    let hooks = |name: &str| {
        each(&spec["hooks"][name])
            .map(|h| api::Hook {
                path: text(&h["path"]),
                args: list(&h["args"]),
                env: list(&h["env"]),
                timeout: h["timeout"].as_i64().map(|value| api::OptionalInt { value }),
            })
            .collect()
    };
    out.hooks = spec["hooks"].is_object().then(|| api::Hooks {
        prestart: hooks("prestart"),
        create_runtime: hooks("createRuntime"),
        create_container: hooks("createContainer"),
        start_container: hooks("startContainer"),
        poststart: hooks("poststart"),
        poststop: hooks("poststop"),
    });
}

fn linux(spec: &Value) -> api::LinuxContainer {
    let linux = &spec["linux"];
    let devices = each(&linux["devices"]).map(|d| api::LinuxDevice {
        path: text(&d["path"]),
        r#type: text(&d["type"]),
        major: d["major"].as_i64().unwrap_or_default(),
        minor: d["minor"].as_i64().unwrap_or_default(),
        file_mode: small(&d["fileMode"]).map(|value| api::OptionalFileMode { value }),
        uid: small(&d["uid"]).map(|value| api::OptionalUInt32 { value }),
        gid: small(&d["gid"]).map(|value| api::OptionalUInt32 { value }),
    });
    let namespaces = each(&linux["namespaces"])
        .map(|n| api::LinuxNamespace { r#type: text(&n["type"]), path: text(&n["path"]) });
    api::LinuxContainer {
        namespaces: namespaces.collect(),
        devices: devices.collect(),
        resources: Some(resources(&linux["resources"])),
        oom_score_adj: spec["process"]["oomScoreAdj"].as_i64().map(|value| api::OptionalInt { value }),
        seccomp_policy: linux["seccomp"].is_object().then(|| seccomp(&linux["seccomp"])),
        sysctl: texts(&linux["sysctl"]),
        ..Default::default()
    }
}

fn resources(r: &Value) -> api::LinuxResources {
    let (memory, cpu) = (&r["memory"], &r["cpu"]);
    api::LinuxResources {
        memory: Some(api::LinuxMemory {
            limit: int(&memory["limit"]),
            reservation: int(&memory["reservation"]),
            swap: int(&memory["swap"]),
            kernel: int(&memory["kernel"]),
            kernel_tcp: int(&memory["kernelTCP"]),
            swappiness: unsigned(&memory["swappiness"]),
            disable_oom_killer: flag(&memory["disableOOMKiller"]),
            use_hierarchy: flag(&memory["useHierarchy"]),
        }),
        cpu: Some(api::LinuxCpu {
            shares: unsigned(&cpu["shares"]),
            quota: int(&cpu["quota"]),
            period: unsigned(&cpu["period"]),
            realtime_runtime: int(&cpu["realtimeRuntime"]),
            realtime_period: unsigned(&cpu["realtimePeriod"]),
            cpus: text(&cpu["cpus"]),
            mems: text(&cpu["mems"]),
        }),
        hugepage_limits: each(&r["hugepageLimits"])
            .map(|h| api::HugepageLimit {
                page_size: text(&h["pageSize"]),
                limit: h["limit"].as_u64().unwrap_or_default(),
            })
            .collect(),
        unified: texts(&r["unified"]),
        devices: each(&r["devices"])
            .map(|d| api::LinuxDeviceCgroup {
                allow: d["allow"].as_bool().unwrap_or_default(),
                r#type: text(&d["type"]),
                major: int(&d["major"]),
                minor: int(&d["minor"]),
                access: text(&d["access"]),
            })
            .collect(),
        pids: r["pids"]["limit"].as_i64().map(|limit| api::LinuxPids { limit }),
        ..Default::default()
    }
}

fn seccomp(s: &Value) -> api::LinuxSeccomp {
    let errno = |v: &Value| small(v).map(|value| api::OptionalUInt32 { value });
    let calls = each(&s["syscalls"]).map(|c| api::LinuxSyscall {
        names: list(&c["names"]),
        action: text(&c["action"]),
        errno_ret: errno(&c["errnoRet"]),
        args: each(&c["args"])
            .map(|a| api::LinuxSeccompArg {
                index: small(&a["index"]).unwrap_or_default(),
                value: a["value"].as_u64().unwrap_or_default(),
                value_two: a["valueTwo"].as_u64().unwrap_or_default(),
                op: text(&a["op"]),
            })
            .collect(),
    });
    api::LinuxSeccomp {
        default_action: text(&s["defaultAction"]),
        default_errno: errno(&s["defaultErrnoRet"]),
        architectures: list(&s["architectures"]),
        flags: list(&s["flags"]),
        listener_path: text(&s["listenerPath"]),
        listener_metadata: text(&s["listenerMetadata"]),
        syscalls: calls.collect(),
    }
}
