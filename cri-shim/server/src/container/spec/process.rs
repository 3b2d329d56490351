//! The process: arguments, environment, user, limits.

use oci_spec::runtime::{Process, User as OciUser};
use orlop_proto::cri;

use super::{Input, capabilities, invalid};
use crate::error::Result;
use crate::store::records::User;

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Entrypoint and arguments as Kubernetes combines them with the image's: a command replaces both of the image's, arguments
/// alone replace only its Cmd.
pub(crate) fn args(
    config: &cri::ContainerConfig,
    entrypoint: &[String],
    cmd: &[String],
) -> Result<Vec<String>> {
    let mut out = Vec::new();
    if config.command.is_empty() {
        out.extend_from_slice(entrypoint);
        out.extend_from_slice(if config.args.is_empty() { cmd } else { &config.args });
    } else {
        out.extend_from_slice(&config.command);
        out.extend_from_slice(&config.args);
    }
    if out.first().is_none_or(String::is_empty) {
        return Err(invalid("no command: neither the container nor its image names one"));
    }
    if out.iter().any(|a| a.contains('\0')) {
        return Err(invalid("an argument contains a NUL byte"));
    }
    Ok(out)
}

/// Image's first, the container's over it; the last of equal names wins.
pub(crate) fn env(
    image: &[String],
    hostname: &str,
    config: &cri::ContainerConfig,
    tty: bool,
) -> Result<Vec<String>> {
    let mut out: Vec<String> = Vec::new();
    let mut put = |entry: String| {
        let name = entry.split('=').next().unwrap_or_default();
        match out.iter_mut().find(|e| e.split('=').next() == Some(name)) {
            Some(held) => *held = entry,
            None => out.push(entry),
        }
    };
    put(DEFAULT_PATH.to_owned());
    if !hostname.is_empty() {
        put(format!("HOSTNAME={hostname}"));
    }
    if tty {
        put("TERM=xterm".to_owned());
    }
    // An image may carry anything; what is no assignment is not handed on (CVE-2022-23648's neighbourhood).
    image.iter().filter(|e| e.contains('=') && !e.starts_with('=')).for_each(|e| put(e.clone()));
    for kv in &config.envs {
        let value = std::str::from_utf8(&kv.value)
            .map_err(|_| invalid(format!("the value of env {} is not UTF-8", kv.key)))?;
        if kv.key.is_empty() || kv.key.contains(['=', '\0']) || value.contains('\0') {
            return Err(invalid(format!("env {:?} has a name or value that no process can have", kv.key)));
        }
        put(format!("{}={value}", kv.key));
    }
    if out.iter().any(|e| e.contains('\0')) {
        return Err(invalid("the image's environment contains a NUL byte"));
    }
    Ok(out)
}

/// The OCI form of a user.
pub(crate) fn oci_user(user: &User) -> OciUser {
    let mut out = OciUser::default();
    out.set_uid(user.uid).set_gid(user.gid).set_additional_gids(Some(user.groups.clone()));
    out
}

pub(super) fn process(input: &Input, security: &cri::LinuxContainerSecurityContext) -> Result<Process> {
    let none = Vec::new();
    let image = input.image.config().as_ref();
    let entrypoint = image.and_then(|c| c.entrypoint().as_ref()).unwrap_or(&none);
    let cmd = image.and_then(|c| c.cmd().as_ref()).unwrap_or(&none);
    let image_env = image.and_then(|c| c.env().as_ref()).unwrap_or(&none);
    let image_dir = image.and_then(|c| c.working_dir().clone()).unwrap_or_default();
    let cwd = [input.config.working_dir.as_str(), image_dir.as_str(), "/"]
        .into_iter()
        .find(|d| !d.is_empty())
        .unwrap_or("/");
    if !cwd.starts_with('/') {
        return Err(invalid(format!("working directory {cwd:?} is not absolute")));
    }
    // A descriptor that leaks into the container must not become its working directory (CVE-2024-21626).
    if cwd.starts_with("/proc/self/fd") || cwd.starts_with("/proc/thread-self/fd") {
        return Err(invalid(format!("working directory {cwd:?} is not allowed")));
    }
    let oom = input
        .config
        .linux
        .as_ref()
        .and_then(|l| l.resources.as_ref())
        .map_or(0, |r| r.oom_score_adj.clamp(-1000, 1000) as i32);
    let mut process = Process::default();
    process
        .set_terminal(Some(input.config.tty))
        .set_user(oci_user(input.user))
        .set_args(Some(args(input.config, entrypoint, cmd)?))
        .set_env(Some(env(image_env, input.hostname, input.config, input.config.tty)?))
        .set_cwd(cwd.into())
        .set_capabilities(Some(capabilities::capabilities(security, &input.facts.capabilities)))
        .set_rlimits(None)
        .set_no_new_privileges(Some(security.no_new_privs))
        .set_oom_score_adj(Some(oom.max(input.facts.least_oom_score_adj)))
        .set_apparmor_profile(input.apparmor.clone())
        .set_selinux_label(super::label(&input.selinux.process));
    Ok(process)
}
