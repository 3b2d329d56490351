//! Less memory for daemons. `unsafe` for malloc's settings and madvise.
//!
//! Starting a daemon, and each burst of work, maps code of which waiting for the next request needs a few pages. They are clean
//! pages of a file: given back, those that are needed again come from the page cache, at about a microsecond for 64 KiB.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// How often to look whether there is something to give back.
const LOOK: Duration = Duration::from_secs(1);
/// So little processor time between two looks counts as rest: what polling clients take.
const REST: Duration = Duration::from_millis(20);
/// Less work than this has touched too little to be worth a round, which takes a millisecond or a few.
const BURST: Duration = Duration::from_millis(50);

/// For a process that is to stay small: few heaps, and large buffers apart from them, so that they leave no holes.
pub fn keep_small() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no preconditions.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 * 1024);
    }
}

/// Unmaps the pages of the program's code and constants, and returns to the system what the heap does not use.
pub fn give_back() {
    // SAFETY: the callback is called during this call only, with headers of loaded objects.
    unsafe {
        libc::dl_iterate_phdr(Some(of_object), std::ptr::null_mut());
        #[cfg(target_env = "gnu")]
        libc::malloc_trim(0);
    }
}

/// Gives memory back each time the process rests after work, for ever. Dropping the future ends it.
pub async fn give_back_at_rest() -> std::convert::Infallible {
    let mut rest = Rest::default();
    loop {
        tokio::time::sleep(LOOK).await;
        // Every Linux has this clock.
        let worked = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::ZERO, Duration::from);
        if rest.begins(worked) {
            // Trimming a large heap takes milliseconds.
            let _ = tokio::task::spawn_blocking(give_back).await;
        }
    }
}

/// When work is followed by rest, told by processor time.
#[derive(Default)]
struct Rest {
    given_back_at: Duration,
    last: Duration,
}

impl Rest {
    /// Takes note of the processor time that the process has used since it began.
    fn begins(&mut self, worked: Duration) -> bool {
        let rests = worked.saturating_sub(self.last) < REST;
        let after_work = worked.saturating_sub(self.given_back_at) >= BURST;
        self.last = worked;
        if rests && after_work {
            self.given_back_at = worked;
        }
        rests && after_work
    }
}

unsafe extern "C" fn of_object(
    info: *mut libc::dl_phdr_info,
    _: libc::size_t,
    _: *mut libc::c_void,
) -> libc::c_int {
    // SAFETY: the C library passes a valid structure with `dlpi_phnum` headers.
    let (base, headers) = unsafe {
        let info = &*info;
        if info.dlpi_phdr.is_null() {
            return 0;
        }
        (info.dlpi_addr as usize, std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)))
    };
    const PAGE: usize = 4096;
    // What was never writable has no content but the file's; what relocations wrote to is in a writable segment.
    for h in headers.iter().filter(|h| h.p_type == libc::PT_LOAD && h.p_flags & libc::PF_W == 0) {
        let from = base + h.p_vaddr as usize;
        let (start, end) = (from.next_multiple_of(PAGE), (from + h.p_filesz as usize) & !(PAGE - 1));
        if start < end {
            // SAFETY: whole pages of a private, never written mapping of a file: the next access reads the same again.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resident() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("RssFile:")).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }

    #[test]
    fn goes_on_with_fewer_pages() {
        let before = resident();
        give_back();
        // Other tests run meanwhile and map theirs again.
        assert!(resident() <= before + 4096, "{before}");
        assert_eq!(format!("{:?}", Duration::from_millis(1500)), "1.5s");
    }

    #[test]
    fn memory_is_given_back_once_after_each_burst_of_work() {
        let mut rest = Rest::default();
        let at = [150, 400, 410, 415, 459, 500, 519, 525];
        let begins = at.map(|ms| rest.begins(Duration::from_millis(ms)));
        assert_eq!(begins, [false, false, true, false, false, false, true, false]);
    }
}
