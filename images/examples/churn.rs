//! `churn STORE REFERENCE`: pulls an image, makes and removes root file systems of it and removes it, over and over, until it is
//! killed. A test looks at what that leaves.

use std::path::PathBuf;

use orlop_images::{IdMapping, ImageStore, Options, RootfsOptions, UserNamespace};

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args_os().skip(1);
    let (Some(root), Some(name)) = (args.next().map(PathBuf::from), args.next()) else {
        return Err("usage: churn STORE REFERENCE".into());
    };
    let name = name.to_string_lossy();
    let store = ImageStore::open(&root, Options { certs_dir: None, ..Options::default() }).await?;
    let map = || vec![IdMapping { container: 0, host: 100_000, length: 65536 }];
    let mapped = RootfsOptions {
        user_namespace: Some(UserNamespace { uids: map(), gids: map() }),
        ..RootfsOptions::default()
    };
    println!("working");
    loop {
        let image = store.pull(&name, None).await?;
        for (key, options) in [("plain", &RootfsOptions::default()), ("mapped", &mapped)] {
            let target = root.with_file_name("mnt").join(key);
            store.prepare_rootfs(key, &image, &target, options).await?;
        }
        store.remove_rootfs("plain").await?;
        store.remove_rootfs("mapped").await?;
        store.remove(&name).await?;
    }
}
