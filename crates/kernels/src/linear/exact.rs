//! A linear layer and its transpose in f32, whatever its weights are kept in: what a gradient needs.
//!
//! `y = x Wᵀ + bias` and, of the output's gradient, `dx += dy W`. Weights that are not f32 are widened a
//! part at a time into a buffer that stays in the cache, and multiplied by the dense f32 product. A task
//! owns some outputs of all rows and goes through the inner dimension in a fixed order, so the number of
//! threads changes no bit. Results lie with the rows inmost while tasks work on them; to turn them costs
//! nothing beside the product.

use std::cell::RefCell;
use std::ops::Range;

use super::{Linear, Weights, widen_f16};
use crate::gemm::{Matrix, matmul_with};
use crate::packed::BLOCK;
use crate::pool;

/// Outputs of a task: a multiple of the packed weights' panels and blocks.
const OUTPUTS: usize = 64;
/// Values of the inner dimension that are multiplied at once, a multiple as well: 256 KiB of weights.
const INNER: usize = 1024;

thread_local! {
    static WIDENED: RefCell<Vec<f32>> = RefCell::default();
}

impl Linear {
    /// `y = x Wᵀ + bias`. Weights that are not packed are multiplied as by [`Linear::forward`], to the
    /// last bit.
    ///
    /// # Shapes
    /// `x` is `[n, in_features]`, `bias` `[out_features]`, `y` `[n, out_features]`.
    ///
    /// # Panics
    /// If a slice has another length.
    pub fn forward_exact(&self, x: &[f32], n: usize, bias: Option<&[f32]>, y: &mut [f32]) {
        if self.packed().is_none() {
            return self.forward(x, n, bias, y);
        }
        let (k, m) = (self.in_features, self.out_features);
        assert_eq!(x.len(), n * k, "x is [n, in_features]");
        assert_eq!(y.len(), n * m, "y is [n, out_features]");
        assert!(bias.is_none_or(|b| b.len() == m), "bias is [out_features]");
        let mut turned = vec![0.0; m * n]; // [out_features, n]
        pool::for_each_row(&mut turned, OUTPUTS * n, |task, y| {
            let rows = task * OUTPUTS..task * OUTPUTS + y.len() / n;
            for columns in parts(k) {
                let x = Matrix {
                    data: &x[columns.start..],
                    row_stride: 1,
                    col_stride: k,
                };
                self.with_widened(rows.clone(), columns.clone(), |w| {
                    matmul_with(rows.len(), n, columns.len(), w, x, y, n, true, 1);
                });
            }
        });
        for (t, y) in y.chunks_exact_mut(m.max(1)).enumerate() {
            for (o, y) in y.iter_mut().enumerate() {
                *y = turned[o * n + t] + bias.map_or(0.0, |b| b[o]);
            }
        }
    }

    /// `dx += dy W`: adds the gradient with respect to the input, given that with respect to the
    /// output.
    ///
    /// # Shapes
    /// `dy` is `[n, out_features]`, `dx` `[n, in_features]`.
    ///
    /// # Panics
    /// If a slice has another length.
    pub fn backward(&self, dy: &[f32], n: usize, dx: &mut [f32]) {
        let (k, m) = (self.in_features, self.out_features);
        assert_eq!(dy.len(), n * m, "dy is [n, out_features]");
        assert_eq!(dx.len(), n * k, "dx is [n, in_features]");
        let mut turned = vec![0.0; k * n]; // [in_features, n]
        pool::for_each_row(&mut turned, OUTPUTS * n, |task, dx| {
            let columns = task * OUTPUTS..task * OUTPUTS + dx.len() / n;
            for rows in parts(m) {
                let dy = Matrix {
                    data: &dy[rows.start..],
                    row_stride: 1,
                    col_stride: m,
                };
                self.with_widened(rows.clone(), columns.clone(), |w| {
                    let w = Matrix {
                        row_stride: w.col_stride,
                        col_stride: w.row_stride,
                        ..w
                    };
                    matmul_with(columns.len(), n, rows.len(), w, dy, dx, n, true, 1);
                });
            }
        });
        for (t, dx) in dx.chunks_exact_mut(k.max(1)).enumerate() {
            for (i, dx) in dx.iter_mut().enumerate() {
                *dx += turned[i * n + t];
            }
        }
    }

    /// Calls `f` with a part of the weights in f32, `[rows.len(), columns.len()]`. Rows begin with a
    /// panel, columns with a block.
    pub(super) fn with_widened(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        f: impl FnOnce(Matrix<'_>),
    ) {
        let k = self.in_features;
        if let Weights::F32(w) = &self.weights {
            let data = &w[rows.start * k + columns.start..];
            return f(Matrix::row_major(data, k));
        }
        WIDENED.with_borrow_mut(|widened| {
            widened.resize(rows.len() * columns.len(), 0.0);
            let each = |words: &[u16], widen: fn(u16) -> f32, out: &mut [f32]| {
                for (row, out) in rows.clone().zip(out.chunks_exact_mut(columns.len())) {
                    let words = &words[row * k..][columns.clone()];
                    out.iter_mut().zip(words).for_each(|(o, w)| *o = widen(*w));
                }
            };
            match &self.weights {
                Weights::F32(_) => {}
                Weights::F16(w) => each(w, widen_f16, widened),
                Weights::Bf16(w) => each(w, |w| f32::from_bits(u32::from(w) << 16), widened),
                Weights::Packed(p) => {
                    let blocks = columns.start / BLOCK..columns.end / BLOCK;
                    p.dequantise(rows.clone(), blocks, widened);
                }
            }
            f(Matrix::row_major(widened, columns.len()));
        });
    }
}

/// `0 .. n` in parts of [`INNER`].
fn parts(n: usize) -> impl Iterator<Item = Range<usize>> {
    (0..n)
        .step_by(INNER)
        .map(move |from| from..(from + INNER).min(n))
}
