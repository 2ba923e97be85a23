//! Transcoders (2406.11944) read one site and write another; skip transcoders (2501.18823) add a
//! linear map of the input.
//!
//! ```text
//! y_hat = f(x) W_dec + b_dec            transcoder: x is not centred, b_dec lives at the output
//! y_hat = ... + x W_skip^T              skip transcoder, W_skip [d_out, d_in]
//! ```
//!
//! Any activation may be between. What an SAE has of this is its [`Wiring`].

use crate::arch::InputNorm;

/// How an SAE is connected to what it reads and writes.
#[derive(Debug, Clone, PartialEq)]
pub struct Wiring {
    /// Normalisation of its input.
    pub input_norm: InputNorm,
    /// Whether `b_dec` is subtracted from the (normalised) input.
    pub centre: bool,
    /// Whether it predicts another site than it reads.
    pub transcoder: bool,
    /// `W_skip`, `[d_out, d_in]`.
    pub w_skip: Option<Vec<f32>>,
}

impl Default for Wiring {
    /// A plain SAE: `b_dec` subtracted, nothing normalised, no skip.
    fn default() -> Self {
        Self {
            input_norm: InputNorm::None,
            centre: true,
            transcoder: false,
            w_skip: None,
        }
    }
}
