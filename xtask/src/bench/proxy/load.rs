//! Servers and clients whose speed is measured.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::socket::{setsockopt, sockopt};
use nix::unistd::Pid;
use serde_json::Value;

use super::super::{Result, text};
use super::world::{Net, POD};

/// Answers a byte with a byte.
pub const PING: u16 = 8080;
/// iperf3's.
pub const BULK: u16 = 8081;
const PATIENCE: Duration = Duration::from_secs(5);

/// Where a server and its client are measured: on one processor, so that none is ever woken by another one, which takes as
/// long as all that is measured and differs from time to time.
fn processor() -> Result<usize> {
    let set = sched_getaffinity(Pid::from_raw(0)).map_err(text)?;
    let last = (0..CpuSet::count()).rev().find(|i| set.is_set(*i).unwrap_or(false));
    Ok(last.unwrap_or(0))
}

/// Keeps this thread there.
fn stay() -> Result {
    let mut one = CpuSet::new();
    one.set(processor()?).map_err(text)?;
    sched_setaffinity(Pid::from_raw(0), &one).map_err(text)
}

/// Starts the server that answers in a pod; it runs until this process ends.
pub fn serve(pod: &Net) -> Result {
    let listener = pod.run(|| TcpListener::bind((POD, PING)).map_err(text))?;
    pod.spawn(move || {
        stay()?;
        for mut s in listener.incoming().flatten() {
            s.set_nodelay(true).map_err(text)?;
            let mut byte = [0];
            while let Ok(1) = s.read(&mut byte) {
                if s.write_all(&byte).is_err() {
                    break;
                }
            }
        }
        Ok(())
    });
    Ok(())
}

/// Starts iperf3's server in a pod.
pub fn serve_bulk(pod: &Net) -> Result<Child> {
    let mut c = pod.command(Path::new("iperf3"));
    c.args(["--server", "--port", &BULK.to_string()]);
    c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().map_err(text)
}

fn reset_on_close(s: &TcpStream) -> Result {
    let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(&s.as_fd(), sockopt::Linger, &linger).map_err(text)
}

fn exchange(s: &mut TcpStream) -> Result {
    s.write_all(b"?").map_err(text)?;
    s.read_exact(&mut [0]).map_err(text)
}

/// How often a second by the median of times: what else runs on the machine shows in a mean.
fn typical_rate(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times.get(times.len() / 2).map_or(0.0, |t| 1.0 / t.as_secs_f64())
}

/// Connect, a byte each way, reset: how often a second.
pub fn connections(to: SocketAddr, time: Duration) -> Result<f64> {
    stay()?;
    let (begin, mut times) = (Instant::now(), Vec::new());
    while begin.elapsed() < time {
        let one = Instant::now();
        let mut s = TcpStream::connect_timeout(&to, PATIENCE).map_err(|e| format!("{to}: {e}"))?;
        s.set_nodelay(true).map_err(text)?;
        exchange(&mut s)?;
        reset_on_close(&s)?;
        drop(s);
        times.push(one.elapsed());
    }
    Ok(typical_rate(times))
}

/// A byte there and back on one connection: how often a second.
pub fn exchanges(to: SocketAddr, time: Duration) -> Result<f64> {
    stay()?;
    let mut s = TcpStream::connect_timeout(&to, PATIENCE).map_err(|e| format!("{to}: {e}"))?;
    s.set_nodelay(true).map_err(text)?;
    let (begin, mut times) = (Instant::now(), Vec::new());
    while begin.elapsed() < time {
        let one = Instant::now();
        exchange(&mut s)?;
        times.push(one.elapsed());
    }
    reset_on_close(&s)?;
    Ok(typical_rate(times))
}

/// MiB that arrive over one connection of iperf3, which counts time in whole seconds only, for each second of processor time that client and
/// server spend: whoever else wants the processor slows them down and changes nothing about that.
pub fn bulk(to: SocketAddr, _: Duration) -> Result<f64> {
    let (ip, port) = (to.ip().to_string(), to.port().to_string());
    let here = processor()?;
    let affinity = format!("{here},{here}");
    let out = Command::new("iperf3")
        .args(["--client", &ip, "--port", &port, "--bytes", "256M", "--json", "--affinity", &affinity])
        .stdin(Stdio::null())
        .output()
        .map_err(text)?;
    let said: Value = serde_json::from_slice(&out.stdout).map_err(text)?;
    let end = &said["end"];
    let bits = end["sum_received"]["bits_per_second"].as_f64();
    let share = |whose: &str| end["cpu_utilization_percent"][whose].as_f64();
    let figures = bits.zip(share("host_total")).zip(share("remote_total"));
    let ((bits, here), there) = figures.ok_or_else(|| format!("iperf3 to {to}: {}", said["error"]))?;
    Ok(bits / 8.0 / f64::from(1 << 20) / ((here + there) / 100.0).max(0.01))
}

/// When a connection there first works.
pub fn first_connection(to: SocketAddr) -> Result<Instant> {
    let begin = Instant::now();
    loop {
        match TcpStream::connect_timeout(&to, PATIENCE) {
            Ok(s) => {
                let at = Instant::now();
                reset_on_close(&s)?;
                return Ok(at);
            }
            Err(e) if begin.elapsed() > PATIENCE => return Err(format!("{to}: {e}")),
            Err(_) => std::thread::sleep(Duration::from_micros(100)),
        }
    }
}

pub fn at(ip: Ipv4Addr, port: u16) -> SocketAddr {
    SocketAddr::from((ip, port))
}
