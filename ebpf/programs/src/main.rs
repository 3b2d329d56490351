//! Orlop's service load balancer in the kernel. Built for bpfel-unknown-none by the loader's build script.
#![no_std]
#![no_main]
// For changes by one instruction that two CPUs may make at a time.
#![feature(asm_experimental_arch)]

mod direct;
mod icmp;
mod maps;
mod packet;
mod parse;
mod plain;
mod refuse;
mod rewrite;
mod select;
mod short;
mod sock;
mod xdp;

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
