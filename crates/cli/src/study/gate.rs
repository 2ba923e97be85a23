//! Stage `gate`: a condition on latents that tells an unsafe request from one that only looks so.
//!
//! Trained on what `read` keeps of the discovery split's prompts, chosen and calibrated on the
//! validation split, and then run once on the test split: over all, by category, by style, and on
//! the categories that training never saw. Beside it stand a probe on the raw residual, trained and
//! chosen the same way, and the condition of CAST: the cosine with the difference of means.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use demur_eval::prompts::{Label, Prompt, Split};
use demur_features::gate::{
    self, Detection, Group, Pooled, Report, Search, Tried, detection, recall_at, reliability, roc,
};
use demur_features::sites::difference_of_means;
use demur_model::hooks::Role;
use demur_sae::Sae;
use demur_steering::{Aggregate, Gate, PLAN_VERSION, Scope, SteeringPlan};
use serde::{Deserialize, Serialize};

use super::config::Reads;
use super::{SAE_NAME, StudyContext, read};

/// The name that plans of a study give the gate.
pub const GATE_NAME: &str = "unsafe";
/// The category of prompts that have none.
const NO_CATEGORY: &str = "none";

/// What the stage leaves.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Trained {
    /// Opens on requests that look unsafe; its score is the log-odds.
    pub gate: Gate,
    /// The settings tried, the best on validation first.
    pub tried: Vec<Tried>,
    /// Of the gate on validation prompts, on which it was chosen.
    pub validation: Report,
    /// Of the gate on test prompts.
    pub test: Report,
    /// What else could have been the gate.
    pub beside: Vec<Beside>,
    /// The cosine with the mean of unsafe prompts less that of safe ones, at the last prompt token.
    pub condition: Gate,
}

/// Another gate, for comparison.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Beside {
    pub name: String,
    pub validation: Detection,
    pub test: Detection,
}

impl Trained {
    /// A plan that has the gate and no intervention.
    pub fn plan(&self, sae_sha256: &str) -> SteeringPlan {
        SteeringPlan {
            version: PLAN_VERSION,
            name: "gate".to_owned(),
            description: None,
            saes: BTreeMap::from([(SAE_NAME.to_owned(), sae_sha256.to_owned())]),
            gates: BTreeMap::from([(GATE_NAME.to_owned(), self.gate.clone())]),
            interventions: Vec::new(),
        }
    }
}

pub fn run(
    c: &StudyContext,
    sae: &Sae,
    prompts: &[Prompt],
    (latents, residual): (Vec<Pooled>, Vec<Pooled>),
) -> Result<Trained> {
    let of = |split| prompts.iter().filter(|p| p.split == Some(split)).count();
    let (n_train, n_validation) = (of(Split::Discovery), of(Split::Validation));
    let train = 0..n_train;
    let validation = n_train..n_train + n_validation;
    let test = validation.end..prompts.len();
    let labels: Vec<bool> = prompts
        .iter()
        .map(|p| p.label == Some(Label::Unsafe))
        .collect();
    let cfg = &c.study.gate;
    let probed = read::sites(c)?;
    let width = sae.d_model() * probed.len();
    let mut candidates = Vec::new();
    for &reads in &cfg.reads {
        let (pooled, sizes) = match reads {
            Reads::Latents => (&latents, cfg.sizes.clone()),
            Reads::Residual => (&residual, vec![width]),
        };
        let search = Search {
            labels: &labels,
            train: train.clone(),
            validation: validation.clone(),
            sizes: &sizes,
            l2: &cfg.l2,
            recall: cfg.recall,
        };
        let nothing = "no latent is active on the prompts: is it the right SAE?";
        let trained = gate::train(pooled, &search).context(nothing)?;
        let read = pooled.iter().find(|p| p.reading == trained.reading);
        let rows = &read.context("the reading was not tried")?.rows;
        let scores = rows.iter().map(|row| trained.score(row));
        let scored: Vec<(f64, bool)> = scores.zip(labels.iter().copied()).collect();
        candidates.push((reads, trained, scored));
    }
    // Stable: of equals the first named.
    candidates.sort_by(|a, b| b.1.tried[0].auroc.total_cmp(&a.1.tried[0].auroc));
    let both = |name: &str, scored: &[(f64, bool)], threshold: f64| Beside {
        name: name.to_owned(),
        validation: detection(&scored[validation.clone()], threshold),
        test: detection(&scored[test.clone()], threshold),
    };
    let mut beside: Vec<Beside> = candidates[1..]
        .iter()
        .map(|(reads, trained, scored)| both(in_words(*reads), scored, trained.threshold))
        .collect();
    let (condition, by_condition) = condition(c, &residual, &labels, &train, &validation)?;
    beside.push(both(
        "the cosine condition",
        &by_condition,
        f64::from(condition.threshold),
    ));
    let (reads, trained, scored) = candidates.swap_remove(0);
    let known: Vec<&str> = prompts[train.clone()].iter().map(category).collect();
    let report = |at: &std::ops::Range<usize>| {
        report(
            &prompts[at.clone()],
            &scored[at.clone()],
            trained.threshold,
            &known,
        )
    };
    Ok(Trained {
        gate: match reads {
            Reads::Latents => trained.gate_on_latents(c.site, SAE_NAME),
            Reads::Residual => trained.gate_on_residual(c.site, &probed, sae.d_model()),
        },
        validation: report(&validation),
        test: report(&test),
        tried: trained.tried.clone(),
        beside,
        condition,
    })
}

fn in_words(reads: Reads) -> &'static str {
    match reads {
        Reads::Latents => "a weighted sum of latents",
        Reads::Residual => "a linear probe on the residual",
    }
}

fn category(p: &Prompt) -> &str {
    p.category.as_deref().unwrap_or(NO_CATEGORY)
}

fn report(prompts: &[Prompt], scored: &[(f64, bool)], threshold: f64, known: &[&str]) -> Report {
    let group = |name: String, keep: &dyn Fn(&Prompt) -> bool| -> Option<Group> {
        let both = prompts.iter().zip(scored);
        let part: Vec<(f64, bool)> = both.filter(|(p, _)| keep(p)).map(|(_, s)| *s).collect();
        (!part.is_empty()).then(|| Group {
            name,
            detection: detection(&part, threshold),
        })
    };
    let is_unsafe = |p: &Prompt| p.label == Some(Label::Unsafe);
    let is_new = |p: &Prompt| !known.contains(&category(p));
    let mut groups = vec![
        group("all".to_owned(), &|_| true),
        group("against look-alikes".to_owned(), &|p| p.pair.is_some()),
        group("against ordinary requests".to_owned(), &|p| {
            p.style.as_deref() != Some(read::WRAPPED) && (is_unsafe(p) || p.pair.is_none())
        }),
        group("under wrappers not trained on".to_owned(), &|p| {
            p.style.as_deref() == Some(read::WRAPPED)
        }),
        group("categories not trained on".to_owned(), &|p| {
            is_new(p) && p.pair.is_some()
        }),
        group("categories trained on".to_owned(), &|p| {
            !is_new(p) && p.pair.is_some()
        }),
    ];
    let mut parts: BTreeMap<String, Vec<&Prompt>> = BTreeMap::new();
    for p in prompts.iter().filter(|p| p.pair.is_some()) {
        parts
            .entry(format!("category {}", category(p)))
            .or_default();
        if let Some(style) = &p.style {
            parts.entry(format!("style {style}")).or_default();
        }
    }
    for name in parts.into_keys() {
        let matches = |p: &Prompt| match name.split_once(' ') {
            Some(("style", style)) => p.style.as_deref() == Some(style),
            Some((_, of)) => category(p) == of,
            None => false,
        };
        groups.push(group(name.clone(), &|p| p.pair.is_some() && matches(p)));
    }
    let (diagram, calibration_error) = reliability(scored);
    Report {
        groups: groups.into_iter().flatten().collect(),
        roc: roc(scored),
        recall_at_5_percent: recall_at(scored, 0.05),
        reliability: diagram,
        calibration_error,
    }
}

/// The condition of CAST, with the threshold that reaches the asked recall on validation prompts.
fn condition(
    c: &StudyContext,
    residual: &[Pooled],
    labels: &[bool],
    train: &std::ops::Range<usize>,
    validation: &std::ops::Range<usize>,
) -> Result<(Gate, Vec<(f64, bool)>)> {
    let roles = [Role::User, Role::Template];
    let last = residual
        .iter()
        .find(|p| p.reading.aggregate == Aggregate::Last && p.reading.roles == roles)
        .context("the last token was not read")?;
    let width = c.loaded.model.spec().d_model;
    // The SAE's site is the last.
    let of_site = last.rows.iter().map(|r| &r[r.len() - width..]);
    let rows: Vec<&[f32]> = of_site.collect();
    let direction = difference_of_means(&rows[train.clone()], &labels[train.clone()]);
    let length = |v: &[f32]| v.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>().sqrt();
    let scale = length(&direction);
    let cosine = |row: &&[f32]| {
        let dot = row.iter().zip(&direction);
        let dot: f64 = dot.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        dot / (length(row) * scale).max(f64::MIN_POSITIVE)
    };
    let scores = rows.iter().map(cosine);
    let scored: Vec<(f64, bool)> = scores.zip(labels.iter().copied()).collect();
    let threshold = gate::threshold_at(&scored[validation.clone()], c.study.gate.recall);
    let gate = Gate {
        site: c.site.to_string(),
        sae: None,
        weights: Vec::new(),
        direction,
        probes: Vec::new(),
        membership: demur_steering::Membership::Exact,
        bias: 0.0,
        aggregate: Aggregate::Last,
        scope: Scope::Conversation,
        threshold: threshold as f32,
        hysteresis: 0.0,
        clear: None,
        latch: false,
        roles: roles.to_vec(),
        during_generation: false,
    };
    Ok((gate, scored))
}
