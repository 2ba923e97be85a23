//! The rows that a training run reads: a matrix in memory, scaled, without outliers, shuffled.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Raw rows, `[n, d_model]`.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// The values.
    pub data: &'a [f32],
    /// Width of a row.
    pub d_model: usize,
}

/// What is done to all rows of a run, by its first ones.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Input {
    /// Rows that were looked at.
    pub rows: usize,
    /// Those of them that are no outliers.
    pub kept: usize,
    /// What rows are multiplied by: `sqrt(d_model)` over the mean norm of those that are kept.
    pub scale: f32,
    /// The largest norm that is no outlier's, before scaling.
    pub limit: f32,
}

/// Rows as training sees them.
#[derive(Debug)]
pub struct ScaledRows<'a> {
    rows: Rows<'a>,
    kept: Vec<u32>,
    scale: f32,
    seed: u64,
    pass: Option<(usize, Vec<u32>)>,
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
        let norms = self.norms();
        within(&norms, outlier * median(&norms))
    }
}

fn median(norms: &[f32]) -> f32 {
    let mut sorted = norms.to_vec();
    sorted.sort_unstable_by(f32::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(1.0)
}

/// Indices of the norms up to `limit`.
fn within(norms: &[f32], limit: f32) -> Vec<u32> {
    (0..norms.len() as u32)
        .filter(|&i| norms[i as usize] <= limit)
        .collect()
}

impl Input {
    /// Of these rows: those with a norm above `outlier` medians are outliers.
    pub fn of(rows: Rows<'_>, outlier: f32) -> Self {
        let norms = rows.norms();
        let limit = outlier * median(&norms);
        let kept = within(&norms, limit);
        let sum: f64 = kept.iter().map(|&i| f64::from(norms[i as usize])).sum();
        let mean = sum / kept.len().max(1) as f64;
        let scale = if mean > 0.0 {
            ((rows.d_model as f64).sqrt() / mean) as f32
        } else {
            1.0
        };
        Self {
            rows: norms.len(),
            kept: kept.len(),
            scale,
            limit,
        }
    }
}

impl<'a> ScaledRows<'a> {
    /// Rows of a run of which `input` is known; `seed` is of their order.
    pub fn new(rows: Rows<'a>, input: &Input, seed: u64) -> Self {
        Self {
            kept: within(&rows.norms(), input.limit),
            rows,
            scale: input.scale,
            seed,
            pass: None,
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

    /// The batch number `at` of `batch` rows in pass `pass` over these rows, scaled: in an order that is
    /// shuffled anew for each pass and depends on nothing but the seed, so that a resumed run reads the
    /// same rows. Behind the last row comes the first again; of no rows there is no batch.
    ///
    /// # Shapes
    /// `out` becomes `[batch, d_model]`.
    pub fn batch(&mut self, pass: usize, at: usize, batch: usize, out: &mut Vec<f32>) {
        let d = self.rows.d_model;
        if self.pass.as_ref().is_none_or(|p| p.0 != pass) {
            let mut order = self.kept.clone();
            let seed = self.seed ^ (pass as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
            self.pass = Some((pass, order));
        }
        out.clear();
        let order = self.pass.iter().flat_map(|p| &p.1);
        let first = (at * batch).checked_rem(self.kept.len()).unwrap_or(0);
        for &i in order.cycle().skip(first).take(batch) {
            let row = &self.rows.data[i as usize * d..(i as usize + 1) * d];
            out.extend(row.iter().map(|v| v * self.scale));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outliers_go_and_every_row_comes_once_a_pass() {
        let mut data: Vec<f32> = (1..=8).flat_map(|i| [i as f32, 0.0]).collect();
        data[6] = 1000.0; // the fourth row
        let raw = Rows {
            data: &data,
            d_model: 2,
        };
        let input = Input::of(raw, 10.0);
        assert_eq!((input.rows, input.kept), (8, 7));
        let mut rows = ScaledRows::new(raw, &input, 1);
        assert_eq!(rows.len(), 7);
        let mean_norm = (1.0 + 2.0 + 3.0 + 5.0 + 6.0 + 7.0 + 8.0) / 7.0;
        assert!((rows.scale() - 2f32.sqrt() / mean_norm).abs() < 1e-6);
        let mut seen = Vec::new();
        let mut out = Vec::new();
        let scale = rows.scale();
        let read = |out: &[f32]| -> Vec<i32> {
            let values = out.chunks(2).map(|r| (r[0] / scale).round() as i32);
            values.collect()
        };
        for at in 0..3 {
            rows.batch(0, at, 2, &mut out);
            seen.extend(read(&out));
        }
        // behind the seventh comes the first again
        rows.batch(0, 3, 2, &mut out);
        assert_eq!(read(&out)[1], seen[0]);
        seen.push(read(&out)[0]);
        seen.sort_unstable();
        assert_eq!(seen, [1, 2, 3, 5, 6, 7, 8]);
        // the same place gives the same rows, whatever came between, and another pass others
        let (mut a, mut b) = (Vec::new(), Vec::new());
        rows.batch(2, 0, 4, &mut a);
        rows.batch(0, 0, 4, &mut b);
        assert_ne!(a, b);
        rows.batch(2, 0, 4, &mut b);
        assert_eq!(a, b);
        // rows that come later are scaled and left out by what the first were
        let later = Rows {
            data: &[100.0, 0.0, 4.0, 0.0],
            d_model: 2,
        };
        let later = ScaledRows::new(later, &input, 1);
        assert_eq!((later.len(), later.scale()), (1, rows.scale()));
    }

    #[test]
    fn of_no_rows_there_is_no_batch() {
        let none = Rows {
            data: &[],
            d_model: 2,
        };
        let mut rows = ScaledRows::new(none, &Input::of(none, 10.0), 1);
        let mut out = vec![1.0];
        rows.batch(0, 3, 2, &mut out);
        assert!(out.is_empty() && rows.is_empty());
    }
}
