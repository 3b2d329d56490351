//! One run of one plugin by the execution protocol (specification 1.1.0, section 2).

use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use orlop_base::strays::OWNER;
use orlop_cni_types::{Command, ErrorResult};
use serde_json::{Map, Value};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Child;

use crate::error::{Error, Stderr};

/// A result of a plugin is a few hundred bytes; this bounds what a broken one can make us hold.
const MAX_OUTPUT: usize = 1 << 20;
const MAX_STDERR: usize = 4 << 10;

/// The parameters of one run apart from the configuration.
pub(crate) struct Run<'a> {
    pub plugin: &'a str,
    pub path: PathBuf,
    pub command: Command,
    pub container_id: &'a str,
    /// Empty when there is none (any more).
    pub netns: &'a Path,
    pub ifname: &'a str,
    pub args: &'a str,
    pub bin_dirs: &'a [PathBuf],
    /// See [`OWNER`].
    pub owner: &'a Path,
    pub limit: Duration,
}

pub(crate) fn find(plugin: &str, dirs: &[PathBuf]) -> Result<PathBuf, Error> {
    dirs.iter()
        .map(|d| d.join(plugin))
        .find(|p| p.is_file())
        .ok_or_else(|| Error::PluginNotFound { plugin: plugin.to_owned(), dirs: dirs.to_vec() })
}

impl Run<'_> {
    /// Runs the plugin; gives what it printed, `Null` when that was nothing.
    pub(crate) async fn execute(&self, request: &Map<String, Value>) -> Result<Value, Error> {
        // Serialising a map of JSON values cannot fail.
        let input = serde_json::to_vec(request).unwrap_or_default();
        let started = self.start().await;
        let mut child = started.map_err(|source| Error::Start { plugin: self.path.clone(), source })?;
        let group = child.id();
        // Cancel-safe: on the limit everything is dropped and the whole process group killed below.
        match tokio::time::timeout(self.limit, talk(&mut child, &input)).await {
            Ok(Ok((status, output, stderr))) => self.judge(status, &output, &stderr),
            Ok(Err(source)) => {
                kill_group(group);
                let _ = child.wait().await;
                if source.kind() == io::ErrorKind::FileTooLarge {
                    return Err(Error::TooMuchOutput {
                        plugin: self.plugin.to_owned(),
                        command: self.command,
                        limit: MAX_OUTPUT,
                    });
                }
                Err(Error::Start { plugin: self.plugin.into(), source })
            }
            Err(_) => {
                kill_group(group);
                let _ = child.wait().await;
                Err(Error::Timeout {
                    plugin: self.plugin.to_owned(),
                    command: self.command,
                    limit: self.limit,
                })
            }
        }
    }

    async fn start(&self) -> io::Result<Child> {
        let mut command = tokio::process::Command::new(&self.path);
        command
            .env("CNI_COMMAND", self.command.as_str())
            .env("CNI_CONTAINERID", self.container_id)
            .env("CNI_NETNS", self.netns)
            .env("CNI_IFNAME", self.ifname)
            .env("CNI_ARGS", self.args)
            .env("CNI_PATH", join(self.bin_dirs))
            .env(OWNER, self.owner)
            .env_remove("CNI_NETNS_OVERRIDE")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Its own group, so that a timeout also ends what it started; `strays` goes by it too.
            .process_group(0)
            .kill_on_drop(true);
        let mut tries = 0;
        loop {
            match command.spawn() {
                // Somebody is just replacing the plugin's file.
                Err(e) if e.kind() == io::ErrorKind::ExecutableFileBusy && tries < 10 => {
                    tries += 1;
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                other => return other,
            }
        }
    }

    fn judge(&self, status: ExitStatus, output: &[u8], stderr: &[u8]) -> Result<Value, Error> {
        use std::os::unix::process::ExitStatusExt;
        let (plugin, command) = (self.plugin.to_owned(), self.command);
        let stderr = Stderr(String::from_utf8_lossy(stderr).trim().to_owned());
        let json = serde_json::from_slice::<Value>(output);
        if let Some(signal) = status.signal() {
            return Err(Error::Killed { plugin, command, signal, stderr });
        }
        if !status.success() {
            let parsed = json.ok().and_then(|v| serde_json::from_value::<ErrorResult>(v).ok());
            return Err(match parsed {
                Some(mut source) if source.code != 0 || !source.msg.is_empty() => {
                    if source.msg.is_empty() {
                        source.msg = stderr.0;
                    }
                    Error::Plugin { plugin, command, source }
                }
                _ => Error::Garbage {
                    plugin,
                    command,
                    exit: status.code().unwrap_or(-1),
                    output: excerpt(output),
                    stderr,
                },
            });
        }
        if !stderr.0.is_empty() {
            tracing::debug!(plugin = %self.plugin, command = %self.command, "plugin wrote: {}", stderr.0);
        }
        if output.iter().all(u8::is_ascii_whitespace) {
            return Ok(Value::Null);
        }
        json.map_err(|_| Error::NotJson { plugin, command, output: excerpt(output), stderr })
    }
}

fn excerpt(output: &[u8]) -> String {
    let mut text: String = String::from_utf8_lossy(output).trim().chars().take(200).collect();
    if text.len() < output.len() && text.chars().count() == 200 {
        text.push('…');
    }
    text
}

fn join(dirs: &[PathBuf]) -> std::ffi::OsString {
    std::env::join_paths(dirs).unwrap_or_default()
}

/// Feeds the plugin and reads what it says until it ends.
async fn talk(child: &mut Child, input: &[u8]) -> io::Result<(ExitStatus, Vec<u8>, Vec<u8>)> {
    let (Some(mut stdin), Some(stdout), Some(stderr)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err(io::Error::other("the plugin's pipes are missing"));
    };
    let feed = async move {
        // A plugin may end without reading its input; its answer decides then.
        let _ = stdin.write_all(input).await;
        drop(stdin);
        Ok(())
    };
    let (_, output, stderr, status) =
        tokio::try_join!(feed, read_limited(stdout), read_head(stderr), child.wait())?;
    Ok((status, output, stderr))
}

async fn read_limited(from: impl AsyncRead + Unpin) -> io::Result<Vec<u8>> {
    let mut output = Vec::new();
    from.take(MAX_OUTPUT as u64 + 1).read_to_end(&mut output).await?;
    if output.len() > MAX_OUTPUT { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(output) }
}

/// Keeps the beginning and reads on, so that a talkative plugin does not block.
async fn read_head(mut from: impl AsyncRead + Unpin) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    let mut buffer = [0u8; 1024];
    loop {
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            return Ok(head);
        }
        let room = MAX_STDERR.saturating_sub(head.len());
        head.extend_from_slice(&buffer[..n.min(room)]);
    }
}

fn kill_group(pid: Option<u32>) {
    let pid = pid.and_then(|p| i32::try_from(p).ok()).and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid {
        // It may have ended meanwhile; it is not waited for yet, so the id is not somebody else's.
        let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
    }
}
