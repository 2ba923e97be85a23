//! The SAELens 6 directory layout, with our manifest beside it.
//!
//! | file | holds |
//! | --- | --- |
//! | `cfg.json` | `architecture`, `d_in`, `d_sae`, `k`, `metadata`, ... |
//! | `sae_weights.safetensors` | `W_enc [d_in, d_sae]`, `W_dec [d_sae, d_in]`, `b_enc`, `b_dec` |
//! | `manifest.json` | sha256 of both, and how the SAE was trained |
//!
//! Orientation is converted here and nowhere else: in memory the encoder is `[d_sae, d_in]`. Keys or
//! values that are not known are refused, by name: a reader that guesses loads a TopK SAE as a ReLU
//! one. A directory is written beside its place and renamed, so it is whole or not there.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use half::f16;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::error::SaeError;
use crate::topk::{Sae, SaeConfig};

/// Element type of weights on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightType {
    /// Four bytes.
    F32,
    /// Two bytes.
    F16,
}

const CONFIG: &str = "cfg.json";
const WEIGHTS: &str = "sae_weights.safetensors";
const MANIFEST: &str = "manifest.json";

/// Keys of `cfg.json` that may be there, with the only values that this reader knows; an empty list
/// accepts any.
const KNOWN: [(&str, &[&str]); 12] = [
    ("architecture", &["\"topk\""]),
    ("d_in", &[]),
    ("d_sae", &[]),
    ("k", &[]),
    ("dtype", &["\"float32\"", "\"float16\""]),
    ("device", &[]),
    ("apply_b_dec_to_input", &["true"]),
    ("normalize_activations", &["\"none\""]),
    ("reshape_activations", &["\"none\""]),
    ("rescale_acts_by_decoder_norm", &["false"]),
    ("metadata", &[]),
    ("sae_lens_version", &[]),
];

/// An SAE's files in memory: what is shipped in a binary, or read from a folder.
#[derive(Debug, Clone, Copy)]
pub struct Files<'a> {
    /// `cfg.json`.
    pub config: &'a [u8],
    /// `sae_weights.safetensors`.
    pub weights: &'a [u8],
    /// `manifest.json`, if there is one.
    pub manifest: Option<&'a [u8]>,
}

/// Reads a folder.
///
/// # Errors
/// [`SaeError::Io`], [`SaeError::Format`] naming the key or tensor, [`SaeError::Checksum`].
pub fn load(folder: &Path) -> Result<Sae, SaeError> {
    let read = |name: &str| {
        let path = folder.join(name);
        fs::read(&path).map_err(|source| SaeError::Io {
            path: path.display().to_string(),
            source,
        })
    };
    let manifest = folder
        .join(MANIFEST)
        .is_file()
        .then(|| read(MANIFEST))
        .transpose()?;
    let (config, weights) = (read(CONFIG)?, read(WEIGHTS)?);
    let files = Files {
        config: &config,
        weights: &weights,
        manifest: manifest.as_deref(),
    };
    parse(&folder.display().to_string(), files)
}

/// Reads files that are in memory; `place` is for messages.
///
/// # Errors
/// As [`load`].
pub fn parse(place: &str, files: Files<'_>) -> Result<Sae, SaeError> {
    let format = |file: &str, reason: String| SaeError::Format {
        path: format!("{place}/{file}"),
        reason,
    };
    if let Some(manifest) = files.manifest {
        check_sums(place, manifest, &files)?;
    }
    let config: Map<String, Value> = serde_json::from_slice(files.config)
        .map_err(|e| format(CONFIG, format!("not a JSON object: {e}")))?;
    for (key, value) in &config {
        match KNOWN.iter().find(|k| k.0 == key) {
            None => return Err(format(CONFIG, format!("key '{key}' is not known"))),
            Some((_, [])) => {}
            Some((_, values)) if values.contains(&value.to_string().as_str()) => {}
            Some((_, values)) => {
                let reason = format!(
                    "{key} = {value} is not supported; supported: {}",
                    values.join(", ")
                );
                return Err(format(CONFIG, reason));
            }
        }
    }
    if !config.contains_key("architecture") {
        return Err(format(CONFIG, "'architecture' is missing".to_owned()));
    }
    let size = |key: &str| {
        config
            .get(key)
            .and_then(Value::as_u64)
            .and_then(|v| usize::try_from(v).ok())
            .filter(|v| *v > 0 && *v <= 1 << 24)
            .ok_or_else(|| format(CONFIG, format!("'{key}' is missing or not a sane size")))
    };
    let text = |key: &str| {
        config
            .get("metadata")
            .and_then(|m| m.get(key))
            .and_then(Value::as_str)
            .unwrap_or_default()
    };
    let cfg = SaeConfig {
        d_model: size("d_in")?,
        d_sae: size("d_sae")?,
        k: size("k")?,
        hook_name: text("hook_name").to_owned(),
        model_name: text("model_name").to_owned(),
    };
    let tensors = SafeTensors::deserialize(files.weights)
        .map_err(|e| format(WEIGHTS, format!("not safetensors: {e}")))?;
    let known = ["W_enc", "W_dec", "b_enc", "b_dec"];
    if let Some(name) = tensors.names().into_iter().find(|n| !known.contains(n)) {
        return Err(format(
            WEIGHTS,
            format!("tensor '{name}' is not known for TopK"),
        ));
    }
    let get = |name: &str, shape: &[usize]| -> Result<Vec<f32>, SaeError> {
        let t = tensors
            .tensor(name)
            .map_err(|_| format(WEIGHTS, format!("tensor '{name}' is missing")))?;
        if t.shape() != shape {
            let reason = format!("tensor '{name}' has shape {:?}, not {shape:?}", t.shape());
            return Err(format(WEIGHTS, reason));
        }
        match t.dtype() {
            Dtype::F32 => Ok(t
                .data()
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect()),
            Dtype::F16 => Ok(t
                .data()
                .chunks_exact(2)
                .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
                .collect()),
            other => Err(format(
                WEIGHTS,
                format!("tensor '{name}' has type {other:?}"),
            )),
        }
    };
    let (d, m) = (cfg.d_model, cfg.d_sae);
    let w_enc = transpose(&get("W_enc", &[d, m])?, d, m);
    let (w_dec, b_enc, b_dec) = (
        get("W_dec", &[m, d])?,
        get("b_enc", &[m])?,
        get("b_dec", &[d])?,
    );
    Sae::new(cfg, w_enc, b_enc, w_dec, b_dec)
}

/// Writes `sae` to `folder`, which must not exist or be an SAE of this layout. `training` says how it
/// came to be and goes into the manifest. Returns the sha256 of the weights.
///
/// # Errors
/// [`SaeError::Io`]; a folder that was there is left as it was.
pub fn save(
    sae: &Sae,
    folder: &Path,
    ty: WeightType,
    training: &Value,
) -> Result<String, SaeError> {
    let io = |path: &Path| {
        let path = path.display().to_string();
        move |source| SaeError::Io { path, source }
    };
    let parent = folder
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(io(parent))?;
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o777)); // less the umask, as any folder
    }
    let scratch = builder
        .prefix(".sae-")
        .tempdir_in(parent)
        .map_err(io(parent))?;
    let (config, weights) = (config_json(sae, ty), weights_bytes(sae, ty)?);
    let sum = hex(&weights);
    let manifest = json!({
        "format": "saelens-6",
        "sha256": { CONFIG: hex(&config), WEIGHTS: sum },
        "training": training,
    });
    let manifest = serde_json::to_vec_pretty(&manifest).unwrap_or_default();
    for (name, bytes) in [
        (CONFIG, &config),
        (WEIGHTS, &weights),
        (MANIFEST, &manifest),
    ] {
        let path = scratch.path().join(name);
        fs::write(&path, bytes).map_err(io(&path))?;
        fs::File::open(&path)
            .and_then(|f| f.sync_all())
            .map_err(io(&path))?;
    }
    let fresh = scratch.keep();
    if folder.join(CONFIG).is_file() {
        let old = parent.join(format!(".sae-old-{}", std::process::id()));
        fs::rename(folder, &old).map_err(io(folder))?;
        fs::rename(&fresh, folder).map_err(io(folder))?;
        fs::remove_dir_all(&old).map_err(io(&old))?;
    } else {
        fs::rename(&fresh, folder).map_err(io(folder))?;
    }
    Ok(sum)
}

/// sha256 of the weights file of `folder`, as hex.
///
/// # Errors
/// [`SaeError::Io`].
pub fn weights_sha256(folder: &Path) -> Result<String, SaeError> {
    let path = folder.join(WEIGHTS);
    let bytes = fs::read(&path).map_err(|source| SaeError::Io {
        path: path.display().to_string(),
        source,
    })?;
    Ok(hex(&bytes))
}

fn check_sums(place: &str, manifest: &[u8], files: &Files<'_>) -> Result<(), SaeError> {
    let path = |file: &str| format!("{place}/{file}");
    let json: Value = serde_json::from_slice(manifest).map_err(|e| SaeError::Format {
        path: path(MANIFEST),
        reason: format!("not JSON: {e}"),
    })?;
    for (name, bytes) in [(CONFIG, files.config), (WEIGHTS, files.weights)] {
        let expected = json["sha256"][name]
            .as_str()
            .ok_or_else(|| SaeError::Format {
                path: path(MANIFEST),
                reason: format!("it has no sha256 of {name}"),
            })?;
        let found = hex(bytes);
        if found != expected {
            return Err(SaeError::Checksum {
                path: path(name),
                found,
                expected: expected.to_owned(),
            });
        }
    }
    Ok(())
}

fn config_json(sae: &Sae, ty: WeightType) -> Vec<u8> {
    let cfg = sae.cfg();
    let json = json!({
        "architecture": "topk",
        "d_in": cfg.d_model,
        "d_sae": cfg.d_sae,
        "k": cfg.k,
        "dtype": match ty { WeightType::F32 => "float32", WeightType::F16 => "float16" },
        "device": "cpu",
        "apply_b_dec_to_input": true,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": false,
        "metadata": {
            "model_name": cfg.model_name,
            "hook_name": cfg.hook_name,
            "hook_head_index": null,
            "prepend_bos": false,
        },
    });
    serde_json::to_vec_pretty(&json).unwrap_or_default()
}

fn weights_bytes(sae: &Sae, ty: WeightType) -> Result<Vec<u8>, SaeError> {
    let cfg = sae.cfg();
    let (d, m) = (cfg.d_model, cfg.d_sae);
    let (w_enc_t, b_enc, w_dec, b_dec) = sae.weights();
    let w_enc = transpose(w_enc_t, m, d);
    let bytes = |v: &[f32]| -> Vec<u8> {
        match ty {
            WeightType::F32 => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            WeightType::F16 => v
                .iter()
                .flat_map(|x| f16::from_f32(*x).to_le_bytes())
                .collect(),
        }
    };
    let dtype = match ty {
        WeightType::F32 => Dtype::F32,
        WeightType::F16 => Dtype::F16,
    };
    let all: BTreeMap<&str, (Vec<usize>, Vec<u8>)> = BTreeMap::from([
        ("W_enc", (vec![d, m], bytes(&w_enc))),
        ("W_dec", (vec![m, d], bytes(w_dec))),
        ("b_enc", (vec![m], bytes(b_enc))),
        ("b_dec", (vec![d], bytes(b_dec))),
    ]);
    let failed = |e: safetensors::SafeTensorError| SaeError::Format {
        path: WEIGHTS.to_owned(),
        reason: e.to_string(),
    };
    let views = all
        .iter()
        .map(|(name, (shape, data))| Ok((*name, TensorView::new(dtype, shape.clone(), data)?)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)?;
    safetensors::serialize(views, None).map_err(failed)
}

/// The transpose of a `[rows, columns]` matrix.
fn transpose(w: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; w.len()];
    for (r, row) in w.chunks_exact(columns.max(1)).enumerate() {
        for (c, v) in row.iter().enumerate() {
            out[c * rows + r] = *v;
        }
    }
    out
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sae() -> Sae {
        let cfg = SaeConfig {
            d_model: 3,
            d_sae: 2,
            k: 1,
            hook_name: "blocks.1.hook_resid_post".to_owned(),
            model_name: "test".to_owned(),
        };
        let w = vec![0.5, -1.0, 0.25, 2.0, 0.0, 1.5];
        Sae::new(cfg, w.clone(), vec![0.5, 0.0], w, vec![1.0, 2.0, 3.0]).unwrap()
    }

    #[test]
    fn round_trip_in_both_types() {
        let folder = tempfile::tempdir().unwrap();
        for ty in [WeightType::F32, WeightType::F16] {
            let path = folder.path().join("sae");
            let sum = save(&sae(), &path, ty, &json!({})).unwrap();
            assert_eq!(load(&path).unwrap(), sae());
            assert_eq!(weights_sha256(&path).unwrap(), sum);
        }
        // nothing but the SAE is left behind
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[track_caller]
    fn refused(change: impl Fn(&Path), expect: &str) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sae");
        save(&sae(), &path, WeightType::F32, &json!({})).unwrap();
        change(&path);
        let e = load(&path).unwrap_err().to_string();
        assert!(e.contains(expect), "{e}");
    }

    fn edit(path: &Path, from: &str, to: &str) {
        fs::remove_file(path.join(MANIFEST)).unwrap();
        let file = path.join(CONFIG);
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.contains(from));
        fs::write(&file, text.replace(from, to)).unwrap();
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        refused(|p| edit(p, "\"topk\"", "\"gated\""), "gated");
        refused(|p| edit(p, "\"device\"", "\"devise\""), "devise");
        refused(
            |p| {
                edit(
                    p,
                    "\"normalize_activations\": \"none\"",
                    "\"normalize_activations\": \"layer_norm\"",
                )
            },
            "layer_norm",
        );
        refused(|p| edit(p, "\"k\": 1", "\"k\": -1"), "'k'");
        refused(|p| edit(p, "\"d_sae\": 2", "\"d_sae\": 4"), "shape");
        refused(|p| edit(p, "{", "["), "JSON");
        refused(|p| fs::write(p.join(WEIGHTS), b"hello").unwrap(), "sha256");
        refused(
            |p| {
                fs::remove_file(p.join(MANIFEST)).unwrap();
                let bytes = fs::read(p.join(WEIGHTS)).unwrap();
                fs::write(p.join(WEIGHTS), &bytes[..bytes.len() - 3]).unwrap();
            },
            "safetensors",
        );
    }
}
