//! Sparse autoencoders: equations, training, metrics, file formats.
//!
//! A TopK SAE writes an activation `x` as a sparse sum of dictionary rows:
//!
//! ```text
//! f(x)  = relu(top_k((x - b_dec) W_enc + b_enc))        [d_sae]
//! x_hat = f(x) W_dec + b_dec                            [d_model]
//! ```
//!
//! The crate knows activations, not tokens. Numbers are f32; files may be f16.
#![forbid(unsafe_code)]

pub mod activations;
mod error;
pub mod metrics;
pub mod saelens;
mod topk;
pub mod train;

pub use error::SaeError;
pub use topk::{Codes, Sae, SaeConfig};
