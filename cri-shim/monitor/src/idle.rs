//! Less memory while nothing happens. `unsafe` for madvise.
//!
//! Starting maps most of the program's code, of which the event loop needs a few pages. They are clean pages of a file: given back,
//! those that are needed again come from the page cache, which all monitors share.

use std::time::Duration;

/// Quiet for so long counts as idle.
pub const AFTER: Duration = Duration::from_secs(2);

/// Unmaps the pages of the program's code and constants, and returns what the heap does not use.
pub fn give_back_pages() {
    // SAFETY: the callback is called during this call only, with headers of loaded objects.
    unsafe {
        libc::dl_iterate_phdr(Some(of_object), std::ptr::null_mut());
        #[cfg(target_env = "gnu")]
        libc::malloc_trim(0);
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
        let text = format!("{:?}", crate::frame::Decoder::default());
        let before = resident();
        give_back_pages();
        // Other tests run meanwhile and map theirs again.
        assert!(resident() <= before + 4096, "{before}");
        assert_eq!(format!("{:?}", crate::frame::Decoder::default()), text);
    }
}
