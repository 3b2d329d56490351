//! What upstream's kube-proxy leaves by IPVS, which not every kernel has: with Linux 6.1 in a machine of its own under QEMU.

use std::path::Path;

use orlop_test_vms::vm::{Guest, Outcome, on_path};

const MODULES: [&str; 22] = [
    "ip_vs_rr",
    "ip_set_hash_ip",
    "ip_set_hash_ipport",
    "ip_set_hash_ipportip",
    "ip_set_hash_ipportnet",
    "ip_set_bitmap_port",
    "nf_conntrack",
    "nft_compat",
    "nft_chain_nat",
    "xt_MASQUERADE",
    "xt_addrtype",
    "xt_comment",
    "xt_conntrack",
    "xt_ipvs",
    "xt_mark",
    "xt_nat",
    "xt_set",
    "xt_tcpudp",
    "ipt_REJECT",
    "ip6t_REJECT",
    "xt_physdev",
    "nft_ct",
];
/// Its port, its node port and its external addresses, one of which is the node's: every kind of virtual server that there is.
const SERVICE: &str = r#"
apiVersion: v1
kind: Node
metadata: {name: n1}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  clusterIP: 10.96.0.10
  externalIPs: [198.51.100.8, 192.0.2.10]
  ports:
  - {name: t, port: 80, nodePort: 30080, protocol: TCP}
  - {name: u, port: 53, nodePort: 30053, protocol: UDP}
  - {name: s, port: 99, nodePort: 30099, protocol: SCTP}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports:
- {name: t, port: 8080, protocol: TCP}
- {name: u, port: 8053, protocol: UDP}
- {name: s, port: 8099, protocol: SCTP}
endpoints: [{addresses: [10.9.9.1], nodeName: n1, conditions: {ready: true}}]
"#;

fn guest() -> Result<Outcome, String> {
    let mut guest = Guest::new(&["kube-proxy", "xtables-nft-multi", "ipset", "ipvsadm"])?;
    guest.load(&MODULES)?;
    let tool = on_path("xtables-nft-multi")?;
    let multi = std::fs::canonicalize(&tool).map_err(|e| format!("{}: {e}", tool.display()))?;
    let lib = format!("/usr/lib/{}-linux-gnu/xtables", std::env::consts::ARCH);
    let extensions =
        std::fs::read_dir(&lib).map_err(|e| format!("{lib}: {e}; {} needs it", multi.display()))?;
    for file in extensions.flatten() {
        guest.file(&file.path().to_string_lossy(), &file.path())?;
    }
    // ipset and kube-proxy name protocols.
    guest.file("/etc/protocols", Path::new("/etc/protocols"))?;
    // The modules are there.
    guest.text("/usr/local/bin/modprobe", "#!/bin/sh\n")?;
    guest.text("/vm/manifests/all.yaml", SERVICE)?;
    guest.step("ipvs", include_str!("../guest/ipvs.sh"))?;
    guest.run()
}

#[test]
fn servers_sets_and_chains_of_kube_proxy_go_and_others_stay() {
    let machine = guest().unwrap_or_else(|e| panic!("{e}"));
    let fact = |key| machine.fact("ipvs", key).trim();
    let mut made = Vec::new();
    for address in ["10.96.0.10", "192.0.2.10", "198.51.100.8"] {
        made.extend(
            ["-t ADDRESS:80", "-u ADDRESS:53", "--sctp-service ADDRESS:99"]
                .map(|s| s.replace("ADDRESS", address)),
        );
    }
    made.extend(
        ["-t 192.0.2.10:30080", "-u 192.0.2.10:30053", "--sctp-service 192.0.2.10:30099"].map(str::to_owned),
    );
    for server in made {
        assert!(fact("before").contains(&server), "{server} was not there: {}", fact("before"));
    }
    assert_ne!(fact("link_before"), "0");
    assert_eq!(fact("servers"), "-f 7 -t 192.0.2.10:8888");
    assert_eq!((fact("sets"), fact("rules"), fact("link")), ("MINE", "MINE -A POSTROUTING -j MINE", "0"));
    let said = machine.succeeded("ipvs");
    assert!(said.contains("said=removed IPVS servers and the link kube-ipvs0"), "{said}");
}
