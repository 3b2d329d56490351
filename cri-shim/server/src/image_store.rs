//! The image store's own service (`images.proto`): archives in and out, garbage collection.

use std::path::{Path, PathBuf};
use std::pin::Pin;

use futures::{Stream, StreamExt};
use orlop_proto::images;
use orlop_proto::images::images_server::Images;
use orlop_proto::images::import_request::Body;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::{Request, Response, Status, Streaming};

use crate::error::{Error, Result};
use crate::runtime::{Runtime, new_id};
use crate::service::Service;

/// Bytes per message of an export; far below the message limit.
const CHUNK: usize = 1 << 20;

/// A file that goes with its name.
struct Transfer(PathBuf);

impl Drop for Transfer {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_file(&self.0)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(file = %self.0.display(), error = %e, "could not remove an archive; the next start does");
        }
    }
}

impl Runtime {
    fn transfer(&self) -> Result<Transfer> {
        let dir = self.config.transfer_dir();
        std::fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
        Ok(Transfer(dir.join(format!("{}.tar", new_id()))))
    }

    /// Refuses a caller that means another store than this one.
    fn check_store(&self, meant: &str) -> Result<()> {
        let here = self.images.root();
        let same = |a: &Path, b: &Path| a == b || a.canonicalize().ok() == b.canonicalize().ok();
        if meant.is_empty() || same(Path::new(meant), here) {
            return Ok(());
        }
        Err(Error::Store { meant: meant.into(), here: here.to_owned() })
    }

    async fn import(
        &self,
        mut from: Streaming<images::ImportRequest>,
    ) -> Result<images::ImportResponse, Status> {
        let invalid = |what: &str| Status::from(Error::Invalid(what.to_owned()));
        let Some(images::ImportRequest { body: Some(Body::Start(start)) }) = from.message().await? else {
            return Err(invalid("the first message of an import is its start"));
        };
        self.check_store(&start.store)?;
        let archive = self.transfer()?;
        let mut file = File::create(&archive.0).await.map_err(Error::io("create", &archive.0))?;
        while let Some(message) = from.message().await? {
            let Some(Body::Data(data)) = message.body else {
                return Err(invalid("an import has one start; data follows"));
            };
            file.write_all(&data).await.map_err(Error::io("write", &archive.0))?;
        }
        file.flush().await.map_err(Error::io("write", &archive.0))?;
        let name = Some(start.name.as_str()).filter(|n| !n.is_empty());
        let imported = self.images.import(&archive.0, name).await.map_err(Error::from)?;
        let images = imported.iter().map(|i| images::ImportedImage {
            id: i.id.clone(),
            repo_tags: i.repo_tags.clone(),
            repo_digests: i.repo_digests.clone(),
            size: i.size,
        });
        Ok(images::ImportResponse { images: images.collect() })
    }

    async fn collect_garbage(
        &self,
        request: images::CollectGarbageRequest,
    ) -> Result<images::CollectGarbageResponse> {
        self.check_store(&request.store)?;
        let report = self.images.gc().await?;
        Ok(images::CollectGarbageResponse {
            layers: report.layers as u64,
            blobs: report.blobs as u64,
            bytes: report.bytes,
        })
    }
}

type Exported = Pin<Box<dyn Stream<Item = Result<images::ExportResponse, Status>> + Send>>;

/// The file's bytes; the file goes when the stream does.
fn chunks(file: File, archive: Transfer) -> Exported {
    let stream = futures::stream::try_unfold((file, archive), |(mut file, archive)| async move {
        let mut data = vec![0; CHUNK];
        let n = file.read(&mut data).await.map_err(|e| Status::from(Error::io("read", &archive.0)(e)))?;
        data.truncate(n);
        Ok((n > 0).then_some((images::ExportResponse { data }, (file, archive))))
    });
    stream.boxed()
}

#[tonic::async_trait]
impl Images for Service {
    async fn import(
        &self,
        r: Request<Streaming<images::ImportRequest>>,
    ) -> Result<Response<images::ImportResponse>, Status> {
        self.0.import(r.into_inner()).await.map(Response::new)
    }

    type ExportStream = Exported;
    async fn export(
        &self,
        r: Request<images::ExportRequest>,
    ) -> Result<Response<Self::ExportStream>, Status> {
        let request = r.into_inner();
        let names: Vec<&str> = request.references.iter().map(String::as_str).collect();
        if names.is_empty() {
            return Err(Error::Invalid("no image is named".into()).into());
        }
        let archive = self.0.transfer()?;
        self.0.images.export(&names, &archive.0).await.map_err(Error::from)?;
        let file = File::open(&archive.0).await.map_err(Error::io("open", &archive.0))?;
        Ok(Response::new(chunks(file, archive)))
    }

    async fn collect_garbage(
        &self,
        r: Request<images::CollectGarbageRequest>,
    ) -> Result<Response<images::CollectGarbageResponse>, Status> {
        Ok(Response::new(self.0.collect_garbage(r.into_inner()).await?))
    }
}
