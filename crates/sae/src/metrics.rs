//! How good a reconstruction is: FVU, L0, dead latents, density.

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
}

/// Accumulates [`Quality`] over batches; sums are f64.
#[derive(Debug, Clone)]
pub struct QualityMeter {
    n: usize,
    error: f64,
    square: f64,
    sum: Vec<f64>,
    active: u64,
    alive: Vec<bool>,
}

impl QualityMeter {
    /// An empty meter.
    pub fn new(d_model: usize, d_sae: usize) -> Self {
        Self {
            n: 0,
            error: 0.0,
            square: 0.0,
            sum: vec![0.0; d_model],
            active: 0,
            alive: vec![false; d_sae],
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
        for (a, b) in x.iter().zip(x_hat) {
            self.error += (f64::from(*a) - f64::from(*b)).powi(2);
        }
        for (&j, &v) in codes.idx.iter().zip(&codes.val) {
            if v > 0.0 {
                self.active += 1;
                self.alive[j as usize] = true;
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
            l0: self.active as f64 / n,
            dead: self.alive.iter().filter(|a| !**a).count() as f64
                / self.alive.len().max(1) as f64,
        }
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
    fn controls() {
        assert_eq!(measure(&X).fvu, 0.0);
        // the mean explains nothing
        assert!((measure(&[2.0, 1.0, 2.0, 1.0, 2.0, 1.0]).fvu - 1.0).abs() < 1e-12);
        // zero is worse than the mean: 14 + 9 of squares over 8
        assert!((measure(&[0.0; 6]).fvu - 23.0 / 8.0).abs() < 1e-12);
    }
}
