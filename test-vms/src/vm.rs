//! A machine with Debian's cloud kernel under QEMU, in software: a root file system put together from programs of this
//! machine, a few steps (shell scripts) that run there, and what each of them said. No network device, no disk.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What the guest loads before the first step: overlayfs, pods' links, the overlay network, packet programs on kernels
/// before 6.6, VLANs, and what criu looks at (elsewhere the kernel has it loaded).
const MODULES: [&str; 15] = [
    "overlay",
    "veth",
    "dummy",
    "vxlan",
    "sch_ingress",
    "cls_bpf",
    "8021q",
    "nf_tables",
    "nf_conntrack_netlink",
    "tun",
    "unix_diag",
    "tcp_diag",
    "udp_diag",
    "af_packet_diag",
    "netlink_diag",
];
const PACKAGES: &str = "run `scripts/deps.sh test`";
const BUSYBOX: &str = "/bin/busybox";
const MEMORY_MIB: u32 = 1280;
/// How long a machine may take for all its steps.
const LIMIT: Duration = Duration::from_secs(480);
/// How often a machine's messages are looked at for a kernel that hangs.
const LOOK: Duration = Duration::from_secs(2);
/// What Debian's packages bring for the bus and for users, without what needs more units than the guest has.
const SYSTEMD_FILES: [(&str, &str); 6] = [
    ("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\nmessagebus:x:100:100::/:/bin/false\n"),
    ("/etc/group", "root:x:0:\nmessagebus:x:100:\n"),
    ("/etc/systemd/system/dbus.socket", include_str!("../guest/systemd/dbus.socket")),
    ("/etc/systemd/system/dbus.service", include_str!("../guest/systemd/dbus.service")),
    ("/etc/systemd/system/steps.service", include_str!("../guest/systemd/steps.service")),
    ("/etc/systemd/system/default.target", include_str!("../guest/systemd/default.target")),
];

/// Where a program is on PATH; says how to get it when it is not.
pub fn on_path(name: &str) -> Result<PathBuf, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|d| d.join(name)).find(|p| p.is_file());
    found.ok_or_else(|| format!("{name} is not on PATH; {PACKAGES} and put its tools folder on PATH"))
}

/// Debian's cloud kernel: the image and its modules' folder.
fn kernel() -> Result<(PathBuf, PathBuf), String> {
    let missing = || {
        format!("no /boot/vmlinuz-*-cloud-amd64 with modules (package linux-image-cloud-amd64); {PACKAGES}")
    };
    let images = fs::read_dir("/boot").map_err(|_| missing())?.flatten();
    let mut names: Vec<String> = images.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let modules = |version: &str| Path::new("/lib/modules").join(version);
    names
        .iter()
        .rev()
        .filter_map(|n| n.strip_prefix("vmlinuz-").filter(|v| v.contains("cloud")))
        .find(|v| modules(v).join("modules.dep").is_file())
        .map(|v| (Path::new("/boot").join(format!("vmlinuz-{v}")), modules(v)))
        .ok_or_else(missing)
}

/// A file of `modules.dep` and what it needs, in the order of loading.
fn load_order(dependencies: &str, module: &str) -> Option<Vec<String>> {
    let (file, needs) = dependencies.lines().filter_map(|l| l.split_once(':')).find(|(file, _)| {
        let name = file.rsplit('/').next().unwrap_or_default();
        name.split_once(".ko").is_some_and(|(name, _)| name == module)
    })?;
    // What a module needs is listed from the nearest to the farthest.
    let mut order: Vec<String> = needs.split_whitespace().rev().map(str::to_owned).collect();
    order.push(file.to_owned());
    Some(order)
}

fn run(command: &mut Command) -> Result<Vec<u8>, String> {
    let out = command.output().map_err(|e| format!("{command:?}: {e}; {PACKAGES}"))?;
    if out.status.success() {
        return Ok(out.stdout);
    }
    Err(format!("{command:?}: {}", String::from_utf8_lossy(&out.stderr).trim()))
}

fn io<T>(what: &Path, result: std::io::Result<T>) -> Result<T, String> {
    result.map_err(|e| format!("{}: {e}", what.display()))
}

/// An image of busybox alone, `localhost/busybox:test`, built in `dir` by `orlop image build`.
fn busybox_image(dir: &Path) -> Result<PathBuf, String> {
    let rootfs = dir.join("rootfs");
    for folder in ["bin", "tmp", "etc"] {
        let path = rootfs.join(folder);
        io(&path, fs::create_dir_all(&path))?;
    }
    io(Path::new(BUSYBOX), fs::copy(BUSYBOX, rootfs.join("bin/busybox")))?;
    for applet in ["sh", "cat", "dd", "fallocate", "hostname", "mknod", "rm", "sleep"] {
        let link = rootfs.join("bin").join(applet);
        io(&link, symlink("busybox", &link))?;
    }
    let archive = dir.join("busybox.tar");
    let mut build = Command::new(crate::program("orlop"));
    build.args(["image", "build"]).arg(&rootfs).arg("--output").arg(&archive);
    run(build.args(["--tag", "localhost/busybox:test", "--env", "PATH=/bin", "--cmd", "sh"]))?;
    Ok(archive)
}

/// The guest's root file system, put together in a temporary folder.
pub struct Guest {
    dir: tempfile::TempDir,
    kernel: PathBuf,
    steps: Vec<String>,
    /// More words for the kernel.
    words: String,
}

impl Guest {
    /// Busybox, an init that runs the steps, the kernel's modules, our programs, crictl, these tools of this machine, and
    /// `/vm/busybox.tar`.
    pub fn new(tools: &[&str]) -> Result<Guest, String> {
        let (kernel, modules) = kernel()?;
        let dir = tempfile::Builder::new().prefix("orlop-vm").tempdir().map_err(|e| e.to_string())?;
        let guest = Guest { dir, kernel, steps: Vec::new(), words: String::new() };
        for folder in
            ["bin", "proc", "sys", "dev", "tmp", "run", "etc", "root", "var/log", "vm/steps", "vm/modules"]
        {
            let path = guest.at(folder);
            io(&path, fs::create_dir_all(&path))?;
        }
        if !Path::new(BUSYBOX).is_file() {
            return Err(format!("{BUSYBOX} is missing (package busybox-static); {PACKAGES}"));
        }
        guest.file("/bin/busybox", Path::new(BUSYBOX))?;
        let applets = run(Command::new(BUSYBOX).arg("--list"))?;
        for name in String::from_utf8_lossy(&applets).lines().filter(|n| *n != "busybox") {
            let link = guest.at("bin").join(name);
            io(&link, symlink("busybox", &link))?;
        }
        guest.text("/init", include_str!("../guest/init.sh"))?;
        guest.text("/vm/run.sh", include_str!("../guest/run.sh"))?;
        guest.text("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")?;
        guest.text("/etc/group", "root:x:0:\n")?;
        guest.text("/etc/hosts", "127.0.0.1 localhost\n")?;
        guest.text("/etc/resolv.conf", "nameserver 127.0.0.1\n")?;
        guest.modules(&modules, &MODULES)?;
        guest.link("/vm/first", "/vm/run.sh")?;
        for name in ["orlop", "orlop-monitor", "orlop-cni"] {
            guest.program(&crate::program(name))?;
        }
        for name in tools.iter().chain(&["crictl"]) {
            guest.program(&on_path(name)?)?;
        }
        let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
        guest.file("/vm/busybox.tar", &busybox_image(dir.path())?)?;
        Ok(guest)
    }

    /// `/vm/demo-web.tar` and `/vm/demo.yaml`.
    pub fn demo(&self) -> Result<(), String> {
        let image = crate::root().join("target/demo/demo-web.tar");
        if !image.exists() {
            return Err(format!(
                "{} is missing; run scripts/demo-image.sh target/demo/demo-web.tar",
                image.display()
            ));
        }
        self.file("/vm/demo-web.tar", &image)?;
        self.file("/vm/demo.yaml", &crate::root().join("deploy/demo/demo.yaml"))
    }

    /// Starts `orlop cri` with `flags`, as the step `cri`.
    pub fn cri(&mut self, flags: &str) -> Result<(), String> {
        self.text("/vm/cri-flags", flags)?;
        self.step("cri", concat!(include_str!("../guest/node.sh"), include_str!("../guest/cri.sh")))
    }

    /// Makes systemd the first process, with its bus; the steps run as a service of it.
    pub fn with_systemd(&self) -> Result<(), String> {
        for path in ["/lib/systemd/systemd", "/usr/bin/dbus-daemon", "/bin/systemctl"] {
            self.remove(path)?;
            self.program_at(path, Path::new(path))?;
        }
        for path in
            ["/usr/share/dbus-1/system.conf", "/usr/share/dbus-1/system.d/org.freedesktop.systemd1.conf"]
        {
            self.file(path, Path::new(path))?;
        }
        for unit in ["sysinit", "basic", "shutdown", "umount", "slices", "final", "poweroff"] {
            let path = format!("/lib/systemd/system/{unit}.target");
            self.file(&path, Path::new(&path))?;
        }
        self.link("/var/run", "/run")?;
        for (name, text) in SYSTEMD_FILES {
            self.text(name, text)?;
        }
        io(Path::new("/vm/first"), fs::remove_file(self.at("/vm/first")))?;
        self.link("/vm/first", "/lib/systemd/systemd")
    }

    fn link(&self, path: &str, target: &str) -> Result<(), String> {
        let at = self.at(path);
        io(&at, symlink(target, &at))
    }

    /// Busybox's program of that name, where it has one.
    fn remove(&self, path: &str) -> Result<(), String> {
        let at = self.at(path);
        match fs::remove_file(&at) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => io(&at, Err(e)),
            _ => Ok(()),
        }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root().join(path.trim_start_matches('/'))
    }

    /// Loads these modules of the kernel's too.
    pub fn load(&self, names: &[&str]) -> Result<(), String> {
        self.modules(&kernel()?.1, names)
    }

    fn modules(&self, from: &Path, wanted: &[&str]) -> Result<(), String> {
        let list = from.join("modules.dep");
        let dependencies = io(&list, fs::read_to_string(&list))?;
        let mut order: Vec<String> = Vec::new();
        for name in wanted {
            let files = load_order(&dependencies, name).ok_or_else(|| {
                format!("{}: no module {name}; install linux-image-cloud-amd64 again", list.display())
            })?;
            let new: Vec<String> = files.into_iter().filter(|f| !order.contains(f)).collect();
            order.extend(new);
        }
        let mut names = fs::read_to_string(self.at("vm/modules/order")).unwrap_or_default();
        for file in order {
            let source = from.join(&file);
            let name = file.rsplit('/').next().unwrap_or_default();
            let plain = name.split_once(".ko").map(|(n, _)| format!("{n}.ko")).unwrap_or_default();
            if names.lines().any(|n| n == plain) {
                continue;
            }
            let data = match source.extension().and_then(|e| e.to_str()) {
                Some("xz") => run(Command::new("xz").arg("-dc").arg(&source))?,
                Some("zst") => run(Command::new("zstd").arg("-dc").arg(&source))?,
                _ => io(&source, fs::read(&source))?,
            };
            let target = self.at("vm/modules").join(&plain);
            io(&target, fs::write(&target, data))?;
            names.push_str(&format!("{plain}\n"));
        }
        self.text("/vm/modules/order", &names)
    }

    /// A file of this machine at `path` in the guest, with its mode.
    pub fn file(&self, path: &str, source: &Path) -> Result<(), String> {
        let target = self.at(path);
        if let Some(dir) = target.parent() {
            io(dir, fs::create_dir_all(dir))?;
        }
        io(source, fs::copy(source, &target).map(drop))
    }

    /// An executable text file.
    pub fn text(&self, path: &str, text: &str) -> Result<(), String> {
        let target = self.at(path);
        if let Some(dir) = target.parent() {
            io(dir, fs::create_dir_all(dir))?;
        }
        io(&target, fs::write(&target, text))?;
        io(&target, fs::set_permissions(&target, fs::Permissions::from_mode(0o755)))
    }

    /// A program of this machine as `/usr/local/bin/<its name>`, stripped, with the shared libraries that it needs.
    pub fn program(&self, source: &Path) -> Result<(), String> {
        let name = source.file_name().ok_or_else(|| format!("{} is no program", source.display()))?;
        self.program_at(&format!("/usr/local/bin/{}", name.to_string_lossy()), source)
    }

    /// The same at `path`.
    pub fn program_at(&self, path: &str, source: &Path) -> Result<(), String> {
        self.file(path, source)?;
        // What is stripped already, or cannot be, stays as it is.
        let _ = Command::new("strip").arg(self.at(path)).stderr(Stdio::null()).status();
        // ldd fails for a static program, which needs nothing.
        let Ok(listed) = run(Command::new("ldd").arg(source)) else { return Ok(()) };
        let listed = String::from_utf8_lossy(&listed).into_owned();
        for library in listed.split_whitespace().filter(|w| w.starts_with('/')).collect::<BTreeSet<_>>() {
            if !self.at(library).exists() {
                self.file(library, Path::new(library))?;
            }
        }
        Ok(())
    }

    /// A script that runs in the guest after those added before it, also when one of them failed.
    pub fn step(&mut self, name: &str, script: &str) -> Result<(), String> {
        self.steps.push(name.to_owned());
        self.text(&format!("/vm/steps/{:02}-{name}", self.steps.len()), script)
    }

    /// Adds to the kernel's command line.
    pub fn kernel_word(&mut self, word: &str) {
        self.words.push(' ');
        self.words.push_str(word);
    }

    fn archive(&self) -> Result<PathBuf, String> {
        let archive = self.dir.path().join("initramfs");
        let script =
            "cd \"$1\" && find . -print0 | cpio --null --create --quiet --format=newc --owner=0:0 >\"$2\"";
        on_path("cpio")?;
        run(Command::new("sh").args(["-c", script, "sh"]).arg(self.root()).arg(&archive))?;
        Ok(archive)
    }

    fn boot(&self, archive: &Path, console: &Path, said: &Path) -> Result<Machine, String> {
        let qemu = on_path("qemu-system-x86_64")?;
        let _ = fs::remove_file(said);
        let log = io(console, fs::File::create(console))?;
        Ok(Machine(
            Command::new(qemu)
                .args(["-machine", "q35", "-cpu", "max", "-accel", "tcg,thread=multi", "-smp", "2"])
                .args(["-m", &MEMORY_MIB.to_string(), "-nodefaults", "-display", "none", "-no-reboot"])
                .arg("-kernel")
                .arg(&self.kernel)
                .arg("-initrd")
                .arg(archive)
                .args([
                    "-append",
                    &format!(
                        "console=ttyS0 panic=-1 mitigations=off nokaslr systemd.show_status=0{}",
                        self.words
                    ),
                ])
                .args(["-serial", "stdio", "-serial"])
                .arg(format!("file:{}", said.display()))
                .stdin(Stdio::null())
                .stdout(log.try_clone().map_err(|e| e.to_string())?)
                .stderr(log)
                .spawn()
                .map_err(|e| format!("QEMU does not start: {e}"))?,
        ))
    }

    /// Boots, runs all steps, and returns what they said. The machine is killed after [`LIMIT`]; one that is stuck before its first step is
    /// started anew within that time.
    pub fn run(&self) -> Result<Outcome, String> {
        let archive = self.archive()?;
        let (console, said) = (self.dir.path().join("console"), self.dir.path().join("said"));
        let text =
            |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).replace('\r', "");
        let start = Instant::now();
        let mut machine = self.boot(&archive, &console, &said)?;
        let mut looked = Instant::now();
        let status = loop {
            if let Some(status) = machine.0.try_wait().map_err(|e| e.to_string())? {
                break Some(status);
            }
            if start.elapsed() > LIMIT {
                break None;
            }
            if looked.elapsed() > LOOK {
                looked = Instant::now();
                if is_stuck(&text(&said), &text(&console)) {
                    eprintln!("the kernel hangs before the first step; the machine is started anew");
                    drop(machine);
                    machine = self.boot(&archive, &console, &said)?;
                }
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        let outcome = Outcome { steps: parse(&text(&said)), console: text(&console) };
        match status {
            Some(s) if s.success() => Ok(outcome),
            Some(s) => Err(format!("QEMU ended with {s}\n{outcome}")),
            None => Err(format!("the machine was killed after {LIMIT:?}\n{outcome}")),
        }
    }
}

/// Whether the kernel hangs before the first step, as it rarely does in emulation (Linux 6.1.192 in its keyrings, on a busy machine).
fn is_stuck(said: &str, console: &str) -> bool {
    said.is_empty() && console.contains("watchdog: BUG: soft lockup")
}

/// A running QEMU; dropping it kills it.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A step that ran.
#[derive(Debug, PartialEq, Eq)]
pub struct Step {
    pub name: String,
    /// `None`: it did not end.
    pub code: Option<i32>,
    pub output: String,
}

/// What the machine said.
#[derive(Debug)]
pub struct Outcome {
    pub steps: Vec<Step>,
    /// The kernel's messages.
    pub console: String,
}

/// Reads `@@ begin NAME`, output, `@@ end NAME CODE`.
fn parse(said: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for line in said.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match (words.as_slice(), steps.last_mut()) {
            (["@@", "begin", name], _) => {
                steps.push(Step { name: (*name).to_owned(), code: None, output: String::new() });
            }
            (["@@", "end", name, code], Some(step)) if step.name == *name => step.code = code.parse().ok(),
            (_, Some(step)) => step.output.push_str(&format!("{line}\n")),
            (_, None) => {}
        }
    }
    steps
}

impl Outcome {
    /// The output of a step that must have succeeded.
    pub fn succeeded(&self, name: &str) -> &str {
        let step = self.steps.iter().find(|s| s.name == name);
        let step = step.unwrap_or_else(|| panic!("step {name} did not run\n{self}"));
        assert_eq!(
            step.code,
            Some(0),
            "step {name} failed:\n{}\n--- console:\n{}",
            step.output,
            self.console_end()
        );
        &step.output
    }

    /// The value of `key=value`, which a step printed.
    pub fn fact(&self, step: &str, key: &str) -> &str {
        let output = self.succeeded(step);
        let value = output.lines().filter_map(|l| l.split_once('=')).find(|(k, _)| *k == key).map(|(_, v)| v);
        value.unwrap_or_else(|| panic!("step {step} says nothing of {key}:\n{output}"))
    }

    fn console_end(&self) -> String {
        let lines: Vec<&str> = self.console.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for s in &self.steps {
            writeln!(f, "--- step {} ({:?}):\n{}", s.name, s.code, s.output)?;
        }
        write!(f, "--- console:\n{}", self.console_end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_comes_after_what_it_needs() {
        let dependencies = "kernel/a/vxlan.ko.xz: kernel/b/ip6_udp_tunnel.ko.xz kernel/c/udp_tunnel.ko.xz\nkernel/d/veth.ko:\n";
        let order = load_order(dependencies, "vxlan").unwrap();
        assert_eq!(
            order,
            ["kernel/c/udp_tunnel.ko.xz", "kernel/b/ip6_udp_tunnel.ko.xz", "kernel/a/vxlan.ko.xz"]
        );
        assert_eq!(load_order(dependencies, "veth").unwrap(), ["kernel/d/veth.ko"]);
        assert_eq!(load_order(dependencies, "overlay"), None);
    }

    #[test]
    fn a_kernel_that_hangs_is_known_before_its_first_step() {
        let hangs = "[ 30.1] watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [swapper/0:1]\n";
        assert!(is_stuck("", hangs));
        assert!(!is_stuck("", "[ 4.1] Run /init as init process\n"));
        assert!(!is_stuck("@@ begin check\n", hangs), "a step may be slow");
    }

    #[test]
    fn steps_are_read_even_when_the_last_did_not_end() {
        let steps = parse("noise\n@@ begin a\none\n@@ end a 0\n@@ begin b\n@@ end b 3\n@@ begin c\nhalf");
        let codes: Vec<_> = steps.iter().map(|s| (&*s.name, s.code, &*s.output)).collect();
        assert_eq!(codes, [("a", Some(0), "one\n"), ("b", Some(3), ""), ("c", None, "half\n")]);
    }
}
