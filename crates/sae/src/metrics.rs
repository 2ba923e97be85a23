//! How good a reconstruction is.
//!
//! | figure | over `n` rows `x` with reconstructions `x_hat` |
//! | --- | --- |
//! | FVU | `sum |x - x_hat|^2 / sum |x - mean|^2`, the mean over all rows; FVE is `1 - FVU` |
//! | L0 | mean number of active latents a row |
//! | dead | share of latents that are never active |
//! | cosine | mean of `x . x_hat / (|x| |x_hat|)` |
//! | density | share of the rows on which a latent is active |
//! | CE score | `(CE_ablated - CE_sae) / (CE_ablated - CE)`, SAEBench's `ce_loss_score` |
//! | KL score | `(KL_ablated - KL_sae) / KL_ablated`, SAEBench's `kl_div_score` |
//!
//! An SAE that reconstructs exactly has FVU 0 and scores 1, one that gives what ablation gives has
//! scores 0, and the mean of all rows has FVU 1.

use crate::sae::{Codes, Sae};

/// Quality over a whole evaluation set.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Quality {
    /// Rows counted.
    pub n_tokens: usize,
    /// Fraction of variance unexplained: `sum |x - x_hat|^2 / sum |x - mean|^2`, with the mean over
    /// the whole set.
    pub fvu: f64,
    /// Mean number of active latents a row.
    pub l0: f64,
    /// Fraction of latents that are never active.
    pub dead: f64,
    /// Mean cosine of rows and reconstructions; a row or reconstruction of zeros counts as 0.
    pub cosine: f64,
}

/// How much of what an ablation costs is recovered by a reconstruction: 1 if `sae` is as good as
/// `clean`, 0 if it is as bad as `ablated`, below 0 if it is worse. For the KL divergence `clean` is 0.
/// Not a number where the ablation costs nothing.
pub fn recovered(clean: f64, sae: f64, ablated: f64) -> f64 {
    (ablated - sae) / (ablated - clean)
}

/// Latents by density: `[low, high)` and how many are in it, half a decade each from `1e-6` on. Sparser
/// ones are in the first; those that are never active are in none.
pub type Histogram = Vec<(f64, f64, usize)>;

/// Accumulates [`Quality`] over batches; sums are f64.
#[derive(Debug, Clone)]
pub struct QualityMeter {
    n: usize,
    error: f64,
    square: f64,
    sum: Vec<f64>,
    cosine: f64,
    /// Rows on which each latent is active.
    counts: Vec<u64>,
}

impl QualityMeter {
    /// An empty meter.
    pub fn new(d_model: usize, d_sae: usize) -> Self {
        Self {
            n: 0,
            error: 0.0,
            square: 0.0,
            sum: vec![0.0; d_model],
            cosine: 0.0,
            counts: vec![0; d_sae],
        }
    }

    /// Adds the rows `x` and their reconstructions.
    ///
    /// # Shapes
    /// `x` and `x_hat` are `[codes.n, d_model]`.
    pub fn add(&mut self, x: &[f32], x_hat: &[f32], codes: &Codes) {
        for row in x.chunks_exact(self.sum.len()) {
            for (s, v) in self.sum.iter_mut().zip(row) {
                *s += f64::from(*v);
                self.square += f64::from(*v) * f64::from(*v);
            }
        }
        let d = self.sum.len();
        for (x, x_hat) in x.chunks_exact(d).zip(x_hat.chunks_exact(d)) {
            let (mut xx, mut xy, mut yy) = (0.0, 0.0, 0.0);
            for (a, b) in x.iter().zip(x_hat) {
                let (a, b) = (f64::from(*a), f64::from(*b));
                self.error += (a - b).powi(2);
                (xx, xy, yy) = (xx + a * a, xy + a * b, yy + b * b);
            }
            if xx > 0.0 && yy > 0.0 {
                self.cosine += xy / (xx * yy).sqrt();
            }
        }
        for (&j, &v) in codes.idx.iter().zip(&codes.val) {
            if v > 0.0 {
                self.counts[j as usize] += 1;
            }
        }
        self.n += codes.n;
    }

    /// Encodes, decodes and adds.
    pub fn add_rows(&mut self, sae: &Sae, x: &[f32]) {
        let codes = sae.encode(x, x.len() / sae.d_model());
        let mut x_hat = vec![0.0; x.len()];
        sae.reconstruct(x, &codes, &mut x_hat);
        self.add(x, &x_hat, &codes);
    }

    /// The figures so far.
    pub fn quality(&self) -> Quality {
        let n = self.n.max(1) as f64;
        let mean_square: f64 = self.sum.iter().map(|s| s * s).sum::<f64>() / n;
        Quality {
            n_tokens: self.n,
            fvu: self.error / (self.square - mean_square),
            l0: self.counts.iter().sum::<u64>() as f64 / n,
            dead: self.counts.iter().filter(|c| **c == 0).count() as f64
                / self.counts.len().max(1) as f64,
            cosine: self.cosine / n,
        }
    }

    /// Share of the rows on which each latent is active, `[d_sae]`.
    pub fn density(&self) -> Vec<f64> {
        let n = self.n.max(1) as f64;
        self.counts.iter().map(|c| *c as f64 / n).collect()
    }

    /// The latents that are ever active, by density.
    pub fn histogram(&self) -> Histogram {
        const BINS: usize = 12;
        let edge = |i: usize| 10f64.powf(i as f64 / 2.0 - 6.0);
        let mut bins: Histogram = (0..BINS).map(|i| (edge(i), edge(i + 1), 0)).collect();
        for density in self.density().into_iter().filter(|d| *d > 0.0) {
            let at = (0..BINS - 1).find(|i| density < edge(i + 1));
            bins[at.unwrap_or(BINS - 1)].2 += 1;
        }
        bins
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const X: [f32; 6] = [1.0, 0.0, 3.0, 0.0, 2.0, 3.0]; // mean (2, 1)

    fn measure(x_hat: &[f32]) -> Quality {
        let mut meter = QualityMeter::new(2, 4);
        let codes = Codes {
            n: 3,
            k: 2,
            idx: vec![0, 1, 0, 2, 0, 1],
            val: vec![1.0, 0.0, 2.0, 1.0, 1.0, 0.0],
        };
        meter.add(&X, x_hat, &codes);
        meter.quality()
    }

    #[test]
    fn by_hand() {
        // |x - mean|^2: 1 + 1, 1 + 1, 0 + 4 = 8; errors: 0.25, 0, 1 = 1.25
        let q = measure(&[1.5, 0.0, 3.0, 0.0, 2.0, 2.0]);
        assert!((q.fvu - 1.25 / 8.0).abs() < 1e-12, "{}", q.fvu);
        // active: 1, 2, 1 of k = 2; latents 0 and 2 are alive
        assert!((q.l0 - 4.0 / 3.0).abs() < 1e-12);
        assert_eq!(q.dead, 0.5);
    }

    #[test]
    fn cosine_and_density_by_hand() {
        // (1, 0) and (1, 1), (3, 0) and zeros, (2, 3) and itself
        let mut meter = QualityMeter::new(2, 4);
        let codes = Codes {
            n: 3,
            k: 1,
            idx: vec![0, 2, 0],
            val: vec![1.0, 0.0, 2.0],
        };
        meter.add(&X, &[1.0, 1.0, 0.0, 0.0, 2.0, 3.0], &codes);
        let cosine = (0.5f64.sqrt() + 0.0 + 1.0) / 3.0;
        assert!((meter.quality().cosine - cosine).abs() < 1e-12);
        assert_eq!(meter.density(), [2.0 / 3.0, 0.0, 0.0, 0.0]);
        let bins = meter.histogram();
        assert_eq!(bins.iter().map(|b| b.2).sum::<usize>(), 1);
        let last = bins[bins.len() - 1];
        assert!(last.0 < 0.4 && last.1 == 1.0 && last.2 == 1, "{bins:?}");
    }

    #[test]
    fn recovered_by_hand() {
        assert_eq!(recovered(2.0, 3.0, 6.0), 0.75);
        assert_eq!(recovered(2.0, 2.0, 6.0), 1.0);
        assert_eq!(recovered(2.0, 6.0, 6.0), 0.0);
        assert!(recovered(2.0, 8.0, 6.0) < 0.0);
        assert!(recovered(2.0, 2.0, 2.0).is_nan());
    }

    /// An SAE whose reconstruction is the projection on the rows `v` around `mean`: each row and its
    /// opposite, rectified.
    fn projection(v: &[f32], mean: &[f32]) -> Sae {
        let w: Vec<f32> = v.iter().copied().chain(v.iter().map(|v| -v)).collect();
        let (d, m) = (mean.len(), w.len() / mean.len());
        let cfg = crate::SaeConfig {
            d_model: d,
            d_sae: m,
            k: m,
            hook_name: String::new(),
            model_name: String::new(),
        };
        let wiring = crate::arch::Wiring::default();
        let relu = crate::arch::Activation::Relu;
        Sae::of(cfg, relu, wiring, w.clone(), vec![0.0; m], w, mean.to_vec()).unwrap()
    }

    /// Identity, the first principal components, directions that are none, and the mean, in this order;
    /// the rows are made of known components, so the figures are known.
    #[test]
    fn controls_are_ordered_as_theory_says() {
        // Rows +- s_i u_i around a mean: the principal components are u_i, with shares s_i^2.
        let (a, b) = (0.6f32, 0.8f32);
        let u = [[a, b, 0.0], [-b, a, 0.0], [0.0, 0.0, 1.0]];
        let (sizes, mean) = ([3.0f32, 2.0, 1.0], [1.0f32, -2.0, 0.5]);
        let mut x = Vec::new();
        for (u, s) in u.iter().zip(sizes) {
            for sign in [-1.0, 1.0] {
                x.extend(u.iter().zip(mean).map(|(u, m)| sign * s * u + m));
            }
        }
        let fvu = |v: &[f32]| {
            let sae = projection(v, &mean);
            let mut meter = QualityMeter::new(3, sae.d_sae());
            meter.add_rows(&sae, &x);
            meter.quality().fvu
        };
        let close = |found: f64, expected: f64| {
            assert!(
                (found - expected).abs() < 1e-6,
                "{found} against {expected}"
            );
        };
        close(fvu(u.as_flattened()), 0.0);
        close(fvu(u[..2].as_flattened()), 1.0 / 14.0); // PCA of 2
        close(fvu(&u[0]), 5.0 / 14.0); // PCA of 1
        // A direction at random: what it explains is the mean of the shares, weighted by its squares.
        let random = [0.36f32, 0.48, 0.8];
        let along = |u: &[f32; 3]| f64::from(u.iter().zip(random).map(|(a, b)| a * b).sum::<f32>());
        let explained: f64 = u
            .iter()
            .zip(sizes)
            .map(|(u, s)| (f64::from(s) * along(u)).powi(2))
            .sum();
        close(fvu(&random), 1.0 - explained / 14.0);
        assert!(fvu(&random) > fvu(&u[0]) && fvu(&random) < 1.0);
        close(fvu(&[0.0; 3]), 1.0); // the mean
    }

    #[test]
    fn controls() {
        assert_eq!(measure(&X).fvu, 0.0);
        // the mean explains nothing
        assert!((measure(&[2.0, 1.0, 2.0, 1.0, 2.0, 1.0]).fvu - 1.0).abs() < 1e-12);
        // zero is worse than the mean: 14 + 9 of squares over 8
        assert!((measure(&[0.0; 6]).fvu - 23.0 / 8.0).abs() < 1e-12);
    }
}
