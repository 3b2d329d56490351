//! Alone in its process: others' files and locks would be copied into the processes that it starts.

use std::net::{Ipv4Addr, TcpListener};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use orlop_base::testkit::free_port;

#[test]
fn a_port_is_free_for_its_caller_while_other_threads_start_processes() {
    let done = AtomicBool::new(false);
    std::thread::scope(|threads| {
        for _ in 0..2 {
            threads.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    Command::new("true").status().unwrap();
                }
            });
        }
        let bound: Vec<_> = (0..200).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, free_port()))).collect();
        done.store(true, Ordering::Relaxed);
        let refused: Vec<_> = bound.iter().filter_map(|b| b.as_ref().err()).collect();
        assert!(refused.is_empty(), "{refused:?}");
    });
}
