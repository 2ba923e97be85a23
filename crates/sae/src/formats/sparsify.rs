//! EleutherAI's sparsify: one folder a hookpoint.
//!
//! | file | holds |
//! | --- | --- |
//! | `cfg.json` | `activation`, `expansion_factor`, `num_latents`, `k`, `transcode`, `d_in`, ... |
//! | `sae.safetensors` | `encoder.weight [m, d]`, `encoder.bias`, `W_dec [m, d]`, `b_dec`, `W_skip [d, d]` |
//!
//! `num_latents: 0` means `d_in * expansion_factor`. An autoencoder subtracts `b_dec`, a transcoder
//! does not. The hookpoint is the folder's name and the model is in the run's `config.json`, one
//! folder up.

use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use super::folder::write_folder;
use super::tensors::Tensors;
use super::{object, read, size};
use crate::arch::{Activation, InputNorm, Wiring};
use crate::error::SaeError;
use crate::sae::{Sae, SaeConfig};

const CONFIG: &str = "cfg.json";
const WEIGHTS: &str = "sae.safetensors";

const KNOWN: [&str; 10] = [
    "activation",
    "expansion_factor",
    "normalize_decoder",
    "num_latents",
    "k",
    "multi_topk",
    "skip_connection",
    "transcode",
    "d_in",
    "signed",
];

/// Reads a hookpoint's folder.
///
/// # Errors
/// [`SaeError::Io`], [`SaeError::Format`] naming the key or tensor, [`SaeError::Config`].
pub fn load(folder: &Path) -> Result<Sae, SaeError> {
    let (config, weights) = (read(&folder.join(CONFIG))?, read(&folder.join(WEIGHTS))?);
    let hook = folder.file_name().unwrap_or_default().to_string_lossy();
    let run = folder.parent().map(|p| p.join("config.json"));
    let model = run
        .and_then(|p| fs::read(p).ok())
        .and_then(|b| serde_json::from_slice::<Value>(&b).ok())
        .and_then(|v| Some(v["model"].as_str()?.to_owned()))
        .unwrap_or_default();
    parse(
        &folder.display().to_string(),
        &config,
        &weights,
        &hook,
        &model,
    )
}

/// Reads files that are in memory; `place` is for messages.
///
/// # Errors
/// As [`load`].
pub fn parse(
    place: &str,
    config: &[u8],
    weights: &[u8],
    hook: &str,
    model: &str,
) -> Result<Sae, SaeError> {
    let at = format!("{place}/{CONFIG}");
    let config = object(&at, config, &KNOWN)?;
    let refuse = |key: &str| SaeError::Format {
        path: at.clone(),
        reason: format!("{key} = {} is not supported", config[key]),
    };
    let flag = |key: &str| match config.get(key) {
        None => Ok(false),
        Some(Value::Bool(b)) => Ok(*b),
        Some(_) => Err(refuse(key)),
    };
    match config.get("activation") {
        None => {}
        Some(Value::String(s)) if s == "topk" => {}
        Some(_) => return Err(refuse("activation")),
    }
    if flag("signed")? {
        return Err(refuse("signed"));
    }
    let (d, k) = (size(&at, &config, "d_in")?, size(&at, &config, "k")?);
    let m = match config.get("num_latents").and_then(Value::as_u64) {
        None | Some(0) => d.saturating_mul(size(&at, &config, "expansion_factor")?),
        Some(_) => size(&at, &config, "num_latents")?,
    };
    let transcoder = flag("transcode")?;
    let mut t = Tensors::safetensors(&format!("{place}/{WEIGHTS}"), weights)?;
    let w_enc = t.take("encoder.weight", &[m, d])?;
    let b_enc = t.take("encoder.bias", &[m])?;
    let w_dec = t.take("W_dec", &[m, d])?;
    let b_dec = t.take("b_dec", &[d])?;
    let w_skip = flag("skip_connection")?
        .then(|| t.take("W_skip", &[d, d]))
        .transpose()?;
    t.finish()?;
    let cfg = SaeConfig {
        d_model: d,
        d_sae: m,
        k,
        hook_name: hook.to_owned(),
        model_name: model.to_owned(),
    };
    let wiring = Wiring {
        input_norm: InputNorm::None,
        centre: !transcoder,
        transcoder,
        w_skip,
    };
    Sae::of(
        cfg,
        Activation::TopK { k },
        wiring,
        w_enc,
        b_enc,
        w_dec,
        b_dec,
    )
}

/// The two files of a TopK SAE: `cfg.json`, `sae.safetensors` (f32).
///
/// # Errors
/// [`SaeError::Config`] if sparsify has no such SAE.
pub fn to_bytes(sae: &Sae) -> Result<[(&'static str, Vec<u8>); 2], SaeError> {
    let wiring = sae.wiring();
    let Activation::TopK { k } = sae.activation() else {
        return Err(unfit("architecture", sae.architecture()));
    };
    if wiring.centre == wiring.transcoder {
        return Err(unfit("apply_b_dec_to_input", wiring.centre.to_string()));
    }
    if wiring.input_norm != InputNorm::None {
        return Err(unfit(
            "normalize_activations",
            wiring.input_norm.name().to_owned(),
        ));
    }
    let (d, m) = (sae.d_model(), sae.d_sae());
    if sae.d_out() != d {
        return Err(unfit("d_out", sae.d_out().to_string()));
    }
    let config = json!({
        "activation": "topk",
        "expansion_factor": m.div_ceil(d),
        "normalize_decoder": true,
        "num_latents": m,
        "k": k,
        "multi_topk": false,
        "skip_connection": wiring.w_skip.is_some(),
        "transcode": wiring.transcoder,
        "d_in": d,
    });
    let (w_enc, b_enc, w_dec, b_dec) = sae.weights();
    let mut all = vec![
        ("encoder.weight", vec![m, d], w_enc),
        ("encoder.bias", vec![m], b_enc),
        ("W_dec", vec![m, d], w_dec),
        ("b_dec", vec![d], b_dec),
    ];
    if let Some(w) = &wiring.w_skip {
        all.push(("W_skip", vec![d, d], w));
    }
    let all: Vec<(&str, Vec<usize>, Vec<u8>)> = all
        .into_iter()
        .map(|(n, s, v)| (n, s, v.iter().flat_map(|x| x.to_le_bytes()).collect()))
        .collect();
    let failed = |e: safetensors::SafeTensorError| SaeError::Format {
        path: WEIGHTS.to_owned(),
        reason: e.to_string(),
    };
    let views = all
        .iter()
        .map(|(n, s, b)| Ok((*n, TensorView::new(Dtype::F32, s.clone(), b)?)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)?;
    let weights = safetensors::serialize(views, None).map_err(failed)?;
    let config = serde_json::to_vec_pretty(&config).unwrap_or_default();
    Ok([(CONFIG, config), (WEIGHTS, weights)])
}

/// Writes `sae` to `folder`, which must not exist or hold an SAE.
///
/// # Errors
/// As [`to_bytes`]; [`SaeError::Io`], and a folder that was there is left as it was.
pub fn save(sae: &Sae, folder: &Path) -> Result<(), SaeError> {
    write_folder(folder, &to_bytes(sae)?)
}

fn unfit(field: &'static str, value: String) -> SaeError {
    SaeError::Config {
        field,
        value,
        rule: "has no place in sparsify's layout; write SAELens'".to_owned(),
    }
}
