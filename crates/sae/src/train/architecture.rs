//! What is trained, and what its equations make of a batch: the one place where training asks which
//! architecture it is. The equations are in the files named after the architectures.

use serde::{Deserialize, Serialize};

use super::gated::Gated;
use super::jumprelu::{JumpRelu, L0Penalty};
use super::relu::L1;
use super::{Param, Params, TrainConfig, matryoshka};
use crate::arch::Activation;
use crate::error::SaeError;

/// An architecture to train, with the settings that only it has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "lowercase", deny_unknown_fields)]
pub enum Architecture {
    /// The `k` largest of each row ([`crate::arch::topk`]).
    TopK {
        /// Whether the `4 k` largest reconstruct as well, with a weight of 1/8.
        #[serde(default)]
        multi: bool,
    },
    /// The `k n` largest of a batch of `n` rows ([`crate::arch::batch_topk`]).
    BatchTopK,
    /// BatchTopK over nested dictionaries ([`crate::arch::matryoshka`]).
    Matryoshka {
        /// Latents of each group; they sum to `d_sae`.
        group_sizes: Vec<usize>,
    },
    /// ReLU with an L1 penalty ([`crate::arch::relu`]).
    Relu {
        /// Weight of `sum f` beside `sum |x - x_hat|^2`.
        l1: f64,
        /// Fraction of the steps over which the weight rises from 0.
        warmup: f64,
    },
    /// A threshold for each latent, learnt with straight-through estimators ([`crate::arch::jumprelu`]).
    JumpRelu {
        /// Weight of the L0 term.
        l0: f64,
        /// The L0 that is aimed at; without one, the term is the L0 itself.
        target: Option<f64>,
        /// Width of the estimators' rectangle, as a fraction of the rows' mean norm; the thresholds
        /// start there.
        bandwidth: f64,
        /// Fraction of the steps over which the weight rises from 0.
        warmup: f64,
    },
    /// A gate and a magnitude ([`crate::arch::gated`]).
    Gated {
        /// Weight of `sum relu(gate)` beside `sum |x - x_hat|^2`.
        l1: f64,
        /// Fraction of the steps over which the weight rises from 0.
        warmup: f64,
    },
}

impl Default for Architecture {
    fn default() -> Self {
        Self::TopK { multi: false }
    }
}

impl Architecture {
    /// Whether `k` says how many latents are active: these select the largest activations and revive
    /// dead latents with the auxiliary term, the others have a penalty for both.
    pub fn selects(&self) -> bool {
        matches!(
            self,
            Self::TopK { .. } | Self::BatchTopK | Self::Matryoshka { .. }
        )
    }

    /// Refuses settings out of range.
    pub(super) fn check(&self, cfg: &TrainConfig) -> Result<(), SaeError> {
        let bad = |field: &'static str, value: f64, rule: &str| {
            Err(SaeError::Config {
                field,
                value: value.to_string(),
                rule: rule.to_owned(),
            })
        };
        if !self.selects() && cfg.auxk_alpha != 0.0 {
            let rule = "must be 0 for relu, jumprelu and gated, which have no auxiliary term";
            return bad("auxk_alpha", cfg.auxk_alpha, rule);
        }
        let (weight, value, warmup) = match self {
            Self::TopK { .. } | Self::BatchTopK => return Ok(()),
            Self::Matryoshka { group_sizes } => {
                return crate::arch::matryoshka::check(group_sizes, cfg.sae.d_sae);
            }
            Self::Relu { l1, warmup } | Self::Gated { l1, warmup } => ("l1", *l1, *warmup),
            Self::JumpRelu {
                l0,
                target,
                bandwidth,
                warmup,
            } => {
                let positive = |v: f64| v.is_finite() && v > 0.0;
                if !positive(*bandwidth) {
                    return bad("bandwidth", *bandwidth, "must be positive");
                }
                if let Some(target) = target
                    && !positive(*target)
                {
                    return bad("target", *target, "must be positive");
                }
                ("l0", *l0, *warmup)
            }
        };
        if !(value.is_finite() && value >= 0.0) {
            return bad(weight, value, "must be 0 or more");
        }
        if !(0.0..=1.0).contains(&warmup) {
            return bad("warmup", warmup, "must be a fraction between 0 and 1");
        }
        Ok(())
    }

    /// What encoder rows start as, relative to decoder rows. Where no number of latents is given, half of
    /// them are active at first, and `sum relu(w . x) w` over half of `m` unit directions is
    /// `m / (2 d) x` in the mean.
    pub(super) fn encoder_gain(&self, d: usize, m: usize) -> f32 {
        match self.selects() {
            true => 1.0,
            false => (2.0 * d as f32 / m as f32).min(1.0),
        }
    }

    /// Parameters of each latent beside `b_enc`, `[d_sae]` each: the logarithm of the threshold; `r_mag`
    /// and `b_mag` (the gate's bias is `b_enc`).
    pub(super) fn extra(&self, d: usize, m: usize) -> Vec<Param> {
        match self {
            Self::JumpRelu { bandwidth, .. } => {
                let start = (bandwidth * (d as f64).sqrt()).ln() as f32;
                vec![Param::new(vec![start; m])]
            }
            Self::Gated { .. } => vec![Param::new(vec![0.0; m]), Param::new(vec![0.0; m])],
            _ => Vec::new(),
        }
    }

    /// Number of those parameters.
    pub(super) fn n_extra(&self) -> usize {
        match self {
            Self::JumpRelu { .. } => 1,
            Self::Gated { .. } => 2,
            _ => 0,
        }
    }

    /// Where each level's latents end: one level, but for nested dictionaries.
    pub(super) fn levels(&self, d_sae: usize) -> Vec<u32> {
        match self {
            Self::Matryoshka { group_sizes } => matryoshka::ends(group_sizes),
            _ => vec![d_sae as u32],
        }
    }

    /// What inference does, for raw rows: thresholds and biases are divided by the input's scale.
    pub(super) fn activation(
        &self,
        k: usize,
        threshold: f32,
        p: &Params,
        scale: f32,
    ) -> Activation {
        match self {
            Self::TopK { .. } => Activation::TopK { k },
            Self::BatchTopK => Activation::BatchTopK {
                k,
                threshold: threshold / scale,
            },
            Self::Matryoshka { group_sizes } => Activation::Matryoshka {
                k,
                threshold: threshold / scale,
                group_sizes: group_sizes.clone(),
            },
            Self::Relu { .. } => Activation::Relu,
            Self::JumpRelu { .. } => Activation::JumpRelu {
                threshold: p.extra[0].w.iter().map(|v| v.exp() / scale).collect(),
            },
            Self::Gated { .. } => Activation::Gated {
                b_gate: p.b_enc.w.iter().map(|v| v / scale).collect(),
                scale: p.extra[0].w.iter().map(|v| v.exp()).collect(),
                b_mag: p.extra[1].w.iter().map(|v| v / scale).collect(),
            },
        }
    }

    /// The rule of a step; `x` has `n` rows of variance `variance` in all.
    pub(super) fn rule(&self, p: &Params, step: &StepOf) -> Rule {
        match self {
            Self::TopK { .. } | Self::BatchTopK | Self::Matryoshka { .. } => Rule::Select,
            Self::Relu { l1, warmup } => Rule::L1(L1 {
                weight: l1 * step.risen(*warmup),
                by: (l1 * step.risen(*warmup) / step.variance) as f32,
            }),
            Self::JumpRelu {
                l0,
                target,
                bandwidth,
                warmup,
            } => {
                let width = (bandwidth * (step.d as f64).sqrt()) as f32;
                let penalty = L0Penalty {
                    weight: l0 * step.risen(*warmup),
                    target: *target,
                };
                Rule::Jump(JumpRelu::new(&p.extra[0].w, width, penalty))
            }
            Self::Gated { l1, warmup } => Rule::Gated(Gated::new(
                &p.b_enc.w,
                &p.extra[0].w,
                &p.extra[1].w,
                l1 * step.risen(*warmup),
                step.variance,
            )),
        }
    }
}

/// What a rule depends on beside the parameters.
#[derive(Debug, Clone, Copy)]
pub(super) struct StepOf {
    /// Steps done, and in all.
    pub step: usize,
    pub steps: usize,
    pub d: usize,
    /// `sum |x - mean|^2`.
    pub variance: f64,
}

impl StepOf {
    /// How far a weight has risen.
    fn risen(&self, warmup: f64) -> f64 {
        let over = warmup * self.steps as f64;
        ((self.step + 1) as f64 / over.max(1.0)).min(1.0)
    }
}

/// What becomes of pre-activations and of the gradients to activations.
#[derive(Debug)]
pub(super) enum Rule {
    /// What was selected is active at its value.
    Select,
    L1(L1),
    Jump(JumpRelu),
    Gated(Gated),
}

impl Rule {
    /// The activation of latent `j` with pre-activation `p`, if it takes part in the step: some that are
    /// not active have a gradient.
    #[inline]
    pub(super) fn entry(&self, j: usize, p: f32) -> Option<f32> {
        match self {
            Self::Select | Self::L1(_) => (p > 0.0).then_some(p),
            Self::Jump(rule) => rule.entry(j, p),
            Self::Gated(rule) => rule.entry(j, p),
        }
    }

    /// Gradients to the encoder's product and to the latent's own parameter, of an entry with activation
    /// `f` and pre-activation `p`; `df` is that of the reconstruction error to `f`, `d_gate` to the
    /// rectified gate.
    #[inline]
    pub(super) fn gradient(&self, j: usize, f: f32, p: f32, df: f32, d_gate: f32) -> (f32, f32) {
        match self {
            Self::Select => (df, 0.0),
            Self::L1(rule) => (df + rule.by, 0.0),
            Self::Jump(rule) => rule.gradient(j, f, p, df),
            Self::Gated(rule) => rule.gradient(j, f, df, d_gate),
        }
    }

    /// Gradients to `b_enc` and to the latent's own parameters, of the sums of its entries' gradients.
    pub(super) fn of_latent(&self, j: usize, vals: &[f32], dp: f32, own: &[f32]) -> [f32; 3] {
        match self {
            Self::Select | Self::L1(_) => [dp, 0.0, 0.0],
            Self::Jump(_) => [dp, own.iter().sum(), 0.0],
            Self::Gated(rule) => rule.of_latent(j, vals, dp, own),
        }
    }

    /// Whether entries keep their pre-activations and a gradient of their own.
    pub(super) fn keeps_pre(&self) -> bool {
        matches!(self, Self::Jump(_) | Self::Gated(_))
    }

    /// The penalty of a row, in units of squared error.
    pub(super) fn of_row(&self, vals: &[f32], pre: &[f32]) -> f64 {
        let sum = |v: &[f32]| v.iter().map(|v| f64::from(*v)).sum::<f64>();
        match self {
            Self::Select | Self::Jump(_) => 0.0,
            Self::L1(rule) => rule.weight * sum(vals),
            Self::Gated(rule) => rule.l1 * sum(pre),
        }
    }
}
