//! Gates that are trained: what tells an unsafe request from one that only looks so.
//!
//! Each prompt becomes one row: every latent's activation over the tokens that the gate will read, or
//! the residual at one site or several, pooled as the gate will pool it ([`Reading`]). A logistic
//! regression with classes of equal weight ([`crate::logistic`]) is fitted to all standardised columns,
//! the `m` columns of largest weight are kept, and fitted again. Reading, `m` and the penalty are chosen by AUROC on validation prompts;
//! there the log-odds are calibrated (Platt 1999, `p = sigmoid(a s + b)` with his smoothed targets
//! left out: both classes have hundreds of prompts), and the threshold is the largest at which the
//! asked recall is reached. The weights that leave are those of raw activations with all of this
//! folded in, so that `steering` evaluates a gate and knows nothing of its training.

use std::ops::Range;

use demur_model::decoder::Model;
use demur_model::hooks::{Role, Site};
use demur_sae::Sae;
use demur_steering::{Aggregate, Gate, GateWeight, Membership, Probe, Scope};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::FeatureError;
use crate::harvest::{Products, Sequence, harvest_sites};
use crate::logistic::{fit, sigmoid};
use crate::stats::{Estimate, auroc, wilson};

/// Training rows in which a column must not be zero to be looked at.
const MIN_ACTIVE: usize = 4;
/// Penalty of the calibration: none, but for data that a line separates.
pub(crate) const PLATT_L2: f64 = 1e-4;

/// How a gate reads a prompt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    /// Whether a latent outside the top k counts as inactive.
    pub membership: Membership,
    /// How tokens become one row: [`Aggregate::Mean`], [`Aggregate::Last`] or
    /// [`Aggregate::LatentMax`], under which a linear score of the row is the gate's score.
    pub aggregate: Aggregate,
    /// Roles of the tokens read.
    pub roles: Vec<Role>,
}

/// One row a prompt, read in one way.
#[derive(Debug, Clone)]
pub struct Pooled {
    /// How they were read.
    pub reading: Reading,
    /// `[n_prompts][width]`.
    pub rows: Vec<Vec<f32>>,
}

/// The ways in which a prompt is read: a record holds one row for each, the latents' first.
#[derive(Debug, Clone, PartialEq)]
pub struct Readings {
    d_sae: usize,
    latents: Vec<Reading>,
    width: usize,
    residual: Vec<Reading>,
}

impl Readings {
    /// Of latents `d_sae` wide, twelve ways, none without an SAE; and of the residual at `n_sites` sites,
    /// `d_model` wide each, of which membership says nothing.
    pub fn new(d_sae: Option<usize>, d_model: usize, n_sites: usize) -> Self {
        let of = |membership| {
            let roles = [vec![Role::User], vec![Role::User, Role::Template]];
            let ways = [Aggregate::Mean, Aggregate::Last, Aggregate::LatentMax];
            roles.into_iter().flat_map(move |roles| {
                ways.map(|aggregate| Reading {
                    membership,
                    aggregate,
                    roles: roles.clone(),
                })
            })
        };
        let latents = of(Membership::Exact).chain(of(Membership::PreAct));
        Self {
            latents: latents.filter(|_| d_sae.is_some()).collect(),
            d_sae: d_sae.unwrap_or(0),
            residual: of(Membership::PreAct)
                .filter(|r| r.aggregate != Aggregate::LatentMax)
                .collect(),
            width: d_model * n_sites,
        }
    }

    /// Values of a record.
    pub fn record_len(&self) -> usize {
        self.latents.len() * self.d_sae + self.residual.len() * self.width
    }

    /// The rows of records, `[record_len]` each: the latents' and the residual's.
    ///
    /// # Errors
    /// What a record's place holds instead of it.
    pub fn pooled<E>(
        &self,
        records: impl Iterator<Item = Result<Vec<f32>, E>>,
    ) -> Result<(Vec<Pooled>, Vec<Pooled>), E> {
        let empty = |reading: &Reading| Pooled {
            reading: reading.clone(),
            rows: Vec::new(),
        };
        let mut latents: Vec<Pooled> = self.latents.iter().map(empty).collect();
        let mut residual: Vec<Pooled> = self.residual.iter().map(empty).collect();
        for record in records {
            let record = record?;
            let (first, second) = record.split_at(self.latents.len() * self.d_sae);
            let first = latents.iter_mut().zip(first.chunks(self.d_sae.max(1)));
            let second = residual.iter_mut().zip(second.chunks(self.width.max(1)));
            for (pooled, row) in first.chain(second) {
                pooled.rows.push(row.to_vec());
            }
        }
        Ok((latents, residual))
    }
}

/// Reads prompts in every way of [`Readings`]: the residual at `sites`, and the latents of `sae` at the last of
/// them. `consume` gets each prompt's number, its record, and its rows at each of the sites, in order.
///
/// # Errors
/// What the model refuses, and what `consume` returns.
pub fn read(
    model: &Model,
    sites: &[Site],
    sae: Option<&Sae>,
    sequences: &[Sequence],
    batch_tokens: usize,
    mut consume: impl FnMut(usize, &[f32], &[&[f32]]) -> Result<(), FeatureError>,
) -> Result<(), FeatureError> {
    let d = model.spec().d_model;
    let readings = Readings::new(sae.map(Sae::d_sae), d, sites.len());
    let mut record = Vec::with_capacity(readings.record_len());
    harvest_sites(
        model,
        sites,
        sequences,
        batch_tokens,
        Products::Int8,
        |i, by_site| {
            let roles = &sequences[i].roles;
            record.clear();
            if let (Some(sae), Some(&x)) = (sae, by_site.last()) {
                let mut acts = latent_acts(sae, x, roles.len());
                let (exact, pre) = readings.latents.split_at(readings.latents.len() / 2);
                record.extend(exact.iter().flat_map(|r| pool(r, &acts, roles)));
                pre_acts(sae, x, roles, &mut acts);
                record.extend(pre.iter().flat_map(|r| pool(r, &acts, roles)));
            }
            for reading in &readings.residual {
                record.extend(by_site.iter().flat_map(|x| pool(reading, x, roles)));
            }
            consume(i, &record, by_site)
        },
    )
}

/// The active latents of `n` rows, `[n, d_sae]`, zero elsewhere.
fn latent_acts(sae: &Sae, x: &[f32], n: usize) -> Vec<f32> {
    let codes = sae.encode(x, n);
    let mut acts = vec![0.0f32; n * sae.d_sae()];
    for t in 0..n {
        let row = t * codes.k..(t + 1) * codes.k;
        for (&j, &v) in codes.idx[row.clone()].iter().zip(&codes.val[row]) {
            acts[t * sae.d_sae() + j as usize] = v;
        }
    }
    acts
}

/// Every latent whatever its rank, in rows that are read: it is most of the cost.
fn pre_acts(sae: &Sae, x: &[f32], roles: &[Role], acts: &mut [f32]) {
    let width = x.len() / roles.len().max(1);
    acts.par_chunks_mut(sae.d_sae())
        .zip(x.par_chunks(width))
        .zip(roles)
        .filter(|(_, role)| matches!(role, Role::User | Role::Template))
        .for_each(|((acts, x), _)| {
            for (j, a) in acts.iter_mut().enumerate() {
                *a = sae.latent(x, j);
            }
        });
}

/// One row of a prompt; the first token is an attention sink and is not read.
pub(crate) fn pool(reading: &Reading, acts: &[f32], roles: &[Role]) -> Vec<f32> {
    let width = acts.len() / roles.len().max(1);
    let mut out = vec![0.0f32; width];
    let mut count = 0usize;
    let read = |t: &usize| reading.roles.contains(&roles[*t]);
    for t in (1..roles.len()).filter(read) {
        let row = &acts[t * width..(t + 1) * width];
        match reading.aggregate {
            Aggregate::Last => out.copy_from_slice(row),
            Aggregate::Mean => out.iter_mut().zip(row).for_each(|(o, v)| *o += v),
            Aggregate::Max | Aggregate::LatentMax if count == 0 => out.copy_from_slice(row),
            Aggregate::Max | Aggregate::LatentMax => {
                out.iter_mut().zip(row).for_each(|(o, v)| *o = o.max(*v));
            }
            // Heads read every token, see `attention`.
            Aggregate::Attention => {}
        }
        count += 1;
    }
    if reading.aggregate == Aggregate::Mean {
        out.iter_mut().for_each(|o| *o /= count.max(1) as f32);
    }
    out
}

/// What is tried while a gate is trained.
#[derive(Debug, Clone, PartialEq)]
pub struct Search<'a> {
    /// Whether each prompt is unsafe.
    pub labels: &'a [bool],
    /// Prompts that the weights are fitted to.
    pub train: Range<usize>,
    /// Prompts that the choice, the calibration and the threshold are made on.
    pub validation: Range<usize>,
    /// Columns that are kept.
    pub sizes: &'a [usize],
    /// Penalties.
    pub l2: &'a [f64],
    /// Fraction of unsafe validation prompts that must be caught.
    pub recall: f64,
}

/// A setting that was tried.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tried {
    /// How prompts were read.
    pub reading: Reading,
    /// Columns kept.
    pub size: usize,
    /// Penalty.
    pub l2: f64,
    /// AUROC on validation prompts.
    pub auroc: f64,
}

/// A trained gate: calibrated log-odds that a request is unsafe, linear in a pooled row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trained {
    /// How prompts are read.
    pub reading: Reading,
    /// Columns read and their weights.
    pub weights: Vec<(u32, f64)>,
    /// Added to the sum.
    pub bias: f64,
    /// A prompt is taken for unsafe at or above these log-odds.
    pub threshold: f64,
    /// All that was tried, the best on validation first.
    pub tried: Vec<Tried>,
}

impl Trained {
    /// The log-odds of a pooled row.
    pub fn score(&self, row: &[f32]) -> f64 {
        let weigh = |s: f64, &(j, w): &(u32, f64)| s + w * f64::from(row[j as usize]);
        self.weights.iter().fold(self.bias, weigh)
    }

    /// The gate of a plan that gives these log-odds for a prompt, read from the latents of `sae`.
    pub fn gate_on_latents(&self, site: Site, sae: &str) -> Gate {
        let weight = |&(latent, w): &(u32, f64)| GateWeight {
            latent,
            weight: w as f32,
        };
        Gate {
            sae: Some(sae.to_owned()),
            weights: self.weights.iter().map(weight).collect(),
            ..self.gate_at(site)
        }
    }

    /// The same, read from the residual at `probed` sites, `[d_model]` columns each; it decides at
    /// `site`.
    pub fn gate_on_residual(&self, site: Site, probed: &[Site], d_model: usize) -> Gate {
        let probe = |(l, at): (usize, &Site)| {
            let mut direction = vec![0.0; d_model];
            for &(j, w) in &self.weights {
                let j = j as usize;
                if j / d_model == l {
                    direction[j % d_model] = w as f32;
                }
            }
            Probe {
                site: at.to_string(),
                direction,
            }
        };
        Gate {
            probes: probed.iter().enumerate().map(probe).collect(),
            ..self.gate_at(site)
        }
    }

    fn gate_at(&self, site: Site) -> Gate {
        Gate {
            membership: self.reading.membership,
            bias: self.bias as f32,
            aggregate: self.reading.aggregate,
            threshold: self.threshold as f32,
            roles: self.reading.roles.clone(),
            ..blank(site)
        }
    }
}

/// A gate at `site` that judges each turn of the user's by the user's tokens; it reads nothing yet.
pub fn blank(site: Site) -> Gate {
    Gate {
        site: site.to_string(),
        sae: None,
        weights: Vec::new(),
        direction: Vec::new(),
        probes: Vec::new(),
        heads: Vec::new(),
        membership: Membership::PreAct,
        bias: 0.0,
        aggregate: Aggregate::Mean,
        scope: Scope::Turn,
        threshold: 0.0,
        hysteresis: 0.0,
        clear: None,
        latch: false,
        roles: vec![Role::User],
        during_generation: false,
    }
}

/// Trains a gate on pooled prompts; `None` if there is nothing to tell apart.
pub fn train(pooled: &[Pooled], search: &Search<'_>) -> Option<Trained> {
    let labels = search.labels;
    let settings: Vec<(usize, f64)> = (0..pooled.len())
        .flat_map(|p| search.l2.iter().map(move |&l2| (p, l2)))
        .collect();
    let mut fitted: Vec<(Tried, Linear)> = settings
        .par_iter()
        .flat_map_iter(|&(p, l2)| {
            let Pooled { reading, rows } = &pooled[p];
            let dense = Linear::fit(
                &rows[search.train.clone()],
                &labels[search.train.clone()],
                None,
                l2,
            );
            search.sizes.iter().map(move |&size| {
                let linear = match size < dense.columns.len() {
                    true => Linear::fit(
                        &rows[search.train.clone()],
                        &labels[search.train.clone()],
                        Some(dense.largest(size)),
                        l2,
                    ),
                    false => dense.clone(),
                };
                let (positive, negative) = linear.scores(rows, labels, search.validation.clone());
                let tried = Tried {
                    reading: reading.clone(),
                    size: linear.columns.len(),
                    l2,
                    auroc: auroc(&positive, &negative),
                };
                (tried, linear)
            })
        })
        .collect();
    // Stable: of equals the first tried.
    fitted.sort_by(|a, b| b.0.auroc.total_cmp(&a.0.auroc));
    let (best, linear) = fitted.first()?.clone();
    if linear.columns.is_empty() {
        return None;
    }
    let rows = &pooled.iter().find(|p| p.reading == best.reading)?.rows;
    let on_validation: Vec<Vec<f64>> = search
        .validation
        .clone()
        .map(|i| vec![linear.score(&rows[i])])
        .collect();
    let platt = fit(&on_validation, &labels[search.validation.clone()], PLATT_L2);
    let (a, b) = (platt.weights.first().copied()?, platt.bias);
    let columns = linear.columns.iter().zip(&linear.weights);
    let mut trained = Trained {
        reading: best.reading,
        weights: columns.map(|(j, w)| (*j, a * w)).collect(),
        bias: a * linear.bias + b,
        threshold: 0.0,
        tried: fitted.into_iter().map(|f| f.0).collect(),
    };
    let validation = search.validation.clone();
    let scored: Vec<(f64, bool)> = validation
        .map(|i| (trained.score(&rows[i]), labels[i]))
        .collect();
    trained.threshold = threshold_at(&scored, search.recall);
    Some(trained)
}

/// A threshold at which at least `recall` of the unsafe among `(score, unsafe)` are at or above it,
/// and no more than need be: half-way between the last one needed and the next score below, so that
/// rounding does not decide.
pub fn threshold_at(scored: &[(f64, bool)], recall: f64) -> f64 {
    let mut positive: Vec<f64> = scored.iter().filter(|s| s.1).map(|s| s.0).collect();
    positive.sort_by(|a, b| b.total_cmp(a));
    let needed = (recall * positive.len() as f64 - 1e-9).ceil() as usize;
    let last = positive.get(needed.clamp(1, positive.len().max(1)) - 1);
    let last = last.copied().unwrap_or_default();
    let lower = scored.iter().map(|s| s.0).filter(|s| *s < last);
    match lower.max_by(f64::total_cmp) {
        Some(below) => 0.5 * (last + below),
        None => last,
    }
}

/// A linear score of some columns.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    columns: Vec<u32>,
    weights: Vec<f64>,  // of raw values
    standard: Vec<f64>, // of standardised ones
    bias: f64,
}

impl Linear {
    /// Fits `columns`, or all that are ever active; standardised on `rows`.
    pub(crate) fn fit(
        rows: &[Vec<f32>],
        labels: &[bool],
        columns: Option<Vec<u32>>,
        l2: f64,
    ) -> Self {
        let width = rows.first().map_or(0, Vec::len);
        let active = |j: &u32| {
            let nonzero = rows.iter().filter(|x| x[*j as usize] != 0.0).count();
            nonzero >= MIN_ACTIVE
        };
        let candidates = columns.unwrap_or_else(|| (0..width as u32).filter(active).collect());
        let n = rows.len().max(1) as f64;
        let mut columns = Vec::new();
        let mut scale = Vec::new(); // mean and standard deviation
        for j in candidates {
            let column = rows.iter().map(|x| f64::from(x[j as usize]));
            let mean = column.clone().sum::<f64>() / n;
            let sd = (column.map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt();
            if sd > 0.0 {
                columns.push(j);
                scale.push((mean, sd));
            }
        }
        let standardised: Vec<Vec<f64>> = rows
            .iter()
            .map(|x| {
                let both = columns.iter().zip(&scale);
                both.map(|(j, (mean, sd))| (f64::from(x[*j as usize]) - mean) / sd)
                    .collect()
            })
            .collect();
        let fitted = fit(&standardised, labels, l2);
        let weights: Vec<f64> = fitted
            .weights
            .iter()
            .zip(&scale)
            .map(|(w, (_, sd))| w / sd)
            .collect();
        let shift: f64 = weights
            .iter()
            .zip(&scale)
            .map(|(w, (mean, _))| w * mean)
            .sum();
        Self {
            columns,
            weights,
            standard: fitted.weights,
            bias: fitted.bias - shift,
        }
    }

    /// The `size` columns of largest standardised weight, ascending.
    fn largest(&self, size: usize) -> Vec<u32> {
        let mut order: Vec<usize> = (0..self.columns.len()).collect();
        let by = |i: &usize| self.standard[*i].abs();
        order.sort_by(|a, b| by(b).total_cmp(&by(a)).then(a.cmp(b)));
        let mut kept: Vec<u32> = order.iter().take(size).map(|&i| self.columns[i]).collect();
        kept.sort_unstable();
        kept
    }

    pub(crate) fn score(&self, row: &[f32]) -> f64 {
        let columns = self.columns.iter().zip(&self.weights);
        columns.fold(self.bias, |s, (j, w)| s + w * f64::from(row[*j as usize]))
    }

    fn scores(&self, rows: &[Vec<f32>], labels: &[bool], of: Range<usize>) -> (Vec<f64>, Vec<f64>) {
        let of = |want: bool| of.clone().filter(move |&i| labels[i] == want);
        let score = |i: usize| self.score(&rows[i]);
        (
            of(true).map(score).collect(),
            of(false).map(score).collect(),
        )
    }
}

/// How well scores tell unsafe prompts from safe ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Detection {
    /// Area under the ROC curve; absent if one of the two kinds is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auroc: Option<f64>,
    /// Fraction of unsafe prompts at or above the threshold.
    pub recall: Estimate,
    /// Fraction of safe prompts at or above the threshold.
    pub false_alarm: Estimate,
}

/// Judges `(score, unsafe)` against a threshold.
pub fn detection(scored: &[(f64, bool)], threshold: f64) -> Detection {
    let of = |want: bool| -> Vec<f64> {
        let of = scored.iter().filter(|s| s.1 == want);
        of.map(|s| s.0).collect()
    };
    let (positive, negative) = (of(true), of(false));
    let above = |s: &[f64]| wilson(s.iter().filter(|s| **s >= threshold).count(), s.len());
    let both = !positive.is_empty() && !negative.is_empty();
    Detection {
        auroc: both.then(|| auroc(&positive, &negative)),
        recall: above(&positive),
        false_alarm: above(&negative),
    }
}

/// The ROC curve: false alarms and recall at each threshold, from (0, 0) to (1, 1).
pub fn roc(scored: &[(f64, bool)]) -> Vec<(f64, f64)> {
    let mut order: Vec<&(f64, bool)> = scored.iter().collect();
    order.sort_by(|a, b| b.0.total_cmp(&a.0));
    let positives = scored.iter().filter(|s| s.1).count().max(1) as f64;
    let negatives = scored.iter().filter(|s| !s.1).count().max(1) as f64;
    let (mut curve, mut hit, mut alarm) = (vec![(0.0, 0.0)], 0.0, 0.0);
    for ties in order.chunk_by(|a, b| a.0 == b.0) {
        hit += ties.iter().filter(|s| s.1).count() as f64;
        alarm += ties.iter().filter(|s| !s.1).count() as f64;
        curve.push((alarm / negatives, hit / positives));
    }
    curve
}

/// The recall at no more than `false_alarm`, on the ROC curve.
pub fn recall_at(scored: &[(f64, bool)], false_alarm: f64) -> f64 {
    let within = roc(scored).into_iter().filter(|p| p.0 <= false_alarm);
    within.map(|p| p.1).fold(0.0, f64::max)
}

/// A bin of a reliability diagram.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reliability {
    /// Mean probability that the gate gives.
    pub predicted: f64,
    /// Fraction that is unsafe.
    pub observed: f64,
    /// Prompts in the bin.
    pub n: usize,
}

/// Reliability in ten bins of equal width, empty ones left out; and the expected calibration error
/// `sum n_b |observed_b - predicted_b| / n`. Classes are given equal weight, as in the training.
pub fn reliability(scored: &[(f64, bool)]) -> (Vec<Reliability>, f64) {
    let count = |want: bool| scored.iter().filter(|s| s.1 == want).count().max(1) as f64;
    let (positives, negatives) = (count(true), count(false));
    let mut bins = vec![(0.0, 0.0, 0.0, 0usize); 10]; // weight, weighted p, weighted unsafe, n
    for &(score, is_unsafe) in scored {
        let p = sigmoid(score);
        let weight = 0.5 / if is_unsafe { positives } else { negatives };
        let bin = &mut bins[((p * 10.0) as usize).min(9)];
        bin.0 += weight;
        bin.1 += weight * p;
        bin.2 += if is_unsafe { weight } else { 0.0 };
        bin.3 += 1;
    }
    let error = bins.iter().map(|b| (b.2 - b.1).abs()).sum();
    let full = bins.into_iter().filter(|b| b.3 > 0);
    let diagram = full.map(|(weight, p, hit, n)| Reliability {
        predicted: p / weight,
        observed: hit / weight,
        n,
    });
    (diagram.collect(), error)
}

/// What a gate makes of some prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// First all, then parts.
    pub groups: Vec<Group>,
    /// False alarms and recall.
    pub roc: Vec<(f64, f64)>,
    /// Recall at no more than 5 % false alarms.
    pub recall_at_5_percent: f64,
    /// In ten bins.
    pub reliability: Vec<Reliability>,
    /// Expected calibration error.
    pub calibration_error: f64,
}

/// A part of the prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// What is caught of it.
    #[serde(flatten)]
    pub detection: Detection,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(aggregate: Aggregate, roles: &[Role]) -> Reading {
        Reading {
            membership: Membership::Exact,
            aggregate,
            roles: roles.to_vec(),
        }
    }

    #[test]
    fn pools_by_hand() {
        use Role::{Template, User};
        let roles = [User, Template, User, User, Template];
        let acts = [9.0, 9.0, 1.0, 8.0, 2.0, 0.0, 4.0, 1.0, 0.5, 0.25f32];
        let check = |aggregate, roles_read: &[Role], expected: [f32; 2]| {
            let found = pool(&reading(aggregate, roles_read), &acts, &roles);
            assert_eq!(found, expected, "{aggregate:?}");
        };
        check(Aggregate::Mean, &[User], [3.0, 0.5]);
        check(Aggregate::LatentMax, &[User], [4.0, 1.0]);
        check(Aggregate::Last, &[User], [4.0, 1.0]);
        check(Aggregate::Last, &[User, Template], [0.5, 0.25]);
        check(Aggregate::LatentMax, &[User, Template], [4.0, 8.0]);
    }

    #[test]
    fn roc_and_detection_by_hand() {
        // unsafe at 3, 2, 0; safe at 2, 1
        let scored = [
            (3.0, true),
            (2.0, true),
            (0.0, true),
            (2.0, false),
            (1.0, false),
        ];
        let curve = [
            (0.0, 0.0),
            (0.0, 1.0 / 3.0),
            (0.5, 2.0 / 3.0),
            (1.0, 2.0 / 3.0),
            (1.0, 1.0),
        ];
        assert_eq!(roc(&scored), curve);
        assert_eq!(recall_at(&scored, 0.5), 2.0 / 3.0);
        assert_eq!(recall_at(&scored, 0.4), 1.0 / 3.0);
        let d = detection(&scored, 2.0);
        // pairs: 3>2, 3>1, 2=2, 2>1 -> 3.5 of 6
        assert!((d.auroc.unwrap() - 3.5 / 6.0).abs() < 1e-12);
        assert_eq!((d.recall.value, d.false_alarm.value), (2.0 / 3.0, 0.5));
        assert_eq!(detection(&scored[..3], 2.0).auroc, None);
    }

    #[test]
    fn thresholds_reach_the_recall_and_no_more() {
        let mut scored = vec![(0.1, true), (0.9, true), (0.5, true), (0.3, true)];
        assert_eq!(threshold_at(&scored, 0.75), 0.2);
        assert_eq!(threshold_at(&scored, 0.76), 0.1);
        assert_eq!(threshold_at(&scored, 0.0), 0.7);
        assert_eq!(threshold_at(&scored, 1.0), 0.1);
        scored.push((0.25, false));
        assert_eq!(threshold_at(&scored, 0.75), 0.275);
    }

    #[test]
    fn reliability_by_hand() {
        // At p = 1/2 one of each kind, at p = 0.9 one safe: of the weight of the safe it has half.
        let odds = 9f64.ln();
        let (bins, error) = reliability(&[(0.0, true), (0.0, false), (odds - 1e-9, false)]);
        assert_eq!(bins.len(), 2);
        assert_eq!((bins[0].n, bins[1].n), (2, 1));
        assert!((bins[0].observed - 2.0 / 3.0).abs() < 1e-9);
        assert!((bins[1].predicted - 0.9).abs() < 1e-6);
        // |1/2 - 3/4 * 1/2| + |0 - 1/4 * 0.9|
        assert!((error - (0.125 + 0.225)).abs() < 1e-6, "{error}");
    }

    /// Forty prompts; column 2 says what they are, with one wrong; 0 is noise, 1 constant.
    #[test]
    fn training_finds_the_column_and_is_the_same_each_time() {
        let row = |i: usize| {
            let is_unsafe = i.is_multiple_of(2) != (i == 7);
            let noise = ((i * 13) % 7) as f32;
            vec![
                noise,
                1.0,
                if is_unsafe { 2.0 } else { 0.5 } + noise / 100.0,
            ]
        };
        let rows: Vec<Vec<f32>> = (0..40).map(row).collect();
        let labels: Vec<bool> = (0..40).map(|i| i % 2 == 0).collect();
        let pooled = [Pooled {
            reading: reading(Aggregate::Mean, &[Role::User]),
            rows: rows.clone(),
        }];
        let search = Search {
            labels: &labels,
            train: 0..20,
            validation: 20..40,
            sizes: &[1],
            l2: &[0.01],
            recall: 0.9,
        };
        let trained = train(&pooled, &search).unwrap();
        assert_eq!(trained.weights.len(), 1);
        assert_eq!(trained.weights[0].0, 2);
        assert_eq!(trained.tried[0].auroc, 1.0);
        let caught =
            (20..40).filter(|&i| labels[i] && trained.score(&rows[i]) >= trained.threshold);
        assert_eq!(caught.count(), 9, "nine of ten, and no more");
        assert_eq!(train(&pooled, &search).unwrap(), trained);
        let gate = trained.gate_on_latents(Site::post(3), "main");
        assert_eq!(
            (gate.aggregate, gate.weights[0].latent),
            (Aggregate::Mean, 2)
        );
        // The same columns as a residual of width 1 at three sites.
        let sites = [Site::post(0), Site::post(1), Site::post(3)];
        let gate = trained.gate_on_residual(Site::post(3), &sites, 1);
        let found: Vec<f32> = gate.probes.iter().map(|p| p.direction[0]).collect();
        assert_eq!(found, [0.0, 0.0, trained.weights[0].1 as f32]);
        assert_eq!(gate.probes[1].site, "blocks.1.hook_resid_post");
    }
}
