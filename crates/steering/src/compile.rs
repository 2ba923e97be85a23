//! From a plan to interventions: names resolved, units made absolute, shapes checked, once.

use std::collections::BTreeMap;
use std::sync::Arc;

use demur_model::hooks::{Intervention, InterventionState, Rows, Site};
use demur_sae::{Codes, Sae};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::error::SteeringError;
use crate::gate::{Gate, GateState};
use crate::plan::{
    Direction, DirectionOp, ErrorTerm, InterventionSpec, LatentEdit, Membership, Op, Span,
    SteeringPlan, Unit,
};

/// An SAE at hand, with the figures that relative units need.
#[derive(Debug, Clone)]
pub struct SaeEntry {
    /// The SAE.
    pub sae: Arc<Sae>,
    /// sha256 of its weights.
    pub sha256: String,
    /// Largest activation of each latent over a harvest, `[d_sae]`; for [`Unit::RelMax`].
    pub max_activation: Option<Arc<[f32]>>,
    /// Mean residual norm at the site over a harvest; for [`Unit::ResidNorm`].
    pub resid_norm: Option<f32>,
}

/// SAEs by the name that plans use.
pub type SaeSet = BTreeMap<String, SaeEntry>;

/// A plan that is checked and ready to run; immutable, shared by all sequences that use it.
#[derive(Debug)]
pub struct CompiledPlan {
    name: String,
    interventions: Arc<[Compiled]>,
    sites: Vec<Site>,
    fingerprint: [u8; 32],
}

#[derive(Debug)]
struct Compiled {
    site: Site,
    sae: Option<Arc<Sae>>,
    edits: Vec<(LatentEdit, f32)>, // with the value in activations
    direction: Option<(Vec<f32>, DirectionOp, f32)>, // unit vector
    error_term: ErrorTerm,
    membership: Membership,
    span: Span,
    gate: Option<Gate>,
    max_edit_norm: Option<f32>,
}

/// Checks `plan` against the SAEs and the model's `n_layers` and `d_model`.
///
/// # Errors
/// Whatever [`SteeringPlan::validate`] finds; an SAE that is not in `saes` or whose hash differs
/// from the plan's; a latent, site or width that does not fit; a unit without its figure.
pub fn compile(
    plan: &SteeringPlan,
    saes: &SaeSet,
    n_layers: usize,
    d_model: usize,
) -> Result<CompiledPlan, SteeringError> {
    plan.validate()?;
    for (name, expected) in &plan.saes {
        if let Some(entry) = saes.get(name)
            && !expected.is_empty()
            && *expected != entry.sha256
        {
            return Err(SteeringError::SaeMismatch {
                name: name.clone(),
                found: entry.sha256.clone(),
                expected: expected.clone(),
            });
        }
    }
    let mut interventions = Vec::with_capacity(plan.interventions.len());
    let mut hash = Sha256::new();
    hash.update(plan.sha256());
    for (i, spec) in plan.interventions.iter().enumerate() {
        let place = format!("interventions[{i}]");
        if let Some(entry) = spec.sae.as_ref().and_then(|s| saes.get(s)) {
            hash.update(&entry.sha256);
            for (edit, value) in spec.edits.iter().zip(absolute_values(spec, entry, &place)?) {
                hash.update(edit.latent.to_le_bytes());
                hash.update(value.to_le_bytes());
            }
        }
        interventions.push(compile_one(spec, saes, n_layers, d_model, &place)?);
    }
    let mut sites: Vec<Site> = interventions.iter().map(|c: &Compiled| c.site).collect();
    sites.sort_unstable();
    sites.dedup();
    Ok(CompiledPlan {
        name: plan.name.clone(),
        interventions: interventions.into(),
        sites,
        fingerprint: hash.finalize().into(),
    })
}

fn compile_one(
    spec: &InterventionSpec,
    saes: &SaeSet,
    n_layers: usize,
    d_model: usize,
    place: &str,
) -> Result<Compiled, SteeringError> {
    let site_error = |reason: String| SteeringError::Site {
        place: place.to_owned(),
        reason,
    };
    let site: Site = spec.site.parse().map_err(|e| site_error(format!("{e}")))?;
    if site.layer >= n_layers {
        return Err(site_error(format!(
            "site {site} is beyond the model's last layer, {}",
            n_layers.saturating_sub(1)
        )));
    }
    let width = |what: String, found: usize| {
        if found == d_model {
            Ok(())
        } else {
            Err(SteeringError::Width {
                place: place.to_owned(),
                what,
                found,
                expected: d_model,
            })
        }
    };
    let (mut sae, mut values) = (None, Vec::new());
    if let Some(name) = &spec.sae {
        let entry = entry(saes, name, place)?;
        width(format!("SAE '{name}'"), entry.sae.d_model())?;
        let latents = spec.edits.iter().map(|e| e.latent);
        let read = spec
            .gate
            .iter()
            .flat_map(|g| g.weights.iter().map(|w| w.latent));
        if let Some(latent) = latents
            .chain(read)
            .find(|&j| j as usize >= entry.sae.d_sae())
        {
            return Err(SteeringError::LatentOutOfRange {
                place: place.to_owned(),
                latent,
                sae: name.clone(),
                d_sae: entry.sae.d_sae(),
            });
        }
        values = absolute_values(spec, entry, place)?;
        sae = Some(Arc::clone(&entry.sae));
    }
    if let Some(d) = &spec.direction {
        width(format!("direction '{}'", d.name), d.vector.len())?;
    }
    Ok(Compiled {
        site: site.canonical(),
        sae,
        edits: spec.edits.iter().copied().zip(values).collect(),
        direction: spec.direction.as_ref().map(unit_direction),
        error_term: spec.error_term,
        membership: spec.membership,
        span: spec.span.clone(),
        gate: spec.gate.clone(),
        max_edit_norm: spec.max_edit_norm,
    })
}

/// The plan with every value in activations: it needs nothing but the SAE to run.
///
/// # Errors
/// [`SteeringError::UnknownSae`], or [`SteeringError::MissingScale`] for a unit without its figure.
pub fn absolute(plan: &SteeringPlan, saes: &SaeSet) -> Result<SteeringPlan, SteeringError> {
    let mut plan = plan.clone();
    for (i, spec) in plan.interventions.iter_mut().enumerate() {
        let place = format!("interventions[{i}]");
        let Some(name) = &spec.sae else { continue };
        let values = absolute_values(spec, entry(saes, name, &place)?, &place)?;
        for (edit, value) in spec.edits.iter_mut().zip(values) {
            edit.value = value;
            edit.unit = Unit::Abs;
        }
    }
    Ok(plan)
}

fn entry<'a>(saes: &'a SaeSet, name: &str, place: &str) -> Result<&'a SaeEntry, SteeringError> {
    saes.get(name).ok_or_else(|| SteeringError::UnknownSae {
        place: place.to_owned(),
        name: name.to_owned(),
        known: saes.keys().cloned().collect::<Vec<_>>().join(", "),
    })
}

fn absolute_values(
    spec: &InterventionSpec,
    entry: &SaeEntry,
    place: &str,
) -> Result<Vec<f32>, SteeringError> {
    let missing = |unit, what| SteeringError::MissingScale {
        place: place.to_owned(),
        unit,
        what,
        sae: spec.sae.clone().unwrap_or_default(),
    };
    spec.edits
        .iter()
        .map(|edit| match edit.unit {
            _ if matches!(edit.op, Op::Scale | Op::Ablate) => Ok(edit.value),
            Unit::Abs => Ok(edit.value),
            Unit::RelMax => entry
                .max_activation
                .as_ref()
                .and_then(|m| m.get(edit.latent as usize))
                .map(|m| edit.value * m)
                .ok_or_else(|| missing("rel_max", "the latent's largest activation")),
            Unit::ResidNorm => entry
                .resid_norm
                .map(|n| edit.value * n)
                .ok_or_else(|| missing("resid_norm", "the mean residual norm")),
        })
        .collect()
}

fn unit_direction(d: &Direction) -> (Vec<f32>, DirectionOp, f32) {
    let norm = d.vector.iter().map(|v| v * v).sum::<f32>().sqrt();
    (d.vector.iter().map(|v| v / norm).collect(), d.op, d.value)
}

impl CompiledPlan {
    /// The plan's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Intervention for CompiledPlan {
    fn sites(&self) -> &[Site] {
        &self.sites
    }

    fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    fn is_empty(&self) -> bool {
        self.interventions.is_empty()
    }

    fn row_wise(&self) -> bool {
        self.interventions.iter().all(|c| c.gate.is_none())
    }

    fn start(&self) -> Box<dyn InterventionState> {
        Box::new(PlanState {
            interventions: Arc::clone(&self.interventions),
            memory: vec![Memory::default(); self.interventions.len()],
        })
    }
}

/// What a plan remembers of one sequence: each gate's state, and the audit.
#[derive(Clone)]
struct PlanState {
    interventions: Arc<[Compiled]>,
    memory: Vec<Memory>,
}

#[derive(Clone, Default)]
struct Memory {
    gate: GateState,
    rows_edited: u64,
    edit_norm: f64,   // sum over edited rows of |x' - x| / |x|
    before: Vec<f64>, // sum over edited rows of each edited latent's activation
}

impl InterventionState for PlanState {
    fn edit(&mut self, site: Site, rows: &Rows<'_>, resid: &mut [f32]) {
        let site = site.canonical();
        for (c, memory) in self.interventions.iter().zip(&mut self.memory) {
            if c.site == site {
                c.apply(memory, rows, resid);
            }
        }
    }

    fn audit(&self) -> Option<Value> {
        let per: Vec<Value> = self
            .interventions
            .iter()
            .zip(&self.memory)
            .map(|(c, m)| {
                let n = m.rows_edited.max(1) as f64;
                let latents: Vec<Value> = c
                    .edits
                    .iter()
                    .zip(&m.before)
                    .map(|((e, value), sum)| {
                        json!({"latent": e.latent, "op": e.op, "value": value, "mean_before": sum / n})
                    })
                    .collect();
                json!({
                    "site": c.site.to_string(),
                    "tokens_edited": m.rows_edited,
                    "mean_edit_norm": m.edit_norm / n,
                    "latents": latents,
                    "gate": c.gate.as_ref().map(|g| json!({
                        "score": m.gate.score(g.aggregate),
                        "open": m.gate.open,
                        "fired": m.gate.ever_open,
                    })),
                })
            })
            .collect();
        Some(json!({ "interventions": per }))
    }

    fn fork(&self) -> Box<dyn InterventionState> {
        Box::new(self.clone())
    }
}

impl Compiled {
    /// Applies this intervention to the new rows of one sequence.
    ///
    /// # Shapes
    /// `resid` is `[rows.tokens.len(), d_model]`.
    fn apply(&self, memory: &mut Memory, rows: &Rows<'_>, resid: &mut [f32]) {
        let n = rows.tokens.len();
        if n == 0 {
            return;
        }
        let d = resid.len() / n;
        memory.before.resize(self.edits.len(), 0.0);
        let reads_gate = self
            .gate
            .as_ref()
            .is_some_and(|g| !rows.generated || g.during_generation);
        let needs_codes = self.sae.as_ref().filter(|_| {
            self.error_term == ErrorTerm::Dropped
                || (self.membership == Membership::Exact && (reads_gate || !self.edits.is_empty()))
        });
        let codes = needs_codes.map(|sae| sae.encode(resid, n));
        let read = |t: usize, latent: u32, x: &[f32]| -> f32 {
            match (&codes, &self.sae) {
                (Some(codes), _) if self.membership == Membership::Exact => {
                    activation(codes, t, latent)
                }
                (_, Some(sae)) => sae.latent(x, latent as usize),
                _ => 0.0,
            }
        };
        if let (Some(gate), true) = (&self.gate, reads_gate) {
            for t in (0..n).filter(|&t| gate.reads(rows.roles[t]) || rows.generated) {
                if self.span.skip_first && rows.start_pos + t == 0 {
                    continue;
                }
                let x = &resid[t * d..(t + 1) * d];
                let score = gate
                    .weights
                    .iter()
                    .fold(gate.bias, |s, w| s + w.weight * read(t, w.latent, x));
                memory.gate.push(score);
            }
            memory.gate.decide(gate);
        }
        if self.gate.is_some() && !memory.gate.open {
            return;
        }
        let reconstruction = match (&codes, &self.sae, self.error_term) {
            (Some(codes), Some(sae), ErrorTerm::Dropped) => {
                let mut out = vec![0.0; n * d];
                sae.decode(codes, &mut out);
                Some(out)
            }
            _ => None,
        };
        let mut delta = vec![0.0f32; d];
        for t in (0..n).filter(|&t| self.covers(rows, t)) {
            let x = &mut resid[t * d..(t + 1) * d];
            delta.fill(0.0);
            if let Some(sae) = &self.sae {
                for (e, (edit, value)) in self.edits.iter().enumerate() {
                    let f = read(t, edit.latent, x);
                    memory.before[e] += f64::from(f);
                    let change = change(edit.op, *value, f);
                    if change != 0.0 {
                        for (o, w) in delta.iter_mut().zip(sae.decoder_row(edit.latent as usize)) {
                            *o += change * w;
                        }
                    }
                }
            }
            if let Some((v, op, value)) = &self.direction {
                let along = match op {
                    DirectionOp::Add => *value,
                    DirectionOp::Ablate => -x.iter().zip(v).map(|(a, b)| a * b).sum::<f32>(),
                };
                for (o, w) in delta.iter_mut().zip(v) {
                    *o += along * w;
                }
            }
            if let Some(reconstruction) = &reconstruction {
                let x_hat = &reconstruction[t * d..(t + 1) * d];
                for ((o, r), x) in delta.iter_mut().zip(x_hat).zip(x.iter()) {
                    *o += r - x;
                }
            }
            let norm = |v: &[f32]| v.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>().sqrt();
            let (size, mut ratio) = (norm(x), norm(&delta));
            ratio /= size.max(f64::MIN_POSITIVE);
            if let Some(cap) = self.max_edit_norm.map(f64::from).filter(|c| ratio > *c) {
                let shrink = (cap / ratio) as f32;
                delta.iter_mut().for_each(|v| *v *= shrink);
                ratio = cap;
            }
            for (x, o) in x.iter_mut().zip(&delta) {
                *x += o;
            }
            memory.rows_edited += 1;
            memory.edit_norm += ratio;
        }
    }

    fn covers(&self, rows: &Rows<'_>, t: usize) -> bool {
        let span = &self.span;
        (if rows.generated {
            span.generation
        } else {
            span.prompt
        }) && !(span.skip_first && rows.start_pos + t == 0)
            && (span.roles.is_empty() || span.roles.contains(&rows.roles[t]))
    }
}

/// How much of the latent's decoder row is added, for a latent at `f`.
fn change(op: Op, value: f32, f: f32) -> f32 {
    match op {
        Op::Set => value - f,
        Op::Floor => (value - f).max(0.0),
        Op::Ceiling => (value - f).min(0.0),
        Op::Scale => (value - 1.0) * f,
        Op::Ablate => -f,
        Op::Add => value,
    }
}

/// Activation of `latent` in row `t`: zero outside the top k.
fn activation(codes: &Codes, t: usize, latent: u32) -> f32 {
    let row = t * codes.k..(t + 1) * codes.k;
    codes.idx[row.clone()]
        .iter()
        .zip(&codes.val[row])
        .find_map(|(&j, &v)| (j == latent).then_some(v))
        .unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_by_hand() {
        // (operation, operand, activation before, activation after)
        let cases = [
            (Op::Set, 3.0, 1.0, 3.0),
            (Op::Set, 3.0, 5.0, 3.0),
            (Op::Floor, 3.0, 1.0, 3.0),
            (Op::Floor, 3.0, 5.0, 5.0),
            (Op::Ceiling, 3.0, 1.0, 1.0),
            (Op::Ceiling, 3.0, 5.0, 3.0),
            (Op::Scale, 0.5, 4.0, 2.0),
            (Op::Ablate, 9.0, 4.0, 0.0),
            (Op::Add, 3.0, 1.0, 4.0),
        ];
        for (op, value, before, after) in cases {
            assert_eq!(before + change(op, value, before), after, "{op:?} {value}");
        }
    }
}
