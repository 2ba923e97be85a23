//! Finding the latents that mediate refusal, with evidence for each.
#![forbid(unsafe_code)]

pub mod table;
