//! Pure: what must be changed in a runtime spec before libcontainer may see it.

use oci_spec::runtime::{LinuxNamespaceType, Spec};

/// A change that was made, for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Adaptation {
    /// `noNewPrivileges: false` reads as "set" to libcontainer, which then loads seccomp after it has lost the right to.
    NoNewPrivilegesUnset,
    /// This process may not lower its oom_score_adj so far (no CAP_SYS_RESOURCE): the kernel's value stays.
    OomScoreAdjDropped(i32),
    /// The terminal flag follows the request, not the file.
    TerminalSet(bool),
}

/// What the calling process may do.
#[derive(Clone, Copy, Debug)]
pub struct Rights {
    /// The lowest oom_score_adj that it may set.
    pub oom_score_adj_floor: i32,
}

pub(crate) fn adapt(spec: &mut Spec, tty: bool, rights: Rights) -> Vec<Adaptation> {
    let mut done = Vec::new();
    let Some(process) = spec.process_mut() else { return done };
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
        done.push(Adaptation::NoNewPrivilegesUnset);
    }
    if process.terminal().unwrap_or(false) != tty {
        process.set_terminal(Some(tty));
        done.push(Adaptation::TerminalSet(tty));
    }
    if let Some(wanted) = process.oom_score_adj()
        && wanted < rights.oom_score_adj_floor
    {
        process.set_oom_score_adj(None);
        done.push(Adaptation::OomScoreAdjDropped(wanted));
    }
    done
}

/// Whether the container's own init ends all its processes: a PID namespace made for it (no path).
pub(crate) fn has_own_pid_namespace(spec: &Spec) -> bool {
    spec.linux()
        .as_ref()
        .and_then(|l| l.namespaces().as_ref())
        .is_some_and(|all| all.iter().any(|n| n.typ() == LinuxNamespaceType::Pid && n.path().is_none()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(process: &str) -> Spec {
        serde_json::from_str(&format!(
            r#"{{"ociVersion":"1.2.0","root":{{"path":"/r"}},"process":{{"cwd":"/","args":["a"],"user":{{"uid":0,"gid":0}}{process}}},
                "linux":{{"namespaces":[{{"type":"pid"}},{{"type":"network","path":"/n"}}]}}}}"#
        ))
        .unwrap()
    }

    #[test]
    fn table() {
        let rights = Rights { oom_score_adj_floor: 0 };
        let mut s = spec("");
        assert_eq!(adapt(&mut s, false, rights), vec![]);
        assert!(has_own_pid_namespace(&s));
        let mut s = spec(r#","noNewPrivileges":false,"oomScoreAdj":-997,"terminal":true"#);
        assert_eq!(
            adapt(&mut s, false, rights),
            vec![
                Adaptation::NoNewPrivilegesUnset,
                Adaptation::TerminalSet(false),
                Adaptation::OomScoreAdjDropped(-997)
            ]
        );
        let mut s = spec(r#","noNewPrivileges":true,"oomScoreAdj":-997"#);
        assert_eq!(
            adapt(&mut s, true, Rights { oom_score_adj_floor: -1000 }),
            vec![Adaptation::TerminalSet(true)]
        );
        let p = s.process().as_ref().unwrap();
        assert_eq!((p.no_new_privileges(), p.oom_score_adj()), (Some(true), Some(-997)));
    }
}
