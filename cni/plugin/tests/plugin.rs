//! The plugin, called by the protocol in real network namespaces.

mod common;

use std::collections::HashSet;
use std::io::Write;
use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{NODE_IP, Node, Pod, inside, run, talk};
use orlop_cni_invoke::{Attachment, Error};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn conflist(ranges: &[&str]) -> String {
    serde_json::json!({"cniVersion": "1.1.0", "name": "test", "plugins": [
        {"type": "orlop-cni", "mtu": 0, "ipam": {"ranges": ranges, "dataDir": "DATA"}}]})
    .to_string()
}

fn attachment(pod: &Pod) -> Attachment {
    Attachment { container_id: pod.network.container_id.clone(), ifname: "eth0".into() }
}

#[tokio::test]
async fn pods_and_node_reach_each_other_and_nothing_stays() {
    reach_each_other(Node::new(&conflist(&["10.50.0.0/24"]))).await;
}

#[tokio::test]
async fn a_part_of_the_runtime_does_the_same() {
    reach_each_other(Node::new(&conflist(&["10.50.0.0/24"])).builtin()).await;
}

async fn reach_each_other(node: Node) {
    node.cni.status().await.unwrap();
    let (a, b) = (Pod::new("a"), Pod::new("b"));
    let ra = node.cni.add(&a.network).await.unwrap();
    let rb = node.cni.add(&b.network).await.unwrap();
    assert_eq!((ra.pod_ips("eth0"), rb.pod_ips("eth0")), (vec![ip("10.50.0.2")], vec![ip("10.50.0.3")]));
    assert_eq!(ra.interfaces[1].mtu, Some(1400), "the MTU of the interface with the default route");
    assert!(inside(&a.netns, || run("ip link show eth0")).contains("mtu 1400"));
    assert!(run("ip link").contains("alias default/pod-a"));

    assert_eq!(talk(&a.netns, &b.netns, ip("10.50.0.3")), ip("10.50.0.2"));
    assert_eq!(talk(&node.netns, &a.netns, ip("10.50.0.2")), ip(NODE_IP));
    assert_eq!(talk(&b.netns, &node.netns, ip(NODE_IP)), ip("10.50.0.3"));
    talk(&a.netns, &a.netns, ip("10.50.0.2"));
    talk(&a.netns, &a.netns, ip("127.0.0.1"));
    inside(&a.netns, || {
        let seen = run("ip neigh");
        assert!(seen.contains("169.254.1.1") && seen.contains("PERMANENT"), "{seen}");
        assert!(!run("ip -6 addr").contains("fe80"), "no IPv6 on a single-stack pod's interface");
    });

    node.cni.check(&a.network).await.unwrap();
    // After a restart everything is known from disk.
    let again = Node::open(node.dir.path());
    again.check(&b.network).await.unwrap();
    assert_eq!(again.result("a", "eth0"), Some(ra));

    inside(&a.netns, || run("ip addr flush dev eth0"));
    let e = again.check(&a.network).await.unwrap_err();
    assert!(
        matches!(&e, Error::Plugin { source, .. } if source.code == 102 && source.msg.contains("10.50.0.2")),
        "{e:?}"
    );

    for pod in [&a, &a, &b] {
        again.del(&pod.network).await.unwrap();
    }
    assert_eq!(node.host_links(), Vec::<String>::new());
    assert!(!run("ip route").contains("10.50.0"));
    assert!(node.recorded().is_empty() && again.attachments().is_empty());
}

#[tokio::test]
async fn dual_stack() {
    let node = Node::new(&conflist(&["10.51.0.0/24", "fd51::/64"]));
    run("ip addr add fd77::1/64 dev up0 nodad");
    let (a, b) = (Pod::new("a"), Pod::new("b"));
    let ra = node.cni.add(&a.network).await.unwrap();
    node.cni.add(&b.network).await.unwrap();
    assert_eq!(ra.pod_ips("eth0"), [ip("10.51.0.2"), ip("fd51::2")]);
    assert_eq!(talk(&a.netns, &b.netns, ip("fd51::3")), ip("fd51::2"));
    assert_eq!(talk(&a.netns, &b.netns, ip("10.51.0.3")), ip("10.51.0.2"));
    assert_eq!(talk(&node.netns, &b.netns, ip("fd51::3")), ip("fd77::1"));
    talk(&b.netns, &node.netns, ip("fd77::1"));
    node.cni.check(&a.network).await.unwrap();
    node.cni.del(&a.network).await.unwrap();
    node.cni.del(&b.network).await.unwrap();
    assert!(!run("ip -6 route").contains("fd51"));
}

#[tokio::test]
async fn a_node_without_an_address_still_reaches_its_pods() {
    let node = Node::without_address(&conflist(&["10.52.0.0/24"]));
    let a = Pod::new("a");
    let r = node.cni.add(&a.network).await.unwrap();
    assert_eq!(r.interfaces[1].mtu, Some(1500));
    assert_eq!(talk(&node.netns, &a.netns, ip("10.52.0.2")), ip("169.254.1.1"));
}

#[tokio::test]
async fn exhaustion_gc_and_rest_of_released_addresses() {
    let node = Node::new(&conflist(&["10.53.0.0/29"]));
    let pods: Vec<Pod> = (0..6).map(|n| Pod::new(&format!("p{n}"))).collect();
    for pod in &pods[..5] {
        node.cni.add(&pod.network).await.unwrap();
    }
    let e = node.cni.add(&pods[5].network).await.unwrap_err();
    assert!(matches!(&e, Error::Plugin { source, .. } if source.code == 11), "{e:?}");
    assert!(e.is_retryable());
    assert_eq!(node.host_links().len(), 5, "a failed ADD leaves nothing");
    node.cni.status().await.unwrap();

    // As if the runtime had lost its record of p1 and p3 and the plugin's GC had to find them.
    for id in ["p1", "p3"] {
        std::fs::remove_file(node.dir.path().join(format!("cache/{id}:eth0.json"))).unwrap();
    }
    let valid = [attachment(&pods[0]), attachment(&pods[2]), attachment(&pods[4])];
    node.cni.gc(&valid).await.unwrap();
    assert_eq!(node.host_links().len(), 3);
    node.cni.check(&pods[4].network).await.unwrap();
    let r = node.cni.add(&pods[5].network).await.unwrap();
    assert_eq!(r.pod_ips("eth0"), [ip("10.53.0.3")], "the first free one after the last given");

    node.cni.gc(&[]).await.unwrap();
    assert!(node.host_links().is_empty() && node.recorded().is_empty());
}

#[tokio::test]
async fn a_former_boot_does_not_count() {
    let node = Node::new(&conflist(&["10.54.0.0/29"]));
    let a = Pod::new("a");
    node.cni.add(&a.network).await.unwrap();
    let dir = node.data().join("test");
    let record = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path());
    let record = record.into_iter().find(|p| p.extension().is_some_and(|e| e == "json")).unwrap();
    std::fs::rename(&record, dir.join("00000000-0000-0000-0000-000000000000.json")).unwrap();
    run(&format!("ip link del {}", node.host_links()[0]));
    let b = Pod::new("b");
    assert_eq!(node.cni.add(&b.network).await.unwrap().pod_ips("eth0"), [ip("10.54.0.2")]);
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 2, "the new record and the lock");
}

/// What the record says is gone; the pods are not.
#[tokio::test]
async fn a_damaged_record_is_made_anew_from_the_links() {
    let node = Node::new(&conflist(&["10.61.0.0/24", "fd61::/64"]));
    run("ip addr add fd77::1/64 dev up0 nodad");
    let pods: Vec<Pod> = ["a", "b", "c", "d"].map(Pod::new).into();
    let [a, b, c, d] = &pods[..] else { unreachable!() };
    for pod in [a, b] {
        node.cni.add(&pod.network).await.unwrap();
    }
    let damage = || {
        let files = std::fs::read_dir(node.data().join("test")).unwrap().map(|e| e.unwrap().path());
        let record = files.into_iter().find(|p| p.extension().is_some_and(|e| e == "json")).unwrap();
        let text = std::fs::read(&record).unwrap();
        std::fs::write(&record, &text[..text.len() / 2]).unwrap();
    };
    damage();
    node.cni.status().await.unwrap();
    let r = node.cni.add(&c.network).await.unwrap();
    assert_eq!(r.pod_ips("eth0"), [ip("10.61.0.4"), ip("fd61::4")], "not those of the pods that are there");
    assert_eq!(talk(&c.netns, &a.netns, ip("10.61.0.2")), ip("10.61.0.4"));
    node.cni.check(&a.network).await.unwrap();
    damage();
    node.cni.del(&a.network).await.unwrap();
    assert_eq!(node.host_links().len(), 2);
    assert!(node.recorded().iter().all(|(_, at)| *at != ip("10.61.0.2")), "{:?}", node.recorded());
    damage();
    node.cni.gc(&[attachment(c)]).await.unwrap();
    assert_eq!(node.host_links(), [attachment(c).host_interface()]);
    let r = node.cni.add(&d.network).await.unwrap();
    assert_eq!(r.pod_ips("eth0"), [ip("10.61.0.2"), ip("fd61::2")]);
    for pod in [c, d] {
        node.cni.del(&pod.network).await.unwrap();
    }
    assert!(node.host_links().is_empty() && node.recorded().is_empty());
}

#[tokio::test]
async fn a_full_disk_keeps_no_address() {
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
    let node = Node::new(&conflist(&["10.62.0.0/24"]));
    let (a, b, c) = (Pod::new("a"), Pod::new("b"), Pod::new("c"));
    std::fs::create_dir(node.data()).unwrap();
    mount("tmpfs", node.data(), "tmpfs", MountFlags::empty(), c"size=256k").unwrap();
    for pod in [&a, &b] {
        node.cni.add(&pod.network).await.unwrap();
    }
    let fill = || {
        let mut file = std::fs::File::create(node.data().join("filler")).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
    };
    fill();
    node.cni.add(&c.network).await.unwrap_err();
    assert_eq!(node.host_links().len(), 2);
    node.cni.del(&a.network).await.unwrap();
    assert_eq!(node.recorded(), [("b".to_owned(), ip("10.62.0.3"))]);
    node.cni.gc(&[]).await.unwrap();
    assert!(node.host_links().is_empty() && node.recorded().is_empty());
    // Before the first pod: what failed to be added can be deleted.
    std::fs::remove_dir_all(node.data().join("test")).unwrap();
    mount("tmpfs", node.data(), "tmpfs", MountFlags::empty(), c"nr_inodes=1").unwrap();
    node.cni.add(&c.network).await.unwrap_err();
    node.cni.del(&c.network).await.unwrap();
    for _ in 0..2 {
        unmount(node.data(), UnmountFlags::DETACH).unwrap();
    }
}

/// A program that an operator has put into a plugin folder is taken, whatever the runtime brings along.
#[tokio::test]
async fn an_operators_program_comes_before_a_part_of_the_runtime() {
    use std::os::unix::fs::PermissionsExt;
    let node = Node::new(&conflist(&["10.59.1.0/24"])).builtin();
    let own = node.dir.path().join("bin/orlop-cni");
    std::fs::write(&own, "#!/bin/sh\necho '{\"code\": 123, \"msg\": \"mine\"}'; exit 1\n").unwrap();
    std::fs::set_permissions(&own, std::fs::Permissions::from_mode(0o755)).unwrap();
    let pod = Pod::new("a");
    let e = node.cni.add(&pod.network).await.unwrap_err();
    assert!(matches!(&e, Error::Plugin { source, .. } if source.code == 123), "{e:?}");
    std::fs::remove_file(&own).unwrap();
    node.cni.add(&pod.network).await.unwrap();
    node.cni.del(&pod.network).await.unwrap();
    assert!(node.host_links().is_empty() && node.recorded().is_empty());
}

/// ADD without a runtime, which would send DEL after a failure; returns the plugin's output.
fn call_alone(node: &Node, pod: &Pod, range: &str) -> String {
    let conf = serde_json::json!({"cniVersion": "1.1.0", "name": "test", "type": "orlop-cni",
        "ipam": {"ranges": [range], "dataDir": node.data()}});
    let mut plugin = Command::new(env!("CARGO_BIN_EXE_orlop-cni"))
        .env_clear()
        .env("CNI_COMMAND", "ADD")
        .env("CNI_CONTAINERID", &pod.network.container_id)
        .env("CNI_NETNS", &pod.network.netns)
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", "/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    plugin.stdin.take().unwrap().write_all(conf.to_string().as_bytes()).unwrap();
    String::from_utf8(plugin.wait_with_output().unwrap().stdout).unwrap()
}

#[tokio::test]
async fn failed_adds_leave_nothing_and_say_why() {
    let node = Node::new(&conflist(&["10.55.0.0/24"]));
    let mut gone = Pod::new("gone");
    gone.network.netns = "/run/netns/orlop-none".into();
    let e = node.cni.add(&gone.network).await.unwrap_err();
    assert!(matches!(&e, Error::Plugin { source, .. } if source.code == 3), "{e:?}");
    node.cni.del(&gone.network).await.unwrap();

    let taken = Pod::new("taken");
    inside(&taken.netns, || run("ip link add eth0 type veth peer name eth9"));
    let e = node.cni.add(&taken.network).await.unwrap_err();
    assert!(matches!(&e, Error::Plugin { source, .. } if source.code == 101), "{e:?}");

    // Somebody else's route for the address that is next (two were tried and given back).
    run("ip route add 10.55.0.3/32 dev up0");
    let pod = Pod::new("route");
    let e = node.cni.add(&pod.network).await.unwrap_err();
    assert!(matches!(&e, Error::Plugin { source, .. } if source.msg.contains("10.55.0.3")), "{e:?}");

    // What fails inside of the pod, as a second default route does, is undone on the node by the plugin alone.
    let routed = Pod::new("routed");
    inside(&routed.netns, || {
        run("ip link add away type veth peer name further");
        run("ip link set away up");
        run("ip route add default dev away");
    });
    let said = call_alone(&node, &routed, "10.55.0.0/24");
    assert!(said.contains("\"code\""), "{said}");
    let inner = inside(&routed.netns, || run("ip -o link"));
    assert!(inner.contains("away") && !inner.contains("eth0"), "{inner}");

    assert!(node.host_links().is_empty() && node.recorded().is_empty());
    assert!(node.cni.attachments().is_empty());

    node.configure(r#"{"cniVersion":"1.1.0","name":"test","plugins":[{"type":"orlop-cni","ipam":{}}]}"#);
    let e = node.cni.status().await.unwrap_err();
    assert!(matches!(&e, Error::Plugin { source, .. } if source.msg.contains("ipam.ranges")), "{e:?}");
}

#[tokio::test]
async fn capabilities_and_old_versions() {
    let node = Node::new("");
    // The same file under the standard name, as an operator would link it.
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_orlop-cni"), node.dir.path().join("bin/loopback"))
        .unwrap();
    node.configure(
        &serde_json::json!({"cniVersion": "0.3.1", "name": "test", "plugins": [
            {"type": "loopback"},
        ]})
        .to_string(),
    );
    let mut pod = Pod::new("a");
    node.cni.add(&pod.network).await.unwrap();
    assert!(inside(&pod.netns, || run("ip link show lo")).contains("UP"));
    node.cni.del(&pod.network).await.unwrap();

    node.configure(
        &serde_json::json!({"cniVersion": "0.3.1", "name": "test", "plugins": [
            {"type": "orlop-cni", "mtu": 1280, "capabilities": {"ips": true, "mac": true},
             "ipam": {"subnet": "10.56.0.0/24", "dataDir": "DATA"}},
        ]})
        .to_string(),
    );
    pod.network.ips = vec!["10.56.0.99/24".into()];
    pod.network.mac = Some("02:00:00:00:00:77".into());
    let r = node.cni.add(&pod.network).await.unwrap();
    assert_eq!(r.pod_ips("eth0"), [ip("10.56.0.99")]);
    let link = inside(&pod.netns, || run("ip link show eth0"));
    assert!(link.contains("02:00:00:00:00:77") && link.contains("mtu 1280"), "{link}");
    talk(&node.netns, &pod.netns, ip("10.56.0.99"));
}

/// ADD, DEL and ADD killed at a random moment: no address ever has two owners, and the links agree with the record.
#[tokio::test]
async fn killed_at_any_moment_no_address_is_given_twice() {
    dropped_at_any_moment(Node::new(&conflist(&["10.57.0.0/28"]))).await;
}

/// A part of the runtime is not killed: the next operation on the pod waits for it.
#[tokio::test]
async fn left_alone_at_any_moment_no_address_is_given_twice() {
    dropped_at_any_moment(Node::new(&conflist(&["10.57.0.0/28"])).builtin()).await;
}

async fn dropped_at_any_moment(node: Node) {
    let pods: Vec<Pod> = (0..6).map(|n| Pod::new(&format!("k{n}"))).collect();
    let mut up = [false; 6];
    let mut random = 0x2545_f491_4f6c_dd1d_u64 ^ u64::from(std::process::id());
    for _ in 0..60 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let n = (random % 6) as usize;
        let pod = &pods[n].network;
        if up[n] {
            node.cni.del(pod).await.unwrap();
            up[n] = false;
        } else if random & 64 == 0 {
            node.cni.add(pod).await.unwrap();
            up[n] = true;
        } else {
            // Dropping the call kills a plugin that is a program.
            let limit = Duration::from_micros(random >> 8 & 0x1fff);
            up[n] = tokio::time::timeout(limit, node.cni.add(pod)).await.is_ok_and(|r| r.is_ok());
            if !up[n] {
                node.cni.del(pod).await.unwrap();
            }
        }
        let recorded = node.recorded();
        let ips: HashSet<_> = recorded.iter().map(|(_, ip)| ip).collect();
        assert_eq!(ips.len(), recorded.len());
        assert_eq!(recorded.len(), up.iter().filter(|u| **u).count());
        assert_eq!(node.host_links().len(), recorded.len());
    }
    for n in (0..6).filter(|n| up[*n]) {
        node.cni.check(&pods[n].network).await.unwrap();
    }
}

#[tokio::test]
async fn many_pods_at_once() {
    at_once(Node::new(&conflist(&["10.58.0.0/24"]))).await;
}

#[tokio::test]
async fn many_pods_at_once_by_a_part_of_the_runtime() {
    at_once(Node::new(&conflist(&["10.58.0.0/24"])).builtin()).await;
}

async fn at_once(node: Node) {
    let pods: Vec<Pod> = (0..16).map(|n| Pod::new(&format!("m{n}"))).collect();
    let start = Instant::now();
    let adds: Vec<_> = pods.iter().map(|p| node.cni.add(&p.network)).collect();
    let mut ips = HashSet::new();
    for r in futures::future::join_all(adds).await {
        ips.insert(r.unwrap().pod_ips("eth0")[0]);
    }
    assert_eq!(ips.len(), 16);
    println!("16 ADDs at once: {:?}", start.elapsed());
    for p in &pods {
        node.cni.del(&p.network).await.unwrap();
    }
    let (mut add, mut del) = (Vec::new(), Vec::new());
    for p in &pods {
        let start = Instant::now();
        node.cni.add(&p.network).await.unwrap();
        add.push(start.elapsed());
        // The kernel drops packets until then.
        let links = inside(&node.netns, || run("ip -o link"));
        let ours = links.lines().find(|l| l.contains(": orlp")).unwrap();
        assert!(ours.contains("state UP"), "{ours}");
        let start = Instant::now();
        node.cni.del(&p.network).await.unwrap();
        del.push(start.elapsed());
    }
    add.sort();
    del.sort();
    println!("one ADD: median {:?}; one DEL: median {:?}", add[8], del[8]);
}

#[tokio::test]
async fn chained_with_another_plugin() {
    let node = Node::new("");
    let log = node.dir.path().join("log");
    let script = format!(
        "#!/bin/sh\ninput=$(cat)\necho \"$CNI_COMMAND $input\" >> {log}\n\
         [ \"$CNI_COMMAND\" = ADD ] && [ -e {fail} ] && {{ echo '{{\"code\":120,\"msg\":\"told to\"}}'; exit 1; }}\n\
         [ \"$CNI_COMMAND\" = ADD ] && echo \"$input\" | jq -c .prevResult\nexit 0\n",
        log = log.display(),
        fail = node.dir.path().join("fail").display(),
    );
    let path = node.dir.path().join("bin/second");
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    node.configure(
        &serde_json::json!({"cniVersion": "1.1.0", "name": "test", "plugins": [
            {"type": "orlop-cni", "ipam": {"ranges": ["10.59.0.0/24"], "dataDir": "DATA"}},
            {"type": "second"},
        ]})
        .to_string(),
    );
    let pod = Pod::new("a");
    assert_eq!(node.cni.add(&pod.network).await.unwrap().pod_ips("eth0"), [ip("10.59.0.2")]);
    node.cni.check(&pod.network).await.unwrap();
    node.cni.del(&pod.network).await.unwrap();
    let said = std::fs::read_to_string(&log).unwrap();
    let commands: Vec<&str> = said.lines().filter_map(|l| l.split(' ').next()).collect();
    assert_eq!(commands, ["ADD", "CHECK", "DEL"]);
    assert!(said.lines().all(|l| l.contains("10.59.0.2/32")), "each gets the result: {said}");

    std::fs::write(node.dir.path().join("fail"), "").unwrap();
    let e = node.cni.add(&pod.network).await.unwrap_err();
    assert!(
        matches!(&e, Error::Plugin { plugin, source, .. } if plugin == "second" && source.code == 120),
        "{e:?}"
    );
    assert!(node.host_links().is_empty() && node.recorded().is_empty(), "rolled back");
}
