//! Files of a volume replaced all at once: they lie in a dated folder, `..data` points to it, and what containers see
//! are symbolic links through `..data`, so that one rename switches them together.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use super::Error;

/// One file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    pub data: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
    /// The owner; root unless set.
    pub uid: Option<u32>,
}

/// Files by their path in the volume.
pub type Files = BTreeMap<String, File>;

const DATA: &str = "..data";
const DATA_NEW: &str = "..data_tmp";

fn check(path: &str) -> Result<(), Error> {
    let p = Path::new(path);
    let plain = p.components().all(|c| matches!(c, Component::Normal(_)));
    if path.is_empty() || !plain || path.starts_with("..") {
        return Err(Error::Escapes(path.to_owned()));
    }
    Ok(())
}

fn owner(f: &File, group: Option<u32>) -> (u32, Option<u32>, Option<u32>) {
    match group {
        // The group may read what the owner may.
        Some(g) => (f.mode | ((f.mode & 0o400) >> 3), f.uid, Some(g)),
        None => (f.mode, f.uid, None),
    }
}

fn unchanged(dir: &Path, files: &Files, group: Option<u32>) -> bool {
    let data = dir.join(DATA);
    let Ok(present) = list(&data) else { return false };
    let wanted: BTreeSet<PathBuf> = files.keys().map(PathBuf::from).collect();
    present == wanted
        && files.iter().all(|(p, f)| {
            let path = data.join(p);
            let (mode, uid, gid) = owner(f, group);
            let Ok(m) = fs::metadata(&path) else { return false };
            m.permissions().mode() & 0o7777 == mode
                && uid.is_none_or(|u| m.uid() == u)
                && gid.is_none_or(|g| m.gid() == g)
                && m.len() == f.data.len() as u64
                && fs::read(&path).is_ok_and(|d| d == f.data)
        })
}

fn list(dir: &Path) -> std::io::Result<BTreeSet<PathBuf>> {
    let mut out = BTreeSet::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(rel) = todo.pop() {
        for e in fs::read_dir(dir.join(&rel))? {
            let e = e?;
            let path = rel.join(e.file_name());
            if e.file_type()?.is_dir() {
                todo.push(path);
            } else {
                out.insert(path);
            }
        }
    }
    Ok(out)
}

/// Makes `dir` show exactly `files`. Returns whether anything changed.
pub fn write(dir: &Path, files: &Files, group: Option<u32>) -> Result<bool, Error> {
    files.keys().try_for_each(|p| check(p))?;
    let old = fs::read_link(dir.join(DATA)).ok();
    if old.is_some() && unchanged(dir, files, group) {
        links(dir, files)?;
        return Ok(false);
    }
    let stamp = jiff::Timestamp::now().strftime("..%Y_%m_%d_%H_%M_%S").to_string();
    let new = format!("{stamp}.{:09}", rand::random::<u32>());
    let target = dir.join(&new);
    fs::create_dir(&target).map_err(Error::io("create", &target))?;
    fs::set_permissions(&target, fs::Permissions::from_mode(0o755))
        .map_err(Error::io("set the mode of", &target))?;
    for (path, f) in files {
        write_file(&target, path, f, group)?;
    }
    let tmp = dir.join(DATA_NEW);
    // Left by a crash.
    let _ = fs::remove_file(&tmp);
    symlink(&new, &tmp).map_err(Error::io("link", &tmp))?;
    fs::rename(&tmp, dir.join(DATA)).map_err(Error::io("switch", &dir.join(DATA)))?;
    links(dir, files)?;
    sweep(dir, &new);
    Ok(true)
}

fn write_file(target: &Path, path: &str, f: &File, group: Option<u32>) -> Result<(), Error> {
    let full = target.join(path);
    if let Some(parent) = full.parent() {
        fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    }
    fs::write(&full, &f.data).map_err(Error::io("write", &full))?;
    let (mode, uid, gid) = owner(f, group);
    if uid.is_some() || gid.is_some() {
        std::os::unix::fs::chown(&full, uid, gid).map_err(Error::io("change the owner of", &full))?;
    }
    fs::set_permissions(&full, fs::Permissions::from_mode(mode)).map_err(Error::io("set the mode of", &full))
}

/// Links for the first parts of all paths; links of what has gone are removed.
fn links(dir: &Path, files: &Files) -> Result<(), Error> {
    let tops: BTreeSet<&str> = files.keys().filter_map(|p| p.split('/').next()).collect();
    for top in &tops {
        let link = dir.join(top);
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new(DATA).join(top), &link).map_err(Error::io("link", &link))?;
        }
    }
    for e in fs::read_dir(dir).map_err(Error::io("list", dir))?.flatten() {
        let name = e.file_name();
        let name = name.to_string_lossy();
        let is_link = e.file_type().is_ok_and(|t| t.is_symlink());
        if is_link && !name.starts_with("..") && !tops.contains(name.as_ref()) {
            fs::remove_file(e.path()).map_err(Error::io("remove", &e.path()))?;
        }
    }
    Ok(())
}

/// Dated folders other than the present one are of no use any more.
fn sweep(dir: &Path, keep: &str) {
    for e in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = e.file_name();
        let name = name.to_string_lossy();
        let dated = name.starts_with("..") && e.file_type().is_ok_and(|t| t.is_dir());
        if dated && name != keep {
            // A leftover does no harm and is tried again with the next change.
            let _ = fs::remove_dir_all(e.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(list: &[(&str, &str)]) -> Files {
        let file = |d: &str| File { data: d.as_bytes().to_vec(), mode: 0o640, uid: None };
        list.iter().map(|(p, d)| ((*p).to_owned(), file(d))).collect()
    }

    #[test]
    fn writes_switches_and_removes() {
        let t = tempfile::tempdir().unwrap();
        let d = t.path();
        assert!(write(d, &files(&[("a", "1"), ("b/c", "2")]), None).unwrap());
        assert_eq!(fs::read_to_string(d.join("a")).unwrap(), "1");
        assert_eq!(fs::read_to_string(d.join("b/c")).unwrap(), "2");
        assert_eq!(fs::metadata(d.join("a")).unwrap().permissions().mode() & 0o777, 0o640);
        let first = fs::read_link(d.join(DATA)).unwrap();
        assert!(!write(d, &files(&[("a", "1"), ("b/c", "2")]), None).unwrap());
        assert_eq!(fs::read_link(d.join(DATA)).unwrap(), first);
        assert!(write(d, &files(&[("a", "3")]), None).unwrap());
        assert_eq!(fs::read_to_string(d.join("a")).unwrap(), "3");
        assert!(fs::symlink_metadata(d.join("b")).is_err());
        assert!(!d.join(first).exists());
    }

    #[test]
    fn paths_cannot_leave_the_volume() {
        let t = tempfile::tempdir().unwrap();
        for bad in ["../a", "/etc/x", "a/../../b", "..data", ""] {
            assert!(matches!(write(t.path(), &files(&[(bad, "")]), None), Err(Error::Escapes(_))), "{bad}");
        }
    }
}
