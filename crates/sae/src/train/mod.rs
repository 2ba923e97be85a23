//! Training SAEs, with gradients by hand: one trainer, and an [`Architecture`] with a file of equations
//! each.
//!
//! For TopK, and a batch `x` of `n` rows with codes `v`, reconstruction `x_hat` and error `e = x_hat - x`:
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
//! Only the encoder's forward product is dense, and its result is never stored: where activations are
//! selected it is one pass ([`demur_kernels::encoder`]), elsewhere it is made by tiles of rows.
//! Entries are sorted by latent, and then one pass over the latents forms each one's gradients in a
//! buffer of two rows and takes its Adam step at once: no gradient matrix exists. A latent whose
//! moments are all zero and that has no entry is not touched. Sums run in a fixed order, so a run has
//! the same bits for any number of threads. The phases are in `step.rs`.
//!
//! # Input scale
//!
//! Rows are multiplied by `s = sqrt(d) / mean |x|` in training, so that one learning rate fits all
//! sites. [`Trainer::finish`] folds it out: with `b_dec / s` and `b_enc / s` the SAE takes raw rows,
//! the decoder stays of unit norm, and activations are in units of the residual stream. Rows whose
//! norm exceeds `outlier` times the median (attention sinks at the first position) are left out. Mean
//! and median are those of the first rows ([`Input`]): all, if they fit into memory.

mod architecture;
mod batch_topk;
mod checkpoint;
mod codes;
mod data;
mod dense;
mod gated;
mod jumprelu;
pub mod matryoshka;
mod relu;
mod schedule;
mod step;
mod topk;

use demur_kernels::dispatch::{Isa, isa};
use demur_kernels::ops::dot;
use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::arch::Wiring;
use crate::error::SaeError;
use crate::sae::{Sae, SaeConfig};
pub use architecture::Architecture;
pub use checkpoint::{Checkpoints, Resumed};
pub use data::{Input, Rows, ScaledRows};
pub use schedule::Schedule;
pub use step::Timing;
use step::Workspace;

/// How to train.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainConfig {
    /// What is trained. `k` is used by those architectures that select by it ([`Architecture::selects`]).
    pub sae: SaeConfig,
    /// How latents become active, and what the loss is.
    #[serde(default)]
    pub architecture: Architecture,
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
    /// Weight of the auxiliary term; 0 leaves it out, and must be 0 where nothing is selected by `k`.
    pub auxk_alpha: f64,
    /// Rows without firing after which a latent is dead.
    pub dead_after: u64,
    /// Rows with a norm above this many medians are left out.
    pub outlier: f32,
    /// Seeds initialisation; the order of rows has a seed of its own.
    pub seed: u64,
    /// What products and gathers read.
    #[serde(default)]
    pub precision: Precision,
    /// The most that the norm of all gradients together may be; above, all are scaled down.
    #[serde(default)]
    pub clip: Option<f64>,
}

/// What the encoder's product and the gathers of rows read. Weights and moments are f32 always.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// bf16 where the processor multiplies it (AVX-512 BF16, AMX), f32 elsewhere.
    #[default]
    Bf16,
    /// f32.
    F32,
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
    /// Mean number of active latents a row.
    pub l0: f64,
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

/// What is trained.
#[derive(Debug, Clone, PartialEq)]
struct Params {
    w_enc: Param, // [d_sae, d_model]
    w_dec: Param, // [d_sae, d_model]
    b_enc: Param,
    b_dec: Param,
    /// What the architecture adds for each latent, `[d_sae]` each.
    extra: Vec<Param>,
}

impl Params {
    fn all(&self) -> impl Iterator<Item = &Param> {
        [&self.w_enc, &self.w_dec, &self.b_enc, &self.b_dec]
            .into_iter()
            .chain(&self.extra)
    }
}

/// A training run between two steps.
#[derive(Debug)]
pub struct Trainer {
    cfg: TrainConfig,
    scale: f32,
    step: usize,
    params: Params,
    idle: Vec<u64>, // rows since each latent fired
    /// The threshold of inference, where a batch is selected together; below zero it is not set.
    threshold: f32,
    /// Made of the state when a step needs it.
    engine: Option<Engine>,
    timing: Timing,
}

/// The buffers of a step, by what the dense product and the gathers read.
#[derive(Debug)]
enum Engine {
    F32(Workspace<f32>),
    Bf16(Workspace<bf16>),
}

impl Engine {
    fn new(t: &Trainer) -> Self {
        match t.cfg.precision {
            Precision::Bf16 if isa() >= Isa::Avx512 => Self::Bf16(Workspace::new(t, true)),
            _ => Self::F32(Workspace::new(t, false)),
        }
    }
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
        cfg.architecture.check(&cfg)?;
        let mut rng = ChaCha8Rng::seed_from_u64(cfg.seed);
        let mut w = vec![0.0f32; m * d];
        for row in w.chunks_exact_mut(d) {
            for v in row.iter_mut() {
                // Irwin-Hall: the sum of four uniforms is near enough to a Gaussian for a direction.
                *v = (0..4).map(|_| rng.random::<f32>() - 0.5).sum();
            }
            normalise(row);
        }
        let gain = cfg.architecture.encoder_gain(d, m);
        Ok(Self {
            scale: data.scale(),
            step: 0,
            params: Params {
                w_enc: Param::new(w.iter().map(|v| v * gain).collect()),
                w_dec: Param::new(w),
                b_enc: Param::new(vec![0.0; m]),
                b_dec: Param::new(data.mean()),
                extra: cfg.architecture.extra(d, m),
            },
            idle: vec![0; m],
            threshold: -1.0,
            cfg,
            engine: None,
            timing: Timing::default(),
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
        let mut engine = self.engine.take().unwrap_or_else(|| Engine::new(self));
        let stats = match &mut engine {
            Engine::F32(work) => work.step(self, x),
            Engine::Bf16(work) => work.step(self, x),
        };
        self.engine = Some(engine);
        stats
    }

    /// Latents that are dead.
    fn dead(&self) -> Vec<u32> {
        let idle = |j: &u32| self.idle[*j as usize] >= self.cfg.dead_after;
        (0..self.cfg.sae.d_sae as u32).filter(idle).collect()
    }

    /// Where the time of the last step went.
    pub fn timing(&self) -> Timing {
        self.timing
    }

    /// Bytes of the weights and the optimiser's moments, and of the copies of the weights in bf16.
    pub fn bytes(&self) -> (usize, usize) {
        let copies = match &self.engine {
            Some(Engine::Bf16(work)) => work.copied_bytes(),
            _ => 0,
        };
        let state = self.params.all().map(|p| 3 * size_of_val(&p.w[..])).sum();
        (state, copies)
    }

    /// The SAE so far, for raw rows: the input scale folded out.
    ///
    /// # Errors
    /// [`SaeError::Config`] if training diverged, or if there was no step that a threshold could be
    /// estimated in.
    pub fn finish(&self) -> Result<Sae, SaeError> {
        let unscaled = |v: &[f32]| v.iter().map(|x| x / self.scale).collect();
        let (arch, p) = (&self.cfg.architecture, &self.params);
        let mut cfg = self.cfg.sae.clone();
        if !arch.selects() {
            cfg.k = cfg.d_sae;
        }
        let b_enc = match arch {
            Architecture::Gated { .. } => vec![0.0; cfg.d_sae],
            _ => unscaled(&p.b_enc.w),
        };
        Sae::of(
            cfg,
            arch.activation(self.cfg.sae.k, self.threshold, p, self.scale),
            Wiring::default(),
            p.w_enc.w.clone(),
            b_enc,
            self.params.w_dec.w.clone(),
            unscaled(&self.params.b_dec.w),
        )
    }
}

fn normalise(row: &mut [f32]) {
    let norm = dot(row, row).sqrt();
    if norm > 0.0 {
        row.iter_mut().for_each(|v| *v /= norm);
    }
}

#[cfg(test)]
mod tests;
