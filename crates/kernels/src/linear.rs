//! Linear layers: `y = x Wᵀ + bias`, with the weights packed once for this machine.
//!
//! | weights | [`Precision::Fast`] | [`Precision::F32`] |
//! | --- | --- | --- |
//! | Q4_0 ... Q8_0, Q2_K ... Q6_K | packed integers, activations in int8 blocks (see `packed.rs`) | packed, dequantised in the cache |
//! | F32, F16, BF16 | as in the file, widened in registers | f32 |
//!
//! A gradient needs the layer without the rounding of activations, and its transpose:
//! [`Linear::forward_exact`] and [`Linear::backward`].
//!
//! In every case the sum over the inner dimension runs in the same order for any number of
//! activation rows: a row's result has the same bits alone and in a batch.

mod exact;

use std::ops::Range;

use rayon::prelude::*;

use crate::dispatch::{Isa, isa};
use crate::error::KernelError;
use crate::packed::{Activations, BLOCK, Cut, Packed, Shared};
use crate::pool;
use crate::quant::{GgmlType, dequantize_row};

thread_local! {
    static ACTIVATIONS: std::cell::Cell<Activations> = std::cell::Cell::default();
}

/// Bytes of a matrix that are packed between two calls of `read`.
pub(crate) const READ_AHEAD: usize = 16 << 20;

/// Bytes of weights that a task keeps in its cache, and of rounded activations.
pub(crate) const L2_WEIGHTS: usize = 384 << 10;
pub(crate) const L2_ACTIVATIONS: usize = 1 << 20;

/// How products are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// Everything in f32: the reference.
    F32,
    /// Weights as in the file; int8 activations for quantised ones.
    #[default]
    Fast,
}

/// A linear layer's weights, packed.
#[derive(Debug)]
pub struct Linear {
    weights: Weights,
    out_features: usize,
    in_features: usize,
}

#[derive(Debug)]
enum Weights {
    F32(Vec<f32>),
    F16(Vec<u16>),
    Bf16(Vec<u16>),
    Packed(Packed),
    /// Packed, to be multiplied in f32.
    Exact(Packed),
}

impl Linear {
    /// Packs `out_features` rows of `in_features` values of type `ty`.
    ///
    /// `read` is called after each part of `bytes`: whoever maps a file can give back the memory of
    /// what was read so far, so that a matrix is never in memory twice.
    ///
    /// # Errors
    /// [`KernelError::Block`] or [`KernelError::Length`] if `bytes` is not such a matrix.
    pub fn from_rows(
        ty: GgmlType,
        bytes: &[u8],
        out_features: usize,
        in_features: usize,
        precision: Precision,
        mut read: impl FnMut(),
    ) -> Result<Self, KernelError> {
        let block = KernelError::Block {
            type_name: ty.name(),
            columns: in_features,
            block: ty.block_len(),
        };
        let row = ty.row_bytes(in_features).ok_or(block)?;
        let expected = row.saturating_mul(out_features);
        if bytes.len() != expected {
            return Err(KernelError::Length {
                what: "weights",
                found: bytes.len(),
                expected,
            });
        }
        let part = (READ_AHEAD / row.max(1)).max(1) * row.max(1);
        let mut words = || {
            let mut words = Vec::with_capacity(bytes.len() / 2);
            for bytes in bytes.chunks(part) {
                let pairs = bytes.as_chunks::<2>().0.iter();
                words.extend(pairs.map(|b| u16::from_le_bytes(*b)));
                read();
            }
            words
        };
        let weights = match (ty, precision) {
            (GgmlType::F16, Precision::Fast) => Weights::F16(words()),
            (GgmlType::BF16, Precision::Fast) => Weights::Bf16(words()),
            (ty, precision) if ty.is_quantised() && in_features.is_multiple_of(BLOCK) => {
                let packed = Packed::new(ty, bytes, out_features, in_features, read);
                match precision {
                    Precision::Fast => Weights::Packed(packed),
                    Precision::F32 => Weights::Exact(packed),
                }
            }
            _ => {
                let mut w = vec![0.0; out_features * in_features];
                let columns = in_features.max(1);
                let parts = w.chunks_mut(part / row.max(1) * columns);
                for (w, bytes) in parts.zip(bytes.chunks(part)) {
                    w.par_chunks_mut(columns)
                        .zip(bytes.par_chunks(row.max(1)))
                        .try_for_each(|(w, bytes)| dequantize_row(ty, bytes, w))?;
                    read();
                }
                Weights::F32(w)
            }
        };
        Ok(Self {
            weights,
            out_features,
            in_features,
        })
    }

    /// Takes f32 weights `[out_features, in_features]`.
    ///
    /// # Errors
    /// [`KernelError::Length`] if `w` has another length.
    pub fn from_f32(
        w: Vec<f32>,
        out_features: usize,
        in_features: usize,
    ) -> Result<Self, KernelError> {
        let expected = out_features.saturating_mul(in_features);
        if w.len() != expected {
            return Err(KernelError::Length {
                what: "weights",
                found: w.len(),
                expected,
            });
        }
        Ok(Self {
            weights: Weights::F32(w),
            out_features,
            in_features,
        })
    }

    /// Width of the input.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Width of the output.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Bytes that the packed weights take.
    pub fn bytes(&self) -> usize {
        match &self.weights {
            Weights::F32(w) => w.len() * 4,
            Weights::F16(w) | Weights::Bf16(w) => w.len() * 2,
            Weights::Packed(p) | Weights::Exact(p) => p.bytes(),
        }
    }

    /// `y = x Wᵀ + bias`.
    ///
    /// # Shapes
    /// `x` is `[n, in_features]`, `bias` `[out_features]`, `y` `[n, out_features]`.
    ///
    /// # Panics
    /// If a slice has another length.
    pub fn forward(&self, x: &[f32], n: usize, bias: Option<&[f32]>, y: &mut [f32]) {
        let linear = self;
        forward_all(x, n, Products::Int8, [Output { linear, bias, y }]);
    }

    /// Bytes of a weight of a type that is not packed.
    fn element(&self) -> usize {
        match self.weights {
            Weights::F32(_) => 4,
            _ => 2,
        }
    }

    /// Tasks for `n` rows: each should be worth some ten microseconds.
    fn cut(&self, n: usize, products: Products) -> Cut {
        if let Weights::Packed(p) = &self.weights {
            return p.cut(n, 1, products);
        }
        let pairs = self.out_features.div_ceil(2);
        // With many rows a task's weights are read again for each tile of them: from the L2 cache.
        let fit = L2_WEIGHTS / (2 * self.in_features * self.element()).max(1);
        let enough = 100_000 / (2 * self.in_features * n.min(64)).max(1);
        let even = pairs / (4 * crate::threads());
        let group = if n == 1 {
            enough
        } else {
            enough.max(even.min(fit))
        }
        .max(1);
        Cut {
            group,
            groups: pairs.div_ceil(group),
            rows: n,
            chunks: 1,
        }
    }

    /// The packed weights, if they are multiplied by rounded activations.
    pub(crate) fn packed(&self) -> Option<&Packed> {
        match &self.weights {
            Weights::Packed(p) => Some(p),
            _ => None,
        }
    }

    /// Whether packed weights are to be multiplied in f32.
    fn is_exact(&self) -> bool {
        matches!(self.weights, Weights::Exact(_))
    }

    /// Computes the outputs of one task.
    ///
    /// # Safety
    /// `out` is `[n, out_features]`; nobody else accesses this task's part of it.
    unsafe fn task(
        &self,
        part: (Range<usize>, Range<usize>),
        x: Input<'_>,
        bias: Option<&[f32]>,
        out: Shared<f32>,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            match &self.weights {
                Weights::Packed(p) => p.task(part, x.rounded, bias, out),
                Weights::Exact(_) => unreachable!("`forward_all` calls `forward_exact`"),
                Weights::F32(w) => self.dense(w, part.0, x, bias, out),
                Weights::F16(w) => {
                    self.dense(bytemuck::cast_slice::<u16, Half>(w), part.0, x, bias, out);
                }
                Weights::Bf16(w) => {
                    self.dense(bytemuck::cast_slice::<u16, Brain>(w), part.0, x, bias, out);
                }
            }
        }
    }

    /// `pairs` of outputs.
    ///
    /// # Safety
    /// As for `task`.
    unsafe fn dense<T: Element>(
        &self,
        w: &[T],
        pairs: Range<usize>,
        x: Input<'_>,
        bias: Option<&[f32]>,
        out: Shared<f32>,
    ) {
        let (k, m) = (self.in_features, self.out_features);
        let pairs = pairs.start..pairs.end.min(m.div_ceil(2));
        for first in (0..x.n).step_by(4) {
            let tile = (x.n - first).min(4);
            let row = |t: usize| &x.x[(first + t.min(tile - 1)) * k..][..k];
            for pair in pairs.clone() {
                let rows = (m - 2 * pair).min(2);
                let w0 = &w[2 * pair * k..(2 * pair + 1) * k];
                let w1 = if rows == 2 {
                    &w[(2 * pair + 1) * k..(2 * pair + 2) * k]
                } else {
                    w0
                };
                let sums = dots([w0, w1], [row(0), row(1), row(2), row(3)], tile);
                for (r, sums) in sums.iter().enumerate().take(rows) {
                    let o = 2 * pair + r;
                    for (t, sum) in sums.iter().enumerate().take(tile) {
                        let value = sum + bias.map_or(0.0, |b| b[o]);
                        // SAFETY: in bounds as `o < m` and `first + t < n`; the column is this
                        // task's, by the caller's promise.
                        let out = unsafe { out.part((first + t) * m + o, 1) };
                        out[0] = value;
                    }
                }
            }
        }
    }
}

/// What a product with packed weights multiplies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Products {
    /// Integers: activations are rounded to int8. A row's result is the same whatever rows are beside it,
    /// and on every processor with fused multiply-adds.
    #[default]
    Int8,
    /// bf16, both the dequantised weights and the activations, where the processor has AMX, which does many
    /// rows far faster so; as [`Products::Int8`] elsewhere. A row's result is the same whatever rows are
    /// beside it.
    Bf16,
}

/// One of the layers that read the same input, with its bias and where its output goes.
#[derive(Debug)]
pub struct Output<'a> {
    /// The layer.
    pub linear: &'a Linear,
    /// `[out_features]`.
    pub bias: Option<&'a [f32]>,
    /// `[n, out_features]`.
    pub y: &'a mut [f32],
}

/// What all tasks of a product read.
#[derive(Clone, Copy)]
struct Input<'a> {
    x: &'a [f32],
    n: usize,
    rounded: &'a Activations,
}

/// `y = x Wᵀ + bias` of several layers with one input: it is rounded once, and the outputs of all
/// layers are one parallel loop, which is what counts when a single token is decoded.
///
/// # Shapes
/// `x` is `[n, in_features]`, of every layer.
///
/// # Panics
/// If a slice has another length.
pub fn forward_all<const N: usize>(
    x: &[f32],
    n: usize,
    products: Products,
    outputs: [Output<'_>; N],
) {
    for o in &outputs {
        assert_eq!(x.len(), n * o.linear.in_features, "x is [n, in_features]");
        assert_eq!(
            o.y.len(),
            n * o.linear.out_features,
            "y is [n, out_features]"
        );
        let fits = |b: &[f32]| b.len() == o.linear.out_features;
        assert!(o.bias.is_none_or(fits), "bias is [out_features]");
    }
    if n == 0 {
        return;
    }
    if outputs.iter().any(|o| o.linear.is_exact()) {
        for o in outputs {
            match o.linear.is_exact() {
                true => o.linear.forward_exact(x, n, o.bias, o.y),
                false => forward_all(x, n, products, [o]),
            }
        }
        return;
    }
    let packed = outputs.iter().any(|o| o.linear.packed().is_some());
    with_rounded(packed.then_some(x), x.len() / n, products, |rounded| {
        run(Input { x, n, rounded }, outputs);
    });
}

/// Calls `f` with `x` rounded, in memory that is kept from call to call: fresh pages would cost as
/// much as the rounding.
pub(crate) fn with_rounded(
    x: Option<&[f32]>,
    columns: usize,
    products: Products,
    f: impl FnOnce(&Activations),
) {
    let mut rounded = ACTIVATIONS.take();
    if let Some(x) = x {
        rounded.round(x, columns, products);
    }
    f(&rounded);
    ACTIVATIONS.set(rounded);
}

/// `y = x Wᵀ + bias` of a packed layer whose input is rounded already.
pub(crate) fn forward_rounded(rounded: &Activations, n: usize, output: Output<'_>) {
    run(Input { x: &[], n, rounded }, [output]);
}

fn run<const N: usize>(input: Input<'_>, outputs: [Output<'_>; N]) {
    let mut tasks = 0;
    let layers = outputs.map(|o| {
        let cut = o.linear.cut(input.n, input.rounded.products());
        tasks += cut.tasks();
        (o.linear, o.bias, Shared::new(o.y), cut)
    });
    pool::for_each(tasks, |mut task| {
        for &(linear, bias, out, cut) in &layers {
            if task < cut.tasks() {
                // SAFETY: the output's length was checked, and tasks partition it.
                return unsafe { linear.task(cut.part(task), input, bias, out) };
            }
            task -= cut.tasks();
        }
    });
}

/// A stored weight.
trait Element: Copy + Sync {
    fn widen(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

/// An f16 as stored.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
struct Half(u16);

impl Element for Half {
    #[inline(always)]
    fn widen(self) -> f32 {
        widen_f16(self.0)
    }
}

/// An f16's bits as f32. Without branches, so that it vectorises: shift exponent and mantissa into
/// place and rescale, which is right for subnormals too; infinities and NaN are patched.
#[inline(always)]
pub(crate) fn widen_f16(bits: u16) -> f32 {
    let magnitude = f32::from_bits(u32::from(bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    let special = u32::from(bits & 0x7c00 == 0x7c00) * 0x7f80_0000;
    f32::from_bits(magnitude.to_bits() | special | (u32::from(bits & 0x8000) << 16))
}

/// A bf16 as stored.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
struct Brain(u16);

impl Element for Brain {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
}

/// Dot products of two weight rows with up to four activation rows.
fn dots<T: Element>(w: [&[T]; 2], x: [&[f32]; 4], tile: usize) -> [[f32; 4]; 2] {
    #[cfg(target_arch = "x86_64")]
    if isa() >= Isa::Avx2 {
        // SAFETY: `isa` returns Avx2 or more only where the processor has these features.
        return unsafe {
            match tile {
                1 => dots_avx2::<T, 1>(w, x),
                2 => dots_avx2::<T, 2>(w, x),
                3 => dots_avx2::<T, 3>(w, x),
                _ => dots_avx2::<T, 4>(w, x),
            }
        };
    }
    match tile {
        1 => dots_body::<T, 1, false>(w, x),
        2 => dots_body::<T, 2, false>(w, x),
        3 => dots_body::<T, 3, false>(w, x),
        _ => dots_body::<T, 4, false>(w, x),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn dots_avx2<T: Element, const N: usize>(w: [&[T]; 2], x: [&[f32]; 4]) -> [[f32; 4]; 2] {
    dots_body::<T, N, true>(w, x)
}

#[inline(always)]
fn dots_body<T: Element, const N: usize, const FMA: bool>(
    w: [&[T]; 2],
    x: [&[f32]; 4],
) -> [[f32; 4]; 2] {
    let k = x[0].len();
    let whole = k / 8 * 8;
    let mut acc = [[[0.0f32; 8]; N]; 2];
    for at in (0..whole).step_by(8) {
        let mut rows = [[0.0f32; 8]; 2];
        for (row, w) in rows.iter_mut().zip(w) {
            for (o, w) in row.iter_mut().zip(&w[at..at + 8]) {
                *o = w.widen();
            }
        }
        for n in 0..N {
            let x = &x[n][at..at + 8];
            for r in 0..2 {
                for lane in 0..8 {
                    let a = &mut acc[r][n][lane];
                    *a = if FMA {
                        rows[r][lane].mul_add(x[lane], *a)
                    } else {
                        rows[r][lane] * x[lane] + *a
                    };
                }
            }
        }
    }
    let mut out = [[0.0; 4]; 2];
    for r in 0..2 {
        for n in 0..N {
            let a = &acc[r][n];
            let mut sum = ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
            for i in whole..k {
                sum += w[r][i].widen() * x[n][i];
            }
            out[r][n] = sum;
        }
    }
    out
}

#[cfg(test)]
mod tests;
