//! Layers as hostile as they come, and the ordinary ones. Needs root: device nodes, owners, `trusted.` attributes.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, symlink};
use std::path::Path;

use proptest::prelude::*;
use tar::{Builder, EntryType, Header};

use super::*;
use crate::tree;

struct Layer(Builder<Vec<u8>>);

impl Layer {
    fn new() -> Layer {
        Layer(Builder::new(Vec::new()))
    }

    /// The name goes into the header as it is, which the tar crate refuses for hostile ones.
    fn add(&mut self, name: &str, kind: EntryType, link: &str, mode: u32, data: &[u8]) -> &mut Self {
        let mut h = Header::new_gnu();
        h.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        if !link.is_empty() {
            h.set_link_name_literal(link).unwrap();
        }
        h.set_entry_type(kind);
        h.set_mode(mode);
        h.set_uid(0);
        h.set_gid(0);
        h.set_mtime(1_000_000_000);
        h.set_size(data.len() as u64);
        h.set_cksum();
        self.0.append(&h, data).unwrap();
        self
    }

    fn file(&mut self, name: &str, data: &str) -> &mut Self {
        self.add(name, EntryType::Regular, "", 0o644, data.as_bytes())
    }

    fn dir(&mut self, name: &str) -> &mut Self {
        self.add(name, EntryType::Directory, "", 0o750, b"")
    }

    fn symlink(&mut self, name: &str, to: &str) -> &mut Self {
        self.add(name, EntryType::Symlink, to, 0o777, b"")
    }

    fn hard(&mut self, name: &str, to: &str) -> &mut Self {
        self.add(name, EntryType::Link, to, 0o644, b"")
    }

    fn pax(&mut self, records: &[(&str, &[u8])]) -> &mut Self {
        self.0.append_pax_extensions(records.iter().copied()).unwrap();
        self
    }

    fn bytes(&mut self) -> Vec<u8> {
        std::mem::replace(&mut self.0, Builder::new(Vec::new())).into_inner().unwrap()
    }
}

/// A folder for one layer inside another, so that an escape has something to hit.
fn unpack_into(root: &Path, bytes: &[u8]) -> Result<Unpacked, Error> {
    fs::create_dir_all(root).unwrap();
    let fd = tree::open(root).unwrap();
    unpack(bytes, fd.as_fd()).map(|(u, _)| u)
}

fn is_whiteout(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_char_device() && m.rdev() == 0)
}

fn is_opaque(path: &Path) -> bool {
    let mut value = [0u8; 4];
    rustix::fs::lgetxattr(path, OPAQUE_XATTR, &mut value[..]).is_ok_and(|n| &value[..n] == b"y")
}

#[test]
fn nothing_leaves_the_layer() {
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("victim"), "intact").unwrap();
    let out = outside.to_str().unwrap();
    let attributes = |path: &Path| {
        let (m, mut names) = (fs::metadata(path).unwrap(), [0u8; 64]);
        let names = rustix::fs::listxattr(path, &mut names[..]).unwrap_or_default();
        (m.mode(), m.uid(), m.gid(), m.mtime(), m.mtime_nsec(), names)
    };
    let looks = || (attributes(&outside), attributes(&outside.join("victim")));
    let before = looks();
    let cases: Vec<(&str, Vec<u8>, bool)> = vec![
        ("dots", Layer::new().file("../outside/evil", "x").bytes(), false),
        ("deep dots", Layer::new().dir("a/").file("a/../../outside/evil", "x").bytes(), false),
        ("absolute", Layer::new().file(&format!("{out}/evil"), "x").bytes(), true),
        ("link", Layer::new().symlink("l", out).file("l/evil", "x").bytes(), true),
        ("relative link", Layer::new().symlink("l", "../outside").file("l/evil", "x").bytes(), true),
        (
            "chained link",
            Layer::new().symlink("a", "..").symlink("b", "a/outside").file("b/evil", "x").bytes(),
            true,
        ),
        ("over a link", Layer::new().symlink("v", &format!("{out}/victim")).file("v", "x").bytes(), true),
        ("hard link", Layer::new().hard("h", &format!("{out}/victim")).bytes(), true),
        ("hard link by dots", Layer::new().hard("h", "../outside/victim").bytes(), false),
        (
            "hard link through a link",
            Layer::new().symlink("l", out).hard("h", "l/victim").file("h", "x").bytes(),
            true,
        ),
        ("whiteout", Layer::new().symlink("l", out).file("l/.wh.victim", "").bytes(), true),
        ("whiteout of dots", Layer::new().dir("a/").file("a/.wh...", "").bytes(), false),
        ("opaque", Layer::new().symlink("l", out).file("l/.wh..wh..opq", "").bytes(), true),
        ("proc", Layer::new().symlink("l", "/proc/self/cwd").file("l/evil", "x").bytes(), true),
        // CVE-2021-32760: what is set after an entry is made.
        (
            "mode of a link's hard link",
            Layer::new()
                .symlink("v", &format!("{out}/victim"))
                .add("h", EntryType::Link, "v", 0o4777, b"")
                .pax(&[("SCHILY.xattr.user.x", b"1")])
                .add("h2", EntryType::Link, "v", 0o4777, b"")
                .bytes(),
            true,
        ),
        (
            "owner and attributes of a link",
            Layer::new()
                .pax(&[("uid", b"1234"), ("gid", b"1234"), ("SCHILY.xattr.trusted.x", b"1")])
                .symlink("v", &format!("{out}/victim"))
                .bytes(),
            true,
        ),
        (
            "mode through a link",
            Layer::new()
                .symlink("l", out)
                .pax(&[("SCHILY.xattr.user.x", b"1")])
                .add("l/", EntryType::Directory, "", 0o1777, b"")
                .add("l/victim", EntryType::Regular, "", 0o4777, b"x")
                .bytes(),
            true,
        ),
        ("link loop", Layer::new().symlink("a", "b").symlink("b", "a").file("a/x", "x").bytes(), false),
    ];
    for (i, (name, bytes, fine)) in cases.into_iter().enumerate() {
        let result = unpack_into(&dir.path().join(i.to_string()), &bytes);
        assert_eq!(result.is_ok(), fine, "{name}: {result:?}");
        assert_eq!(fs::read_to_string(outside.join("victim")).unwrap(), "intact", "{name}");
        assert_eq!(fs::metadata(outside.join("victim")).unwrap().nlink(), 1, "{name}");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "{name}");
        assert_eq!(looks(), before, "{name}");
        assert!(!is_opaque(&outside), "{name}");
        assert!(!Path::new("evil").exists(), "{name}");
    }
}

/// ext4 has room for 4 KiB and calls all else a lack of space.
#[test]
fn more_attributes_than_the_file_system_holds_are_no_full_disk() {
    let dir = tempfile::tempdir().unwrap();
    let mut tar = Builder::new(Vec::new());
    tar.append_pax_extensions([("SCHILY.xattr.user.a", &[7u8; 60_000][..])]).unwrap();
    tar.append_data(&mut Header::new_gnu(), "f", &b""[..]).unwrap();
    // Other file systems have the room.
    if let Err(e) = unpack_into(&dir.path().join("l"), &tar.into_inner().unwrap()) {
        let number = |e: &std::io::Error| e.raw_os_error();
        assert!(matches!(&e, Error::Io { source, .. } if number(source) == Some(libc::E2BIG)), "{e}");
    }
}

#[test]
fn broken_streams_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let whole = Layer::new().file("a", "some data").bytes();
    let mut wrong_sum = whole.clone();
    wrong_sum[0] ^= 1;
    for (i, bytes) in [&whole[..600], &whole[..100], &wrong_sum[..], b"not a tar"].into_iter().enumerate() {
        let result = unpack_into(&dir.path().join(i.to_string()), bytes);
        assert!(matches!(result, Err(Error::Tar { .. })), "{i}: {result:?}");
    }
    let below_file = Layer::new().file("a", "x").file("a/b", "y").bytes();
    assert!(matches!(unpack_into(&dir.path().join("f"), &below_file), Err(Error::NotAFolder { .. })));
    assert_eq!(unpack_into(&dir.path().join("empty"), b"").unwrap().usage.inodes, 1);
}

#[test]
fn every_kind_of_entry_arrives_with_its_metadata() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("l");
    let mut l = Layer::new();
    l.add("./", EntryType::Directory, "", 0o711, b"").dir("d/");
    let capability = b"\x01\x00\x00\x02\x00\x20\x0a\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";
    l.pax(&[
        ("uid", b"1000"),
        ("gid", b"1001"),
        ("mtime", b"1234567890.5"),
        ("SCHILY.xattr.security.capability", capability),
        ("SCHILY.xattr.user.note", b"a\nb"),
        ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
        ("SCHILY.xattr.security.selinux", b"u:r:t:s0"),
    ]);
    l.add("d/f", EntryType::Regular, "", 0o4755, b"hello");
    l.hard("d/h", "d/f").symlink("d/s", "f").add("d/p", EntryType::Fifo, "", 0o622, b"");
    let mut h = Header::new_gnu();
    h.set_path("d/null").unwrap();
    h.set_entry_type(EntryType::Char);
    h.set_device_major(1).unwrap();
    h.set_device_minor(3).unwrap();
    h.set_mode(0o666);
    h.set_uid(0);
    h.set_gid(5);
    h.set_size(0);
    h.set_cksum();
    l.0.append(&h, std::io::empty()).unwrap();
    let long = format!("d/{}/{}", "n".repeat(120), "m".repeat(120));
    let mut h = Header::new_gnu();
    h.set_size(1);
    h.set_mode(0o600);
    l.0.append_data(&mut h, &long, &b"x"[..]).unwrap();
    let u = unpack_into(&root, &l.bytes()).unwrap();
    assert_eq!(u.inherit, [format!("d/{}", "n".repeat(120)).into_bytes()]);

    let f = fs::metadata(root.join("d/f")).unwrap();
    assert_eq!((f.uid(), f.gid(), f.mode() & 0o7777, f.nlink()), (1000, 1001, 0o4755, 2));
    assert_eq!((f.mtime(), f.mtime_nsec()), (1_234_567_890, 500_000_000));
    let get = |name: &str| {
        let mut v = [0u8; 64];
        rustix::fs::lgetxattr(root.join("d/f"), name, &mut v[..]).map(|n| v[..n].to_vec())
    };
    assert_eq!(get("security.capability").unwrap(), capability);
    assert_eq!(get("user.note").unwrap(), b"a\nb");
    assert!(get("trusted.overlay.redirect").is_err());
    assert_ne!(get("security.selinux").ok().as_deref(), Some(&b"u:r:t:s0"[..]));
    assert_eq!(fs::read_link(root.join("d/s")).unwrap(), Path::new("f"));
    assert_eq!(fs::symlink_metadata(root.join("d/s")).unwrap().mtime(), 1_000_000_000);
    assert!(fs::metadata(root.join("d/p")).unwrap().file_type().is_fifo());
    let null = fs::metadata(root.join("d/null")).unwrap();
    assert_eq!((null.rdev(), null.gid(), null.mode() & 0o777), (rustix::fs::makedev(1, 3), 5, 0o666));
    let d = fs::metadata(root.join("d")).unwrap();
    assert_eq!((d.mode() & 0o7777, d.mtime()), (0o750, 1_000_000_000));
    assert_eq!(fs::metadata(&root).unwrap().mode() & 0o777, 0o711);
    assert_eq!(fs::read_to_string(root.join(&long)).unwrap(), "x");
}

#[test]
fn sparse_files_keep_their_holes() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("l");
    let mut map = b"2\n0\n3\n1048576\n4\n".to_vec();
    map.resize(512, 0);
    map.extend_from_slice(b"abcWXYZ");
    let mut l = Layer::new();
    l.pax(&[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"v1"),
        ("GNU.sparse.realsize", b"2097152"),
    ]);
    l.add("GNUSparseFile.0/v1", EntryType::Regular, "", 0o644, &map);
    l.pax(&[
        ("GNU.sparse.map", b"0,3,1048576,4"),
        ("GNU.sparse.size", b"2097152"),
        ("GNU.sparse.name", b"v0"),
    ]);
    l.add("GNUSparseFile.0/v0", EntryType::Regular, "", 0o644, b"abcWXYZ");
    l.file("after", "ok");
    unpack_into(&root, &l.bytes()).unwrap();
    for name in ["v0", "v1"] {
        let meta = fs::metadata(root.join(name)).unwrap();
        assert_eq!(meta.len(), 2 << 20, "{name}");
        assert!(meta.blocks() * 512 < 64 << 10, "{name}");
        let data = fs::read(root.join(name)).unwrap();
        assert_eq!((&data[..4], &data[1 << 20..][..5]), (&b"abc\0"[..], &b"WXYZ\0"[..]), "{name}");
    }
    assert_eq!(fs::read_to_string(root.join("after")).unwrap(), "ok");
    let mut l = Layer::new();
    l.pax(&[("GNU.sparse.map", b"0,3,1,4"), ("GNU.sparse.size", b"9")]);
    l.add("x", EntryType::Regular, "", 0o644, b"abcWXYZ");
    assert!(matches!(unpack_into(&dir.path().join("bad"), &l.bytes()), Err(Error::Tar { .. })));
}

#[test]
fn later_entries_win_and_whiteouts_touch_only_lower_layers() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("l");
    let mut l = Layer::new();
    l.file("f", "one").file("f", "two");
    l.dir("d/").file("d/x", "x").file("d", "file now").file("g", "g").dir("g/").file("g/y", "y");
    l.dir("both/").file("both/kept", "k").file(".wh.both", "");
    l.file(".wh.first", "").file("first/new", "n");
    l.file("kept", "k").file(".wh.kept", "");
    l.file("gone/.wh.a", "").file("opq/.wh..wh..opq", "").file("opq/b", "b");
    l.file(".wh..wh.plnk", "").file(".wh.again", "").dir("again/");
    unpack_into(&root, &l.bytes()).unwrap();
    assert_eq!(fs::read_to_string(root.join("f")).unwrap(), "two");
    assert_eq!(fs::read_to_string(root.join("d")).unwrap(), "file now");
    assert_eq!(fs::read_to_string(root.join("g/y")).unwrap(), "y");
    assert!(is_opaque(&root.join("both")) && root.join("both/kept").exists());
    assert!(is_opaque(&root.join("first")) && root.join("first/new").exists());
    assert_eq!(fs::read_to_string(root.join("kept")).unwrap(), "k");
    assert!(is_whiteout(&root.join("gone/a")));
    assert!(is_opaque(&root.join("opq")) && root.join("opq/b").exists());
    assert!(is_opaque(&root.join("again")));
    assert!(!root.join(".wh..wh.plnk").exists());
}

#[test]
fn what_a_layer_lacks_comes_from_below() {
    let dir = tempfile::tempdir().unwrap();
    let (low, up) = (dir.path().join("low"), dir.path().join("up"));
    let mut l = Layer::new();
    l.add("./", EntryType::Directory, "", 0o701, b"");
    l.add("srv/", EntryType::Directory, "", 0o1770, b"").file("srv/data", "shared").symlink("run", "srv");
    unpack_into(&low, &l.bytes()).unwrap();
    let mut l = Layer::new();
    l.file("srv/new", "n").hard("srv/link", "srv/data").hard("nowhere", "srv/missing");
    let u = unpack_into(&up, &l.bytes()).unwrap();
    let lower: Vec<OwnedFd> = vec![tree::open(&low).unwrap()];
    let top = tree::open(&up).unwrap();
    let e = borrow_from_lower(top.as_fd(), &lower, &u).unwrap_err();
    assert!(matches!(&e, Error::LinkTarget { path, .. } if path == "nowhere"), "{e}");
    let u = Unpacked { borrow: vec![u.borrow[0].clone()], ..u };
    borrow_from_lower(top.as_fd(), &lower, &u).unwrap();
    assert_eq!(fs::metadata(up.join("srv")).unwrap().mode() & 0o7777, 0o1770);
    assert_eq!(fs::metadata(&up).unwrap().mode() & 0o7777, 0o701);
    assert_eq!(fs::read_to_string(up.join("srv/link")).unwrap(), "shared");
}

/// A stream that is made while it is read.
struct Made<I>(I, std::io::Cursor<Vec<u8>>);

impl<I: Iterator<Item = Vec<u8>>> std::io::Read for Made<I> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let n = self.1.read(buf)?;
            if n > 0 {
                return Ok(n);
            }
            match self.0.next() {
                Some(bytes) => self.1 = std::io::Cursor::new(bytes),
                None => return Ok(0),
            }
        }
    }
}

/// Without the end mark.
fn folder_with_attribute(name: &str) -> Vec<u8> {
    let mut l = Layer::new();
    let mut bytes = l.pax(&[("SCHILY.xattr.user.x", &[b'x'; 60 << 10])]).dir(name).bytes();
    bytes.truncate(bytes.len() - 1024);
    bytes
}

#[test]
fn a_few_megabytes_do_not_become_gigabytes() {
    let dir = tempfile::tempdir().unwrap();
    let root = tree::open(dir.path()).unwrap();
    let unpack = |entries: &mut dyn Iterator<Item = Vec<u8>>| {
        unpack(std::io::BufReader::new(Made(entries, Default::default())), root.as_fd()).map(|(u, _)| u)
    };
    // The last entry of a path is all that is kept of it.
    let one = folder_with_attribute("a/");
    let mut same = (0..4000).map(|_| one.clone()).chain([Layer::new().dir("a/").bytes()]);
    unpack(&mut same).unwrap();
    assert_eq!(fs::metadata(dir.path().join("a")).unwrap().mode() & 0o7777, 0o750);
    let mut many = (0..4000).map(|i| folder_with_attribute(&format!("b{i}/")));
    let e = unpack(&mut many).unwrap_err();
    assert!(matches!(e, Error::TooMuch { .. }), "{e}");
    let long = "l".repeat(4096);
    let twice = |l: &mut Layer| {
        for i in 0..20 {
            let name = format!("SCHILY.xattr.user.x{i}");
            l.pax(&[(name.as_str(), &[b'x'; 60 << 10])]);
        }
        l.dir("e/").bytes()
    };
    for (what, bytes) in [
        ("link", Layer::new().pax(&[("linkpath", long.as_bytes())]).symlink("s", "x").bytes()),
        ("hard link", Layer::new().pax(&[("linkpath", long.as_bytes())]).hard("h", "x").bytes()),
        ("value", Layer::new().pax(&[("SCHILY.xattr.user.x", &[b'x'; (64 << 10) + 1])]).dir("v/").bytes()),
        ("name", Layer::new().pax(&[(format!("SCHILY.xattr.user.{long}").as_str(), b"x")]).dir("n/").bytes()),
        ("many headers", twice(&mut Layer::new())),
    ] {
        let e = unpack_into(dir.path(), &bytes).unwrap_err();
        assert!(matches!(e, Error::Tar { .. }), "{what}: {e}");
    }
}

#[test]
fn a_link_to_a_sparse_file_below_copies_no_holes() {
    let dir = tempfile::tempdir().unwrap();
    let (low, up) = (dir.path().join("low"), dir.path().join("up"));
    fs::create_dir(&low).unwrap();
    let disk = fs::File::create(low.join("disk")).unwrap();
    disk.set_len(4 << 30).unwrap();
    disk.write_all_at(b"middle", 3 << 30).unwrap();
    let u = unpack_into(&up, &Layer::new().hard("copy", "disk").bytes()).unwrap();
    borrow_from_lower(tree::open(&up).unwrap().as_fd(), &[tree::open(&low).unwrap()], &u).unwrap();
    let copy = fs::File::open(up.join("copy")).unwrap();
    let meta = copy.metadata().unwrap();
    assert_eq!(meta.len(), 4 << 30);
    assert!(meta.blocks() * 512 < 64 << 10, "{} blocks", meta.blocks());
    let mut text = [0u8; 6];
    copy.read_exact_at(&mut text, 3 << 30).unwrap();
    assert_eq!(&text, b"middle");
}

#[test]
fn long_runs_of_zeros_take_no_space() {
    let dir = tempfile::tempdir().unwrap();
    let mut data = vec![0u8; 6 << 20];
    // At the start, in the middle, short of the end; and a file that ends with zeros.
    for at in [0, 1, (2 << 20) + 7, (4 << 20) - 1, 4 << 20, (6 << 20) - 1] {
        data[at] = 7;
    }
    let text = |d: &[u8]| d.iter().map(|b| *b as char).collect::<String>();
    let mut l = Layer::new();
    l.file("mixed", &text(&data))
        .file("zeros", &text(&vec![0; (3 << 20) + 5]))
        .file("short", &text(&[0; 100]));
    let u = unpack_into(&dir.path().join("r"), &l.bytes()).unwrap();
    let read = |name: &str| fs::read(dir.path().join("r").join(name)).unwrap();
    assert!(read("mixed") == data);
    assert!(read("zeros") == vec![0; (3 << 20) + 5]);
    assert!(read("short") == [0; 100]);
    let blocks: u64 =
        ["mixed", "zeros"].iter().map(|n| fs::metadata(dir.path().join("r").join(n)).unwrap().blocks()).sum();
    assert!(blocks * 512 < 3 << 20, "{blocks} blocks");
    assert!(u.usage.bytes < 3 << 20, "{:?}", u.usage);
}

#[test]
fn deleting_does_not_follow_links() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("in/a/b/c")).unwrap();
    fs::create_dir(dir.path().join("out")).unwrap();
    fs::write(dir.path().join("out/f"), "f").unwrap();
    symlink(dir.path().join("out"), dir.path().join("in/a/b/l")).unwrap();
    tree::empty(&tree::open(&dir.path().join("in")).unwrap()).unwrap();
    assert_eq!(fs::read_dir(dir.path().join("in")).unwrap().count(), 0);
    assert!(dir.path().join("out/f").exists());
}

/// What a layer's archive says about one name.
#[derive(Clone, Debug)]
enum Op {
    File(u8),
    Whiteout,
    Opaque,
}

fn ops() -> impl Strategy<Value = Vec<(usize, usize, Op)>> {
    let op = prop_oneof![any::<u8>().prop_map(Op::File), Just(Op::Whiteout), Just(Op::Opaque)];
    prop::collection::vec((0usize..3, 0usize..4, op), 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Stacked as overlayfs does it, unpacked layers show what the image specification says of the archives.
    #[test]
    fn whiteouts_mean_the_same_in_any_order(layers in prop::collection::vec(ops(), 1..4)) {
        let dir = tempfile::tempdir().unwrap();
        let mut want: BTreeMap<(usize, usize), u8> = BTreeMap::new();
        let mut got: BTreeMap<(usize, usize), u8> = BTreeMap::new();
        for (n, ops) in layers.iter().enumerate() {
            let mut l = Layer::new();
            let mut files = BTreeMap::new();
            for (d, f, op) in ops {
                match op {
                    Op::File(v) => {
                        l.add(&format!("d{d}/f{f}"), EntryType::Regular, "", 0o644, &[*v]);
                        files.insert((*d, *f), *v);
                    }
                    Op::Whiteout => {
                        l.file(&format!("d{d}/.wh.f{f}"), "");
                        want.remove(&(*d, *f));
                    }
                    Op::Opaque => {
                        l.file(&format!("d{d}/.wh..wh..opq"), "");
                        want.retain(|(dir, _), _| dir != d);
                    }
                }
            }
            want.extend(files);
            let root = dir.path().join(n.to_string());
            unpack_into(&root, &l.bytes()).unwrap();
            for d in 0..3 {
                let folder = root.join(format!("d{d}"));
                if is_opaque(&folder) {
                    got.retain(|(dir, _), _| *dir != d);
                }
                for f in 0..4 {
                    let file = folder.join(format!("f{f}"));
                    if is_whiteout(&file) {
                        got.remove(&(d, f));
                    } else if let Ok(data) = fs::read(&file) {
                        got.insert((d, f), data[0]);
                    }
                }
            }
        }
        prop_assert_eq!(got, want);
    }
}
