//! A server of its own for each test, and kubectl against it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use orlop_apiserver::{Config, Error, run};
use orlop_base::supervise::Ready;
use orlop_base::testkit::free_port;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub struct Cluster {
    pub config: Config,
    pub url: String,
    pub dir: PathBuf,
    _temp: Option<tempfile::TempDir>,
    stop: CancellationToken,
    server: JoinHandle<Result<(), Error>>,
}

pub fn config(dir: &Path) -> Config {
    let mut config = Config::new(dir.to_owned());
    config.listen = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
    config.advertise_address = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let tokens = dir.join("tokens.csv");
    std::fs::write(&tokens, "jane-token,jane,u1,\"dev\"\n").expect("token file");
    config.token_auth_file = Some(tokens);
    config
}

impl Cluster {
    pub async fn start() -> Cluster {
        let temp = tempfile::tempdir().expect("a temporary folder");
        let config = config(temp.path());
        Cluster::start_with(config, Some(temp)).await
    }

    pub async fn start_with(config: Config, temp: Option<tempfile::TempDir>) -> Cluster {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
        let (server, stop) = loop {
            let (ready, stop) = (Ready::default(), CancellationToken::new());
            let mut server = tokio::task::spawn(run(config.clone(), ready.clone(), stop.clone()));
            tokio::select! {
                () = ready.wait() => break (server, stop),
                // The store's threads of the run before this one, in this process, close the database a moment after it.
                Ok(Err(Error::Store(_))) = &mut server, if tokio::time::Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                () = tokio::time::sleep_until(deadline) => panic!("the server is not ready after 30 s"),
            }
        };
        let url = format!("https://{}", config.listen);
        Cluster { url, dir: config.data_dir.clone(), config, _temp: temp, stop, server }
    }

    /// Stops the server and gives its folder back.
    pub async fn stop(self) -> (Config, Option<tempfile::TempDir>) {
        self.stop.cancel();
        let ended = tokio::time::timeout(Duration::from_secs(15), self.server).await;
        ended.expect("ends in time").expect("does not panic").expect("ends well");
        (self.config, self._temp)
    }

    /// kubectl as the administrator.
    pub async fn kubectl(&self, args: &[&str]) -> Output {
        self.kubectl_with(args, "").await
    }

    pub async fn kubectl_with(&self, args: &[&str], input: &str) -> Output {
        let admin = self.config.admin_kubeconfig.display().to_string();
        let mut all = vec!["--kubeconfig", admin.as_str()];
        all.extend(args);
        self.plain_kubectl(&all, input).await
    }

    /// Creates an object in the default namespace; `more` is JSON after the metadata.
    pub async fn create(&self, version: &str, kind: &str, name: &str, more: &str) {
        let object =
            format!(r#"{{"apiVersion":"{version}","kind":"{kind}","metadata":{{"name":"{name}"}}{more}}}"#);
        ok(self.kubectl_with(&["create", "--validate=false", "-f", "-"], &object).await);
    }

    /// Binds a role to a subject in the default namespace.
    pub async fn bind(&self, name: &str, role_kind: &str, role: &str, kind: &str, subject: &str) {
        const GROUP: &str = "rbac.authorization.k8s.io";
        let more = format!(
            r#","roleRef":{{"apiGroup":"{GROUP}","kind":"{role_kind}","name":"{role}"}},"subjects":[{{"kind":"{kind}","apiGroup":"{GROUP}","name":"{subject}"}}]"#
        );
        self.create(&format!("{GROUP}/v1"), "RoleBinding", name, &more).await;
    }

    /// kubectl with a token and nothing else.
    pub async fn kubectl_token(&self, token: &str, args: &[&str]) -> Output {
        let ca = self.config.pki_dir().join("ca.crt").display().to_string();
        let mut all = vec![
            "--kubeconfig=/dev/null",
            "--server",
            &self.url,
            "--certificate-authority",
            &ca,
            "--token",
            token,
        ];
        all.extend(args);
        self.plain_kubectl(&all, "").await
    }

    async fn plain_kubectl(&self, args: &[&str], input: &str) -> Output {
        use tokio::io::AsyncWriteExt;
        let mut child = tokio::process::Command::new("kubectl")
            .args(args)
            .env("HOME", &self.dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("kubectl is on PATH; `make tools` builds it");
        let mut stdin = child.stdin.take().expect("piped");
        stdin.write_all(input.as_bytes()).await.expect("kubectl reads its input");
        drop(stdin);
        tokio::time::timeout(Duration::from_secs(30), child.wait_with_output())
            .await
            .expect("kubectl ends within 30 s")
            .expect("kubectl runs")
    }
}

pub fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

pub fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}

/// Standard output of a command that must succeed.
#[track_caller]
pub fn ok(output: Output) -> String {
    assert!(output.status.success(), "failed: {}", err(&output));
    out(&output)
}
