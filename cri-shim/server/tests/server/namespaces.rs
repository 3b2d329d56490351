//! Which namespaces containers share, by the kernel's account, also of those that are made after a kill of the server.

use std::fs;
use std::path::PathBuf;

use crate::node::{Node, container_config, sandbox_config};
use orlop_proto::cri;
use orlop_proto::cri::NamespaceMode;
use tonic::Code;

/// What stands for a namespace of a process.
async fn of(node: &Node, container: &str, kind: &str) -> PathBuf {
    fs::read_link(format!("/proc/{}/ns/{kind}", node.pid_of(container).await)).unwrap()
}

fn hosts(kind: &str) -> PathBuf {
    fs::read_link(format!("/proc/self/ns/{kind}")).unwrap()
}

/// Its number in its own PID namespace.
async fn inner_pid(node: &Node, container: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", node.pid_of(container).await)).unwrap();
    let line = status.lines().find(|l| l.starts_with("NSpid:")).unwrap();
    line.split_whitespace().last().unwrap().parse().unwrap()
}

struct Pod {
    config: cri::PodSandboxConfig,
    id: String,
}

impl Pod {
    async fn run(node: &Node, name: &str, pid: NamespaceMode, ipc: NamespaceMode) -> Pod {
        let mut config = sandbox_config(node, name, ipc == NamespaceMode::Node);
        let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
        let options = security.namespace_options.get_or_insert_default();
        options.pid = pid as i32;
        options.ipc = ipc as i32;
        Pod { id: node.run_pod(&config).await.unwrap(), config }
    }

    async fn create(
        &self,
        node: &Node,
        name: &str,
        pid: NamespaceMode,
        target: &str,
    ) -> Result<String, tonic::Status> {
        let mut container = container_config(name, &["sleep", "1000"]);
        let linux = self.config.linux.as_ref().unwrap();
        let mut options = linux.security_context.as_ref().unwrap().namespace_options.clone().unwrap();
        options.pid = pid as i32;
        options.target_id = target.to_owned();
        let security = container.linux.get_or_insert_default().security_context.get_or_insert_default();
        security.namespace_options = Some(options);
        node.create(&self.id, container, &self.config).await
    }

    async fn container(&self, node: &Node, name: &str, pid: NamespaceMode, target: &str) -> String {
        let id = self.create(node, name, pid, target).await.unwrap();
        node.start_container(&id).await.unwrap();
        id
    }
}

#[tokio::test]
async fn containers_share_what_was_asked_for() {
    use NamespaceMode::{Container, Node as Host, Pod as Shared, Target};
    let mut node = Node::start("shares", &[]).await;
    node.network(false);
    let shared = Pod::run(&node, "shared", Shared, Shared).await;
    let own = Pod::run(&node, "own", Container, Shared).await;
    let host = Pod::run(&node, "host", Host, Host).await;
    let (mut together, mut alone, mut targeting, mut on_host) = (vec![], vec![], vec![], vec![]);
    for round in ["before", "after"] {
        if round == "after" {
            node.kill();
            node.restart(&[]).await;
        }
        let name = |what: &str| format!("{what}-{round}");
        together.push(shared.container(&node, &name("shared"), Shared, "").await);
        alone.push(own.container(&node, &name("own"), Container, "").await);
        // A container for itself in a pod that shares.
        alone.push(shared.container(&node, &name("apart"), Container, "").await);
        // Always of the one that was there before the kill.
        targeting.push(own.container(&node, &name("target"), Target, &alone[0]).await);
        on_host.push(host.container(&node, &name("host"), Host, "").await);
        // The node's in a pod with its own network.
        on_host.push(shared.container(&node, &name("hosts"), Host, "").await);

        let pod = of(&node, &together[0], "pid").await;
        for id in &together {
            assert_eq!(of(&node, id, "pid").await, pod, "{round}");
            // The pod's init is the first.
            assert!(inner_pid(&node, id).await > 1, "{round}");
        }
        for (i, id) in alone.iter().enumerate() {
            assert_eq!(inner_pid(&node, id).await, 1, "{round}");
            for other in alone[..i].iter().chain(&together) {
                assert_ne!(of(&node, id, "pid").await, of(&node, other, "pid").await, "{round}");
            }
        }
        for id in &targeting {
            assert_eq!(of(&node, id, "pid").await, of(&node, &alone[0], "pid").await, "{round}");
            assert!(inner_pid(&node, id).await > 1, "{round}");
        }
        for id in &on_host {
            assert_eq!(of(&node, id, "pid").await, hosts("pid"), "{round}");
            assert_eq!(inner_pid(&node, id).await, node.pid_of(id).await, "{round}");
        }
        for id in together.iter().chain(&alone).chain(&targeting) {
            assert_ne!(of(&node, id, "pid").await, hosts("pid"), "{round}");
        }
        // IPC and network are the pod's, however processes are seen.
        for kind in ["ipc", "net", "uts"] {
            let (of_shared, of_own) = (of(&node, &together[0], kind).await, of(&node, &alone[0], kind).await);
            assert_ne!(of_shared, of_own);
            for (i, id) in together.iter().chain(&targeting).chain(&on_host).chain(&alone).enumerate() {
                let pod = node.list(Some(id)).await[0].pod_sandbox_id.clone();
                let want = match () {
                    () if pod == shared.id => &of_shared,
                    () if pod == own.id => &of_own,
                    () => &hosts(kind),
                };
                assert_eq!(&of(&node, id, kind).await, want, "{round}: {kind} of {i}");
            }
            assert!(![&of_shared, &of_own].contains(&&hosts(kind)), "{kind}");
        }
    }

    // A target that cannot be one, by which kind of no.
    let e = shared.create(&node, "elsewhere", Target, &alone[0]).await.unwrap_err();
    assert_eq!(e.code(), Code::InvalidArgument, "{e}");
    let e = own.create(&node, "nobody", Target, "0123456789abcdef").await.unwrap_err();
    assert_eq!(e.code(), Code::NotFound, "{e}");
    let request = cri::StopContainerRequest { container_id: alone[0].clone(), timeout: 0 };
    node.client().await.stop_container(request).await.unwrap();
    let e = own.create(&node, "late", Target, &alone[0]).await.unwrap_err();
    assert_eq!(e.code(), Code::FailedPrecondition, "{e}");
    // With its first process ends a namespace, and all that were in it.
    for id in &targeting {
        assert_eq!(node.ended(id).await.exit_code, 137);
    }
    node.purge_and_check();
}
