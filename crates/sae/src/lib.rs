//! Sparse autoencoders: equations, training, metrics, file formats.
//!
//! An SAE writes an activation `x` as a sparse sum of dictionary rows:
//!
//! ```text
//! f(x)  = activation((x - b_dec) W_enc + b_enc)         [d_sae]
//! x_hat = f(x) W_dec + b_dec                            [d_model]
//! ```
//!
//! The activation is the architecture: [`arch`] has one file for each. [`formats`] reads the files of the
//! libraries that train SAEs.
//!
//! The crate knows activations, not tokens. Numbers are f32; files may be f16.
#![forbid(unsafe_code)]

pub mod activations;
pub mod arch;
pub mod compare;
mod error;
pub mod formats;
pub mod metrics;
mod sae;
pub mod saelens;
pub mod train;

pub use error::SaeError;
pub use sae::{Codes, Sae, SaeConfig};
