//! Training a TopK SAE, with gradients by hand.
//!
//! For a batch `x` of `n` rows with codes `v`, reconstruction `x_hat` and error `e = x_hat - x`:
//!
//! ```text
//! loss    = sum |e|^2 / V  +  alpha s sum |e_aux|^2 / V,      V = sum |x - mean(x)|^2
//! g       = 2 e / V                                            d loss / d x_hat
//! dv_j    = g . W_dec[j]                                       for the k active latents
//! dW_dec[j] = sum v_j g       dW_enc[j] = sum dv_j (x - b_dec)       db_enc[j] = sum dv_j
//! db_dec  = sum g - sum_j db_enc[j] W_enc[j]
//! ```
//!
//! The auxiliary term (2406.04093) has the `d_model / 2` strongest *dead* latents reconstruct the
//! error of the others: `e_aux = sum v_a W_dec[a] - (x - x_hat)`, with the error taken as given,
//! `s = min(dead / k_aux, 1)` and `alpha = 1/32`. A latent is dead after `dead_after` rows without
//! firing. Decoder rows have unit norm: the part of the gradient along a row is removed before the
//! Adam step, and the row is normed after it.
//!
//! # Cost
//!
//! Only the encoder's forward product is dense. Entries are sorted by latent, and then one pass over
//! the latents forms each one's gradients in a buffer of two rows and takes its Adam step at once:
//! no gradient matrix exists. Sums run in a fixed order, so a run has the same bits for any number
//! of threads.
//!
//! # Input scale
//!
//! Rows are multiplied by `s = sqrt(d) / mean |x|` in training, so that one learning rate fits all
//! sites. [`Trainer::finish`] folds it out: with `b_dec / s` and `b_enc / s` the SAE takes raw rows,
//! the decoder stays of unit norm, and activations are in units of the residual stream. Rows whose
//! norm exceeds `outlier` times the median (attention sinks at the first position) are left out.

mod checkpoint;
mod data;

use demur_kernels::ops::{axpy, dot};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::SaeError;
use crate::sae::{Sae, SaeConfig, encode_tiles};
pub use data::{Rows, ScaledRows};

/// Adam's decay rates and the constant in its denominator.
const BETAS: (f32, f32) = (0.9, 0.999);
const EPS: f32 = 1e-8;

/// How to train.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainConfig {
    /// What is trained.
    pub sae: SaeConfig,
    /// Rows a step.
    pub batch: usize,
    /// Steps in all.
    pub steps: usize,
    /// Peak learning rate; `2e-4 / sqrt(d_sae / 2^14)` if not given.
    pub lr: Option<f64>,
    /// Steps over which it rises from 0.
    pub warmup_steps: usize,
    /// Fraction of the steps, at the end, over which it falls to 0.
    pub decay: f64,
    /// Weight of the auxiliary term; 0 leaves it out.
    pub auxk_alpha: f64,
    /// Rows without firing after which a latent is dead.
    pub dead_after: u64,
    /// Rows with a norm above this many medians are left out.
    pub outlier: f32,
    /// Seeds initialisation and the order of rows.
    pub seed: u64,
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepStats {
    /// Steps done.
    pub step: usize,
    /// Loss, auxiliary term included.
    pub loss: f64,
    /// Fraction of the batch's variance unexplained.
    pub fvu: f64,
    /// Fraction of latents that are dead.
    pub dead: f64,
    /// Learning rate.
    pub lr: f64,
}

/// A parameter with Adam's moments.
#[derive(Debug, Clone, PartialEq)]
struct Param {
    w: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
}

impl Param {
    fn new(w: Vec<f32>) -> Self {
        Self {
            m: vec![0.0; w.len()],
            v: vec![0.0; w.len()],
            w,
        }
    }
}

/// A training run between two steps.
#[derive(Debug)]
pub struct Trainer {
    cfg: TrainConfig,
    scale: f32,
    step: usize,
    w_enc: Param, // [d_sae, d_model]
    w_dec: Param, // [d_sae, d_model]
    b_enc: Param,
    b_dec: Param,
    idle: Vec<u64>, // rows since each latent fired
}

/// One use of a latent by a row.
#[derive(Clone, Copy)]
struct Entry {
    row: u32,
    value: f32,
    grad: f32,
    aux: bool,
}

impl Trainer {
    /// Initialises from `data`: `b_dec` is the mean of its rows, decoder rows are random directions,
    /// encoder rows their copies.
    ///
    /// # Errors
    /// [`SaeError::Config`] if a number is out of range or there are too few rows.
    pub fn new(cfg: TrainConfig, data: &ScaledRows<'_>) -> Result<Self, SaeError> {
        let (d, m) = (cfg.sae.d_model, cfg.sae.d_sae);
        let bad = |field, value: String, rule: &str| {
            Err(SaeError::Config {
                field,
                value,
                rule: rule.to_owned(),
            })
        };
        if cfg.sae.k == 0 || cfg.sae.k > m {
            return bad("k", cfg.sae.k.to_string(), "must be between 1 and d_sae");
        }
        if cfg.batch == 0 || cfg.steps == 0 {
            return bad(
                "batch",
                cfg.batch.to_string(),
                "batch and steps must be at least 1",
            );
        }
        if data.len() < cfg.batch {
            return bad(
                "batch",
                cfg.batch.to_string(),
                "exceeds the rows there are; harvest more",
            );
        }
        if cfg.lr.is_some_and(|lr| !(lr.is_finite() && lr > 0.0)) {
            return bad("lr", format!("{:?}", cfg.lr), "must be positive");
        }
        let mut rng = ChaCha8Rng::seed_from_u64(cfg.seed);
        let mut w = vec![0.0f32; m * d];
        for row in w.chunks_exact_mut(d) {
            for v in row.iter_mut() {
                // Irwin-Hall: the sum of four uniforms is near enough to a Gaussian for a direction.
                *v = (0..4).map(|_| rng.random::<f32>() - 0.5).sum();
            }
            normalise(row);
        }
        Ok(Self {
            scale: data.scale(),
            step: 0,
            w_enc: Param::new(w.clone()),
            w_dec: Param::new(w),
            b_enc: Param::new(vec![0.0; m]),
            b_dec: Param::new(data.mean()),
            idle: vec![0; m],
            cfg,
        })
    }

    /// Steps done.
    pub fn steps_done(&self) -> usize {
        self.step
    }

    /// The learning rate of the next step.
    fn lr(&self) -> f64 {
        let c = &self.cfg;
        let peak =
            c.lr.unwrap_or_else(|| 2e-4 / (c.sae.d_sae as f64 / 16_384.0).sqrt());
        let rise = (self.step + 1) as f64 / c.warmup_steps.max(1) as f64;
        let tail = (c.steps as f64 * c.decay).max(1.0);
        let fall = (c.steps.saturating_sub(self.step)) as f64 / tail;
        peak * rise.min(fall).min(1.0)
    }

    /// One step on a batch.
    ///
    /// # Shapes
    /// `x` is `[batch, d_model]`, scaled as [`ScaledRows`] does.
    pub fn step(&mut self, x: &[f32]) -> StepStats {
        let (d, m, k) = (self.cfg.sae.d_model, self.cfg.sae.d_sae, self.cfg.sae.k);
        let n = x.len() / d;
        let lr = self.lr();
        let dead: Vec<u32> = (0..m as u32)
            .filter(|&j| self.idle[j as usize] >= self.cfg.dead_after)
            .collect();
        let k_aux = if self.cfg.auxk_alpha > 0.0 {
            (d / 2).min(dead.len())
        } else {
            0
        };
        let (mut idx, mut val) = (vec![0u32; n * k], vec![0.0f32; n * k]);
        let aux = std::sync::Mutex::new(vec![(0u32, 0.0f32); n * k_aux]);
        encode_tiles(
            &self.w_enc.w,
            &self.b_enc.w,
            &self.b_dec.w,
            x,
            k,
            &mut idx,
            &mut val,
            |first, pre| {
                if k_aux == 0 {
                    return;
                }
                let mut found = Vec::new();
                for pre in pre.chunks_exact(m) {
                    let mut row: Vec<(u32, f32)> =
                        dead.iter().map(|&j| (j, pre[j as usize])).collect();
                    row.select_nth_unstable_by(k_aux - 1, |a, b| {
                        b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
                    });
                    row.truncate(k_aux);
                    row.sort_unstable_by_key(|e| e.0);
                    found.extend(row);
                }
                let mut all = aux.lock().unwrap_or_else(|e| e.into_inner());
                all[first * k_aux..first * k_aux + found.len()].copy_from_slice(&found);
            },
        );
        let aux = aux.into_inner().unwrap_or_else(|e| e.into_inner());
        let variance = variance(x, d);
        // Errors and their gradients, row by row.
        let mut g = vec![0.0f32; n * d];
        let mut g_aux = vec![0.0f32; if k_aux > 0 { n * d } else { 0 }];
        let weight = self.cfg.auxk_alpha * (dead.len() as f64 / (d / 2).max(1) as f64).min(1.0);
        let w_dec = &self.w_dec.w;
        let row_of = |j: u32| &w_dec[j as usize * d..(j as usize + 1) * d];
        let mut aux_rows: Vec<&mut [f32]> = g_aux.chunks_mut(d).collect();
        aux_rows.resize_with(n, Default::default);
        let errors: Vec<(f64, f64)> = g
            .par_chunks_exact_mut(d)
            .zip(aux_rows.into_par_iter())
            .enumerate()
            .map(|(r, (g, g_aux))| {
                let x = &x[r * d..(r + 1) * d];
                g.copy_from_slice(&self.b_dec.w);
                for (&j, &v) in idx[r * k..(r + 1) * k].iter().zip(&val[r * k..]) {
                    if v > 0.0 {
                        axpy(v, row_of(j), g);
                    }
                }
                axpy(-1.0, x, g); // e = x_hat - x
                let error = f64::from(dot(g, g));
                let mut aux_error = 0.0;
                if k_aux > 0 {
                    g_aux.copy_from_slice(g); // - (x - x_hat)
                    for &(j, v) in &aux[r * k_aux..(r + 1) * k_aux] {
                        if v > 0.0 {
                            axpy(v, row_of(j), g_aux);
                        }
                    }
                    aux_error = f64::from(dot(g_aux, g_aux));
                    let by = (2.0 * weight / variance) as f32;
                    g_aux.iter_mut().for_each(|v| *v *= by);
                }
                let by = (2.0 / variance) as f32;
                g.iter_mut().for_each(|v| *v *= by);
                (error, aux_error)
            })
            .collect();
        let fvu = errors.iter().map(|e| e.0).sum::<f64>() / variance;
        let loss = fvu + weight * errors.iter().map(|e| e.1).sum::<f64>() / variance;
        // Entries by latent.
        let mut entries: Vec<Vec<Entry>> = vec![Vec::new(); m];
        for (r, (idx, val)) in idx.chunks_exact(k).zip(val.chunks_exact(k)).enumerate() {
            for (&j, &value) in idx.iter().zip(val).filter(|(_, v)| **v > 0.0) {
                entries[j as usize].push(Entry {
                    row: r as u32,
                    value,
                    grad: 0.0,
                    aux: false,
                });
            }
        }
        for (j, idle) in self.idle.iter_mut().enumerate() {
            *idle = if entries[j].is_empty() {
                *idle + n as u64
            } else {
                0
            };
        }
        for (i, &(j, value)) in aux.iter().enumerate().filter(|(_, e)| e.1 > 0.0) {
            let row = (i / k_aux.max(1)) as u32;
            entries[j as usize].push(Entry {
                row,
                value,
                grad: 0.0,
                aux: true,
            });
        }
        let gradient = |e: &Entry| {
            let rows = if e.aux { &g_aux } else { &g };
            &rows[e.row as usize * d..(e.row as usize + 1) * d]
        };
        let db_enc: Vec<f32> = entries
            .par_iter_mut()
            .enumerate()
            .map(|(j, entries)| {
                for e in entries.iter_mut() {
                    e.grad = dot(gradient(e), row_of(j as u32));
                }
                entries.iter().map(|e| e.grad).sum()
            })
            .collect();
        let mut db_dec = vec![0.0f32; d];
        for row in g.chunks_exact(d) {
            axpy(1.0, row, &mut db_dec);
        }
        for (j, &b) in db_enc.iter().enumerate().filter(|(_, b)| **b != 0.0) {
            axpy(-b, &self.w_enc.w[j * d..(j + 1) * d], &mut db_dec);
        }
        // Gradients and Adam, latent by latent.
        self.step += 1;
        let adam = Adam::new(lr, self.step);
        let b_dec = &self.b_dec.w;
        let (enc, dec) = (&mut self.w_enc, &mut self.w_dec);
        let enc_rows = enc
            .w
            .par_chunks_mut(d)
            .zip(enc.m.par_chunks_mut(d))
            .zip(enc.v.par_chunks_mut(d));
        let dec_rows = dec
            .w
            .par_chunks_mut(d)
            .zip(dec.m.par_chunks_mut(d))
            .zip(dec.v.par_chunks_mut(d));
        enc_rows
            .zip(dec_rows)
            .zip(entries.par_iter())
            .for_each_init(
                || (vec![0.0f32; d], vec![0.0f32; d]),
                |(g_enc, g_dec), ((((we, me), ve), ((wd, md), vd)), entries)| {
                    g_enc.fill(0.0);
                    g_dec.fill(0.0);
                    let mut total = 0.0;
                    for e in entries {
                        axpy(e.value, gradient(e), g_dec);
                        axpy(
                            e.grad,
                            &x[e.row as usize * d..(e.row as usize + 1) * d],
                            g_enc,
                        );
                        total += e.grad;
                    }
                    axpy(-total, b_dec, g_enc);
                    let along = dot(g_dec, wd);
                    axpy(-along, wd, g_dec);
                    adam.update(we, me, ve, g_enc);
                    adam.update(wd, md, vd, g_dec);
                    normalise(wd);
                },
            );
        adam.update(
            &mut self.b_enc.w,
            &mut self.b_enc.m,
            &mut self.b_enc.v,
            &db_enc,
        );
        adam.update(
            &mut self.b_dec.w,
            &mut self.b_dec.m,
            &mut self.b_dec.v,
            &db_dec,
        );
        StepStats {
            step: self.step,
            loss,
            fvu,
            dead: dead.len() as f64 / m as f64,
            lr,
        }
    }

    /// The SAE so far, for raw rows: the input scale folded out.
    ///
    /// # Errors
    /// [`SaeError::Config`] if training diverged.
    pub fn finish(&self) -> Result<Sae, SaeError> {
        let unscaled = |v: &[f32]| v.iter().map(|x| x / self.scale).collect();
        Sae::new(
            self.cfg.sae.clone(),
            self.w_enc.w.clone(),
            unscaled(&self.b_enc.w),
            self.w_dec.w.clone(),
            unscaled(&self.b_dec.w),
        )
    }
}

/// One Adam step (1412.6980) with bias correction.
struct Adam {
    rate: f32,
    root: f32,
}

impl Adam {
    fn new(lr: f64, step: usize) -> Self {
        let correct = |beta: f32| 1.0 - f64::from(beta).powi(step.min(1 << 20) as i32);
        Self {
            rate: (lr / correct(BETAS.0)) as f32,
            root: correct(BETAS.1).sqrt() as f32,
        }
    }

    fn update(&self, w: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]) {
        for (((w, m), v), g) in w.iter_mut().zip(m).zip(v).zip(g) {
            *m = BETAS.0 * *m + (1.0 - BETAS.0) * g;
            *v = BETAS.1 * *v + (1.0 - BETAS.1) * g * g;
            *w -= self.rate * *m / (v.sqrt() / self.root + EPS);
        }
    }
}

fn normalise(row: &mut [f32]) {
    let norm = dot(row, row).sqrt();
    if norm > 0.0 {
        row.iter_mut().for_each(|v| *v /= norm);
    }
}

/// `sum |x - mean|^2` over the batch.
fn variance(x: &[f32], d: usize) -> f64 {
    let n = (x.len() / d).max(1) as f64;
    let mut sum = vec![0.0f64; d];
    let mut square = 0.0;
    for row in x.chunks_exact(d) {
        for (s, v) in sum.iter_mut().zip(row) {
            *s += f64::from(*v);
            square += f64::from(*v) * f64::from(*v);
        }
    }
    (square - sum.iter().map(|s| s * s).sum::<f64>() / n).max(f64::MIN_POSITIVE)
}

#[cfg(test)]
mod tests;
