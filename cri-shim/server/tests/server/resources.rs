//! Limits while a container runs, read back from its cgroup, and the capabilities of its processes, read back from the kernel.

use std::fs;
use std::path::PathBuf;

use crate::node::{Node, container_config, sandbox_config, shell};
use orlop_proto::cri::{self, LinuxContainerResources as Resources};

/// The limits of a container, by the name of the file on cgroup v1.
struct Group {
    path: String,
}

impl Group {
    async fn of(node: &Node, id: &str) -> Group {
        let text = fs::read_to_string(format!("/proc/{}/cgroup", node.pid_of(id).await)).unwrap();
        let line = text.lines().find(|l| l.ends_with(id) || l.contains(&node.cgroup)).unwrap();
        Group { path: line.splitn(3, ':').nth(2).unwrap().to_owned() }
    }

    fn file(&self, file: &str) -> PathBuf {
        let controller = file.split('.').next().unwrap();
        PathBuf::from(format!("/sys/fs/cgroup/{controller}{}/{file}", self.path))
    }

    fn read(&self, file: &str) -> String {
        let path = self.file(file);
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).trim().to_owned()
    }

    /// Shares, period, quota, CPUs, memory.
    fn all(&self) -> [String; 5] {
        ["cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us", "cpuset.cpus", "memory.limit_in_bytes"]
            .map(|f| self.read(f))
    }
}

async fn update(node: &Node, id: &str, linux: Resources) -> Result<(), tonic::Status> {
    let request = cri::UpdateContainerResourcesRequest {
        container_id: id.to_owned(),
        linux: Some(linux),
        ..Default::default()
    };
    node.client().await.update_container_resources(request).await.map(drop)
}

fn v1() -> bool {
    !fs::exists("/sys/fs/cgroup/cgroup.controllers").unwrap()
}

/// Every field, all in one call and one by one; what is not named stays. (cgroup v2: `limits_change_while_a_container_runs` of the
/// virtual machine.)
#[tokio::test]
async fn every_limit_changes_while_a_container_runs() {
    if !v1() {
        return;
    }
    let node = Node::start("limits", &[]).await;
    let config = sandbox_config(&node, "limits", true);
    let pod = node.run_pod(&config).await.unwrap();
    let mut c = container_config("main", &["sleep", "1000"]);
    c.linux.get_or_insert_default().resources = Some(Resources {
        cpu_shares: 512,
        cpu_period: 100_000,
        cpu_quota: 50_000,
        memory_limit_in_bytes: 32 << 20,
        ..Default::default()
    });
    let id = node.run_container(&pod, c, &config).await;
    let group = Group::of(&node, &id).await;
    let all_cpus = group.read("cpuset.cpus");
    let memory = |mib: u64| (mib << 20).to_string();
    let expect = |shares: &str, period: &str, quota: &str, cpus: &str, mib: u64| {
        [shares.to_owned(), period.to_owned(), quota.to_owned(), cpus.to_owned(), memory(mib)]
    };
    assert_eq!(group.all(), expect("512", "100000", "50000", &all_cpus, 32));
    let first = all_cpus.split([',', '-']).next().unwrap().to_owned();
    let everything = Resources {
        cpu_shares: 256,
        cpu_period: 50_000,
        cpu_quota: 20_000,
        cpuset_cpus: first.clone(),
        cpuset_mems: "0".into(),
        memory_limit_in_bytes: 48 << 20,
        // Not of a running process; held for the next one.
        oom_score_adj: 500,
        ..Default::default()
    };
    update(&node, &id, everything.clone()).await.unwrap();
    assert_eq!(group.all(), expect("256", "50000", "20000", &first, 48));
    assert_eq!(group.read("cpuset.mems"), "0");
    let held = node.status(&id).await.resources.unwrap().linux.unwrap();
    assert_eq!(
        (held.cpu_shares, held.cpu_period, held.cpu_quota, held.memory_limit_in_bytes, held.oom_score_adj),
        (256, 50_000, 20_000, 48 << 20, 500)
    );
    let none = Resources::default;
    let steps = [
        (Resources { cpu_shares: 1024, ..none() }, expect("1024", "50000", "20000", &first, 48)),
        (Resources { cpu_quota: 40_000, ..none() }, expect("1024", "50000", "40000", &first, 48)),
        (Resources { cpu_period: 200_000, ..none() }, expect("1024", "200000", "40000", &first, 48)),
        (
            Resources { cpuset_cpus: all_cpus.clone(), ..none() },
            expect("1024", "200000", "40000", &all_cpus, 48),
        ),
        (
            Resources { memory_limit_in_bytes: 24 << 20, ..none() },
            expect("1024", "200000", "40000", &all_cpus, 24),
        ),
        (
            Resources { memory_limit_in_bytes: 64 << 20, ..none() },
            expect("1024", "200000", "40000", &all_cpus, 64),
        ),
        (Resources { cpu_quota: -1, ..none() }, expect("1024", "200000", "-1", &all_cpus, 64)),
        (none(), expect("1024", "200000", "-1", &all_cpus, 64)),
    ];
    for (change, expected) in steps {
        update(&node, &id, change.clone()).await.unwrap();
        assert_eq!(group.all(), expected, "{change:?}");
        let swap = "memory.memsw.limit_in_bytes";
        if group.file(swap).exists() {
            assert_eq!(group.read(swap), expected[4], "no swap beyond the memory: {change:?}");
        }
    }
    // What the kernel refuses changes nothing that is held.
    update(&node, &id, Resources { cpuset_cpus: "4000".into(), ..none() }).await.unwrap_err();
    let held = node.status(&id).await.resources.unwrap().linux.unwrap();
    assert_eq!(held.cpuset_cpus, all_cpus);
    node.purge_and_check();
}

/// A pod that is limited itself allows no share beyond its own, also not between the writes of a period and a quota.
#[tokio::test]
async fn period_and_quota_change_within_the_pods() {
    if !v1() {
        return;
    }
    let node = Node::start("period", &[]).await;
    let config = sandbox_config(&node, "period", true);
    let above = PathBuf::from(format!("/sys/fs/cgroup/cpu{}", node.cgroup));
    fs::create_dir_all(&above).unwrap();
    fs::write(above.join("cpu.cfs_quota_us"), "50000").unwrap();
    let pod = node.run_pod(&config).await.unwrap();
    let mut c = container_config("main", &["sleep", "1000"]);
    let limits = |cpu_period, cpu_quota| Resources { cpu_period, cpu_quota, ..Default::default() };
    c.linux.get_or_insert_default().resources = Some(limits(100_000, 50_000));
    let id = node.run_container(&pod, c, &config).await;
    let group = Group::of(&node, &id).await;
    // The whole of the pod's half and less of it, from longer to shorter periods and back.
    for (period, quota) in
        [(50_000, 20_000), (200_000, 100_000), (100_000, 50_000), (10_000, 5_000), (1_000_000, 500_000)]
    {
        update(&node, &id, limits(period, quota)).await.unwrap_or_else(|e| panic!("{period} {quota}: {e}"));
        let now = (group.read("cpu.cfs_period_us"), group.read("cpu.cfs_quota_us"));
        assert_eq!(now, (period.to_string(), quota.to_string()));
    }
    update(&node, &id, limits(100_000, 60_000)).await.unwrap_err();
    let now: i64 = group.read("cpu.cfs_quota_us").parse().unwrap();
    let period: i64 = group.read("cpu.cfs_period_us").parse().unwrap();
    assert!(now * 2 <= period, "{now} of {period}");
    node.purge_and_check();
}

/// Upstream's default set (Docker's, containerd's): chown, dac_override, fsetid, fowner, mknod, net_raw, setgid, setuid, setfcap,
/// setpcap, net_bind_service, sys_chroot, kill, audit_write.
const DEFAULT: u64 = 0xa804_25fb;
const CHOWN: u64 = 1;
const KILL: u64 = 1 << 5;
const NET_BIND_SERVICE: u64 = 1 << 10;
const NET_ADMIN: u64 = 1 << 12;

/// The five sets of a process, in the kernel's order: inheritable, permitted, effective, bounding, ambient.
fn sets(status: &str) -> [u64; 5] {
    ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(|name| {
        let line = status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(":\t"));
        u64::from_str_radix(line.unwrap().trim(), 16).unwrap()
    })
}

/// What a container asks for, and its five sets.
struct Row {
    uid: i64,
    add: &'static [&'static str],
    drop: &'static [&'static str],
    ambient: &'static [&'static str],
    privileged: bool,
    want: [u64; 5],
}

/// As upstream's runtimes give them, in the first process and in an exec, whether or not more can be had by execve.
#[tokio::test]
async fn capabilities_are_upstreams() {
    let node = Node::start("caps", &[]).await;
    let config = sandbox_config(&node, "caps", true);
    let mut privileged = sandbox_config(&node, "capspriv", true);
    let security = privileged.linux.get_or_insert_default().security_context.get_or_insert_default();
    security.privileged = true;
    let pods = [node.run_pod(&config).await.unwrap(), node.run_pod(&privileged).await.unwrap()];
    // All that there is on this machine.
    let all = sets(&fs::read_to_string("/proc/self/status").unwrap())[3];
    let root = |set: u64| [0, set, set, set, 0];
    // Without ambient ones another user has none, only what its programs may bring.
    let user = |set: u64| [0, 0, 0, set, 0];
    let plain = Row { uid: 0, add: &[], drop: &[], ambient: &[], privileged: false, want: root(DEFAULT) };
    let rows = [
        Row { ..plain },
        Row { add: &["NET_ADMIN"], want: root(DEFAULT | NET_ADMIN), ..plain },
        Row {
            add: &["CAP_NET_ADMIN"],
            drop: &["cap_chown"],
            want: root((DEFAULT | NET_ADMIN) & !CHOWN),
            ..plain
        },
        Row { drop: &["ALL"], want: root(0), ..plain },
        Row { add: &["KILL"], drop: &["ALL"], want: root(KILL), ..plain },
        Row { add: &["ALL"], want: root(all), ..plain },
        Row { add: &["ALL"], drop: &["CHOWN"], want: root(all & !CHOWN), ..plain },
        // Of both the second wins.
        Row { add: &["ALL"], drop: &["ALL"], want: root(0), ..plain },
        Row { add: &["KILL"], drop: &["KILL"], want: root(DEFAULT & !KILL), ..plain },
        Row { privileged: true, want: root(all), ..plain },
        // A privileged container has all whatever else is said.
        Row { privileged: true, drop: &["ALL"], want: root(all), ..plain },
        Row { uid: 33, want: user(DEFAULT), ..plain },
        Row { uid: 33, add: &["NET_ADMIN"], want: user(DEFAULT | NET_ADMIN), ..plain },
        Row { uid: 33, drop: &["ALL"], want: user(0), ..plain },
        Row { uid: 33, add: &["ALL"], want: user(all), ..plain },
        Row { uid: 33, privileged: true, want: user(all), ..plain },
        Row { uid: 33, drop: &["ALL"], ambient: &["NET_BIND_SERVICE"], want: [NET_BIND_SERVICE; 5], ..plain },
        Row {
            uid: 33,
            ambient: &["NET_ADMIN"],
            want: [NET_ADMIN, NET_ADMIN, NET_ADMIN, DEFAULT | NET_ADMIN, NET_ADMIN],
            ..plain
        },
    ];
    for (i, row) in rows.into_iter().enumerate() {
        let strings = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        for no_new_privs in [false, true] {
            let mut c = container_config(&format!("c{i}-{no_new_privs}"), &["sleep", "1000"]);
            let security = c.linux.get_or_insert_default().security_context.get_or_insert_default();
            security.capabilities = Some(cri::Capability {
                add_capabilities: strings(row.add),
                drop_capabilities: strings(row.drop),
                add_ambient_capabilities: strings(row.ambient),
            });
            security.privileged = row.privileged;
            security.no_new_privs = no_new_privs;
            security.run_as_user = Some(cri::Int64Value { value: row.uid });
            let (pod, config) = if row.privileged { (&pods[1], &privileged) } else { (&pods[0], &config) };
            let id = node.run_container(pod, c, config).await;
            let first = fs::read_to_string(format!("/proc/{}/status", node.pid_of(&id).await)).unwrap();
            let exec = shell(&node, &id, "cat /proc/self/status").await;
            for (what, status) in [("first process", &first), ("exec", &exec)] {
                let got = sets(status);
                assert_eq!(
                    got.map(|s| format!("{s:x}")),
                    row.want.map(|s| format!("{s:x}")),
                    "{what} of row {i}, no_new_privs {no_new_privs}"
                );
            }
        }
    }
    node.purge_and_check();
}
