//! What turns pre-activations into latent activations: one file an architecture, one enum for all.
//!
//! With `p = (norm_in(x) - centre) W_enc + b_enc` `[d_sae]`, every architecture here is
//!
//! ```text
//! f(x)  = activation(p)
//! x_hat = norm_out(f(x) W_dec + b_dec) + x W_skip^T
//! ```
//!
//! so that steering, features and metrics ask an [`crate::Sae`] for codes and never which it is. The
//! names are those of SAELens; the equations are at the head of each file.

pub mod batch_topk;
pub mod gated;
pub mod jumprelu;
pub mod matryoshka;
pub mod norm;
pub mod relu;
pub mod topk;
pub mod transcoder;

use serde::{Deserialize, Serialize};

use crate::error::SaeError;
pub use norm::InputNorm;
pub use transcoder::Wiring;

/// An architecture with its parameters beyond `W_enc`, `b_enc`, `W_dec` and `b_dec`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
pub enum Activation {
    /// [`topk`]: the `k` largest pre-activations.
    #[serde(rename = "topk")]
    TopK {
        /// Latents active at once.
        k: usize,
    },
    /// [`batch_topk`]: above one threshold that training estimated.
    #[serde(rename = "batchtopk")]
    BatchTopK {
        /// Mean number of active latents in training.
        k: usize,
        /// The threshold.
        threshold: f32,
    },
    /// [`matryoshka`]: as BatchTopK, over nested dictionaries.
    #[serde(rename = "matryoshka_batchtopk")]
    Matryoshka {
        /// Mean number of active latents in training.
        k: usize,
        /// The threshold.
        threshold: f32,
        /// Latents of each group; the dictionary of level `i` is the first `i + 1` groups.
        group_sizes: Vec<usize>,
    },
    /// [`jumprelu`]: above a threshold of its own.
    #[serde(rename = "jumprelu")]
    JumpRelu {
        /// Each latent's threshold, `[d_sae]`.
        #[serde(skip)]
        threshold: Vec<f32>,
    },
    /// [`gated`]: a gate says whether, a magnitude how much.
    Gated {
        /// Bias of the gate, `[d_sae]`.
        #[serde(skip)]
        b_gate: Vec<f32>,
        /// Factor of the shared product in the magnitude, `exp(r_mag)`, `[d_sae]`.
        #[serde(skip)]
        scale: Vec<f32>,
        /// Bias of the magnitude, `[d_sae]`.
        #[serde(skip)]
        b_mag: Vec<f32>,
    },
    /// [`relu`]: rectified.
    #[serde(rename = "standard")]
    Relu,
}

impl Activation {
    /// The architecture's name, as SAELens writes it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::TopK { .. } => "topk",
            Self::BatchTopK { .. } => "batchtopk",
            Self::Matryoshka { .. } => "matryoshka_batchtopk",
            Self::JumpRelu { .. } => "jumprelu",
            Self::Gated { .. } => "gated",
            Self::Relu => "standard",
        }
    }

    /// Activation of latent `j` with pre-activation `p`, which no other latent takes part in; for
    /// TopK the rectified pre-activation, whether in the top `k` or not.
    #[inline]
    pub fn of(&self, j: usize, p: f32) -> f32 {
        match self {
            Self::TopK { .. } | Self::Relu => relu::activation(p),
            Self::BatchTopK { threshold, .. } | Self::Matryoshka { threshold, .. } => {
                batch_topk::activation(p, *threshold)
            }
            Self::JumpRelu { threshold } => jumprelu::activation(p, threshold[j]),
            Self::Gated {
                b_gate,
                scale,
                b_mag,
            } => gated::activation(p, b_gate[j], scale[j], b_mag[j]),
        }
    }

    /// Refuses parameters of the wrong number, or that are not finite.
    pub(crate) fn check(&self, d_sae: usize) -> Result<(), SaeError> {
        let values = |field: &'static str, v: &[f32]| {
            let rule = if v.len() != d_sae {
                format!("must have {d_sae}")
            } else if v.iter().any(|x| !x.is_finite()) {
                "must be finite".to_owned()
            } else {
                return Ok(());
            };
            Err(SaeError::Config {
                field,
                value: format!("{} values", v.len()),
                rule,
            })
        };
        match self {
            Self::TopK { .. } | Self::Relu => Ok(()),
            Self::BatchTopK { threshold, .. } => batch_topk::check(*threshold),
            Self::Matryoshka {
                threshold,
                group_sizes,
                ..
            } => {
                batch_topk::check(*threshold)?;
                matryoshka::check(group_sizes, d_sae)
            }
            Self::JumpRelu { threshold } => values("threshold", threshold),
            Self::Gated {
                b_gate,
                scale,
                b_mag,
            } => {
                values("b_gate", b_gate)?;
                values("r_mag", scale)?;
                values("b_mag", b_mag)
            }
        }
    }
}
