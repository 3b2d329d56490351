//! What others see as this process's arguments. A server finds the monitor of a folder by them.

use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Puts `--dir DIR` in the place of all arguments after the program's name, which have to be as long.
///
/// The kernel shows the memory that the arguments were put in; to name another place (PR_SET_MM) takes CAP_SYS_RESOURCE.
pub fn serve(dir: &Path) -> io::Result<()> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let (from, to) = places(&stat).ok_or(io::ErrorKind::InvalidData)?;
    let shown = fs::read("/proc/self/cmdline")?;
    let name = shown.iter().position(|b| *b == 0).map_or(shown.len(), |at| at + 1) as u64;
    let mut text = [b"--dir\0", dir.as_os_str().as_bytes(), b"\0"].concat();
    let room = to.saturating_sub(from).saturating_sub(name) as usize;
    if text.len() > room {
        let what = format!("there is room for {room} bytes of arguments, {} needs more", dir.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    text.resize(room, 0);
    File::options().write(true).open("/proc/self/mem")?.write_all_at(&text, from + name)
}

/// Pure: where the arguments begin and end, by proc_pid_stat(5).
fn places(stat: &str) -> Option<(u64, u64)> {
    // The name before that may hold anything.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split_ascii_whitespace().skip(45);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_lie_where_the_kernel_says() {
        let (from, to) = places(&fs::read_to_string("/proc/self/stat").unwrap()).unwrap();
        let mut there = vec![0; (to - from) as usize];
        File::open("/proc/self/mem").unwrap().read_exact_at(&mut there, from).unwrap();
        assert_eq!(there, fs::read("/proc/self/cmdline").unwrap());
        assert_eq!(places("1 (a) b) S 1"), None);
    }
}
