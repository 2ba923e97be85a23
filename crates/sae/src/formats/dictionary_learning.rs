//! dictionary_learning: `ae.pt`, a pickled state dictionary, and `config.json` beside it.
//!
//! | class | tensors | activation |
//! | --- | --- | --- |
//! | `AutoEncoder` | `bias`, `encoder.*`, `decoder.weight [d, m]` | relu |
//! | `AutoEncoderNew` | `encoder.*`, `decoder.weight`, `decoder.bias` | relu, not centred |
//! | `GatedAutoEncoder` | `encoder.weight`, `decoder.weight`, `decoder_bias`, `r_mag`, `gate_bias`, `mag_bias` | gated |
//! | `AutoEncoderTopK`, `BatchTopKSAE` | `encoder.*`, `decoder.weight`, `b_dec`, `k`, `threshold` | TopK; BatchTopK by threshold |
//! | `MatryoshkaBatchTopKSAE` | `W_enc [d, m]`, `b_enc`, `W_dec [m, d]`, `b_dec`, `k`, `threshold`, `group_sizes` | the same |
//! | `JumpReluAutoEncoder` | `W_enc`, `b_enc`, `W_dec`, `b_dec`, `threshold [m]` | JumpReLU, not centred |
//!
//! The class is `trainer.dict_class` of the config: TopK and BatchTopK have the same tensors. Weights
//! are saved for raw inputs. A checkpoint made with `backup_steps` has the dictionary under `ae`, for
//! normalised inputs; `norm_factor` is folded: with `x / c` trained, biases and thresholds times `c`.

use std::path::Path;

use serde_json::Value as Json;

use super::pickle::{self, Value};
use super::{read, torch, unnamed};
use crate::arch::{Activation, Wiring};
use crate::error::SaeError;
use crate::sae::Sae;

/// Reads `ae.pt` and the `config.json` beside it.
///
/// # Errors
/// [`SaeError::Io`], [`SaeError::Format`] naming the key or tensor, [`SaeError::Config`].
pub fn load(path: &Path) -> Result<Sae, SaeError> {
    let config = read(&path.with_file_name("config.json"))?;
    parse(&path.display().to_string(), &config, &read(path)?)
}

/// Reads files in memory; `place` is for messages.
///
/// # Errors
/// As [`load`].
pub fn parse(place: &str, config: &[u8], bytes: &[u8]) -> Result<Sae, SaeError> {
    let format = |reason: String| SaeError::Format {
        path: place.to_owned(),
        reason,
    };
    let config: Json = serde_json::from_slice(config).map_err(|e| SaeError::Format {
        path: format!("{place}: config.json"),
        reason: format!("not JSON: {e}"),
    })?;
    let trainer = &config["trainer"];
    let class = trainer["dict_class"]
        .as_str()
        .ok_or_else(|| format("config.json has no 'trainer.dict_class'".to_owned()))?;
    let mut dict = pickle::state_dict(bytes).map_err(format)?;
    let mut c = 1.0f32;
    if let Some(Value::Dict(inner)) = dict.remove("ae") {
        if let Some(Value::Number(factor)) = dict.get("norm_factor") {
            c = *factor as f32;
        }
        dict = inner;
    }
    let (mut t, rest) = torch(place, dict);
    if let Some(key) = rest.keys().next() {
        return Err(format(format!("key '{key}' is not a tensor")));
    }
    let plain = t.has("W_enc");
    let (m, d) = if plain {
        let (d, m) = t.matrix("W_enc")?;
        (m, d)
    } else {
        t.matrix("encoder.weight")?
    };
    let (w_enc, w_dec) = if plain {
        (t.take_transposed("W_enc", d, m)?, t.take("W_dec", &[m, d])?)
    } else {
        let w_enc = t.take("encoder.weight", &[m, d])?;
        (w_enc, t.take_transposed("decoder.weight", d, m)?)
    };
    let mut k = m;
    let mut centre = true;
    let (activation, b_enc, b_dec) = match class {
        "AutoEncoder" => {
            let (e, b) = (t.take("encoder.bias", &[m])?, t.take("bias", &[d])?);
            (Activation::Relu, e, b)
        }
        "AutoEncoderNew" => {
            centre = false;
            let (e, b) = (t.take("encoder.bias", &[m])?, t.take("decoder.bias", &[d])?);
            (Activation::Relu, e, b)
        }
        "GatedAutoEncoder" => {
            let r = t.take("r_mag", &[m])?;
            let scaled = |v: Vec<f32>| v.into_iter().map(|v| v * c).collect();
            let activation = Activation::Gated {
                b_gate: scaled(t.take("gate_bias", &[m])?),
                scale: r.into_iter().map(f32::exp).collect(),
                b_mag: scaled(t.take("mag_bias", &[m])?),
            };
            (activation, vec![0.0; m], t.take("decoder_bias", &[d])?)
        }
        "AutoEncoderTopK" | "BatchTopKSAE" | "MatryoshkaBatchTopKSAE" => {
            let b_enc = t.take(if plain { "b_enc" } else { "encoder.bias" }, &[m])?;
            k = match t.sizes("k")?[..] {
                [k] => k,
                _ => return Err(format("'k' is not one number".to_owned())),
            };
            // Without one, the library's own is -1.
            let threshold = if t.has("threshold") {
                t.scalar("threshold")? * c
            } else {
                -1.0
            };
            let activation = match class {
                "AutoEncoderTopK" => Activation::TopK { k },
                "BatchTopKSAE" => Activation::BatchTopK { k, threshold },
                _ => Activation::Matryoshka {
                    k,
                    threshold,
                    group_sizes: t.sizes("group_sizes")?,
                },
            };
            (activation, b_enc, t.take("b_dec", &[d])?)
        }
        "JumpReluAutoEncoder" => {
            centre = false;
            let threshold = t.take("threshold", &[m])?;
            let threshold = threshold.into_iter().map(|v| v * c).collect();
            let (e, b) = (t.take("b_enc", &[m])?, t.take("b_dec", &[d])?);
            (Activation::JumpRelu { threshold }, e, b)
        }
        other => return Err(format(format!("dict_class = '{other}' is not known"))),
    };
    t.finish()?;
    let scaled = |v: Vec<f32>| v.into_iter().map(|v| v * c).collect();
    let mut cfg = unnamed(d, m, k);
    let text = |key: &str| trainer[key].as_str().unwrap_or_default().to_owned();
    cfg.model_name = text("lm_name");
    cfg.hook_name = text("submodule_name");
    let wiring = Wiring {
        centre,
        ..Wiring::default()
    };
    Sae::of(
        cfg,
        activation,
        wiring,
        w_enc,
        scaled(b_enc),
        w_dec,
        scaled(b_dec),
    )
}
