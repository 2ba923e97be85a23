//! The plan as data: what is written in a TOML or JSON file, sent with a request, kept in a record.
//!
//! Every structure denies unknown keys: a mistyped field is an error, never a silent no-op.

use std::collections::BTreeMap;

use demur_model::hooks::Role;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::SteeringError;
use crate::gate::{Condition, Gate};

/// The version of the plan format that this build reads and writes.
pub const PLAN_VERSION: u32 = 1;

/// What to do to the residual stream, as data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SteeringPlan {
    /// Format version, [`PLAN_VERSION`].
    #[schemars(range(min = PLAN_VERSION, max = PLAN_VERSION))]
    pub version: u32,
    /// A short name, for tables and logs.
    pub name: String,
    /// What it is for, in a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// SAEs by the name that interventions use, with the sha256 of the weights that the plan was
    /// made with; an empty string accepts any.
    #[serde(default)]
    pub saes: BTreeMap<String, String>,
    /// Conditions by the name that interventions use.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub gates: BTreeMap<String, Gate>,
    /// Applied in order.
    #[serde(default)]
    pub interventions: Vec<InterventionSpec>,
}

/// One intervention: a site, edits of latents or a direction, on which tokens, when.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InterventionSpec {
    /// Hook site, for instance `blocks.12.hook_resid_post`; aliases are accepted.
    pub site: String,
    /// Name of the SAE whose latents are edited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sae: Option<String>,
    /// Edits of latents, summed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub edits: Vec<LatentEdit>,
    /// An edit along a direction given outright, for baselines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direction: Option<Direction>,
    /// Whether the SAE's reconstruction error stays in the residual.
    #[serde(default)]
    pub error_term: ErrorTerm,
    /// Whether a latent outside the top k counts as inactive.
    #[serde(default)]
    pub membership: Membership,
    /// Which tokens are edited.
    #[serde(default)]
    pub span: Span,
    /// When it is on; always, if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<Condition>,
    /// The edit's norm is capped at this fraction of the residual's norm, token by token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_edit_norm: Option<f32>,
}

/// One latent and what is done to it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LatentEdit {
    /// Index of the latent.
    pub latent: u32,
    /// The operation.
    pub op: Op,
    /// Its operand: `c`, or `s` for scale; not used by ablate.
    #[serde(default)]
    pub value: f32,
    /// What `value` is measured in.
    #[serde(default)]
    pub unit: Unit,
}

/// The operations of the crate's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// The latent becomes `value`.
    Set,
    /// At least `value`.
    Floor,
    /// At most `value`.
    Ceiling,
    /// Multiplied by `value`.
    Scale,
    /// Becomes zero.
    Ablate,
    /// `value` decoder rows are added, whatever the latent is.
    Add,
}

/// The unit of an edit's value.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// As it is: activations of the latent.
    #[default]
    Abs,
    /// Times the latent's largest activation over the harvest.
    RelMax,
    /// Times the mean residual norm at the site over the harvest.
    ResidNorm,
}

/// An edit along a unit direction of the residual stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Direction {
    /// A name, for tables.
    pub name: String,
    /// The vector, `[d_model]`; scaled to unit norm when compiled.
    pub vector: Vec<f32>,
    /// What is done along it.
    pub op: DirectionOp,
    /// Length added, in activations of the residual; not used by ablate.
    #[serde(default)]
    pub value: f32,
}

/// What is done along a [`Direction`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DirectionOp {
    /// `x' = x + value v`.
    Add,
    /// `x' = x - (x . v) v`.
    Ablate,
}

/// What becomes of `x - x_hat`, the part that the SAE does not explain.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorTerm {
    /// It stays: the residual changes along the edited latents only.
    #[default]
    Kept,
    /// It goes: the residual becomes the edited reconstruction.
    Dropped,
}

/// How a latent's activation is read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Membership {
    /// As the SAE does: zero outside the top k. Costs one whole encode a row (`d_model * d_sae`).
    #[default]
    Exact,
    /// The rectified pre-activation, whether in the top k or not. Costs `d_model` a latent a row.
    PreAct,
}

/// Which tokens are edited. A token must satisfy all parts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Span {
    /// Tokens of the prompt.
    pub prompt: bool,
    /// Tokens that the model has written.
    pub generation: bool,
    /// Only these roles; empty: all.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub roles: Vec<Role>,
    /// Leave out the first position: its residual is an attention sink of abnormal norm.
    pub skip_first: bool,
    /// Only positions from here on, 0 the sequence's first.
    pub from: usize,
    /// Only positions before this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<usize>,
    /// Of the reply, only this many tokens from its beginning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply_tokens: Option<usize>,
}

impl Default for Span {
    fn default() -> Self {
        Self {
            prompt: true,
            generation: true,
            roles: Vec::new(),
            skip_first: true,
            from: 0,
            to: None,
            reply_tokens: None,
        }
    }
}

impl SteeringPlan {
    /// A plan with one intervention.
    pub fn single(name: impl Into<String>, spec: InterventionSpec) -> Self {
        Self {
            version: PLAN_VERSION,
            name: name.into(),
            description: None,
            saes: spec
                .sae
                .iter()
                .map(|s| (s.clone(), String::new()))
                .collect(),
            gates: BTreeMap::new(),
            interventions: vec![spec],
        }
    }

    /// The JSON Schema of a plan. It says what [`Self::from_json`] accepts, up to what
    /// [`Self::validate`] checks besides.
    pub fn schema() -> serde_json::Value {
        schemars::schema_for!(Self).to_value()
    }

    /// Reads a plan from TOML.
    ///
    /// # Errors
    /// [`SteeringError::Syntax`] with the parser's line and column, or what [`Self::validate`] finds.
    pub fn from_toml(text: &str) -> Result<Self, SteeringError> {
        let plan: Self = toml::from_str(text).map_err(|e| SteeringError::Syntax {
            reason: e.to_string(),
        })?;
        plan.validate()?;
        Ok(plan)
    }

    /// Reads a plan from JSON.
    ///
    /// # Errors
    /// As [`Self::from_toml`].
    pub fn from_json(text: &str) -> Result<Self, SteeringError> {
        let plan: Self = serde_json::from_str(text).map_err(|e| SteeringError::Syntax {
            reason: e.to_string(),
        })?;
        plan.validate()?;
        Ok(plan)
    }

    /// The plan as TOML, a list on a line: gates have long ones.
    ///
    /// # Errors
    /// [`SteeringError::Syntax`] if a number can't be written (never for a validated plan).
    pub fn to_toml(&self) -> Result<String, SteeringError> {
        toml::to_string(self).map_err(|e| SteeringError::Syntax {
            reason: e.to_string(),
        })
    }

    /// sha256 of the plan's canonical JSON, as hex: the plan's identity in records.
    pub fn sha256(&self) -> String {
        let json = serde_json::to_vec(self).unwrap_or_default();
        Sha256::digest(&json)
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect()
    }

    /// Checks everything that can be checked without a model or an SAE.
    ///
    /// # Errors
    /// The first thing that is wrong, with its place in the plan.
    pub fn validate(&self) -> Result<(), SteeringError> {
        if self.version != PLAN_VERSION {
            return Err(SteeringError::Version {
                found: self.version,
                supported: PLAN_VERSION,
            });
        }
        for (name, gate) in &self.gates {
            gate.validate(&format!("gates.{name}"))?;
        }
        for (i, spec) in self.interventions.iter().enumerate() {
            let place = format!("interventions[{i}]");
            spec.validate(&place)?;
            let named = spec.when.iter().flat_map(Condition::gates);
            if let Some(name) = named.into_iter().find(|n| !self.gates.contains_key(*n)) {
                return Err(SteeringError::UnknownGate {
                    place,
                    name: name.to_owned(),
                    known: self.gates.keys().cloned().collect::<Vec<_>>().join(", "),
                });
            }
            let cleared = spec.when.iter().flat_map(Condition::cleared);
            if let Some(name) = cleared.into_iter().find(|n| self.gates[*n].clear.is_none()) {
                return Err(SteeringError::NeverClear {
                    place,
                    name: name.to_owned(),
                });
            }
        }
        Ok(())
    }
}

impl InterventionSpec {
    /// An intervention on `site` with no edit yet, error kept, everywhere, no gate.
    pub fn at(site: impl Into<String>) -> Self {
        Self {
            site: site.into(),
            sae: None,
            edits: Vec::new(),
            direction: None,
            error_term: ErrorTerm::Kept,
            membership: Membership::Exact,
            span: Span::default(),
            when: None,
            max_edit_norm: None,
        }
    }

    fn validate(&self, place: &str) -> Result<(), SteeringError> {
        let bad = |place: String, field, value: String, rule| {
            Err(SteeringError::Value {
                place,
                field,
                value,
                rule,
            })
        };
        let needs_sae = !self.edits.is_empty() || self.error_term == ErrorTerm::Dropped;
        if needs_sae && self.sae.is_none() {
            return bad(
                place.to_owned(),
                "sae",
                "none".to_owned(),
                "must name an SAE: latents are edited",
            );
        }
        if !needs_sae && self.direction.is_none() {
            return bad(
                place.to_owned(),
                "edits",
                "[]".to_owned(),
                "does nothing: give edits, a direction or error_term = \"dropped\"",
            );
        }
        for (j, edit) in self.edits.iter().enumerate() {
            if !edit.value.is_finite() {
                return bad(
                    format!("{place}.edits[{j}]"),
                    "value",
                    edit.value.to_string(),
                    "must be finite",
                );
            }
            if self.edits[..j].iter().any(|e| e.latent == edit.latent) {
                return bad(
                    format!("{place}.edits[{j}]"),
                    "latent",
                    edit.latent.to_string(),
                    "is edited twice in one intervention",
                );
            }
        }
        if let Some(direction) = &self.direction {
            let norm: f32 = direction.vector.iter().map(|v| v * v).sum();
            if !(norm.is_finite() && norm > 0.0) {
                return bad(
                    format!("{place}.direction"),
                    "vector",
                    format!("norm^2 {norm}"),
                    "must be finite and not zero",
                );
            }
            if !direction.value.is_finite() {
                return bad(
                    format!("{place}.direction"),
                    "value",
                    direction.value.to_string(),
                    "must be finite",
                );
            }
        }
        if let Some(cap) = self.max_edit_norm
            && !(cap.is_finite() && cap > 0.0)
        {
            return bad(
                place.to_owned(),
                "max_edit_norm",
                cap.to_string(),
                "must be finite and positive",
            );
        }
        if !self.span.prompt && !self.span.generation {
            return bad(
                format!("{place}.span"),
                "prompt",
                "false".to_owned(),
                "and generation = false: no token would be edited",
            );
        }
        if self.span.to.is_some_and(|to| to <= self.span.from) {
            return bad(
                format!("{place}.span"),
                "to",
                self.span.to.unwrap_or_default().to_string(),
                "must be greater than from: no token would be edited",
            );
        }
        match &self.when {
            Some(when) => when.validate(place),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: &str = r#"
        version = 1
        name = "clamp"
        [saes]
        main = ""
        [[interventions]]
        site = "layers.12"
        sae = "main"
        edits = [{ latent = 7, op = "set", value = 2.0, unit = "rel_max" }]
        when = { all = ["unsafe"] }
        [gates.unsafe]
        site = "layers.12"
        sae = "main"
        weights = [{ latent = 3, weight = 1.0 }]
        threshold = 0.5
    "#;

    #[test]
    fn toml_and_json_round_trip() {
        let plan = SteeringPlan::from_toml(PLAN).unwrap();
        assert_eq!(
            SteeringPlan::from_toml(&plan.to_toml().unwrap()).unwrap(),
            plan
        );
        let json = serde_json::to_string(&plan).unwrap();
        let back = SteeringPlan::from_json(&json).unwrap();
        assert_eq!(back, plan);
        assert_eq!(back.sha256(), plan.sha256());
    }

    /// Whether every key of `value` is in its schema, and every object's schema is closed.
    fn keys_are_known(
        value: &serde_json::Value,
        schema: &serde_json::Value,
        root: &serde_json::Value,
    ) {
        use serde_json::Value;
        let by_name = |s: &Value| {
            let name = s["$ref"].as_str()?.strip_prefix("#/$defs/")?;
            Some(root["$defs"][name].clone())
        };
        // An optional type is "that or null".
        let schema = match schema["anyOf"].as_array() {
            Some(either) => by_name(&either[0]).unwrap_or_else(|| either[0].clone()),
            None => by_name(schema).unwrap_or_else(|| schema.clone()),
        };
        match value {
            Value::Object(fields) if schema["properties"].is_object() => {
                assert_eq!(schema["additionalProperties"], false, "{schema}");
                for (key, value) in fields {
                    let field = &schema["properties"][key];
                    assert!(field.is_object(), "'{key}' is not in the schema");
                    keys_are_known(value, field, root);
                }
            }
            Value::Array(items) => {
                let item = &schema["items"];
                items.iter().for_each(|v| keys_are_known(v, item, root));
            }
            Value::String(text) if schema["oneOf"].is_array() => {
                let known = schema["oneOf"].as_array().into_iter().flatten();
                assert!(known.clone().any(|k| k["const"] == **text), "{text}");
            }
            _ => {}
        }
    }

    #[test]
    fn the_plan_in_the_guide_is_valid_and_in_the_schema() {
        let guide = include_str!("../../../docs/steering.md");
        let (_, rest) = guide.split_once("```toml\n").unwrap();
        let (text, _) = rest.split_once("```").unwrap();
        let plan = SteeringPlan::from_toml(text).unwrap();
        assert!(!plan.gates.is_empty(), "the guide shows a gate");
        let schema = SteeringPlan::schema();
        let as_written: toml::Value = toml::from_str(text).unwrap();
        let as_written = serde_json::to_value(as_written).unwrap();
        for value in [as_written, serde_json::to_value(&plan).unwrap()] {
            keys_are_known(&value, &schema, &schema);
        }
    }

    #[test]
    #[should_panic(expected = "'spam' is not in the schema")]
    fn the_schema_knows_what_it_does_not_know() {
        let plan = serde_json::json!({"interventions": [{"spam": {"prompt": true}}]});
        let schema = SteeringPlan::schema();
        keys_are_known(&plan, &schema, &schema);
    }

    #[track_caller]
    fn refused(from: &str, to: &str, expect: &str) {
        let text = PLAN.replace(from, to);
        assert_ne!(text, PLAN, "the case changes nothing");
        let message = SteeringPlan::from_toml(&text).unwrap_err().to_string();
        assert!(message.contains(expect), "{message}");
    }

    #[test]
    fn what_is_wrong_is_named() {
        refused("threshold", "treshold", "treshold");
        refused("\"set\"", "\"clamp\"", "clamp");
        refused("version = 1", "version = 9", "version 9");
        let clamped = "sae = \"main\"\n        edits";
        refused(clamped, "edits", "interventions[0]: sae");
        refused("[\"unsafe\"]", "[\"unsave\"]", "'unsave'");
        refused("[\"unsafe\"]", "[]", "when = []");
        refused("value = 2.0", "value = nan", "must be finite");
        refused("threshold = 0.5", "threshold = inf", "threshold");
        refused(
            "edits = [{",
            "edits = [{ latent = 7, op = \"ablate\" }, {",
            "edited twice",
        );
        refused(
            clamped,
            "sae = \"main\"\nspan = { prompt = true, from = 3, to = 3 }\nedits",
            "greater than from",
        );
        refused(
            clamped,
            "sae = \"main\"\nspan = { prompt = false, generation = false }\nedits",
            "no token",
        );
    }
}
