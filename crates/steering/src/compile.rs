//! From a plan to interventions: names resolved, units made absolute, shapes checked, once.

use std::collections::BTreeMap;
use std::sync::Arc;

use demur_model::hooks::{Intervention, InterventionState, Site};
use demur_sae::Sae;
use sha2::{Digest, Sha256};

use crate::error::SteeringError;
use crate::gate::{Condition, Gate, Probe};
use crate::plan::{
    Direction, DirectionOp, ErrorTerm, InterventionSpec, LatentEdit, Membership, Op, Span,
    SteeringPlan, Unit,
};
use crate::run::PlanState;

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
    parts: Arc<Parts>,
    sites: Vec<Site>,
    fingerprint: [u8; 32],
}

/// What a plan is made of, with names resolved.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) gates: Vec<CompiledGate>,
    pub(crate) interventions: Vec<Compiled>,
}

/// What a product with the residual at a site is added to: the score, or a head's query or value.
#[derive(Debug)]
pub(crate) struct Column {
    pub(crate) at: usize,
    pub(crate) site: Site,
    pub(crate) direction: Vec<f32>,
}

#[derive(Debug)]
pub(crate) struct CompiledGate {
    pub(crate) name: String,
    pub(crate) site: Site,
    pub(crate) sae: Option<Arc<Sae>>,
    pub(crate) gate: Gate, // its direction, if it has one, of unit norm
    pub(crate) probes: Vec<Column>, // those of the gate and of its heads
    pub(crate) columns: usize, // numbers that they make of a row
}

#[derive(Debug)]
pub(crate) struct Compiled {
    pub(crate) site: Site,
    pub(crate) sae: Option<Arc<Sae>>,
    pub(crate) edits: Vec<(LatentEdit, f32)>, // with the value in activations
    pub(crate) direction: Option<(Vec<f32>, DirectionOp, f32)>, // unit vector
    pub(crate) error_term: ErrorTerm,
    pub(crate) membership: Membership,
    pub(crate) span: Span,
    pub(crate) when: Option<Condition>,
    pub(crate) max_edit_norm: Option<f32>,
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
    let mut gates = Vec::with_capacity(plan.gates.len());
    let mut interventions = Vec::with_capacity(plan.interventions.len());
    let mut hash = Sha256::new();
    hash.update(plan.sha256());
    for (name, gate) in &plan.gates {
        if let Some(entry) = gate.sae.as_ref().and_then(|s| saes.get(s)) {
            hash.update(&entry.sha256);
        }
        gates.push(compile_gate(name, gate, saes, n_layers, d_model)?);
    }
    for (i, spec) in plan.interventions.iter().enumerate() {
        let place = format!("interventions[{i}]");
        if let Some(entry) = spec.sae.as_ref().and_then(|s| saes.get(s)) {
            hash.update(&entry.sha256);
            for (edit, value) in spec.edits.iter().zip(absolute_values(spec, entry, &place)?) {
                hash.update(edit.latent.to_le_bytes());
                hash.update(value.to_le_bytes());
            }
        }
        let compiled = compile_one(spec, saes, n_layers, d_model, &place)?;
        let named = spec.when.iter().flat_map(Condition::gates);
        let late = |g: &&CompiledGate| g.site > compiled.site;
        if let Some(gate) = named
            .into_iter()
            .filter_map(|name| gates.iter().find(|g| g.name == name))
            .find(late)
        {
            return Err(SteeringError::LateGate {
                place,
                name: gate.name.clone(),
                gate_site: gate.site.to_string(),
                site: compiled.site.to_string(),
            });
        }
        interventions.push(compiled);
    }
    let of_gates = gates
        .iter()
        .flat_map(|g| std::iter::once(g.site).chain(g.probes.iter().map(|p| p.site)));
    let mut sites: Vec<Site> = interventions
        .iter()
        .map(|c: &Compiled| c.site)
        .chain(of_gates)
        .collect();
    sites.sort_unstable();
    sites.dedup();
    Ok(CompiledPlan {
        name: plan.name.clone(),
        parts: Arc::new(Parts {
            gates,
            interventions,
        }),
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
    let site = resolve_site(&spec.site, n_layers, place)?;
    let (mut sae, mut values) = (None, Vec::new());
    if let Some(name) = &spec.sae {
        let entry = entry(saes, name, place)?;
        let edited = spec.edits.iter().map(|e| e.latent);
        check_sae(name, entry, edited, d_model, place)?;
        if entry.sae.wiring().transcoder {
            return Err(SteeringError::Site {
                place: place.to_owned(),
                reason: format!(
                    "'{name}' is a transcoder, which writes another site than it reads; an edit needs an \
                     SAE of its own site"
                ),
            });
        }
        values = absolute_values(spec, entry, place)?;
        sae = Some(Arc::clone(&entry.sae));
    }
    if let Some(d) = &spec.direction {
        let what = format!("direction '{}'", d.name);
        check_width(what, d.vector.len(), d_model, place)?;
    }
    Ok(Compiled {
        site,
        sae,
        edits: spec.edits.iter().copied().zip(values).collect(),
        direction: spec.direction.as_ref().map(unit_direction),
        error_term: spec.error_term,
        membership: spec.membership,
        span: spec.span.clone(),
        when: spec.when.clone(),
        max_edit_norm: spec.max_edit_norm,
    })
}

fn compile_gate(
    name: &str,
    gate: &Gate,
    saes: &SaeSet,
    n_layers: usize,
    d_model: usize,
) -> Result<CompiledGate, SteeringError> {
    let place = format!("gates.{name}");
    let site = resolve_site(&gate.site, n_layers, &place)?;
    let mut gate = gate.clone();
    let mut sae = None;
    if let (Some(sae_name), false) = (&gate.sae, gate.weights.is_empty()) {
        let entry = entry(saes, sae_name, &place)?;
        let read = gate.weights.iter().map(|w| w.latent);
        check_sae(sae_name, entry, read, d_model, &place)?;
        sae = Some(Arc::clone(&entry.sae));
    }
    if !gate.direction.is_empty() {
        check_width(
            "direction".to_owned(),
            gate.direction.len(),
            d_model,
            &place,
        )?;
        let norm = gate.direction.iter().map(|v| v * v).sum::<f32>().sqrt();
        gate.direction.iter_mut().for_each(|v| *v /= norm);
    }
    let heads = std::mem::take(&mut gate.heads);
    let columns = (2 * heads.len()).max(1);
    let of_heads = heads.into_iter().enumerate().flat_map(|(h, head)| {
        let named = |what, at, probes: Vec<Probe>| (format!("heads[{h}].{what}"), at, probes);
        [
            named("query", 2 * h, head.query),
            named("value", 2 * h + 1, head.value),
        ]
    });
    let own = ("probes".to_owned(), 0, std::mem::take(&mut gate.probes));
    let mut probes = Vec::new();
    for (list, column, of_column) in std::iter::once(own).chain(of_heads) {
        for (i, probe) in of_column.into_iter().enumerate() {
            let place = format!("{place}.{list}[{i}]");
            let at = resolve_site(&probe.site, n_layers, &place)?;
            if at > site {
                return Err(SteeringError::Site {
                    place,
                    reason: format!("it reads {at}, after {site}, where the gate decides"),
                });
            }
            check_width(
                "the probe".to_owned(),
                probe.direction.len(),
                d_model,
                &place,
            )?;
            probes.push(Column {
                at: column,
                site: at,
                direction: probe.direction,
            });
        }
    }
    Ok(CompiledGate {
        name: name.to_owned(),
        site,
        sae,
        gate,
        probes,
        columns,
    })
}

fn resolve_site(name: &str, n_layers: usize, place: &str) -> Result<Site, SteeringError> {
    let site_error = |reason: String| SteeringError::Site {
        place: place.to_owned(),
        reason,
    };
    let site: Site = name.parse().map_err(|e| site_error(format!("{e}")))?;
    if site.layer >= n_layers {
        return Err(site_error(format!(
            "site {site} is beyond the model's last layer, {}",
            n_layers.saturating_sub(1)
        )));
    }
    Ok(site.canonical())
}

fn check_width(
    what: String,
    found: usize,
    d_model: usize,
    place: &str,
) -> Result<(), SteeringError> {
    if found == d_model {
        return Ok(());
    }
    Err(SteeringError::Width {
        place: place.to_owned(),
        what,
        found,
        expected: d_model,
    })
}

fn check_sae(
    name: &str,
    entry: &SaeEntry,
    mut latents: impl Iterator<Item = u32>,
    d_model: usize,
    place: &str,
) -> Result<(), SteeringError> {
    check_width(format!("SAE '{name}'"), entry.sae.d_model(), d_model, place)?;
    let d_sae = entry.sae.d_sae();
    match latents.find(|&j| j as usize >= d_sae) {
        None => Ok(()),
        Some(latent) => Err(SteeringError::LatentOutOfRange {
            place: place.to_owned(),
            latent,
            sae: name.to_owned(),
            d_sae,
        }),
    }
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
        self.parts.interventions.is_empty()
    }

    fn row_wise(&self) -> bool {
        self.parts.gates.is_empty()
    }

    fn start(&self) -> Box<dyn InterventionState> {
        Box::new(PlanState::new(Arc::clone(&self.parts)))
    }
}
