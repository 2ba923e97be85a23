//! Stage `gate`: a condition on latents that tells an unsafe request from one that only looks so.
//!
//! Trained on what `read` keeps of the discovery split's prompts, chosen and calibrated on the
//! validation split, and then run once on the test split: over all, by category, by style, and on
//! the categories that training never saw. Beside it stand a probe on the raw residual, trained and
//! chosen the same way, and the condition of CAST: the cosine with the difference of means.
//!
//! A gate that takes the mean may judge parts of a request by themselves ([`Part`]). How long a part is and what is
//! added to its score is chosen by AUROC on the validation split, prompts under wrappers included.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result};
use demur_eval::prompts::{Label, Prompt, Split};
use demur_features::gate::{
    self, Detection, Group, Pooled, Report, Search, Tried, detection, recall_at, reliability, roc,
};
use demur_features::harvest::{Products, Sequence, harvest_sites};
use demur_features::sites::difference_of_means;
use demur_features::stats::auroc;
use demur_model::decoder::Model;
use demur_model::hooks::{Intervention, Role, Rows};
use demur_sae::Sae;
use demur_steering::{
    Aggregate, CompiledPlan, Gate, PLAN_VERSION, Part, SaeEntry, SaeSet, Scope, SteeringPlan,
    compile,
};
use serde::{Deserialize, Serialize};

use super::config::Reads;
use super::{SAE_NAME, StudyContext, read, with_reply};
use crate::progress::Progress;

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
    /// Parts tried, of each length that with the best bias; first none. Empty where none was asked for.
    pub parts: Vec<TriedPart>,
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

/// A gate's [`Part`], or none, and how well it then tells validation prompts apart.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TriedPart {
    pub part: Option<Part>,
    pub auroc: f64,
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
    let (reads, trained, mut scored) = candidates.swap_remove(0);
    let mut gate = match reads {
        Reads::Latents => trained.gate_on_latents(c.site, SAE_NAME),
        Reads::Residual => trained.gate_on_residual(c.site, &probed, sae.d_model()),
    };
    let mut parts = Vec::new();
    if !cfg.parts.is_empty() && gate.aggregate == Aggregate::Mean {
        let judged = &prompts[validation.start..];
        let n = validation.len();
        let (tried, scores) =
            with_parts(c, sae, &mut gate, judged, &labels[validation.start..], n)?;
        parts = tried;
        for (s, score) in scored[validation.start..].iter_mut().zip(scores) {
            s.0 = score;
        }
        gate.threshold = gate::threshold_at(&scored[validation.clone()], cfg.recall) as f32;
    }
    let threshold = f64::from(gate.threshold);
    let known: Vec<&str> = prompts[train.clone()].iter().map(category).collect();
    let report = |at: &std::ops::Range<usize>| {
        report(&prompts[at.clone()], &scored[at.clone()], threshold, &known)
    };
    Ok(Trained {
        gate,
        parts,
        validation: report(&validation),
        test: report(&test),
        tried: trained.tried.clone(),
        beside,
        condition,
    })
}

/// What is added to the mean of a part is looked for from here up to 0, in steps of a quarter; scores are log-odds.
const LEAST_BIAS: f32 = -6.0;

/// Gives `gate` the part that tells the first `n` of `prompts`, those for validation, best apart, or none if the mean of
/// all does; returns what was tried and the gate's scores of all `prompts`.
fn with_parts(
    c: &StudyContext,
    sae: &Sae,
    gate: &mut Gate,
    prompts: &[Prompt],
    labels: &[bool],
    n: usize,
) -> Result<(Vec<TriedPart>, Vec<f64>)> {
    let lengths = c
        .study
        .gate
        .parts
        .iter()
        .map(|&tokens| Some(Part { tokens, bias: 0.0 }));
    let lengths: Vec<Option<Part>> = std::iter::once(None).chain(lengths).collect();
    // Gates are read in the order of their names.
    let gates = lengths.iter().enumerate().map(|(i, part)| {
        let gate = Gate {
            part: *part,
            ..gate.clone()
        };
        (format!("{i:04}"), gate)
    });
    let plan = SteeringPlan {
        version: PLAN_VERSION,
        name: "parts".to_owned(),
        description: None,
        saes: BTreeMap::from([(SAE_NAME.to_owned(), String::new())]),
        gates: gates.collect(),
        interventions: Vec::new(),
    };
    let entry = SaeEntry {
        sae: Arc::new(sae.clone()),
        sha256: String::new(),
        max_activation: None,
        resid_norm: None,
    };
    let saes = SaeSet::from([(SAE_NAME.to_owned(), entry)]);
    let spec = c.loaded.model.spec();
    let plan = Arc::new(compile(&plan, &saes, spec.n_layers, spec.d_model)?);
    let items = c.items(&prompts.iter().collect::<Vec<_>>())?;
    let sequences: Vec<Sequence> = items.iter().map(|i| with_reply(i, &[])).collect();
    let scores = scores(&c.loaded.model, &plan, lengths.len(), &sequences)?;
    Ok(best_part(&scores, &lengths, labels, n, gate))
}

/// Gives `gate` the best part. `scores` are of a gate without one, then with those of `lengths`, whose bias is 0: with
/// a bias below 0 the score is the larger of the mean and that one plus the bias, so that nothing has to be read again.
fn best_part(
    scores: &[Vec<f64>],
    lengths: &[Option<Part>],
    labels: &[bool],
    n: usize,
    gate: &mut Gate,
) -> (Vec<TriedPart>, Vec<f64>) {
    let with = |by_length: &[f64], bias: f32| -> Vec<f64> {
        let both = scores[0].iter().zip(by_length);
        both.map(|(mean, s)| mean.max(s + f64::from(bias)))
            .collect()
    };
    let tells_apart = |scores: &[f64]| {
        let of = |want: bool| -> Vec<f64> {
            let both = scores[..n].iter().zip(labels).filter(|(_, l)| **l == want);
            both.map(|(s, _)| *s).collect()
        };
        auroc(&of(true), &of(false))
    };
    let biases = (0..)
        .map(|i| LEAST_BIAS + 0.25 * i as f32)
        .take_while(|b| *b <= 0.0);
    let mut tried = vec![TriedPart {
        part: None,
        auroc: tells_apart(&scores[0]),
    }];
    let mut best = (tried[0].clone(), scores[0].clone());
    for (part, by_length) in lengths.iter().zip(scores).skip(1) {
        let of_length = biases.clone().map(|bias| {
            let scores = with(by_length, bias);
            let tried = TriedPart {
                part: part.map(|p| Part { bias, ..p }),
                auroc: tells_apart(&scores),
            };
            (tried, scores)
        });
        // Of equals the lowest bias, with which a part says least.
        let found = of_length.reduce(|a, b| if b.0.auroc > a.0.auroc { b } else { a });
        if let Some(found) = found {
            tried.push(found.0.clone());
            if found.0.auroc > best.0.auroc {
                best = found;
            }
        }
    }
    gate.part = best.0.part;
    (tried, best.1)
}

/// The scores of each of the plan's gates, by the very code that runs while a model is steered.
pub fn scores(
    model: &Model,
    plan: &Arc<CompiledPlan>,
    n_gates: usize,
    sequences: &[Sequence],
) -> Result<Vec<Vec<f64>>> {
    let mut scores = vec![Vec::with_capacity(sequences.len()); n_gates];
    let bar = Progress::new("gate", "prompts", sequences.len() as u64);
    let sites = plan.sites();
    harvest_sites(
        model,
        sites,
        sequences,
        1024,
        Products::Int8,
        |i, by_site| {
            let s = &sequences[i];
            let rows = Rows {
                start_pos: 0,
                tokens: &s.tokens,
                roles: &s.roles,
                generated: false,
            };
            let mut state = plan.start();
            for (site, x) in sites.iter().zip(by_site) {
                state.edit(*site, &rows, &mut x.to_vec());
            }
            let audit = state.audit().unwrap_or_default();
            // A gate that has read no token is closed.
            for (at, scores) in scores.iter_mut().enumerate() {
                let score = audit["gates"][at]["score"].as_f64();
                scores.push(score.unwrap_or(f64::NEG_INFINITY));
            }
            bar.advance(1);
            Ok(())
        },
    )?;
    bar.finish();
    Ok(scores)
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
        part: None,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_part_that_tells_apart_is_found() {
        // The mean of all says nothing. A part of 8 tokens does if what is added keeps the safe ones below: unsafe
        // prompts have 4 there, safe ones 1 to 3 but for one; the last prompt is not for validation.
        let labels = [true, true, false, false, false, true];
        let mean = vec![0.0, 0.5, 0.5, 0.0, 0.25, 0.0];
        let part = vec![4.0, 4.0, 1.0, 3.0, 4.5, 9.0];
        let useless = vec![0.0, 0.5, 5.0, 5.0, 5.0, 5.0];
        let lengths = [None, Some(4), Some(8)].map(|t| t.map(|tokens| Part { tokens, bias: 0.0 }));
        let mut gate: Gate = serde_json::from_value(serde_json::json!({
            "site": "blocks.1.hook_resid_post", "direction": [1.0], "aggregate": "mean", "threshold": 0.0,
        }))
        .unwrap();
        let (tried, scores) = best_part(
            &[mean.clone(), useless, part],
            &lengths,
            &labels,
            5,
            &mut gate,
        );
        // of 6 pairs: 0 < 0.5, 0 = 0, 0 < 0.25, 0.5 = 0.5, 0.5 > 0, 0.5 > 0.25
        assert!((tried[0].auroc - 3.0 / 6.0).abs() < 1e-12);
        assert_eq!(tried[0].part, None);
        // below all biases that let it speak a part of 4 tokens changes nothing
        assert_eq!(tried[1].part.unwrap().bias, LEAST_BIAS);
        assert_eq!(tried[1].auroc, tried[0].auroc);
        // 4 of 6 pairs, all but those with the last, from the bias at which 4 less it is above 0.5
        let chosen = tried[2].part.unwrap();
        assert_eq!((chosen.tokens, gate.part), (8, Some(chosen)));
        assert!((tried[2].auroc - 4.0 / 6.0).abs() < 1e-12);
        assert_eq!(chosen.bias, -3.25);
        assert_eq!(scores, [0.75, 0.75, 0.5, 0.0, 1.25, 5.75]);
        // Where no part helps there is none.
        let (_, scores) = best_part(
            &[mean.clone(), vec![0.0; 6]],
            &lengths[..2],
            &labels,
            5,
            &mut gate,
        );
        assert_eq!((gate.part, scores), (None, mean));
    }
}
