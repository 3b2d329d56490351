//! `orlop proxy` among upstream's programs: on kube-apiserver and etcd with nothing but the role that upstream made for kube-proxy,
//! and after kube-proxy itself, of which it takes away what that left.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use orlop_test_vms::place::Place;
use orlop_test_vms::{program, run, wait_for};
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair};

const PATIENCE: Duration = Duration::from_secs(60);
const ETCD: &str = "http://127.0.0.1:2379";
const MISSING: &str = "is not on PATH: run scripts/deps.sh test, which builds it from its Go module";
/// Backends are pages on addresses of the loopback link.
const BACKENDS: [(&str, &str); 2] = [("one", "10.9.9.1"), ("two", "10.9.9.2")];

/// Upstream's control plane, as far as a service proxy needs it, and two backends.
struct Cluster {
    place: Place,
    /// Credentials of `system:kube-proxy`, which upstream binds to `system:node-proxier` and to nothing else.
    user: PathBuf,
}

impl Cluster {
    fn start() -> Cluster {
        for tool in ["etcd", "kube-apiserver", "kube-proxy"] {
            let found = Command::new(tool).arg("--version").output();
            assert!(found.is_ok_and(|o| o.status.success()), "{tool} {MISSING}");
        }
        let mut place = Place::new();
        let user = certify(&place);
        let mut etcd = place.inside("etcd");
        etcd.arg("--data-dir").arg(place.path("etcd")).arg("--unsafe-no-fsync");
        etcd.args(["--listen-client-urls", ETCD, "--advertise-client-urls", ETCD]);
        etcd.args(["--listen-peer-urls", "http://127.0.0.1:2380"]);
        place.start("etcd", etcd);
        let mut cluster = Cluster { place, user };
        cluster.start_api_server();
        for (name, address) in BACKENDS {
            let place = &mut cluster.place;
            run(place.inside("ip").args(["address", "add", &format!("{address}/32"), "dev", "lo"]));
            fs::create_dir(place.path(name)).unwrap();
            fs::write(place.path(name).join("index.html"), name).unwrap();
            let mut server = place.inside("busybox");
            server.args(["httpd", "-f", "-p", &format!("{address}:8080"), "-h"]).arg(place.path(name));
            place.start(name, server);
        }
        cluster.place.apply(NODE);
        let status = format!(
            r#"{{"status":{{"addresses":[{{"type":"InternalIP","address":"{}"}}]}}}}"#,
            Place::ADDRESS
        );
        cluster.patch_status("node/n1", &status);
        cluster
    }

    fn start_api_server(&mut self) {
        let mut server = self.place.inside("kube-apiserver");
        server.args([
            "--bind-address=127.0.0.1",
            "--secure-port=6443",
            &format!("--advertise-address={}", Place::ADDRESS),
            &format!("--etcd-servers={ETCD}"),
            "--service-cluster-ip-range=10.96.0.0/24,fd00:96::/112",
            "--authorization-mode=RBAC",
            "--service-account-issuer=https://upstream.invalid",
        ]);
        for (flag, name) in [
            ("client-ca-file", "ca.crt"),
            ("tls-cert-file", "server.crt"),
            ("tls-private-key-file", "server.key"),
            ("service-account-key-file", "accounts.pub"),
            ("service-account-signing-key-file", "accounts.key"),
        ] {
            server.arg(format!("--{flag}={}", self.place.path(name).display()));
        }
        self.place.start("kube-apiserver", server);
        wait_for("kube-apiserver is ready", PATIENCE, || {
            let mut ready = self.place.kubectl(&["get", "--raw", "/readyz"]);
            ready.output().ok()?.status.success().then_some(())
        });
    }

    fn kubectl(&self, args: &[&str]) -> String {
        run(&mut self.place.kubectl(args))
    }

    fn patch_status(&self, object: &str, patch: &str) {
        self.kubectl(&["patch", object, "--subresource=status", "--type=merge", "--patch", patch]);
    }

    fn start_proxy(&mut self) {
        let user = self.user.clone();
        self.place.start_proxy(&user);
        self.place.wait_healthy();
    }

    /// Until a page comes from the backend of this name, by `orlop proxy` or only by others.
    fn wait_answer(&self, address: &str, served: bool, backend: &str) {
        wait_for(&format!("{backend} answers at {address}, served: {served}"), PATIENCE, || {
            (self.place.get(address, served)? == backend).then_some(())
        });
    }
}

/// An authority, the API server's certificate and keys, and kubeconfigs of an administrator (`admin`) and of `system:kube-proxy`.
fn certify(place: &Place) -> PathBuf {
    let authority = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new([]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&authority).unwrap();
    fs::write(place.path("ca.crt"), ca.pem()).unwrap();
    let issuer = Issuer::new(params, authority);
    let accounts = KeyPair::generate().unwrap();
    fs::write(place.path("accounts.key"), accounts.serialize_pem()).unwrap();
    fs::write(place.path("accounts.pub"), accounts.public_key_pem()).unwrap();
    let sign = |file: &str, hosts: &[&str], user: &str, group: &str| {
        let hosts: Vec<String> = hosts.iter().map(|h| (*h).to_owned()).collect();
        let mut params = CertificateParams::new(hosts).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, group);
        params.distinguished_name.push(DnType::CommonName, user);
        let key = KeyPair::generate().unwrap();
        let pair = [place.path(&format!("{file}.crt")), place.path(&format!("{file}.key"))];
        fs::write(&pair[0], params.signed_by(&key, &issuer).unwrap().pem()).unwrap();
        fs::write(&pair[1], key.serialize_pem()).unwrap();
        let config = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "upstream", "cluster": {
                "server": "https://127.0.0.1:6443",
                "certificate-authority": place.path("ca.crt"),
            }}],
            "users": [{"name": user, "user": {"client-certificate": pair[0], "client-key": pair[1]}}],
            "contexts": [{"name": "upstream", "context": {"cluster": "upstream", "user": user}}],
            "current-context": "upstream",
        });
        fs::write(place.path(file), config.to_string()).unwrap();
        place.path(file)
    };
    sign("server", &["127.0.0.1"], "kube-apiserver", "upstream");
    sign("admin", &[], "admin", "system:masters");
    sign("user", &[], "system:kube-proxy", "upstream")
}

const NODE: &str = "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\n";

fn service(name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}\n"
    )
}

fn slice(service: &str, backend: usize) -> String {
    format!(
        r#"---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {service}-1, labels: {{kubernetes.io/service-name: {service}}}}}
addressType: IPv4
ports: [{{name: "", port: 8080, protocol: TCP}}]
endpoints: [{{addresses: [{}], nodeName: n1, conditions: {{ready: true}}}}]
"#,
        BACKENDS[backend].1
    )
}

#[test]
fn the_role_of_kube_proxy_is_enough_on_kube_apiserver() {
    let mut cluster = Cluster::start();
    cluster.start_proxy();
    cluster.place.apply(&(service("web", "10.96.0.10") + &slice("web", 0)));
    cluster.wait_answer("10.96.0.10", true, "one");
    cluster.place.apply(&slice("web", 1));
    cluster.wait_answer("10.96.0.10", true, "two");
    let services = cluster.place.ask_proxy(&["services"]);
    assert!(services.contains("default/web"), "{services}");
    let backends = cluster.place.ask_proxy(&["backends"]);
    assert!(backends.contains("10.9.9.2:8080") && !backends.contains("10.9.9.1:8080"), "{backends}");

    assert!(!cluster.place.said("proxy").contains("forbidden"));

    // Watches break, versions of objects go on.
    cluster.place.kill("kube-apiserver");
    assert_eq!(cluster.place.get("10.96.0.10", true).as_deref(), Some("two"));
    cluster.start_api_server();
    cluster.place.apply(&slice("web", 0));
    cluster.wait_answer("10.96.0.10", true, "one");

    // What was changed while nobody listened, and is in no watch's history any more, is read anew.
    let proxy = Pid::from_raw(i32::try_from(cluster.place.pid("proxy")).unwrap());
    kill(proxy, Signal::SIGSTOP).unwrap();
    let version =
        |object: &str| cluster.kubectl(&["get", object, "--output", "jsonpath={.metadata.resourceVersion}"]);
    let before = version("service/web");
    cluster.kubectl(&["delete", "service/web", "endpointslice/web-1"]);
    cluster.place.apply(&(service("later", "10.96.0.11") + &slice("later", 1)));
    let compaction = format!(r#"{{"revision": {}, "physical": true}}"#, version("service/later"));
    let url = format!("{ETCD}/v3/kv/compaction");
    run(cluster.place.inside("curl").args(["--silent", "--fail", "--data", &compaction, &url]));
    cluster.place.kill("kube-apiserver");
    cluster.start_api_server();
    let watch = format!("/api/v1/services?watch=1&timeoutSeconds=5&resourceVersion={before}");
    let told = cluster.kubectl(&["get", "--raw", &watch]);
    assert!(told.contains("ERROR") && told.contains("410"), "a watch cannot go on from there: {told}");
    kill(proxy, Signal::SIGCONT).unwrap();
    cluster.wait_answer("10.96.0.11", true, "two");
    wait_for("the deleted Service is gone", PATIENCE, || {
        (!cluster.place.ask_proxy(&["services"]).contains("default/web")).then_some(())
    });
    assert!(!cluster.place.ask_proxy(&["backends"]).contains("10.9.9.1:8080"));
}

/// Every way to a Service of which kube-proxy makes rules of a kind of their own.
const SERVICES: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, "fd00:96::10"]
  ipFamilyPolicy: RequireDualStack
  ports: [{port: 80, nodePort: 30080}]
  externalIPs: [198.51.100.8]
  externalTrafficPolicy: Local
  healthCheckNodePort: 32080
  loadBalancerSourceRanges: [203.0.113.0/24]
  sessionAffinity: ClientIP
---
apiVersion: v1
kind: Service
metadata: {name: empty}
spec: {clusterIP: 10.96.0.11, type: NodePort, ports: [{port: 80, nodePort: 30081}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-6, labels: {kubernetes.io/service-name: web}}
addressType: IPv6
ports: [{name: "", port: 8080, protocol: TCP}]
endpoints: [{addresses: ["fd00:9::1"], nodeName: n1, conditions: {ready: true}}]
"#;

/// Somebody else's, with names that are nearly kube-proxy's, and the kubelet's.
const FOREIGN: &str = "table inet kube-proxy {
    chain services { type filter hook input priority 5; counter accept; }
}
table ip kube-proxy-mine {
    chain services { counter; }
}
table ip6 foreign {
    set cluster-ips { type ipv6_addr; elements = { fd00:96::10 }; }
}
";
const FOREIGN_CHAINS: &str = "*mangle
:MINE -
:KUBE-KUBELET-CANARY -
:KUBE-IPTABLES-HINT -
-A PREROUTING -m comment --comment \"somebody's, not KUBE-SERVICES\" -j MINE
-A INPUT -j MINE
-A FORWARD -j MINE
-A OUTPUT -j MINE
-A POSTROUTING -j MINE
COMMIT
*nat
:MINE -
:KUBE-SERVICES-MINE -
:KUBE-KUBELET-CANARY -
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j MINE
-A INPUT -j MINE
-A OUTPUT -j KUBE-SERVICES-MINE
-A POSTROUTING -j MINE
-A KUBE-SERVICES-MINE -j RETURN
COMMIT
*filter
:MINE -
:KUBE-FIREWALL -
:KUBE-KUBELET-CANARY -
-A INPUT -j KUBE-FIREWALL
-A INPUT -j MINE
-A FORWARD -m conntrack --ctstate NEW -j MINE
-A OUTPUT -j KUBE-FIREWALL
-A OUTPUT -j MINE
COMMIT
";
/// kube-proxy writes this one of the kubelet's rules as well.
const MARTIANS: &str = "*filter
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"block incoming localnet connections\" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
COMMIT
";

/// All packet rules of the namespace, without counters.
fn rules(place: &Place) -> String {
    let mut all = run(place.inside("nft").args(["--stateless", "list", "ruleset"]));
    for family in ["iptables", "ip6tables"] {
        for kind in ["nft", "legacy"] {
            let saved = run(&mut place.inside(format!("{family}-{kind}-save")));
            let lines = saved.lines().filter(|l| !l.starts_with('#'));
            all.extend(lines.map(|l| l.split(" [").next().unwrap_or_default().to_owned() + "\n"));
        }
    }
    all
}

fn add_foreign_rules(place: &Place) {
    let give = |mut tool: Command, text: &str| {
        fs::write(place.path("rules"), text).unwrap();
        run(tool.stdin(fs::File::open(place.path("rules")).unwrap()));
    };
    let mut nft = place.inside("nft");
    nft.args(["--file", "-"]);
    give(nft, FOREIGN);
    for family in ["iptables", "ip6tables"] {
        for kind in ["nft", "legacy"] {
            let mut restore = place.inside(format!("{family}-{kind}-restore"));
            restore.arg("--noflush");
            give(restore, FOREIGN_CHAINS);
        }
    }
    for kind in ["nft", "legacy"] {
        let mut restore = place.inside(format!("iptables-{kind}-restore"));
        restore.arg("--noflush");
        give(restore, MARTIANS);
    }
}

/// A folder in which the usual names mean iptables of this kind.
fn iptables(place: &Place, kind: &str) -> PathBuf {
    let dir = place.path(kind);
    fs::create_dir(&dir).unwrap();
    for name in ["iptables", "ip6tables"] {
        for what in ["", "-save", "-restore"] {
            let of = |kind: &str| format!("{name}{kind}{what}");
            symlink(Path::new("/usr/sbin").join(of(&format!("-{kind}"))), dir.join(of(""))).unwrap();
        }
    }
    dir
}

fn kube_proxy(place: &Place, kind: &Path) -> Command {
    let path = std::env::var("PATH").unwrap();
    let mut c = place.inside("kube-proxy");
    c.env("PATH", format!("{}:{path}", kind.display()));
    c
}

#[test]
fn cleanup_takes_what_kube_proxy_left_and_nothing_else() {
    let mut cluster = Cluster::start();
    cluster.place.apply(&format!("{SERVICES}{}", slice("web", 0)));
    cluster.patch_status("service/web", r#"{"status":{"loadBalancer":{"ingress":[{"ip":"198.51.100.7"}]}}}"#);
    add_foreign_rules(&cluster.place);
    let before = rules(&cluster.place);
    for (mode, kind, removed) in [
        ("nftables", "nft", &["nftables table ip kube-proxy", "nftables table ip6 kube-proxy"]),
        ("iptables", "nft", &["chains of iptables (nft)", "chains of ip6tables (nft)"]),
        ("iptables", "legacy", &["chains of iptables (legacy)", "chains of ip6tables (legacy)"]),
    ] {
        let tools = cluster.place.path(kind);
        let tools = if tools.exists() { tools } else { iptables(&cluster.place, kind) };
        let mut proxy = kube_proxy(&cluster.place, &tools);
        proxy.arg("--kubeconfig").arg(&cluster.user).arg(format!("--proxy-mode={mode}"));
        proxy.args(["--hostname-override=n1", "--healthz-bind-address=127.0.0.1:10256"]);
        // The rest is the machine's.
        proxy.args(["--conntrack-max-per-core=0", "--oom-score-adj=0"]);
        cluster.place.start("kube-proxy", proxy);
        cluster.wait_answer("10.96.0.10", false, "one");
        cluster.wait_answer(&format!("{}:30080", Place::ADDRESS), false, "one");
        if mode == "iptables" {
            // Without them it would not be known that all kinds are taken away.
            let kinds = ["SERVICES", "EXTERNAL-SERVICES", "NODEPORTS", "POSTROUTING", "MARK-MASQ", "FORWARD"];
            let more = ["PROXY-FIREWALL", "PROXY-CANARY", "SVC-", "SVL-", "SEP-", "EXT-", "FW-"];
            wait_for("kube-proxy has made chains of all kinds", PATIENCE, || {
                let rules = rules(&cluster.place);
                let has = |k: &&str| rules.contains(&format!(":KUBE-{k}"));
                kinds.iter().chain(&more).all(has).then_some(())
            });
        }
        cluster.place.kill("kube-proxy");
        let left = rules(&cluster.place);
        assert_ne!(left, before);

        // Beside them, and gone again without a trace.
        cluster.start_proxy();
        cluster.wait_answer("10.96.0.10", true, "one");
        cluster.place.kill("proxy");
        assert_eq!(cluster.place.ask_proxy(&["cleanup"]), "");
        same(&rules(&cluster.place), &left, mode, kind);

        // A kube-proxy in a container has tools that the node may lack.
        let mut blind = cluster.place.inside("env");
        blind.arg("PATH=/nowhere").arg(program("orlop")).args([
            "proxy",
            "cleanup",
            "--kube-proxy",
            "--bpf-dir",
        ]);
        let said = run(blind.arg(cluster.place.pins()));
        for what in ["nftables tables: nft is", "chains of iptables (nft): iptables-nft-save is"] {
            assert!(said.contains(&format!("not looked for: {what} not installed")), "{said}");
        }
        assert!(said.contains("chains of ip6tables (legacy): ip6tables-legacy-save is not"), "{said}");
        same(&rules(&cluster.place), &left, mode, kind);

        let said = cluster.place.ask_proxy(&["cleanup", "--kube-proxy"]);
        assert_eq!(
            said.lines().collect::<Vec<_>>(),
            removed.map(|r| format!("removed {r}")),
            "{mode} {kind}"
        );
        same(&rules(&cluster.place), &before, mode, kind);
        assert_eq!(cluster.place.get("10.96.0.10", false), None, "{mode} {kind}");
        assert_eq!(cluster.place.ask_proxy(&["cleanup", "--kube-proxy"]), "");
        // Upstream would have taken away nothing more.
        run(kube_proxy(&cluster.place, &tools).arg("--cleanup"));
        same(&rules(&cluster.place), &before, mode, kind);

        cluster.start_proxy();
        cluster.wait_answer("10.96.0.10", true, "one");
        cluster.wait_answer(&format!("{}:30080", Place::ADDRESS), true, "one");
        cluster.place.kill("proxy");
        cluster.place.ask_proxy(&["cleanup"]);
    }
}

fn same(now: &str, expected: &str, mode: &str, kind: &str) {
    let [now_lines, expected_lines] = [now, expected].map(|t| t.lines().collect::<BTreeSet<_>>());
    let more: Vec<_> = now_lines.difference(&expected_lines).collect();
    let less: Vec<_> = expected_lines.difference(&now_lines).collect();
    assert!(now == expected, "{mode} by {kind}: more: {more:#?}\nless: {less:#?}\nnow:\n{now}");
}
