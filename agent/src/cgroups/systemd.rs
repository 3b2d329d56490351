//! Pods' slices by systemd, asked over D-Bus. systemd owns its tree: a limit that it does not know of is lost with its
//! next reload, and a folder that it did not make is not kept.

use cgroups_rs::systemd::props::PropertiesBuilder;
use cgroups_rs::systemd::{self, Property, SystemdClient};
use zbus::zvariant::{OwnedObjectPath, Value};

use super::limits::{Limits, weight};
use crate::error::Error;

/// cgroups-rs starts units only with processes in them, which slices cannot have.
#[zbus::proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1",
    gen_async = false
)]
trait Manager {
    fn start_transient_unit(
        &self,
        name: &str,
        mode: &str,
        properties: &[(&str, Value<'_>)],
        auxiliary: &[(&str, &[(&str, Value<'_>)])],
    ) -> zbus::Result<OwnedObjectPath>;
}

/// The name of a slice: components are joined by dashes, so theirs become underscores.
pub fn slice(components: &[&str]) -> String {
    let escaped: Vec<String> = components.iter().map(|c| c.replace('-', "_")).collect();
    format!("{}.slice", escaped.join("-"))
}

/// The folder of a slice: every part of its name is a folder.
pub fn folder(slice: &str) -> String {
    systemd::utils::expand_slice(slice).unwrap_or_else(|_| slice.to_owned())
}

/// The slice that a slice lies in.
fn parent(slice: &str) -> String {
    let name = slice.trim_end_matches(systemd::SLICE_SUFFIX);
    name.rsplit_once('-').map_or("-.slice".to_owned(), |(up, _)| format!("{up}.slice"))
}

/// Limits as unit properties. systemd takes CPU quotas in steps of 10 ms per second; they are rounded up.
fn properties(l: &Limits, v2: bool) -> Vec<Property<'static>> {
    let mut all: Vec<(&'static str, u64)> = Vec::new();
    if let Some(shares) = l.cpu_shares {
        let value = if v2 { weight(shares) } else { shares.max(2) as u64 };
        all.push((if v2 { systemd::CPU_WEIGHT } else { systemd::CPU_SHARES }, value));
    }
    if let Some((quota, period)) = l.cpu_quota {
        let per_second = match quota {
            q if q > 0 && period > 0 => {
                (q as u64).saturating_mul(1_000_000).div_ceil(period as u64).next_multiple_of(10_000)
            }
            _ => u64::MAX,
        };
        all.push((systemd::CPU_QUOTA_PER_SEC_US, per_second));
        all.push((systemd::CPU_QUOTA_PERIOD_US, period.max(0) as u64));
    }
    if let Some(bytes) = l.memory {
        all.push((if v2 { systemd::MEMORY_MAX } else { systemd::MEMORY_LIMIT }, bytes as u64));
    }
    if let Some(n) = l.pids {
        all.push((systemd::TASKS_MAX, n as u64));
    }
    all.into_iter().map(|(name, value)| (name, Value::U64(value))).collect()
}

/// What a slice is started with besides its limits. cgroups-rs' own list for slices has the parent as a text, where systemd wants
/// a list of units.
fn of_a_new(slice: &str) -> Vec<Property<'static>> {
    let mut all = PropertiesBuilder::default()
        .cpu_accounting(true)
        .memory_accounting(true)
        .task_accounting(true)
        .io_accounting(true)
        .default_dependencies(false)
        .description("Kubernetes pods".to_owned())
        .build();
    all.push((systemd::WANTS, Value::from(vec![parent(slice)])));
    all
}

fn refused(slice: &str, e: impl std::fmt::Display) -> Error {
    Error::Systemd { slice: slice.to_owned(), message: e.to_string() }
}

/// Starts a slice with its limits, or changes those of one that runs. Blocks.
pub fn ensure(slice: &str, l: &Limits, v2: bool) -> Result<(), Error> {
    let limits = properties(l, v2);
    let mut client = SystemdClient::new(slice, Vec::new()).map_err(|e| refused(slice, e))?;
    if !client.exists() {
        let bus = zbus::blocking::Connection::system().map_err(|e| refused(slice, e))?;
        let manager = ManagerProxy::new(&bus).map_err(|e| refused(slice, e))?;
        let mut all = of_a_new(slice);
        all.extend(limits.iter().filter_map(|(k, v)| v.try_clone().ok().map(|v| (*k, v))));
        match manager.start_transient_unit(slice, systemd::UNIT_MODE_REPLACE, &all, &[]) {
            Ok(_) => return Ok(()),
            // A container's scope has brought its slice meanwhile.
            Err(zbus::Error::MethodError(name, ..))
                if name.as_str() == "org.freedesktop.systemd1.UnitExists" => {}
            Err(e) => return Err(refused(slice, e)),
        }
    }
    client.set_properties(&limits).map_err(|e| refused(slice, e))
}

/// Ends a slice with all that runs in it. Blocks.
pub fn stop(slice: &str) -> Result<(), Error> {
    let client = SystemdClient::new(slice, Vec::new()).map_err(|e| refused(slice, e))?;
    client.stop().map_err(|e| refused(slice, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let s = slice(&["kubepods", "burstable", "pod1-2"]);
        assert_eq!(s, "kubepods-burstable-pod1_2.slice");
        assert_eq!(folder(&s), "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice");
        assert_eq!(parent(&s), "kubepods-burstable.slice");
        assert_eq!(parent("kubepods.slice"), "-.slice");
    }

    #[test]
    fn a_new_slice_lies_in_its_parent() {
        let all = of_a_new("kubepods-besteffort.slice");
        let (_, wants) = all.iter().find(|(name, _)| *name == "Wants").unwrap();
        assert_eq!(wants.value_signature().to_string(), "as");
        assert_eq!(Vec::<String>::try_from(wants.try_clone().unwrap()).unwrap(), ["kubepods.slice"]);
    }

    #[test]
    fn limits_as_properties() {
        let l = Limits {
            cpu_shares: Some(1024),
            cpu_quota: Some((12_345, 100_000)),
            memory: Some(1 << 20),
            pids: Some(7),
            ..Default::default()
        };
        let named = |v2| -> Vec<(&str, u64)> {
            let all = properties(&l, v2).into_iter();
            all.map(|(k, v)| (k, u64::try_from(v).unwrap())).collect()
        };
        let both = [("CPUQuotaPerSecUSec", 130_000), ("CPUQuotaPeriodUSec", 100_000)];
        let v1 = [("CPUShares", 1024), both[0], both[1], ("MemoryLimit", 1 << 20), ("TasksMax", 7)];
        let v2 = [("CPUWeight", 39), both[0], both[1], ("MemoryMax", 1 << 20), ("TasksMax", 7)];
        assert_eq!(named(false), v1);
        assert_eq!(named(true), v2);
        let free = Limits { cpu_quota: Some((-1, 100_000)), ..Default::default() };
        assert_eq!(properties(&free, true)[0], ("CPUQuotaPerSecUSec", Value::U64(u64::MAX)));
    }
}
