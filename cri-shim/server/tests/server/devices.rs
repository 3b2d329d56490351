//! Devices that vendors describe by the Container Device Interface.

use std::fs;

use crate::node::{Node, container_config, sandbox_config, shell};
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
