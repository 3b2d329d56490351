//! CheckpointContainer. A script in criu's place shows what is around it on any kernel; criu itself works on the kernel of the
//! virtual machine, whose test has a real checkpoint.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use orlop_proto::cri;
use tonic::Code;

use crate::node::{Node, container_config, sandbox_config, shell, wait_for};

const COUNT: &str = "i=0; while :; do i=$((i+1)); echo $i >/count; sleep 0.02; done";

/// Reads its arguments as criu does, then does `work` with `$images`, `$logs`, `$tree` and `$freezer`.
fn criu(node: &Node, work: &str) -> PathBuf {
    let program = node.dir.join("criu");
    let script = format!(
        "#!/bin/sh\necho \"$@\" >{}/criu-arguments\n\
         while [ $# -gt 0 ]; do case $1 in\n\
         --images-dir) images=$2;; --work-dir) logs=$2;; --tree) tree=$2;; --freeze-cgroup) freezer=$2;;\n\
         esac; shift; done\n{work}\n",
        node.dir.display()
    );
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    program
}

struct Counter {
    node: Node,
    pod: String,
    id: String,
    config: cri::PodSandboxConfig,
}

impl Counter {
    /// With `criu` in its place; `None`: the machine's own.
    async fn start(name: &str, work: Option<&str>) -> Counter {
        let mut node = Node::start(name, &[]).await;
        node.network(false);
        if let Some(work) = work {
            let program = criu(&node, work);
            node.flags = vec!["--criu".into(), program.to_string_lossy().into_owned()];
        }
        node.kill();
        node.restart(&[]).await;
        let mut config = sandbox_config(&node, name, false);
        let options = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        options.namespace_options.as_mut().unwrap().pid = cri::NamespaceMode::Container as i32;
        wait_for("the network", || node.crictl(&["info"], "").contains("\"NetworkReady\"")).await;
        let pod = node.run_pod(&config).await.unwrap();
        let mut container = container_config("count", &["sh", "-c", COUNT]);
        container.mounts = vec![cri::Mount {
            container_path: "/volume".into(),
            host_path: node.dir.join("cni-conf").to_string_lossy().into_owned(),
            ..Default::default()
        }];
        let id = node.run_container(&pod, container, &config).await;
        Counter { node, pod, id, config }
    }

    async fn checkpoint(&self, location: &Path, timeout: i64) -> Result<(), tonic::Status> {
        let request = cri::CheckpointContainerRequest {
            container_id: self.id.clone(),
            location: location.to_string_lossy().into_owned(),
            timeout,
        };
        self.node.client().await.checkpoint_container(request).await.map(drop)
    }

    /// It runs, is not frozen, and nothing of the checkpoint is left but what is expected in its folder.
    async fn goes_on(&self, folder: &Path, expected: &[&str]) {
        let before = shell(&self.node, &self.id, "cat /count").await;
        let again = format!("while [ \"$(cat /count)\" = {before} ]; do sleep 0.01; done; echo counts");
        assert_eq!(shell(&self.node, &self.id, &again).await, "counts");
        let names = |dir: &Path| -> Vec<String> {
            let list = fs::read_dir(dir).into_iter().flatten().flatten();
            list.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
        };
        assert_eq!(names(folder), expected);
        assert_eq!(names(&self.node.dir.join("state/transfer")), [""; 0]);
    }

    async fn network_tables(&self) -> String {
        let pid = self.node.pid_of(&self.id).await.to_string();
        let mut list = Command::new("nsenter");
        let out = list.args(["-t", &pid, "-n", "nft", "list", "tables"]).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    fn folder(&self) -> PathBuf {
        let folder = self.node.dir.join("checkpoints");
        fs::create_dir_all(&folder).unwrap();
        folder
    }
}

fn files(archive: &mut dyn Read) -> BTreeMap<String, Vec<u8>> {
    let mut tar = tar::Archive::new(archive);
    let read = |e: std::io::Result<tar::Entry<'_, &mut dyn Read>>| {
        let mut e = e.unwrap();
        let mut bytes = Vec::new();
        e.read_to_end(&mut bytes).unwrap();
        (e.path().unwrap().to_string_lossy().into_owned(), bytes)
    };
    tar.entries().unwrap().map(read).collect()
}

#[tokio::test]
async fn the_archive_has_what_tools_look_for() {
    let work = "cat $freezer/freezer.state $freezer/cgroup.events >$images/pages-1.img 2>/dev/null\n\
                echo log >$logs/dump.log; echo stats >$logs/stats-dump";
    let c = Counter::start("checkpoint", Some(work)).await;
    shell(&c.node, &c.id, "echo new >/made; rm /etc/group; echo x >/volume/untouched").await;
    let folder = c.folder();
    let location = folder.join("count.tar");
    c.checkpoint(&location, 0).await.unwrap();
    c.goes_on(&folder, &["count.tar"]).await;
    assert_eq!(fs::metadata(&location).unwrap().permissions().mode() & 0o7777, 0o600);
    let all = files(&mut fs::File::open(&location).unwrap());
    let names: Vec<&str> = all.keys().map(String::as_str).collect();
    let want = [
        "./",
        "bind.mounts",
        "checkpoint/",
        "checkpoint/descriptors.json",
        "checkpoint/pages-1.img",
        "config.dump",
        "container.log",
        "deleted.files",
        "dump.log",
        "rootfs-diff.tar",
        "spec.dump",
        "stats-dump",
        "status",
        "status.dump",
    ];
    assert_eq!(names, want);
    let state = String::from_utf8_lossy(&all["checkpoint/pages-1.img"]).into_owned();
    assert!(state.contains("FROZEN") || state.contains("frozen 1"), "not frozen: {state}");
    let json = |name: &str| serde_json::from_slice::<serde_json::Value>(&all[name]).unwrap();
    assert_eq!(json("deleted.files"), serde_json::json!(["etc/group"]));
    assert_eq!(
        (&json("config.dump")["id"], &json("config.dump")["name"]),
        (&c.id.clone().into(), &"count".into())
    );
    assert_eq!(json("spec.dump")["annotations"]["io.kubernetes.cri.sandbox-id"], c.pod);
    assert_eq!(json("status.dump")["metadata"]["name"], "count");
    assert_eq!(json("bind.mounts")[0]["destination"], "/volume");
    let streams = json("checkpoint/descriptors.json");
    assert!(streams[1].as_str().unwrap().starts_with("pipe:["), "{streams}");
    let changed = files(&mut &all["rootfs-diff.tar"][..]);
    assert_eq!(changed["made"], b"new\n");
    assert!(changed.contains_key("count") && !changed.contains_key("etc/group"), "{:?}", changed.keys());
    let said = fs::read_to_string(c.node.dir.join("criu-arguments")).unwrap();
    for part in
        ["mnt[/volume]:/volume", "mnt[/etc/hosts]:/etc/hosts", "mnt[/dev/shm]:/dev/shm", "]:extRootNetNS"]
    {
        assert!(said.contains(part), "{part} is missing in {said}");
    }
    assert!(said.contains("mnt[/proc/keys]:/dev/null") && !said.contains("mnt[/proc]"), "{said}");
    // A second one replaces the first.
    c.checkpoint(&location, 10).await.unwrap();
    c.node.purge_and_check();
}

#[tokio::test]
async fn a_failure_says_what_criu_said_and_leaves_nothing() {
    let work = "echo '(00.1) Error (criu/mount.c:10): mnt: an odd mount' >$logs/dump.log; exit 1";
    let c = Counter::start("no-checkpoint", Some(work)).await;
    let folder = c.folder();
    let refused = c.checkpoint(&folder.join("a.tar"), 0).await.unwrap_err();
    assert!(refused.code() == Code::Unknown && refused.message().ends_with("mnt: an odd mount"), "{refused}");
    c.goes_on(&folder, &[]).await;
    // Another folder that is not there.
    let nowhere = c.checkpoint(&folder.join("none/a.tar"), 0).await.unwrap_err();
    assert_eq!(nowhere.code(), Code::Unknown);
    for bad in ["", "relative.tar"] {
        assert_eq!(c.checkpoint(Path::new(bad), 0).await.unwrap_err().code(), Code::InvalidArgument);
    }
    assert_eq!(c.checkpoint(&folder.join("a.tar"), -1).await.unwrap_err().code(), Code::InvalidArgument);
    fs::remove_file(c.node.dir.join("criu")).unwrap();
    let missing = c.checkpoint(&folder.join("a.tar"), 0).await.unwrap_err();
    assert!(
        missing.code() == Code::Unimplemented && missing.message().contains("apt-get install criu"),
        "{missing}"
    );
    let created =
        c.node.create(&c.pod, container_config("idle", &["sleep", "1000"]), &c.config).await.unwrap();
    let request = cri::CheckpointContainerRequest {
        container_id: created,
        location: folder.join("a.tar").to_string_lossy().into_owned(),
        timeout: 0,
    };
    let early = c.node.client().await.checkpoint_container(request).await.unwrap_err();
    assert_eq!(early.code(), Code::FailedPrecondition);
    c.goes_on(&folder, &[]).await;
    c.node.purge_and_check();
}

/// A criu that hangs, in the middle of which it has closed the pod's network.
const HANGS: &str = "nsenter -t $tree -n nft add table inet CRIU-$tree; echo half >$images/half; touch $logs/hangs; sleep 1000";

#[tokio::test]
async fn a_hanging_criu_is_ended_and_the_container_goes_on() {
    let mut c = Counter::start("checkpoint-hangs", Some(HANGS)).await;
    let folder = c.folder();
    let late = c.checkpoint(&folder.join("a.tar"), 2).await.unwrap_err();
    assert!(late.code() == Code::DeadlineExceeded && late.message().contains("did not end"), "{late}");
    c.goes_on(&folder, &[]).await;
    assert_eq!(c.network_tables().await, "");
    // The same when the server is killed in the middle, or is told to stop and does not wait any longer: its next start does it.
    let work = c.node.dir.join("state/transfer").join(format!("checkpoint-{}", c.id));
    let hangs = work.join("archive/hangs");
    let location = folder.join("b.tar");
    for killed in [true, false] {
        tokio::select! {
            done = c.checkpoint(&location, 60) => panic!("{done:?}"),
            () = wait_for("the hanging criu", || hangs.exists()) => {}
        }
        assert!(c.network_tables().await.contains("CRIU-"));
        if killed {
            c.node.kill();
        } else {
            c.node.terminate().await;
        }
        c.node.restart(&[]).await;
        c.goes_on(&folder, &[]).await;
        assert_eq!(c.network_tables().await, "", "killed: {killed}");
    }
    c.node.purge_and_check();
}

/// Where criu itself says that it cannot work on this kernel, its reason is told; everywhere else it does its work.
#[tokio::test]
async fn criu_itself() {
    let check = Command::new("criu").arg("check").output();
    let check = check.unwrap_or_else(|e| panic!("criu: {e}; install it: scripts/deps.sh test"));
    let c = Counter::start("criu", None).await;
    let folder = c.folder();
    let done = c.checkpoint(&folder.join("a.tar"), 60).await;
    if check.status.success() {
        done.unwrap();
        c.goes_on(&folder, &["a.tar"]).await;
    } else {
        let e = done.unwrap_err();
        let prefix = format!("criu could not checkpoint container {}: ", c.id);
        let reason = e.message().split_once(&prefix).map(|(_, reason)| reason);
        let known = String::from_utf8_lossy(&check.stderr).into_owned();
        assert!(
            e.code() == Code::Unknown && reason.is_some_and(|r| known.contains(r)),
            "{e}, not one of {known}"
        );
        c.goes_on(&folder, &[]).await;
    }
    c.node.purge_and_check();
}

/// A runtime is asked for its own `checkpoint`.
#[tokio::test]
async fn another_runtime_does_it_itself_or_is_named() {
    let mut node = Node::start("checkpoint-runtimes", &[]).await;
    for (name, body) in [
        (
            "able",
            "images=; for w; do [ \"$last\" = --image-path ] && images=$w; last=$w; done; [ -z \"$images\" ] || cat $CRIU_CONFIG_FILE >$images/by-able; exit 0",
        ),
        ("bare", "exit 1"),
    ] {
        let program = node.dir.join(name);
        let script =
            format!("#!/bin/sh\ncase \" $* \" in *\" checkpoint \"*) {body};; esac\nexec runc \"$@\"\n");
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        node.flags.extend(["--runtime-handler".into(), format!("{name}={}", program.display())]);
    }
    node.kill();
    node.restart(&[]).await;
    for name in ["able", "bare"] {
        let config = sandbox_config(&node, name, true);
        let request =
            cri::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: name.into() };
        let pod = node.client().await.run_pod_sandbox(request).await.unwrap().into_inner().pod_sandbox_id;
        let id = node.run_container(&pod, container_config(name, &["sleep", "1000"]), &config).await;
        let location = node.dir.join(format!("{name}.tar"));
        let request = cri::CheckpointContainerRequest {
            container_id: id.clone(),
            location: location.to_string_lossy().into_owned(),
            timeout: 0,
        };
        let done = node.client().await.checkpoint_container(request).await;
        if name == "able" {
            done.unwrap();
            let all = files(&mut fs::File::open(&location).unwrap());
            assert_eq!(all["checkpoint/by-able"], b"network-lock nftables\n", "{:?}", all.keys());
        } else {
            let refused = done.unwrap_err();
            assert!(refused.code() == Code::Unimplemented && refused.message().contains("bare"), "{refused}");
            assert!(!location.exists());
        }
        assert_eq!(shell(&node, &id, "echo alive").await, "alive");
    }
    node.purge_and_check();
}
