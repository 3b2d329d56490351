//! Which plugin asked for what, so that two that ask for the same are noticed. Pure.

use crate::api::{self, Field};
use crate::error::Error;

/// Stands before the name of a plugin that took a value away, which nobody but itself may set anew.
const CLEARED: char = '-';

/// By container, field and, in fields with several entries, key.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Owners(pub(crate) api::OwningPlugins);

impl Owners {
    /// Notes that `plugin` sets the field, or the field's entry `key`.
    pub(crate) fn claim(
        &mut self,
        container: &str,
        field: Field,
        key: Option<&str>,
        plugin: &str,
    ) -> Result<(), Error> {
        let held = self.slot(container, field, key);
        let holder = held.strip_prefix(CLEARED);
        // A field that was cleared by the plugin itself is its own to set.
        if !held.is_empty() && holder != Some(plugin) {
            return Err(Error::Conflict {
                first: holder.unwrap_or(held).to_owned(),
                second: plugin.to_owned(),
                field: describe(field, key),
                container: container.to_owned(),
            });
        }
        plugin.clone_into(held);
        Ok(())
    }

    /// Notes that `plugin` takes the value away, whoever set it.
    pub(crate) fn clear(&mut self, container: &str, field: Field, key: Option<&str>, plugin: &str) {
        *self.slot(container, field, key) = format!("{CLEARED}{plugin}");
    }

    /// Several plugins may add to the field.
    pub(crate) fn share(&mut self, container: &str, field: Field, plugin: &str) {
        let held = self.slot(container, field, None);
        if !held.is_empty() {
            held.push(',');
        }
        held.push_str(plugin);
    }

    /// Who set the field, or any entry of it.
    pub fn of(&self, container: &str, field: Field, key: Option<&str>) -> Option<&str> {
        let fields = self.0.owners.get(container)?;
        let held = match key {
            Some(key) => fields.compound.get(&(field as i32))?.owners.get(key)?,
            None => fields.simple.get(&(field as i32))?,
        };
        Some(held.strip_prefix(CLEARED).unwrap_or(held))
    }

    /// All plugins that set anything of a container, each once, in order.
    pub fn all(&self, container: &str) -> Vec<&str> {
        let Some(fields) = self.0.owners.get(container) else { return Vec::new() };
        let compound = fields.compound.values().flat_map(|c| c.owners.values());
        let held = fields.simple.values().chain(compound).flat_map(|p| p.split(','));
        let mut all: Vec<&str> = held.map(|p| p.strip_prefix(CLEARED).unwrap_or(p)).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    fn slot(&mut self, container: &str, field: Field, key: Option<&str>) -> &mut String {
        let fields = self.0.owners.entry(container.to_owned()).or_default();
        match key {
            Some(key) => {
                fields.compound.entry(field as i32).or_default().owners.entry(key.to_owned()).or_default()
            }
            None => fields.simple.entry(field as i32).or_default(),
        }
    }
}

/// The field as errors call it.
fn describe(field: Field, key: Option<&str>) -> String {
    let name = match field {
        Field::None => "nothing",
        Field::Annotations => "annotation",
        Field::Mounts => "mount",
        Field::OciHooks => "OCI hooks",
        Field::Devices => "device",
        Field::CdiDevices => "CDI device",
        Field::Env => "environment variable",
        Field::Args => "arguments",
        Field::MemLimit => "memory limit",
        Field::MemReservation => "memory reservation",
        Field::MemSwapLimit => "swap limit",
        Field::MemKernelLimit => "kernel memory limit",
        Field::MemTcpLimit => "TCP memory limit",
        Field::MemSwappiness => "memory swappiness",
        Field::MemDisableOomKiller => "OOM killer switch",
        Field::MemUseHierarchy => "memory hierarchy switch",
        Field::CpuShares => "CPU shares",
        Field::CpuQuota => "CPU quota",
        Field::CpuPeriod => "CPU period",
        Field::CpuRealtimeRuntime => "CPU realtime runtime",
        Field::CpuRealtimePeriod => "CPU realtime period",
        Field::CpuSetCpUs => "CPU set",
        Field::CpuSetMems => "memory node set",
        Field::PidsLimit => "process limit",
        Field::HugepageLimits => "huge page limit",
        Field::BlockioClass => "block I/O class",
        Field::RdtClass => "RDT class",
        Field::CgroupsUnified => "cgroup file",
        Field::CgroupsPath => "cgroup path",
        Field::OomScoreAdj => "OOM score adjustment",
        Field::Rlimits => "resource limit",
        Field::IoPriority => "I/O priority",
        Field::SeccompPolicy => "seccomp policy",
        Field::Namespace => "namespace",
        Field::Sysctl => "sysctl",
        Field::LinuxNetDevices => "network device",
        Field::LinuxSched => "scheduler",
        Field::RdtClosId => "RDT class of service",
        Field::RdtSchemata => "RDT schemata",
        Field::RdtEnableMonitoring => "RDT monitoring",
        Field::MemoryPolicy => "memory policy",
    };
    key.map_or_else(|| name.to_owned(), |key| format!("{name} {key}"))
}
