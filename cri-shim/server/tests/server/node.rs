//! A server of its own per test, in a folder of its own.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use orlop_base::testkit::{built_program, free_port, unique_name};
use orlop_proto::cri;
use orlop_proto::cri::runtime_service_client::RuntimeServiceClient;
use orlop_proto::images::images_client::ImagesClient;
use tonic::transport::{Channel, Endpoint};

pub const IMAGE: &str = "localhost/busybox:test";

/// For what must come; a loaded machine takes its time.
const PATIENCE: Duration = Duration::from_secs(60);

type Answer<T> = Result<T, tonic::Status>;

pub struct Node {
    pub dir: PathBuf,
    pub cgroup: String,
    /// More flags of the server, from its next start on.
    pub flags: Vec<String>,
    child: Option<Child>,
}

fn crictl_program() -> PathBuf {
    if let Some(path) = std::env::var_os("ORLOP_CRICTL") {
        return path.into();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|d| d.join("crictl")).find(|p| p.exists()).unwrap_or_else(|| {
        panic!("crictl is not on PATH: build it from sigs.k8s.io/cri-tools v1.36 or set ORLOP_CRICTL")
    })
}

/// A busybox image in an OCI archive: `change` alters its files and what its config says.
pub fn make_image(
    dir: &Path,
    name: &str,
    change: impl FnOnce(&Path, oci_spec::image::ConfigBuilder) -> oci_spec::image::ConfigBuilder,
) -> PathBuf {
    let busybox = Path::new("/bin/busybox");
    assert!(busybox.exists(), "/bin/busybox is missing: apt-get install busybox-static");
    let root = dir.join("rootfs");
    for d in ["bin", "etc", "tmp"] {
        fs::create_dir_all(root.join(d)).unwrap();
    }
    fs::copy(busybox, root.join("bin/busybox")).unwrap();
    for applet in [
        "sh", "sleep", "echo", "cat", "id", "true", "hostname", "ls", "readlink", "ps", "grep", "touch",
        "find", "mkdir", "httpd", "mount", "umount", "yes", "head", "test", "kill", "wc", "stat", "env",
    ] {
        fs::hard_link(root.join("bin/busybox"), root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nwww:x:33:33::/:/bin/sh\n").unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nwww:x:33:\n").unwrap();
    let config = oci_spec::image::ConfigBuilder::default()
        .env(vec!["PATH=/bin".to_owned()])
        .cmd(vec!["sleep".to_owned(), "1000".to_owned()]);
    let config = change(&root, config).build().unwrap();
    let archive = dir.join("busybox.tar");
    let spec =
        orlop_images::Build { rootfs: root, name: name.to_owned(), config, created: 0, root_owned: true };
    orlop_images::build(&spec, &archive).unwrap();
    archive
}

pub async fn wait_for(what: &str, mut check: impl FnMut() -> bool) {
    let start = Instant::now();
    while !check() {
        assert!(start.elapsed() < PATIENCE, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

impl Node {
    pub async fn start(name: &str, env: &[(&str, &str)]) -> Node {
        let dir = Node::folder(name);
        Node::start_in(dir, env).await
    }

    /// A server whose disk is a small one of its own: a tmpfs with these mount options. The run folder is elsewhere, as on a node.
    pub async fn start_on_disk(name: &str, options: &str) -> Node {
        let dir = Node::folder(name);
        let mount = |source, at: &Path, options| {
            fs::create_dir_all(at).unwrap();
            nix::mount::mount(Some(source), at, Some("tmpfs"), nix::mount::MsFlags::empty(), options)
                .unwrap();
        };
        mount("tmpfs", &dir, Some(options));
        // By its source the server knows it for its own.
        mount("orlop-run", &dir.join("run"), None);
        Node::start_in(dir, &[]).await
    }

    fn folder(name: &str) -> PathBuf {
        PathBuf::from("/tmp").join(unique_name(&format!("cri-{name}-")))
    }

    async fn start_in(dir: PathBuf, env: &[(&str, &str)]) -> Node {
        assert!(nix::unistd::geteuid().is_root(), "run this test as root");
        fs::create_dir_all(dir.join("cni-conf")).unwrap();
        let cgroup = format!("/{}", dir.file_name().unwrap().to_string_lossy());
        let mut node = Node { dir, cgroup, flags: Vec::new(), child: None };
        let archive = make_image(&node.dir, IMAGE, |_, config| config);
        let done = node.server(&[]).arg("--import").arg(archive).stdout(Stdio::null()).status().unwrap();
        assert!(done.success());
        node.restart(env).await;
        node
    }

    fn server(&self, env: &[(&str, &str)]) -> Command {
        let monitor = built_program(
            "orlop-monitor",
            "ORLOP_MONITOR",
            "run `cargo build -p orlop-monitor` or set ORLOP_MONITOR",
        );
        let server =
            built_program("examples/cri", "ORLOP_CRI_EXAMPLE", "run `cargo build -p orlop-cri --examples`");
        let mut command = Command::new(server);
        command
            .arg("--root")
            .arg(&self.dir)
            .arg("--monitor")
            .arg(monitor)
            .arg("--cni-conf")
            .arg(self.dir.join("cni-conf"))
            .arg("--cni-bin")
            .arg(self.dir.join("cni-bin"))
            .arg("--cdi-dir")
            .arg(self.dir.join("cdi"))
            .arg("--cgroup-parent")
            .arg(&self.cgroup)
            .args(["--cni-timeout", "3"])
            .args(&self.flags)
            .envs(env.iter().copied());
        command
    }

    /// A network whose plugin hands out one address and notes what it is asked; or fails. It fails DEL while there is a file
    /// `del-fails`.
    pub fn network(&self, broken: bool) {
        let bin = self.dir.join("cni-bin");
        fs::create_dir_all(&bin).unwrap();
        let log = self.dir.join("cni.log");
        let add = if broken {
            r#"echo '{"cniVersion":"1.0.0","code":100,"msg":"out of addresses"}'; exit 1"#.to_owned()
        } else {
            r#"echo "{\"cniVersion\":\"1.0.0\",\"interfaces\":[{\"name\":\"eth0\",\"sandbox\":\"$CNI_NETNS\"}],\"ips\":[{\"address\":\"10.99.0.7/24\",\"interface\":0}]}""#.to_owned()
        };
        let script = format!(
            "#!/bin/sh\ncat > /dev/null\necho $CNI_COMMAND >> {}\ncase $CNI_COMMAND in\nADD) {add};;\nDEL) [ ! -e {}/del-fails ];;\nVERSION) echo '{{\"cniVersion\":\"1.0.0\",\"supportedVersions\":[\"1.0.0\"]}}';;\nesac\n",
            log.display(),
            self.dir.display()
        );
        fs::write(bin.join("noting"), script).unwrap();
        fs::set_permissions(bin.join("noting"), fs::Permissions::from_mode(0o755)).unwrap();
        let conf = r#"{"cniVersion":"1.0.0","name":"test","plugins":[{"type":"noting"}]}"#;
        fs::write(self.dir.join("cni-conf/10-test.conflist"), conf).unwrap();
    }

    pub async fn restart(&mut self, env: &[(&str, &str)]) {
        let log = fs::File::options().create(true).append(true).open(self.dir.join("server.log")).unwrap();
        let child = self.server(env).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        self.child = Some(child);
        let start = Instant::now();
        loop {
            if let Ok(mut c) = self.try_client().await
                && c.version(cri::VersionRequest::default()).await.is_ok()
            {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "the server does not answer: {}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// What a server says that does not start.
    pub fn refusal(&self) -> String {
        assert!(self.child.is_none(), "a server runs");
        let out = self.server(&[]).output().unwrap();
        assert!(!out.status.success(), "it started");
        String::from_utf8_lossy(&out.stderr).into_owned()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("server.log")).unwrap_or_default()
    }

    /// As a service manager does; returns when the server has ended.
    pub async fn terminate(&mut self) {
        let Some(child) = &mut self.child else { return };
        let pid = nix::unistd::Pid::from_raw(child.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        wait_for("the server's end", || child.try_wait().unwrap().is_some()).await;
        self.child = None;
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    async fn try_client(&self) -> Result<RuntimeServiceClient<Channel>, tonic::transport::Error> {
        self.channel().await.map(RuntimeServiceClient::new)
    }

    pub async fn channel(&self) -> Result<Channel, tonic::transport::Error> {
        let socket = self.dir.join("cri.sock");
        let connect = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move {
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(
                    tokio::net::UnixStream::connect(socket).await?,
                ))
            }
        });
        Endpoint::from_static("http://cri").connect_with_connector(connect).await
    }

    pub async fn images(&self) -> ImagesClient<Channel> {
        ImagesClient::new(self.channel().await.unwrap())
    }

    /// Another image beside [`IMAGE`]; see [`make_image`].
    pub async fn add_image(
        &self,
        name: &str,
        change: impl FnOnce(&Path, oci_spec::image::ConfigBuilder) -> oci_spec::image::ConfigBuilder,
    ) {
        use orlop_proto::images::{ImportRequest, ImportStart, import_request::Body};
        let dir = self.dir.join(unique_name("image-"));
        fs::create_dir(&dir).unwrap();
        let bytes = fs::read(make_image(&dir, name, change)).unwrap();
        let mut messages = vec![ImportRequest { body: Some(Body::Start(ImportStart::default())) }];
        messages.extend(bytes.chunks(1 << 20).map(|c| ImportRequest { body: Some(Body::Data(c.to_vec())) }));
        self.images().await.import(futures::stream::iter(messages)).await.unwrap();
    }

    /// The server's process.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    pub async fn client(&self) -> RuntimeServiceClient<Channel> {
        self.try_client().await.unwrap()
    }

    pub async fn run_pod(&self, config: &cri::PodSandboxConfig) -> Answer<String> {
        let request =
            cri::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
        Ok(self.client().await.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id)
    }

    pub async fn create(
        &self,
        pod: &str,
        config: cri::ContainerConfig,
        sandbox: &cri::PodSandboxConfig,
    ) -> Answer<String> {
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox.clone()),
        };
        Ok(self.client().await.create_container(request).await?.into_inner().container_id)
    }

    pub async fn start_container(&self, id: &str) -> Answer<()> {
        let request = cri::StartContainerRequest { container_id: id.to_owned() };
        self.client().await.start_container(request).await.map(drop)
    }

    pub async fn run_container(
        &self,
        pod: &str,
        config: cri::ContainerConfig,
        sandbox: &cri::PodSandboxConfig,
    ) -> String {
        let id = self.create(pod, config, sandbox).await.unwrap();
        self.start_container(&id).await.unwrap();
        id
    }

    pub async fn status(&self, id: &str) -> cri::ContainerStatus {
        let request = cri::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        self.client().await.container_status(request).await.unwrap().into_inner().status.unwrap()
    }

    pub async fn pid_of(&self, id: &str) -> u64 {
        let request = cri::ContainerStatusRequest { container_id: id.to_owned(), verbose: true };
        let info = self.client().await.container_status(request).await.unwrap().into_inner().info;
        let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
        info["pid"].as_u64().unwrap()
    }

    pub async fn ended(&self, id: &str) -> cri::ContainerStatus {
        let start = Instant::now();
        loop {
            let status = self.status(id).await;
            if status.state == cri::ContainerState::ContainerExited as i32 {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "{id} did not end: {}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn list(&self, id: Option<&str>) -> Vec<cri::Container> {
        let filter = cri::ContainerFilter { id: id.unwrap_or_default().to_owned(), ..Default::default() };
        let request = cri::ListContainersRequest { filter: Some(filter) };
        self.client().await.list_containers(request).await.unwrap().into_inner().containers
    }

    pub async fn pods(&self) -> Vec<cri::PodSandbox> {
        self.client()
            .await
            .list_pod_sandbox(cri::ListPodSandboxRequest::default())
            .await
            .unwrap()
            .into_inner()
            .items
    }

    pub fn crictl(&self, args: &[&str], stdin: &str) -> String {
        let (ok, text) = self.try_crictl(args, stdin);
        assert!(ok, "crictl {args:?}: {text}\n{}", self.log());
        text.trim().to_owned()
    }

    pub fn crictl_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(crictl_program());
        let endpoint = format!("unix://{}", self.dir.join("cri.sock").display());
        command.args(["-c", "/dev/null", "-t", "20s", "-r", &endpoint, "-i", &endpoint]).args(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Whether it succeeded, and its output; of a failure also its errors.
    pub fn try_crictl(&self, args: &[&str], stdin: &str) -> (bool, String) {
        let mut child = self.crictl_command(args).spawn().unwrap();
        child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
        Node::result(&child.wait_with_output().unwrap())
    }

    /// [`Node::try_crictl`] without input, while other things go on.
    pub async fn crictl_in_background(&self, args: &[&str]) -> (bool, String) {
        let child = self.crictl_command(args).stdin(Stdio::null()).spawn().unwrap();
        let out = tokio::task::spawn_blocking(|| child.wait_with_output().unwrap()).await.unwrap();
        Node::result(&out)
    }

    fn result(out: &std::process::Output) -> (bool, String) {
        let mut text = String::from_utf8_lossy(&out.stdout).into_owned();
        if !out.status.success() {
            text.push_str(&String::from_utf8_lossy(&out.stderr));
        }
        (out.status.success(), text)
    }

    /// Starts a crictl that is killed once `shows` says that its command runs in the container.
    pub async fn vanish(&self, args: &[&str], shows: impl FnMut() -> bool) {
        let mut child = self.crictl_command(args).spawn().unwrap();
        wait_for("the command of the client that is to vanish", shows).await;
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Fetches `/` of the pod's port through a port-forward.
    pub async fn forward(&self, pod: &str, transport: &str, port: u16) -> String {
        use std::io::Read;
        let free = free_port();
        let mut child = self
            .crictl_command(&["port-forward", "--transport", transport, pod, &format!("{free}:{port}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        let mut stream = loop {
            match std::net::TcpStream::connect(("127.0.0.1", free)) {
                Ok(s) => break s,
                Err(e) => assert!(start.elapsed() < PATIENCE, "no port-forward: {e}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
        let mut page = String::new();
        let read = stream.read_to_string(&mut page);
        child.kill().unwrap();
        child.wait().unwrap();
        read.unwrap();
        page
    }

    /// Lines of mountinfo for the run folder itself and for what lies below it.
    pub fn mounts(&self) -> (Vec<String>, Vec<String>) {
        let run = self.dir.join("run").to_string_lossy().into_owned();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let all = mounts.lines().filter(|l| l.contains(&run)).map(str::to_owned);
        all.partition(|l| l.split(' ').nth(4) == Some(&run))
    }

    /// No process, and no mount but that of the run folder, that names this node.
    pub fn nothing_runs(&self, when: &str) {
        let run = self.dir.join("run").to_string_lossy().into_owned();
        let (_, left) = self.mounts();
        assert!(left.is_empty(), "{when}: mounts left: {left:#?}\n{}", self.log());
        // A monitor answers its last request before it ends.
        let start = Instant::now();
        while let Some((_, line)) = processes_of(&run).first() {
            assert!(start.elapsed() < Duration::from_secs(5), "{when}: process left: {line}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn check_clean(&self) {
        self.nothing_runs("at the end");
        assert!(self.mounts().0.is_empty(), "the run folder is still mounted: {}", self.log());
        for hierarchy in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
            let group = hierarchy.path().join(self.cgroup.trim_start_matches('/'));
            let left: Vec<_> = fs::read_dir(&group)
                .map(|d| d.flatten().filter(|e| e.path().is_dir()).map(|e| e.file_name()).collect())
                .unwrap_or_default();
            assert!(left.is_empty(), "cgroups left in {}: {left:?}", group.display());
        }
        for place in ["images/rootfs", "images/writable", "state/new/sandboxes", "state/new/containers"] {
            let place = self.dir.join(place);
            let left = fs::read_dir(&place).map(|d| d.flatten().count()).unwrap_or(0);
            assert_eq!(left, 0, "folders left in {}", place.display());
        }
    }

    pub fn stop_and_check(mut self) {
        if let Some(mut child) = self.child.take() {
            let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
            child.wait().unwrap();
        }
        self.check_clean();
    }

    pub fn purge_and_check(&self) {
        // The lock is the running server's; it must go first.
        if let Some(child) = &self.child {
            let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
            let _ = nix::sys::wait::waitpid(pid, None);
        }
        let out = self.server(&[]).arg("--purge").output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        self.check_clean();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
        let _ = self.server(&[]).arg("--purge").output();
        // A failed test may leave a monitor that its server cannot end. A dead one can be cleaned up after.
        let run = self.dir.join("run").to_string_lossy().into_owned();
        let left = processes_of(&run);
        if !left.is_empty() {
            for (pid, _) in left {
                let pid = nix::unistd::Pid::from_raw(pid);
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
            let _ = self.server(&[]).arg("--purge").output();
        }
        if std::thread::panicking() {
            eprintln!("--- the server's log:\n{}", self.log());
        }
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let _ = fs::remove_dir(hierarchy.path().join(self.cgroup.trim_start_matches('/')));
        }
        // Only a disk of its own is mounted there, and its run folder if the server did not take that away.
        let _ = nix::mount::umount(&self.dir.join("run"));
        let _ = nix::mount::umount(&self.dir);
        let _ = fs::remove_dir_all(&self.dir);
    }
}

pub fn sandbox_config(node: &Node, name: &str, host_network: bool) -> cri::PodSandboxConfig {
    let options = cri::NamespaceOption {
        network: if host_network { cri::NamespaceMode::Node } else { cri::NamespaceMode::Pod } as i32,
        pid: if host_network { cri::NamespaceMode::Container } else { cri::NamespaceMode::Pod } as i32,
        ..Default::default()
    };
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            namespace: "default".to_owned(),
            attempt: 0,
        }),
        log_directory: node.dir.join("logs").to_string_lossy().into_owned(),
        linux: Some(cri::LinuxPodSandboxConfig {
            cgroup_parent: node.cgroup.clone(),
            security_context: Some(cri::LinuxSandboxSecurityContext {
                namespace_options: Some(options),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

pub fn container_config(name: &str, command: &[&str]) -> cri::ContainerConfig {
    cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(cri::ImageSpec { image: IMAGE.to_owned(), ..Default::default() }),
        command: command.iter().map(|s| (*s).to_owned()).collect(),
        log_path: format!("{name}.log"),
        ..Default::default()
    }
}

/// Processes that were started with `run` as their folder, and their command lines.
fn processes_of(run: &str) -> Vec<(i32, String)> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let lines = entries.filter_map(|entry| {
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        Some((entry.file_name().to_str()?.parse().ok()?, String::from_utf8_lossy(&line).replace('\0', " ")))
    });
    lines.filter(|(_, line)| line.contains(&format!("--dir {run}"))).collect()
}

/// Gives the pod a user namespace whose root is `host_id` outside, and a network that one needs.
pub fn with_user_namespace(config: &mut cri::PodSandboxConfig, host_id: u32) -> Vec<cri::IdMapping> {
    let map = vec![cri::IdMapping { host_id, container_id: 0, length: 65536 }];
    let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
    security.namespace_options.get_or_insert_default().userns_options = Some(cri::UserNamespace {
        mode: cri::NamespaceMode::Pod as i32,
        uids: map.clone(),
        gids: map.clone(),
    });
    map
}

/// What a shell in the container prints; it must succeed.
pub async fn shell(node: &Node, id: &str, script: &str) -> String {
    let done = exec(&mut node.client().await, id, &["sh", "-c", script], 20).await.unwrap();
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert_eq!(done.exit_code, 0, "{script}: {out}{err}");
    out.trim().to_owned()
}

pub async fn exec(
    client: &mut RuntimeServiceClient<Channel>,
    id: &str,
    cmd: &[&str],
    timeout: i64,
) -> Answer<cri::ExecSyncResponse> {
    let request = cri::ExecSyncRequest {
        container_id: id.to_owned(),
        cmd: cmd.iter().map(|s| (*s).to_owned()).collect(),
        timeout,
    };
    Ok(client.exec_sync(request).await?.into_inner())
}
