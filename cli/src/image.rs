//! `orlop image`: what the CRI offers goes over its socket, the rest works on a store that nobody has open.

use std::path::Path;

use orlop_images::{Build, GcReport, ImageStore, Options};
use orlop_proto::cri;
use orlop_proto::cri::image_service_client::ImageServiceClient;
use tonic::transport::Channel;

use crate::args::{CriSocket, ImageCommand};
use crate::node::unix_path;
use crate::{Failure, say};

async fn connect(socket: &CriSocket) -> Result<ImageServiceClient<Channel>, Failure> {
    let path = unix_path(&socket.endpoint);
    let channel = tonic::transport::Endpoint::try_from(format!("unix://{}", path.display()))?
        .connect()
        .await
        .map_err(|e| {
            format!(
                "no CRI server at {} ({}); start one or pass --endpoint",
                path.display(),
                orlop_base::telemetry::chain(&e)
            )
        })?;
    Ok(ImageServiceClient::new(channel))
}

fn status(e: tonic::Status) -> Failure {
    e.message().to_owned().into()
}

fn spec(reference: String) -> Option<cri::ImageSpec> {
    Some(cri::ImageSpec { image: reference, ..Default::default() })
}

/// The store itself. A CRI server that runs holds its lock.
async fn store(dir: &Path) -> Result<ImageStore, Failure> {
    Ok(ImageStore::open(dir, Options::default()).await?)
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
                let id: String = image.id.trim_start_matches("sha256:").chars().take(12).collect();
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
        ImageCommand::Import { archive, name, images_dir } => {
            for image in store(&images_dir).await?.import(&archive, name.as_deref()).await? {
                say(format_args!("{} {}", image.id, image.repo_tags.join(" ")))?;
            }
        }
        ImageCommand::Gc { images_dir } => {
            if !images_dir.is_dir() {
                return Err(
                    format!("{} is no image store; name it by --images-dir", images_dir.display()).into()
                );
            }
            let GcReport { layers, blobs, bytes } = store(&images_dir).await?.gc().await?;
            say(format_args!("deleted {layers} layers and {blobs} blobs, {bytes} bytes"))?;
        }
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
