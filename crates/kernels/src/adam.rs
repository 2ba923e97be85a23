//! One Adam step (1412.6980) on a slice.
//!
//! ```text
//! m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2
//! w = w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
//! ```
//!
//! The corrections are taken into the rate and `eps`, so that an element costs one root and one division.
//! Compiled for AVX2 and AVX-512 besides, with the same bits.

use crate::dispatch::{Isa, isa};

/// Decay rates and the constant of the denominator.
const BETAS: (f32, f32) = (0.9, 0.999);
const EPS: f32 = 1e-8;

/// A step with its bias corrections.
#[derive(Debug, Clone, Copy)]
pub struct Adam {
    rate: f32,
    eps: f32,
}

impl Adam {
    /// The decay rate of the first moment.
    pub const BETA1: f32 = BETAS.0;

    /// The step number `step`, counted from 1.
    pub fn new(lr: f64, step: usize) -> Self {
        let correct = |beta: f32| 1.0 - f64::from(beta).powi(step.min(1 << 20) as i32);
        let root = correct(BETAS.1).sqrt();
        Self {
            rate: (lr / correct(BETAS.0) * root) as f32,
            eps: (f64::from(EPS) * root) as f32,
        }
    }

    /// Updates the weights and both moments with the gradient `g`.
    ///
    /// # Panics
    /// If the slices differ in length.
    pub fn update(self, w: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]) {
        #[cfg(target_arch = "x86_64")]
        if isa() >= Isa::Avx512 {
            // SAFETY: `isa` returns a set only where the processor has it.
            return unsafe { update_avx512(self, w, m, v, g) };
        } else if isa() >= Isa::Avx2 {
            // SAFETY: as above.
            return unsafe { update_avx2(self, w, m, v, g) };
        }
        update_body(self, w, m, v, g);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
fn update_avx512(step: Adam, w: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]) {
    update_body(step, w, m, v, g);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn update_avx2(step: Adam, w: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]) {
    update_body(step, w, m, v, g);
}

#[inline(always)]
fn update_body(step: Adam, w: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]) {
    assert!(w.len() == g.len() && m.len() == g.len() && v.len() == g.len());
    for (((w, m), v), g) in w.iter_mut().zip(m).zip(v).zip(g) {
        *m = BETAS.0 * *m + (1.0 - BETAS.0) * g;
        *v = BETAS.1 * *v + (1.0 - BETAS.1) * g * g;
        *w -= step.rate * *m / (v.sqrt() + step.eps);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::on_every_isa;

    #[test]
    fn two_steps_of_the_definition() {
        let gradients = [[0.5f32, -2.0, 0.0], [0.25, 1.0, 1e-3]];
        let mut seen: Vec<Vec<u32>> = Vec::new();
        on_every_isa(|_| {
            let (mut w, mut m, mut v) = ([1.0f32, 0.0, -1.0], [0.0f32; 3], [0.0f32; 3]);
            let mut exact = [(1.0f64, 0.0f64, 0.0f64), (0.0, 0.0, 0.0), (-1.0, 0.0, 0.0)];
            for (t, g) in gradients.iter().enumerate() {
                Adam::new(0.1, t + 1).update(&mut w, &mut m, &mut v, g);
                for (e, g) in exact.iter_mut().zip(g) {
                    let (g, t) = (f64::from(*g), t as i32 + 1);
                    e.1 = 0.9 * e.1 + 0.1 * g;
                    e.2 = 0.999 * e.2 + 0.001 * g * g;
                    let corrected = (e.2 / (1.0 - 0.999f64.powi(t))).sqrt() + 1e-8;
                    e.0 -= 0.1 * e.1 / (1.0 - 0.9f64.powi(t)) / corrected;
                }
            }
            for (w, e) in w.iter().zip(exact) {
                assert!((f64::from(*w) - e.0).abs() < 1e-5, "{w} against {}", e.0);
            }
            seen.push(w.iter().map(|w| w.to_bits()).collect());
        });
        assert!(seen.iter().all(|s| *s == seen[0]));
    }
}
