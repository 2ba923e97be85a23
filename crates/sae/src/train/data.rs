//! The rows that a training run reads: a matrix in memory, scaled, without outliers, shuffled.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// Raw rows, `[n, d_model]`.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// The values.
    pub data: &'a [f32],
    /// Width of a row.
    pub d_model: usize,
}

/// Rows as training sees them.
#[derive(Debug)]
pub struct ScaledRows<'a> {
    rows: Rows<'a>,
    kept: Vec<u32>,
    scale: f32,
    seed: u64,
    epoch: Option<(u64, Vec<u32>)>,
}

impl Rows<'_> {
    /// The norm of each row, `[n]`.
    fn norms(&self) -> Vec<f32> {
        let norm = |r: &[f32]| r.iter().map(|v| v * v).sum::<f32>().sqrt();
        self.data
            .par_chunks_exact(self.d_model.max(1))
            .map(norm)
            .collect()
    }

    /// Indices of the rows with a norm of at most `outlier` medians. The others are attention sinks:
    /// few, of enormous norm, and in a sum of squares they outweigh all the rest.
    pub fn inliers(&self, outlier: f32) -> Vec<u32> {
        inliers(&self.norms(), outlier)
    }
}

fn inliers(norms: &[f32], outlier: f32) -> Vec<u32> {
    let mut sorted = norms.to_vec();
    sorted.sort_unstable_by(f32::total_cmp);
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or(1.0);
    (0..norms.len() as u32)
        .filter(|&i| norms[i as usize] <= outlier * median)
        .collect()
}

impl<'a> ScaledRows<'a> {
    /// Leaves out rows with a norm above `outlier` medians, and finds the scale.
    pub fn new(rows: Rows<'a>, outlier: f32, seed: u64) -> Self {
        let d = rows.d_model.max(1);
        let norms = rows.norms();
        let kept = inliers(&norms, outlier);
        let sum: f64 = kept.iter().map(|&i| f64::from(norms[i as usize])).sum();
        let mean = sum / kept.len().max(1) as f64;
        let scale = if mean > 0.0 {
            ((d as f64).sqrt() / mean) as f32
        } else {
            1.0
        };
        Self {
            rows,
            kept,
            scale,
            seed,
            epoch: None,
        }
    }

    /// Rows that are kept.
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// What rows are multiplied by.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// The mean of the scaled rows, `[d_model]`.
    pub fn mean(&self) -> Vec<f32> {
        let d = self.rows.d_model;
        let mut sum = vec![0.0f64; d];
        for &i in &self.kept {
            let row = &self.rows.data[i as usize * d..(i as usize + 1) * d];
            for (s, v) in sum.iter_mut().zip(row) {
                *s += f64::from(*v);
            }
        }
        let by = f64::from(self.scale) / self.kept.len().max(1) as f64;
        sum.iter().map(|s| (s * by) as f32).collect()
    }

    /// The batch of step `step`, scaled: rows in an order that is shuffled anew for each epoch and
    /// depends on nothing but the seed, so that a resumed run reads the same rows.
    ///
    /// # Shapes
    /// `out` becomes `[batch, d_model]`.
    pub fn batch(&mut self, step: usize, batch: usize, out: &mut Vec<f32>) {
        let d = self.rows.d_model;
        let per_epoch = (self.kept.len() / batch).max(1);
        let (epoch, at) = ((step / per_epoch) as u64, step % per_epoch);
        if self.epoch.as_ref().is_none_or(|e| e.0 != epoch) {
            let mut order = self.kept.clone();
            let seed = self.seed ^ epoch.wrapping_mul(0x9E37_79B9_7F4A_7C15);
            order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
            self.epoch = Some((epoch, order));
        }
        out.clear();
        let order = self.epoch.iter().flat_map(|e| &e.1);
        for &i in order.skip(at * batch).take(batch) {
            let row = &self.rows.data[i as usize * d..(i as usize + 1) * d];
            out.extend(row.iter().map(|v| v * self.scale));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outliers_go_and_every_row_comes_once_an_epoch() {
        let mut data: Vec<f32> = (1..=8).flat_map(|i| [i as f32, 0.0]).collect();
        data[6] = 1000.0; // the fourth row
        let mut rows = ScaledRows::new(
            Rows {
                data: &data,
                d_model: 2,
            },
            10.0,
            1,
        );
        assert_eq!(rows.len(), 7);
        let mean_norm = (1.0 + 2.0 + 3.0 + 5.0 + 6.0 + 7.0 + 8.0) / 7.0;
        assert!((rows.scale() - 2f32.sqrt() / mean_norm).abs() < 1e-6);
        let mut seen = Vec::new();
        let mut out = Vec::new();
        for step in 0..3 {
            rows.batch(step, 2, &mut out);
            seen.extend(out.chunks(2).map(|r| (r[0] / rows.scale()).round() as i32));
        }
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 6);
        assert!(!seen.contains(&1000));
        // the same step gives the same rows, whatever came between
        let (mut a, mut b) = (Vec::new(), Vec::new());
        rows.batch(4, 2, &mut a);
        rows.batch(0, 2, &mut b);
        rows.batch(4, 2, &mut b);
        assert_eq!(a, b);
    }
}
