//! Stage `gate`: a condition on latents that tells an unsafe request from one that only looks so.
//!
//! Trained on what `read` keeps of the discovery split's prompts, chosen and calibrated on the
//! validation split, and then run once on the test split: over all, by category, by style, and on
//! the categories that training never saw. Beside it stand a probe on the raw residual, trained and
//! chosen the same way, and the condition of CAST: the cosine with the difference of means.
//!
//! Heads of attention learn from every token of a request, where a weighted sum learns from what is pooled of it.
//!
//! A second gate, if base is asked, says where base would refuse by itself ([`super::refuses`]).

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use demur_eval::prompts::{Label, Prompt, Split};
use demur_features::attention;
use demur_features::gate::{
    self, Detection, Group, Pooled, Reading, Report, Search, Tried, detection, recall_at,
    reliability, roc,
};
use demur_features::harvest::{Products, Sequence, harvest_sites};
use demur_features::sites::difference_of_means;
use demur_model::decoder::Model;
use demur_model::hooks::{Intervention, Role, Rows, Site};
use demur_sae::Sae;
use demur_steering::{
    Aggregate, CompiledPlan, Gate, Membership, PLAN_VERSION, SaeEntry, SaeSet, Scope, SteeringPlan,
    compile,
};
use serde::{Deserialize, Serialize};

use super::config::{AttentionConfig, Reads};
use super::read::{self, ReadPrompts, Tokens};
use super::refuses::{self, Refuses};
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
    /// The settings tried of a weighted sum, the best on validation first; none of heads of attention.
    pub tried: Vec<Tried>,
    /// Of the gate on validation prompts, on which it was chosen.
    pub validation: Report,
    /// Of the gate on test prompts.
    pub test: Report,
    /// What else could have been the gate.
    pub beside: Vec<Beside>,
    /// Where base would refuse by itself, if it was asked.
    pub refuses: Option<Refuses>,
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

/// Trains the gates on what was read of `prompts`; base's replies are kept in `asked`, if it is asked.
pub fn run(
    c: &StudyContext,
    sae: &Sae,
    prompts: &[Prompt],
    read: ReadPrompts,
    asked: Option<&Path>,
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
    let mut candidates: Vec<Candidate> = Vec::new();
    for &reads in &cfg.reads {
        let sizes = match reads {
            Reads::Latents => cfg.sizes.clone(),
            Reads::Residual | Reads::Attention => vec![width],
        };
        let search = Search {
            labels: &labels,
            train: train.clone(),
            validation: validation.clone(),
            sizes: &sizes,
            l2: &cfg.l2,
            recall: cfg.recall,
        };
        candidates.push(match reads {
            Reads::Latents => weighted(&read.latents, &search, reads, |t| {
                t.gate_on_latents(c.site, SAE_NAME)
            })?,
            Reads::Residual => weighted(&read.residual, &search, reads, |t| {
                t.gate_on_residual(c.site, &probed, sae.d_model())
            })?,
            Reads::Attention => {
                let tokens = read.tokens.as_ref().context("no tokens were read")?;
                attended(c, (tokens, &search), &probed, sae.d_model())?
            }
        });
    }
    // Stable: of equals the first named.
    candidates.sort_by(|a, b| b.auroc.total_cmp(&a.auroc));
    let both = |name: &str, scored: &[(f64, bool)], threshold: f64| Beside {
        name: name.to_owned(),
        validation: detection(&scored[validation.clone()], threshold),
        test: detection(&scored[test.clone()], threshold),
    };
    let mut beside: Vec<Beside> = candidates[1..]
        .iter()
        .map(|c| both(in_words(c.reads), &c.scored, c.gate.threshold.into()))
        .collect();
    let (condition, by_condition) = condition(c, &read.residual, &labels, &train, &validation)?;
    beside.push(both(
        "the cosine condition",
        &by_condition,
        f64::from(condition.threshold),
    ));
    let refuses = match asked {
        Some(folder) => refuses::run(c, prompts, &read.residual, folder)?,
        None => None,
    };
    let Candidate {
        reads,
        mut gate,
        tried,
        mut scored,
        ..
    } = candidates.swap_remove(0);
    if reads == Reads::Attention {
        // It learnt from bf16: what is reported and calibrated is what it says of the residual as it is.
        let rest = validation.start..prompts.len();
        let exact = as_steered(c, sae, &gate, &prompts[rest.clone()])?;
        scored[rest]
            .iter_mut()
            .zip(exact)
            .for_each(|(s, e)| s.0 = e);
        gate.threshold = gate::threshold_at(&scored[validation.clone()], cfg.recall) as f32;
    }
    let threshold = f64::from(gate.threshold);
    let known: Vec<&str> = prompts[train.clone()].iter().map(category).collect();
    let report = |at: &std::ops::Range<usize>| {
        report(&prompts[at.clone()], &scored[at.clone()], threshold, &known)
    };
    Ok(Trained {
        gate,
        tried,
        validation: report(&validation),
        test: report(&test),
        beside,
        refuses,
        condition,
    })
}

/// A gate that may be chosen.
struct Candidate {
    reads: Reads,
    gate: Gate,
    tried: Vec<Tried>,
    /// On validation prompts.
    auroc: f64,
    /// Of all prompts: the score, and whether they are unsafe.
    scored: Vec<(f64, bool)>,
}

/// A weighted sum of what is pooled.
fn weighted(
    pooled: &[Pooled],
    search: &Search<'_>,
    reads: Reads,
    gate: impl Fn(&gate::Trained) -> Gate,
) -> Result<Candidate> {
    let nothing = "no latent is active on the prompts: is it the right SAE?";
    let trained = gate::train(pooled, search).context(nothing)?;
    let read = pooled.iter().find(|p| p.reading == trained.reading);
    let rows = &read.context("the reading was not tried")?.rows;
    let scores = rows.iter().map(|row| trained.score(row));
    Ok(Candidate {
        reads,
        gate: gate(&trained),
        auroc: trained.tried[0].auroc,
        scored: scores.zip(search.labels.iter().copied()).collect(),
        tried: trained.tried,
    })
}

/// Heads of attention over the tokens.
fn attended(
    c: &StudyContext,
    (tokens, search): (&Tokens, &Search<'_>),
    probed: &[Site],
    d_model: usize,
) -> Result<Candidate> {
    let rows = tokens.rows();
    let splits = (search.train.clone(), search.validation.clone());
    let AttentionConfig {
        heads,
        epochs,
        rate,
        trainings,
    } = c.study.gate.attention;
    let how = attention::Training {
        heads,
        epochs,
        rate,
        trainings,
        seed: c.study.seed,
    };
    let mut bar: Option<Progress> = None;
    let on_batch = |done: usize, of: usize| {
        bar.get_or_insert_with(|| Progress::new("heads", "batches", of as u64))
            .advance(1);
        if let Some(bar) = bar.take_if(|_| done == of) {
            bar.finish();
        }
    };
    let trained = attention::train(&rows, search.labels, splits, search.recall, &how, on_batch);
    let trained = trained.context("heads need unsafe and safe prompts to learn from")?;
    note(format_args!(
        "{:<12} AUROC {:.4} on validation prompts",
        "heads", trained.auroc
    ));
    let scores = trained.scores(&rows, 0..search.labels.len());
    Ok(Candidate {
        reads: Reads::Attention,
        gate: trained.gate(c.site, probed, d_model),
        tried: Vec::new(),
        auroc: trained.auroc,
        scored: scores
            .into_iter()
            .zip(search.labels.iter().copied())
            .collect(),
    })
}

/// The gate's scores of prompts as it steers.
fn as_steered(c: &StudyContext, sae: &Sae, gate: &Gate, prompts: &[Prompt]) -> Result<Vec<f64>> {
    let plan = SteeringPlan {
        version: PLAN_VERSION,
        name: GATE_NAME.to_owned(),
        description: None,
        saes: BTreeMap::from([(SAE_NAME.to_owned(), String::new())]),
        gates: BTreeMap::from([(GATE_NAME.to_owned(), gate.clone())]),
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
    let mut scores = scores(&c.loaded.model, &plan, 1, &sequences)?;
    Ok(scores.swap_remove(0))
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
        Reads::Attention => "heads of attention on the residual",
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

/// The residual of each prompt's last token, the template's, at the SAE's site, `[d_model]` each, and how it was read.
pub fn last_token(residual: &[Pooled], d_model: usize) -> Result<(&Reading, Vec<&[f32]>)> {
    let roles = [Role::User, Role::Template];
    let last = residual
        .iter()
        .find(|p| p.reading.aggregate == Aggregate::Last && p.reading.roles == roles)
        .context("the last token was not read")?;
    // The SAE's site is the last.
    let at_site = last.rows.iter().map(|r| &r[r.len() - d_model..]);
    Ok((&last.reading, at_site.collect()))
}

/// The condition of CAST, with the threshold that reaches the asked recall on validation prompts.
fn condition(
    c: &StudyContext,
    residual: &[Pooled],
    labels: &[bool],
    train: &std::ops::Range<usize>,
    validation: &std::ops::Range<usize>,
) -> Result<(Gate, Vec<(f64, bool)>)> {
    let (reading, rows) = last_token(residual, c.loaded.model.spec().d_model)?;
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
        direction,
        aggregate: Aggregate::Last,
        membership: Membership::Exact,
        scope: Scope::Conversation,
        threshold: threshold as f32,
        roles: reading.roles.clone(),
        ..gate::blank(c.site)
    };
    Ok((gate, scored))
}
