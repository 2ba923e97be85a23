//! The gated SAEs of Phi-3 (nev): SAELens' file names with tensors of their own.
//!
//! ```text
//! xs    = x sqrt(d) / mean_norm                                   if mean_norm is there
//! f     = 1[xs W_enc + b_enc > 0] relu(xs W_enc softplus(s_gate) scaling_factor + b_gate)
//! x_hat = f W_dec + b_dec
//! ```
//!
//! `cfg.json` is not SAELens' and may be empty; it is not needed. These equations are those of
//! consumers of the files, not of their author. A file with `tgt_mean_norm` predicts another site in
//! units that no published code undoes, and is refused.

use safetensors::tensor::SafeTensors;

use super::tensors::Tensors;
use super::unnamed;
use crate::arch::{Activation, Wiring};
use crate::error::SaeError;
use crate::sae::Sae;

/// Whether the weights are of this kind.
pub(crate) fn is(weights: &[u8]) -> bool {
    SafeTensors::deserialize(weights).is_ok_and(|t| t.names().contains(&"s_gate"))
}

/// Reads files in memory; `place` is for messages.
///
/// # Errors
/// [`SaeError::Format`] naming the tensor, [`SaeError::Config`].
pub fn parse(place: &str, config: &[u8], weights: &[u8]) -> Result<Sae, SaeError> {
    if !config.is_empty() {
        serde_json::from_slice::<serde_json::Map<_, _>>(config).map_err(|e| SaeError::Format {
            path: format!("{place}/cfg.json"),
            reason: format!("not a JSON object: {e}"),
        })?;
    }
    let mut t = Tensors::safetensors(&format!("{place}/sae_weights.safetensors"), weights)?;
    let (d, m) = t.matrix("W_enc")?;
    let mut w_enc = t.take_transposed("W_enc", d, m)?;
    let w_dec = t.take("W_dec", &[m, d])?;
    let (b_gate, b_dec) = (t.take("b_enc", &[m])?, t.take("b_dec", &[d])?);
    let (s, b_mag) = (t.take("s_gate", &[m])?, t.take("b_gate", &[m])?);
    let factor = if t.is_vector("scaling_factor", m) {
        t.take("scaling_factor", &[m])?
    } else {
        vec![t.scalar("scaling_factor")?; m]
    };
    if t.has("mean_norm") {
        let by = (d as f32).sqrt() / t.scalar("mean_norm")?;
        w_enc.iter_mut().for_each(|v| *v *= by);
    }
    t.finish()?;
    let softplus = |v: f32| v.max(0.0) + (-v.abs()).exp().ln_1p();
    let scale = s
        .iter()
        .zip(&factor)
        .map(|(s, f)| softplus(*s) * f)
        .collect();
    let activation = Activation::Gated {
        b_gate,
        scale,
        b_mag,
    };
    let wiring = Wiring {
        centre: false,
        ..Wiring::default()
    };
    let b_enc = vec![0.0; m];
    Sae::of(
        unnamed(d, m, m),
        activation,
        wiring,
        w_enc,
        b_enc,
        w_dec,
        b_dec,
    )
}
