//! The agent against a runtime in memory, without an API server: pods come from manifests. Runs as root (tmpfs volumes).

mod fake;

use std::path::Path;
use std::time::Duration;

use fake::Fake;
use orlop_agent::Config;
use orlop_base::supervise::Ready;
use orlop_base::testkit::{unique_name, wait_until};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const LIMIT: Duration = Duration::from_secs(60);

struct Agent {
    stop: CancellationToken,
    task: JoinHandle<Result<(), orlop_agent::Error>>,
}

impl Agent {
    async fn end(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
    }

    /// As `kill -9` leaves it: nothing is cleaned up.
    async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
        self.stop.cancel();
    }
}

fn config(dir: &Path) -> Config {
    let mut c = Config::new("node1", None);
    c.cri_socket = dir.join("cri.sock");
    c.root_dir = dir.join("kubelet");
    c.cert_dir = dir.join("kubelet/pki");
    c.pod_logs_dir = dir.join("pods");
    c.container_logs_dir = dir.join("containers");
    c.static_pod_dir = Some(dir.join("manifests"));
    c.node_ips = vec!["127.0.0.1".parse().unwrap()];
    c.listen = "127.0.0.1:0".parse().unwrap();
    // A plain folder stands in for the cgroup file system: it has no controllers to set.
    c.cgroup_mount = dir.join("cgroup");
    c.kubelet.crash_loop_back_off.max_container_restart_period = Some(Duration::from_secs(1));
    c
}

fn prepare(dir: &Path) {
    for d in ["kubelet/pki", "manifests", "cgroup"] {
        std::fs::create_dir_all(dir.join(d)).unwrap();
    }
    let made = rcgen::generate_simple_self_signed(vec!["node1".to_owned()]).unwrap();
    std::fs::write(dir.join("kubelet/pki/kubelet.crt"), made.cert.pem()).unwrap();
    std::fs::write(dir.join("kubelet/pki/kubelet.key"), made.signing_key.serialize_pem()).unwrap();
}

fn start(dir: &Path) -> Agent {
    let stop = CancellationToken::new();
    let task = tokio::spawn(orlop_agent::run(config(dir), Ready::default(), stop.clone()));
    Agent { stop, task }
}

fn manifest(dir: &Path, name: &str, spec: &str) {
    let text = format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n{spec}");
    let tmp = dir.join(format!(".{name}"));
    std::fs::write(&tmp, text).unwrap();
    std::fs::rename(tmp, dir.join("manifests").join(format!("{name}.yaml"))).unwrap();
}

async fn until(what: &str, check: impl Fn() -> bool) {
    wait_until(what, LIMIT, || async { check().then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pods_life() {
    let t = tempfile::Builder::new().prefix(&unique_name("agt")).tempdir().unwrap();
    let dir = t.path();
    prepare(dir);
    let fake = Fake::serve(&dir.join("cri.sock"));
    std::fs::write(dir.join("manifests/bad.yaml"), "{{{").unwrap();
    manifest(
        dir,
        "web",
        "  terminationGracePeriodSeconds: 7\n  initContainers: [{name: i, image: 'x:1'}]\n  containers:\n  - {name: a, image: 'x:1', volumeMounts: [{name: e, mountPath: /e}], lifecycle: {preStop: {exec: {command: [bye]}}}}\n  volumes: [{name: e, emptyDir: {}}]\n",
    );
    let agent = start(dir);
    until("the init container runs", || fake.running("i").len() == 1).await;
    assert!(fake.running("a").is_empty());
    fake.exit("i", 0);
    until("the container runs", || fake.running("a").len() == 1).await;
    {
        let w = fake.world.lock();
        let a = w.containers.values().find(|m| m.config.log_path == "a/0.log").unwrap();
        let paths: Vec<&str> = a.config.mounts.iter().map(|m| m.container_path.as_str()).collect();
        assert_eq!(paths, ["/e", "/etc/hosts", "/dev/termination-log"]);
        assert!(a.config.mounts.iter().all(|m| Path::new(&m.host_path).exists()));
    }

    // The first restart is at once, the next after a delay.
    fake.exit("a", 1);
    until("it is started again", || fake.running("a").len() == 1).await;
    let first = fake.running("a");

    // A killed agent's successor goes on without touching what runs.
    agent.kill().await;
    let before = fake.world.lock().calls.len();
    let agent = start(dir);
    // One more pod, to see when the successor knows the manifests.
    manifest(dir, "late", "  containers: [{name: late, image: 'x:1'}]\n");
    until("the successor runs a new pod", || fake.running("late").len() == 1).await;
    assert_eq!(fake.running("a"), first);

    // The manifest goes: hook, SIGTERM with the pod's grace period, and nothing is left.
    for name in ["web", "late"] {
        std::fs::remove_file(dir.join(format!("manifests/{name}.yaml"))).unwrap();
    }
    until("everything is removed", || fake.world.lock().sandboxes.is_empty()).await;
    let mut since = fake.world.lock().calls.split_off(before);
    since.retain(|c| !c.contains("late"));
    assert_eq!(since, ["exec bye", "stop a 7"], "nothing else");
    let empty = |d: &Path| std::fs::read_dir(d).map(|mut r| r.next().is_none()).unwrap_or(true);
    until("the pod's folder is removed", || empty(&dir.join("kubelet/pods"))).await;
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_liveness_probe_restarts_its_container() {
    let t = tempfile::Builder::new().prefix(&unique_name("agl")).tempdir().unwrap();
    let dir = t.path();
    prepare(dir);
    let fake = Fake::serve(&dir.join("cri.sock"));
    manifest(
        dir,
        "p",
        "  containers:\n  - {name: a, image: 'x:1', livenessProbe: {exec: {command: [check]}, periodSeconds: 1, failureThreshold: 2, terminationGracePeriodSeconds: 3}}\n",
    );
    let agent = start(dir);
    until("the probe is asked", || fake.called("exec check") > 0).await;
    assert_eq!(fake.called("start a"), 1);
    fake.world.lock().exec_code = 1;
    until("it is stopped with the probe's grace period", || fake.called("stop a 3") == 1).await;
    fake.world.lock().exec_code = 0;
    until("it runs again", || fake.running("a").len() == 1 && fake.called("start a") == 2).await;
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_ends_and_its_sidecar_with_it() {
    let t = tempfile::Builder::new().prefix(&unique_name("agj")).tempdir().unwrap();
    let dir = t.path();
    prepare(dir);
    let fake = Fake::serve(&dir.join("cri.sock"));
    manifest(
        dir,
        "j",
        "  restartPolicy: Never\n  initContainers: [{name: s, image: 'x:1', restartPolicy: Always}]\n  containers: [{name: a, image: 'x:1'}]\n",
    );
    let agent = start(dir);
    until("both run", || fake.running("a").len() + fake.running("s").len() == 2).await;
    assert_eq!(fake.world.lock().calls, ["run j-node1", "create s", "start s", "create a", "start a"]);
    fake.exit("a", 0);
    until("the sidecar is stopped", || fake.called("stop s 30") == 1).await;
    until("the sandbox is stopped", || fake.world.lock().sandboxes.values().all(|s| !s.1)).await;
    assert_eq!(fake.called("start a"), 1);
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_is_pulled_with_what_a_credential_provider_knows() {
    let t = tempfile::Builder::new().prefix(&unique_name("agc")).tempdir().unwrap();
    let dir = t.path();
    prepare(dir);
    let fake = Fake::serve(&dir.join("cri.sock"));
    fake.world.lock().password = "secret".into();
    let script = dir.join("provider");
    std::fs::write(
        &script,
        "case $(cat) in *'\"image\":\"reg.test/app\"'*) echo \"{\\\"apiVersion\\\": \\\"$VERSION\\\", \\\"kind\\\": \\\"CredentialProviderResponse\\\", \\\"cacheKeyType\\\": \\\"Registry\\\", \
         \\\"auth\\\": {\\\"reg.test\\\": {\\\"username\\\": \\\"u\\\", \\\"password\\\": \\\"secret\\\"}}}\" ;; esac\n",
    )
    .unwrap();
    let version = "credentialprovider.kubelet.k8s.io/v1";
    std::fs::write(
        dir.join("providers.yaml"),
        format!(
            "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n- {{name: sh, apiVersion: {version}, matchImages: ['*.test'], \
             defaultCacheDuration: 1m, args: [{}], env: [{{name: VERSION, value: {version}}}]}}\n",
            script.display()
        ),
    )
    .unwrap();
    for (name, image) in [("known", "reg.test/app:1"), ("unknown", "reg.invalid/app:1")] {
        let spec = format!("  containers: [{{name: {name}, image: '{image}', imagePullPolicy: Always}}]\n");
        manifest(dir, name, &spec);
    }
    let mut config = config(dir);
    config.image_credential_provider_config = Some(dir.join("providers.yaml"));
    let alone =
        orlop_agent::run(config.clone(), Ready::default(), CancellationToken::new()).await.unwrap_err();
    assert!(alone.to_string().contains("belong together"), "{alone}");
    config.image_credential_provider_bin_dir = Some("/bin".into());
    let stop = CancellationToken::new();
    let task = tokio::spawn(orlop_agent::run(config, Ready::default(), stop.clone()));
    until("the known image's container runs", || fake.running("known").len() == 1).await;
    assert_eq!(fake.called("pull reg.test/app:1"), 1);
    assert_eq!(fake.called("pull reg.invalid/app:1"), 0);
    Agent { stop, task }.end().await;
}
