//! Who a container runs as: ids as given, names looked up in the image's own files.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use orlop_proto::cri;
use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::invalid;
use crate::error::{Error, Result};
use crate::store::records::User;

/// Longest account file that is read; hostile images must not fill our memory.
const MAX_FILE: u64 = 8 << 20;

/// The image's account files.
#[derive(Clone, Debug, Default)]
pub(crate) struct Accounts {
    pub passwd: String,
    pub group: String,
}

impl Accounts {
    /// Reads `/etc/passwd` and `/etc/group` below `rootfs`, whose symbolic links cannot lead out of it.
    pub fn read(rootfs: &Path) -> Result<Accounts> {
        Ok(Accounts { passwd: read_inside(rootfs, "etc/passwd")?, group: read_inside(rootfs, "etc/group")? })
    }
}

fn read_inside(rootfs: &Path, name: &str) -> Result<String> {
    let at = rootfs.join(name);
    let root = File::open(rootfs).map_err(Error::io("open", rootfs))?;
    // Non-blocking: a FIFO in the image must not hold us up.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let opened = rustix::fs::openat2(&root, name, flags, Mode::empty(), ResolveFlags::IN_ROOT);
    let file = match opened {
        Ok(fd) => File::from(fd),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(String::new()),
        Err(e) => return Err(Error::io("open", &at)(e.into())),
    };
    if !file.metadata().map_err(Error::io("look at", &at))?.is_file() {
        return Ok(String::new());
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut bytes).map_err(Error::io("read", &at))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

struct Passwd<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
}

fn passwd(text: &str) -> impl Iterator<Item = Passwd<'_>> {
    text.lines().filter_map(|l| {
        let mut f = l.split(':');
        let name = f.next()?;
        let uid = f.nth(1)?.parse().ok()?;
        let gid = f.next()?.parse().ok()?;
        Some(Passwd { name, uid, gid })
    })
}

/// Name, id and members.
fn groups(text: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    text.lines().filter_map(|l| {
        let mut f = l.split(':');
        let name = f.next()?;
        let gid = f.nth(1)?.parse().ok()?;
        Some((name, gid, f.next().unwrap_or("")))
    })
}

/// Ids beyond what the kernel takes, and -1, are refused, wherever they come from (CVE-2024-40635: a huge id must not wrap round to
/// root, nor must "no change", which -1 is for the kernel, keep root's).
fn id(what: &str, value: i64) -> Result<u32> {
    u32::try_from(value)
        .ok()
        .filter(|v| *v <= i32::MAX as u32)
        .ok_or_else(|| invalid(format!("{what} {value} is not between 0 and {}", i32::MAX)))
}

fn group_id(group: &str, accounts: &Accounts) -> Result<u32> {
    if let Some((_, gid, _)) = groups(&accounts.group).find(|(n, ..)| *n == group) {
        return id("group id", i64::from(gid));
    }
    match group.parse::<i64>() {
        Ok(n) => id("group id", n),
        Err(_) => Err(invalid(format!("group {group:?} is not in the image's /etc/group"))),
    }
}

/// The user of a container: the CRI's choice, else the image's `User`, else root.
///
/// Supplemental groups: the given ones, and with the Merge policy also those the image's /etc/group puts the user in (KEP-3619).
pub(crate) fn resolve(
    security: &cri::LinuxContainerSecurityContext,
    image_user: &str,
    accounts: &Accounts,
) -> Result<User> {
    let (mut user_part, mut group_part) = (image_user, None);
    if let Some((u, g)) = image_user.split_once(':') {
        (user_part, group_part) = (u, Some(g).filter(|g| !g.is_empty()));
    }
    let text;
    if let Some(uid) = &security.run_as_user {
        text = uid.value.to_string();
        (user_part, group_part) = (&text, None);
    } else if !security.run_as_username.is_empty() {
        (user_part, group_part) = (&security.run_as_username, None);
    } else if security.run_as_group.is_some() && image_user.is_empty() {
        return Err(invalid("run_as_group needs run_as_user or run_as_username"));
    }
    let numeric = user_part.parse::<i64>().ok();
    let entry = match numeric {
        Some(n) => {
            let uid = id("user id", n)?;
            passwd(&accounts.passwd).find(|p| p.uid == uid)
        }
        None if user_part.is_empty() => passwd(&accounts.passwd).find(|p| p.uid == 0),
        None => Some(
            passwd(&accounts.passwd)
                .find(|p| p.name == user_part)
                .ok_or_else(|| invalid(format!("user {user_part:?} is not in the image's /etc/passwd")))?,
        ),
    };
    let uid = match (&entry, numeric) {
        (_, Some(n)) => id("user id", n)?,
        (Some(e), None) => id("user id", i64::from(e.uid))?,
        (None, None) => 0,
    };
    let gid = match (&security.run_as_group, group_part) {
        (Some(g), _) => id("group id", g.value)?,
        (None, Some(g)) => group_id(g, accounts)?,
        (None, None) => entry.as_ref().map_or(Ok(0), |e| id("group id", i64::from(e.gid)))?,
    };
    let mut all = Vec::new();
    let mut add = |g: u32| {
        if !all.contains(&g) {
            all.push(g);
        }
    };
    // Part of the supplementary set, as initgroups(3) has it.
    add(gid);
    for g in &security.supplemental_groups {
        add(id("supplemental group", *g)?);
    }
    if security.supplemental_groups_policy() == cri::SupplementalGroupsPolicy::Merge
        && let Some(entry) = &entry
    {
        for (_, g, members) in groups(&accounts.group) {
            if members.split(',').any(|m| m == entry.name) {
                add(id("group id", i64::from(g))?);
            }
        }
    }
    Ok(User { uid, gid, groups: all })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts() -> Accounts {
        Accounts {
            passwd: "root:x:0:0:root:/root:/bin/sh\nwww:x:33:34::/:/bin/sh\nbig:x:4294967295:0::/:\nbroken\n\
                     same:x:7:4294967295::/:\nmember:x:8:8::/:\n"
                .into(),
            group: "root:x:0:\nweb:x:34:\nextra:x:50:www,other\nnone:x:\nall:x:4294967295:member\n".into(),
        }
    }

    fn security(user: Option<i64>, name: &str, group: Option<i64>) -> cri::LinuxContainerSecurityContext {
        cri::LinuxContainerSecurityContext {
            run_as_user: user.map(|value| cri::Int64Value { value }),
            run_as_username: name.into(),
            run_as_group: group.map(|value| cri::Int64Value { value }),
            supplemental_groups: vec![1000],
            ..Default::default()
        }
    }

    #[test]
    fn users() {
        /// run_as_user, run_as_username, run_as_group, the image's user, and what comes of it.
        type Row = (Option<i64>, &'static str, Option<i64>, &'static str, Option<(u32, u32, &'static [u32])>);
        let table: &[Row] = &[
            (None, "", None, "", Some((0, 0, &[0, 1000]))),
            (None, "", None, "www", Some((33, 34, &[34, 1000, 50]))),
            (None, "", None, "33", Some((33, 34, &[34, 1000, 50]))),
            (None, "", None, "www:extra", Some((33, 50, &[50, 1000]))),
            (None, "", None, "77:88", Some((77, 88, &[88, 1000]))),
            (None, "", None, "77", Some((77, 0, &[0, 1000]))),
            (Some(5), "", None, "www", Some((5, 0, &[0, 1000]))),
            (Some(33), "", Some(9), "root", Some((33, 9, &[9, 1000, 50]))),
            (None, "www", None, "root", Some((33, 34, &[34, 1000, 50]))),
            (None, "nobody", None, "", None),
            (None, "", Some(5), "", None),
            (None, "", None, "www:nogroup", None),
            (None, "", None, "4294967296", None),
            (None, "", None, "big", None),
            (None, "", None, "same", None),
            (None, "", None, "7", None),
            (None, "", None, "0:all", None),
            (None, "", None, "member", None),
            (Some(-1), "", None, "", None),
        ];
        for (user, name, group, image, want) in table {
            let got = resolve(&security(*user, name, *group), image, &accounts()).ok();
            let want = want.map(|(uid, gid, groups)| User { uid, gid, groups: groups.to_vec() });
            assert_eq!(got, want, "{user:?} {name:?} {group:?} {image:?}");
        }
    }

    #[test]
    fn strict_groups_leave_the_images_out() {
        let mut s = security(None, "www", None);
        s.supplemental_groups_policy = cri::SupplementalGroupsPolicy::Strict as i32;
        assert_eq!(resolve(&s, "", &accounts()).unwrap().groups, [34, 1000]);
    }

    #[test]
    fn odd_account_files_neither_block_nor_fill_memory() {
        let dir = tempfile::tempdir().unwrap();
        let etc = dir.path().join("etc");
        std::fs::create_dir(&etc).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            etc.join("passwd"),
            rustix::fs::FileType::Fifo,
            Mode::from(0o644),
            0,
        )
        .unwrap();
        File::create(etc.join("group")).unwrap().set_len(1 << 40).unwrap();
        let read = Accounts::read(dir.path()).unwrap();
        assert_eq!(read.passwd, "");
        assert!(read.group.len() <= 8 << 20);
        std::fs::remove_file(etc.join("passwd")).unwrap();
        std::fs::create_dir(etc.join("passwd")).unwrap();
        assert_eq!(Accounts::read(dir.path()).unwrap().passwd, "");
    }

    #[test]
    fn links_in_the_image_lead_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("../../../../../../etc/passwd", dir.path().join("etc/passwd")).unwrap();
        std::os::unix::fs::symlink("/etc/group", dir.path().join("etc/group")).unwrap();
        // Both resolve to themselves inside the root, which is a loop.
        assert!(Accounts::read(dir.path()).is_err());
    }
}
