//! ExecSync, and the process that any exec starts.

use std::time::Duration;

use oci_spec::runtime::Process;
use orlop_proto::{cri, monitor as proto};

use crate::error::{Error, Result};
use crate::runtime::Runtime;
use crate::store::{Container, ContainerPhase};

/// Output kept of each stream; a probe that prints more is cut, as upstream runtimes do.
const OUTPUT_LIMIT: u32 = 16 << 20;

/// The spec's process is all that is read of it.
#[derive(serde::Deserialize)]
struct ProcessOnly {
    process: Option<Process>,
}

impl Runtime {
    /// The container's own process with another command: same user, environment, capabilities and folder.
    pub fn exec_process(&self, container: &Container, cmd: &[String], tty: bool) -> Result<Vec<u8>> {
        if cmd.first().is_none_or(String::is_empty) {
            return Err(Error::Invalid("exec needs a command".into()));
        }
        container.in_phase(&[ContainerPhase::Running], "exec in it")?;
        let path = self.config.bundle_dir(&container.sandbox_id, &container.id).join("config.json");
        let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
        let invalid =
            |e: serde_json::Error| Error::Internal(format!("{} is not a spec: {e}", path.display()));
        let spec: ProcessOnly = serde_json::from_slice(&bytes).map_err(invalid)?;
        let mut process = spec.process.unwrap_or_default();
        process.set_args(Some(cmd.to_vec())).set_terminal(Some(tty)).set_console_size(None);
        if tty
            && let Some(env) = process.env_mut()
            && !env.iter().any(|e| e.starts_with("TERM="))
        {
            env.push("TERM=xterm".to_owned());
        }
        serde_json::to_vec(&process).map_err(|e| Error::Internal(format!("cannot write a process: {e}")))
    }

    pub async fn exec_sync(&self, request: cri::ExecSyncRequest) -> Result<cri::ExecSyncResponse> {
        let container = self.store.container(&request.container_id)?;
        let sandbox = self.store.sandbox(&container.sandbox_id)?;
        let process = self.exec_process(&container, &request.cmd, false)?;
        let limit = (request.timeout > 0).then(|| Duration::from_secs(request.timeout.unsigned_abs()));
        let exec = proto::Exec {
            container_id: container.id.clone(),
            process,
            tty: false,
            stream: false,
            stdin: false,
            stdout: true,
            stderr: true,
            timeout_ms: limit.map_or(0, |l| u64::try_from(l.as_millis()).unwrap_or(u64::MAX)),
            output_limit: OUTPUT_LIMIT,
        };
        let done = sandbox.monitor.exec(exec, limit).await?;
        if done.timed_out {
            return Err(Error::ExecTimeout { id: container.id.clone(), seconds: request.timeout });
        }
        let (mut stdout, mut stderr) = (done.stdout, done.stderr);
        fit(&mut stdout, &mut stderr);
        Ok(cri::ExecSyncResponse { stdout, stderr, exit_code: done.exit_code })
    }
}

/// Cuts both so that the kubelet, which takes messages of up to 16 MiB, takes the answer. Errors keep a quarter of it.
fn fit(stdout: &mut Vec<u8>, stderr: &mut Vec<u8>) {
    let room = OUTPUT_LIMIT as usize - 1024;
    stderr.truncate(room.saturating_sub(stdout.len()).max(room / 4));
    stdout.truncate(room - stderr.len());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_fit_into_a_message() {
        let mib = 1 << 20;
        for (out, err, want) in [
            (mib, mib, (mib, mib)),
            (16 * mib, 0, (16 * mib - 1024, 0)),
            (16 * mib, 16 * mib, (12 * mib - 768, 4 * mib - 256)),
            (mib, 16 * mib, (mib, 15 * mib - 1024)),
        ] {
            let (mut stdout, mut stderr) = (vec![0; out], vec![0; err]);
            fit(&mut stdout, &mut stderr);
            assert_eq!((stdout.len(), stderr.len()), want);
        }
    }
}
