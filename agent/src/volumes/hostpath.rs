//! hostPath volumes: the type check and what it makes.

use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

use k8s_openapi::api::core::v1::HostPathVolumeSource;

use super::Error;

/// Checks (and for `…OrCreate` makes) what the volume's type promises.
pub fn check(h: &HostPathVolumeSource) -> Result<(), Error> {
    let path = Path::new(&h.path);
    let meta = fs::metadata(path).ok();
    let kind = h.type_.as_deref().unwrap_or("");
    let fail = |wanted| Err(Error::WrongType { path: h.path.clone(), wanted });
    match (kind, &meta) {
        ("", _) => Ok(()),
        ("DirectoryOrCreate", None) => {
            fs::create_dir_all(path).map_err(Error::io("create", path))?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o755))
                .map_err(Error::io("set the mode of", path))
        }
        ("FileOrCreate", None) => {
            let made = fs::File::options().create_new(true).write(true).open(path);
            made.map_err(Error::io("create", path))?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o644))
                .map_err(Error::io("set the mode of", path))
        }
        ("Directory" | "DirectoryOrCreate", m) if m.as_ref().is_some_and(|m| m.is_dir()) => Ok(()),
        ("Directory" | "DirectoryOrCreate", _) => fail("a directory"),
        ("File" | "FileOrCreate", m) if m.as_ref().is_some_and(|m| m.is_file()) => Ok(()),
        ("File" | "FileOrCreate", _) => fail("a file"),
        ("Socket", m) if m.as_ref().is_some_and(|m| m.file_type().is_socket()) => Ok(()),
        ("Socket", _) => fail("a socket file"),
        ("CharDevice", m) if m.as_ref().is_some_and(|m| m.file_type().is_char_device()) => Ok(()),
        ("CharDevice", _) => fail("a character device"),
        ("BlockDevice", m) if m.as_ref().is_some_and(|m| m.file_type().is_block_device()) => Ok(()),
        ("BlockDevice", _) => fail("a block device"),
        (other, _) => Err(Error::Unsupported(format!("hostPath of type {other}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types() {
        let t = tempfile::tempdir().unwrap();
        let file = t.path().join("f");
        fs::write(&file, "").unwrap();
        let ok = |name: &str, kind: &str| {
            let path = t.path().join(name).to_string_lossy().into_owned();
            check(&HostPathVolumeSource { path, type_: Some(kind.into()) }).is_ok()
        };
        assert!(ok("none", "") && ok("f", "File") && ok("f", "FileOrCreate") && ok("", "Directory"));
        assert!(
            !ok("none", "Directory") && !ok("none", "File") && !ok("f", "Directory") && !ok("f", "Socket")
        );
        assert!(ok("new/dir", "DirectoryOrCreate") && t.path().join("new/dir").is_dir());
        assert!(ok("newfile", "FileOrCreate") && t.path().join("newfile").is_file());
        assert!(!ok("f", "Nonsense"));
    }
}
