//! Plugins that the server starts: the programs `NN-name` of a folder.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use crate::inherit;
use crate::plugin::Name;

/// How long a plugin whose connection has ended may take to end, too.
const END_LIMIT: Duration = Duration::from_secs(1);

/// A plugin's program and the text of its configuration.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Program {
    pub name: Name,
    pub path: PathBuf,
    pub config: String,
}

/// The plugins of `dir`, by their names. Files that are not executable are passed over, others that cannot be used are named in
/// a warning.
pub(crate) fn programs(dir: &Path, config_dir: &Path) -> Vec<Program> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(e) => {
            tracing::warn!(dir = %dir.display(), error = %e, "cannot look for NRI plugins");
            return Vec::new();
        }
    };
    let mut out = Vec::new();
    for entry in entries.flatten() {
        let path = entry.path();
        if !fs::metadata(&path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0) {
            continue;
        }
        let found = Name::of_program(&entry.file_name().to_string_lossy())
            .and_then(|name| Ok(Program { config: config(config_dir, &name)?, name, path: path.clone() }));
        match found {
            Ok(program) => out.push(program),
            Err(why) => {
                tracing::warn!(program = %path.display(), why, "an NRI plugin cannot be started");
            }
        }
    }
    out.sort_by(|a, b| a.path.cmp(&b.path));
    out
}

/// The file `NN-name.conf`, else `name.conf`, else nothing.
fn config(dir: &Path, name: &Name) -> Result<String, String> {
    for file in [format!("{name}.conf"), format!("{}.conf", name.base)] {
        let path = dir.join(file);
        match fs::read_to_string(&path) {
            Ok(text) => return Ok(text),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(format!("its configuration {}: {e}", path.display())),
        }
    }
    Ok(String::new())
}

/// Starts a plugin; it speaks over the socket.
pub(crate) fn start(program: &Program) -> io::Result<(UnixStream, Child)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let mut command = Command::new(&program.path);
    command
        .env_clear()
        .env("NRI_PLUGIN_NAME", &program.name.base)
        .env("NRI_PLUGIN_IDX", &program.name.index)
        .env("NRI_PLUGIN_SOCKET", inherit::NUMBER.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        // Why it does not start belongs into the server's log.
        .stderr(Stdio::inherit())
        .kill_on_drop(true);
    inherit::hand_over(&mut command, theirs.into());
    let child = command.spawn()?;
    Ok((UnixStream::from_std(ours)?, child))
}

/// Waits for a plugin's end once its connection is gone, and then makes it end.
pub(crate) async fn end(mut child: Child) {
    if tokio::time::timeout(END_LIMIT, child.wait()).await.is_err() {
        // Both fail only when it has ended.
        let _ = child.start_kill();
        let _ = child.wait().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_programs_are_plugins() {
        let dir = tempfile::tempdir().unwrap();
        let (programs_at, config_at) = (dir.path().join("plugins"), dir.path().join("conf"));
        assert!(programs(&programs_at, &config_at).is_empty());
        fs::create_dir_all(programs_at.join("30-folder")).unwrap();
        fs::create_dir_all(&config_at).unwrap();
        for (file, mode) in
            [("20-b", 0o755), ("10-a.b", 0o755), ("15-text", 0o644), ("plugin", 0o755), ("40-c", 0o755)]
        {
            fs::write(programs_at.join(file), "").unwrap();
            fs::set_permissions(programs_at.join(file), fs::Permissions::from_mode(mode)).unwrap();
        }
        fs::write(config_at.join("b.conf"), "for any b").unwrap();
        fs::write(config_at.join("40-c.conf"), "for 40-c").unwrap();
        fs::write(config_at.join("c.conf"), "for any c").unwrap();
        let found: Vec<_> =
            programs(&programs_at, &config_at).into_iter().map(|p| (p.name.to_string(), p.config)).collect();
        let want = [("10-a.b", ""), ("20-b", "for any b"), ("40-c", "for 40-c")];
        assert_eq!(found, want.map(|(n, c)| (n.to_owned(), c.to_owned())));
    }
}
