//! AppArmor: which profile a container gets, and the default one, which is loaded into the kernel when the first container needs it.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use orlop_proto::cri;
use orlop_proto::cri::security_profile::ProfileType;

use crate::error::{Error, Result};
use crate::runtime::Runtime;

const DEFAULT: &str = "orlop-default";
const DEFAULT_TEXT: &str = include_str!("apparmor.profile");
const LOADED: &str = "/sys/kernel/security/apparmor/profiles";
const PARSERS: [&str; 2] = ["/usr/sbin/apparmor_parser", "/sbin/apparmor_parser"];

/// Whether the kernel has AppArmor. Without its files, as in a container of another runtime, nothing can be done with it.
pub(crate) fn is_on() -> bool {
    fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|s| s.trim() == "Y")
        && Path::new(LOADED).exists()
}

/// What turns a profile's text into the kernel's form.
fn parser() -> Option<PathBuf> {
    PARSERS.iter().map(PathBuf::from).find(|p| p.is_file())
}

/// Whether containers can have the default profile.
pub(crate) fn can_default() -> bool {
    parser().is_some() || is_loaded(DEFAULT).unwrap_or(false)
}

/// Pure: whether a list of `name (mode)` has a profile. Names may hold blanks.
fn lists(profiles: &str, name: &str) -> bool {
    profiles.lines().any(|l| l.rsplit_once(" (").map_or(l, |(n, _)| n) == name)
}

fn is_loaded(name: &str) -> Result<bool> {
    let file = Path::new(LOADED);
    Ok(lists(&fs::read_to_string(file).map_err(Error::io("find AppArmor profiles in", file))?, name))
}

/// Replaces the kernel's copy, if there is one.
fn load(parser: &Path) -> Result<()> {
    let failed = || Error::io("run", parser);
    let mut child = Command::new(parser)
        .args(["--replace", "--skip-cache", "--quiet"])
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed())?;
    let given = match child.stdin.take() {
        Some(mut to) => to.write_all(DEFAULT_TEXT.as_bytes()),
        None => Ok(()),
    };
    let out = child.wait_with_output().map_err(failed())?;
    if out.status.success() {
        return given.map_err(failed());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    let said = said.lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join("; ");
    Err(Error::Unsupported(format!(
        "{} could not load the AppArmor profile {DEFAULT} ({}): {said}",
        parser.display(),
        out.status
    )))
}

/// What a container gets.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Choice {
    /// As the kernel decides.
    None,
    /// Our own; if `wanted`, the container cannot go without.
    Default {
        wanted: bool,
    },
    Named(String),
}

/// What is asked for, also in the field of older kubelets (`runtime/default`, `unconfined`, `localhost/NAME`).
fn asked(security: &cri::LinuxContainerSecurityContext) -> Option<(ProfileType, String)> {
    if let Some(p) = &security.apparmor {
        let name = p.localhost_ref.strip_prefix("localhost/").unwrap_or(&p.localhost_ref);
        return Some((p.profile_type(), name.to_owned()));
    }
    #[allow(deprecated)]
    let old = security.apparmor_profile.as_str();
    match old {
        "" => None,
        "runtime/default" => Some((ProfileType::RuntimeDefault, String::new())),
        "unconfined" => Some((ProfileType::Unconfined, String::new())),
        name => Some((ProfileType::Localhost, name.strip_prefix("localhost/").unwrap_or(name).to_owned())),
    }
}

/// Pure. As upstream's runtimes: who names no profile gets the default one where the kernel has AppArmor, unless privileged; who names
/// one is refused where it has not.
fn choose(security: &cri::LinuxContainerSecurityContext, enabled: bool) -> Result<Choice> {
    let asked = asked(security);
    if !enabled {
        return match asked {
            None | Some((ProfileType::Unconfined, _)) => Ok(Choice::None),
            Some(_) => Err(Error::Invalid(
                "an AppArmor profile is asked for, but this node has no AppArmor in /sys/kernel/security"
                    .into(),
            )),
        };
    }
    Ok(match asked {
        None | Some((ProfileType::RuntimeDefault, _)) if security.privileged => Choice::None,
        None => Choice::Default { wanted: false },
        Some((ProfileType::RuntimeDefault, _)) => Choice::Default { wanted: true },
        Some((ProfileType::Unconfined, _)) => Choice::Named("unconfined".to_owned()),
        Some((ProfileType::Localhost, name)) if name.is_empty() || name.contains(['\n', '\0']) => {
            return Err(Error::Invalid("a localhost AppArmor profile needs a name of one line".into()));
        }
        Some((ProfileType::Localhost, name)) => Choice::Named(name),
    })
}

impl Runtime {
    /// The profile of a container, which the kernel has then.
    pub async fn apparmor_profile(&self, config: &cri::ContainerConfig) -> Result<Option<String>> {
        let security = crate::container::spec::security(config);
        match choose(&security, is_on())? {
            Choice::None => Ok(None),
            Choice::Default { wanted } => self.default_profile(wanted).await,
            Choice::Named(name) if name == "unconfined" || is_loaded(&name)? => Ok(Some(name)),
            Choice::Named(name) => Err(Error::Invalid(format!(
                "the AppArmor profile {name:?} is not loaded on this node; load it with apparmor_parser"
            ))),
        }
    }

    async fn default_profile(&self, wanted: bool) -> Result<Option<String>> {
        // One at a time: the others find it loaded.
        let mut ours = self.apparmor.lock().await;
        let Some(parser) = parser() else {
            return match is_loaded(DEFAULT) {
                Ok(true) => Ok(Some(DEFAULT.to_owned())),
                // As the warning at the start has said.
                _ if !wanted => Ok(None),
                _ => Err(Error::Unsupported(
                    "the default AppArmor profile cannot be loaded: apparmor_parser is missing; install it \
                     (Debian: apt-get install apparmor)"
                        .into(),
                )),
            };
        };
        if !*ours || !is_loaded(DEFAULT)? {
            let done = tokio::task::spawn_blocking(move || load(&parser)).await;
            done.map_err(|e| Error::Internal(format!("loading a profile ended: {e}")))??;
            *ours = true;
        }
        Ok(Some(DEFAULT.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn security(
        profile: Option<(ProfileType, &str)>,
        privileged: bool,
    ) -> cri::LinuxContainerSecurityContext {
        cri::LinuxContainerSecurityContext {
            apparmor: profile
                .map(|(t, name)| cri::SecurityProfile { profile_type: t as i32, localhost_ref: name.into() }),
            privileged,
            ..Default::default()
        }
    }

    #[test]
    fn profiles() {
        use ProfileType::{Localhost, RuntimeDefault, Unconfined};
        let named = |n: &str| Choice::Named(n.to_owned());
        for (profile, privileged, want) in [
            (None, false, Choice::Default { wanted: false }),
            (None, true, Choice::None),
            (Some((RuntimeDefault, "")), false, Choice::Default { wanted: true }),
            (Some((RuntimeDefault, "")), true, Choice::None),
            (Some((Unconfined, "")), false, named("unconfined")),
            (Some((Localhost, "mine")), false, named("mine")),
            (Some((Localhost, "localhost/mine")), true, named("mine")),
        ] {
            assert_eq!(
                choose(&security(profile, privileged), true).unwrap(),
                want,
                "{profile:?} {privileged}"
            );
        }
        assert!(choose(&security(Some((Localhost, "")), false), true).is_err());
        // Without AppArmor.
        assert_eq!(choose(&security(None, false), false).unwrap(), Choice::None);
        assert_eq!(choose(&security(Some((Unconfined, "")), false), false).unwrap(), Choice::None);
        assert!(choose(&security(Some((RuntimeDefault, "")), false), false).is_err());
        assert!(choose(&security(Some((Localhost, "mine")), false), false).is_err());
    }

    #[test]
    #[allow(deprecated)]
    fn the_field_of_older_kubelets() {
        for (text, want) in [
            ("runtime/default", Choice::Default { wanted: true }),
            ("unconfined", Choice::Named("unconfined".into())),
            ("localhost/mine", Choice::Named("mine".into())),
        ] {
            let mut s = security(None, false);
            s.apparmor_profile = text.into();
            assert_eq!(choose(&s, true).unwrap(), want, "{text}");
        }
    }

    #[test]
    fn names_in_the_kernels_list() {
        let list = "orlop-default (enforce)\n/usr/bin/man (complain)\nwith (odd) name (enforce)\n";
        for name in [DEFAULT, "/usr/bin/man", "with (odd) name"] {
            assert!(lists(list, name), "{name}");
        }
        assert!(!lists(list, "orlop") && !lists(list, "enforce"));
    }

    #[test]
    fn the_default_profile_compiles() {
        let parser = parser().expect("apparmor_parser is missing; run `scripts/deps.sh test`");
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/apparmor.profile");
        let out =
            Command::new(parser).args(["--skip-kernel-load", "--skip-cache"]).arg(file).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert!(DEFAULT_TEXT.contains(&format!("profile {DEFAULT} ")));
    }
}
