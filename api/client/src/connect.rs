//! From a kubeconfig file to a client.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};

/// Why no client could be made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("cannot use the kubeconfig {path}; check that it exists and names a cluster and a user", path = path.display())]
    Kubeconfig { path: PathBuf, source: KubeconfigError },
    #[error("cannot set up the connection that {path} describes", path = path.display())]
    Client { path: PathBuf, source: kube::Error },
}

/// A client for the current context of a kubeconfig file. Does not contact the server.
pub async fn client_from_kubeconfig(path: &Path) -> Result<kube::Client, ConnectError> {
    let bad = |source| ConnectError::Kubeconfig { path: path.to_owned(), source };
    let file = Kubeconfig::read_from(path).map_err(bad)?;
    let mut config =
        kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(bad)?;
    config.connect_timeout = Some(Duration::from_secs(10));
    // Watches are quiet for longer than the default; the watcher has its own dead-connection check.
    config.read_timeout = None;
    config.write_timeout = Some(Duration::from_secs(30));
    kube::Client::try_from(config).map_err(|source| ConnectError::Client { path: path.to_owned(), source })
}
