//! What keeps a cluster from starting is said in one line, with a non-zero exit code, and leaves nothing half-made.

use std::net::TcpListener;
use std::process::Command;

use orlop_test_vms::{Cluster, program};

/// The last line on standard error of a start that must fail.
fn refusal(command: &mut Command) -> String {
    let out = command.output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success(), "should have failed: {said}");
    let line = said.lines().last().unwrap_or_default().to_owned();
    assert!(line.starts_with("orlop: ") && !said.contains("panicked"), "{said}");
    line
}

#[test]
fn a_taken_port() {
    let c = Cluster::prepare(11);
    let taken = TcpListener::bind("0.0.0.0:17011").unwrap();
    let line = refusal(&mut c.command("up"));
    assert!(line.contains("17011"), "{line}");
    drop(taken);
}

#[test]
fn a_data_folder_of_another_version() {
    let c = Cluster::prepare(12);
    let pki = c.path("data/server/pki");
    std::fs::create_dir_all(&pki).unwrap();
    std::fs::write(pki.join("version.json"), r#"{"version":99,"data":null}"#).unwrap();
    let line = refusal(&mut c.command("up"));
    assert!(line.contains("version 99") && line.contains("version.json"), "{line}");
}

#[test]
fn without_root() {
    let c = Cluster::prepare(13);
    let up = c.command("up");
    let mut unprivileged = Command::new("setpriv");
    unprivileged
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(up.get_program())
        .args(up.get_args());
    let line = refusal(&mut unprivileged);
    assert!(line.contains("root"), "{line}");
}

#[test]
fn a_broken_image_archive() {
    let dir = tempfile::tempdir().unwrap();
    let broken = dir.path().join("x.tar");
    std::fs::write(&broken, b"not an archive").unwrap();
    let line = refusal(
        Command::new(program("orlop"))
            .args(["image", "import"])
            .arg(&broken)
            .arg("--images-dir")
            .arg(dir.path().join("images")),
    );
    assert!(line.contains("x.tar"), "{line}");
}

#[test]
fn no_cri_server() {
    let line =
        refusal(Command::new(program("orlop")).args(["image", "ls", "--endpoint", "unix:///nowhere.sock"]));
    assert!(line.contains("/nowhere.sock"), "{line}");
}
