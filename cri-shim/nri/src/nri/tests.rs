//! Against a plugin of our own that says exactly what a test wants; the CRI server's tests have one of upstream's library.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::mux::{self, Stream};
use crate::ttrpc::{self, wire};

struct Pods;

#[async_trait::async_trait]
impl Host for Pods {
    async fn snapshot(&self) -> (Vec<api::PodSandbox>, Vec<api::Container>) {
        (vec![pod()], Vec::new())
    }

    async fn update(&self, _: &str, updates: Vec<api::ContainerUpdate>) -> Vec<api::ContainerUpdate> {
        updates
    }
}

fn pod() -> api::PodSandbox {
    api::PodSandbox { id: "pod".into(), ..Default::default() }
}

struct Fake {
    socket: UnixStream,
    decoder: mux::Decoder,
    got: Vec<(Stream, ttrpc::Message)>,
    last: u32,
}

impl Fake {
    async fn connect(nri: &Node) -> Fake {
        let socket = UnixStream::connect(nri.dir.path().join("nri.sock")).await.unwrap();
        Fake { socket, decoder: mux::Decoder::default(), got: Vec::new(), last: 0 }
    }

    /// `None` once the runtime has closed the connection.
    async fn next(&mut self) -> Option<(Stream, ttrpc::Message)> {
        while self.got.is_empty() {
            let mut buffer = [0; 4096];
            match self.socket.read(&mut buffer).await {
                Ok(n) if n > 0 => self.decoder.feed(&buffer[..n], &mut self.got).unwrap(),
                _ => return None,
            }
        }
        Some(self.got.remove(0))
    }

    async fn send(&mut self, stream: Stream, message: &ttrpc::Message) {
        self.socket.write_all(&mux::encode(stream, message)).await.unwrap();
    }

    /// Calls the runtime, and returns what it answers: the payload, or the status's code.
    async fn call(&mut self, method: &str, payload: Vec<u8>) -> Result<Vec<u8>, i32> {
        self.last += if self.last == 0 { 1 } else { 2 };
        let request = wire::Request {
            service: "nri.pkg.api.v1alpha1.Runtime".into(),
            method: method.into(),
            payload,
            timeout_nano: 0,
        };
        self.send(Stream::Runtime, &ttrpc::Message::request(self.last, &request)).await;
        let (stream, message) = self.next().await.unwrap();
        assert_eq!((stream, message.id), (Stream::Runtime, self.last));
        let response = wire::Response::decode(&*message.payload).unwrap();
        match response.status.map_or(0, |s| s.code) {
            0 => Ok(response.payload),
            code => Err(code),
        }
    }

    async fn register(&mut self, index: &str, name: &str) -> Result<Vec<u8>, i32> {
        let (plugin_name, plugin_idx) = (name.to_owned(), index.to_owned());
        let request = api::RegisterPluginRequest { plugin_name, plugin_idx, ..Default::default() };
        self.call("RegisterPlugin", request.encode_to_vec()).await
    }

    /// Takes a request of the runtime's, which must be `method`, and answers it.
    async fn answers(&mut self, method: &str, answer: Result<Vec<u8>, (i32, String)>) -> Vec<u8> {
        let (stream, message) = self.next().await.unwrap();
        assert_eq!(stream, Stream::Plugin);
        let request = wire::Request::decode(&*message.payload).unwrap();
        assert_eq!(request.method, method);
        self.send(Stream::Plugin, &ttrpc::Message::response(message.id, answer)).await;
        request.payload
    }

    /// A plugin that is served, and wants all events.
    async fn joined(node: &Node, index: &str) -> Fake {
        let mut fake = Fake::connect(node).await;
        fake.register(index, "fake").await.unwrap();
        fake.answers("Configure", Ok(Vec::new())).await;
        let told = fake.answers("Synchronize", Ok(Vec::new())).await;
        assert_eq!(api::SynchronizeRequest::decode(&*told).unwrap().pods, [pod()]);
        // The list is changed before anybody holds it.
        drop(node.nri.hold().await);
        fake
    }
}

struct Node {
    dir: tempfile::TempDir,
    nri: Nri,
    stop: CancellationToken,
}

impl Node {
    async fn start(registration_timeout: Duration) -> Node {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            socket: dir.path().join("nri.sock"),
            plugin_dir: dir.path().join("plugins"),
            config_dir: dir.path().join("conf"),
            registration_timeout,
            request_timeout: Duration::from_secs(30),
            ..Config::new("test", "1")
        };
        let (nri, stop) = (Nri::new(Some(config)), CancellationToken::new());
        nri.start(Arc::new(Pods), &TaskGroup::new(&stop)).await;
        Node { dir, nri, stop }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

const PATIENT: Duration = Duration::from_secs(30);

#[tokio::test]
async fn an_older_plugin_is_told_by_state_change() {
    let node = Node::start(PATIENT).await;
    assert!(!node.nri.wants(Event::RunPodSandbox));
    let mut fake = Fake::joined(&node, "10").await;
    assert!(node.nri.wants(Event::RunPodSandbox));
    let unknown = || Err((code::UNIMPLEMENTED, "no such method".to_owned()));
    let asked = async {
        fake.answers("RunPodSandbox", unknown()).await;
        fake.answers("StateChange", Ok(Vec::new())).await
    };
    let (done, told) = tokio::join!(node.nri.run_pod(pod()), asked);
    done.unwrap();
    let told = api::StateChangeEvent::decode(&*told).unwrap();
    assert_eq!((told.event(), told.pod), (Event::RunPodSandbox, Some(pod())));
    // What it cannot be told otherwise, it has refused.
    let (refused, _) = tokio::join!(
        node.nri.create_container(pod(), api::Container::default()),
        fake.answers("CreateContainer", unknown())
    );
    assert!(refused.unwrap_err().to_string().contains("10-fake"));
}

#[tokio::test]
async fn who_breaks_the_rules_is_let_go() {
    let node = Node::start(PATIENT).await;
    // Registering twice.
    let mut twice = Fake::joined(&node, "10").await;
    assert_eq!(twice.register("10", "fake").await, Err(code::FAILED_PRECONDITION));
    assert!(twice.next().await.is_none());
    // A name or an index that is none; a call before the registration; a connection that ends.
    let mut unnamed = Fake::connect(&node).await;
    assert_eq!(unnamed.register("1", "fake").await, Err(code::INVALID_ARGUMENT));
    assert!(unnamed.next().await.is_none());
    let mut early = Fake::connect(&node).await;
    early.last = 1;
    let request = ttrpc::Message::request(
        3,
        &wire::Request {
            service: "nri.pkg.api.v1alpha1.Runtime".into(),
            method: "UpdateContainers".into(),
            ..Default::default()
        },
    );
    early.send(Stream::Runtime, &request).await;
    assert!(early.next().await.is_none());
    // Events that there are not.
    let mut greedy = Fake::connect(&node).await;
    greedy.register("10", "fake").await.unwrap();
    let answer = api::ConfigureResponse { events: 1 << 20, failure_policy: None };
    greedy.answers("Configure", Ok(answer.encode_to_vec())).await;
    assert!(greedy.next().await.is_none());
    // An answer that is none.
    let mut odd = Fake::joined(&node, "10").await;
    let (asked, _) =
        tokio::join!(node.nri.run_pod(pod()), odd.answers("RunPodSandbox", Ok(b"\xff".to_vec())));
    asked.unwrap();
    assert!(odd.next().await.is_none());
    // Gone in the middle of a request.
    let mut gone = Fake::joined(&node, "10").await;
    let leave = async {
        gone.next().await.unwrap();
        drop(gone);
    };
    let (asked, ()) = tokio::join!(node.nri.run_pod(pod()), leave);
    asked.unwrap();
    assert!(!node.nri.wants(Event::RunPodSandbox));
}

#[tokio::test]
async fn who_does_not_register_is_let_go() {
    let node = Node::start(Duration::from_millis(50)).await;
    let mut silent = Fake::connect(&node).await;
    assert!(silent.next().await.is_none());
}

#[tokio::test]
async fn calls_of_the_plugin_are_answered() {
    let node = Node::start(PATIENT).await;
    let mut fake = Fake::joined(&node, "10").await;
    let update = api::ContainerUpdate { container_id: "c".into(), ..Default::default() };
    let request = api::UpdateContainersRequest { update: vec![update.clone()], evict: Vec::new() };
    let answer = fake.call("UpdateContainers", request.encode_to_vec()).await.unwrap();
    assert_eq!(api::UpdateContainersResponse::decode(&*answer).unwrap().failed, [update]);
    assert_eq!(fake.call("UpdateContainers", b"\xff".to_vec()).await, Err(code::INVALID_ARGUMENT));
    assert_eq!(fake.call("Nonsense", Vec::new()).await, Err(code::UNIMPLEMENTED));
    // The server's end is the connection's.
    node.stop.cancel();
    assert!(fake.next().await.is_none());
}

#[tokio::test]
async fn the_order_is_that_of_the_indices() {
    let node = Node::start(PATIENT).await;
    let mut last = Fake::joined(&node, "90").await;
    let mut first = Fake::joined(&node, "10").await;
    let asked = node.nri.run_pod(pod());
    let answers = async {
        first.answers("RunPodSandbox", Ok(Vec::new())).await;
        last.answers("RunPodSandbox", Err((2, "no room".to_owned()))).await;
    };
    let (refused, ()) = tokio::join!(asked, answers);
    let text = refused.unwrap_err().to_string();
    assert!(text.contains("90-fake") && text.contains("no room"), "{text}");
}
