//! openai/sparse_autoencoder: a `.pt` file with everything in one dictionary.
//!
//! ```text
//! f     = act((norm(x) - pre_bias) encoder.weight^T + latent_bias)
//! x_hat = unnorm(f decoder.weight^T + pre_bias)
//! ```
//!
//! `encoder.weight` is `[m, d]`, `decoder.weight` `[d, m]`. TopK SAEs normalise their input as
//! `layer_norm` does; ReLU ones do not.

use std::path::Path;

use super::pickle::{self, Value};
use super::{read, torch, unnamed};
use crate::arch::{Activation, InputNorm, Wiring};
use crate::error::SaeError;
use crate::sae::Sae;

/// Reads a file.
///
/// # Errors
/// [`SaeError::Io`], [`SaeError::Format`] naming the key or tensor, [`SaeError::Config`].
pub fn load(path: &Path) -> Result<Sae, SaeError> {
    parse(&path.display().to_string(), &read(path)?)
}

/// Reads a file in memory; `place` is for messages.
///
/// # Errors
/// As [`load`].
pub fn parse(place: &str, bytes: &[u8]) -> Result<Sae, SaeError> {
    let format = |reason: String| SaeError::Format {
        path: place.to_owned(),
        reason,
    };
    let (mut t, mut rest) = torch(place, pickle::state_dict(bytes).map_err(format)?);
    let (m, d) = t.matrix("encoder.weight")?;
    let w_enc = t.take("encoder.weight", &[m, d])?;
    let w_dec = t.take_transposed("decoder.weight", d, m)?;
    let (b_enc, b_dec) = (t.take("latent_bias", &[m])?, t.take("pre_bias", &[d])?);
    for statistic in [
        "stats_last_nonzero",
        "latents_activation_frequency",
        "latents_mean_square",
    ] {
        t.ignore(statistic);
    }
    t.finish()?;
    let state = rest.remove("activation_state_dict");
    let (activation, k, input_norm) = match rest.remove("activation") {
        None => (Activation::Relu, m, InputNorm::None),
        Some(Value::Text(name)) if name == "ReLU" => (Activation::Relu, m, InputNorm::None),
        Some(Value::Text(name)) if name == "TopK" => {
            let Some(Value::Dict(state)) = state else {
                return Err(format("'activation_state_dict' is missing".to_owned()));
            };
            match state.get("postact_fn") {
                None => {}
                Some(Value::Text(name)) if name == "ReLU" => {}
                Some(other) => return Err(format(format!("postact_fn = {other:?} is not known"))),
            }
            let Some(Value::Number(k)) = state.get("k") else {
                return Err(format("'activation_state_dict.k' is missing".to_owned()));
            };
            let k = *k as usize;
            (Activation::TopK { k }, k, InputNorm::LayerNorm)
        }
        Some(other) => return Err(format(format!("activation = {other:?} is not known"))),
    };
    if let Some(key) = rest.keys().next() {
        return Err(format(format!("key '{key}' is not known")));
    }
    let wiring = Wiring {
        input_norm,
        ..Wiring::default()
    };
    Sae::of(
        unnamed(d, m, k),
        activation,
        wiring,
        w_enc,
        b_enc,
        w_dec,
        b_dec,
    )
}
