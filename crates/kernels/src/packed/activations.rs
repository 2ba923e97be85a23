//! Activations rounded to int8, one scale for each block of 32 values.

use super::BLOCK;
use crate::dispatch::{Isa, isa};
use crate::pool;

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
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
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

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn quantise_avx512(x: &[f32], out: &mut [XBlock]) {
    quantise(x, out);
}
