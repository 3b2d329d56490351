//! `/stats/summary` and `/metrics/resource`: use of cpu and memory by node, pod and container, as the runtime reports it.

use std::fmt::Write;

use jiff::Timestamp;
use orlop_proto::cri;
use serde_json::{Value, json};

use super::Refusal;
use crate::context::Context;
use crate::runtime::{labels, timestamp};

fn value(v: &Option<cri::UInt64Value>) -> Option<u64> {
    v.as_ref().map(|v| v.value)
}

fn cpu(c: &Option<cri::CpuUsage>) -> Value {
    let Some(c) = c else { return Value::Null };
    json!({"time": timestamp(c.timestamp), "usageNanoCores": value(&c.usage_nano_cores),
        "usageCoreNanoSeconds": value(&c.usage_core_nano_seconds)})
}

fn memory(m: &Option<cri::MemoryUsage>) -> Value {
    let Some(m) = m else { return Value::Null };
    json!({"time": timestamp(m.timestamp), "workingSetBytes": value(&m.working_set_bytes),
        "availableBytes": value(&m.available_bytes), "usageBytes": value(&m.usage_bytes),
        "rssBytes": value(&m.rss_bytes), "pageFaults": value(&m.page_faults),
        "majorPageFaults": value(&m.major_page_faults)})
}

fn rootfs(f: &Option<cri::FilesystemUsage>) -> Value {
    let Some(f) = f else { return Value::Null };
    json!({"time": timestamp(f.timestamp), "usedBytes": value(&f.used_bytes), "inodesUsed": value(&f.inodes_used)})
}

fn network(n: &Option<cri::NetworkUsage>) -> Value {
    let Some(n) = n else { return Value::Null };
    let one = |i: &cri::NetworkInterfaceUsage| {
        json!({"name": i.name, "rxBytes": value(&i.rx_bytes), "rxErrors": value(&i.rx_errors),
            "txBytes": value(&i.tx_bytes), "txErrors": value(&i.tx_errors)})
    };
    let default = n.default_interface.as_ref();
    let mut v = default.map(one).unwrap_or_else(|| json!({}));
    v["time"] = json!(timestamp(n.timestamp));
    v["interfaces"] = json!(n.interfaces.iter().chain(default).map(one).collect::<Vec<_>>());
    v
}

fn container(c: &cri::ContainerStats) -> Value {
    let a = c.attributes.clone().unwrap_or_default();
    let name = a.labels.get(labels::CONTAINER_NAME).cloned();
    json!({"name": name.or(a.metadata.map(|m| m.name)), "cpu": cpu(&c.cpu), "memory": memory(&c.memory),
        "rootfs": rootfs(&c.writable_layer)})
}

fn pod(p: &cri::PodSandboxStats) -> Value {
    let meta = p.attributes.as_ref().and_then(|a| a.metadata.clone()).unwrap_or_default();
    let linux = p.linux.clone().unwrap_or_default();
    json!({
        "podRef": {"name": meta.name, "namespace": meta.namespace, "uid": meta.uid},
        "containers": linux.containers.iter().map(container).collect::<Vec<_>>(),
        "cpu": cpu(&linux.cpu), "memory": memory(&linux.memory), "network": network(&linux.network),
        "process_stats": linux.process.as_ref().map(|p| json!({"process_count": value(&p.process_count)})),
    })
}

/// The node's own figures: (cpu nanoseconds, memory total, memory in use without reclaimable page cache).
fn node() -> (u64, u64, u64) {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let ticks: u64 = stat
        .lines()
        .next()
        .into_iter()
        .flat_map(|l| l.split_whitespace().skip(1).enumerate())
        // user nice system irq softirq steal; idle and iowait are not use.
        .filter(|(i, _)| matches!(i, 0 | 1 | 2 | 5 | 6 | 7))
        .filter_map(|(_, v)| v.parse::<u64>().ok())
        .sum();
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |name: &str| {
        let line = info.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0)
    };
    let (total, available) = (kib("MemTotal") * 1024, kib("MemAvailable") * 1024);
    // The kernel counts in hundredths of a second for programs, whatever its own tick.
    (ticks * 10_000_000, total, total.saturating_sub(available))
}

async fn pods(ctx: &Context) -> Result<Vec<cri::PodSandboxStats>, Refusal> {
    Ok(ctx.cri.list_pod_sandbox_stats(cri::ListPodSandboxStatsRequest::default()).await?.stats)
}

/// `/stats/summary` (stats.k8s.io v1alpha1 Summary).
pub async fn summary(ctx: &Context) -> Result<Value, Refusal> {
    let pods: Vec<Value> = pods(ctx).await?.iter().map(pod).collect();
    let now = Timestamp::now();
    let (cpu, total, used) = node();
    Ok(json!({
        "node": {
            "nodeName": ctx.config.node_name,
            "cpu": {"time": now, "usageCoreNanoSeconds": cpu},
            "memory": {"time": now, "availableBytes": total.saturating_sub(used), "usageBytes": used, "workingSetBytes": used},
        },
        "pods": pods,
    }))
}

/// `/metrics/resource`, which metrics-server reads.
pub async fn resource_metrics(ctx: &Context) -> Result<String, Refusal> {
    let pods = pods(ctx).await?;
    let mut out = String::new();
    let (cpu, _, used) = node();
    let mut section = |name: &str, kind: &str, lines: Vec<String>| {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "# TYPE {name} {kind}");
        for l in &lines {
            let _ = writeln!(out, "{name}{l}");
        }
    };
    section("node_cpu_usage_seconds_total", "counter", vec![format!(" {}", cpu as f64 / 1e9)]);
    section("node_memory_working_set_bytes", "gauge", vec![format!(" {used}")]);
    let (mut pod_cpu, mut pod_memory, mut c_cpu, mut c_memory) = (vec![], vec![], vec![], vec![]);
    for p in &pods {
        let meta = p.attributes.as_ref().and_then(|a| a.metadata.clone()).unwrap_or_default();
        let linux = p.linux.clone().unwrap_or_default();
        let of_pod = format!("namespace=\"{}\",pod=\"{}\"", meta.namespace, meta.name);
        let seconds = |c: &Option<cri::CpuUsage>| {
            c.as_ref().and_then(|c| value(&c.usage_core_nano_seconds)).map(|n| n as f64 / 1e9)
        };
        let bytes = |m: &Option<cri::MemoryUsage>| m.as_ref().and_then(|m| value(&m.working_set_bytes));
        pod_cpu.extend(seconds(&linux.cpu).map(|v| format!("{{{of_pod}}} {v}")));
        pod_memory.extend(bytes(&linux.memory).map(|v| format!("{{{of_pod}}} {v}")));
        for c in &linux.containers {
            let a = c.attributes.clone().unwrap_or_default();
            let name = a.labels.get(labels::CONTAINER_NAME).cloned().unwrap_or_default();
            let of = format!("container=\"{name}\",{of_pod}");
            c_cpu.extend(seconds(&c.cpu).map(|v| format!("{{{of}}} {v}")));
            c_memory.extend(bytes(&c.memory).map(|v| format!("{{{of}}} {v}")));
        }
    }
    section("pod_cpu_usage_seconds_total", "counter", pod_cpu);
    section("pod_memory_working_set_bytes", "gauge", pod_memory);
    section("container_cpu_usage_seconds_total", "counter", c_cpu);
    section("container_memory_working_set_bytes", "gauge", c_memory);
    Ok(out)
}
