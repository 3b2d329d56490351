//! Devices that vendors describe by the Container Device Interface.

use std::fs;

use crate::node::{Node, container_config, sandbox_config, shell, wait_for};
use orlop_proto::cri;

#[tokio::test]
async fn a_cdi_device_brings_all_that_belongs_to_it() {
    let node = Node::start("cdi", &[]).await;
    let dir = node.dir.join("cdi");
    fs::create_dir_all(&dir).unwrap();
    fs::write(node.dir.join("library"), "vendor's library").unwrap();
    let hook =
        |name: &str, args: &str| format!("{{hookName: {name}, path: /bin/busybox, args: [busybox, {args}]}}");
    let text = format!(
        "cdiVersion: 0.6.0\nkind: orlop.test/dev\ncontainerEdits:\n  env: [VENDOR=all]\ndevices:\n- name: zero\n  \
         containerEdits:\n    env: [DEVICE=zero]\n    deviceNodes:\n    - {{path: /dev/vendor/zero, hostPath: /dev/zero, permissions: rw}}\n    \
         mounts:\n    - {{hostPath: {lib}, containerPath: /opt/vendor/library, options: [ro, bind]}}\n    \
         hooks: [{made}, {inside}]\n    additionalGids: [4242]\n",
        lib = node.dir.join("library").display(),
        made = hook("createRuntime", &format!("touch, {}", node.dir.join("hook-ran").display())),
        inside = hook("startContainer", "touch, /tmp/started"),
    );
    fs::write(dir.join("vendor.yaml"), text).unwrap();
    let config = sandbox_config(&node, "cdi", true);
    let pod = node.run_pod(&config).await.unwrap();
    let with = |name: &str, device: &str, annotated: bool| {
        let mut c = container_config(name, &["sleep", "1000"]);
        if annotated {
            c.annotations.insert("cdi.k8s.io/test".into(), device.into());
        } else {
            c.cdi_devices.push(cri::CdiDevice { name: device.into() });
        }
        c
    };
    for annotated in [false, true] {
        let name = format!("good-{annotated}");
        let id = node.run_container(&pod, with(&name, "orlop.test/dev=zero", annotated), &config).await;
        let script = "echo $VENDOR $DEVICE; cat /opt/vendor/library; echo; head -c 3 /dev/vendor/zero | wc -c; id -G; ls /tmp";
        assert_eq!(
            shell(&node, &id, script).await.replace('\n', " "),
            "all zero vendor's library 3 0 4242 started"
        );
        assert!(node.dir.join("hook-ran").exists());
        fs::remove_file(node.dir.join("hook-ran")).unwrap();
    }
    // The rule is for that device and that access only.
    let id = node.run_container(&pod, container_config("without", &["sleep", "1000"]), &config).await;
    assert_eq!(shell(&node, &id, "test -e /dev/vendor || echo none; id -G").await, "none\n0");
    for (device, says) in
        [("orlop.test/dev=none", "orlop.test/dev=none"), ("nonsense", "vendor/class=device")]
    {
        let e = node.create(&pod, with("bad", device, false), &config).await.unwrap_err();
        assert_eq!(e.code(), tonic::Code::InvalidArgument);
        assert!(e.message().contains(says), "{e}");
    }
    assert_eq!(node.list(None).await.len(), 3);
    node.purge_and_check();
}

/// Also when neither the server nor the monitor lives when a container ends: whoever removes it runs the vendor's hooks, once.
#[tokio::test]
async fn hooks_after_start_and_end_whoever_is_there() {
    let mut node = Node::start("cdihook", &[]).await;
    let dir = node.dir.join("cdi");
    fs::create_dir_all(&dir).unwrap();
    let told = node.dir.join("told");
    let hook = |name: &str, script: &str| {
        format!(
            "{{hookName: {name}, path: /bin/busybox, args: [sh, -c, \"{script}\"], env: [\"told={}\"]}}",
            told.display()
        )
    };
    // The state says whose it is and how far it has come.
    let tell = "grep -o '\\\"status\\\":\\\"[a-z]*' >> $told";
    let text = format!(
        "cdiVersion: 0.6.0\nkind: orlop.test/dev\ndevices:\n- name: a\n  containerEdits:\n    hooks: [{}, {}, {}]\n",
        hook("poststart", tell),
        hook("poststop", "exit 9"),
        hook("poststop", tell),
    );
    fs::write(dir.join("vendor.yaml"), text).unwrap();
    let config = sandbox_config(&node, "cdihook", true);
    let pod = node.run_pod(&config).await.unwrap();
    let with = |name: &str| {
        let mut c = container_config(name, &["sleep", "1000"]);
        c.cdi_devices.push(cri::CdiDevice { name: "orlop.test/dev=a".into() });
        c
    };
    let count = |status: &str| {
        let text = fs::read_to_string(&told).unwrap_or_default();
        text.lines().filter(|l| l.ends_with(status)).count()
    };
    let first = node.run_container(&pod, with("first"), &config).await;
    assert_eq!((count("running"), count("stopped")), (1, 0));
    let mut client = node.client().await;
    client.remove_container(cri::RemoveContainerRequest { container_id: first }).await.unwrap();
    assert_eq!((count("running"), count("stopped")), (1, 1));
    node.run_container(&pod, with("second"), &config).await;
    node.kill();
    let file = node.dir.join("run/s").join(&pod).join("monitor.pid");
    let pid: i32 = fs::read_to_string(file).unwrap().trim().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    node.restart(&[]).await;
    wait_for("the hooks", || count("stopped") == 2).await;
    assert!(node.log().contains("poststop hook /bin/busybox"), "{}", node.log());
    let mut client = node.client().await;
    client.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: pod }).await.unwrap();
    assert_eq!((count("running"), count("stopped")), (2, 2));
    node.purge_and_check();
}
