//! Suites, judges, statistics and arms; the JSON record is the truth.
//!
//! [`prompts`] are run under [`arms`], replies are sorted by the [`judge`], texts are priced by
//! [`text`], and [`record`] keeps it all. Beside studies, [`suites`] of questions are asked by [`run`]
//! and become figures in [`results`], with a [`folder`] for each run. Views recompute nothing. Statistics are in
//! [`stats`], shared with discovery.
#![forbid(unsafe_code)]

pub mod arms;
pub mod crescendo;
mod error;
pub mod export;
pub mod files;
pub mod folder;
pub mod judge;
pub mod leak;
mod parquet;
pub mod prompts;
pub mod record;
pub mod results;
pub mod rows;
pub mod run;
pub mod suites;
pub mod talk;
pub mod text;
pub mod wrap;

pub use demur_features::stats;
pub use error::EvalError;
