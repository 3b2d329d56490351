//! What the kernel's mount table tells of the store's overlays, for when its own records are damaged.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

const TABLE: &str = "/proc/self/mountinfo";

/// An overlay as it is mounted, by this store or by anybody.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mounted {
    /// Our own mounts have their folder in `rootfs/` as their source; those of earlier releases have not.
    source: PathBuf,
    upper: Option<PathBuf>,
    /// The topmost layer's files. Relative where all options had to fit into one page.
    top: PathBuf,
    pub target: PathBuf,
    /// Names of layers, bottom first.
    pub layers: Vec<String>,
    pub readonly: bool,
    pub mount_points: bool,
    /// Copies of metadata alone: see `RootfsRecord::owners_changed`.
    pub metacopy: bool,
}

impl Mounted {
    /// Whether it is the one of the folder `dir` in `rootfs/`.
    pub fn is_of(&self, dir: &Path) -> bool {
        self.source == dir || self.upper.as_ref().is_some_and(|u| *u == dir.join("upper"))
    }

    /// Whether it is one of the store at `root`. Another store's may have layers of the same names.
    fn is_below(&self, root: &Path) -> bool {
        [Some(&self.source), self.upper.as_ref(), Some(&self.top)]
            .iter()
            .flatten()
            .any(|p| p.starts_with(root))
    }
}

/// All overlays of the store at `root` that this process sees.
pub(crate) fn overlays(root: &Path) -> Result<Vec<Mounted>> {
    let table = std::fs::read(TABLE).map_err(Error::io("read", TABLE.as_ref()))?;
    Ok(table.split(|b| *b == b'\n').filter_map(overlay).filter(|m| m.is_below(root)).collect())
}

/// One line (`proc_pid_mountinfo(5)`), if it is an overlay's.
fn overlay(line: &[u8]) -> Option<Mounted> {
    let mut fields = line.split(|b| *b == b' ');
    let target = path(fields.nth(4)?);
    let readonly = fields.next()?.split(|b| *b == b',').any(|o| o == b"ro");
    let mut rest = fields.skip_while(|f| *f != b"-").skip(1);
    if rest.next()? != b"overlay" {
        return None;
    }
    let source = path(rest.next()?);
    let mut found = Mounted {
        source,
        upper: None,
        top: PathBuf::new(),
        target,
        layers: Vec::new(),
        readonly,
        mount_points: false,
        metacopy: false,
    };
    for option in rest.next()?.split(|b| *b == b',') {
        if let Some(upper) = option.strip_prefix(b"upperdir=") {
            found.upper = Some(path(upper));
        } else if option == b"metacopy=on" {
            found.metacopy = true;
        } else {
            // The kernels differ in how they list lower layers (`lowerdir=A:B`, `lowerdir+=A,lowerdir+=B`), not in the ends.
            for lower in option.split(|b| *b == b':') {
                found.lower(lower);
            }
        }
    }
    found.layers.reverse();
    Some(found)
}

impl Mounted {
    fn lower(&mut self, text: &[u8]) {
        let mut parts = text.rsplit(|b| matches!(b, b'/' | b'='));
        match (parts.next(), parts.next()) {
            (Some(b"fs"), Some(name)) if name.len() == 24 && name.iter().all(u8::is_ascii_hexdigit) => {
                if self.layers.is_empty() {
                    self.top = path(text.rsplit(|b| *b == b'=').next().unwrap_or_default());
                }
                self.layers.push(String::from_utf8_lossy(name).into_owned());
            }
            (Some(b"points"), Some(b"empty")) => self.mount_points = true,
            _ => {}
        }
    }
}

/// Blanks and the like are written as a backslash and three octal digits.
fn path(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = |n: &u8| n.checked_sub(b'0').filter(|n| *n < 8).map(u32::from);
        let code = match after {
            [a, b, c, ..] if *first == b'\\' => octal(a)
                .zip(octal(b))
                .zip(octal(c))
                .and_then(|((a, b), c)| u8::try_from(a * 64 + b * 8 + c).ok()),
            _ => None,
        };
        out.push(code.unwrap_or(*first));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    OsString::from_vec(out).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlays_as_kernels_show_them() {
        let (a, b) = ("a".repeat(24), "0123456789abcdef01234567");
        let lists = [
            format!("lowerdir+=/s/layers/{b}/fs,lowerdir+=/s/layers/{a}/fs,lowerdir+=/s/layers/empty/points"),
            format!("lowerdir=/s/layers/{b}/fs:/s/layers/{a}/fs:/s/layers/empty/points"),
            // In one page, and with translated owners.
            format!("lowerdir={b}/fs:{a}/fs:empty/points"),
            format!(
                "lowerdir+=/s/mapped/3/{b}/fs,lowerdir+=/s/mapped/3/{a}/fs,lowerdir+=/s/mapped/3/empty/points"
            ),
        ];
        for list in lists {
            let line = format!(
                "36 35 0:32 / /m\\040nt/c rw,relatime shared:1 master:2 - overlay /s/rootfs/c rw,{list},upperdir=/s/rootfs/c/upper,workdir=/s/rootfs/c/work,uuid=on,volatile"
            );
            let found = overlay(line.as_bytes()).unwrap();
            assert_eq!(found.layers, [a.as_str(), b], "{list}");
            assert_eq!(found.target, Path::new("/m nt/c"));
            assert!(found.mount_points && !found.readonly && !found.metacopy);
            assert!(found.is_below("/s".as_ref()) && !found.is_below("/t".as_ref()));
            assert!(found.is_of("/s/rootfs/c".as_ref()) && !found.is_of("/s/rootfs/d".as_ref()));
            // An earlier release's has no source of its own.
            let old = overlay(line.replace("overlay /s/rootfs/c ", "overlay orlop ").as_bytes()).unwrap();
            assert!(old.is_of("/s/rootfs/c".as_ref()) && !old.is_of("/s/rootfs".as_ref()));
        }
        let volume = format!(
            "40 35 0:33 / /v ro,relatime - overlay /s/rootfs/v rw,lowerdir=/s/layers/{a}/fs:/s/layers/empty/a,metacopy=on"
        );
        let found = overlay(volume.as_bytes()).unwrap();
        assert!(
            found.readonly && found.metacopy && !found.mount_points && found.is_of("/s/rootfs/v".as_ref())
        );
        assert_eq!(found.layers, [a]);
        let old = overlay(volume.replace("overlay /s/rootfs/v ", "overlay orlop ").as_bytes()).unwrap();
        assert!(old.is_below("/s".as_ref()) && !old.is_below("/t".as_ref()), "{old:?}");
        for other in ["", "36 35 0:32 / /mnt rw - ext4 /dev/vda rw", "36 35 0:32 / /mnt rw", "x - overlay"] {
            assert_eq!(overlay(other.as_bytes()), None, "{other}");
        }
        assert_eq!(path(br"/a\134b\011\9\04"), Path::new("/a\\b\t\\9\\04"));
    }
}
