//! Images that are damaged on disk, and garbage collection beside everything else.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::node::{Node, container_config, exec, make_image, sandbox_config, shell, wait_for};
use orlop_base::testkit::DockerRegistry;
use orlop_proto::cri::image_service_client::ImageServiceClient;
use orlop_proto::{cri, images};
use tonic::{Code, Status};

/// A registry with images of its own for each name, that have `/name` with the name in it.
pub fn registry(node: &Node, names: &[&str]) -> DockerRegistry {
    let registry = DockerRegistry::start(&node.dir);
    for name in names {
        let dir = node.dir.join(format!("image-{name}"));
        fs::create_dir(&dir).unwrap();
        let archive = make_image(&dir, &format!("localhost/{name}:1"), |root, config| {
            fs::write(root.join("name"), format!("{name}\n")).unwrap();
            config.env(vec!["PATH=/bin".to_owned(), format!("NAME={name}")])
        });
        let done = Command::new("skopeo")
            .args(["copy", "--quiet", "--insecure-policy", "--preserve-digests", "--dest-tls-verify=false"])
            .arg(format!("oci-archive:{}", archive.display()))
            .arg(format!("docker://{}/{name}:1", registry.address))
            .output()
            .unwrap_or_else(|e| panic!("cannot run skopeo: {e}; apt-get install skopeo"));
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }
    registry
}

fn spec(reference: &str) -> Option<cri::ImageSpec> {
    Some(cri::ImageSpec { image: reference.to_owned(), ..Default::default() })
}

async fn pull(node: &Node, reference: &str) -> Result<String, Status> {
    let request = cri::PullImageRequest { image: spec(reference), ..Default::default() };
    let mut client = ImageServiceClient::new(node.channel().await.unwrap());
    Ok(client.pull_image(request).await?.into_inner().image_ref)
}

async fn is_here(node: &Node, reference: &str) -> bool {
    let request = cri::ImageStatusRequest { image: spec(reference), verbose: false };
    let mut client = ImageServiceClient::new(node.channel().await.unwrap());
    client.image_status(request).await.unwrap().into_inner().image.is_some()
}

/// A container of `reference` that sleeps.
fn of(reference: &str, name: &str) -> cri::ContainerConfig {
    cri::ContainerConfig { image: spec(reference), ..container_config(name, &["sleep", "1000"]) }
}

fn layers(node: &Node) -> BTreeSet<PathBuf> {
    fs::read_dir(node.dir.join("images/layers")).unwrap().flatten().map(|e| e.path()).collect()
}

#[tokio::test]
async fn what_is_damaged_on_disk_is_named_and_pulled_again() {
    let mut node = Node::start("damaged", &[]).await;
    let registry = registry(&node, &["one"]);
    let reference = format!("{}/one:1", registry.address);
    let before = layers(&node);
    let id = pull(&node, &reference).await.unwrap();
    let layer = layers(&node).difference(&before).next().unwrap().clone();
    let config = sandbox_config(&node, "damaged", true);
    let pod = node.run_pod(&config).await.unwrap();
    let steady = node.run_container(&pod, container_config("steady", &["sleep", "1000"]), &config).await;
    let record: serde_json::Value =
        serde_json::from_slice(&fs::read(layer.join("layer.json")).unwrap()).unwrap();
    let chain = record["data"]["chain"].as_str().unwrap().to_owned();
    let content = |digest: &str| node.dir.join("images/content").join(digest.rsplit(':').next().unwrap());
    let images: serde_json::Value =
        serde_json::from_slice(&fs::read(node.dir.join("images/images.json")).unwrap()).unwrap();
    let ours = images["data"].as_array().unwrap().iter().find(|i| i["id"] == id.as_str()).unwrap();
    let (manifest, image_config) = (content(ours["manifest"].as_str().unwrap()), content(&id));
    let flip = |file: &PathBuf| {
        let mut bytes = fs::read(file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x20;
        fs::write(file, bytes).unwrap();
    };
    let works = async |node: &Node, name: &str| {
        let c = node.run_container(&pod, of(&reference, name), &config).await;
        assert_eq!(shell(node, &c, "cat /name").await, "one");
        let request = cri::RemoveContainerRequest { container_id: c };
        node.client().await.remove_container(request).await.unwrap();
    };
    works(&node, "whole").await;

    // The files of a layer, or all of it. A creation says what is missing and what to do; from then on the image counts as missing,
    // so that whoever pulls only what is not there pulls it.
    for (n, part) in [layer.join("fs"), layer.clone()].iter().enumerate() {
        fs::remove_dir_all(part).unwrap();
        let e = node.create(&pod, of(&reference, "lost"), &config).await.unwrap_err();
        assert_eq!(e.code(), Code::DataLoss, "{e}");
        for said in [&chain, &id, "pull it again"] {
            assert!(e.message().contains(said), "{said}: {e}");
        }
        assert!(!is_here(&node, &reference).await);
        let e = node.create(&pod, of(&reference, "lost"), &config).await.unwrap_err();
        assert_eq!(e.code(), Code::NotFound, "{e}");
        assert_eq!(pull(&node, &reference).await.unwrap(), id);
        works(&node, &format!("again{n}")).await;
        // A pull that comes first finds it out by itself.
        fs::remove_dir_all(part).unwrap();
        assert_eq!(pull(&node, &reference).await.unwrap(), id);
        works(&node, &format!("healed{n}")).await;
    }
    // What the image is made of, while the server runs and before it starts.
    for (n, file) in [&manifest, &image_config, &layer.join("layer.json")].into_iter().enumerate() {
        for delete in [false, true] {
            let damage = || if delete { fs::remove_file(file).unwrap() } else { flip(file) };
            damage();
            assert_eq!(pull(&node, &reference).await.unwrap(), id);
            works(&node, &format!("running{n}{delete}")).await;
            if !file.ends_with("layer.json") {
                damage();
            }
            node.kill();
            node.restart(&[]).await;
            assert!(!is_here(&node, &reference).await, "{}", file.display());
            assert!(node.log().contains("dropped a damaged image"), "{}", node.log());
            let e = node.create(&pod, of(&reference, "lost"), &config).await.unwrap_err();
            assert_eq!(e.code(), Code::NotFound, "{e}");
            assert!(e.message().contains("pull it first"), "{e}");
            assert_eq!(pull(&node, &reference).await.unwrap(), id);
            works(&node, &format!("started{n}{delete}")).await;
        }
    }
    // A layer that somebody runs on stays, whatever happened to its record.
    let runs = node.run_container(&pod, of(&reference, "runs"), &config).await;
    for delete in [false, true] {
        let file = layer.join("layer.json");
        if delete {
            fs::remove_file(file).unwrap()
        } else {
            flip(&file)
        }
        node.kill();
        node.restart(&[]).await;
        assert_eq!(shell(&node, &runs, "cat /name").await, "one");
        assert!(is_here(&node, &reference).await);
        works(&node, &format!("beside{delete}")).await;
    }
    // Nobody else noticed.
    assert_eq!(shell(&node, &steady, "echo on").await, "on");
    drop(registry);
    node.purge_and_check();
}

#[tokio::test]
async fn an_image_is_found_by_all_its_names_and_goes_with_all_of_them() {
    let node = Node::start("names", &[]).await;
    let registry = registry(&node, &["one", "two"]);
    let name = |rest: &str| format!("{}/{rest}", registry.address);
    let done = Command::new("skopeo")
        .args(["copy", "--quiet", "--insecure-policy", "--src-tls-verify=false", "--dest-tls-verify=false"])
        .args([format!("docker://{}", name("one:1")), format!("docker://{}", name("more/one:latest"))])
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let mut client = ImageServiceClient::new(node.channel().await.unwrap());
    let used = async |client: &mut ImageServiceClient<_>| {
        let info = client.image_fs_info(cri::ImageFsInfoRequest {}).await.unwrap().into_inner();
        let images = &info.image_filesystems[0];
        (images.used_bytes.unwrap().value, images.inodes_used.unwrap().value)
    };
    let before = used(&mut client).await;
    let id = pull(&node, &name("one:1")).await.unwrap();
    assert_eq!(pull(&node, &name("more/one")).await.unwrap(), id);
    let two = pull(&node, &name("two:1")).await.unwrap();
    assert_ne!(two, id);
    let status = |image: &str| {
        let request = cri::ImageStatusRequest { image: spec(image), verbose: false };
        let mut client = client.clone();
        async move { client.image_status(request).await.unwrap().into_inner().image }
    };
    let image = status(&id).await.unwrap();
    assert_eq!(image.repo_tags, [name("more/one:latest"), name("one:1")]);
    let digest = image.repo_digests[0].split_once('@').unwrap().1;
    let hex = id.strip_prefix("sha256:").unwrap();
    let list = async |filter: &str| -> Vec<String> {
        let filter = Some(cri::ImageFilter { image: spec(filter) });
        let images = client.clone().list_images(cri::ListImagesRequest { filter }).await.unwrap();
        images.into_inner().images.into_iter().map(|i| i.id).collect()
    };
    for by in [
        name("one:1"),
        name("more/one"),
        name("more/one:latest"),
        name(&format!("one@{digest}")),
        name(&format!("more/one:latest@{digest}")),
        id.clone(),
        hex.to_owned(),
        hex[..12].to_owned(),
    ] {
        assert_eq!(list(&by).await, [id.as_str()], "{by}");
        assert_eq!(status(&by).await.map(|i| i.id).as_deref(), Some(id.as_str()), "{by}");
    }
    for by in [name("one:2"), name("one"), name(&format!("three@{digest}")), "localhost/one:1".to_owned()] {
        assert!(list(&by).await.is_empty() && status(&by).await.is_none(), "{by}");
    }
    assert_eq!(list("").await.len(), 3, "the two and busybox");
    // One container runs on it, and goes on when it goes.
    let config = sandbox_config(&node, "names", true);
    let pod = node.run_pod(&config).await.unwrap();
    let runs = node.run_container(&pod, of(&id, "runs"), &config).await;
    let full = used(&mut client.clone()).await;
    assert!(full.0 > before.0 + (1 << 20) && full.1 > before.1 + 10, "{before:?}, {full:?}");
    for _ in 0..2 {
        let request = cri::RemoveImageRequest { image: spec(&name("one:1")) };
        client.clone().remove_image(request).await.unwrap();
    }
    for by in [&name("one:1"), &name("more/one"), &id] {
        assert!(list(by).await.is_empty() && status(by).await.is_none(), "{by}");
    }
    assert_eq!(list(&name("two:1")).await, [two.as_str()]);
    assert_eq!(shell(&node, &runs, "cat /name").await, "one");
    let e = node.create(&pod, of(&id, "late"), &config).await.unwrap_err();
    assert_eq!(e.code(), Code::NotFound, "{e}");
    // With the container goes the last use of its layers.
    let request = cri::RemoveContainerRequest { container_id: runs };
    node.client().await.remove_container(request).await.unwrap();
    let request = cri::RemoveImageRequest { image: spec(&two) };
    client.clone().remove_image(request).await.unwrap();
    let left = layers(&node);
    wait_for("the images' space", || layers(&node).len() == 2).await;
    assert!(used(&mut client.clone()).await.0 <= before.0, "{before:?}: {left:?}");
    drop(registry);
    node.purge_and_check();
}

/// One that comes too late for an image is told so; nothing else may go wrong.
fn only_missing<T>(what: &str, done: Result<T, Status>) -> Option<T> {
    match done {
        Ok(done) => Some(done),
        Err(e) => {
            assert_eq!(e.code(), Code::NotFound, "{what}: {e}");
            assert!(e.message().contains("pull"), "{what}: {e}");
            None
        }
    }
}

#[tokio::test]
async fn collecting_garbage_takes_nothing_that_runs() {
    let node = Node::start("garbage", &[]).await;
    let names = ["one", "two"];
    let registry = registry(&node, &names);
    let references = names.map(|n| format!("{}/{n}:1", registry.address));
    let config = sandbox_config(&node, "garbage", true);
    let pod = node.run_pod(&config).await.unwrap();
    pull(&node, &references[0]).await.unwrap();
    let steady = node.run_container(&pod, of(&references[0], "steady"), &config).await;
    let done = std::cell::Cell::new(0);
    let made = std::cell::Cell::new(0);
    const ROUNDS: usize = 12;
    let workers = [0, 1, 0, 1];
    let work = futures::future::join_all(workers.iter().enumerate().map(|(worker, which)| {
        let (node, pod, config, reference) = (&node, &pod, &config, &references[*which]);
        let (done, made) = (&done, &made);
        async move {
            for round in 0..ROUNDS {
                assert!(pull(node, reference).await.is_ok_and(|id| id.starts_with("sha256:")));
                let container = of(reference, &format!("c{worker}-{round}"));
                let id = only_missing("create", node.create(pod, container, config).await);
                if let Some(id) = id {
                    // From here on it must run, whatever happens to its image.
                    node.start_container(&id).await.unwrap();
                    assert_eq!(shell(node, &id, "cat /name").await, names[*which]);
                    let mut client = node.client().await;
                    client.remove_container(cri::RemoveContainerRequest { container_id: id }).await.unwrap();
                    made.set(made.get() + 1);
                }
            }
            done.set(done.get() + 1);
        }
    }));
    let remover = async {
        let mut service = ImageServiceClient::new(node.channel().await.unwrap());
        let mut store = node.images().await;
        let mut n = 0;
        while done.get() < workers.len() {
            let request = cri::RemoveImageRequest { image: spec(&references[n % 2]) };
            service.remove_image(request).await.unwrap();
            store.collect_garbage(images::CollectGarbageRequest::default()).await.unwrap();
            assert_eq!(shell(&node, &steady, "cat /name").await, names[0]);
            // Some time for the others, more of it each time.
            for _ in 0..n {
                tokio::task::yield_now().await;
            }
            n += 1;
        }
    };
    tokio::join!(work, remover);
    println!("{} of {} containers were made", made.get(), workers.len() * ROUNDS);
    // With nothing in between, all is there again.
    for (reference, name) in references.iter().zip(names) {
        pull(&node, reference).await.unwrap();
        let id = node.run_container(&pod, of(reference, &format!("last-{name}")), &config).await;
        assert_eq!(shell(&node, &id, "cat /name").await, name);
    }
    let mut client = node.client().await;
    assert_eq!(exec(&mut client, &steady, &["true"], 5).await.unwrap().exit_code, 0);
    drop(registry);
    node.purge_and_check();
}

/// Ends with the test.
struct Closed(std::process::Child);

impl Drop for Closed {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The kubelet hands over what is in pull secrets.
#[tokio::test]
async fn a_registry_that_wants_credentials_gets_them() {
    let node = Node::start("closed", &[]).await;
    // The same content, served to those only who know the password.
    let open = registry(&node, &["one"]);
    drop(open);
    let address = format!("127.0.0.1:{}", orlop_base::testkit::free_port());
    // bcrypt of "secret".
    let users = "kubelet:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";
    fs::write(node.dir.join("htpasswd"), users).unwrap();
    let child = Command::new("docker-registry")
        .args(["serve", node.dir.join("registry.yml").to_str().unwrap()])
        .env("REGISTRY_HTTP_ADDR", &address)
        .env("REGISTRY_AUTH", "htpasswd")
        .env("REGISTRY_AUTH_HTPASSWD_REALM", "closed")
        .env("REGISTRY_AUTH_HTPASSWD_PATH", node.dir.join("htpasswd"))
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let _closed = Closed(child);
    wait_for("the registry", || std::net::TcpStream::connect(&address).is_ok()).await;
    let reference = format!("{address}/one:1");
    let mut client = ImageServiceClient::new(node.channel().await.unwrap());
    let mut pull = async |auth: Option<cri::AuthConfig>| {
        let request = cri::PullImageRequest { image: spec(&reference), auth, ..Default::default() };
        client.pull_image(request).await.map(|done| done.into_inner().image_ref)
    };
    let with = |username: &str, password: &str| cri::AuthConfig {
        username: username.to_owned(),
        password: password.to_owned(),
        ..Default::default()
    };
    for auth in [None, Some(with("kubelet", "wrong")), Some(with("other", "secret"))] {
        let e = pull(auth).await.unwrap_err();
        assert_eq!(e.code(), Code::PermissionDenied, "{e}");
        assert!(!is_here(&node, &reference).await);
    }
    // The same, in one word: base64 of kubelet:secret.
    let coded = cri::AuthConfig { auth: "a3ViZWxldDpzZWNyZXQ=".to_owned(), ..Default::default() };
    let id = pull(Some(coded)).await.unwrap();
    assert_eq!(pull(Some(with("kubelet", "secret"))).await.unwrap(), id);
    assert!(is_here(&node, &reference).await);
    node.purge_and_check();
}

#[tokio::test]
async fn what_containers_write_is_counted() {
    let node = Node::start("written", &[]).await;
    let config = sandbox_config(&node, "written", true);
    let pod = node.run_pod(&config).await.unwrap();
    let ids = [
        node.run_container(&pod, container_config("one", &["sleep", "1000"]), &config).await,
        node.run_container(&pod, container_config("two", &["sleep", "1000"]), &config).await,
    ];
    let used = async || {
        let mut client = ImageServiceClient::new(node.channel().await.unwrap());
        let info = client.image_fs_info(cri::ImageFsInfoRequest {}).await.unwrap().into_inner();
        let containers = &info.container_filesystems[0];
        (containers.used_bytes.unwrap().value, containers.inodes_used.unwrap().value, containers.timestamp)
    };
    let (bytes, inodes, _) = used().await;
    const WRITTEN: u64 = 3 << 20;
    for id in &ids {
        shell(&node, id, &format!("head -c {WRITTEN} /dev/zero > /large")).await;
    }
    // A look counts for a while; of one at the right time both files are in it.
    let start = std::time::Instant::now();
    while used().await.0 < bytes + 2 * WRITTEN {
        assert!(start.elapsed() < std::time::Duration::from_secs(60), "{:?}", used().await);
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    assert_eq!(used().await.1, inodes + 2);
    let mut client = node.client().await;
    for id in ids {
        client.remove_container(cri::RemoveContainerRequest { container_id: id }).await.unwrap();
    }
    let (bytes, inodes, timestamp) = used().await;
    assert_eq!((bytes, inodes), (0, 0));
    assert!(timestamp > 0);
    node.purge_and_check();
}
