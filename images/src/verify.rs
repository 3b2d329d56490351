//! Programs that say whether an image may be pulled, called as containerd calls those of its `bindir` image verifier: with
//! `-name`, `-digest` and `-stdin-media-type`, the manifest's descriptor on standard input. Exit code 0 admits the image; what the
//! program says on standard output is the reason.

use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use crate::{Digest, Error, Result};

/// How long a program may take.
const PATIENCE: Duration = Duration::from_secs(10);
const BUSY: Duration = Duration::from_millis(50);
/// More than so many bytes of a reason are not kept.
const REASON: u64 = 16 << 10;
const DESCRIPTOR: &str = "application/vnd.oci.descriptor.v1+json";

/// The programs of the folder in the order of their names; none when there is no such folder.
pub(crate) fn programs(dir: Option<&Path>) -> Result<Vec<PathBuf>> {
    let Some(dir) = dir else { return Ok(Vec::new()) };
    let listing = match std::fs::read_dir(dir) {
        Ok(l) => l,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io("list", dir)(e)),
    };
    let mut found = Vec::new();
    for item in listing {
        let path = item.map_err(Error::io("list", dir))?.path();
        // Through links, as in folders of alternatives.
        let meta = std::fs::metadata(&path).map_err(Error::io("read", &path))?;
        if meta.is_file() && meta.permissions().mode() & 0o111 == 0 {
            // Somebody meant it to be asked: to pass it over would admit what it may refuse.
            return Err(Error::Config { path, why: "an image verifier must be executable".into() });
        }
        if meta.is_file() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Asks all of `programs` about a manifest or index.
///
/// # Errors
/// [`Error::Refused`] with the first that does not admit it, or cannot be asked.
pub(crate) async fn ask(programs: &[PathBuf], name: &str, digest: &Digest, manifest: &[u8]) -> Result<()> {
    let descriptor = json!({"mediaType": media_type(manifest), "digest": digest, "size": manifest.len()});
    for program in programs {
        let judged = tokio::time::timeout(PATIENCE, judge(program, name, digest, descriptor.to_string()));
        let why = match judged.await {
            Ok(Ok(None)) => continue,
            Ok(Ok(Some(why))) => why,
            Ok(Err(e)) => format!("it cannot be run: {e}"),
            Err(_) => format!("it has not answered within {PATIENCE:?}"),
        };
        let (program, reference, digest) = (program.clone(), name.to_owned(), digest.to_string());
        return Err(Error::Refused { program, reference, digest, why });
    }
    Ok(())
}

/// What the document calls itself; the names of the formats when it does not.
fn media_type(manifest: &[u8]) -> String {
    let value: serde_json::Value = serde_json::from_slice(manifest).unwrap_or_default();
    let kind = if value.get("manifests").is_some() { "index" } else { "manifest" };
    let own = value.get("mediaType").and_then(serde_json::Value::as_str).map(str::to_owned);
    own.unwrap_or_else(|| format!("application/vnd.oci.image.{kind}.v1+json"))
}

/// Why the program does not admit the image; `None` when it does. Dropped, it ends the program and what that has started.
async fn judge(
    program: &Path,
    name: &str,
    digest: &Digest,
    descriptor: String,
) -> std::io::Result<Option<String>> {
    let mut command = Command::new(program);
    command
        .args(["-name", name, "-digest", &digest.to_string(), "-stdin-media-type", DESCRIPTOR])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .process_group(0)
        .kill_on_drop(true);
    let mut child = loop {
        match command.spawn() {
            // Somebody is still writing it.
            Err(e) if e.kind() == ErrorKind::ExecutableFileBusy => tokio::time::sleep(BUSY).await,
            other => break other?,
        }
    };
    // Goes before the child does, which until it is waited for keeps the group's id from being another's.
    let mut group = Group(child.id().and_then(|id| Pid::from_raw(id.cast_signed())));
    let reason = talk(&mut child, descriptor).await?;
    let status = child.wait().await?;
    group.0 = None;
    Ok((!status.success()).then(|| format!("{status}: {reason}")))
}

/// Kills a process group when dropped.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // Nothing of it may be left.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

/// Writes what it is to know and reads what it says.
async fn talk(child: &mut Child, descriptor: String) -> std::io::Result<String> {
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let write = async move {
        if let Some(mut stdin) = stdin {
            // A program need not read it.
            let _ = stdin.write_all(descriptor.as_bytes()).await;
        }
    };
    let read = async move {
        let mut reason = Vec::new();
        if let Some(mut stdout) = stdout {
            (&mut stdout).take(REASON).read_to_end(&mut reason).await?;
            // It must not wait for somebody to read the rest.
            tokio::io::copy(&mut stdout, &mut tokio::io::sink()).await?;
        }
        Ok(String::from_utf8_lossy(&reason).trim().to_owned())
    };
    tokio::join!(write, read).1
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn script(dir: &Path, name: &str, text: &str) {
        let path = dir.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    async fn verdict(dir: &Path) -> Result<()> {
        let manifest = br#"{"schemaVersion":2,"manifests":[]}"#;
        ask(&programs(Some(dir))?, "r.example/a:1", &Digest::of(manifest), manifest).await
    }

    #[tokio::test]
    async fn what_a_program_started_goes_with_it() {
        let t = tempfile::tempdir().unwrap();
        let fifo = t.path().join("fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from(0o600),
            0,
        )
        .unwrap();
        script(
            t.path(),
            "hangs",
            &format!("(exec 3<>{0}; echo up >&3; exec sleep 1000) & wait", fifo.display()),
        );
        let ((up, is_up), (over, is_over)) =
            (tokio::sync::oneshot::channel(), tokio::sync::oneshot::channel());
        let reader = std::thread::spawn(move || {
            let mut pipe = std::fs::File::open(fifo).unwrap();
            pipe.read_exact(&mut [0; 3]).unwrap();
            up.send(()).unwrap();
            // The end comes when nobody has it open for writing any more.
            assert_eq!(pipe.read(&mut [0]).unwrap(), 0);
            over.send(()).unwrap();
        });
        let (digest, program) = (Digest::of(b""), t.path().join("hangs"));
        tokio::select! {
            r = judge(&program, "r.example/a:1", &digest, String::new()) => panic!("{r:?}"),
            r = is_up => r.unwrap(),
        }
        let over = tokio::time::timeout(Duration::from_secs(30), is_over).await;
        over.expect("what it started has ended").unwrap();
        reader.join().unwrap();
    }

    #[tokio::test]
    async fn programs_decide() {
        let t = tempfile::tempdir().unwrap();
        assert!(programs(None).unwrap().is_empty());
        assert!(programs(Some(&t.path().join("none"))).unwrap().is_empty());
        verdict(t.path()).await.unwrap();

        let said = t.path().join("said");
        std::fs::create_dir(&said).unwrap();
        script(t.path(), "1-asks", &format!("echo \"$@\" > {0}/args; cat > {0}/input", said.display()));
        verdict(t.path()).await.unwrap();
        let digest = Digest::of(br#"{"schemaVersion":2,"manifests":[]}"#);
        let args = std::fs::read_to_string(said.join("args")).unwrap();
        assert_eq!(args, format!("-name r.example/a:1 -digest {digest} -stdin-media-type {DESCRIPTOR}\n"));
        let input: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(said.join("input")).unwrap()).unwrap();
        assert_eq!(
            input,
            json!({"mediaType": "application/vnd.oci.image.index.v1+json", "digest": digest, "size": 34})
        );

        // One that does not read its input, and says more than anybody wants to know.
        script(t.path(), "2-refuses", "echo not signed; yes | head -c 1000000; exit 3");
        let e = verdict(t.path()).await.unwrap_err().to_string();
        assert!(e.contains("2-refuses") && e.contains("exit status: 3: not signed"), "{}", &e[..200]);
        assert!(e.len() < 20_000);
        std::fs::set_permissions(t.path().join("2-refuses"), std::fs::Permissions::from_mode(0o644)).unwrap();
        let e = verdict(t.path()).await.unwrap_err().to_string();
        assert!(e.contains("must be executable"), "{e}");
        std::fs::write(t.path().join("2-refuses"), "\x7fELF").unwrap();
        std::fs::set_permissions(t.path().join("2-refuses"), std::fs::Permissions::from_mode(0o755)).unwrap();
        let e = verdict(t.path()).await.unwrap_err().to_string();
        assert!(e.contains("it cannot be run"), "{e}");

        // Only the link is at fault.
        std::os::unix::fs::symlink("nowhere", t.path().join("0-link")).unwrap();
        let e = verdict(t.path()).await.unwrap_err().to_string();
        assert!(e.contains("0-link"), "{e}");
    }
}
