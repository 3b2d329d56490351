//! Servers and clients whose speed is measured.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};

use super::super::{Result, text};
use super::world::{Net, POD};

/// Answers a byte with a byte.
pub const PING: u16 = 8080;
/// Takes in whatever comes.
pub const SINK: u16 = 8081;
const CHUNK: usize = 256 * 1024;
const PATIENCE: Duration = Duration::from_secs(5);

/// Starts both servers in a pod; they run until this process ends.
pub fn serve(pod: &Net) -> Result {
    let listeners = pod.run(|| {
        let listen = |port| TcpListener::bind((POD, port)).map_err(text);
        Ok([listen(PING)?, listen(SINK)?])
    })?;
    for (listener, size) in listeners.into_iter().zip([1, CHUNK]) {
        pod.spawn(move || {
            let mut buffer = vec![0; size];
            for mut s in listener.incoming().flatten() {
                s.set_nodelay(true).map_err(text)?;
                while let Ok(1..) = s.read(&mut buffer) {
                    if size == 1 && s.write_all(&buffer).is_err() {
                        break;
                    }
                }
            }
            Ok(())
        });
    }
    Ok(())
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

/// MiB a second into one connection.
pub fn bulk(to: SocketAddr, time: Duration) -> Result<f64> {
    let mut s = TcpStream::connect_timeout(&to, PATIENCE).map_err(|e| format!("{to}: {e}"))?;
    let data = vec![0; CHUNK];
    let (begin, mut sent) = (Instant::now(), 0.0);
    while begin.elapsed() < time {
        s.write_all(&data).map_err(text)?;
        sent += CHUNK as f64;
    }
    Ok(sent / begin.elapsed().as_secs_f64() / f64::from(1 << 20))
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
