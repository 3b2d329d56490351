//! The cluster's Services, for the environment of containers.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Service;
use kube::{Api, Client};
use orlop_base::supervise::TaskGroup;
use orlop_client::Informer;

/// How long a container waits for the first list of Services; later starts never wait.
const FIRST_LIST: Duration = Duration::from_secs(10);

/// A watched copy of all Services' addresses and ports; empty without an API server.
#[derive(Clone, Default)]
pub struct Services {
    informer: Option<Informer<Service>>,
}

impl Services {
    pub fn start(client: Option<Client>, tasks: &TaskGroup) -> Services {
        let informer = client.map(|c| {
            let trim = |s: &mut Service| {
                s.status = None;
                s.metadata.annotations = None;
                s.metadata.labels = None;
            };
            orlop_client::informer::Builder::new(Api::all(c)).trim(trim).start(tasks)
        });
        Services { informer }
    }

    /// The Services that matter to pods of a namespace; the error text is for the container's status.
    pub async fn of(&self, namespace: &str) -> Result<Vec<Arc<Service>>, String> {
        let Some(informer) = &self.informer else { return Ok(Vec::new()) };
        if tokio::time::timeout(FIRST_LIST, informer.synced()).await.is_err() {
            return Err("services have not yet been read at least once, cannot construct envvars".into());
        }
        let mut all = informer.list_namespace(namespace);
        if namespace != "default" {
            all.extend(informer.get(&orlop_api::meta::Key::new("default", "kubernetes")));
        }
        Ok(all)
    }
}
