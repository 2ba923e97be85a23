//! Gates: calibrated conditions on the residual stream that turn interventions on.
//!
//! A gate has a name, and reads at its own site, on every token in its roles, either a weighted sum
//! of latents, `s_t = bias + sum_j w_j f_j(x_t)`, or the cosine with a direction,
//! `s_t = bias + cos(x_t, v)` (the condition vector of CAST, 2409.05907), or linear probes of the
//! residual at its site and earlier ones, `s_t = bias + sum_l x_t^l . v_l`. The scores become one by
//! [`Aggregate`]; the gate is open while that is at or above `threshold`. With `hysteresis = h` an
//! open gate closes only below `threshold - h`; with `latch` it never closes again in a
//! conversation. With `scope = "turn"` each user's turn is judged by its own tokens and those after
//! it. Below `clear`, if a gate has it, the gate is clear: what it looks for is surely not there; between
//! the two it is neither. With a `part` the mean of any so many tokens in a row, plus a bias, counts if it
//! is larger than the mean of all: a request is found in a text that is much longer than it, such as a
//! jailbreak's wrapper. Interventions name gates in a [`Condition`], composed with `all`, `any`, `not`
//! and `clear`.
//!
//! The prompt is read as a whole before its first token is edited, so a gate sees the end of a
//! request before it decides about its beginning. It reads what the model has at its site: edits at
//! earlier sites included, those at its own not.
//!
//! Cost: `membership = "exact"` takes one SAE encode of the rows read (shared with the edits at the
//! site), `"pre_act"` one product of `d_model` a latent a row, a direction or a probe one a row.

use std::collections::VecDeque;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::SteeringError;
use crate::plan::Membership;
use demur_model::hooks::Role;

/// A condition on the residual stream. See the module documentation for its meaning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Gate {
    /// Hook site that it reads; at or before the sites of the interventions that it turns on.
    pub site: String,
    /// Name of the SAE whose latents it reads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sae: Option<String>,
    /// Latents read and their weights.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub weights: Vec<GateWeight>,
    /// Instead of latents: a direction, `[d_model]`, whose cosine with the residual is the score.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub direction: Vec<f32>,
    /// Instead of both: linear probes, each at its own site, at or before the gate's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub probes: Vec<Probe>,
    /// Whether a latent outside the top k counts as inactive.
    #[serde(default)]
    pub membership: Membership,
    /// Added to each token's score.
    #[serde(default)]
    pub bias: f32,
    /// How the per-token scores become one.
    #[serde(default)]
    pub aggregate: Aggregate,
    /// With the mean: what a part of the tokens may say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<Part>,
    /// Over which tokens they do.
    #[serde(default)]
    pub scope: Scope,
    /// The gate is open at or above this score.
    pub threshold: f32,
    /// An open gate closes only below `threshold - hysteresis`.
    #[serde(default)]
    pub hysteresis: f32,
    /// The gate is clear below this score; at most `threshold - hysteresis`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clear: Option<f32>,
    /// Once open, open for the rest of the conversation.
    #[serde(default)]
    pub latch: bool,
    /// Only tokens of these roles are read; empty: the user's tokens and the template's.
    #[serde(default)]
    pub roles: Vec<Role>,
    /// Read generated tokens too, not only the prompt.
    #[serde(default)]
    pub during_generation: bool,
}

/// A linear reading of the residual stream, one summand of a gate's score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Probe {
    /// Hook site that it reads.
    pub site: String,
    /// `[d_model]`; its product with the residual is added to the token's score.
    pub direction: Vec<f32>,
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
    /// The weighted sum of each latent's largest activation so far. Of latents only.
    LatentMax,
}

/// A part of what a gate reads, that is judged by itself: the gate's score is the larger of the mean of
/// all scores and `bias` plus the largest mean of `tokens` scores in a row.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// How many tokens; at least 1. Of fewer only the mean of all counts.
    pub tokens: u32,
    /// Added to the largest mean. The largest of many is high by chance, so that it is mostly below 0.
    pub bias: f32,
}

/// Over which tokens a gate's scores are aggregated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// All that it has read of the conversation.
    #[default]
    Conversation,
    /// From the first token of the newest user's turn: each turn is judged anew.
    Turn,
}

/// When an intervention is on: a gate's name, or conditions composed.
///
/// In TOML `"unsafe"`, `{ not = "lesson" }`, `{ all = ["unsafe", { not = "lesson" }] }`,
/// `{ any = ["unsafe", "drifting"] }`, `{ clear = "unsafe" }`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, deny_unknown_fields)]
pub enum Condition {
    /// This gate is open.
    Gate(String),
    /// Each of these holds.
    All {
        /// The conditions; at least one.
        all: Vec<Condition>,
    },
    /// One of these holds.
    Any {
        /// The conditions; at least one.
        any: Vec<Condition>,
    },
    /// This does not hold.
    Not {
        /// The condition.
        not: Box<Condition>,
    },
    /// This gate is clear: its score is below its `clear`.
    Clear {
        /// The gate.
        clear: String,
    },
}

/// Where a gate's score is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Zone {
    /// At or above the threshold.
    Open,
    /// Neither; or nothing was read yet.
    #[default]
    Between,
    /// Below `clear`.
    Clear,
}

impl Condition {
    /// Whether it holds, given where the gates are.
    pub fn holds(&self, zone: &impl Fn(&str) -> Zone) -> bool {
        match self {
            Self::Gate(name) => zone(name) == Zone::Open,
            Self::All { all } => all.iter().all(|c| c.holds(zone)),
            Self::Any { any } => any.iter().any(|c| c.holds(zone)),
            Self::Not { not } => !not.holds(zone),
            Self::Clear { clear } => zone(clear) == Zone::Clear,
        }
    }

    /// The gates that it names, in order, repeats included.
    pub fn gates(&self) -> Vec<&str> {
        match self {
            Self::Gate(name) | Self::Clear { clear: name } => vec![name],
            Self::All { all: list } | Self::Any { any: list } => {
                list.iter().flat_map(Self::gates).collect()
            }
            Self::Not { not } => not.gates(),
        }
    }

    /// The gates that it asks to be clear, in order, repeats included.
    pub(crate) fn cleared(&self) -> Vec<&str> {
        match self {
            Self::Gate(_) => Vec::new(),
            Self::Clear { clear } => vec![clear],
            Self::All { all: list } | Self::Any { any: list } => {
                list.iter().flat_map(Self::cleared).collect()
            }
            Self::Not { not } => not.cleared(),
        }
    }

    /// Checks that no list is empty.
    pub(crate) fn validate(&self, place: &str) -> Result<(), SteeringError> {
        match self {
            Self::Gate(_) | Self::Clear { .. } => Ok(()),
            Self::Not { not } => not.validate(place),
            Self::All { all: list } | Self::Any { any: list } => {
                if list.is_empty() {
                    return Err(SteeringError::Value {
                        place: place.to_owned(),
                        field: "when",
                        value: "[]".to_owned(),
                        rule: "must name at least one condition",
                    });
                }
                list.iter().try_for_each(|c| c.validate(place))
            }
        }
    }
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
        let norm: f32 = self.direction.iter().map(|v| v * v).sum();
        let latents = !self.weights.is_empty();
        let kinds = [latents, !self.direction.is_empty(), !self.probes.is_empty()];
        match kinds.iter().filter(|k| **k).count() {
            0 => {
                return bad(
                    "weights",
                    0.0,
                    "is empty: give weights, a direction or probes",
                );
            }
            1 => {}
            _ => {
                return bad(
                    "weights",
                    self.weights.len() as f32,
                    "weights, direction and probes: give one of the three",
                );
            }
        }
        if kinds[1] && !(norm.is_finite() && norm > 0.0) {
            return bad("direction", norm, "must be finite and not zero");
        }
        let probed = self.probes.iter().flat_map(|p| &p.direction);
        if let Some(v) = probed.into_iter().find(|v| !v.is_finite()) {
            return bad("probes", *v, "must be finite");
        }
        if !latents && self.aggregate == Aggregate::LatentMax {
            return bad(
                "aggregate",
                norm,
                "latent_max is of latents, and none is read",
            );
        }
        if let Some(part) = self.part {
            if self.aggregate != Aggregate::Mean {
                return bad("part", part.bias, "is of a mean: set aggregate = \"mean\"");
            }
            if part.tokens == 0 {
                return bad("part.tokens", 0.0, "must be at least 1");
            }
            if !part.bias.is_finite() {
                return bad("part.bias", part.bias, "must be finite");
            }
        }
        if latents && self.sae.is_none() {
            return bad("sae", 0.0, "must name an SAE: latents are read");
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
        let closes = self.threshold - self.hysteresis;
        if let Some(clear) = self.clear.filter(|c| !(c.is_finite() && *c <= closes)) {
            return bad(
                "clear",
                clear,
                "must be finite and at most the threshold less the hysteresis",
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

/// Most changes of a gate that an audit lists.
const MAX_CHANGES: usize = 32;

/// A gate's memory over one sequence.
#[derive(Debug, Clone, Default)]
pub(crate) struct GateState {
    max: Option<f32>,
    sum: f64,
    count: u64,
    last: f32,
    /// The newest scores, as many as a [`Part`] has, with their sum.
    newest: VecDeque<f32>,
    newest_sum: f64,
    /// The largest mean of a part so far.
    part: Option<f32>,
    /// Each latent's largest activation, in the order of the weights; for [`Aggregate::LatentMax`].
    latent_max: Vec<f32>,
    /// What probes at earlier sites made of the rows that are now in the forward pass.
    pub(crate) pending: Vec<f32>,
    /// Whether a reply was seen since the user last spoke.
    pub(crate) after_reply: bool,
    pub(crate) open: bool,
    clear: bool,
    pub(crate) ever_open: bool,
    /// Position of the newest token when it opened or closed, and which of the two.
    pub(crate) changes: Vec<(usize, bool)>,
}

impl GateState {
    /// Takes one token: its score, and the activations that it is made of.
    pub(crate) fn push(&mut self, gate: &Gate, score: f32, latents: &[f32]) {
        self.max = Some(self.max.map_or(score, |m| m.max(score)));
        self.sum += f64::from(score);
        self.count += 1;
        self.last = score;
        if let Some(part) = gate.part {
            self.newest.push_back(score);
            self.newest_sum += f64::from(score);
            if self.newest.len() > part.tokens as usize {
                self.newest_sum -= self.newest.pop_front().map_or(0.0, f64::from);
            }
            if self.newest.len() == part.tokens as usize {
                let mean = (self.newest_sum / f64::from(part.tokens)) as f32;
                self.part = Some(self.part.map_or(mean, |p| p.max(mean)));
            }
        }
        self.latent_max.resize(latents.len(), f32::NEG_INFINITY);
        for (m, f) in self.latent_max.iter_mut().zip(latents) {
            *m = m.max(*f);
        }
    }

    /// Forgets the scores, for the next turn; a latched gate stays open.
    pub(crate) fn next_turn(&mut self, gate: &Gate) {
        *self = Self {
            open: gate.latch && self.ever_open,
            ever_open: self.ever_open,
            changes: std::mem::take(&mut self.changes),
            ..Self::default()
        };
    }

    /// The aggregated score, or `None` before the first token.
    pub(crate) fn score(&self, gate: &Gate) -> Option<f32> {
        let max = self.max?;
        Some(match gate.aggregate {
            Aggregate::Max => max,
            Aggregate::Mean => {
                let mean = (self.sum / self.count as f64) as f32;
                let part = gate.part.zip(self.part);
                part.map_or(mean, |(p, largest)| mean.max(largest + p.bias))
            }
            Aggregate::Last => self.last,
            Aggregate::LatentMax => gate
                .weights
                .iter()
                .zip(&self.latent_max)
                .fold(gate.bias, |s, (w, f)| s + w.weight * f),
        })
    }

    /// Where it is since it last decided.
    pub(crate) fn zone(&self) -> Zone {
        match (self.open, self.clear) {
            (true, _) => Zone::Open,
            (false, true) => Zone::Clear,
            (false, false) => Zone::Between,
        }
    }

    /// Decides anew from what was pushed; `pos` is the newest token's position.
    pub(crate) fn decide(&mut self, gate: &Gate, pos: usize) {
        let Some(score) = self.score(gate) else {
            return;
        };
        let bar = if self.open {
            gate.threshold - gate.hysteresis
        } else {
            gate.threshold
        };
        let was = self.open;
        self.open = score >= bar || (gate.latch && self.ever_open);
        self.clear = !self.open && gate.clear.is_some_and(|clear| score < clear);
        self.ever_open |= self.open;
        if self.open != was && self.changes.len() < MAX_CHANGES {
            self.changes.push((pos, self.open));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate() -> Gate {
        Gate {
            site: "layers.0".to_owned(),
            sae: Some("main".to_owned()),
            direction: Vec::new(),
            probes: Vec::new(),
            membership: Membership::Exact,
            part: None,
            scope: Scope::Conversation,
            weights: vec![GateWeight {
                latent: 0,
                weight: 1.0,
            }],
            bias: 0.0,
            aggregate: Aggregate::Last,
            threshold: 1.0,
            hysteresis: 0.5,
            clear: None,
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
                state.push(gate, s, &[s]);
                state.decide(gate, 0);
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
    fn a_part_is_judged_by_itself() {
        let part = |tokens, bias| Gate {
            aggregate: Aggregate::Mean,
            part: Some(Part { tokens, bias }),
            ..gate()
        };
        let score = |gate: &Gate, scores: &[f32]| {
            let mut state = GateState::default();
            for s in scores {
                state.push(gate, *s, &[*s]);
            }
            state.score(gate).unwrap()
        };
        let scores = [0.0, 4.0, 2.0, -3.0, -3.0, 3.0];
        // the mean of all is 0.5, the largest of two in a row 3, of three 2
        assert_eq!(score(&part(2, -0.5), &scores), 2.5);
        assert_eq!(score(&part(3, -0.5), &scores), 1.5);
        assert_eq!(score(&part(2, -9.0), &scores), 0.5);
        // seven in a row are not there
        assert_eq!(score(&part(7, 9.0), &scores), 0.5);
        let gate = part(2, -0.5);
        let mut state = GateState::default();
        scores.iter().for_each(|s| state.push(&gate, *s, &[]));
        state.next_turn(&gate);
        state.push(&gate, 1.0, &[]);
        assert_eq!(state.score(&gate), Some(1.0));
        gate.validate("gate").unwrap();
        for gate in [
            part(0, 0.0),
            part(2, f32::NAN),
            Gate {
                aggregate: Aggregate::Max,
                ..gate
            },
        ] {
            let e = gate.validate("gate").unwrap_err().to_string();
            assert!(e.contains("part"), "{e}");
        }
    }

    #[test]
    fn each_latents_maximum_may_be_at_another_token() {
        let weight = |latent, weight| GateWeight { latent, weight };
        let gate = Gate {
            weights: vec![weight(3, 1.0), weight(5, -2.0)],
            bias: 0.25,
            aggregate: Aggregate::LatentMax,
            ..gate()
        };
        let mut state = GateState::default();
        assert_eq!(state.score(&gate), None);
        state.push(&gate, 0.0, &[2.0, 0.5]);
        state.push(&gate, 0.0, &[1.0, 0.75]);
        assert_eq!(state.score(&gate), Some(0.25 + 2.0 - 1.5));
    }

    #[test]
    fn a_new_turn_is_judged_anew_unless_latched() {
        for (latch, open) in [(false, false), (true, true)] {
            let gate = Gate { latch, ..gate() };
            let mut state = GateState::default();
            state.push(&gate, 2.0, &[2.0]);
            state.decide(&gate, 7);
            state.next_turn(&gate);
            state.push(&gate, 0.9, &[0.9]); // above threshold - hysteresis, below threshold
            state.decide(&gate, 9);
            assert_eq!((state.open, state.ever_open), (open, true));
            assert_eq!(state.changes[0], (7, true));
        }
    }

    #[test]
    fn conditions_compose() {
        let condition = |text: &str| -> Condition { serde_json::from_str(text).unwrap() };
        let zone = |name: &str| match name {
            "a" => Zone::Open,
            "c" => Zone::Clear,
            _ => Zone::Between,
        };
        for (text, expected) in [
            (r#""a""#, true),
            (r#""b""#, false),
            (r#"{"not": "a"}"#, false),
            (r#"{"all": ["a", {"not": "b"}]}"#, true),
            (r#"{"all": ["a", "b"]}"#, false),
            (r#"{"any": ["b", {"not": {"any": ["a"]}}]}"#, false),
            (r#"{"any": ["b", "a"]}"#, true),
            (r#"{"clear": "a"}"#, false),
            (r#"{"clear": "b"}"#, false),
            (r#"{"all": [{"clear": "c"}, {"not": "c"}]}"#, true),
        ] {
            let c = condition(text);
            assert_eq!(c.holds(&zone), expected, "{text}");
            let back = serde_json::to_string(&c).unwrap();
            assert_eq!(condition(&back), c);
        }
        let c = condition(r#"{"all": ["a", {"not": "b"}]}"#);
        assert_eq!(c.gates(), ["a", "b"]);
        assert!(condition(r#"{"any": []}"#).validate("x").is_err());
        assert!(serde_json::from_str::<Condition>(r#"{"all": ["a"], "or": []}"#).is_err());
    }

    #[test]
    fn three_zones() {
        use Zone::{Between, Clear, Open};
        let gate = Gate {
            clear: Some(0.25),
            ..gate()
        };
        gate.validate("gate").unwrap();
        let mut state = GateState::default();
        assert_eq!(state.zone(), Between);
        // 0.6 is within the hysteresis of an open gate
        let scores = [0.2, 0.25, 1.0, 0.6, 0.3, 0.1];
        let zones = scores.map(|s| {
            state.push(&gate, s, &[s]);
            state.decide(&gate, 0);
            state.zone()
        });
        assert_eq!(zones, [Clear, Between, Open, Open, Between, Clear]);
        state.next_turn(&gate);
        assert_eq!(state.zone(), Between);
        for clear in [0.75, f32::NAN] {
            let gate = Gate {
                clear: Some(clear),
                ..gate.clone()
            };
            assert!(gate.validate("gate").is_err());
        }
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
