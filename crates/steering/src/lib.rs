//! Steering plans: data, validated, compiled to interventions on the residual stream.
//!
//! A [`SteeringPlan`] says *what* to do in terms that a person can read in a diff: this latent, this
//! value, on these tokens, when this gate is open. [`compile`] checks it against the SAEs and the
//! model at hand and gives a [`CompiledPlan`], which implements
//! [`demur_model::hooks::Intervention`]. Nothing here reads or writes a file.
//!
//! # The edits
//!
//! With `x` the residual at the site, `f(x)` the latent activations, `d_j` the `j`-th decoder row:
//!
//! | operation | edit with the error term kept |
//! | --- | --- |
//! | set | `x' = x + (c - f_j(x)) d_j` |
//! | floor | `x' = x + max(0, c - f_j(x)) d_j` |
//! | ceiling | `x' = x + min(0, c - f_j(x)) d_j` |
//! | scale | `x' = x + (s - 1) f_j(x) d_j` |
//! | ablate | `x' = x - f_j(x) d_j` |
//! | add | `x' = x + c d_j` |
//!
//! With the error term *dropped*, `x'` is the decoded reconstruction of the edited latents instead:
//! the same edit applied to `x_hat` rather than to `x`. A plan whose interventions hold no edit and
//! drop the error is the *SAE passthrough*, which prices the reconstruction alone.
#![forbid(unsafe_code)]

mod compile;
mod diff;
mod error;
mod explain;
mod gate;
mod plan;
mod run;

pub use compile::{CompiledPlan, SaeEntry, SaeSet, absolute, compile};
pub use diff::{Change, diff};
pub use error::SteeringError;
pub use explain::{explain, explain_gate};
pub use gate::{Aggregate, Condition, Gate, GateWeight, Head, Probe, Scope, Zone};
pub use plan::{
    Direction, DirectionOp, ErrorTerm, InterventionSpec, LatentEdit, Membership, Op, PLAN_VERSION,
    Span, SteeringPlan, Unit,
};
