//! Who sees whose mounts. libcontainer gives every mount the propagation of the container's root; what a mount itself asks for
//! (`private`, `rslave`, ... in its options) is set here, once all are there.

use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use oci_spec::runtime::{Mount, Spec};

/// What an option asks for. `shared` is not among them: a shared mount is one already when the root is, and cannot become one later.
fn flags(option: &str) -> Option<MsFlags> {
    match option {
        "private" => Some(MsFlags::MS_PRIVATE),
        "rprivate" => Some(MsFlags::MS_PRIVATE | MsFlags::MS_REC),
        "slave" => Some(MsFlags::MS_SLAVE),
        "rslave" => Some(MsFlags::MS_SLAVE | MsFlags::MS_REC),
        _ => None,
    }
}

/// The last of a mount's options wins, as with mount(8).
fn wanted(m: &Mount) -> Option<MsFlags> {
    m.options().iter().flatten().rev().find_map(|o| flags(o))
}

/// To be called in the container, after its root has become `/` and while the process may still change mounts.
pub(crate) fn set(spec: &Spec) -> Result<(), (i32, String)> {
    for m in spec.mounts().iter().flatten() {
        let Some(flags) = wanted(m) else { continue };
        let at: &Path = m.destination();
        match mount(None::<&str>, at, None::<&str>, flags, None::<&str>) {
            // One that another mount hides is nobody's to see.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(e) => {
                let text = format!("cannot set the propagation of {}: {}", at.display(), e.desc());
                return Err((e as i32, text));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_option_counts() {
        let of = |options: &[&str]| {
            let mut m = Mount::default();
            m.set_options(Some(options.iter().map(|o| (*o).to_owned()).collect()));
            wanted(&m)
        };
        assert_eq!(of(&["rbind", "rprivate", "ro"]), Some(MsFlags::MS_PRIVATE | MsFlags::MS_REC));
        assert_eq!(of(&["private", "slave"]), Some(MsFlags::MS_SLAVE));
        assert_eq!(of(&["rbind", "rshared"]), None);
    }
}
