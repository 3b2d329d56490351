//! Pure: labels of pods and containers, from what the policy has for containers and what the kubelet asks for.

use std::fmt;

use orlop_proto::cri;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Categories from which pods' levels are drawn, as in the MCS policies of distributions.
pub(crate) const CATEGORIES: u32 = 1024;

/// What containers of one kind get. Empty text: no label of ours; the policy decides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Labels {
    pub process: String,
    /// Of files.
    pub mount: String,
}

/// `user:role:type` with a level where the policy has levels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Label {
    user: String,
    role: String,
    kind: String,
    level: String,
}

impl Label {
    fn parse(text: &str) -> Option<Label> {
        // A level may hold colons.
        let mut parts = text.splitn(4, ':').map(str::to_owned);
        let label = Label {
            user: parts.next()?,
            role: parts.next()?,
            kind: parts.next()?,
            level: parts.next().unwrap_or_default(),
        };
        let filled = [&label.user, &label.role, &label.kind].iter().all(|p| !p.is_empty());
        filled.then_some(label)
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.user, self.role, self.kind)?;
        if self.level.is_empty() { Ok(()) } else { write!(f, ":{}", self.level) }
    }
}

/// The level of a label; `None` where it has none.
pub(crate) fn level_of(label: &str) -> Option<&str> {
    label.splitn(4, ':').nth(3).filter(|l| !l.is_empty())
}

/// The policy's labels for containers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Defaults {
    process: Label,
    file: Label,
    /// Of files that all containers may read.
    readonly: Option<Label>,
}

impl Defaults {
    /// From a `lxc_contexts` file: lines of `name = "label"`. `None` if it lacks one of the two.
    pub fn parse(text: &str) -> Option<Defaults> {
        let value = |name: &str| {
            text.lines().find_map(|line| {
                let (key, value) = line.trim().split_once('=')?;
                (key.trim() == name).then(|| value.trim().trim_matches('"'))
            })
        };
        Some(Defaults {
            process: Label::parse(value("process")?)?,
            file: Label::parse(value("file")?)?,
            readonly: value("ro_file").and_then(Label::parse),
        })
    }
}

impl Defaults {
    /// Of processes and of files.
    pub fn both(&self) -> [String; 2] {
        [self.process.to_string(), self.file.to_string()]
    }

    /// The label of images' files.
    pub fn readonly(&self) -> Option<String> {
        self.readonly.as_ref().map(Label::to_string)
    }
}

/// The value of a key of `/etc/selinux/config`.
pub(crate) fn config_value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (name, value) = line.trim().split_once('=')?;
        (name.trim() == key).then(|| value.trim().trim_matches('"'))
    })
}

/// The level of two of the categories.
pub(crate) fn level(one: u32, other: u32) -> Option<String> {
    let (low, high) = (one.min(other) % CATEGORIES, one.max(other) % CATEGORIES);
    let (low, high) = (low.min(high), low.max(high));
    (low != high).then(|| format!("s0:c{low},c{high}"))
}

fn check(asked: &cri::SeLinuxOption) -> Result<()> {
    let name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    let part = |what: &str, text: &str, good: &dyn Fn(char) -> bool| match text.chars().all(good) {
        true => Ok(()),
        false => Err(Error::Invalid(format!("SELinux {what} {text:?} is not valid"))),
    };
    part("user", &asked.user, &name)?;
    part("role", &asked.role, &name)?;
    part("type", &asked.r#type, &name)?;
    part("level", &asked.level, &|c| name(c) || matches!(c, ':' | ','))
}

/// Lays what is asked for over the policy's labels. The type is the process's alone, user and level are also those of its files.
fn combine(
    defaults: Option<&Defaults>,
    asked: &cri::SeLinuxOption,
    level: impl FnOnce() -> Result<String>,
) -> Result<Labels> {
    check(asked)?;
    let or =
        |given: &str, default: &str| if given.is_empty() { default.to_owned() } else { given.to_owned() };
    let Some(d) = defaults else {
        if [&asked.user, &asked.role, &asked.r#type].iter().any(|p| p.is_empty()) {
            return Err(Error::Invalid(
                "this node's SELinux policy has no labels for containers (contexts/lxc_contexts names none, or types that it lacks): \
                 seLinuxOptions must give user, role and type"
                    .into(),
            ));
        }
        let process = Label {
            user: asked.user.clone(),
            role: asked.role.clone(),
            kind: asked.r#type.clone(),
            level: asked.level.clone(),
        };
        return Ok(Labels { process: process.to_string(), mount: String::new() });
    };
    let level = match (asked.level.is_empty(), d.process.level.is_empty()) {
        (false, _) => asked.level.clone(),
        // A policy without levels.
        (true, true) => String::new(),
        (true, false) => level()?,
    };
    let process = Label {
        user: or(&asked.user, &d.process.user),
        role: or(&asked.role, &d.process.role),
        kind: or(&asked.r#type, &d.process.kind),
        level: level.clone(),
    };
    let file = Label { user: or(&asked.user, &d.file.user), level, ..d.file.clone() };
    Ok(Labels { process: process.to_string(), mount: file.to_string() })
}

/// A pod's labels. Without a level in the request it gets one that no other pod has, from `draw`, so that pods cannot touch each
/// other's files.
pub(crate) fn for_sandbox(
    defaults: Option<&Defaults>,
    asked: Option<&cri::SeLinuxOption>,
    draw: impl FnOnce() -> Result<String>,
) -> Result<Labels> {
    match asked {
        None if defaults.is_none() => Ok(Labels::default()),
        None => combine(defaults, &cri::SeLinuxOption::default(), draw),
        Some(asked) => combine(defaults, asked, draw),
    }
}

/// A container's labels: the pod's, or what is asked for with the pod's level, so that it can still share the pod's volumes. The
/// process of a privileged container has none: the policy decides what the runtime's own child becomes.
pub(crate) fn for_container(
    defaults: Option<&Defaults>,
    asked: Option<&cri::SeLinuxOption>,
    pod: &Labels,
    privileged: bool,
) -> Result<Labels> {
    let mut labels = match asked {
        None => pod.clone(),
        Some(asked) => {
            let of_pod = || Ok(level_of(&pod.process).unwrap_or_default().to_owned());
            combine(defaults, asked, of_pod)?
        }
    };
    if privileged {
        labels.process.clear();
    }
    Ok(labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTEXTS: &str = "# a comment\nprocess = \"system_u:system_r:container_t:s0\"\ncontent = \"x\"\n\
                            file = \"system_u:object_r:container_file_t:s0\"\n";

    fn asked(user: &str, role: &str, kind: &str, level: &str) -> cri::SeLinuxOption {
        cri::SeLinuxOption { user: user.into(), role: role.into(), r#type: kind.into(), level: level.into() }
    }

    fn pod() -> Labels {
        Labels {
            process: "system_u:system_r:container_t:s0:c1,c2".into(),
            mount: "system_u:object_r:container_file_t:s0:c1,c2".into(),
        }
    }

    #[test]
    fn files_of_the_policy() {
        let d = Defaults::parse(CONTEXTS).unwrap();
        assert_eq!(d.process.to_string(), "system_u:system_r:container_t:s0");
        assert_eq!((d.file.kind.as_str(), d.readonly()), ("container_file_t", None));
        let more = format!("{CONTEXTS}ro_file=\"u:r:ro_t:s0\"\n");
        assert_eq!(Defaults::parse(&more).unwrap().readonly().as_deref(), Some("u:r:ro_t:s0"));
        assert_eq!(Defaults::parse("process = \"a:b:c\"\n"), None);
        assert_eq!(Defaults::parse("process = \"a\"\nfile = \"a:b:c\""), None);
        let config = "# SELINUXTYPE=old\nSELINUX=enforcing\nSELINUXTYPE=targeted\n";
        assert_eq!(config_value(config, "SELINUXTYPE"), Some("targeted"));
        assert_eq!(config_value(config, "OTHER"), None);
    }

    #[test]
    fn levels() {
        assert_eq!(level(7, 3), Some("s0:c3,c7".into()));
        assert_eq!(level(1025, 1000), Some("s0:c1,c1000".into()));
        assert_eq!(level(5, 5), None);
        assert_eq!(level(5, 5 + CATEGORIES), None);
        assert_eq!(level_of("u:r:t:s0-s0:c0.c1023"), Some("s0-s0:c0.c1023"));
        assert_eq!(level_of("u:r:t"), None);
    }

    #[test]
    fn sandboxes() {
        let d = Defaults::parse(CONTEXTS);
        let draw = || Ok("s0:c1,c2".to_owned());
        let never = || -> Result<String> { panic!("a level is given") };
        assert_eq!(for_sandbox(d.as_ref(), None, draw).unwrap(), pod());
        let l = for_sandbox(d.as_ref(), Some(&asked("", "", "", "s0:c7,c9")), never).unwrap();
        assert_eq!(l.process, "system_u:system_r:container_t:s0:c7,c9");
        assert_eq!(l.mount, "system_u:object_r:container_file_t:s0:c7,c9");
        let l = for_sandbox(d.as_ref(), Some(&asked("my_u", "my_r", "my_t", "")), draw).unwrap();
        assert_eq!(l.process, "my_u:my_r:my_t:s0:c1,c2");
        assert_eq!(l.mount, "my_u:object_r:container_file_t:s0:c1,c2", "the type is the process's alone");
        let flat = Defaults::parse("process = \"u:r:t\"\nfile = \"u:o:f\"");
        let l = for_sandbox(flat.as_ref(), None, never).unwrap();
        assert_eq!((l.process.as_str(), l.mount.as_str()), ("u:r:t", "u:o:f"));
    }

    #[test]
    fn a_policy_without_labels_for_containers() {
        let never = || -> Result<String> { panic!("no level is drawn") };
        assert_eq!(for_sandbox(None, None, never).unwrap(), Labels::default());
        let l = for_sandbox(None, Some(&asked("u", "r", "t", "")), never).unwrap();
        assert_eq!((l.process.as_str(), l.mount.as_str()), ("u:r:t", ""));
        assert!(matches!(for_sandbox(None, Some(&asked("", "", "t", "s0")), never), Err(Error::Invalid(_))));
    }

    #[test]
    fn containers() {
        let d = Defaults::parse(CONTEXTS);
        let of =
            |o: Option<&cri::SeLinuxOption>, privileged| for_container(d.as_ref(), o, &pod(), privileged);
        assert_eq!(of(None, false).unwrap(), pod());
        let l = of(Some(&asked("", "", "my_t", "")), false).unwrap();
        assert_eq!(l.process, "system_u:system_r:my_t:s0:c1,c2", "the pod's level");
        assert_eq!(l.mount, pod().mount);
        let l = of(Some(&asked("", "", "", "s0:c5")), false).unwrap();
        assert_eq!(l.process, "system_u:system_r:container_t:s0:c5");
        assert_eq!(l.mount, "system_u:object_r:container_file_t:s0:c5");
        let l = of(Some(&asked("", "", "my_t", "")), true).unwrap();
        assert_eq!((l.process.as_str(), l.mount), ("", pod().mount));
    }

    #[test]
    fn what_cannot_be_part_of_a_label() {
        let d = Defaults::parse(CONTEXTS);
        for bad in [
            asked("a:b", "", "", ""),
            asked("", "r r", "", ""),
            asked("", "", "t\n", ""),
            asked("", "", "", "s0\","),
            asked("", "", "", "s0\0"),
        ] {
            let e = for_container(d.as_ref(), Some(&bad), &pod(), false);
            assert!(matches!(e, Err(Error::Invalid(_))), "{bad:?}");
        }
    }
}
