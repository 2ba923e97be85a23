//! Gates of heads of attention, trained: which tokens of a request count, and what they say.
//!
//! With `x_t` the residual of a token at all sites, standardised over training tokens, a head's value is
//! `sum_t softmax_t(q . x_t) (v . x_t)` and the score of a request `b + sum_heads`. At first all queries are zero, so that
//! training starts at the mean over tokens, which is what a probe without heads reads. The logistic loss, both classes
//! of equal weight, is minimised by Adam (Kingma and Ba 2014) over minibatches, with
//! a linear warm-up and a linear decay to zero. Several trainings, each with its own first values and order of prompts,
//! may be averaged: their heads side by side, each with its share of the score. The result is calibrated on validation
//! prompts as [`crate::gate`] does, and the standardisation is folded into it: a constant in a query cancels in the
//! softmax, and one in a value is added to the bias.
//!
//! Everything drawn at random follows from the seed, and parts of a minibatch are summed in order: the same seed
//! gives the same bits on any number of threads.

use std::ops::Range;

use demur_kernels::adam::Adam;
use demur_kernels::ops::{axpy, dot};
use demur_model::hooks::Site;
use demur_steering::{Aggregate, Gate, Head, Probe};
use half::bf16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::gate::{PLATT_L2, blank, threshold_at};
use crate::logistic::{fit, sigmoid};
use crate::stats::{Draws, auroc};

/// Prompts of a minibatch, and of a part of it that is summed apart.
const BATCH: usize = 64;
const PART: usize = 4;
/// Steps of the warm-up.
const WARM_UP: usize = 50;

/// The tokens of prompts that a gate reads: a row is the residual of a token at all sites in turn, bf16, little-endian.
#[derive(Debug, Clone)]
pub struct TokenRows<'a> {
    /// The rows of each prompt, `[n_prompts][n_tokens * width * 2 bytes]`.
    pub prompts: Vec<&'a [u8]>,
    /// Columns of a row, `n_sites * d_model`.
    pub width: usize,
}

impl TokenRows<'_> {
    /// Widens one row.
    fn row(&self, prompt: usize, token: usize, out: &mut [f32]) {
        let bytes = 2 * self.width;
        let row = &self.prompts[prompt][token * bytes..(token + 1) * bytes];
        for (o, b) in out.iter_mut().zip(row.as_chunks::<2>().0) {
            *o = bf16::from_le_bytes(*b).to_f32();
        }
    }

    fn tokens(&self, prompt: usize) -> usize {
        self.prompts[prompt].len() / (2 * self.width).max(1)
    }
}

/// How heads are trained.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// Heads.
    pub heads: usize,
    /// Passes over the training prompts.
    pub epochs: usize,
    /// Largest step of Adam.
    pub rate: f64,
    /// Trainings that are averaged.
    pub trainings: usize,
    /// Seed of the order of prompts; those after the first training have the seeds after it.
    pub seed: u64,
}

/// Trained heads: calibrated log-odds that a request is unsafe.
#[derive(Debug, Clone, PartialEq)]
pub struct Attention {
    /// Of each head its query and its value, `[2 * heads][width]`, of raw columns.
    columns: Vec<Vec<f32>>,
    bias: f64,
    /// A prompt is taken for unsafe at or above these log-odds.
    pub threshold: f64,
    /// AUROC on validation prompts.
    pub auroc: f64,
}

impl Attention {
    /// The log-odds of each of `prompts`.
    pub fn scores(&self, rows: &TokenRows<'_>, prompts: Range<usize>) -> Vec<f64> {
        let each = prompts.into_par_iter();
        each.map(|i| self.score(rows, i)).collect()
    }

    /// The log-odds of a prompt; the bias alone if it has no tokens.
    pub fn score(&self, rows: &TokenRows<'_>, prompt: usize) -> f64 {
        let mut x = vec![0.0; rows.width];
        let mut products = Vec::with_capacity(rows.tokens(prompt) * self.columns.len());
        for t in 0..rows.tokens(prompt) {
            rows.row(prompt, t, &mut x);
            products.extend(self.columns.iter().map(|c| dot(c, &x)));
        }
        self.bias + attend(&products, self.columns.len()).value
    }

    /// The gate of a plan that gives these log-odds, read from the residual at `sites`, `d_model` columns each; it
    /// decides at `site`. Of each weight four digits are kept: there are many, and a plan is a text.
    pub fn gate(&self, site: Site, sites: &[Site], d_model: usize) -> Gate {
        let probes = |column: &[f32]| -> Vec<Probe> {
            let of_sites = sites.iter().zip(column.chunks_exact(d_model));
            of_sites
                .map(|(site, direction)| Probe {
                    site: site.to_string(),
                    direction: direction.iter().map(|v| rounded(*v)).collect(),
                })
                .collect()
        };
        let heads = self.columns.chunks_exact(2).map(|both| Head {
            query: probes(&both[0]),
            value: probes(&both[1]),
        });
        Gate {
            heads: heads.collect(),
            aggregate: Aggregate::Attention,
            bias: self.bias as f32,
            threshold: self.threshold as f32,
            ..blank(site)
        }
    }
}

/// Trains heads on the prompts `train`, and calibrates them on `validation`, whose threshold reaches `recall`;
/// `on_batch(done, of)` is called after each minibatch. `None` if there is nothing to learn from.
pub fn train(
    rows: &TokenRows<'_>,
    labels: &[bool],
    (train, validation): (Range<usize>, Range<usize>),
    recall: f64,
    how: &Training,
    mut on_batch: impl FnMut(usize, usize),
) -> Option<Attention> {
    let learnt: Vec<usize> = train.filter(|&i| rows.tokens(i) > 0).collect();
    let n_unsafe = learnt.iter().filter(|&&i| labels[i]).count();
    let nothing = how.heads == 0 || how.trainings == 0;
    if nothing || n_unsafe == 0 || n_unsafe == learnt.len() {
        return None;
    }
    let scale = Scale::of(rows, &learnt);
    let steps = learnt.len().div_ceil(BATCH) * how.epochs;
    let mut attention = Attention {
        columns: Vec::with_capacity(2 * how.heads * how.trainings),
        bias: 0.0,
        threshold: 0.0,
        auroc: 0.0,
    };
    for nth in 0..how.trainings {
        let heads = trained_once(rows, (labels, &learnt), &scale, (how, nth as u64), |step| {
            on_batch(nth * steps + step, how.trainings * steps);
        });
        let share = 1.0 / how.trainings as f64;
        heads.fold_into(&mut attention, &scale, share);
    }
    let raw = attention.scores(rows, validation.clone());
    let labels = &labels[validation];
    let column: Vec<Vec<f64>> = raw.iter().map(|s| vec![*s]).collect();
    let platt = fit(&column, labels, PLATT_L2);
    let (a, b) = (platt.weights.first().copied()?, platt.bias);
    for value in attention.columns.iter_mut().skip(1).step_by(2) {
        value.iter_mut().for_each(|v| *v *= a as f32);
    }
    attention.bias = a * attention.bias + b;
    let calibrated = raw.iter().map(|s| a * s + b);
    let scored: Vec<(f64, bool)> = calibrated.zip(labels.iter().copied()).collect();
    attention.threshold = threshold_at(&scored, recall);
    let of = |want: bool| -> Vec<f64> {
        let of = scored.iter().filter(|s| s.1 == want);
        of.map(|s| s.0).collect()
    };
    attention.auroc = auroc(&of(true), &of(false));
    Some(attention)
}

/// The `nth` training on the prompts `learnt`; `on_step` is called after each minibatch.
fn trained_once(
    rows: &TokenRows<'_>,
    (labels, learnt): (&[bool], &[usize]),
    scale: &Scale,
    (how, nth): (&Training, u64),
    mut on_step: impl FnMut(usize),
) -> Heads {
    let n = learnt.len() as f64;
    let n_unsafe = learnt.iter().filter(|&&i| labels[i]).count();
    // Both classes have half of the weight; on average 1.
    let weight = [
        n / (2.0 * (n - n_unsafe as f64)),
        n / (2.0 * n_unsafe as f64),
    ];
    let mut heads = Heads::new(how.heads, rows.width, nth);
    let zeros = vec![0.0; heads.values.len()];
    let (mut first, mut second) = (zeros.clone(), zeros);
    let of_epoch = learnt.len().div_ceil(BATCH);
    let steps = of_epoch * how.epochs;
    let mut order = learnt.to_vec();
    let mut draws = Draws::new(how.seed.wrapping_add(nth));
    for step in 0..steps {
        if step % of_epoch == 0 {
            shuffle(&mut order, &mut draws);
        }
        let from = step % of_epoch * BATCH;
        let batch = &order[from..order.len().min(from + BATCH)];
        let parts: Vec<Vec<f32>> = batch
            .par_chunks(PART)
            .map(|part| {
                let mut gradient = vec![0.0; heads.values.len()];
                for &i in part {
                    let y = labels[i];
                    let pull = weight[usize::from(y)] / batch.len() as f64;
                    heads.backward(rows, scale, i, (y, pull), &mut gradient);
                }
                gradient
            })
            .collect();
        let mut gradient = vec![0.0f32; heads.values.len()];
        for part in parts {
            gradient.iter_mut().zip(part).for_each(|(g, p)| *g += p);
        }
        let warm = ((step + 1) as f64 / WARM_UP.min(steps) as f64).min(1.0);
        let rate = how.rate * warm * (1.0 - step as f64 / steps as f64);
        Adam::new(rate, step + 1).update(&mut heads.values, &mut first, &mut second, &gradient);
        on_step(step + 1);
    }
    heads
}

/// What becomes of the products of a prompt's tokens with the columns, `[n_tokens][2 * heads]`.
struct Attended {
    /// The sum of the heads' values.
    value: f64,
    /// Each head's weights of the tokens, `[n_tokens][heads]`, and its value.
    weights: Vec<f64>,
    means: Vec<f64>,
}

fn attend(products: &[f32], columns: usize) -> Attended {
    let heads = columns / 2;
    let tokens = products.len() / columns.max(1);
    let mut weights = vec![0.0; tokens * heads];
    let mut means = vec![0.0; heads];
    for h in 0..heads {
        let q = |t: usize| f64::from(products[t * columns + 2 * h]);
        let largest = (0..tokens).map(q).fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = (0..tokens).map(|t| (q(t) - largest).exp()).sum();
        for t in 0..tokens {
            let w = (q(t) - largest).exp() / sum;
            weights[t * heads + h] = w;
            means[h] += w * f64::from(products[t * columns + 2 * h + 1]);
        }
    }
    Attended {
        value: means.iter().sum(),
        weights,
        means,
    }
}

/// Mean and inverse standard deviation of each column over training tokens; 0 of a column that is constant.
struct Scale {
    mean: Vec<f32>,
    inverse: Vec<f32>,
}

impl Scale {
    fn of(rows: &TokenRows<'_>, prompts: &[usize]) -> Self {
        // Parts of fixed sizes, summed in order.
        let parts: Vec<(Vec<f64>, Vec<f64>, usize)> = prompts
            .par_chunks(256)
            .map(|part| {
                let mut x = vec![0.0; rows.width];
                let mut sums = (vec![0.0; rows.width], vec![0.0; rows.width], 0);
                for &i in part {
                    for t in 0..rows.tokens(i) {
                        rows.row(i, t, &mut x);
                        let both = sums.0.iter_mut().zip(&mut sums.1);
                        for ((s, q), &v) in both.zip(&x) {
                            *s += f64::from(v);
                            *q += f64::from(v) * f64::from(v);
                        }
                        sums.2 += 1;
                    }
                }
                sums
            })
            .collect();
        let n = parts.iter().map(|p| p.2).sum::<usize>().max(1) as f64;
        let mut scale = Self {
            mean: Vec::with_capacity(rows.width),
            inverse: Vec::with_capacity(rows.width),
        };
        for j in 0..rows.width {
            let mean = parts.iter().map(|p| p.0[j]).sum::<f64>() / n;
            let square = parts.iter().map(|p| p.1[j]).sum::<f64>() / n;
            let variance = square - mean * mean;
            let positive = variance > 1e-12 * mean * mean && variance > 0.0;
            scale.mean.push(mean as f32);
            scale.inverse.push(match positive {
                true => (1.0 / variance.sqrt()) as f32,
                false => 0.0,
            });
        }
        scale
    }
}

/// Heads in training: of standardised columns.
struct Heads {
    heads: usize,
    width: usize,
    /// Query and value of each head, `[2 * heads][width]`, and the bias.
    values: Vec<f32>,
}

impl Heads {
    fn new(heads: usize, width: usize, seed: u64) -> Self {
        let mut values = vec![0.0; 2 * heads * width + 1];
        // Values that differ break the symmetry of the heads; queries are zero.
        let mut draws = Draws::new(seed);
        for h in 0..heads {
            for v in &mut values[(2 * h + 1) * width..(2 * h + 2) * width] {
                let unit = draws.below(1 << 24) as f32 / (1 << 23) as f32 - 1.0;
                *v = unit / (width as f32).sqrt();
            }
        }
        Self {
            heads,
            width,
            values,
        }
    }

    fn column(&self, c: usize) -> &[f32] {
        &self.values[c * self.width..(c + 1) * self.width]
    }

    /// Adds the gradient of `pull` times the logistic loss of a prompt.
    fn backward(
        &self,
        rows: &TokenRows<'_>,
        scale: &Scale,
        prompt: usize,
        (label, pull): (bool, f64),
        gradient: &mut [f32],
    ) {
        let (tokens, width, columns) = (rows.tokens(prompt), self.width, 2 * self.heads);
        let mut x = vec![0.0f32; tokens * width];
        let mut products = Vec::with_capacity(tokens * columns);
        for (t, x) in x.chunks_exact_mut(width).enumerate() {
            rows.row(prompt, t, x);
            let both = scale.mean.iter().zip(&scale.inverse);
            for (x, (mean, inverse)) in x.iter_mut().zip(both) {
                *x = (*x - mean) * inverse;
            }
            products.extend((0..columns).map(|c| dot(self.column(c), x)));
        }
        let attended = attend(&products, columns);
        let bias = self.values.last().copied().unwrap_or_default();
        let score = f64::from(bias) + attended.value;
        let of_score = pull * (sigmoid(score) - f64::from(u8::from(label)));
        for (t, x) in x.chunks_exact(width).enumerate() {
            for h in 0..self.heads {
                let w = attended.weights[t * self.heads + h];
                let v = f64::from(products[t * columns + 2 * h + 1]);
                let by = [of_score * w * (v - attended.means[h]), of_score * w];
                for (c, by) in by.into_iter().enumerate() {
                    let at = (2 * h + c) * width;
                    axpy(by as f32, x, &mut gradient[at..at + width]);
                }
            }
        }
        if let Some(g) = gradient.last_mut() {
            *g += of_score as f32;
        }
    }

    /// Adds `share` times this score, of raw columns, to `attention`'s.
    fn fold_into(&self, attention: &mut Attention, scale: &Scale, share: f64) {
        attention.bias += share * f64::from(self.values.last().copied().unwrap_or_default());
        for c in 0..2 * self.heads {
            let is_value = c % 2 == 1;
            let by = if is_value { share as f32 } else { 1.0 };
            let both = self.column(c).iter().zip(&scale.inverse);
            let raw: Vec<f32> = both.map(|(v, inverse)| by * v * inverse).collect();
            if is_value {
                let shift = raw.iter().zip(&scale.mean);
                attention.bias -= shift.map(|(v, m)| f64::from(v * m)).sum::<f64>();
            }
            attention.columns.push(raw);
        }
    }
}

/// To four significant digits.
fn rounded(v: f32) -> f32 {
    format!("{v:.3e}").parse().unwrap_or(v)
}

/// Fisher and Yates.
fn shuffle(order: &mut [usize], draws: &mut Draws) {
    for i in (1..order.len()).rev() {
        order.swap(i, draws.below(i + 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of `width` columns as a file has them.
    fn bytes(tokens: &[Vec<f32>]) -> Vec<u8> {
        let values = tokens.iter().flatten();
        values
            .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
            .collect()
    }

    fn rows(prompts: &[Vec<u8>], width: usize) -> TokenRows<'_> {
        TokenRows {
            prompts: prompts.iter().map(Vec::as_slice).collect(),
            width,
        }
    }

    /// What is unsafe is said by one token of many: where column 0 is large column 1 tells, and elsewhere it is noise. The
    /// mean over the tokens is as noisy as they are many.
    fn needles(n: usize) -> (Vec<Vec<u8>>, Vec<bool>) {
        let mut draws = Draws::new(7);
        let mut unit = move || draws.below(1 << 16) as f32 / 32768.0 - 1.0;
        let mut labels = Vec::new();
        let prompts = (0..n).map(|i| {
            let is_unsafe = i % 2 == 0;
            labels.push(is_unsafe);
            let needle = i % 9;
            let tokens = (0..12).map(|t| match t == needle {
                true => vec![
                    4.0 + unit(),
                    if is_unsafe { 1.0 } else { -1.0 } + 0.5 * unit(),
                ],
                false => vec![unit(), 3.0 * unit()],
            });
            bytes(&tokens.collect::<Vec<_>>())
        });
        (prompts.collect(), labels)
    }

    /// Heads of several trainings, of raw columns.
    fn folded(trainings: &[&Heads], scale: &Scale) -> Attention {
        let mut attention = Attention {
            columns: Vec::new(),
            bias: 0.0,
            threshold: 0.0,
            auroc: 0.0,
        };
        let share = 1.0 / trainings.len() as f64;
        for heads in trainings {
            heads.fold_into(&mut attention, scale, share);
        }
        attention
    }

    const HOW: Training = Training {
        heads: 2,
        epochs: 60,
        rate: 0.05,
        trainings: 1,
        seed: 3,
    };

    #[test]
    fn heads_find_the_token_that_tells() {
        let (prompts, labels) = needles(400);
        let rows = rows(&prompts, 2);
        let learn = |how: &Training| {
            let mut calls = Vec::new();
            let splits = (0..300, 300..400);
            let learnt = train(&rows, &labels, splits, 0.9, how, |done, of| {
                calls.push((done, of))
            });
            assert_eq!(calls.last().unwrap().0, 5 * how.epochs * how.trainings);
            assert!(calls.windows(2).all(|c| c[1].0 == c[0].0 + 1));
            assert_eq!(calls.last().unwrap().0, calls.last().unwrap().1);
            learnt.unwrap()
        };
        let found = learn(&HOW);
        assert!(found.auroc > 0.98, "{}", found.auroc);
        // The mean, which is what heads begin with, does not.
        let means: Vec<Vec<f64>> = (0..400)
            .map(|i| {
                let mut sum = vec![0.0; 2];
                let mut x = vec![0.0; 2];
                for t in 0..12 {
                    rows.row(i, t, &mut x);
                    sum.iter_mut()
                        .zip(&x)
                        .for_each(|(s, v)| *s += f64::from(*v));
                }
                sum
            })
            .collect();
        let linear = fit(&means[..300], &labels[..300], 1e-4);
        let of = |want: bool| -> Vec<f64> {
            let of = (300..400).filter(|&i| labels[i] == want);
            of.map(|i| linear.score(&means[i])).collect()
        };
        assert!(auroc(&of(true), &of(false)) < 0.8);
        // Nine of ten are caught, and no more than need be.
        let caught = (300..400).filter(|&i| labels[i] && found.score(&rows, i) >= found.threshold);
        assert_eq!(caught.count(), 45);
        // The same bits whatever the number of threads; other ones with another seed.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
        assert!(pool.unwrap().install(|| learn(&HOW)) == found);
        assert!(learn(&Training { seed: 4, ..HOW }) != found);
    }

    /// `train` folds the standardisation and the calibration into what a plan has: the gate as it steers gives the
    /// same score.
    #[test]
    fn the_gate_of_a_plan_gives_the_same_score() {
        use demur_model::hooks::{Intervention, Role, Rows};
        use demur_steering::{PLAN_VERSION, SaeSet, SteeringPlan, compile};
        let (prompts, labels) = needles(120);
        let rows = rows(&prompts, 2);
        let how = Training { epochs: 4, ..HOW };
        let found = train(&rows, &labels, (0..80, 80..120), 0.9, &how, |_, _| ()).unwrap();
        let sites = [Site::post(0), Site::post(1)];
        let plan = SteeringPlan {
            version: PLAN_VERSION,
            name: "gate".to_owned(),
            description: None,
            saes: Default::default(),
            gates: [("unsafe".to_owned(), found.gate(sites[1], &sites, 1))].into(),
            interventions: Vec::new(),
        };
        let plan = compile(&plan, &SaeSet::new(), 2, 1).unwrap();
        for prompt in [0, 81, 119] {
            let mut state = plan.start();
            for (l, site) in sites.iter().enumerate() {
                let mut x = vec![9.0f32]; // the first token of all, which is not read
                let mut row = vec![0.0; 2];
                for t in 0..12 {
                    rows.row(prompt, t, &mut row);
                    x.push(row[l]);
                }
                let tokens = Rows {
                    start_pos: 0,
                    tokens: &[0; 13],
                    roles: &[Role::User; 13],
                    generated: false,
                };
                state.edit(*site, &tokens, &mut x);
            }
            let gate = &state.audit().unwrap()["gates"][0];
            let (steered, trained) = (gate["score"].as_f64().unwrap(), found.score(&rows, prompt));
            assert!((steered - trained).abs() < 1e-3, "{steered} {trained}");
        }
    }

    #[test]
    fn several_trainings_are_averaged() {
        let (prompts, labels) = needles(120);
        let rows = rows(&prompts, 2);
        let learnt: Vec<usize> = (0..80).collect();
        let scale = Scale::of(&rows, &learnt);
        let how = Training { epochs: 4, ..HOW };
        let once = |nth| trained_once(&rows, (&labels, &learnt), &scale, (&how, nth), |_| ());
        let (first, second) = (once(0), once(1));
        let [one, two] = [&first, &second].map(|h| folded(&[h], &scale));
        let both = folded(&[&first, &second], &scale);
        for i in 0..120 {
            let [a, b] = [&one, &two].map(|h| h.score(&rows, i));
            assert!((a - b).abs() > 1e-6);
            assert!((both.score(&rows, i) - 0.5 * (a + b)).abs() < 1e-4);
        }
        // `train` has the heads of both.
        let how = Training {
            trainings: 2,
            ..how
        };
        let found = train(&rows, &labels, (0..80, 80..120), 0.9, &how, |_, _| ()).unwrap();
        let queries =
            |a: &Attention| -> Vec<Vec<f32>> { a.columns.iter().step_by(2).cloned().collect() };
        assert_eq!(queries(&found), queries(&both));
    }

    #[test]
    fn the_gradient_is_that_of_the_loss() {
        let (prompts, _) = needles(4);
        let rows = rows(&prompts, 2);
        let scale = Scale::of(&rows, &[0, 1, 2, 3]);
        let mut heads = Heads::new(2, 2, 0);
        let mut draws = Draws::new(1);
        for v in &mut heads.values {
            *v = draws.below(1000) as f32 / 500.0 - 1.0;
        }
        let loss = |heads: &Heads, label: bool| {
            let score = folded(&[heads], &scale).score(&rows, 1);
            let margin = if label { score } else { -score };
            2.0 * (1.0 + (-margin).exp()).ln()
        };
        for label in [false, true] {
            let mut gradient = vec![0.0; heads.values.len()];
            heads.backward(&rows, &scale, 1, (label, 2.0), &mut gradient);
            for j in 0..heads.values.len() {
                let at = heads.values[j];
                let mut moved = |by: f32| {
                    heads.values[j] = at + by;
                    let l = loss(&heads, label);
                    heads.values[j] = at;
                    l
                };
                let numeric = (moved(1e-2) - moved(-1e-2)) / 2e-2;
                let found = f64::from(gradient[j]);
                assert!(
                    (found - numeric).abs() < 1e-3 * numeric.abs().max(0.1),
                    "{j}: {found} {numeric}"
                );
            }
        }
    }

    #[test]
    fn there_must_be_something_to_learn_from() {
        let (prompts, mut labels) = needles(20);
        let rows = rows(&prompts, 2);
        let learn =
            |labels: &[bool], how| train(&rows, labels, (0..10, 10..20), 0.9, how, |_, _| ());
        assert!(learn(&labels, &HOW).is_some());
        assert!(learn(&labels, &Training { heads: 0, ..HOW }).is_none());
        let how = Training {
            trainings: 0,
            ..HOW
        };
        assert!(learn(&labels, &how).is_none());
        labels[..10].fill(true);
        assert!(learn(&labels, &HOW).is_none());
        // A prompt without tokens has the bias alone.
        let empty = TokenRows {
            prompts: vec![&[]],
            width: 2,
        };
        let (_, labels) = needles(20);
        let found = learn(&labels, &HOW).unwrap();
        assert_eq!(found.score(&empty, 0), found.bias);
    }
}
