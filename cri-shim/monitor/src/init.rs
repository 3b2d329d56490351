//! PID 1 of a PID namespace that the pod's containers share: does nothing but reap.

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::wait::waitpid;

/// Never returns; SIGKILL from outside ends it and with it every process of the namespace.
pub fn run() -> ! {
    let _ = nix::unistd::setsid();
    let _ = prctl::set_name(c"orlop-init");
    // Containers see this process in /proc: without this, one with the same user could look into it.
    let _ = prctl::set_dumpable(false);
    let mut chld = SigSet::empty();
    chld.add(Signal::SIGCHLD);
    // Blocked, so that one that comes between waitpid and wait is not lost.
    let _ = sigprocmask(SigmaskHow::SIG_BLOCK, Some(&SigSet::all()), None);
    loop {
        match waitpid(None, None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => {
                let _ = chld.wait();
            }
        }
    }
}
