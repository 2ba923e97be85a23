//! Stage `gate`: a condition on latents that tells an unsafe request from one that only looks so.
//!
//! Trained on the discovery split of pairs and ordinary requests, chosen and calibrated on the
//! validation split, and then run once on the test split: over all, by category, by style, and on
//! the categories that training never saw. Beside it stand a probe on the raw residual, trained and
//! chosen the same way, and the condition of CAST: the cosine with the difference of means.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use demur_eval::prompts::{self, Label, Prompt, Split};
use demur_features::gate::{
    self, Detection, Group, Pooled, Report, Search, Tried, detection, recall_at, reliability, roc,
};
use demur_features::harvest::Sequence;
use demur_model::hooks::Role;
use demur_sae::Sae;
use demur_steering::{Aggregate, Gate, PLAN_VERSION, Scope, SteeringPlan};
use serde::{Deserialize, Serialize};

use super::{SAE_NAME, StudyContext, with_reply};
use crate::progress::{Progress, note};

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
    /// The same of a probe on the raw residual.
    pub residual_validation: Detection,
    pub residual_test: Detection,
    /// Which of the probe's settings won.
    pub residual_tried: Tried,
    /// The cosine with the mean of unsafe prompts less that of safe ones, at the last prompt token.
    pub condition: Gate,
    pub condition_validation: Detection,
    pub condition_test: Detection,
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

pub fn run(c: &StudyContext, sae: &Sae) -> Result<Trained> {
    let prompts = gate_prompts(c)?;
    let of = |split| prompts.iter().filter(|p| p.split == Some(split)).count();
    let (n_train, n_validation) = (of(Split::Discovery), of(Split::Validation));
    let train = 0..n_train;
    let validation = n_train..n_train + n_validation;
    let test = validation.end..prompts.len();
    let labels: Vec<bool> = prompts
        .iter()
        .map(|p| p.label == Some(Label::Unsafe))
        .collect();
    let items = c.items(&prompts.iter().collect::<Vec<_>>())?;
    let sequences: Vec<Sequence> = items.iter().map(|i| with_reply(i, &[])).collect();
    let bar = Progress::new("gate", "prompts", prompts.len() as u64);
    let tokens = c.study.model.batch_tokens;
    let (latents, residual) = gate::read(&c.loaded.model, c.site, sae, &sequences, tokens, || {
        bar.advance(1)
    })?;
    bar.finish();
    let cfg = &c.study.gate;
    let search = Search {
        labels: &labels,
        train: train.clone(),
        validation: validation.clone(),
        sizes: &cfg.sizes,
        l2: &cfg.l2,
        recall: cfg.recall,
    };
    let nothing = "no latent is active on the prompts: is it the right SAE?";
    let trained = gate::train(&latents, &search).context(nothing)?;
    let width = sae.d_model();
    let whole = Search {
        sizes: &[width],
        ..search.clone()
    };
    let probe = gate::train(&residual, &whole).context(nothing)?;
    let scored = |g: &gate::Trained, pooled: &[Pooled]| -> Result<Vec<(f64, bool)>> {
        let read = pooled.iter().find(|p| p.reading == g.reading);
        let rows = &read.context("the reading was not tried")?.rows;
        let scores = rows.iter().map(|row| g.score(row));
        Ok(scores.zip(labels.iter().copied()).collect())
    };
    let known: Vec<&str> = prompts[train.clone()].iter().map(category).collect();
    let by_gate = scored(&trained, &latents)?;
    let report = |at: &std::ops::Range<usize>| {
        report(
            &prompts[at.clone()],
            &by_gate[at.clone()],
            trained.threshold,
            &known,
        )
    };
    let by_probe = scored(&probe, &residual)?;
    let (condition, by_condition) = condition(c, &residual, &search)?;
    let bar = f64::from(condition.threshold);
    Ok(Trained {
        gate: trained.gate(c.site, SAE_NAME),
        validation: report(&validation),
        test: report(&test),
        tried: trained.tried.clone(),
        residual_validation: detection(&by_probe[validation.clone()], probe.threshold),
        residual_test: detection(&by_probe[test.clone()], probe.threshold),
        residual_tried: probe.tried[0].clone(),
        condition,
        condition_validation: detection(&by_condition[validation], bar),
        condition_test: detection(&by_condition[test], bar),
    })
}

/// Prompts of the discovery, the validation and the test split, in this order.
fn gate_prompts(c: &StudyContext) -> Result<Vec<Prompt>> {
    let mut all = match &c.study.prompts.file {
        Some(_) => c.prompts.clone(),
        None => super::shipped_pairs(super::ShippedPairs::All)?,
    };
    all.extend(prompts::shipped_instructions()?);
    if let Some(file) = &c.study.gate.negatives {
        let mut more = prompts::read(file)?;
        let before = more.len();
        more.retain(|p| p.label != Some(Label::Unsafe));
        for p in &mut more {
            p.label = Some(Label::Safe);
            p.split = p.split.or(Some(Split::Discovery));
        }
        if more.len() < before {
            let n = before - more.len();
            note(format_args!(
                "{:<12} {n} of gate.negatives are unsafe and not used",
                "gate"
            ));
        }
        prompts::disjoint(&file.display().to_string(), all.iter().chain(&more))?;
        all.extend(more);
    }
    all.retain(|p| p.label.is_some());
    let of = |split| all.iter().filter(move |p| p.split == Some(split)).cloned();
    let splits = [Split::Discovery, Split::Validation, Split::Test];
    Ok(splits.into_iter().flat_map(of).collect())
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
            is_unsafe(p) || p.pair.is_none()
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
    search: &Search<'_>,
) -> Result<(Gate, Vec<(f64, bool)>)> {
    let roles = [Role::User, Role::Template];
    let last = residual
        .iter()
        .find(|p| p.reading.aggregate == Aggregate::Last && p.reading.roles == roles)
        .context("the last token was not read")?;
    let width = last.rows.first().map_or(0, Vec::len);
    let mean = |want: bool| -> Vec<f64> {
        let mut sum = vec![0.0; width];
        let of = search.train.clone().filter(|&i| search.labels[i] == want);
        let n = of.clone().count().max(1) as f64;
        for i in of {
            sum.iter_mut()
                .zip(&last.rows[i])
                .for_each(|(s, v)| *s += f64::from(*v) / n);
        }
        sum
    };
    let both = mean(true).into_iter().zip(mean(false));
    let direction: Vec<f32> = both.map(|(a, b)| (a - b) as f32).collect();
    let length = |v: &[f32]| v.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>().sqrt();
    let scale = length(&direction);
    let cosine = |row: &Vec<f32>| {
        let dot = row.iter().zip(&direction);
        let dot: f64 = dot.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        dot / (length(row) * scale).max(f64::MIN_POSITIVE)
    };
    let scores = last.rows.iter().map(cosine);
    let scored: Vec<(f64, bool)> = scores.zip(search.labels.iter().copied()).collect();
    let threshold = gate::threshold_at(&scored[search.validation.clone()], search.recall);
    let gate = Gate {
        site: c.site.to_string(),
        sae: None,
        weights: Vec::new(),
        direction,
        membership: demur_steering::Membership::Exact,
        bias: 0.0,
        aggregate: Aggregate::Last,
        scope: Scope::Conversation,
        threshold: threshold as f32,
        hysteresis: 0.0,
        latch: false,
        roles: roles.to_vec(),
        during_generation: false,
    };
    Ok((gate, scored))
}
