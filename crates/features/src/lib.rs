//! Finding the latents that mediate refusal, with evidence for each.
//!
//! The way of the data: [`mod@harvest`] gives rows of the residual stream, [`activations`] their
//! codes and what is read off them, [`mod@contrast`] compares groups of prompts, [`lens`] says what a
//! latent promotes, [`mod@attribution`] what it adds to the refusal by gradients, [`causal`] clamps it and
//! watches the refusal, and [`table`] keeps it all. [`gate`] trains the condition under which it is
//! clamped.
#![forbid(unsafe_code)]

pub mod activations;
pub mod attribution;
pub mod causal;
pub mod contrast;
mod error;
pub mod gate;
pub mod harvest;
pub mod lens;
pub mod logistic;
pub mod stats;
pub mod table;

pub use error::FeatureError;
