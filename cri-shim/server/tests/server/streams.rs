//! Exec and attach as sessions: their URLs, their end when nothing moves or nobody reads, and what becomes of the process.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use futures::{SinkExt, StreamExt};
use orlop_proto::cri;
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::node::{Node, container_config, exec, sandbox_config, shell, wait_for};

/// For what must come; a loaded machine takes its time.
const PATIENCE: Duration = Duration::from_secs(60);

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
const CLOSE: u8 = 255;

/// A client of a streaming URL.
pub struct Client {
    socket: WebSocketStream<TcpStream>,
    address: SocketAddr,
}

impl Client {
    /// The status code of a server that does not want it.
    pub async fn connect(url: &str) -> Result<Client, u16> {
        Client::connect_as(url, "v5.channel.k8s.io").await
    }

    async fn connect_as(url: &str, protocol: &str) -> Result<Client, u16> {
        let mut request = url.replacen("http://", "ws://", 1).into_client_request().unwrap();
        request.headers_mut().insert("sec-websocket-protocol", protocol.parse().unwrap());
        let stream = TcpStream::connect(request.uri().authority().unwrap().as_str()).await.unwrap();
        let address = stream.local_addr().unwrap();
        match tokio_tungstenite::client_async(request, stream).await {
            Ok((socket, _)) => Ok(Client { socket, address }),
            Err(Error::Http(response)) => Err(response.status().as_u16()),
            Err(e) => panic!("{url}: {e}"),
        }
    }

    pub async fn send(&mut self, text: &str) {
        let message = [&[STDIN], text.as_bytes()].concat();
        self.socket.send(Message::Binary(message.into())).await.unwrap();
    }

    async fn resize(&mut self, width: u16, height: u16) {
        let size = format!("{{\"Width\":{width},\"Height\":{height}}}");
        let message = [&[RESIZE], size.as_bytes()].concat();
        self.socket.send(Message::Binary(message.into())).await.unwrap();
    }

    /// The next message that says something, and its channel; `None` after the end.
    async fn message(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            let next = tokio::time::timeout(PATIENCE, self.socket.next()).await.expect("nothing comes");
            match next?.ok()? {
                Message::Binary(m) if m.len() > 1 => return Some((m[0], m[1..].to_vec())),
                _ => {}
            }
        }
    }

    /// The next message on `channel`; `None` after the end.
    async fn next(&mut self, channel: u8) -> Option<String> {
        loop {
            match self.message().await? {
                (c, text) if c == channel => return Some(String::from_utf8_lossy(&text).into_owned()),
                _ => {}
            }
        }
    }

    /// Reads output until it has `wanted`.
    pub async fn until(&mut self, wanted: &str) {
        let mut seen = String::new();
        while !seen.contains(wanted) {
            match self.next(STDOUT).await {
                Some(more) => seen.push_str(&more),
                None => panic!("no {wanted:?}: the stream ended after {seen:?}"),
            }
        }
    }

    /// What the error channel says at the end.
    pub async fn verdict(&mut self) -> serde_json::Value {
        let text = self.next(ERROR).await.expect("no verdict");
        serde_json::from_str(&text).unwrap()
    }

    /// Whether the server's end of the connection is open, by the kernel's account.
    fn is_served(&self) -> bool {
        let SocketAddr::V4(me) = self.address else { panic!("no address of version 4") };
        let me = format!("{:08X}:{:04X}", u32::from_ne_bytes(me.ip().octets()), me.port());
        let table = fs::read_to_string("/proc/net/tcp").unwrap();
        let mut lines = table.lines().map(|l| l.split_whitespace().collect::<Vec<_>>());
        // Its remote end is ours, and its state ESTABLISHED.
        lines.any(|f| f.get(2) == Some(&me.as_str()) && f.get(3) == Some(&"01"))
    }
}

pub async fn exec_url(node: &Node, id: &str, command: &[&str], tty: bool) -> String {
    let request = cri::ExecRequest {
        container_id: id.to_owned(),
        cmd: command.iter().map(|s| (*s).to_owned()).collect(),
        tty,
        stdin: true,
        stdout: true,
        stderr: false,
    };
    node.client().await.exec(request).await.unwrap().into_inner().url
}

pub async fn attach_url(node: &Node, id: &str) -> String {
    let request =
        cri::AttachRequest { container_id: id.to_owned(), stdin: true, stdout: true, ..Default::default() };
    node.client().await.attach(request).await.unwrap().into_inner().url
}

/// Waits until a process whose command line has `word` runs in the container, or none.
async fn runs(node: &Node, id: &str, word: &str, wanted: bool) {
    let script = format!("ps | grep -v grep | grep -c '{word}' || true");
    let start = std::time::Instant::now();
    while (shell(node, id, &script).await != "0") != wanted {
        assert!(start.elapsed() < PATIENCE, "{word} runs: {}", !wanted);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn sleeper(node: &Node) -> String {
    let config = sandbox_config(node, "streams", true);
    let pod = node.run_pod(&config).await.unwrap();
    node.run_container(&pod, container_config("main", &["sleep", "1000"]), &config).await
}

#[tokio::test]
async fn a_streaming_url_works_once() {
    let node = Node::start("once", &[]).await;
    let id = sleeper(&node).await;
    let url = exec_url(&node, &id, &["sh", "-c", "read line; echo got $line; exit 3"], false).await;
    let mut client = Client::connect(&url).await.unwrap();
    assert_eq!(Client::connect(&url).await.err(), Some(404), "while it is in use");
    client.send("it\n").await;
    client.until("got it\n").await;
    let verdict = client.verdict().await;
    assert_eq!(verdict["details"]["causes"][0]["message"], "3", "{verdict}");
    assert_eq!(Client::connect(&url).await.err(), Some(404), "after its end");
    // One that was asked for in a wrong way is used up, too, and one that was guessed never was there.
    let url = exec_url(&node, &id, &["sleep", "4320"], false).await;
    assert_eq!(Client::connect(&url.replace("/exec/", "/attach/")).await.err(), Some(404));
    assert_eq!(Client::connect(&url).await.err(), Some(404));
    let (front, token) = url.rsplit_once('/').unwrap();
    assert_eq!(token.len(), 64);
    assert_eq!(Client::connect(&format!("{front}/{}", "0".repeat(64))).await.err(), Some(404));
    runs(&node, &id, "sleep 4320", false).await;
    node.purge_and_check();
}

/// Both transports, with and without a terminal; upstream runtimes end the process of a client that is gone, too.
#[tokio::test]
async fn a_command_ends_with_its_client() {
    let node = Node::start("gone", &[]).await;
    let id = sleeper(&node).await;
    // With what it has started itself; with job control, each in a group of its own.
    let (plain, jobs) = ("sleep 4321 & sleep 4321; true", "set -m; sleep 4321 & sleep 4321; true");
    for (script, tty) in [(plain, false), (plain, true), (jobs, true)] {
        let url = exec_url(&node, &id, &["sh", "-c", script], tty).await;
        let client = Client::connect(&url).await.unwrap();
        runs(&node, &id, "sleep 4321", true).await;
        // No farewell.
        drop(client);
        runs(&node, &id, "sleep 4321", false).await;
    }
    // A probe that nobody waits for any more.
    let mut client = node.client().await;
    tokio::select! {
        done = exec(&mut client, &id, &["sleep", "4326"], 0) => panic!("{done:?}"),
        () = runs(&node, &id, "sleep 4326", true) => {}
    }
    runs(&node, &id, "sleep 4326", false).await;
    // Of an attach, nothing but the connection ends.
    let client = Client::connect(&attach_url(&node, &id).await).await.unwrap();
    drop(client);
    assert_eq!(node.status(&id).await.state, cri::ContainerState::ContainerRunning as i32);
    node.purge_and_check();
}

#[tokio::test]
async fn a_session_without_traffic_ends() {
    let mut node = Node::start("idle", &[]).await;
    node.kill();
    node.flags = ["--streaming-idle-timeout", "2"].map(str::to_owned).to_vec();
    node.restart(&[]).await;
    let id = sleeper(&node).await;
    let silent = async {
        for (transport, seconds) in [("spdy", "4322"), ("websocket", "4323")] {
            let (ok, text) =
                node.crictl_in_background(&["exec", "--transport", transport, &id, "sleep", seconds]).await;
            assert!(!ok && text.contains("nothing moved on the stream for 2 s"), "{transport}: {text}");
            runs(&node, &id, &format!("sleep {seconds}"), false).await;
        }
        let mut attached = Client::connect(&attach_url(&node, &id).await).await.unwrap();
        let verdict = attached.verdict().await;
        assert!(verdict["message"].to_string().contains("nothing moved"), "{verdict}");
    };
    // What talks now and then goes on for longer than that.
    let talking = async {
        let script = "i=0; while [ $i -lt 15 ]; do echo $i; i=$((i+1)); sleep 0.25; done; exit 9";
        let mut client =
            Client::connect(&exec_url(&node, &id, &["sh", "-c", script], false).await).await.unwrap();
        let verdict = client.verdict().await;
        assert_eq!(verdict["details"]["causes"][0]["message"], "9", "{verdict}");
    };
    // One that takes nothing of what it is sent is silent once all buffers are full; it costs neither a process nor a connection.
    let deaf = async {
        let client = Client::connect(&exec_url(&node, &id, &["yes", "4324"], false).await).await.unwrap();
        runs(&node, &id, "yes 4324", true).await;
        assert!(client.is_served());
        runs(&node, &id, "yes 4324", false).await;
        wait_for("the end of the deaf client's connection", || !client.is_served()).await;
    };
    tokio::join!(silent, talking, deaf);
    assert_eq!(node.status(&id).await.state, cri::ContainerState::ContainerRunning as i32);
    node.purge_and_check();
}

/// Programs that use the API often write all of a file at once; upstream's server takes 32 MiB.
#[tokio::test]
async fn a_message_of_many_megabytes_is_input() {
    const SIZE: usize = (32 << 20) - 1;
    let node = Node::start("large", &[]).await;
    let id = sleeper(&node).await;
    let url = exec_url(&node, &id, &["wc", "-c"], false).await;
    let mut client = Client::connect(&url).await.unwrap();
    client.send(&"x".repeat(SIZE)).await;
    client.socket.send(Message::Binary(vec![CLOSE, STDIN].into())).await.unwrap();
    client.until(&format!("{SIZE}\n")).await;
    assert_eq!(client.verdict().await["status"], "Success");
    node.purge_and_check();
}

/// Port-forward as programs speak it that have WebSocket only: two channels for each port, which begin with its number.
#[tokio::test]
async fn ports_are_forwarded_over_websocket_channels() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    const SIZE: usize = 8 << 20;
    let node = Node::start("channels", &[]).await;
    // On this machine's network.
    let pod = node.run_pod(&sandbox_config(&node, "channels", true)).await.unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let open = listener.local_addr().unwrap().port();
    let closed = orlop_base::testkit::free_port();
    let request = cri::PortForwardRequest { pod_sandbox_id: pod, port: vec![open.into(), closed.into()] };
    let url = node.client().await.port_forward(request).await.unwrap().into_inner().url;
    let mut client = Client::connect_as(&url, "v4.channel.k8s.io").await.unwrap();
    for (channel, port) in [(0, open), (1, open), (2, closed), (3, closed)] {
        assert_eq!(client.message().await, Some((channel, port.to_le_bytes().to_vec())));
    }
    let (channel, refusal) = client.message().await.unwrap();
    let refusal = String::from_utf8(refusal).unwrap();
    assert!(channel == 3 && refusal.contains(&format!("localhost:{closed}")), "{channel}: {refusal}");
    let serve = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut got = vec![0; SIZE];
        stream.read_exact(&mut got).await.unwrap();
        assert!(got.iter().all(|b| *b == b'x'));
        stream.write_all(b"got it").await.unwrap();
    };
    let talk = async {
        client.send(&"x".repeat(SIZE)).await;
        let mut answer = String::new();
        while let Some(part) = client.next(0).await {
            answer.push_str(&part);
        }
        assert_eq!(answer, "got it");
    };
    tokio::join!(serve, talk);
    node.purge_and_check();
}

/// Says its terminal's size, rows first, whenever it has changed.
const SIZES: &str = "last=; while :; do now=$(busybox stty size); [ \"$now\" = \"$last\" ] || echo \"size $now\"; last=$now; sleep 0.02; done";

/// Channel 4 of exec and of attach.
#[tokio::test]
async fn a_terminal_is_resized_over_websocket() {
    let node = Node::start("resize", &[]).await;
    let config = sandbox_config(&node, "resize", true);
    let pod = node.run_pod(&config).await.unwrap();
    let mut attached = container_config("main", &["sh", "-c", SIZES]);
    (attached.tty, attached.stdin) = (true, true);
    let id = node.run_container(&pod, attached, &config).await;
    for url in [exec_url(&node, &id, &["sh", "-c", SIZES], true).await, attach_url(&node, &id).await] {
        let mut client = Client::connect(&url).await.unwrap();
        for (width, height) in [(101, 33), (60, 1000)] {
            client.resize(width, height).await;
            client.until(&format!("size {height} {width}\r\n")).await;
        }
    }
    node.purge_and_check();
}

/// Both transports as a real client speaks them: the stream "resize", and channel 4 again.
#[tokio::test]
async fn crictls_terminal_and_the_containers_have_one_size() {
    let node = Node::start("size", &[]).await;
    let id = sleeper(&node).await;
    for transport in ["spdy", "websocket"] {
        let terminal = nix::pty::openpty(None, None).unwrap();
        let size = |rows, columns| {
            let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
            rustix::termios::tcsetwinsize(&terminal.master, size).unwrap();
        };
        size(31, 77);
        let end = || std::process::Stdio::from(terminal.slave.try_clone().unwrap());
        let mut client = node
            .crictl_command(&["exec", "-it", "--transport", transport, &id, "sh", "-c", SIZES])
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
        let output = fs::File::from(terminal.master.try_clone().unwrap());
        let shown = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
        let all = shown.clone();
        let reader = std::thread::spawn(move || {
            let mut buf = [0; 1024];
            // Fails once nobody has the other end open.
            while let Ok(n) = std::io::Read::read(&mut &output, &mut buf) {
                all.lock().unwrap().push_str(&String::from_utf8_lossy(&buf[..n]));
            }
        });
        let shows = |text: &str| shown.lock().unwrap().contains(text);
        wait_for(&format!("{transport}: the first size"), || shows("size 31 77\r\n")).await;
        size(44, 132);
        // The kernel tells those of whom it is the controlling terminal.
        let pid = nix::unistd::Pid::from_raw(client.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGWINCH).unwrap();
        wait_for(&format!("{transport}: the second size"), || shows("size 44 132\r\n")).await;
        client.kill().unwrap();
        client.wait().unwrap();
        drop(terminal);
        reader.join().unwrap();
    }
    node.purge_and_check();
}

/// What any program can do that reaches the address, a container in the host's network for one.
#[tokio::test]
async fn silent_connections_keep_nobody_out_and_end() {
    use tokio::io::AsyncReadExt;
    let node = Node::start("silent", &[]).await;
    let id = sleeper(&node).await;
    let url = exec_url(&node, &id, &["sh", "-c", "read line; echo got $line"], false).await;
    let address = url.strip_prefix("http://").unwrap().split('/').next().unwrap().to_owned();
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(TcpStream::connect(&address).await.unwrap());
    }
    let mut client = Client::connect(&url).await.unwrap();
    // Newer ones do not send away who has named a session, and older ones have made room.
    for _ in 0..300 {
        silent.push(TcpStream::connect(&address).await.unwrap());
    }
    client.send("it\n").await;
    client.until("got it\n").await;
    // Also those that nothing presses end.
    for mut stream in silent {
        let read = tokio::time::timeout(PATIENCE, stream.read(&mut [0])).await.expect("it stays");
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    }
    node.purge_and_check();
}

/// As with any daemon that raises its limit: what it runs for others begins with the one that it was given.
#[tokio::test]
async fn containers_have_the_limit_of_open_files_that_the_server_was_given() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    // Below the hard one, and enough for the tests beside.
    let given = if soft < hard { soft } else { soft - 1 };
    setrlimit(Resource::RLIMIT_NOFILE, given, hard).unwrap();
    let node = Node::start("files", &[]).await;
    let id = sleeper(&node).await;
    let limits = fs::read_to_string(format!("/proc/{}/limits", node.pid())).unwrap();
    let files = limits.lines().find(|l| l.starts_with("Max open files")).unwrap();
    let most = hard.min(1 << 20).max(given);
    assert_eq!(files.split_whitespace().nth(3), Some(&*most.to_string()), "{files}");
    let ours = format!("{given} {hard}");
    assert_eq!(shell(&node, &id, "echo $(ulimit -Sn) $(ulimit -Hn)").await, ours, "of an exec");
    let first = shell(&node, &id, "grep 'Max open files' /proc/1/limits").await;
    let first: Vec<&str> = first.split_whitespace().skip(3).take(2).collect();
    assert_eq!(first.join(" "), ours, "of the container's first process");
    node.purge_and_check();
}
