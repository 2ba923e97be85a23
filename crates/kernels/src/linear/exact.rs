//! A linear layer and its transpose in f32, whatever its weights are kept in: what a gradient needs.
//!
//! `y = x Wᵀ + bias` and, of the output's gradient, `dx += dy W`. A task owns 32 outputs of all rows. It
//! goes through the inner dimension in parts: the weights of a part are widened into a buffer that stays
//! in the cache, the outputs side by side, and for six rows at a time the sums of 16 outputs are added up
//! in registers. The order is fixed, so neither the number of threads nor the rows beside it change a
//! bit of a row.

use std::cell::RefCell;
use std::ops::Range;

use super::{Linear, Weights, widen_f16};
use crate::dispatch::{Isa, isa};
use crate::packed::{BLOCK, PANEL};
use crate::pool;

/// Outputs of a task.
const WIDTH: usize = BLOCK;
/// Outputs that are summed together, half of a task's, for this many rows.
const LANES: usize = PANEL;
const ROWS: usize = 6;
/// Values of the inner dimension that are widened at once, whole blocks of them: 64 KiB.
const INNER: usize = 512;

/// Sums of a tile.
type Sums = [[f32; LANES]; ROWS];

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
        let Some(packed) = self.packed() else {
            return self.forward(x, n, bias, y);
        };
        let (k, m) = (self.in_features, self.out_features);
        assert_eq!(x.len(), n * k, "x is [n, in_features]");
        assert_eq!(y.len(), n * m, "y is [n, out_features]");
        assert!(bias.is_none_or(|b| b.len() == m), "bias is [out_features]");
        let sums = products(x, n, m, |outputs, inner, out| {
            let panels = outputs.start / PANEL..outputs.end.div_ceil(PANEL);
            let blocks = inner.start / BLOCK..inner.end / BLOCK;
            for (out, block) in out.chunks_exact_mut(BLOCK * WIDTH).zip(blocks) {
                for (at, panel) in panels.clone().enumerate() {
                    packed.columns(panel, block, &mut out[at * PANEL..]);
                }
            }
        });
        each_output(&sums, n, m, y, |y, o, sum| {
            *y = sum + bias.map_or(0.0, |b| b[o]);
        });
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
        let sums = products(dy, n, k, |columns, rows, out| self.rows(rows, columns, out));
        each_output(&sums, n, k, dx, |dx, _, sum| *dx += sum);
    }

    /// Writes `rows` of a task's `columns` to `out`, `[INNER, WIDTH]`.
    fn rows(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        fn each<T: Copy>(
            w: &[T],
            k: usize,
            rows: Range<usize>,
            columns: Range<usize>,
            out: &mut [f32],
            widen: impl Fn(T) -> f32,
        ) {
            for (row, out) in rows.zip(out.chunks_exact_mut(WIDTH)) {
                let w = &w[row * k + columns.start..row * k + columns.end];
                out.iter_mut().zip(w).for_each(|(o, w)| *o = widen(*w));
            }
        }
        let k = self.in_features;
        match &self.weights {
            Weights::F32(w) => each(w, k, rows, columns, out, |w| w),
            Weights::F16(w) => each(w, k, rows, columns, out, widen_f16),
            Weights::Bf16(w) => each(w, k, rows, columns, out, |w| {
                f32::from_bits(u32::from(w) << 16)
            }),
            Weights::Packed(p) => {
                let panels = rows.start / PANEL..rows.end.div_ceil(PANEL);
                for (out, panel) in out.chunks_mut(PANEL * WIDTH).zip(panels) {
                    p.rows(panel, columns.start / BLOCK, out);
                }
            }
        }
    }
}

/// `sums = a w` with `a` `[n, inner]` and the weights `w` `[inner, outputs]`, of which `widen` writes a
/// task's outputs and a part of the inner dimension, `[INNER, WIDTH]`; what it leaves does not count.
///
/// # Shapes
/// The result is `[tasks, n, WIDTH]`; see [`each_output`].
fn products(
    a: &[f32],
    n: usize,
    outputs: usize,
    widen: impl Fn(Range<usize>, Range<usize>, &mut [f32]) + Sync,
) -> Vec<f32> {
    if n == 0 {
        return Vec::new();
    }
    let inner = a.len() / n;
    let mut sums = vec![0.0; outputs.div_ceil(WIDTH) * n * WIDTH];
    pool::for_each_row(&mut sums, n * WIDTH, |task, sums| {
        let outputs = task * WIDTH..outputs.min((task + 1) * WIDTH);
        WIDENED.with_borrow_mut(|w| {
            for from in (0..inner).step_by(INNER) {
                let part = from..inner.min(from + INNER);
                w.resize(INNER * WIDTH, 0.0);
                widen(outputs.clone(), part.clone(), w);
                let w = &w[..part.len() * WIDTH];
                for (tile, sums) in sums.chunks_mut(ROWS * WIDTH).enumerate() {
                    let rows = sums.len() / WIDTH;
                    // A tile that is not full repeats its last row.
                    let a: [&[f32]; ROWS] = std::array::from_fn(|t| {
                        let row = tile * ROWS + t.min(rows - 1);
                        &a[row * inner..][part.clone()]
                    });
                    for lanes in [0, LANES] {
                        let mut tile = Sums::default();
                        for (tile, sums) in tile.iter_mut().zip(sums.chunks_exact(WIDTH)) {
                            tile.copy_from_slice(&sums[lanes..lanes + LANES]);
                        }
                        add_products(a, &w[lanes..], &mut tile);
                        for (tile, sums) in tile.iter().zip(sums.chunks_exact_mut(WIDTH)) {
                            sums[lanes..lanes + LANES].copy_from_slice(tile);
                        }
                    }
                }
            }
        });
    });
    sums
}

/// Calls `f` with each value of `y`, `[n, outputs]`, its output and its sum.
fn each_output(
    sums: &[f32],
    n: usize,
    outputs: usize,
    y: &mut [f32],
    f: impl Fn(&mut f32, usize, f32),
) {
    for (t, y) in y.chunks_exact_mut(outputs.max(1)).enumerate() {
        for (task, y) in y.chunks_mut(WIDTH).enumerate() {
            let sums = &sums[(task * n + t) * WIDTH..];
            for (at, (y, sum)) in y.iter_mut().zip(sums).enumerate() {
                f(y, task * WIDTH + at, *sum);
            }
        }
    }
}

/// `sums[t] += sum_i a[t][i] w[i]`, with the `i`-th weights at `w[i * WIDTH ..]`.
fn add_products(a: [&[f32]; ROWS], w: &[f32], sums: &mut Sums) {
    #[cfg(target_arch = "x86_64")]
    if isa() >= Isa::Avx512 {
        // SAFETY: `isa` returns Avx512 or more only where the processor has these features.
        return unsafe { add_products_avx512(a, w, sums) };
    } else if isa() >= Isa::Avx2 {
        // SAFETY: as above.
        return unsafe { add_products_avx2(a, w, sums) };
    }
    add_products_body::<false>(a, w, sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn add_products_avx512(a: [&[f32]; ROWS], w: &[f32], sums: &mut Sums) {
    add_products_body::<true>(a, w, sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn add_products_avx2(a: [&[f32]; ROWS], w: &[f32], sums: &mut Sums) {
    add_products_body::<true>(a, w, sums);
}

#[inline(always)]
fn add_products_body<const FMA: bool>(a: [&[f32]; ROWS], w: &[f32], sums: &mut Sums) {
    // Fixed lengths only: these sums must stay in registers.
    let mut acc = *sums;
    let n = a[0].len();
    let a = a.map(|a| &a[..n]);
    for (i, w) in (0..n).zip(w.chunks(WIDTH)) {
        let Some(w) = w.first_chunk::<LANES>() else {
            break; // the last weights are whole
        };
        for t in 0..ROWS {
            for lane in 0..LANES {
                let sum = &mut acc[t][lane];
                *sum = if FMA {
                    a[t][i].mul_add(w[lane], *sum)
                } else {
                    a[t][i] * w[lane] + *sum
                };
            }
        }
    }
    *sums = acc;
}
