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
const BURST: Duration = Duration::from_millis(20);
/// Rounds take no more than this part of the processor time that the process uses: with a large heap each may take a hundred milliseconds,
/// in which nobody else allocates.
const SHARE: u32 = 20;

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
    // Every Linux has this clock.
    let worked = || clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::ZERO, Duration::from);
    loop {
        tokio::time::sleep(LOOK).await;
        if rest.begins(worked()) {
            let _ = tokio::task::spawn_blocking(give_back).await;
            rest.ends(worked());
        }
    }
}

/// When work is followed by rest, told by processor time.
#[derive(Default)]
struct Rest {
    /// `None`: not once yet. Starting counts as work, however short it was.
    given_back_at: Option<Duration>,
    /// What the last round took.
    cost: Duration,
    last: Duration,
}

impl Rest {
    /// Takes note of the processor time that the process has used since it began.
    fn begins(&mut self, worked: Duration) -> bool {
        let rests = worked.saturating_sub(self.last) < REST;
        let burst = BURST.max(self.cost * SHARE);
        let after_work = self.given_back_at.is_none_or(|at| worked.saturating_sub(at) >= burst);
        self.last = worked;
        rests && after_work
    }

    /// A round is over. What it took itself is no work, or a costly one would be the reason for the next.
    fn ends(&mut self, worked: Duration) {
        self.cost = worked.saturating_sub(self.last);
        (self.given_back_at, self.last) = (Some(worked), worked);
    }
}

/// Where the kernel says its own object lies.
const AT_SYSINFO_EHDR: libc::c_ulong = 33;

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
    // SAFETY: a loaded object's dynamic section is mapped as long as its header says.
    let relocated = headers.iter().filter(|h| h.p_type == libc::PT_DYNAMIC).any(|h| unsafe {
        let entries = h.p_memsz as usize / size_of::<[usize; 2]>();
        let dynamic = std::slice::from_raw_parts((base + h.p_vaddr as usize) as *const [usize; 2], entries);
        has_text_relocations(dynamic.iter().copied().take_while(|[tag, _]| *tag != 0))
    });
    if relocated {
        return 0;
    }
    // SAFETY: no preconditions.
    let (page, vdso) =
        unsafe { (libc::sysconf(libc::_SC_PAGESIZE) as usize, libc::getauxval(AT_SYSINFO_EHDR) as usize) };
    // What was never writable has no content but the file's; what relocations wrote to is in a writable segment.
    for h in headers.iter().filter(|h| h.p_type == libc::PT_LOAD && h.p_flags & libc::PF_W == 0) {
        let from = base + h.p_vaddr as usize;
        if from == vdso {
            // The kernel's own object, of no file.
            continue;
        }
        let (start, end) = (from.next_multiple_of(page), (from + h.p_filesz as usize) & !(page - 1));
        if start < end {
            // SAFETY: whole pages of a private, never written mapping of a file: the next access reads the same again. The kernel refuses
            // locked ones.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
        }
    }
    0
}

/// Pure: whether a dynamic section, as pairs of tag and value, says that the loader writes to code. What it wrote would be lost.
fn has_text_relocations(mut dynamic: impl Iterator<Item = [usize; 2]>) -> bool {
    const TEXTREL: usize = 22;
    const FLAGS: usize = 30;
    const FLAG_TEXTREL: usize = 4;
    dynamic.any(|[tag, value]| tag == TEXTREL || tag == FLAGS && value & FLAG_TEXTREL != 0)
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
        let at = [150, 160, 165, 209, 250, 269, 275];
        let begins = at.map(|ms| {
            let ms = Duration::from_millis(ms);
            let begins = rest.begins(ms);
            if begins {
                rest.ends(ms);
            }
            begins
        });
        assert_eq!(begins, [false, true, false, false, false, true, false]);
    }

    #[test]
    fn a_costly_round_is_no_reason_for_another() {
        let ms = Duration::from_millis;
        let mut rest = Rest::default();
        assert!(!rest.begins(ms(1000)));
        assert!(rest.begins(ms(1010)));
        // As long as with a heap of gigabytes.
        rest.ends(ms(1110));
        let mut worked = ms(1110);
        let mut rounds = 0;
        for _ in 0..200 {
            // A second's work, then a second's rest.
            worked += ms(60);
            rest.begins(worked);
            worked += ms(1);
            if rest.begins(worked) {
                rounds += 1;
                worked += ms(100);
                rest.ends(worked);
            }
        }
        assert_eq!(rounds, 6, "a twentieth of twelve seconds");
    }

    #[test]
    fn code_that_the_loader_has_written_to() {
        let has = |entries: &[[usize; 2]]| has_text_relocations(entries.iter().copied());
        assert!(!has(&[[1, 4], [30, 8]]) && has(&[[1, 4], [22, 0]]) && has(&[[30, 12]]));
    }
}
