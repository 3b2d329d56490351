//! The images that critest pulls, made from Debian's busybox and one small C program, in a registry on loopback.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use orlop_base::testkit::DockerRegistry;

/// The hosts that the suite pulls from; all are answered by the one registry.
const HOSTS: [&str; 3] = ["registry.k8s.io", "k8s.gcr.io", "gcr.io"];
const STAGING: &str = "k8s-staging-cri-tools";
const E2E: &str = "e2e-test-images";

/// Runs a program that must succeed.
pub fn run(command: &mut Command) -> String {
    let out = command.output().unwrap_or_else(|e| panic!("cannot run {command:?}: {e}"));
    assert!(out.status.success(), "{command:?} failed: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// The registry that stands for all of [`HOSTS`].
pub struct Registry(DockerRegistry);

impl Registry {
    pub fn start(dir: &Path) -> Registry {
        Registry(DockerRegistry::start(dir))
    }

    /// containerd's registry configuration that sends all of [`HOSTS`] here.
    pub fn write_certs(&self, dir: &Path) {
        for host in HOSTS {
            let at = dir.join(host);
            fs::create_dir_all(&at).unwrap();
            let text = format!(
                "server = \"https://{host}\"\n[host.\"http://{}\"]\n  capabilities = [\"pull\", \"resolve\"]\n",
                self.0.address
            );
            fs::write(at.join("hosts.toml"), text).unwrap();
        }
    }

    /// Pushes an archive; returns the digest of its manifest.
    fn push(&self, archive: &Path, name: &str) -> String {
        let digest = archive.with_extension("digest");
        run(Command::new("skopeo")
            .args(["copy", "--quiet", "--insecure-policy", "--preserve-digests", "--dest-tls-verify=false"])
            .arg("--digestfile")
            .arg(&digest)
            .arg(format!("oci-archive:{}", archive.display()))
            .arg(format!("docker://{}/{name}", self.0.address)));
        fs::read_to_string(digest).unwrap().trim().to_owned()
    }
}

/// Debian's busybox without its `ls`: a spec hides the file /bin/ls from the shell, and this shell would run its own anyway.
fn shell(busybox: &[u8]) -> Vec<u8> {
    const TABLE: &[u8] = b"\0losetup\0ls\0lsmod\0";
    let at: Vec<usize> =
        (0..busybox.len() - TABLE.len()).filter(|i| busybox[*i..].starts_with(TABLE)).collect();
    let [at] = at[..] else { panic!("this busybox lists its applets otherwise: {at:?}") };
    let mut out = busybox.to_vec();
    // Still in alphabetical order.
    out[at + b"\0losetup\0l".len()] = b'r';
    out
}

struct Builder<'a> {
    dir: &'a Path,
    registry: &'a Registry,
    programs: PathBuf,
}

/// What distinguishes one image from the next.
#[derive(Clone, Copy, Default)]
struct Image<'a> {
    user: &'a str,
    cmd: &'a [&'a str],
    /// Programs of programs.c, by path.
    programs: &'a [&'a str],
    busybox: bool,
    group: bool,
}

impl Builder<'_> {
    fn rootfs(&self, image: &Image<'_>, name: &str) -> PathBuf {
        let root = self.dir.join("rootfs");
        let _ = fs::remove_dir_all(&root);
        for d in ["bin", "usr/sbin", "etc", "tmp", "root", "run", "var", "mnt", "home"] {
            fs::create_dir_all(root.join(d)).unwrap();
        }
        fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
        std::os::unix::fs::symlink("/run", root.join("var/run")).unwrap();
        // Images with the same settings must still differ.
        fs::write(root.join("etc/image"), name.split(':').next().unwrap()).unwrap();
        let mut passwd = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/home:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n"
            .to_owned();
        let mut group = "root:x:0:\nwww-data:x:33:\nusers:x:100:\nnogroup:x:65534:\n".to_owned();
        if image.group {
            passwd.push_str("default-user:x:1000:1000::/home:/bin/sh\n");
            group.push_str("default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n");
        }
        fs::write(root.join("etc/passwd"), passwd).unwrap();
        fs::write(root.join("etc/group"), group).unwrap();
        let first = root.join("bin/busybox");
        if image.busybox {
            let busybox = Path::new("/bin/busybox");
            fs::write(&first, shell(&fs::read(busybox).expect("apt-get install busybox-static"))).unwrap();
            fs::set_permissions(&first, fs::Permissions::from_mode(0o755)).unwrap();
            // Links of their own, so that hiding one hides no other.
            let list = run(Command::new(busybox).arg("--list"));
            for applet in list.lines().filter(|a| !["busybox", "ls"].contains(a)) {
                fs::hard_link(&first, root.join("bin").join(applet)).unwrap();
            }
        }
        for program in image.programs {
            let at = root.join(program);
            // The name may be an applet's.
            let _ = fs::remove_file(&at);
            fs::copy(&self.programs, &at).unwrap();
            let mode = if program.ends_with("nonewprivs") { 0o4755 } else { 0o755 };
            fs::set_permissions(&at, fs::Permissions::from_mode(mode)).unwrap();
        }
        root
    }

    /// Builds and pushes; `name` and all of `more` are its tags. Returns the manifest's digest.
    fn image(&self, name: &str, more: &[&str], image: &Image<'_>) -> String {
        let some = |s: &str| (!s.is_empty()).then(|| s.to_owned());
        let mut config = oci_spec::image::Config::default();
        config.set_user(some(image.user));
        config.set_env(Some(vec!["PATH=/usr/sbin:/bin".to_owned()]));
        config.set_cmd(Some(image.cmd.iter().map(|s| (*s).to_owned()).collect()));
        let spec = orlop_images::Build {
            rootfs: self.rootfs(image, name),
            name: format!("localhost/{name}"),
            config,
            created: 0,
            root_owned: true,
        };
        let archive = self.dir.join("image.tar");
        orlop_images::build(&spec, &archive).unwrap();
        for tag in more {
            self.registry.push(&archive, tag);
        }
        self.registry.push(&archive, name)
    }
}

/// Makes all images; returns the digest of the one that critest names by digest.
pub fn make(dir: &Path, registry: &Registry) -> String {
    let programs = dir.join("programs");
    run(Command::new("cc")
        .args(["-O2", "-static", "-Wall", "-Werror", "-o"])
        .arg(&programs)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/critest/programs.c")));
    let b = Builder { dir, registry, programs };
    let tools = ["bin/ls", "bin/pgrep", "bin/ipcs", "bin/brctl"];
    let shell = Image { busybox: true, programs: &tools, cmd: &["sh"], ..Default::default() };
    b.image(&format!("{E2E}/busybox:1.29-2"), &[], &shell);
    b.image(
        &format!("{STAGING}/test-image-predefined-group:latest"),
        &[],
        &Image { user: "1000", group: true, ..shell },
    );
    let web = Image { busybox: true, programs: &["bin/ls", "usr/sbin/nginx"], ..Default::default() };
    b.image(&format!("{E2E}/nginx:1.14-2"), &[], &Image { cmd: &["nginx", "master process"], ..web });
    let hostnet = format!("{STAGING}/hostnet-nginx-{}:latest", go_arch());
    b.image(&hostnet, &[], &Image { cmd: &["nginx", "master process", "12003"], ..web });
    b.image(
        &format!("{E2E}/httpd:2.4.39-4"),
        &[],
        &Image { programs: &["usr/sbin/httpd"], cmd: &["/usr/sbin/httpd"], ..web },
    );
    let small = |programs, cmd| Image { programs, cmd, ..Default::default() };
    b.image(&format!("{E2E}/nonewprivs:1.3"), &[], &small(&["bin/nonewprivs"], &["/bin/nonewprivs"]));
    b.image("pause:3.9", &[], &small(&["bin/pause"], &["/bin/pause"]));
    for (name, user) in [
        ("user-uid", "1002"),
        ("user-username", "www-data"),
        ("user-uid-group", "1003:users"),
        ("user-username-group", "www-data:100"),
        ("latest", ""),
        ("1", ""),
        ("2", ""),
        ("3", ""),
    ] {
        b.image(&format!("{STAGING}/test-image-{name}:latest"), &[], &Image { user, ..shell });
    }
    let tags = ["2", "3"].map(|t| format!("{STAGING}/test-image-tags:{t}"));
    b.image(&format!("{STAGING}/test-image-tags:1"), &tags.each_ref().map(String::as_str), &shell);
    b.image(&format!("{STAGING}/test-image-tag:test"), &[], &shell);
    b.image(&format!("{STAGING}/test-image-tag:all"), &[], &Image { user: "0", ..shell });
    b.image(&format!("{STAGING}/test-image-digest:latest"), &[], &shell)
}

/// The machine's architecture as Go names it.
fn go_arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
