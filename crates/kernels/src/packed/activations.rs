//! Activations rounded to int8, one scale for each block of 32 values.

use super::BLOCK;
use crate::dispatch::{Isa, isa};
use crate::pool;

/// A block whose largest magnitude is not above this is zero: `127 / largest` would come near
/// infinity, which no integer holds.
const TINY: f32 = 1e-36;

/// One block of activations as a kernel reads it: everything at small offsets from one pointer.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct XBlock {
    pub q: [i8; BLOCK],
    pub scale: f32,
    /// `scale` times the sum of all 32 integers.
    pub sum: f32,
    /// Minus the sum of all 32 integers, and of the first and the second 16.
    pub minus: i32,
    pub minus_half: [i32; 2],
}

/// Activations as int8 blocks, `[n, in / 32]`.
#[derive(Debug, Default)]
pub(crate) struct Activations(pub(super) Vec<XBlock>);

impl Activations {
    /// Rounds `x` `[n, columns]`.
    pub(crate) fn round(&mut self, x: &[f32], columns: usize) {
        let blocks = columns / BLOCK;
        self.0.resize(x.len() / BLOCK, XBlock::default());
        if x.len() < 1 << 14 {
            round(x, &mut self.0);
        } else {
            pool::for_each_row(&mut self.0, blocks, |i, out| {
                round(&x[i * columns..(i + 1) * columns], out);
            });
        }
    }
}

fn round(x: &[f32], out: &mut [XBlock]) {
    #[cfg(target_arch = "x86_64")]
    if isa() >= Isa::Avx512 {
        // SAFETY: `isa` returns Avx512 only where the processor has these features.
        return unsafe { quantise_avx512(x, out) };
    } else if isa() >= Isa::Avx2 {
        // SAFETY: `isa` returns Avx2 or more only where the processor has these features.
        return unsafe { quantise_avx2(x, out) };
    }
    quantise(x, out);
}

#[inline(always)]
fn quantise(x: &[f32], out: &mut [XBlock]) {
    /// Adding and subtracting it rounds a float of magnitude below 2^22 to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    for (x, out) in x.as_chunks::<BLOCK>().0.iter().zip(out) {
        let mut lanes = [0.0f32; 8];
        for x in x.as_chunks::<8>().0 {
            for i in 0..8 {
                lanes[i] = if x[i].abs() > lanes[i] {
                    x[i].abs()
                } else {
                    lanes[i]
                };
            }
        }
        let largest = lanes.iter().copied().fold(0.0, f32::max);
        let inverse = if largest > TINY { 127.0 / largest } else { 0.0 };
        let mut rounded = [0i32; BLOCK];
        for i in 0..BLOCK {
            // The magnitude is at most 127; NaN becomes 0.
            rounded[i] = ((x[i] * inverse + ROUND) - ROUND) as i32;
        }
        let mut sums = [0i32; 2];
        for i in 0..16 {
            sums[0] += rounded[i];
            sums[1] += rounded[16 + i];
        }
        for i in 0..BLOCK {
            out.q[i] = rounded[i] as i8;
        }
        let sum = sums[0] + sums[1];
        out.scale = largest / 127.0;
        out.sum = out.scale * sum as f32;
        out.minus = -sum;
        out.minus_half = sums.map(|s| -s);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn quantise_avx2(x: &[f32], out: &mut [XBlock]) {
    quantise(x, out);
}

/// The same, bit for bit, with what AVX-512 has for it: a conversion that rounds, one that narrows,
/// and sums across a vector.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn quantise_avx512(x: &[f32], out: &mut [XBlock]) {
    use std::arch::x86_64::*;
    for (x, out) in x.as_chunks::<BLOCK>().0.iter().zip(out) {
        // SAFETY: a block has 32 values.
        let v = unsafe {
            [
                _mm512_loadu_ps(x.as_ptr()),
                _mm512_loadu_ps(x[16..].as_ptr()),
            ]
        };
        // Of a NaN and a number, `vmaxps` takes its second operand: NaN is passed over.
        let largest = _mm512_max_ps(_mm512_abs_ps(v[0]), _mm512_setzero_ps());
        let largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(v[1]), largest));
        let inverse = if largest > TINY { 127.0 / largest } else { 0.0 };
        let inverse = _mm512_set1_ps(inverse);
        let mut sums = [0i32; 2];
        for (h, v) in v.into_iter().enumerate() {
            let scaled = _mm512_mul_ps(v, inverse);
            // What is no number becomes 0.
            let number = _mm512_cmp_ps_mask::<_CMP_ORD_Q>(scaled, scaled);
            let q = _mm512_maskz_cvtps_epi32(number, scaled);
            sums[h] = _mm512_reduce_add_epi32(q);
            let q = _mm512_cvtepi32_epi8(q);
            // SAFETY: 16 of the block's 32 integers.
            unsafe { _mm_storeu_si128(out.q[16 * h..].as_mut_ptr().cast(), q) };
        }
        let sum = sums[0] + sums[1];
        out.scale = largest / 127.0;
        out.sum = out.scale * sum as f32;
        out.minus = -sum;
        out.minus_half = sums.map(|s| -s);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::on_every_isa;

    #[test]
    fn a_block_of_next_to_nothing_is_zero() {
        // 127 / x is infinite from 3.7e-37 down, below that come the subnormal numbers.
        for tiny in [3e-37, 1e-38, 1e-45] {
            let mut x = [0.0; 64];
            x[3] = -tiny;
            x[40] = 1.0;
            on_every_isa(|isa| {
                let mut found = Activations::default();
                found.round(&x, 64);
                assert_eq!(
                    (found.0[0].q, found.0[0].sum),
                    ([0; 32], 0.0),
                    "{isa:?} {tiny}"
                );
                assert_eq!((found.0[1].q[8], found.0[1].minus), (127, -127), "{isa:?}");
            });
        }
    }

    #[test]
    fn every_isa_rounds_to_the_same_integers() {
        let mut x: Vec<f32> = (0..6 * 32)
            .map(|i| ((i * 2_654_435_769usize) >> 7) as u16 as f32 / 999.0 - 30.0)
            .collect();
        x[32..64].fill(0.0);
        x[70] = f32::NAN;
        x[100] = 1e30;
        for i in 128..160 {
            x[i] = i as f32 - 143.5; // halves: ties go to even
        }
        x[128] = 127.0;
        let mut plain = vec![XBlock::default(); 6];
        quantise(&x, &mut plain);
        assert_eq!((plain[1].scale, plain[1].q), (0.0, [0; 32]));
        assert_eq!(plain[2].q[6], 0);
        on_every_isa(|isa| {
            let mut found = Activations::default();
            found.round(&x, 96);
            for (f, p) in found.0.iter().zip(&plain) {
                assert_eq!(f.q, p.q, "{isa:?}");
                assert_eq!((f.scale, f.sum), (p.scale, p.sum), "{isa:?}");
                assert_eq!((f.minus, f.minus_half), (p.minus, p.minus_half), "{isa:?}");
            }
        });
    }
}
