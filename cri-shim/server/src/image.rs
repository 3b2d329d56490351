//! The ImageService.

use std::collections::HashMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use orlop_images::{Auth, Image};
use orlop_proto::cri;

use crate::container_image_ref as image_ref;
use crate::error::{Error, Result};
use crate::runtime::{Runtime, now_ns};

/// The CRI's credentials. `auth` is base64 of `user:password`, as in docker's config.json.
fn auth(given: &cri::AuthConfig) -> Result<Option<Auth>> {
    let mut auth = Auth {
        username: given.username.clone(),
        password: given.password.clone(),
        identity_token: given.identity_token.clone(),
        registry_token: given.registry_token.clone(),
        server_address: given.server_address.clone(),
    };
    if !given.auth.is_empty() && auth.username.is_empty() {
        let bad = || Error::Invalid("auth is not base64 of user:password".into());
        let bytes = STANDARD.decode(given.auth.trim_end_matches('\0')).map_err(|_| bad())?;
        let text = String::from_utf8(bytes).map_err(|_| bad())?;
        let (user, password) = text.split_once(':').ok_or_else(bad)?;
        auth.username = user.to_owned();
        auth.password = password.trim_end_matches('\0').to_owned();
    }
    let empty = auth.username.is_empty() && auth.identity_token.is_empty() && auth.registry_token.is_empty();
    Ok((!empty).then_some(auth))
}

fn shown(image: &Image) -> cri::Image {
    let user = image.config.config().as_ref().and_then(|c| c.user().clone()).unwrap_or_default();
    let name = user.split(':').next().unwrap_or_default();
    // A number is a uid, anything else a name; the kubelet checks runAsNonRoot with these.
    let uid = name.parse::<i64>().ok().map(|value| cri::Int64Value { value });
    cri::Image {
        id: image.id.clone(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size,
        username: if uid.is_some() { String::new() } else { name.to_owned() },
        uid,
        spec: Some(cri::ImageSpec { image: image_ref(image), ..Default::default() }),
        pinned: image.pinned,
    }
}

impl Runtime {
    pub fn list_images(&self, filter: Option<cri::ImageFilter>) -> Vec<cri::Image> {
        let wanted = filter.and_then(|f| f.image).map(|i| i.image).filter(|i| !i.is_empty());
        match wanted {
            Some(name) => self.images.get(&name).iter().map(|i| shown(i)).collect(),
            None => self.images.list().iter().map(|i| shown(i)).collect(),
        }
    }

    pub fn image_status(&self, request: cri::ImageStatusRequest) -> Result<cri::ImageStatusResponse> {
        let name = request.image.unwrap_or_default().image;
        if name.is_empty() {
            return Err(Error::Invalid("no image is named".into()));
        }
        // An image that is not there is no error.
        let Some(image) = self.images.get(&name) else { return Ok(Default::default()) };
        let mut info = HashMap::new();
        if request.verbose {
            let text = serde_json::json!({ "imageSpec": image.config, "digest": image.id });
            info.insert("info".to_owned(), text.to_string());
        }
        Ok(cri::ImageStatusResponse { image: Some(shown(&image)), info })
    }

    pub async fn pull_image(&self, request: cri::PullImageRequest) -> Result<cri::PullImageResponse> {
        let name = request.image.unwrap_or_default().image;
        if name.is_empty() {
            return Err(Error::Invalid("no image is named".into()));
        }
        let auth = request.auth.as_ref().map(auth).transpose()?.flatten();
        let image = self.images.pull(&name, auth.as_ref()).await?;
        Ok(cri::PullImageResponse { image_ref: image.id.clone() })
    }

    pub async fn remove_image(&self, request: cri::RemoveImageRequest) -> Result<cri::RemoveImageResponse> {
        let name = request.image.unwrap_or_default().image;
        if name.is_empty() {
            return Err(Error::Invalid("no image is named".into()));
        }
        // The CRI removes an image with all its names, whichever was given.
        let id = self.images.get(&name).map(|i| i.id.clone());
        if let Some(id) = id {
            self.images.remove(&id).await?;
            let images = self.images.clone();
            let stop = self.tasks.stop_token();
            self.tasks.spawn(async move {
                tokio::select! {
                    // A collection that is cut short goes on at the next one.
                    done = images.gc() => if let Err(e) = done {
                        tracing::warn!(error = %e, "could not free the removed image's layers");
                    },
                    () = stop.cancelled() => {}
                }
            });
        }
        Ok(cri::RemoveImageResponse {})
    }

    pub async fn image_fs_info(&self) -> Result<cri::ImageFsInfoResponse> {
        let usage = self.images.usage().await?;
        let mut writable = orlop_images::Usage::default();
        for key in self.images.rootfs_keys() {
            // One that is being removed is not counted.
            if let Some(layer) = self.layer(&key).await {
                writable.bytes += layer.usage.bytes;
                writable.inodes += layer.usage.inodes;
            }
        }
        let at = self.images.root().to_string_lossy().into_owned();
        let shown = |u: orlop_images::Usage| cri::FilesystemUsage {
            timestamp: now_ns(),
            fs_id: Some(cri::FilesystemIdentifier { mountpoint: at.clone() }),
            used_bytes: Some(cri::UInt64Value { value: u.bytes }),
            inodes_used: Some(cri::UInt64Value { value: u.inodes }),
        };
        Ok(cri::ImageFsInfoResponse {
            image_filesystems: vec![shown(usage)],
            container_filesystems: vec![shown(writable)],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials() {
        let of = |a: cri::AuthConfig| auth(&a);
        assert_eq!(of(Default::default()).unwrap(), None);
        let basic =
            of(cri::AuthConfig { auth: STANDARD.encode("u:p:q"), ..Default::default() }).unwrap().unwrap();
        assert_eq!((basic.username.as_str(), basic.password.as_str()), ("u", "p:q"));
        assert!(of(cri::AuthConfig { auth: "%".into(), ..Default::default() }).is_err());
        let token = of(cri::AuthConfig { identity_token: "t".into(), ..Default::default() }).unwrap();
        assert!(token.is_some());
    }
}
