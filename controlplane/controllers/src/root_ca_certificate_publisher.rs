//! Publishes the cluster's CA to every namespace as the ConfigMap `kube-root-ca.crt`, which projected tokens mount.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use orlop_api::meta::{Key, is_terminating};
use orlop_client::{Change, Outcome, Queue};

use crate::runtime::{Builders, Context, Result, has_code, namespace_ends};

pub(crate) const NAME: &str = "kube-root-ca.crt";
const FILE: &str = "ca.crt";
const WHY: (&str, &str) = (
    "kubernetes.io/description",
    "The CA that signs the API server's certificate; kept here so that pods can verify it.",
);

pub(crate) struct Controller {
    queue: Queue<String>,
}

impl Controller {
    pub fn new(b: &mut Builders) -> Controller {
        let queue = Queue::default();
        let q = queue.clone();
        b.namespaces.add_handler(move |c: &Change<Namespace>| {
            q.add(c.object().metadata.name.clone().unwrap_or_default());
        });
        let q = queue.clone();
        b.root_ca.add_handler(move |c: &Change<ConfigMap>| {
            if !matches!(c, Change::Added(_)) {
                q.add(c.object().metadata.namespace.clone().unwrap_or_default());
            }
        });
        Controller { queue }
    }

    pub fn start(self, context: &Context, root_ca: &str) {
        let (ctx, ca) = (context.clone(), Arc::<str>::from(root_ca));
        self.queue.run(&context.tasks, "root-ca-certificate-publisher", 2, move |namespace| {
            reconcile(ctx.clone(), ca.clone(), namespace)
        });
    }
}

async fn reconcile(ctx: Context, ca: Arc<str>, namespace: String) -> Result {
    let Some(ns) = ctx.informers.namespaces.get(&Key::new("", &*namespace)) else { return Ok(Outcome::Done) };
    if is_terminating(&ns.metadata) {
        return Ok(Outcome::Done);
    }
    let api: Api<ConfigMap> = Api::namespaced(ctx.client.clone(), &namespace);
    let data = BTreeMap::from([(FILE.to_owned(), ca.to_string())]);
    match ctx.informers.root_ca.get(&Key::new(&*namespace, NAME)) {
        Some(cm) if cm.data.as_ref() == Some(&data) => {}
        Some(_) => {
            let patch = serde_json::json!({"data": data});
            api.patch(NAME, &PatchParams::default(), &Patch::Merge(&patch)).await?;
        }
        None => {
            let mut cm = ConfigMap { data: Some(data), ..Default::default() };
            cm.metadata.name = Some(NAME.into());
            cm.metadata.annotations = Some(BTreeMap::from([(WHY.0.to_owned(), WHY.1.to_owned())]));
            match api.create(&PostParams::default(), &cm).await {
                Err(e) if !has_code(&e, 409) && !has_code(&e, 404) && !namespace_ends(&e) => {
                    return Err(e.into());
                }
                _ => {}
            }
        }
    }
    Ok(Outcome::Done)
}
