//! emptyDir volumes: a folder, a tmpfs for medium Memory, a hugetlbfs for huge pages.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, PodSpec};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{HUGETLBFS_MAGIC, statfs};
use orlop_api::quantity::Amount;

use super::{Error, mounts};

const HUGE_PAGES: &str = "HugePages";

/// Where the files of an emptyDir lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    Disk,
    /// `size` in bytes.
    Memory {
        size: Option<i64>,
    },
    /// `page` in bytes.
    HugePages {
        page: u64,
    },
}

impl Medium {
    /// What the volume asks for. Pages are of a size that the pod requests: `HugePages` alone is for pods with one size,
    /// `HugePages-2Mi` names one of several (KEP-1539). Pure.
    pub fn of(e: &EmptyDirVolumeSource, pod: &PodSpec) -> Result<Medium, Error> {
        let name = e.medium.as_deref().unwrap_or_default();
        if let Some(rest) = name.strip_prefix(HUGE_PAGES) {
            return Ok(Medium::HugePages { page: page_size(name, rest, pod)? });
        }
        match name {
            "" => Ok(Medium::Disk),
            "Memory" => {
                let limit = e.size_limit.as_ref().and_then(|q| Amount::try_from(q).ok()).map(Amount::units);
                Ok(Medium::Memory { size: limit.filter(|l| *l > 0) })
            }
            other => Err(Error::Medium { medium: other.to_owned(), why: "is not known".into() }),
        }
    }
}

/// A page size as resources and media name it, in bytes.
fn bytes(size: &str) -> Option<u64> {
    u64::try_from(size.parse::<Amount>().ok()?.units()).ok().filter(|b| b.is_power_of_two())
}

/// `rest` is what follows `HugePages` in `medium`.
fn page_size(medium: &str, rest: &str, pod: &PodSpec) -> Result<u64, Error> {
    let bad = |why: String| Error::Medium { medium: medium.to_owned(), why };
    let named = match rest.strip_prefix('-') {
        Some(size) => Some(bytes(size).ok_or_else(|| bad("names no page size, as 2Mi or 1Gi".into()))?),
        None if rest.is_empty() => None,
        None => return Err(bad("is not known".into())),
    };
    let of_containers = pod.containers.iter().chain(pod.init_containers.iter().flatten());
    let all = of_containers.map(|c| c.resources.as_ref()).chain([pod.resources.as_ref()]).flatten();
    // A limit alone is a request, too.
    let names = all.flat_map(|r| r.requests.iter().chain(&r.limits)).flat_map(|amounts| amounts.keys());
    let mut sizes = Vec::new();
    for size in names.filter_map(|n| n.strip_prefix("hugepages-")) {
        let size =
            bytes(size).ok_or_else(|| bad(format!("cannot be had: hugepages-{size} is no size of pages")))?;
        if !sizes.contains(&size) {
            sizes.push(size);
        }
    }
    match (named, sizes.as_slice()) {
        (Some(size), all) if all.contains(&size) => Ok(size),
        (Some(_), _) => Err(bad("is for pods that request huge pages of this size".into())),
        (None, [size]) => Ok(*size),
        (None, []) => Err(bad("is for pods that request huge pages".into())),
        (None, _) => {
            Err(bad("is for pods that request huge pages of one size; name one of them, as in HugePages-2Mi"
                .into()))
        }
    }
}

/// Makes a folder with exactly this mode, whatever the umask.
pub fn make_dir(path: &Path, mode: u32) -> Result<(), Error> {
    if !path.is_dir() {
        fs::create_dir_all(path).map_err(Error::io("create", path))?;
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
            .map_err(Error::io("set the mode of", path))?;
    }
    Ok(())
}

/// Mounts a tmpfs unless one is mounted there; `size` in bytes. Gives whether it did.
pub fn mount_tmpfs(path: &Path, size: Option<i64>) -> Result<bool, Error> {
    if mounts::is_mount_point(path)? {
        return Ok(false);
    }
    let mut options = String::from("mode=0777");
    if let Some(s) = size {
        options.push_str(&format!(",size={s}"));
    }
    mount_one("tmpfs", path, &options).map_err(|e| Error::io("mount a tmpfs at", path)(e.into()))?;
    Ok(true)
}

/// Mounts a hugetlbfs with pages of `page` bytes unless it is mounted there. Gives whether it did.
fn mount_huge_pages(path: &Path, page: u64) -> Result<bool, Error> {
    let what = || format!("with pages of {} KiB", page >> 10);
    if mounts::is_mount_point(path)? {
        let there = statfs(path).map_err(|e| Error::io("look at", path)(e.into()))?;
        // Its blocks are its pages.
        let same =
            there.filesystem_type() == HUGETLBFS_MAGIC && u64::try_from(there.block_size()) == Ok(page);
        let other =
            || io::Error::other(format!("something else than a hugetlbfs {} is mounted there", what()));
        return if same { Ok(false) } else { Err(Error::io("use", path)(other())) };
    }
    match mount_one("hugetlbfs", path, &format!("pagesize={page},mode=0777")) {
        Ok(()) => Ok(true),
        Err(nix::errno::Errno::EINVAL) => Err(Error::io("mount a hugetlbfs at", path)(io::Error::other(
            format!("this kernel has none {}", what()),
        ))),
        Err(e) => Err(Error::io("mount a hugetlbfs at", path)(e.into())),
    }
}

fn mount_one(kind: &str, path: &Path, options: &str) -> nix::Result<()> {
    mount(Some(kind), path, Some(kind), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some(options))
}

/// Makes the volume; content of an earlier call stays.
pub fn set_up(path: &Path, medium: Medium, group: Option<u32>) -> Result<(), Error> {
    let mut fresh = !path.is_dir();
    make_dir(path, 0o777)?;
    // What a killed agent made without mounting it is as good as new.
    fresh |= match medium {
        Medium::Disk => false,
        Medium::Memory { size } => mount_tmpfs(path, size)?,
        Medium::HugePages { page } => mount_huge_pages(path, page)?,
    };
    if let (Some(g), true) = (group, fresh) {
        std::os::unix::fs::chown(path, None, Some(g)).map_err(Error::io("change the group of", path))?;
        // New files inherit the group.
        fs::set_permissions(path, fs::Permissions::from_mode(0o2777))
            .map_err(Error::io("set the mode of", path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::os::unix::fs::MetadataExt;

    fn medium(name: &str, pod: Value) -> Result<Medium, String> {
        let e = EmptyDirVolumeSource { medium: Some(name.into()), ..Default::default() };
        Medium::of(&e, &serde_json::from_value(pod).unwrap()).map_err(|e| e.to_string())
    }

    /// Containers with these requests, the first of which is an init container.
    fn requesting(requests: &[Value]) -> Value {
        let mut all: Vec<Value> =
            requests.iter().map(|r| json!({"name": "c", "resources": {"requests": r}})).collect();
        let init = all.remove(0);
        json!({"initContainers": [init], "containers": all})
    }

    #[test]
    fn pages_are_of_a_size_that_the_pod_requests() {
        const MI: u64 = 1 << 20;
        let (two, one) = (json!({"hugepages-2Mi": "4Mi"}), json!({"hugepages-1Gi": "1Gi"}));
        let none = || requesting(&[json!({}), json!({"memory": "1Gi"})]);
        let small = || requesting(&[json!({}), two.clone(), two.clone()]);
        let both = || requesting(&[one.clone(), two.clone()]);
        for (name, pod, wanted) in [
            ("HugePages", small(), Ok(2 * MI)),
            ("HugePages", requesting(std::slice::from_ref(&one)), Ok(1024 * MI)),
            ("HugePages-2Mi", small(), Ok(2 * MI)),
            ("HugePages-2Mi", both(), Ok(2 * MI)),
            ("HugePages-1Gi", both(), Ok(1024 * MI)),
            ("HugePages-1024Mi", both(), Ok(1024 * MI)),
            ("HugePages", both(), Err("of one size; name one of them")),
            ("HugePages", none(), Err("HugePages is for pods that request huge pages")),
            ("HugePages-1Gi", small(), Err("of this size")),
            ("HugePages-2Mi", none(), Err("of this size")),
            ("HugePages-", small(), Err("names no page size")),
            ("HugePages-3Mi", small(), Err("names no page size")),
            ("HugePages-0", small(), Err("names no page size")),
            ("HugePages-big", small(), Err("names no page size")),
            ("HugePages2Mi", small(), Err("is not known")),
            ("hugepages", small(), Err("is not known")),
            ("HugePages", requesting(&[json!({"hugepages-x": "1"})]), Err("hugepages-x is no size")),
        ] {
            match (medium(name, pod.clone()), wanted) {
                (Ok(m), Ok(page)) => assert_eq!(m, Medium::HugePages { page }, "{name} {pod}"),
                (Err(said), Err(part)) => assert!(said.contains(part), "{name} {pod}: {said}"),
                (got, _) => panic!("{name} {pod}: {got:?}"),
            }
        }
        let limited =
            json!({"containers": [{"name": "c", "resources": {"limits": {"hugepages-2Mi": "2Mi"}}}]});
        assert_eq!(medium("HugePages", limited), Ok(Medium::HugePages { page: 2 * MI }), "a limit alone");
        let of_pod = json!({"resources": {"requests": two}, "containers": [{"name": "c"}]});
        assert_eq!(
            medium("HugePages", of_pod),
            Ok(Medium::HugePages { page: 2 * MI }),
            "of the pod as a whole"
        );
    }

    #[test]
    fn other_media() {
        let of = |e: Value| Medium::of(&serde_json::from_value(e).unwrap(), &PodSpec::default()).unwrap();
        assert_eq!(of(json!({})), Medium::Disk);
        assert_eq!(of(json!({"sizeLimit": "1Mi"})), Medium::Disk);
        assert_eq!(of(json!({"medium": "Memory"})), Medium::Memory { size: None });
        let limited = of(json!({"medium": "Memory", "sizeLimit": "1Mi"}));
        assert_eq!(limited, Medium::Memory { size: Some(1 << 20) });
    }

    /// Without reserved pages there is nothing to write to, but the file system is there.
    #[test]
    fn huge_pages_are_mounted_once_and_go_with_the_volume() {
        let t = tempfile::tempdir().unwrap();
        let pod = t.path().join("pod");
        let path = pod.join("volumes/kubernetes.io~empty-dir/huge");
        let two = Medium::HugePages { page: 2 << 20 };
        // A killed agent may have got as far as this.
        make_dir(&path, 0o777).unwrap();
        for _ in 0..2 {
            set_up(&path, two, Some(1234)).unwrap();
            let there = statfs(&path).unwrap();
            assert_eq!((there.filesystem_type(), there.block_size() as u64), (HUGETLBFS_MAGIC, 2 << 20));
            let m = fs::metadata(&path).unwrap();
            assert_eq!((m.gid(), m.mode() & 0o7777), (1234, 0o2777));
            assert_eq!(mounts::below(&pod).unwrap(), [path.canonicalize().unwrap()], "mounted once");
        }
        for other in [1 << 30, 4096] {
            let said = set_up(&path, Medium::HugePages { page: other }, None).unwrap_err();
            let said = orlop_base::telemetry::chain(&said).to_string();
            assert!(said.contains("something else than a hugetlbfs"), "{said}");
        }
        // As the successor of a killed agent does for a pod that is gone: it knows the folder alone.
        mounts::unmount_below(&pod).unwrap();
        mounts::remove_tree(&pod).unwrap();
        assert!(!pod.exists());

        let none = set_up(&path, Medium::HugePages { page: 4096 }, None).unwrap_err();
        let said = orlop_base::telemetry::chain(&none).to_string();
        assert!(said.contains("this kernel has none with pages of 4 KiB"), "{said}");
        mounts::remove_tree(&pod).unwrap();
    }
}
