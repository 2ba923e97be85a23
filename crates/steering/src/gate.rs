//! Gates: calibrated conditions on the residual stream that turn interventions on.
//!
//! A gate has a name, and reads at its own site, on every token in its roles, either a weighted sum
//! of latents, `s_t = bias + sum_j w_j f_j(x_t)`, or the cosine with a direction,
//! `s_t = bias + cos(x_t, v)` (the condition vector of CAST, 2409.05907), or linear probes of the
//! residual at its site and earlier ones, `s_t = bias + sum_l x_t^l . v_l`. The scores become one by
//! [`Aggregate`]. Or its heads say themselves which tokens count, see [`Head`]. The gate is open while
//! that is at or above `threshold`. With `hysteresis = h` an open gate closes only below `threshold - h`; with `latch` it never closes again in a
//! conversation. With `scope = "turn"` each user's turn is judged by its own tokens and those after
//! it. Below `clear`, if a gate has it, the gate is clear: what it looks for is surely not there; between
//! the two it is neither. Interventions name gates in a [`Condition`], composed with `all`, `any`, `not`
//! and `clear`.
//!
//! The prompt is read as a whole before its first token is edited, so a gate sees the end of a
//! request before it decides about its beginning. It reads what the model has at its site: edits at
//! earlier sites included, those at its own not.
//!
//! Cost: `membership = "exact"` takes one SAE encode of the rows read (shared with the edits at the
//! site), `"pre_act"` one product of `d_model` a latent a row, a direction or a probe one a row, a head
//! two for each site that it reads.

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
    /// Instead of all three: heads of attention, whose values the score is the sum of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub heads: Vec<Head>,
    /// Whether a latent outside the top k counts as inactive.
    #[serde(default)]
    pub membership: Membership,
    /// Added to each token's score.
    #[serde(default)]
    pub bias: f32,
    /// How the per-token scores become one.
    #[serde(default)]
    pub aggregate: Aggregate,
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

/// A head of attention over the tokens that a gate reads: with `q_t = sum_l x_t^l . query_l` and
/// `v_t = sum_l x_t^l . value_l` its value is `sum_t softmax(q)_t v_t`. So it finds the few tokens that tell in a text that is much longer, such as a
/// jailbreak's wrapper. A gate's score is `bias` plus the values of its heads (the attention probes of Shabalin and
/// Belrose 2025).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// How much a token counts, each at its own site, at or before the gate's.
    pub query: Vec<Probe>,
    /// What a token says, likewise.
    pub value: Vec<Probe>,
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
    /// The sum of the heads' values over the tokens so far. Of heads only.
    Attention,
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
        let heads = !self.heads.is_empty();
        let kinds = [
            latents,
            !self.direction.is_empty(),
            !self.probes.is_empty(),
            heads,
        ];
        match kinds.iter().filter(|k| **k).count() {
            0 => {
                return bad(
                    "weights",
                    0.0,
                    "is empty: give weights, a direction, probes or heads",
                );
            }
            1 => {}
            _ => {
                return bad(
                    "weights",
                    self.weights.len() as f32,
                    "weights, direction, probes and heads: give one of the four",
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
        let both = self.heads.iter().flat_map(|h| [&h.query, &h.value]);
        let mut read = both.flatten().flat_map(|p| &p.direction);
        if let Some(v) = read.find(|v| !v.is_finite()) {
            return bad("heads", *v, "must be finite");
        }
        if let Some(h) = self.heads.iter().find(|h| h.value.is_empty()) {
            let n = h.query.len() as f32;
            return bad("heads", n, "each needs a value to say");
        }
        if heads != (self.aggregate == Aggregate::Attention) {
            return bad(
                "aggregate",
                self.heads.len() as f32,
                "attention is of heads, and they have no other",
            );
        }
        if !latents && self.aggregate == Aggregate::LatentMax {
            return bad(
                "aggregate",
                norm,
                "latent_max is of latents, and none is read",
            );
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

/// A head's mean so far under weights `exp(q - largest)`.
#[derive(Debug, Clone, Copy)]
struct Attended {
    largest: f32,
    weight: f64,
    sum: f64,
}

impl Attended {
    const NONE: Self = Self {
        largest: f32::NEG_INFINITY,
        weight: 0.0,
        sum: 0.0,
    };

    /// Takes one token's query and value.
    fn push(&mut self, q: f32, v: f32) {
        if q > self.largest {
            let shrink = f64::from(self.largest - q).exp();
            self.weight *= shrink;
            self.sum *= shrink;
            self.largest = q;
        }
        let w = f64::from(q - self.largest).exp();
        self.weight += w;
        self.sum += w * f64::from(v);
    }
}

/// A gate's memory over one sequence.
#[derive(Debug, Clone, Default)]
pub(crate) struct GateState {
    max: Option<f32>,
    sum: f64,
    count: u64,
    last: f32,
    /// What each head makes of the tokens so far.
    attended: Vec<Attended>,
    /// Each latent's largest activation, in the order of the weights; for [`Aggregate::LatentMax`].
    latent_max: Vec<f32>,
    /// What probes at earlier sites made of the rows that are now in the forward pass: of each row one number, or of
    /// each head query and value.
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
    pub(crate) fn push(&mut self, score: f32, latents: &[f32]) {
        self.max = Some(self.max.map_or(score, |m| m.max(score)));
        self.sum += f64::from(score);
        self.count += 1;
        self.last = score;
        self.latent_max.resize(latents.len(), f32::NEG_INFINITY);
        for (m, f) in self.latent_max.iter_mut().zip(latents) {
            *m = m.max(*f);
        }
    }

    /// Takes one token: each head's query and value.
    pub(crate) fn attend(&mut self, heads: &[f32]) {
        self.count += 1;
        self.attended.resize(heads.len() / 2, Attended::NONE);
        for (attended, of_head) in self.attended.iter_mut().zip(heads.chunks_exact(2)) {
            attended.push(of_head[0], of_head[1]);
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
        if self.count == 0 {
            return None;
        }
        Some(match gate.aggregate {
            Aggregate::Max => self.max?,
            Aggregate::Mean => (self.sum / self.count as f64) as f32,
            Aggregate::Attention => {
                let means = self.attended.iter().map(|a| a.sum / a.weight);
                (f64::from(gate.bias) + means.sum::<f64>()) as f32
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
            heads: Vec::new(),
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
                state.push(s, &[s]);
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
    fn heads_take_means_under_their_own_weights() {
        let head = |query: Vec<Probe>, value| Head { query, value };
        let probe = |v: f32| Probe {
            site: "layers.0".to_owned(),
            direction: vec![v],
        };
        let gate = Gate {
            weights: Vec::new(),
            heads: vec![
                head(vec![probe(1.0)], vec![probe(1.0)]),
                head(Vec::new(), vec![probe(2.0)]),
            ],
            aggregate: Aggregate::Attention,
            bias: 0.5,
            ..gate()
        };
        gate.validate("gate").unwrap();
        let mut state = GateState::default();
        assert_eq!(state.score(&gate), None);
        // Weights e^0 : e^ln3 = 1 : 3, and equal ones: (1 * 8 + 3 * 4) / 4 and (1 + 2) / 2.
        state.attend(&[0.0, 8.0, 0.0, 1.0]);
        state.attend(&[3f32.ln(), 4.0, 0.0, 2.0]);
        let found = state.score(&gate).unwrap();
        assert!((found - (0.5 + 5.0 + 1.5)).abs() < 1e-6, "{found}");
        // Queries of any size: what counts is their difference.
        let mut state = GateState::default();
        for q in [-2e4, 2e4, -2e4] {
            state.attend(&[q, q.signum(), 0.0, 0.0]);
        }
        assert_eq!(state.score(&gate), Some(1.5));
        state.next_turn(&gate);
        assert_eq!(state.score(&gate), None);
        let with = |aggregate, heads| Gate {
            aggregate,
            heads,
            ..gate.clone()
        };
        for gate in [
            with(Aggregate::Mean, gate.heads.clone()),
            with(
                Aggregate::Attention,
                vec![head(vec![probe(f32::NAN)], vec![probe(1.0)])],
            ),
            with(
                Aggregate::Attention,
                vec![head(vec![probe(1.0)], Vec::new())],
            ),
        ] {
            let e = gate.validate("gate").unwrap_err().to_string();
            assert!(e.contains("heads") || e.contains("aggregate"), "{e}");
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
        state.push(0.0, &[2.0, 0.5]);
        state.push(0.0, &[1.0, 0.75]);
        assert_eq!(state.score(&gate), Some(0.25 + 2.0 - 1.5));
    }

    #[test]
    fn a_new_turn_is_judged_anew_unless_latched() {
        for (latch, open) in [(false, false), (true, true)] {
            let gate = Gate { latch, ..gate() };
            let mut state = GateState::default();
            state.push(2.0, &[2.0]);
            state.decide(&gate, 7);
            state.next_turn(&gate);
            state.push(0.9, &[0.9]); // above threshold - hysteresis, below threshold
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
            state.push(s, &[s]);
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
