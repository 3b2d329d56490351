//! A web server small enough to live alone in an image: `/` answers with the pod's name and the greeting of a mounted
//! ConfigMap, `/healthz` with ok. It ends on SIGTERM after the requests under way.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};

const GREETING: &str = "/etc/demo/greeting";

fn answer(path: &str) -> (&'static str, String) {
    match path {
        "/" => {
            let name = |var: &str| std::env::var(var).unwrap_or_else(|_| "unknown".into());
            let greeting = std::fs::read_to_string(GREETING).unwrap_or_default();
            ("200 OK", format!("{} on {}: {}\n", name("POD_NAME"), name("NODE_NAME"), greeting.trim()))
        }
        "/healthz" => ("200 OK", "ok\n".into()),
        _ => ("404 Not Found", "not found\n".into()),
    }
}

fn serve(stream: TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.set_write_timeout(Some(Duration::from_secs(5)))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    std::io::Read::take(&mut reader, 8192).read_line(&mut line)?;
    let path = line.split_whitespace().nth(1).unwrap_or("/").to_owned();
    // The headers are read so that closing does not reset the connection under the client.
    let mut header = String::new();
    for _ in 0..100 {
        header.clear();
        if std::io::Read::take(&mut reader, 8192).read_line(&mut header)? <= 2 {
            break;
        }
    }
    let (status, body) = answer(&path);
    let mut out = stream;
    write!(
        out,
        "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

fn main() -> std::io::Result<()> {
    // PID 1 of a container gets no default signal actions, so the signals are waited for.
    let mut ends = SigSet::empty();
    ends.add(Signal::SIGTERM);
    ends.add(Signal::SIGINT);
    ends.thread_block()?;
    std::thread::spawn(move || {
        if let Ok(signal) = ends.wait() {
            println!("{signal}: ending");
            std::process::exit(0);
        }
    });
    let address = std::env::args().nth(1).unwrap_or_else(|| "0.0.0.0:8080".into());
    let listener = TcpListener::bind(&address)?;
    println!("serving on {address}");
    for stream in listener.incoming() {
        match stream {
            Ok(s) => {
                if let Err(e) = serve(s) {
                    eprintln!("request failed: {e}");
                }
            }
            Err(e) => eprintln!("accept failed: {e}"),
        }
    }
    Ok(())
}
