//! A linear layer and its transpose in f32, whatever its weights are kept in: the reference, and what a
//! gradient needs.
//!
//! `y = x Wᵀ + bias` and, of the output's gradient, `dx += dy W`. A task owns 32 outputs of all rows. It
//! goes through the inner dimension in parts: the weights of a part are widened into a buffer that stays
//! in the cache, the outputs side by side, and for six rows at a time the sums of its outputs are added up
//! in registers: of all 32 where registers are 512 bits wide, else of 16. A sum in a register is of 64 products,
//! so that the rounding grows little with the width of the layer. The order is fixed, so neither the number of
//! threads nor the rows beside it change a bit of a row.

use std::cell::RefCell;
use std::ops::Range;

use super::{Linear, Weights, widen_f16};
use crate::dispatch::{Isa, isa};
use crate::packed::{BLOCK, PANEL, Shared};
use crate::pool;

/// Outputs of a task.
const WIDTH: usize = BLOCK;
/// Outputs in a register or two, half of a task's, and the rows that are summed together.
const LANES: usize = PANEL;
const ROWS: usize = 6;
/// Values of the inner dimension that are widened at once, whole blocks of them: 64 KiB.
const INNER: usize = 512;
/// Products that are added up one after the other.
const CHAIN: usize = 64;

thread_local! {
    /// Widened weights and sums of a task.
    static BUFFERS: RefCell<(Vec<f32>, Vec<f32>)> = RefCell::default();
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
        let (Weights::Packed(packed) | Weights::Exact(packed)) = &self.weights else {
            return self.forward(x, n, bias, y);
        };
        let (k, m) = (self.in_features, self.out_features);
        assert_eq!(x.len(), n * k, "x is [n, in_features]");
        assert_eq!(y.len(), n * m, "y is [n, out_features]");
        assert!(bias.is_none_or(|b| b.len() == m), "bias is [out_features]");
        let widen = |outputs: Range<usize>, inner: Range<usize>, out: &mut [f32]| {
            let panels = outputs.start / PANEL..outputs.end.div_ceil(PANEL);
            let blocks = inner.start / BLOCK..inner.end / BLOCK;
            for (out, block) in out.chunks_exact_mut(BLOCK * WIDTH).zip(blocks) {
                for (at, panel) in panels.clone().enumerate() {
                    packed.columns(panel, block, &mut out[at * PANEL..]);
                }
            }
        };
        products(x, n, widen, y, |y, o, sum| {
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
        let widen = |columns, rows, out: &mut [f32]| self.rows(rows, columns, out);
        products(dy, n, widen, dx, |dx, _, sum| *dx += sum);
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
            Weights::Packed(p) | Weights::Exact(p) => {
                let panels = rows.start / PANEL..rows.end.div_ceil(PANEL);
                for (out, panel) in out.chunks_mut(PANEL * WIDTH).zip(panels) {
                    p.rows(panel, columns.start / BLOCK, out);
                }
            }
        }
    }
}

/// Calls `finish` with each value of `y`, `[n, outputs]`, its output and its sum in `a w`: `a` is `[n, inner]`,
/// and of the weights `w`, `[inner, outputs]`, `widen` writes a task's outputs and a part of the inner
/// dimension, `[INNER, WIDTH]`; what it leaves does not count.
fn products(
    a: &[f32],
    n: usize,
    widen: impl Fn(Range<usize>, Range<usize>, &mut [f32]) + Sync,
    y: &mut [f32],
    finish: impl Fn(&mut f32, usize, f32) + Sync,
) {
    if n == 0 {
        return;
    }
    let (inner, outputs) = (a.len() / n, y.len() / n);
    let y = Shared::new(y);
    pool::for_each(outputs.div_ceil(WIDTH), |task| {
        let of = task * WIDTH..outputs.min((task + 1) * WIDTH);
        BUFFERS.with_borrow_mut(|(w, sums)| {
            w.resize(INNER * WIDTH, 0.0);
            sums.clear();
            sums.resize(n * WIDTH, 0.0);
            for from in (0..inner).step_by(INNER) {
                let part = from..inner.min(from + INNER);
                widen(of.clone(), part.clone(), w);
                let w = &w[..part.len() * WIDTH];
                for (tile, sums) in sums.chunks_mut(ROWS * WIDTH).enumerate() {
                    let rows = sums.len() / WIDTH;
                    let row = |t: usize| &a[(tile * ROWS + t) * inner..][part.clone()];
                    match rows {
                        1 => add_products([row(0)], w, sums),
                        // A tile that is not full repeats its last row.
                        _ => add_products::<ROWS>(
                            std::array::from_fn(|t| row(t.min(rows - 1))),
                            w,
                            sums,
                        ),
                    }
                }
            }
            for (t, sums) in sums.chunks_exact(WIDTH).enumerate() {
                // SAFETY: in bounds as `t < n`; the columns are this task's.
                let y = unsafe { y.part(t * outputs + of.start, of.len()) };
                for ((y, o), sum) in y.iter_mut().zip(of.clone()).zip(sums) {
                    finish(y, o, *sum);
                }
            }
        });
    });
}

/// `sums[t] += sum_i a[t][i] w[i]` for the rows that `sums`, `[_, WIDTH]`, has, with the `i`-th weights at
/// `w[i * WIDTH ..]`.
fn add_products<const R: usize>(a: [&[f32]; R], w: &[f32], sums: &mut [f32]) {
    let n = a[0].len();
    for (from, w) in (0..n).step_by(CHAIN).zip(w.chunks(CHAIN * WIDTH)) {
        add_chain(a.map(|a| &a[from..n.min(from + CHAIN)]), w, sums);
    }
}

/// The same, of at most `CHAIN` products a sum, added up before they are added to `sums`.
fn add_chain<const R: usize>(a: [&[f32]; R], w: &[f32], sums: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if isa() >= Isa::Avx512 {
        // SAFETY: `isa` returns Avx512 or more only where the processor has these features.
        return unsafe { add_chain_avx512(a, w, sums) };
    }
    for lanes in [0, LANES] {
        let mut tile = [[0.0; LANES]; R];
        add_half(a, &w[lanes..], &mut tile);
        for (tile, sums) in tile.iter().zip(sums.chunks_exact_mut(WIDTH)) {
            for (sum, more) in sums[lanes..].iter_mut().zip(tile) {
                *sum += more;
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn add_chain_avx512<const R: usize>(a: [&[f32]; R], w: &[f32], sums: &mut [f32]) {
    use std::arch::x86_64::{
        __m512, _mm512_add_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps,
        _mm512_storeu_ps,
    };
    let n = a[0].len();
    let a = a.map(|a| &a[..n]);
    let mut acc = [[_mm512_setzero_ps(); 2]; R];
    let halves = |row: &[f32]| -> [__m512; 2] {
        let (row, _) = row.as_chunks::<LANES>();
        // SAFETY: a chunk is a register's 16 values.
        std::array::from_fn(|half| unsafe { _mm512_loadu_ps(row[half].as_ptr()) })
    };
    for (i, w) in (0..n).zip(w.chunks_exact(WIDTH)) {
        let w = halves(w);
        for t in 0..R {
            let a = _mm512_set1_ps(a[t][i]);
            for half in 0..2 {
                acc[t][half] = _mm512_fmadd_ps(a, w[half], acc[t][half]);
            }
        }
    }
    for (acc, sums) in acc.iter().zip(sums.chunks_exact_mut(WIDTH)) {
        let before = halves(sums);
        let (sums, _) = sums.as_chunks_mut::<LANES>();
        for half in 0..2 {
            let sum = _mm512_add_ps(before[half], acc[half]);
            // SAFETY: a chunk is a register's 16 values.
            unsafe { _mm512_storeu_ps(sums[half].as_mut_ptr(), sum) };
        }
    }
}

/// The same for half of the outputs.
fn add_half<const R: usize>(a: [&[f32]; R], w: &[f32], sums: &mut [[f32; LANES]; R]) {
    #[cfg(target_arch = "x86_64")]
    if isa() >= Isa::Avx2 {
        // SAFETY: `isa` returns Avx2 or more only where the processor has these features.
        return unsafe { add_half_avx2(a, w, sums) };
    }
    add_half_body::<R, false>(a, w, sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn add_half_avx2<const R: usize>(a: [&[f32]; R], w: &[f32], sums: &mut [[f32; LANES]; R]) {
    add_half_body::<R, true>(a, w, sums);
}

#[inline(always)]
fn add_half_body<const R: usize, const FMA: bool>(
    a: [&[f32]; R],
    w: &[f32],
    sums: &mut [[f32; LANES]; R],
) {
    // Fixed lengths only: these sums must stay in registers.
    let mut acc = *sums;
    let n = a[0].len();
    let a = a.map(|a| &a[..n]);
    for (i, w) in (0..n).zip(w.chunks(WIDTH)) {
        let Some(w) = w.first_chunk::<LANES>() else {
            break; // the last weights are whole
        };
        for t in 0..R {
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
