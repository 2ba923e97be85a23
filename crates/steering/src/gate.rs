//! Gates: a calibrated condition on latents that turns an intervention on.
//!
//! A gate reads a weighted sum of latents on every token in its roles,
//! `s_t = bias + sum_j w_j f_j(x_t)`, and aggregates `s` over the tokens seen so far (max, mean or
//! last). It is open while the aggregate is at or above `threshold`. With `hysteresis = h` an open
//! gate closes only below `threshold - h`; with `latch` it never closes again in a conversation.
//! The prompt is read as a whole before its first token is edited, so a gate sees the end of a
//! request before it decides about its beginning.
//!
//! Cost: one SAE encode of the rows read (shared with the edit), plus `weights.len()` products.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::SteeringError;
use demur_model::hooks::Role;

/// A condition on latents. See the module documentation for its meaning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Gate {
    /// Latents read and their weights.
    pub weights: Vec<GateWeight>,
    /// Added to the weighted sum.
    #[serde(default)]
    pub bias: f32,
    /// How the per-token scores become one.
    #[serde(default)]
    pub aggregate: Aggregate,
    /// The gate is open at or above this score.
    pub threshold: f32,
    /// An open gate closes only below `threshold - hysteresis`.
    #[serde(default)]
    pub hysteresis: f32,
    /// Once open, open for the rest of the sequence.
    #[serde(default)]
    pub latch: bool,
    /// Only tokens of these roles are read; empty: the user's tokens and the template's.
    #[serde(default)]
    pub roles: Vec<Role>,
    /// Read generated tokens too, not only the prompt.
    #[serde(default)]
    pub during_generation: bool,
}

/// One latent that a gate reads.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GateWeight {
    /// Index of the latent.
    pub latent: u32,
    /// Its weight in the sum.
    pub weight: f32,
}

/// How a gate's per-token scores become one number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Aggregate {
    /// The largest score so far.
    #[default]
    Max,
    /// The mean score so far.
    Mean,
    /// The newest token's score.
    Last,
}

impl Gate {
    /// Checks numbers and shapes that need no SAE.
    pub(crate) fn validate(&self, place: &str) -> Result<(), SteeringError> {
        let bad = |field, value: f32, rule| {
            Err(SteeringError::Value {
                place: place.to_owned(),
                field,
                value: value.to_string(),
                rule,
            })
        };
        if self.weights.is_empty() {
            return bad("weights", 0.0, "must name at least one latent");
        }
        if let Some(w) = self.weights.iter().find(|w| !w.weight.is_finite()) {
            return bad("weight", w.weight, "must be finite");
        }
        if !self.threshold.is_finite() {
            return bad("threshold", self.threshold, "must be finite");
        }
        if !self.bias.is_finite() {
            return bad("bias", self.bias, "must be finite");
        }
        if !(self.hysteresis >= 0.0 && self.hysteresis.is_finite()) {
            return bad(
                "hysteresis",
                self.hysteresis,
                "must be finite and not negative",
            );
        }
        Ok(())
    }

    /// Whether tokens of `role` are read.
    pub(crate) fn reads(&self, role: Role) -> bool {
        if self.roles.is_empty() {
            matches!(role, Role::User | Role::Template)
        } else {
            self.roles.contains(&role)
        }
    }
}

/// A gate's memory over one sequence.
#[derive(Debug, Clone, Default)]
pub(crate) struct GateState {
    max: Option<f32>,
    sum: f64,
    count: u64,
    last: f32,
    pub(crate) open: bool,
    pub(crate) ever_open: bool,
}

impl GateState {
    /// Takes one token's score.
    pub(crate) fn push(&mut self, score: f32) {
        self.max = Some(self.max.map_or(score, |m| m.max(score)));
        self.sum += f64::from(score);
        self.count += 1;
        self.last = score;
    }

    /// The aggregated score, or `None` before the first token.
    pub(crate) fn score(&self, how: Aggregate) -> Option<f32> {
        let max = self.max?;
        Some(match how {
            Aggregate::Max => max,
            Aggregate::Mean => (self.sum / self.count as f64) as f32,
            Aggregate::Last => self.last,
        })
    }

    /// Decides anew from what was pushed.
    pub(crate) fn decide(&mut self, gate: &Gate) {
        let Some(score) = self.score(gate.aggregate) else {
            return;
        };
        let bar = if self.open {
            gate.threshold - gate.hysteresis
        } else {
            gate.threshold
        };
        self.open = score >= bar || (gate.latch && self.ever_open);
        self.ever_open |= self.open;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate() -> Gate {
        Gate {
            weights: vec![GateWeight {
                latent: 0,
                weight: 1.0,
            }],
            bias: 0.0,
            aggregate: Aggregate::Last,
            threshold: 1.0,
            hysteresis: 0.5,
            latch: false,
            roles: Vec::new(),
            during_generation: true,
        }
    }

    fn run(gate: &Gate, scores: &[f32]) -> Vec<bool> {
        let mut state = GateState::default();
        scores
            .iter()
            .map(|&s| {
                state.push(s);
                state.decide(gate);
                state.open
            })
            .collect()
    }

    #[test]
    fn hysteresis_holds_an_open_gate_open() {
        assert_eq!(
            run(&gate(), &[0.9, 1.0, 0.6, 0.4, 0.9]),
            [false, true, true, false, false]
        );
    }

    #[test]
    fn a_latched_gate_never_closes() {
        let gate = Gate {
            latch: true,
            ..gate()
        };
        assert_eq!(run(&gate, &[0.0, 2.0, -9.0]), [false, true, true]);
    }

    #[test]
    fn aggregates() {
        let mean = Gate {
            aggregate: Aggregate::Mean,
            hysteresis: 0.0,
            ..gate()
        };
        assert_eq!(run(&mean, &[2.0, 0.0, -2.0]), [true, true, false]);
        let max = Gate {
            aggregate: Aggregate::Max,
            ..gate()
        };
        assert_eq!(run(&max, &[0.0, 1.5, -9.0]), [false, true, true]);
    }

    #[test]
    fn an_empty_gate_is_refused() {
        let empty = Gate {
            weights: Vec::new(),
            ..gate()
        };
        assert!(empty.validate("gate").is_err());
        let nan = Gate {
            threshold: f32::NAN,
            ..gate()
        };
        assert!(nan.validate("gate").is_err());
    }
}
