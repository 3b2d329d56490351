//! Pulls an image into an empty store and prints how long it took and the most memory it needed:
//! `cargo run --release -p orlop-images --example pull -- FOLDER REFERENCE`.

use std::time::Instant;

use orlop_images::{ImageStore, Options};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(folder), Some(reference)) = (args.next(), args.next()) else {
        return Err("usage: pull FOLDER REFERENCE".into());
    };
    let store = ImageStore::open(folder.as_ref(), Options { certs_dir: None, ..Options::default() }).await?;
    let memory = |key: &str| {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        status.lines().find_map(|l| Some(l.strip_prefix(key)?.trim().to_owned())).unwrap_or_default()
    };
    let idle = memory("VmRSS:");
    let start = Instant::now();
    let image = store.pull(&reference, None).await?;
    println!("{} in {:?}", image.id, start.elapsed());
    println!("resident before: {idle}, at most: {}, after: {}", memory("VmHWM:"), memory("VmRSS:"));
    Ok(())
}
