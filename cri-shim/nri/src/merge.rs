//! What several plugins ask for, put together in the order in which they are asked. Pure.
//!
//! Each plugin sees the container as those before it have made it. Nothing is set twice; what one plugin takes away with a key that
//! begins with `-`, it may set anew.

use std::collections::{BTreeSet, HashMap};

use crate::api::{self, Field};
use crate::error::Error;
use crate::owners::Owners;

type Result<T> = std::result::Result<T, Error>;

/// The key without the mark of a removal, and whether it had one.
pub fn removal(key: &str) -> (&str, bool) {
    key.strip_prefix('-').map_or((key, false), |key| (key, true))
}

/// What a container that is being created becomes.
pub(crate) struct Creation {
    /// As the plugins so far have made it.
    pub container: api::Container,
    /// All that they asked for.
    pub adjust: api::ContainerAdjustment,
    pub updates: Updates,
}

/// Where a plugin's values go: the container that the next plugin sees, and the sum of what was asked for.
struct Claim<'a> {
    id: &'a str,
    plugin: &'a str,
    owners: &'a mut Owners,
}

impl Claim<'_> {
    fn take(&mut self, field: Field, key: Option<&str>) -> Result<()> {
        self.owners.claim(self.id, field, key, self.plugin)
    }

    fn clear(&mut self, field: Field, key: Option<&str>) {
        self.owners.clear(self.id, field, key, self.plugin);
    }
}

/// Sets each given field in all targets.
macro_rules! numbers {
    ($claim:ident, $given:ident, $to:ident, $($name:ident: $field:ident),+ $(,)?) => {
        $(if let Some(value) = $given.$name {
            $claim.take(Field::$field, None)?;
            $to.iter_mut().for_each(|t| t.$name = Some(value));
        })+
    };
}

impl Creation {
    pub fn new(container: api::Container) -> Creation {
        let updates = Updates { creating: Some(container.id.clone()), ..Updates::default() };
        Creation { container, adjust: api::ContainerAdjustment::default(), updates }
    }

    /// Adds what a plugin answered.
    pub fn apply(&mut self, plugin: &str, answer: api::CreateContainerResponse) -> Result<()> {
        if !answer.evict.is_empty() {
            warn_of_evictions(plugin, &answer.evict);
        }
        if let Some(adjust) = answer.adjust {
            self.adjust(plugin, adjust)?;
        }
        self.updates.apply(plugin, answer.update)
    }

    fn adjust(&mut self, plugin: &str, given: api::ContainerAdjustment) -> Result<()> {
        let id = self.container.id.clone();
        let mut claim = Claim { id: &id, plugin, owners: &mut self.updates.owners };
        let (container, adjust) = (&mut self.container, &mut self.adjust);
        named(
            &mut claim,
            Field::Annotations,
            given.annotations,
            &mut container.annotations,
            &mut adjust.annotations,
        )?;
        mounts(&mut claim, given.mounts, container, adjust)?;
        env(&mut claim, given.env, container, adjust)?;
        if let Some((first, rest)) = given.args.split_first() {
            // An empty word before the arguments: in place of another plugin's.
            let args = if first.is_empty() {
                claim.clear(Field::Args, None);
                rest
            } else {
                &given.args
            };
            claim.take(Field::Args, None)?;
            args.clone_into(&mut adjust.args);
            args.clone_into(&mut container.args);
        }
        if let Some(hooks) = given.hooks
            && hooks != api::Hooks::default()
        {
            claim.owners.share(&id, Field::OciHooks, plugin);
            for to in [&mut container.hooks, &mut adjust.hooks] {
                add_hooks(to.get_or_insert_default(), hooks.clone());
            }
        }
        for limit in given.rlimits {
            claim.take(Field::Rlimits, Some(&limit.r#type))?;
            container.rlimits.retain(|held| held.r#type != limit.r#type);
            container.rlimits.push(limit.clone());
            adjust.rlimits.push(limit);
        }
        for device in given.cdi_devices {
            claim.take(Field::CdiDevices, Some(&device.name))?;
            adjust.cdi_devices.push(device);
        }
        match given.linux {
            Some(linux) => self.adjust_linux(plugin, linux),
            None => Ok(()),
        }
    }

    fn adjust_linux(&mut self, plugin: &str, given: api::LinuxContainerAdjustment) -> Result<()> {
        let id = self.container.id.clone();
        let mut claim = Claim { id: &id, plugin, owners: &mut self.updates.owners };
        let seen = self.container.linux.get_or_insert_default();
        let adjust = self.adjust.linux.get_or_insert_default();
        devices(&mut claim, given.devices, seen, adjust)?;
        if let Some(resources) = given.resources {
            let to = [seen.resources.get_or_insert_default(), adjust.resources.get_or_insert_default()];
            self::resources(&mut claim, resources, to)?;
        }
        if !given.cgroups_path.is_empty() {
            claim.take(Field::CgroupsPath, None)?;
            seen.cgroups_path.clone_from(&given.cgroups_path);
            adjust.cgroups_path = given.cgroups_path;
        }
        if let Some(score) = given.oom_score_adj {
            claim.take(Field::OomScoreAdj, None)?;
            (seen.oom_score_adj, adjust.oom_score_adj) = (Some(score), Some(score));
        }
        if let Some(priority) = given.io_priority {
            claim.take(Field::IoPriority, None)?;
            (seen.io_priority, adjust.io_priority) = (Some(priority), Some(priority));
        }
        if let Some(policy) = given.seccomp_policy {
            claim.take(Field::SeccompPolicy, None)?;
            seen.seccomp_policy = Some(policy.clone());
            adjust.seccomp_policy = Some(policy);
        }
        for namespace in given.namespaces {
            let (kind, removed) = removal(&namespace.r#type);
            claim.take(Field::Namespace, Some(kind))?;
            seen.namespaces.retain(|held| held.r#type != kind);
            if !removed {
                seen.namespaces.push(namespace.clone());
            }
            adjust.namespaces.push(namespace);
        }
        named(&mut claim, Field::Sysctl, given.sysctl, &mut seen.sysctl, &mut adjust.sysctl)?;
        named(
            &mut claim,
            Field::LinuxNetDevices,
            given.net_devices,
            &mut seen.net_devices,
            &mut adjust.net_devices,
        )?;
        if let Some(scheduler) = given.scheduler {
            claim.take(Field::LinuxSched, None)?;
            seen.scheduler = Some(scheduler.clone());
            adjust.scheduler = Some(scheduler);
        }
        if let Some(policy) = given.memory_policy {
            claim.take(Field::MemoryPolicy, None)?;
            adjust.memory_policy = Some(policy);
        }
        if let Some(rdt) = given.rdt {
            if rdt.remove {
                for field in [Field::RdtClosId, Field::RdtSchemata, Field::RdtEnableMonitoring] {
                    claim.clear(field, None);
                }
            }
            let to = adjust.rdt.get_or_insert_default();
            to.remove |= rdt.remove;
            if rdt.clos_id.is_some() {
                claim.take(Field::RdtClosId, None)?;
                to.clos_id = rdt.clos_id;
            }
            if rdt.schemata.is_some() {
                claim.take(Field::RdtSchemata, None)?;
                to.schemata = rdt.schemata;
            }
            if rdt.enable_monitoring.is_some() {
                claim.take(Field::RdtEnableMonitoring, None)?;
                to.enable_monitoring = rdt.enable_monitoring;
            }
        }
        Ok(())
    }
}

/// Entries by name, of which a `-` before the name takes one away.
fn named<V: Clone + Default>(
    claim: &mut Claim,
    field: Field,
    given: HashMap<String, V>,
    seen: &mut HashMap<String, V>,
    adjust: &mut HashMap<String, V>,
) -> Result<()> {
    let (removed, set): (Vec<_>, Vec<_>) = given.into_iter().partition(|(name, _)| removal(name).1);
    for (marked, _) in removed {
        let name = removal(&marked).0.to_owned();
        claim.clear(field, Some(&name));
        seen.remove(&name);
        adjust.remove(&name);
        adjust.insert(marked, V::default());
    }
    for (name, value) in set {
        claim.take(field, Some(&name))?;
        seen.insert(name.clone(), value.clone());
        adjust.insert(name, value);
    }
    Ok(())
}

/// Splits entries with keys into what is taken away and what is set.
fn parted<T>(given: Vec<T>, key: impl Fn(&T) -> &str) -> (BTreeSet<String>, Vec<T>) {
    let (mut removed, mut set) = (BTreeSet::new(), Vec::new());
    for entry in given {
        match removal(key(&entry)) {
            (name, true) => drop(removed.insert(name.to_owned())),
            (_, false) => set.push(entry),
        }
    }
    (removed, set)
}

/// Takes entries away, then sets others, in what the next plugin sees and in the sum; the sum keeps the marks.
#[allow(clippy::too_many_arguments)]
fn keyed<T: Clone>(
    claim: &mut Claim,
    field: Field,
    given: Vec<T>,
    key: impl Fn(&T) -> &str,
    mark: impl Fn(String) -> T,
    seen: &mut Vec<T>,
    adjust: &mut Vec<T>,
) -> Result<()> {
    let (removed, set) = parted(given, &key);
    for name in &removed {
        claim.clear(field, Some(name));
    }
    adjust.retain(|held| !removed.contains(removal(key(held)).0));
    let replaced = |held: &T| removed.contains(key(held)) || set.iter().any(|s| key(s) == key(held));
    seen.retain(|held| !replaced(held));
    adjust.extend(removed.iter().map(|name| mark(format!("-{name}"))));
    for entry in set {
        claim.take(field, Some(key(&entry)))?;
        seen.push(entry.clone());
        adjust.push(entry);
    }
    Ok(())
}

fn mounts(
    claim: &mut Claim,
    given: Vec<api::Mount>,
    container: &mut api::Container,
    adjust: &mut api::ContainerAdjustment,
) -> Result<()> {
    let mark = |destination| api::Mount { destination, ..Default::default() };
    keyed(
        claim,
        Field::Mounts,
        given,
        |m| m.destination.as_str(),
        mark,
        &mut container.mounts,
        &mut adjust.mounts,
    )
}

fn devices(
    claim: &mut Claim,
    given: Vec<api::LinuxDevice>,
    seen: &mut api::LinuxContainer,
    adjust: &mut api::LinuxContainerAdjustment,
) -> Result<()> {
    let mark = |path| api::LinuxDevice { path, ..Default::default() };
    keyed(claim, Field::Devices, given, |d| d.path.as_str(), mark, &mut seen.devices, &mut adjust.devices)
}

fn env(
    claim: &mut Claim,
    given: Vec<api::KeyValue>,
    container: &mut api::Container,
    adjust: &mut api::ContainerAdjustment,
) -> Result<()> {
    let split = |entry: &String| {
        let (key, value) = entry.split_once('=').unwrap_or((entry, ""));
        api::KeyValue { key: key.to_owned(), value: value.to_owned() }
    };
    let mut seen: Vec<_> = container.env.iter().map(split).collect();
    let mark = |key| api::KeyValue { key, value: String::new() };
    keyed(claim, Field::Env, given, |e| e.key.as_str(), mark, &mut seen, &mut adjust.env)?;
    container.env = seen.iter().map(|e| format!("{}={}", e.key, e.value)).collect();
    Ok(())
}

fn add_hooks(to: &mut api::Hooks, given: api::Hooks) {
    to.prestart.extend(given.prestart);
    to.create_runtime.extend(given.create_runtime);
    to.create_container.extend(given.create_container);
    to.start_container.extend(given.start_container);
    to.poststart.extend(given.poststart);
    to.poststop.extend(given.poststop);
}

/// Sets given resources in all of `to`.
fn resources<const N: usize>(
    claim: &mut Claim,
    given: api::LinuxResources,
    mut to: [&mut api::LinuxResources; N],
) -> Result<()> {
    if let Some(given) = given.memory {
        let mut to: Vec<_> = to.iter_mut().map(|t| t.memory.get_or_insert_default()).collect();
        memory(claim, given, &mut to)?;
    }
    if let Some(given) = given.cpu {
        let mut to: Vec<_> = to.iter_mut().map(|t| t.cpu.get_or_insert_default()).collect();
        cpu(claim, given, &mut to)?;
    }
    for limit in given.hugepage_limits {
        claim.take(Field::HugepageLimits, Some(&limit.page_size))?;
        for t in &mut to {
            t.hugepage_limits.retain(|held| held.page_size != limit.page_size);
            t.hugepage_limits.push(limit.clone());
        }
    }
    for (file, value) in given.unified {
        claim.take(Field::CgroupsUnified, Some(&file))?;
        for t in &mut to {
            t.unified.insert(file.clone(), value.clone());
        }
    }
    for t in &mut to {
        t.devices.extend(given.devices.iter().cloned());
    }
    if let Some(class) = given.blockio_class {
        claim.take(Field::BlockioClass, None)?;
        to.iter_mut().for_each(|t| t.blockio_class = Some(class.clone()));
    }
    if let Some(class) = given.rdt_class {
        claim.take(Field::RdtClass, None)?;
        to.iter_mut().for_each(|t| t.rdt_class = Some(class.clone()));
    }
    if let Some(pids) = given.pids {
        claim.take(Field::PidsLimit, None)?;
        to.iter_mut().for_each(|t| t.pids = Some(pids));
    }
    Ok(())
}

fn memory(claim: &mut Claim, given: api::LinuxMemory, to: &mut [&mut api::LinuxMemory]) -> Result<()> {
    numbers!(claim, given, to, limit: MemLimit, reservation: MemReservation, swap: MemSwapLimit, kernel: MemKernelLimit,
        kernel_tcp: MemTcpLimit, swappiness: MemSwappiness, disable_oom_killer: MemDisableOomKiller, use_hierarchy: MemUseHierarchy);
    Ok(())
}

fn cpu(claim: &mut Claim, given: api::LinuxCpu, to: &mut [&mut api::LinuxCpu]) -> Result<()> {
    numbers!(claim, given, to, shares: CpuShares, quota: CpuQuota, period: CpuPeriod, realtime_runtime: CpuRealtimeRuntime,
        realtime_period: CpuRealtimePeriod);
    if !given.cpus.is_empty() {
        claim.take(Field::CpuSetCpUs, None)?;
        to.iter_mut().for_each(|t| t.cpus.clone_from(&given.cpus));
    }
    if !given.mems.is_empty() {
        claim.take(Field::CpuSetMems, None)?;
        to.iter_mut().for_each(|t| t.mems.clone_from(&given.mems));
    }
    Ok(())
}

/// Updates of containers, those that plugins ask for and the one that they are asked about.
#[derive(Clone, Default)]
pub(crate) struct Updates {
    pub owners: Owners,
    /// Not there yet, so not to be updated.
    creating: Option<String>,
    /// The one that is updated, with what the caller and the plugins so far want.
    pub requested: Option<(String, api::LinuxResources)>,
    /// Of others, by the order in which they were first named.
    pub others: Vec<api::ContainerUpdate>,
}

impl Updates {
    pub fn requested(id: &str, resources: api::LinuxResources) -> Updates {
        Updates { requested: Some((id.to_owned(), resources)), ..Updates::default() }
    }

    /// Adds what a plugin asked for.
    pub fn apply(&mut self, plugin: &str, updates: Vec<api::ContainerUpdate>) -> Result<()> {
        for update in updates {
            let id = update.container_id;
            if self.creating.as_ref() == Some(&id) {
                return Err(Error::UpdateOfNew { plugin: plugin.to_owned(), container: id });
            }
            let given = update.linux.and_then(|l| l.resources).unwrap_or_default();
            // A failure that may be ignored leaves nothing behind.
            let mut owners = self.owners.clone();
            let mut claim = Claim { id: &id, plugin, owners: &mut owners };
            let own = self.requested.as_ref().filter(|(requested, _)| *requested == id);
            let at = self.others.iter().position(|held| held.container_id == id);
            let held = at.map(|at| &self.others[at]);
            let mut merged = match (own, held.and_then(|h| h.linux.as_ref()?.resources.as_ref())) {
                (Some((_, resources)), _) | (None, Some(resources)) => resources.clone(),
                (None, None) => api::LinuxResources::default(),
            };
            match resources(&mut claim, given, [&mut merged]) {
                Err(_) if update.ignore_failure => continue,
                other => other?,
            }
            self.owners = owners;
            if own.is_some() {
                self.requested = Some((id, merged));
                continue;
            }
            let ignore_failure = update.ignore_failure && held.is_none_or(|h| h.ignore_failure);
            let linux = Some(api::LinuxContainerUpdate { resources: Some(merged) });
            let next = api::ContainerUpdate { container_id: id, linux, ignore_failure };
            match at {
                Some(at) => self.others[at] = next,
                None => self.others.push(next),
            }
        }
        Ok(())
    }
}

/// Upstream's runtimes do not carry them out either.
pub(crate) fn warn_of_evictions(plugin: &str, evictions: &[api::ContainerEviction]) {
    for e in evictions {
        tracing::warn!(plugin, container = %e.container_id, reason = %e.reason, "an NRI plugin asked to evict a container, which is not done; delete its pod");
    }
}

#[cfg(test)]
mod tests;
