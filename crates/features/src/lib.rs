//! Finding the latents that mediate refusal, with evidence for each.
//!
//! The way of the data: [`mod@harvest`] gives rows of the residual stream, [`activations`] their
//! codes and what is read off them, [`mod@contrast`] compares groups of prompts, [`lens`] says what a
//! latent promotes, [`mod@attribution`] what it adds to the refusal by gradients, [`ranking`] makes the
//! short list and says how much of it is chance, [`causal`] clamps a latent and watches the refusal,
//! [`sets`] clamps several, and [`table`] keeps it all. [`sites`] compares layers. [`gate`] trains the
//! condition under which latents are clamped, [`mod@attention`] one that says itself which tokens count.
#![forbid(unsafe_code)]

pub mod activations;
pub mod attention;
pub mod attribution;
pub mod causal;
pub mod contrast;
mod error;
pub mod gate;
pub mod harvest;
pub mod lens;
pub mod logistic;
pub mod ranking;
pub mod sets;
pub mod sites;
pub mod stats;
pub mod table;

pub use error::FeatureError;
