//! When a process gets the processor and the disks: scheduler and I/O priority of its spec.

use oci_spec::runtime::{
    IOPriorityClass, LinuxSchedulerFlag, LinuxSchedulerPolicy, Process, Scheduler as SpecScheduler,
};

use crate::sys::{self, SchedulerAttributes};
use crate::{Error, Kind};

/// What a spec asks for.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Schedule {
    processor: Option<SchedulerAttributes>,
    /// As ioprio_set(2) takes it.
    disks: Option<i32>,
}

impl Schedule {
    pub(crate) fn of(p: &Process) -> Result<Schedule, Error> {
        let disks = match p.io_priority() {
            None => None,
            Some(io) => {
                let class = match io.class() {
                    IOPriorityClass::IoprioClassRt => 1,
                    IOPriorityClass::IoprioClassBe => 2,
                    IOPriorityClass::IoprioClassIdle => 3,
                };
                let priority = io.priority();
                if !(0..8).contains(&priority) {
                    let text = format!("an I/O priority is 0 to 7, not {priority}");
                    return Err(Error::new(Kind::Invalid, "spec", text, libc::EINVAL));
                }
                Some(class << 13 | priority as i32)
            }
        };
        Ok(Schedule { processor: p.scheduler().as_ref().map(attributes), disks })
    }

    /// For the calling process.
    pub(crate) fn set(&self) -> Result<(), Error> {
        if let Some(a) = &self.processor {
            sys::set_scheduler(a).map_err(|e| Error::io("scheduler", "cannot set the scheduler", &e))?;
        }
        if let Some(p) = self.disks {
            sys::set_io_priority(p).map_err(|e| Error::io("scheduler", "cannot set the I/O priority", &e))?;
        }
        Ok(())
    }
}

/// The kernel refuses what does not fit together.
fn attributes(s: &SpecScheduler) -> SchedulerAttributes {
    let policy = match s.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    let bit = |f: &LinuxSchedulerFlag| match f {
        LinuxSchedulerFlag::SchedResetOnFork => 0x1,
        LinuxSchedulerFlag::SchedFlagReclaim => 0x2,
        LinuxSchedulerFlag::SchedFlagDLOverrun => 0x4,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x8,
        LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
        LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
        LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
    };
    SchedulerAttributes {
        policy,
        flags: s.flags().iter().flatten().map(bit).fold(0, |a, b| a | b),
        nice: s.nice().unwrap_or(0),
        priority: s.priority().unwrap_or(0).max(0) as u32,
        runtime: s.runtime().unwrap_or(0),
        deadline: s.deadline().unwrap_or(0),
        period: s.period().unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_a_spec_says() {
        let of = |more: serde_json::Value| {
            let mut p = json!({"cwd": "/", "args": ["a"], "user": {"uid": 0, "gid": 0}});
            for (k, v) in more.as_object().unwrap() {
                p[k] = v.clone();
            }
            Schedule::of(&serde_json::from_value(p).unwrap())
        };
        assert_eq!(of(json!({})).unwrap(), Schedule::default());
        let s = of(json!({"ioPriority": {"class": "IOPRIO_CLASS_IDLE", "priority": 7},
            "scheduler": {"policy": "SCHED_RR", "priority": 5, "flags": ["SCHED_RESET_ON_FORK"]}}));
        let s = s.unwrap();
        assert_eq!(s.disks, Some(3 << 13 | 7));
        let want = SchedulerAttributes { policy: 2, priority: 5, flags: 1, ..Default::default() };
        assert_eq!(s.processor, Some(want));
        for priority in [-1, 8] {
            let io = json!({"class": "IOPRIO_CLASS_BE", "priority": priority});
            assert!(of(json!({"ioPriority": io})).is_err());
        }
    }
}
