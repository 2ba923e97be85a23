//! One file a command.

pub mod bench;
pub mod bench_sae;
mod bench_text;
pub mod chat;
pub mod completions;
pub mod eval;
pub mod features;
pub mod gate;
pub mod generate;
pub mod harvest;
pub mod inspect;
pub mod models;
pub mod plan;
pub mod pull;
pub mod reference;
pub mod report;
pub mod sae;
pub mod sae_eval;
pub mod sae_fit;
pub mod study;
pub mod tune;
