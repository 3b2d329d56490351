//! ListContainers and its filter.

use orlop_proto::cri;

use super::status::state;
use crate::filter::labels_fit;
use crate::runtime::Runtime;
use crate::store::ContainerRecord;

fn fits(r: &ContainerRecord, filter: &cri::ContainerFilter) -> bool {
    r.id.starts_with(&filter.id)
        && r.sandbox_id.starts_with(&filter.pod_sandbox_id)
        && filter.state.as_ref().is_none_or(|s| s.state == state(r) as i32)
        && labels_fit(&r.config.labels, &filter.label_selector)
}

impl Runtime {
    pub fn list_containers(&self, filter: Option<cri::ContainerFilter>) -> Vec<cri::Container> {
        let filter = filter.unwrap_or_default();
        self.store
            .containers()
            .iter()
            .map(|c| c.record())
            .filter(|r| fits(r, &filter))
            .map(|r| cri::Container {
                id: r.id.clone(),
                pod_sandbox_id: r.sandbox_id.clone(),
                metadata: Some(r.metadata()),
                image: r.config.image.clone(),
                image_ref: r.image_ref.clone(),
                state: state(&r) as i32,
                created_at: r.created_at_ns,
                labels: r.config.labels.clone(),
                annotations: r.config.annotations.clone(),
                image_id: r.image_id.clone(),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::ContainerPhase;

    fn record(id: &str, sandbox: &str, phase: ContainerPhase) -> ContainerRecord {
        ContainerRecord {
            id: id.into(),
            sandbox_id: sandbox.into(),
            phase,
            config: Default::default(),
            resources: Default::default(),
            image_id: String::new(),
            image_ref: String::new(),
            log_path: String::new(),
            cgroups_path: String::new(),
            user: Default::default(),
            stop_signal: 15,
            selinux: Default::default(),
            image_volumes: vec![],
            pid: 0,
            created_at_ns: 0,
            started_at_ns: 0,
            finished_at_ns: 0,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            start_unanswered: false,
        }
    }

    #[test]
    fn filters() {
        let r = record("abc", "xyz", ContainerPhase::Running);
        let f = |id: &str, sandbox: &str, state: Option<i32>| cri::ContainerFilter {
            id: id.into(),
            pod_sandbox_id: sandbox.into(),
            state: state.map(|state| cri::ContainerStateValue { state }),
            ..Default::default()
        };
        for (filter, want) in [
            (f("", "", None), true),
            (f("ab", "x", Some(1)), true),
            (f("b", "", None), false),
            (f("", "y", None), false),
            (f("", "", Some(2)), false),
        ] {
            assert_eq!(fits(&r, &filter), want, "{filter:?}");
        }
    }

    #[test]
    fn a_start_without_an_answer() {
        let mut r = record("a", "b", ContainerPhase::Created);
        assert_eq!((state(&r), r.may_run()), (cri::ContainerState::ContainerCreated, false));
        r.start_unanswered = true;
        assert_eq!((state(&r), r.may_run()), (cri::ContainerState::ContainerUnknown, true));
        r.phase = ContainerPhase::Running;
        assert_eq!((state(&r), r.may_run()), (cri::ContainerState::ContainerRunning, true));
        r.exited(0, false, 5);
        assert_eq!((state(&r), r.may_run()), (cri::ContainerState::ContainerExited, false));
    }

    #[test]
    fn ends_and_their_reasons() {
        for (code, oom, reason) in [(0, false, "Completed"), (1, false, "Error"), (137, true, "OOMKilled")] {
            let mut r = record("a", "b", ContainerPhase::Running);
            r.exited(code, oom, 5);
            assert_eq!(
                (r.reason.as_str(), r.exit_code, state(&r)),
                (reason, code, cri::ContainerState::ContainerExited)
            );
        }
        let mut r = record("a", "b", ContainerPhase::Running);
        r.lost(5, "gone");
        assert_eq!((r.reason.as_str(), r.exit_code), ("Unknown", 255));
    }
}
