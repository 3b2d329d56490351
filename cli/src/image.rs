//! `orlop image`: over the CRI server's socket when it answers; archives and garbage collection also on a store that nobody has open.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::StreamExt;
use orlop_images::{Build, GcReport, ImageStore, Options};
use orlop_proto::cri;
use orlop_proto::cri::image_service_client::ImageServiceClient;
use orlop_proto::images;
use orlop_proto::images::images_client::ImagesClient;
use orlop_proto::images::import_request::Body;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tonic::transport::Channel;

use crate::args::{CriSocket, ImageCommand, StoreArgs};
use crate::values::socket_path;
use crate::{Failure, say};

const DEFAULT_STORE: &str = "/var/lib/orlop/images";
/// How long what a command has begun may take after it: layers are written to the disk.
const CLOSING: Duration = Duration::from_secs(60);
/// Bytes per message of an import.
const CHUNK: usize = 1 << 20;

async fn channel(socket: &CriSocket) -> Result<Channel, Failure> {
    let path = PathBuf::from(socket_path(&socket.endpoint));
    let endpoint = tonic::transport::Endpoint::try_from(format!("unix://{}", path.display()))?;
    Ok(endpoint.connect().await.map_err(|e| {
        format!(
            "no CRI server at {} ({}); start one or pass --endpoint",
            path.display(),
            orlop_base::telemetry::chain(&e)
        )
    })?)
}

async fn connect(socket: &CriSocket) -> Result<ImageServiceClient<Channel>, Failure> {
    Ok(ImageServiceClient::new(channel(socket).await?))
}

/// Where archives go.
enum Store {
    /// Nobody has it open.
    Folder(ImageStore),
    /// The CRI server has; the folder is the one that was asked for, if any.
    Server(ImagesClient<Channel>, String),
}

impl Store {
    /// With a folder given: that store, through the server only when it is open there. Without: the server's, else the usual folder.
    async fn open(args: &StoreArgs) -> Result<Store, Failure> {
        match &args.images_dir {
            None => match channel(&args.cri).await {
                Ok(c) => Ok(Store::Server(ImagesClient::new(c), String::new())),
                Err(_) => Ok(Store::Folder(folder(Path::new(DEFAULT_STORE)).await?)),
            },
            Some(dir) => match folder(dir).await {
                Ok(store) => Ok(Store::Folder(store)),
                Err(e) if locked(&e) => match channel(&args.cri).await {
                    Ok(c) => Ok(Store::Server(
                        ImagesClient::new(c),
                        std::path::absolute(dir)?.display().to_string(),
                    )),
                    // Somebody has it open, but not this socket's server.
                    Err(_) => Err(e.into()),
                },
                Err(e) => Err(e.into()),
            },
        }
    }
}

async fn folder(dir: &Path) -> Result<ImageStore, orlop_images::Error> {
    ImageStore::open(dir, Options::default()).await
}

fn locked(e: &orlop_images::Error) -> bool {
    matches!(e, orlop_images::Error::State(s) if matches!(**s, orlop_base::durable::Error::Locked { .. }))
}

async fn import(archive: PathBuf, name: Option<String>, args: &StoreArgs) -> Result<(), Failure> {
    match Store::open(args).await? {
        Store::Folder(store) => {
            for image in store.import(&archive, name.as_deref()).await? {
                say(format_args!("{} {}", image.id, image.repo_tags.join(" ")))?;
            }
            store.close(CLOSING).await;
        }
        Store::Server(mut client, store) => {
            if archive.is_dir() {
                return Err(format!(
                    "a running CRI server takes archives only: tar -C {} -cf FILE . and import that",
                    archive.display()
                )
                .into());
            }
            let file = tokio::fs::File::open(&archive)
                .await
                .map_err(|e| format!("cannot open {}: {e}", archive.display()))?;
            let start = images::ImportStart { name: name.unwrap_or_default(), store };
            let head = futures::stream::iter([images::ImportRequest { body: Some(Body::Start(start)) }]);
            let unread = Arc::new(OnceLock::new());
            let data =
                pieces(file, unread.clone()).map(|d| images::ImportRequest { body: Some(Body::Data(d)) });
            let answer = client.import(head.chain(data)).await;
            // The server only finds the archive incomplete.
            if let Some(e) = unread.get() {
                return Err(format!("cannot read {}: {e}", archive.display()).into());
            }
            let answer = answer.map_err(status)?;
            for image in answer.into_inner().images {
                say(format_args!("{} {}", image.id, image.repo_tags.join(" ")))?;
            }
        }
    }
    Ok(())
}

/// A file piece by piece. A read that fails ends the stream and is left in `unread`.
fn pieces(
    file: impl AsyncRead + Send + Unpin + 'static,
    unread: Arc<OnceLock<std::io::Error>>,
) -> impl futures::Stream<Item = Vec<u8>> + Send {
    futures::stream::unfold((file, unread), |(mut file, unread)| async move {
        let mut data = vec![0; CHUNK];
        let n = match file.read(&mut data).await {
            Ok(n) => n,
            Err(e) => {
                unread.get_or_init(|| e);
                0
            }
        };
        data.truncate(n);
        (n > 0).then_some((data, (file, unread)))
    })
}

async fn export(references: Vec<String>, output: &Path, args: &StoreArgs) -> Result<(), Failure> {
    match Store::open(args).await? {
        Store::Folder(store) => {
            let names: Vec<&str> = references.iter().map(String::as_str).collect();
            store.export(&names, output).await?;
        }
        Store::Server(mut client, _) => {
            let request = images::ExportRequest { references };
            let stream = client.export(request).await.map_err(status)?.into_inner();
            if let Err(e) = save(stream, output).await {
                // Half an archive is of no use; a device or pipe is not ours to remove.
                if output.is_file() {
                    let _ = std::fs::remove_file(output);
                }
                return Err(e);
            }
        }
    }
    Ok(())
}

async fn save(mut stream: tonic::Streaming<images::ExportResponse>, output: &Path) -> Result<(), Failure> {
    let failed = |e: std::io::Error| format!("cannot write {}: {e}", output.display());
    let mut file = tokio::fs::File::create(output).await.map_err(failed)?;
    while let Some(part) = stream.message().await.map_err(status)? {
        file.write_all(&part.data).await.map_err(failed)?;
    }
    Ok(file.flush().await.map_err(failed)?)
}

async fn collect_garbage(args: &StoreArgs) -> Result<(), Failure> {
    if let Some(dir) = args.images_dir.as_ref().filter(|d| !d.is_dir()) {
        return Err(format!("{} is no image store; name it by --images-dir", dir.display()).into());
    }
    let (layers, blobs, bytes) = match Store::open(args).await? {
        Store::Folder(store) => {
            let GcReport { layers, blobs, bytes } = store.gc().await?;
            store.close(CLOSING).await;
            (layers as u64, blobs as u64, bytes)
        }
        Store::Server(mut client, store) => {
            let request = images::CollectGarbageRequest { store };
            let r = client.collect_garbage(request).await.map_err(status)?.into_inner();
            (r.layers, r.blobs, r.bytes)
        }
    };
    say(format_args!("deleted {layers} layers and {blobs} blobs, {bytes} bytes"))
}

fn status(e: tonic::Status) -> Failure {
    e.message().to_owned().into()
}

fn spec(reference: String) -> Option<cri::ImageSpec> {
    Some(cri::ImageSpec { image: reference, ..Default::default() })
}

pub async fn run(command: ImageCommand) -> Result<(), Failure> {
    match command {
        ImageCommand::Pull { reference, cri } => {
            let request = cri::PullImageRequest { image: spec(reference), ..Default::default() };
            let answer = connect(&cri).await?.pull_image(request).await.map_err(status)?;
            say(answer.into_inner().image_ref)?;
        }
        ImageCommand::Ls { cri } => {
            let answer =
                connect(&cri).await?.list_images(cri::ListImagesRequest::default()).await.map_err(status)?;
            say(format_args!("{:<60} {:<20} {:>10}", "IMAGE", "ID", "BYTES"))?;
            for image in answer.into_inner().images {
                let id: String = image.id.rsplit(':').next().unwrap_or_default().chars().take(12).collect();
                let names = if image.repo_tags.is_empty() { &image.repo_digests } else { &image.repo_tags };
                for name in names {
                    say(format_args!("{name:<60} {id:<20} {:>10}", image.size))?;
                }
            }
        }
        ImageCommand::Rm { reference, cri } => {
            let mut client = connect(&cri).await?;
            let wanted = cri::ImageStatusRequest { image: spec(reference.clone()), verbose: false };
            if client.image_status(wanted).await.map_err(status)?.into_inner().image.is_none() {
                return Err(format!("no image {reference}; `orlop image ls` lists what there is").into());
            }
            let request = cri::RemoveImageRequest { image: spec(reference) };
            client.remove_image(request).await.map_err(status)?;
        }
        ImageCommand::Import { archive, name, store } => import(archive, name, &store).await?,
        ImageCommand::Export { references, output, store } => export(references, &output, &store).await?,
        ImageCommand::Gc { store } => collect_garbage(&store).await?,
        ImageCommand::Build { rootfs, output, tag, entrypoint, cmd, env, user, workdir } => {
            let mut config = oci_spec::image::Config::default();
            let some = |v: Vec<String>| (!v.is_empty()).then_some(v);
            config.set_entrypoint(some(entrypoint));
            config.set_cmd(some(cmd));
            config.set_env(some(env));
            config.set_user(user);
            config.set_working_dir(workdir);
            let build = Build { rootfs, name: tag, config, created: 0, root_owned: true };
            let id = tokio::task::spawn_blocking(move || orlop_images::build(&build, &output)).await??;
            say(id)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    /// Gives three bytes, then an error.
    struct Broken(bool);

    impl AsyncRead for Broken {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buffer: &mut tokio::io::ReadBuf<'_>,
        ) -> Poll<std::io::Result<()>> {
            if std::mem::replace(&mut self.0, true) {
                return Poll::Ready(Err(std::io::Error::other("bad sector")));
            }
            buffer.put_slice(b"abc");
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_read_to_its_end_is_told() {
        let unread = Arc::new(OnceLock::new());
        let read: Vec<Vec<u8>> = pieces(Broken(false), unread.clone()).collect().await;
        assert_eq!(read, [b"abc"]);
        assert_eq!(unread.get().unwrap().to_string(), "bad sector");
        let unread = Arc::new(OnceLock::new());
        let whole: Vec<Vec<u8>> = pieces(&b"abc"[..], unread.clone()).collect().await;
        assert_eq!((whole.concat(), unread.get().is_none()), (b"abc".to_vec(), true));
    }
}
