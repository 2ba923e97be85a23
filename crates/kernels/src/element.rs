//! Rows of f32 or bf16, summed and multiplied with weights in f32: what training an autoencoder
//! gathers.
//!
//! bf16 is f32 without its low 16 bits: half the bytes, and widening is a shift. Every sum is f32, in an
//! order that no instruction set changes, so the gathers have the same bits on all of them.
//!
//! Bodies are plain Rust that vectorises, compiled for AVX2 and AVX-512 besides and chosen by
//! [`crate::dispatch`].

use half::bf16;

use crate::dispatch::{Isa, isa};
use crate::encoder::{self, Bf16Tiles, EncodeTime};

/// Columns that a weighted sum keeps in registers.
const BLOCK: usize = 128;
/// Running sums of a dot product.
const LANES: usize = 32;

/// What rows are stored as.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// Encoder weights in the layout that the product wants.
    type Encoder: ?Sized + Sync;

    /// Elements from one row to the next: for bf16 an odd number of cache lines, so that a column of
    /// rows does not fall into a few sets of the cache.
    fn stride(d: usize) -> usize;

    /// Rounds to the nearest, ties to even.
    fn store(x: &[f32], out: &mut [Self]);

    /// `out += sum_i weights[i] rows[idx[i]]`.
    ///
    /// # Shapes
    /// `rows` is `[.., stride]`, of which the first `out.len()` columns are read.
    ///
    /// # Panics
    /// If a row is out of bounds, or `idx` and `weights` differ in length.
    fn weighted_sum(weights: &[f32], idx: &[u32], rows: &[Self], stride: usize, out: &mut [f32]);

    /// `a . b`.
    fn dot(a: &[f32], b: &[Self]) -> f32;

    /// The one of two copies that has this type.
    fn pick<'a>(full: &'a [f32], half: &'a [bf16]) -> &'a [Self];

    /// The encoder's weights of this type.
    fn encoder<'a>(full: &'a [f32], tiles: &'a Bf16Tiles) -> &'a Self::Encoder;

    /// Encoder weights of some latents.
    fn gather(w: &Self::Encoder, d: usize, latents: &[u32]) -> Box<Self::Encoder>;

    /// The `k` largest positive pre-activations `x w + b_enc` of each row: see [`encoder`].
    ///
    /// # Shapes
    /// `w` is `[b_enc.len(), d]`, `x` `[rows, stride(d)]` with a multiple of [`encoder::ROWS`] rows (those
    /// above `n` and the columns above `d` are zero), `idx` and `val` `[n, k]`.
    fn encode_topk(
        w: &Self::Encoder,
        b_enc: &[f32],
        x: &[Self],
        d: usize,
        k: usize,
        idx: &mut [u32],
        val: &mut [f32],
    ) -> EncodeTime;
}

/// Defines `$name` with instances of `$body` for AVX-512, AVX2 and portable.
macro_rules! dispatched {
    (fn $name:ident / $wide:ident / $mid:ident / $body:ident <$e:ident> ($($arg:ident: $ty:ty),*) $(-> $ret:ty)?) => {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        fn $wide<$e: Widen>($($arg: $ty),*) $(-> $ret)? {
            $body($($arg),*)
        }

        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        fn $mid<$e: Widen>($($arg: $ty),*) $(-> $ret)? {
            $body($($arg),*)
        }

        fn $name<$e: Widen>($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            if isa() >= Isa::Avx512 {
                // SAFETY: `isa` returns a set only where the processor has it.
                return unsafe { $wide($($arg),*) };
            } else if isa() >= Isa::Avx2 {
                // SAFETY: as above.
                return unsafe { $mid($($arg),*) };
            }
            $body($($arg),*)
        }
    };
}

/// To f32, exactly.
trait Widen: Copy {
    fn widen(self) -> f32;
}

impl Widen for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Widen for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

#[inline(always)]
fn weighted_sum_body<E: Widen>(
    weights: &[f32],
    idx: &[u32],
    rows: &[E],
    stride: usize,
    out: &mut [f32],
) {
    assert_eq!(weights.len(), idx.len());
    let (blocks, rest) = out.as_chunks_mut::<BLOCK>();
    let whole = blocks.len() * BLOCK;
    for (b, out) in blocks.iter_mut().enumerate() {
        let mut sums = *out;
        for (&w, &i) in weights.iter().zip(idx) {
            let at = i as usize * stride + b * BLOCK;
            let row: &[E; BLOCK] = rows[at..].first_chunk().expect("the row is in bounds");
            for (s, r) in sums.iter_mut().zip(row) {
                *s += w * r.widen();
            }
        }
        *out = sums;
    }
    if !rest.is_empty() {
        for (&w, &i) in weights.iter().zip(idx) {
            let at = i as usize * stride + whole;
            let row = &rows[at..at + rest.len()];
            for (s, r) in rest.iter_mut().zip(row) {
                *s += w * r.widen();
            }
        }
    }
}

dispatched! {
    fn weighted_sum / weighted_sum_avx512 / weighted_sum_avx2 / weighted_sum_body
        <E> (weights: &[f32], idx: &[u32], rows: &[E], stride: usize, out: &mut [f32])
}

#[inline(always)]
fn dot_body<E: Widen>(a: &[f32], b: &[E]) -> f32 {
    assert_eq!(a.len(), b.len());
    let mut sums = [0.0f32; LANES];
    let (whole_a, rest_a) = a.as_chunks::<LANES>();
    let (whole_b, rest_b) = b.as_chunks::<LANES>();
    for (a, b) in whole_a.iter().zip(whole_b) {
        for i in 0..LANES {
            sums[i] += a[i] * b[i].widen();
        }
    }
    for (s, (a, b)) in sums.iter_mut().zip(rest_a.iter().zip(rest_b)) {
        *s += a * b.widen();
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    sums[0]
}

dispatched! {
    fn dot / dot_avx512 / dot_avx2 / dot_body <E> (a: &[f32], b: &[E]) -> f32
}

/// Nearest bf16, ties to even. What is not a number may become one: the f32 value stays the truth.
#[inline(always)]
pub(crate) fn round(x: f32) -> bf16 {
    let bits = x.to_bits();
    let even = (bits >> 16) & 1;
    bf16::from_bits((bits.wrapping_add(0x7fff + even) >> 16) as u16)
}

#[inline(always)]
fn round_body<E: Widen>(x: &[E], out: &mut [bf16]) {
    for (o, x) in out.iter_mut().zip(x) {
        *o = round(x.widen());
    }
}

dispatched! {
    fn round_all / round_avx512 / round_avx2 / round_body <E> (x: &[E], out: &mut [bf16])
}

impl Element for f32 {
    type Encoder = [f32];

    fn stride(d: usize) -> usize {
        d
    }

    fn store(x: &[f32], out: &mut [Self]) {
        out.copy_from_slice(x);
    }

    fn weighted_sum(weights: &[f32], idx: &[u32], rows: &[Self], stride: usize, out: &mut [f32]) {
        weighted_sum(weights, idx, rows, stride, out);
    }

    fn dot(a: &[f32], b: &[Self]) -> f32 {
        dot(a, b)
    }

    fn pick<'a>(full: &'a [f32], _: &'a [bf16]) -> &'a [Self] {
        full
    }

    fn encoder<'a>(full: &'a [f32], _: &'a Bf16Tiles) -> &'a [f32] {
        full
    }

    fn gather(w: &[f32], d: usize, latents: &[u32]) -> Box<[f32]> {
        let row = |&j: &u32| &w[j as usize * d..(j as usize + 1) * d];
        latents.iter().flat_map(row).copied().collect()
    }

    fn encode_topk(
        w: &[f32],
        b_enc: &[f32],
        x: &[f32],
        d: usize,
        k: usize,
        idx: &mut [u32],
        val: &mut [f32],
    ) -> EncodeTime {
        encoder::topk_f32(w, b_enc, x, d, k, idx, val)
    }
}

impl Element for bf16 {
    type Encoder = Bf16Tiles;

    fn stride(d: usize) -> usize {
        (d.div_ceil(32) | 1) * 32
    }

    fn store(x: &[f32], out: &mut [Self]) {
        assert_eq!(x.len(), out.len());
        round_all(x, out);
    }

    fn weighted_sum(weights: &[f32], idx: &[u32], rows: &[Self], stride: usize, out: &mut [f32]) {
        weighted_sum(weights, idx, rows, stride, out);
    }

    fn dot(a: &[f32], b: &[Self]) -> f32 {
        dot(a, b)
    }

    fn pick<'a>(_: &'a [f32], half: &'a [bf16]) -> &'a [Self] {
        half
    }

    fn encoder<'a>(_: &'a [f32], tiles: &'a Bf16Tiles) -> &'a Bf16Tiles {
        tiles
    }

    fn gather(w: &Bf16Tiles, _: usize, latents: &[u32]) -> Box<Bf16Tiles> {
        Box::new(w.gather(latents))
    }

    fn encode_topk(
        w: &Bf16Tiles,
        b_enc: &[f32],
        x: &[Self],
        _: usize,
        k: usize,
        idx: &mut [u32],
        val: &mut [f32],
    ) -> EncodeTime {
        encoder::topk_bf16(w, b_enc, x, k, idx, val)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::on_every_isa;
    use crate::testing::noise;

    #[test]
    fn rounding_is_to_the_nearest_and_even() {
        for bits in [
            0u32,
            0x3f80_8000,
            0x3f81_8000,
            0x3f80_8001,
            0xc2f7_7fff,
            0x0000_8001,
        ] {
            let x = f32::from_bits(bits);
            assert_eq!(round(x), bf16::from_f32(x), "{bits:x}");
        }
    }

    fn check<E: Element>(wide: impl Fn(E) -> f64) {
        for d in [1, 31, 128, 150, 300] {
            let stride = E::stride(d);
            let (n, a) = (9, noise(d, 1));
            let mut rows = vec![E::default(); n * stride];
            for (i, row) in rows.chunks_exact_mut(stride).enumerate() {
                E::store(&noise(d, 7 + i as u32), &mut row[..d]);
            }
            let (idx, weights) = ([3u32, 0, 8, 3], [0.5f32, -1.25, 2.0, 1.0]);
            let mut seen: Vec<(Vec<f32>, f32)> = Vec::new();
            on_every_isa(|_| {
                let mut out = a.clone();
                E::weighted_sum(&weights, &idx, &rows, stride, &mut out);
                seen.push((out, E::dot(&a, &rows[stride..stride + d])));
            });
            for (out, product) in &seen {
                assert_eq!((out, product.to_bits()), (&seen[0].0, seen[0].1.to_bits()));
                let mut whole = 0.0;
                for c in 0..d {
                    let row = |i: u32| wide(rows[i as usize * stride + c]);
                    let sum: f64 = idx
                        .iter()
                        .zip(&weights)
                        .map(|(&i, &w)| row(i) * f64::from(w))
                        .sum();
                    let expected = f64::from(a[c]) + sum;
                    assert!(
                        (f64::from(out[c]) - expected).abs() < 1e-5,
                        "column {c} of {d}"
                    );
                    whole += f64::from(a[c]) * row(1);
                }
                assert!(
                    (f64::from(*product) - whole).abs() < 1e-4,
                    "{product} against {whole}"
                );
            }
        }
    }

    #[test]
    fn sums_and_products_agree_with_f64_and_among_instruction_sets() {
        check::<f32>(f64::from);
        check::<bf16>(|v| v.to_f64());
    }
}
