//! The CredentialProviderConfig file, or a folder of them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::config::parse_go_duration;
use crate::config_file::one_line;
use crate::error::Error;

const KIND: &str = "CredentialProviderConfig";
/// Later versions read the earlier ones' fields.
const VERSIONS: [&str; 3] = ["v1", "v1beta1", "v1alpha1"];

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    api_version: String,
    kind: String,
    #[serde(default)]
    providers: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Entry {
    name: String,
    #[serde(default)]
    match_images: Vec<String>,
    default_cache_duration: Option<String>,
    #[serde(default)]
    api_version: String,
    args: Option<Vec<String>>,
    env: Option<Vec<Variable>>,
    token_attributes: Option<serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Variable {
    name: String,
    value: String,
}

/// A program that knows credentials of some registries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Provider {
    pub name: String,
    pub program: PathBuf,
    /// Patterns of the images that it is asked for.
    pub images: Vec<String>,
    /// How long its answers hold that say nothing of it.
    pub cached: Duration,
    pub api_version: String,
    pub args: Vec<String>,
    /// Besides the agent's own.
    pub env: Vec<(String, String)>,
}

/// Checks what a file says of one provider. Pure.
fn provider(e: Entry, programs: &Path) -> Result<Provider, String> {
    let bad = |what: String| format!("provider {:?}: {what}", e.name);
    if e.name.is_empty() || e.name.contains(['/', ' ']) || matches!(&*e.name, "." | "..") {
        return Err(bad("its name must be that of a program, without slashes and blanks".into()));
    }
    let known = e.api_version.strip_prefix("credentialprovider.kubelet.k8s.io/");
    if !known.is_some_and(|v| VERSIONS.contains(&v)) {
        return Err(bad(format!(
            "apiVersion is {:?}; it must be credentialprovider.kubelet.k8s.io/ with one of {VERSIONS:?}",
            e.api_version
        )));
    }
    if e.match_images.is_empty() {
        return Err(bad("matchImages is empty".into()));
    }
    if e.token_attributes.is_some_and(|t| !t.is_null()) {
        return Err(bad("tokenAttributes are not supported by this node".into()));
    }
    let Some(cached) = e.default_cache_duration.as_deref() else {
        return Err(bad("defaultCacheDuration is missing; 0s keeps nothing".into()));
    };
    let Some(cached) = parse_go_duration(cached) else {
        return Err(bad(format!("defaultCacheDuration is {cached:?}; write 10s, 5m or 12h")));
    };
    let env = e.env.unwrap_or_default().into_iter().map(|v| (v.name, v.value)).collect();
    Ok(Provider {
        program: programs.join(&e.name),
        name: e.name,
        images: e.match_images,
        cached,
        api_version: e.api_version,
        args: e.args.unwrap_or_default(),
        env,
    })
}

fn parse(text: &str, programs: &Path) -> Result<Vec<Provider>, String> {
    let file: File = serde_saphyr::from_str(text).map_err(|e| one_line(&e.to_string()))?;
    let version = file.api_version.strip_prefix("kubelet.config.k8s.io/");
    if file.kind != KIND || !version.is_some_and(|v| VERSIONS.contains(&v)) {
        return Err(format!("it is a {} of {}", file.kind, file.api_version));
    }
    if file.providers.is_empty() {
        return Err("it has no providers".into());
    }
    file.providers.into_iter().map(|e| provider(e, programs)).collect()
}

/// The files that `path` stands for: itself, or those of a folder in the order of their names.
fn files(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let read = |source| Error::io("read", path, source);
    if !fs::metadata(path).map_err(read)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut all = Vec::new();
    for e in fs::read_dir(path).map_err(read)? {
        let file = e.map_err(read)?.path();
        let wanted = file.extension().is_some_and(|x| x == "json" || x == "yaml" || x == "yml");
        if wanted && !file.is_dir() {
            all.push(file);
        }
    }
    all.sort();
    Ok(all)
}

/// Reads the providers and makes sure of their programs in `programs`.
pub fn read(path: &Path, programs: &Path) -> Result<Vec<Provider>, Error> {
    let mut all: Vec<Provider> = Vec::new();
    let paths = files(path)?;
    if paths.is_empty() {
        let message = "the folder has no file whose name ends with .json, .yaml or .yml".into();
        return Err(Error::CredentialProviders { path: path.to_owned(), message });
    }
    for path in paths {
        let bad = |message: String| Error::CredentialProviders { path: path.clone(), message };
        let text = fs::read_to_string(&path).map_err(|source| Error::io("read", &path, source))?;
        for p in parse(&text, programs).map_err(bad)? {
            if all.iter().any(|o| o.name == p.name) {
                return Err(bad(format!("provider {:?} is there twice", p.name)));
            }
            let runs =
                fs::metadata(&p.program).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
            if !runs {
                return Err(bad(format!("provider {:?}: {} is no program", p.name, p.program.display())));
            }
            all.push(p);
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n\
                        - name: sh\n  apiVersion: credentialprovider.kubelet.k8s.io/v1\n  matchImages: ['*.test']\n  defaultCacheDuration: 1h30m\n  \
                        args: [get]\n  env: [{name: A, value: b}]\n";

    #[test]
    fn an_upstream_file() {
        let all = parse(GOOD, Path::new("/bin")).unwrap();
        let wanted = Provider {
            name: "sh".into(),
            program: "/bin/sh".into(),
            images: vec!["*.test".into()],
            cached: Duration::from_secs(5400),
            api_version: "credentialprovider.kubelet.k8s.io/v1".into(),
            args: vec!["get".into()],
            env: vec![("A".into(), "b".into())],
        };
        assert_eq!(all, [wanted]);
        let json = r#"{"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "CredentialProviderConfig", "providers": [{"name": "p",
            "apiVersion": "credentialprovider.kubelet.k8s.io/v1beta1", "matchImages": ["a"], "defaultCacheDuration": "0s", "args": null}]}"#;
        assert_eq!(parse(json, Path::new("/bin")).unwrap()[0].cached, Duration::ZERO);
    }

    #[test]
    fn what_is_wrong_is_refused_by_name() {
        for (from, to, says) in [
            ("kind: CredentialProviderConfig", "kind: Pod", "it is a Pod"),
            ("kubelet.config.k8s.io/v1", "kubelet.config.k8s.io/v9", "v9"),
            ("name: sh", "name: a/b", "\"a/b\": its name"),
            ("name: sh", "name: ..", "its name"),
            ("provider.kubelet.k8s.io/v1", "provider.kubelet.k8s.io/v2", "apiVersion is"),
            ("['*.test']", "[]", "matchImages is empty"),
            ("  defaultCacheDuration: 1h30m\n", "", "defaultCacheDuration is missing"),
            ("1h30m", "-1h", "defaultCacheDuration is \"-1h\""),
            ("args:", "arguments:", "arguments"),
            ("args: [get]", "tokenAttributes: {cacheType: Token}", "tokenAttributes are not supported"),
        ] {
            let text = GOOD.replace(from, to);
            assert_ne!(text, GOOD, "{from}");
            let said = parse(&text, Path::new("/bin")).unwrap_err();
            assert!(said.contains(says), "{to}: {said}");
        }
    }

    #[test]
    fn a_folder_is_read_in_order_and_programs_must_be_there() {
        let t = tempfile::tempdir().unwrap();
        let (dir, bin) = (t.path().join("config"), Path::new("/bin"));
        fs::create_dir(&dir).unwrap();
        let said = |dir: &Path| read(dir, bin).unwrap_err().to_string();
        assert!(said(&dir).contains("has no file"), "{}", said(&dir));
        fs::write(dir.join("2.yaml"), GOOD).unwrap();
        fs::write(dir.join("1.json"), GOOD.replace("name: sh", "name: cat")).unwrap();
        fs::write(dir.join("notes.txt"), "nothing").unwrap();
        let names: Vec<String> = read(&dir, bin).unwrap().into_iter().map(|p| p.name).collect();
        assert_eq!(names, ["cat", "sh"]);
        fs::write(dir.join("3.yml"), GOOD).unwrap();
        assert!(said(&dir).contains("3.yml is no CredentialProviderConfig: provider \"sh\" is there twice"));
        fs::write(dir.join("3.yml"), GOOD.replace("name: sh", "name: orlop-absent")).unwrap();
        assert!(said(&dir).contains("/bin/orlop-absent is no program"), "{}", said(&dir));
    }
}
