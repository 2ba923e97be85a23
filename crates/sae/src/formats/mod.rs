//! Readers of what other libraries write, one file a format, and the choice among them.
//!
//! | format | recognised by | file |
//! | --- | --- | --- |
//! | SAELens | `cfg.json` and `sae_weights.safetensors` | [`crate::saelens`] |
//! | sparsify | `cfg.json` and `sae.safetensors` | [`sparsify`] |
//! | dictionary_learning | `ae.pt` and `config.json` | [`dictionary_learning`] |
//! | openai | `*.pt` with `pre_bias` | [`openai`] |
//! | Gemma Scope | `params.npz`, or `params.safetensors` | [`gemma_scope`] |
//! | Llama Scope | `hyperparams.json` and `checkpoints/final.safetensors` | [`llama_scope`] |
//! | Phi-3 (nev) | SAELens' names, but tensors `s_gate` and `b_gate` | [`phi3`] |
//!
//! All give a [`crate::Sae`]: orientation is converted and constants are folded here, so that nothing
//! later asks where an SAE is from. What a reader does not know it refuses by name. Nothing in a file
//! is executed.

pub mod dictionary_learning;
pub(crate) mod folder;
pub mod gemma_scope;
pub mod llama_scope;
mod npz;
pub mod openai;
pub mod phi3;
mod pickle;
pub mod sparsify;
pub(crate) mod tensors;
mod zip;

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::SaeError;
use crate::sae::{Sae, SaeConfig};
use tensors::Tensors;

/// A format that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// SAELens, 6 or older.
    Saelens,
    /// EleutherAI's sparsify.
    Sparsify,
    /// dictionary_learning.
    DictionaryLearning,
    /// openai/sparse_autoencoder.
    Openai,
    /// Gemma Scope, either.
    GemmaScope,
    /// Llama Scope.
    LlamaScope,
    /// The gated SAEs of Phi-3.
    Phi3,
}

/// Reads an SAE in any format: a folder, or the one file of a format that has one.
///
/// # Errors
/// [`SaeError::Io`], [`SaeError::Format`] naming the key or tensor, [`SaeError::Checksum`],
/// [`SaeError::Config`].
pub fn load(path: &Path) -> Result<(Sae, Format), SaeError> {
    let has = |name: &str| path.join(name).is_file();
    if path.is_dir() {
        return if has("sae_weights.safetensors") && has("cfg.json") {
            let weights = read(&path.join("sae_weights.safetensors"))?;
            let place = path.display().to_string();
            if phi3::is(&weights) {
                let config = read(&path.join("cfg.json"))?;
                return Ok((phi3::parse(&place, &config, &weights)?, Format::Phi3));
            }
            Ok((crate::saelens::load(path)?, Format::Saelens))
        } else if has("sae.safetensors") && has("cfg.json") {
            Ok((sparsify::load(path)?, Format::Sparsify))
        } else if has("ae.pt") {
            let sae = dictionary_learning::load(&path.join("ae.pt"))?;
            Ok((sae, Format::DictionaryLearning))
        } else if has("hyperparams.json") {
            Ok((llama_scope::load(path)?, Format::LlamaScope))
        } else if has("params.npz") {
            let sae = gemma_scope::load(&path.join("params.npz"))?;
            Ok((sae, Format::GemmaScope))
        } else if has("params.safetensors") {
            let sae = gemma_scope::load(&path.join("params.safetensors"))?;
            Ok((sae, Format::GemmaScope))
        } else {
            Err(SaeError::Format {
                path: path.display().to_string(),
                reason: "no SAE of a known format is here; expected are cfg.json with \
                         sae_weights.safetensors or sae.safetensors, ae.pt, hyperparams.json, \
                         params.npz or params.safetensors"
                    .to_owned(),
            })
        };
    }
    match path.extension().and_then(|e| e.to_str()) {
        Some("npz" | "safetensors") => Ok((gemma_scope::load(path)?, Format::GemmaScope)),
        Some("pt") if path.file_name().is_some_and(|n| n == "ae.pt") => {
            Ok((dictionary_learning::load(path)?, Format::DictionaryLearning))
        }
        Some("pt") => Ok((openai::load(path)?, Format::Openai)),
        _ => {
            // So that a missing file says that it is missing.
            fs::metadata(path).map_err(|source| SaeError::Io {
                path: path.display().to_string(),
                source,
            })?;
            Err(SaeError::Format {
                path: path.display().to_string(),
                reason: "not a folder, nor a .npz, .safetensors or .pt file".to_owned(),
            })
        }
    }
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>, SaeError> {
    fs::read(path).map_err(|source| SaeError::Io {
        path: path.display().to_string(),
        source,
    })
}

/// A JSON object whose keys are all in `known`.
pub(crate) fn object(
    place: &str,
    bytes: &[u8],
    known: &[&str],
) -> Result<Map<String, Value>, SaeError> {
    let format = |reason: String| SaeError::Format {
        path: place.to_owned(),
        reason,
    };
    let object: Map<String, Value> =
        serde_json::from_slice(bytes).map_err(|e| format(format!("not a JSON object: {e}")))?;
    match object.keys().find(|k| !known.contains(&k.as_str())) {
        Some(key) => Err(format(format!("key '{key}' is not known"))),
        None => Ok(object),
    }
}

/// A positive size of an object.
pub(crate) fn size(place: &str, map: &Map<String, Value>, key: &str) -> Result<usize, SaeError> {
    map.get(key)
        .and_then(Value::as_u64)
        .and_then(|v| usize::try_from(v).ok())
        .filter(|v| *v > 0 && *v <= tensors::LIMIT)
        .ok_or_else(|| SaeError::Format {
            path: place.to_owned(),
            reason: format!("'{key}' is missing or not a sane size"),
        })
}

/// A config without names: most formats say neither model nor site.
pub(crate) fn unnamed(d_model: usize, d_sae: usize, k: usize) -> SaeConfig {
    SaeConfig {
        d_model,
        d_sae,
        k,
        hook_name: String::new(),
        model_name: String::new(),
    }
}

/// Tensors and numbers of a `.pt` file, and the rest.
pub(crate) fn torch(
    place: &str,
    dict: std::collections::BTreeMap<String, pickle::Value>,
) -> (Tensors, std::collections::BTreeMap<String, pickle::Value>) {
    let (mut map, mut rest) = (
        std::collections::BTreeMap::new(),
        std::collections::BTreeMap::new(),
    );
    for (name, value) in dict {
        match value {
            pickle::Value::Tensor(t) => {
                map.insert(name, t);
            }
            other => {
                rest.insert(name, other);
            }
        }
    }
    (Tensors::new(place, map), rest)
}
