//! Llama Scope: JumpReLU with one threshold for all latents.
//!
//! | file | holds |
//! | --- | --- |
//! | `hyperparams.json` | `d_model`, `d_sae`, `jump_relu_threshold`, `dataset_average_activation_norm.in`, `hook_point_in`, ... |
//! | `checkpoints/final.safetensors` | `encoder.weight [m, d]`, `encoder.bias`, `decoder.weight [d, m]`, `decoder.bias` |
//!
//! Inputs are scaled by `s = sqrt(d) / norm` and not centred; the scale is folded: `W_enc s`,
//! `W_dec / s`, `b_dec / s`. The stored threshold is in units of the raw stream, so `threshold s` is
//! compared with pre-activations (as SAELens' loader has it; the files do not say).

use std::path::Path;

use serde_json::Value;

use super::tensors::Tensors;
use super::{read, size};
use crate::arch::{Activation, Wiring};
use crate::error::SaeError;
use crate::sae::{Sae, SaeConfig};

const CONFIG: &str = "hyperparams.json";
const WEIGHTS: &str = "checkpoints/final.safetensors";

/// Values that change the equations, with the only ones that are read.
const FIXED: [(&str, &[&str]); 7] = [
    ("act_fn", &["\"jumprelu\""]),
    ("use_glu_encoder", &["false"]),
    ("use_decoder_bias", &["true"]),
    ("apply_decoder_bias_to_pre_encoder", &["false"]),
    ("norm_activation", &["\"dataset-wise\""]),
    ("use_ghost_grads", &["false"]),
    ("sparsity_include_decoder_norm", &["false", "true"]),
];

/// Keys that say how it was trained.
const TRAINING: [&str; 12] = [
    "hook_point_in",
    "hook_point_out",
    "expansion_factor",
    "d_model",
    "d_sae",
    "dataset_average_activation_norm",
    "decoder_exactly_fixed_norm",
    "jump_relu_threshold",
    "top_k",
    "k",
    "dtype",
    "device",
];

/// Reads a folder.
///
/// # Errors
/// [`SaeError::Io`], [`SaeError::Format`] naming the key or tensor, [`SaeError::Config`].
pub fn load(folder: &Path) -> Result<Sae, SaeError> {
    let (config, weights) = (read(&folder.join(CONFIG))?, read(&folder.join(WEIGHTS))?);
    parse(&folder.display().to_string(), &config, &weights)
}

/// Reads files that are in memory; `place` is for messages.
///
/// # Errors
/// As [`load`].
pub fn parse(place: &str, config: &[u8], weights: &[u8]) -> Result<Sae, SaeError> {
    let at = format!("{place}/{CONFIG}");
    let known: Vec<&str> = FIXED.iter().map(|f| f.0).chain(TRAINING).collect();
    let config = super::object(&at, config, &known)?;
    let wrong = |reason: String| SaeError::Format {
        path: at.clone(),
        reason,
    };
    for (key, values) in FIXED {
        if let Some(v) = config.get(key)
            && !values.contains(&v.to_string().as_str())
        {
            let only = values.join(", ");
            return Err(wrong(format!(
                "{key} = {v} is not supported; supported: {only}"
            )));
        }
    }
    let positive = |key: &str, v: Option<&Value>| {
        v.and_then(Value::as_f64)
            .filter(|v| v.is_finite() && *v > 0.0)
            .ok_or_else(|| wrong(format!("'{key}' is missing or not a positive number")))
    };
    let (d, m) = (size(&at, &config, "d_model")?, size(&at, &config, "d_sae")?);
    let norms = config.get("dataset_average_activation_norm");
    let norm = positive(
        "dataset_average_activation_norm.in",
        norms.and_then(|n| n.get("in")),
    )?;
    let threshold = config.get("jump_relu_threshold");
    let threshold = positive("jump_relu_threshold", threshold)? as f32;
    let s = ((d as f64).sqrt() / norm) as f32;
    let mut t = Tensors::safetensors(&format!("{place}/{WEIGHTS}"), weights)?;
    let mut w_enc = t.take("encoder.weight", &[m, d])?;
    let b_enc = t.take("encoder.bias", &[m])?;
    let mut w_dec = t.take_transposed("decoder.weight", d, m)?;
    let mut b_dec = t.take("decoder.bias", &[d])?;
    t.finish()?;
    w_enc.iter_mut().for_each(|v| *v *= s);
    w_dec.iter_mut().for_each(|v| *v /= s);
    b_dec.iter_mut().for_each(|v| *v /= s);
    let hook = config.get("hook_point_in").and_then(Value::as_str);
    let cfg = SaeConfig {
        d_model: d,
        d_sae: m,
        k: m,
        hook_name: hook.unwrap_or_default().to_owned(),
        model_name: String::new(),
    };
    let wiring = Wiring {
        centre: false,
        ..Wiring::default()
    };
    let activation = Activation::JumpRelu {
        threshold: vec![threshold * s; m],
    };
    Sae::of(cfg, activation, wiring, w_enc, b_enc, w_dec, b_dec)
}
