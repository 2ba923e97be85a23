//! The SAELens directory layout, version 6 and the flat one before it, with our manifest beside it.
//!
//! | file | holds |
//! | --- | --- |
//! | `cfg.json` | `architecture`, `d_in`, `d_sae`, `k`, `metadata`, ... |
//! | `sae_weights.safetensors` | `W_enc [d_in, d_sae]`, `W_dec [d_sae, d_out]`, `b_enc`, `b_dec`, and what the architecture adds |
//! | `manifest.json` | sha256 of both, and how the SAE was trained |
//!
//! Before version 6 there is no `metadata`: its keys are beside the others, some under older names.
//!
//! Orientation is converted here and nowhere else: in memory the encoder is `[d_sae, d_in]`.
//! `rescale_acts_by_decoder_norm` and `scaling_factor` are folded into the weights. Keys or values
//! that are not known are refused, by name: a reader that guesses loads a TopK SAE as a ReLU one. A
//! directory is written beside its place and renamed, so it is whole or not there.
//!
//! BatchTopK SAEs are written as SAELens writes them: as JumpReLU with one threshold for all latents.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use half::f16;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::arch::{Activation, InputNorm, Wiring};
use crate::error::SaeError;
use crate::formats::folder::write_folder;
use crate::formats::tensors::{LIMIT, Tensors, transpose};
use crate::sae::{Sae, SaeConfig};

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

/// Keys of `cfg.json` with the only values that this reader knows; an empty list accepts any.
const KNOWN: [(&str, &[&str]); 14] = [
    ("architecture", &[]),
    ("d_in", &[]),
    ("d_out", &[]),
    ("d_sae", &[]),
    ("k", &[]),
    (
        "dtype",
        &[
            "\"float32\"",
            "\"float16\"",
            "\"bfloat16\"",
            "\"torch.float32\"",
        ],
    ),
    ("device", &[]),
    ("apply_b_dec_to_input", &["true", "false"]),
    ("normalize_activations", &[]),
    ("reshape_activations", &["\"none\""]),
    ("rescale_acts_by_decoder_norm", &["false", "true"]),
    ("metadata", &[]),
    ("sae_lens_version", &[]),
    ("sae_lens_training_version", &[]),
];

/// Keys of the flat layout before version 6, beyond [`KNOWN`].
const FLAT: [(&str, &[&str]); 20] = [
    ("activation_fn", &["\"relu\"", "\"topk\""]),
    ("activation_fn_str", &["\"relu\"", "\"topk\""]),
    ("activation_fn_kwargs", &[]),
    ("finetuning_scaling_factor", &["false", "true"]),
    ("model_name", &[]),
    ("hook_name", &[]),
    ("hook_point", &[]),
    ("hook_layer", &[]),
    ("hook_point_layer", &[]),
    ("hook_head_index", &[]),
    ("hook_point_head_index", &[]),
    ("context_size", &[]),
    ("prepend_bos", &[]),
    ("dataset_path", &[]),
    ("dataset_trust_remote_code", &[]),
    ("neuronpedia_id", &[]),
    ("model_from_pretrained_kwargs", &[]),
    ("seqpos_slice", &[]),
    ("seqpos", &[]),
    ("model_kwargs", &[]),
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
    let flat = !config.contains_key("metadata") && !config.contains_key("sae_lens_version");
    let keys = || KNOWN.iter().chain(FLAT.iter().filter(|_| flat));
    for (key, value) in &config {
        match keys().find(|k| k.0 == key) {
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
    let size = |key: &str| {
        config
            .get(key)
            .and_then(Value::as_u64)
            .and_then(|v| usize::try_from(v).ok())
            .filter(|v| *v > 0 && *v <= LIMIT)
            .ok_or_else(|| format(CONFIG, format!("'{key}' is missing or not a sane size")))
    };
    let text = |keys: [&str; 2]| {
        let metadata = if flat {
            Some(&config)
        } else {
            config.get("metadata").and_then(Value::as_object)
        };
        let found = metadata.and_then(|m| keys.iter().find_map(|k| m.get(*k)?.as_str()));
        found.unwrap_or_default().to_owned()
    };
    let kwargs = config.get("activation_fn_kwargs");
    let activation_fn = ["activation_fn", "activation_fn_str"]
        .iter()
        .find_map(|k| config.get(*k)?.as_str());
    let name = match config.get("architecture") {
        _ if activation_fn == Some("topk") => "topk",
        Some(Value::String(name)) => name,
        Some(other) => {
            let reason = format!("architecture = {other} is not supported");
            return Err(format(CONFIG, reason));
        }
        None if flat && activation_fn.is_some() => "standard",
        None => return Err(format(CONFIG, "'architecture' is missing".to_owned())),
    };
    let input_norm = match config.get("normalize_activations") {
        None => InputNorm::None,
        Some(Value::Null | Value::Bool(false)) if flat => InputNorm::None,
        Some(Value::String(s)) if s == "none" => InputNorm::None,
        Some(Value::String(s)) if s == "constant_norm_rescale" => InputNorm::ConstantNormRescale,
        Some(Value::String(s)) if s == "layer_norm" => InputNorm::LayerNorm,
        Some(other) => {
            let reason = format!(
                "normalize_activations = {other} is not supported; supported: none, \
                 constant_norm_rescale, layer_norm; fold others with save_inference_model"
            );
            return Err(format(CONFIG, reason));
        }
    };
    let (d, m) = (size("d_in")?, size("d_sae")?);
    let (kind, transcoder, skip) = match name {
        "transcoder" => ("standard", true, false),
        "skip_transcoder" => ("standard", true, true),
        "jumprelu_transcoder" => ("jumprelu", true, false),
        "jumprelu_skip_transcoder" => ("jumprelu", true, true),
        other => (other, false, false),
    };
    for (key, only) in [
        ("k", kind == "topk"),
        ("rescale_acts_by_decoder_norm", kind == "topk"),
        ("d_out", transcoder),
    ] {
        if config.contains_key(key) && !only {
            return Err(format(
                CONFIG,
                format!("key '{key}' is not known for {name}"),
            ));
        }
    }
    let d_out = if transcoder { size("d_out")? } else { d };
    let mut t = Tensors::safetensors(&format!("{place}/{WEIGHTS}"), files.weights)?;
    let mut w_enc = t.take_transposed("W_enc", d, m)?;
    let mut w_dec = t.take("W_dec", &[m, d_out])?;
    let b_dec = t.take("b_dec", &[d_out])?;
    let mut b_enc = if kind == "gated" {
        vec![0.0; m]
    } else {
        t.take("b_enc", &[m])?
    };
    let mut k = m;
    let activation = match kind {
        "topk" => {
            k = match kwargs.and_then(|a| a.get("k")).and_then(Value::as_u64) {
                Some(k) if !config.contains_key("k") => k as usize,
                _ => size("k")?,
            };
            if config.get("rescale_acts_by_decoder_norm") == Some(&Value::Bool(true)) {
                fold_norms(&mut w_enc, &mut b_enc, &mut w_dec, d, d_out);
            }
            Activation::TopK { k }
        }
        "standard" => Activation::Relu,
        "jumprelu" => {
            let threshold = if t.has("log_threshold") {
                let log = t.take("log_threshold", &[m])?;
                log.into_iter().map(f32::exp).collect()
            } else {
                t.take("threshold", &[m])?
            };
            Activation::JumpRelu { threshold }
        }
        "gated" => {
            let r = t.take("r_mag", &[m])?;
            Activation::Gated {
                b_gate: t.take("b_gate", &[m])?,
                scale: r.into_iter().map(f32::exp).collect(),
                b_mag: t.take("b_mag", &[m])?,
            }
        }
        other => {
            let reason = format!(
                "architecture = \"{other}\" is not supported; supported: topk, standard, jumprelu, \
                 gated, transcoder, skip_transcoder, jumprelu_transcoder, jumprelu_skip_transcoder"
            );
            return Err(format(CONFIG, reason));
        }
    };
    if flat && t.has("scaling_factor") {
        let factor = t.take("scaling_factor", &[m])?;
        for (row, f) in w_dec.chunks_exact_mut(d_out).zip(factor) {
            row.iter_mut().for_each(|w| *w *= f);
        }
    }
    let w_skip = skip.then(|| t.take("W_skip", &[d_out, d])).transpose()?;
    t.finish()?;
    let cfg = SaeConfig {
        d_model: d,
        d_sae: m,
        k,
        hook_name: text(["hook_name", "hook_point"]),
        model_name: text(["model_name", "model_name"]),
    };
    let centre = match config.get("apply_b_dec_to_input") {
        Some(v) => v == &Value::Bool(true),
        None => !transcoder,
    };
    let wiring = Wiring {
        input_norm,
        centre,
        transcoder,
        w_skip,
    };
    Sae::of(cfg, activation, wiring, w_enc, b_enc, w_dec, b_dec)
}

/// Unit decoder rows with the same selection and reconstruction: `rescale_acts_by_decoder_norm`
/// multiplies pre-activations by the row norms and divides activations by them.
fn fold_norms(w_enc: &mut [f32], b_enc: &mut [f32], w_dec: &mut [f32], d: usize, d_out: usize) {
    let rows = w_enc.chunks_exact_mut(d).zip(b_enc);
    for ((enc, b), dec) in rows.zip(w_dec.chunks_exact_mut(d_out)) {
        let norm = dec.iter().map(|v| v * v).sum::<f32>().sqrt();
        if norm > 0.0 {
            enc.iter_mut().for_each(|v| *v *= norm);
            dec.iter_mut().for_each(|v| *v /= norm);
            *b *= norm;
        }
    }
}

/// Writes `sae` to `folder`, which must not exist or be an SAE of this layout. `training` says how it
/// came to be and goes into the manifest. Returns the sha256 of the weights.
///
/// # Errors
/// [`SaeError::Io`]; a folder that was there is left as it was. [`SaeError::Config`] for a transcoder
/// that SAELens has no architecture for.
pub fn save(
    sae: &Sae,
    folder: &Path,
    ty: WeightType,
    training: &Value,
) -> Result<String, SaeError> {
    let (config, weights) = (config_json(sae, ty)?, weights_bytes(sae, ty)?);
    let sum = hex(&weights);
    let manifest = json!({
        "format": "saelens-6",
        "sha256": { CONFIG: hex(&config), WEIGHTS: &sum },
        "training": training,
    });
    let manifest = serde_json::to_vec_pretty(&manifest).unwrap_or_default();
    let files = [(CONFIG, config), (WEIGHTS, weights), (MANIFEST, manifest)];
    write_folder(folder, &files)?;
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

fn config_json(sae: &Sae, ty: WeightType) -> Result<Vec<u8>, SaeError> {
    let (cfg, wiring) = (sae.cfg(), sae.wiring());
    let mut json = json!({
        "d_in": cfg.d_model,
        "d_sae": cfg.d_sae,
        "dtype": match ty { WeightType::F32 => "float32", WeightType::F16 => "float16" },
        "device": "cpu",
        "apply_b_dec_to_input": wiring.centre,
        "normalize_activations": wiring.input_norm.name(),
        "reshape_activations": "none",
        "metadata": {
            "model_name": cfg.model_name,
            "hook_name": cfg.hook_name,
            "hook_head_index": null,
            "prepend_bos": false,
        },
    });
    if wiring.transcoder {
        json["d_out"] = sae.d_out().into();
    }
    let architecture = match (sae.activation(), wiring.transcoder) {
        (Activation::TopK { k }, false) => {
            json["k"] = (*k).into();
            json["rescale_acts_by_decoder_norm"] = false.into();
            "topk".to_owned()
        }
        (Activation::BatchTopK { .. } | Activation::Matryoshka { .. }, false) => {
            "jumprelu".to_owned()
        }
        (Activation::JumpRelu { .. } | Activation::Relu, _) | (Activation::Gated { .. }, false)
            if wiring.transcoder || wiring.w_skip.is_none() =>
        {
            sae.architecture()
        }
        _ => {
            return Err(SaeError::Config {
                field: "architecture",
                value: sae.architecture(),
                rule: "has no place in SAELens' layout; write sparsify's".to_owned(),
            });
        }
    };
    json["architecture"] = architecture.into();
    Ok(serde_json::to_vec_pretty(&json).unwrap_or_default())
}

fn weights_bytes(sae: &Sae, ty: WeightType) -> Result<Vec<u8>, SaeError> {
    let (d, m, d_out) = (sae.d_model(), sae.d_sae(), sae.d_out());
    let (w_enc_t, b_enc, w_dec, b_dec) = sae.weights();
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
    let mut all: BTreeMap<&str, (Vec<usize>, Vec<u8>)> = BTreeMap::from([
        ("W_enc", (vec![d, m], bytes(&transpose(w_enc_t, m, d)))),
        ("W_dec", (vec![m, d_out], bytes(w_dec))),
        ("b_dec", (vec![d_out], bytes(b_dec))),
    ]);
    let mut vector = |name, v: &[f32]| {
        all.insert(name, (vec![m], bytes(v)));
    };
    match sae.activation() {
        Activation::TopK { .. } | Activation::Relu => vector("b_enc", b_enc),
        Activation::BatchTopK { threshold, .. } | Activation::Matryoshka { threshold, .. } => {
            vector("b_enc", b_enc);
            vector("threshold", &vec![*threshold; m]);
        }
        Activation::JumpRelu { threshold } => {
            vector("b_enc", b_enc);
            vector("threshold", threshold);
        }
        Activation::Gated {
            b_gate,
            scale,
            b_mag,
        } => {
            if scale.iter().any(|s| *s <= 0.0) {
                return Err(SaeError::Config {
                    field: "r_mag",
                    value: "the logarithm of a factor of 0 or less".to_owned(),
                    rule: "has no place in SAELens' layout".to_owned(),
                });
            }
            let r: Vec<f32> = scale.iter().map(|s| s.ln()).collect();
            vector("b_gate", b_gate);
            vector("b_mag", b_mag);
            vector("r_mag", &r);
        }
    }
    if let Some(w) = &sae.wiring().w_skip {
        all.insert("W_skip", (vec![d_out, d], bytes(w)));
    }
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
                    "\"normalize_activations\": \"covariance_whitening\"",
                )
            },
            "covariance_whitening",
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
