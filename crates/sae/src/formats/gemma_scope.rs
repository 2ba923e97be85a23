//! Gemma Scope: JumpReLU SAEs in one file without a config.
//!
//! `params.npz` has `W_enc [d, m]`, `W_dec [m, d]`, `b_enc`, `b_dec` and `threshold [m]`; Gemma
//! Scope 2's `params.safetensors` has the same in lower case and, for skip transcoders,
//! `affine_skip_connection [d, d_out]`. Inputs are neither normalised nor centred. The second kind
//! does not say whether it is a transcoder; one with a skip connection is.

use std::path::Path;

use super::tensors::{Tensors, transpose};
use super::{npz, read, unnamed};
use crate::arch::{Activation, Wiring};
use crate::error::SaeError;
use crate::sae::Sae;

/// Reads a `.npz` or a `.safetensors` file.
///
/// # Errors
/// [`SaeError::Io`], [`SaeError::Format`] naming the tensor, [`SaeError::Config`].
pub fn load(path: &Path) -> Result<Sae, SaeError> {
    let (place, bytes) = (path.display().to_string(), read(path)?);
    if path.extension().is_some_and(|e| e == "npz") {
        parse_npz(&place, &bytes)
    } else {
        parse_safetensors(&place, &bytes)
    }
}

/// Reads `params.npz` in memory; `place` is for messages.
///
/// # Errors
/// As [`load`].
pub fn parse_npz(place: &str, bytes: &[u8]) -> Result<Sae, SaeError> {
    let arrays = npz::arrays(bytes).map_err(|reason| SaeError::Format {
        path: place.to_owned(),
        reason,
    })?;
    of_tensors(Tensors::new(place, arrays), ["W_enc", "W_dec"])
}

/// Reads `params.safetensors` in memory; `place` is for messages.
///
/// # Errors
/// As [`load`].
pub fn parse_safetensors(place: &str, bytes: &[u8]) -> Result<Sae, SaeError> {
    of_tensors(Tensors::safetensors(place, bytes)?, ["w_enc", "w_dec"])
}

fn of_tensors(mut t: Tensors, [enc, dec]: [&str; 2]) -> Result<Sae, SaeError> {
    let ((d, m), (_, d_out)) = (t.matrix(enc)?, t.matrix(dec)?);
    let w_enc = t.take_transposed(enc, d, m)?;
    let w_dec = t.take(dec, &[m, d_out])?;
    let (b_enc, b_dec) = (t.take("b_enc", &[m])?, t.take("b_dec", &[d_out])?);
    let threshold = t.take("threshold", &[m])?;
    let skip = "affine_skip_connection";
    let w_skip = t
        .has(skip)
        .then(|| Ok::<_, SaeError>(transpose(&t.take(skip, &[d, d_out])?, d, d_out)))
        .transpose()?;
    t.finish()?;
    let wiring = Wiring {
        centre: false,
        transcoder: w_skip.is_some(),
        w_skip,
        ..Wiring::default()
    };
    let activation = Activation::JumpRelu { threshold };
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
