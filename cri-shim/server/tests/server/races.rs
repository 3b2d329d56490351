//! A container of the pod that exchanges links in what it shares with others, thousands of times a second, while they are created.
//! What the OCI runtime does meanwhile is raced in the monitor's tests; here it is the pod's volumes and its logs.
#![cfg(target_arch = "x86_64")]

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use crate::node::{Node, container_config, sandbox_config, wait_for};
use orlop_base::testkit::{ELF_CODE, elf_program};
use orlop_proto::cri;

const MASKED: [&str; 2] = ["/proc/kcore", "/proc/keys"];

/// A program that exchanges the two names of each pair for ever, by renameat2(2), without a C library.
fn racer(pairs: &[(&str, &str)]) -> Vec<u8> {
    const EACH: usize = 34;
    let mut names = Vec::new();
    let first = ELF_CODE + (pairs.len() * EACH + 5) as u32;
    let mut at = |name: &str| {
        let at = first + names.len() as u32;
        names.extend(name.bytes().chain([0]));
        at.to_le_bytes()
    };
    let mut code = Vec::new();
    for (a, b) in pairs {
        code.extend([0xb8, 0x3c, 1, 0, 0, 0xbf, 0x9c, 0xff, 0xff, 0xff]); // renameat2(AT_FDCWD,
        code.push(0xbe); // a,
        code.extend(at(a));
        code.extend([0xba, 0x9c, 0xff, 0xff, 0xff]); // AT_FDCWD,
        code.extend([0x41, 0xba]); // b,
        code.extend(at(b));
        code.extend([0x41, 0xb8, 2, 0, 0, 0, 0x0f, 0x05]); // RENAME_EXCHANGE)
    }
    code.push(0xe9); // again
    code.extend((-(code.len() as i32 + 4)).to_le_bytes());
    code.extend(names);
    elf_program(&code)
}

/// Its /proc is the kernel's and closed, and nothing of the host but its volumes is mounted.
fn check_closed(pid: u64, outside: &Path) {
    let root = format!("/proc/{pid}/root");
    for path in MASKED.into_iter().filter(|p| Path::new(p).exists()) {
        let m = fs::metadata(format!("{root}{path}")).unwrap();
        assert!(
            m.file_type().is_char_device() && m.rdev() == rustix::fs::makedev(1, 3),
            "{path} can be seen"
        );
    }
    let table = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    let mut readonly = false;
    for line in table.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        assert!(!fields[3].starts_with(outside.to_str().unwrap()), "the host's folder is mounted: {line}");
        readonly |= fields[4] == "/proc/sys" && fields[5].split(',').any(|o| o == "ro");
        let proc = line.contains(" - proc proc ") || MASKED.contains(&fields[4]);
        assert!(!fields[4].starts_with("/proc") || proc, "on the container's /proc: {line}");
    }
    assert!(readonly, "/proc/sys can be written:\n{table}");
}

/// CVE-2021-30465, CVE-2024-21626, CVE-2025-31133, CVE-2025-52881 and their kind, by a neighbour in the pod.
#[tokio::test]
async fn a_neighbour_who_exchanges_links_gains_nothing() {
    let node = Node::start("racing", &[]).await;
    let config = sandbox_config(&node, "racing", true);
    let pod = node.run_pod(&config).await.unwrap();
    let (shared, given, outside) =
        (node.dir.join("shared"), node.dir.join("given"), node.dir.join("outside"));
    let logs = node.dir.join("logs");
    for folder in
        [&given, &outside, &shared.join("x"), &shared.join("y"), &shared.join("cwd"), &logs.join("sub")]
    {
        fs::create_dir_all(folder).unwrap();
    }
    fs::write(outside.join("0.log"), "the host's").unwrap();
    let links = [
        (shared.join("x2"), "/proc"),
        (shared.join("y2"), outside.to_str().unwrap()),
        (shared.join("cwd2"), "/proc/self/fd/5"),
        (logs.join("sub2"), outside.to_str().unwrap()),
    ];
    for (link, to) in &links {
        symlink(to, link).unwrap();
    }
    let program = racer(&[("v/x", "v/x2"), ("v/y", "v/y2"), ("v/cwd", "v/cwd2"), ("logs/sub", "logs/sub2")]);
    fs::write(shared.join("racer"), program).unwrap();
    fs::set_permissions(shared.join("racer"), fs::Permissions::from_mode(0o755)).unwrap();
    let volume = |from: &Path, at: &str| cri::Mount {
        host_path: from.display().to_string(),
        container_path: at.into(),
        ..Default::default()
    };
    let mut attacker = container_config("attacker", &["/v/racer"]);
    attacker.mounts = vec![volume(&shared, "/v"), volume(&logs, "/logs")];
    let attacker = node.run_container(&pod, attacker, &config).await;
    for (link, _) in &links {
        for is_link in [false, true] {
            wait_for("the race", || fs::symlink_metadata(link).is_ok_and(|m| m.is_symlink() == is_link))
                .await;
        }
    }
    let mut made = 0;
    for round in 0..24 {
        let mut c = container_config(&format!("c{round}"), &["sleep", "1000"]);
        let security = c.linux.get_or_insert_default().security_context.get_or_insert_default();
        security.masked_paths = MASKED.map(str::to_owned).to_vec();
        security.readonly_paths = vec!["/proc/sys".into()];
        c.mounts = vec![volume(&shared, "/v")];
        match round % 4 {
            0 => c.mounts.push(volume(&given, "/v/x")),
            1 => c.mounts.push(volume(&given, "/v/y/new")),
            2 => c.working_dir = "/v/cwd".into(),
            _ => c.log_path = "sub/0.log".into(),
        }
        match node.create(&pod, c, &config).await {
            Ok(id) => {
                made += 1;
                check_closed(node.pid_of(&id).await, &outside);
                node.start_container(&id).await.unwrap();
                let reopen = cri::ReopenContainerLogRequest { container_id: id.clone() };
                // Refused, or the file of the logs.
                let _ = node.client().await.reopen_container_log(reopen).await;
                let remove = cri::RemoveContainerRequest { container_id: id };
                node.client().await.remove_container(remove).await.unwrap();
            }
            Err(e) => println!("refused: {}", e.message()),
        }
        let left: Vec<_> = fs::read_dir(&outside).unwrap().flatten().map(|e| e.file_name()).collect();
        assert_eq!(left, ["0.log"]);
        assert_eq!(fs::read_to_string(outside.join("0.log")).unwrap(), "the host's");
    }
    assert!(made > 0, "all were refused");
    assert_eq!(node.status(&attacker).await.state, cri::ContainerState::ContainerRunning as i32);
    node.purge_and_check();
}
