//! The network configuration in a folder: the first file by name counts.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use orlop_cni_types::{NetworkConfig, PluginConfig};

use crate::Error;

/// Reads the network that is in effect. Cheap enough to be done for each operation, so a changed file counts at once.
pub(crate) fn load(dir: &Path) -> Result<(PathBuf, NetworkConfig), Error> {
    let path = first_file(dir, &["conf", "conflist", "json"])?
        .ok_or_else(|| Error::NoConfig { dir: dir.to_owned() })?;
    let bytes = fs::read(&path).map_err(|source| Error::ReadConfig { path: path.clone(), source })?;
    let parsed = match path.extension() {
        Some(e) if e == "conflist" => NetworkConfig::parse_list(&bytes),
        _ => NetworkConfig::parse_single(&bytes),
    };
    let mut network = parsed.map_err(|source| Error::BrokenConfig { path: path.clone(), source })?;
    if !network.load_only_inlined_plugins {
        for file in files(&dir.join(&network.name), &["conf"])? {
            let bytes = fs::read(&file).map_err(|source| Error::ReadConfig { path: file.clone(), source })?;
            let plugin =
                PluginConfig::parse(&bytes).map_err(|source| Error::BrokenConfig { path: file, source })?;
            network.plugins.push(plugin);
        }
    }
    network.check_plugins().map_err(|source| Error::BrokenConfig { path: path.clone(), source })?;
    Ok((path, network))
}

fn first_file(dir: &Path, extensions: &[&str]) -> Result<Option<PathBuf>, Error> {
    Ok(files(dir, extensions)?.into_iter().next())
}

/// Files of `dir` with one of `extensions`, by name. A missing folder has none.
fn files(dir: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>, Error> {
    let failed = |source| Error::ReadConfig { path: dir.to_owned(), source };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        Err(e) => return Err(failed(e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let wanted = path.extension().is_some_and(|e| extensions.iter().any(|w| e == *w));
        if wanted && path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_file_wins_and_a_broken_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let d = dir.path();
        assert!(matches!(load(d), Err(Error::NoConfig { .. })));
        assert!(matches!(load(&d.join("none")), Err(Error::NoConfig { .. })));
        fs::write(d.join("20-b.conf"), r#"{"name":"b","cniVersion":"0.4.0","type":"x"}"#).unwrap();
        fs::write(d.join("05-ignored.yaml"), "x").unwrap();
        assert_eq!(load(d).unwrap().1.name, "b");
        fs::write(d.join("10-a.conflist"), r#"{"name":"a","cniVersion":"1.1.0","plugins":[{"type":"x"}]}"#)
            .unwrap();
        assert_eq!(load(d).unwrap().1.name, "a");
        fs::write(d.join("01-broken.conflist"), r#"{"name":"c","cniVersion":"1.1.0","plugins":[]}"#).unwrap();
        let e = load(d).unwrap_err();
        assert!(e.to_string().contains("01-broken.conflist"), "{e}");
        assert!(matches!(e, Error::BrokenConfig { .. }));
        // The same network with its plugin in a folder of its name is complete.
        fs::create_dir(d.join("c")).unwrap();
        fs::write(d.join("c/1.conf"), r#"{"type":"y"}"#).unwrap();
        assert_eq!(load(d).unwrap().1.plugins[0].plugin_type, "y");
    }
}
