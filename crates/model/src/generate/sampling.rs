//! Choosing the next token.
//!
//! Order of operations, as in most engines: repetition penalty, temperature, top-k, top-p, min-p.
//! Each request has its own generator seeded by the request, so what is drawn does not depend on
//! what else is in the batch.

use demur_kernels::ops::{argmax, top_k_indices};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::error::ModelError;

/// How tokens are chosen. `temperature = 0` is greedy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sampling {
    /// Divides the logits; 0 takes the largest.
    pub temperature: f32,
    /// Only this many of the most probable tokens; 0 for all.
    pub top_k: usize,
    /// Only the fewest tokens whose probabilities reach this sum.
    pub top_p: f32,
    /// Only tokens at least this times as probable as the most probable.
    pub min_p: f32,
    /// Logits of tokens already there are divided by it if positive, multiplied if negative
    /// (1909.05858).
    pub repetition_penalty: f32,
    /// Seeds this request's generator.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// The most probable token, always.
    pub fn greedy() -> Self {
        Self::default()
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// [`ModelError::Request`] naming the field.
    pub fn validate(&self) -> Result<(), ModelError> {
        let checks = [
            (
                "temperature",
                self.temperature,
                self.temperature >= 0.0,
                "0 or more",
            ),
            (
                "top_p",
                self.top_p,
                self.top_p > 0.0 && self.top_p <= 1.0,
                "above 0 and at most 1",
            ),
            (
                "min_p",
                self.min_p,
                (0.0..1.0).contains(&self.min_p),
                "at least 0 and below 1",
            ),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty > 0.0,
                "positive",
            ),
        ];
        match checks.iter().find(|(_, v, ok, _)| !ok || !v.is_finite()) {
            Some((field, value, _, rule)) => Err(ModelError::Request {
                reason: format!("{field} = {value}: it must be {rule}"),
            }),
            None => Ok(()),
        }
    }
}

/// A request's sampler: its settings and its generator.
#[derive(Debug, Clone)]
pub(crate) struct Sampler {
    settings: Sampling,
    rng: ChaCha8Rng,
}

impl Sampler {
    pub(crate) fn new(settings: Sampling) -> Self {
        let rng = ChaCha8Rng::seed_from_u64(settings.seed);
        Self { settings, rng }
    }

    /// Chooses from `logits`; `seen` are the tokens so far.
    pub(crate) fn choose(&mut self, logits: &[f32], seen: [&[u32]; 2]) -> u32 {
        let penalised;
        let logits = if self.settings.repetition_penalty == 1.0 {
            logits
        } else {
            penalised = self.penalise(logits, seen.concat());
            &penalised
        };
        if self.settings.temperature == 0.0 {
            return argmax(logits) as u32;
        }
        let u = self.rng.random::<f32>();
        self.draw(logits, u)
    }

    fn penalise(&self, logits: &[f32], mut seen: Vec<u32>) -> Vec<f32> {
        let penalty = self.settings.repetition_penalty;
        let mut logits = logits.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            if let Some(l) = logits.get_mut(id as usize) {
                *l = if *l > 0.0 { *l / penalty } else { *l * penalty };
            }
        }
        logits
    }

    /// The token at the share `u` of the probability that the limits leave.
    fn draw(&self, logits: &[f32], u: f32) -> u32 {
        let s = &self.settings;
        let all = s.top_k == 0 || s.top_k >= logits.len();
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let p = |l: f32| ((l - max) / s.temperature).exp();
        if all && s.top_p == 1.0 && s.min_p == 0.0 {
            // Nothing is left out: no order is needed.
            let total: f32 = logits.iter().map(|&l| p(l)).sum();
            return pick(logits.iter().map(|&l| p(l)).zip(0..), u * total);
        }
        let limit = if all { logits.len() } else { s.top_k };
        // A few of the largest mostly settle it; if not, more of them.
        let mut k = if all { limit.min(64) } else { limit };
        let mut top = Vec::new();
        loop {
            top_k_indices(logits, k, &mut top);
            let total: f32 = if all {
                logits.iter().map(|&l| p(l)).sum()
            } else {
                top.iter().map(|t| p(t.1)).sum()
            };
            let mut sum = 0.0;
            let mut kept = 0;
            let mut settled = k == limit;
            for t in &top {
                let p = p(t.1);
                if kept > 0 && (sum >= s.top_p * total || p < s.min_p) {
                    settled = true;
                    break;
                }
                sum += p;
                kept += 1;
            }
            if settled || sum >= s.top_p * total {
                return pick(top[..kept].iter().map(|t| (p(t.1), t.0)), u * sum);
            }
            k = (k * 8).min(limit);
        }
    }
}

/// The token at which the running sum of probabilities passes `at`; the last one if none does.
fn pick(tokens: impl Iterator<Item = (f32, u32)>, at: f32) -> u32 {
    let mut left = at;
    let mut last = 0;
    for (p, id) in tokens {
        left -= p;
        last = id;
        if left < 0.0 {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(settings: Sampling, logits: &[f32], n: u64) -> Vec<u32> {
        (0..n)
            .map(|seed| {
                Sampler::new(Sampling {
                    seed,
                    ..settings.clone()
                })
                .choose(logits, [&[], &[]])
            })
            .collect()
    }

    #[test]
    fn limits_leave_only_what_they_should() {
        // probabilities 0.5, 0.25, 0.125, 0.125
        let logits = [4f32.ln(), 2f32.ln(), 0.0, 0.0];
        let base = Sampling {
            temperature: 1.0,
            ..Sampling::default()
        };
        let all = draw(base.clone(), &logits, 400);
        let share = |id: u32| all.iter().filter(|t| **t == id).count();
        assert!((150..250).contains(&share(0)), "{}", share(0));
        assert!(share(2) > 20 && share(3) > 20);
        for settings in [
            Sampling {
                top_k: 2,
                ..base.clone()
            },
            Sampling {
                top_p: 0.6,
                ..base.clone()
            },
            Sampling {
                min_p: 0.4,
                ..base.clone()
            },
        ] {
            let drawn = draw(settings.clone(), &logits, 200);
            assert!(drawn.iter().all(|t| *t < 2), "{settings:?}");
            assert!(drawn.contains(&1), "{settings:?}");
        }
        let same = draw(base.clone(), &logits, 50);
        assert_eq!(same, draw(base, &logits, 50));
    }

    #[test]
    fn repetition_is_penalised_in_both_signs() {
        let settings = Sampling {
            repetition_penalty: 2.0,
            ..Sampling::default()
        };
        let mut sampler = Sampler::new(settings);
        assert_eq!(sampler.choose(&[3.0, 2.0], [&[], &[0]]), 1);
        assert_eq!(sampler.choose(&[-1.0, -1.5], [&[0], &[]]), 1);
    }

    #[test]
    fn bad_values_are_named() {
        for (settings, field) in [
            (
                Sampling {
                    temperature: -1.0,
                    ..Sampling::default()
                },
                "temperature",
            ),
            (
                Sampling {
                    top_p: 0.0,
                    ..Sampling::default()
                },
                "top_p",
            ),
            (
                Sampling {
                    min_p: f32::NAN,
                    ..Sampling::default()
                },
                "min_p",
            ),
            (
                Sampling {
                    repetition_penalty: 0.0,
                    ..Sampling::default()
                },
                "repetition_penalty",
            ),
        ] {
            assert!(settings.validate().unwrap_err().to_string().contains(field));
        }
    }
}
