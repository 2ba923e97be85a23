//! AVX-512 BF16: `vdpbf16ps` adds the two products of a pair of columns to each of 16 latents' sums.

use std::arch::x86_64::*;

use half::bf16;

use super::{GROUP, LATENTS, ROWS, Tile};

/// Rows whose sums are in registers, with those of two tiles of latents.
const STRIP: usize = 8;

/// Sums of [`ROWS`] rows with the latents of `tiles`.
pub(super) fn block(x: &[bf16], stride: usize, tiles: &[Tile], depth: usize, sums: &mut [f32]) {
    let latents = tiles.len() / depth * LATENTS;
    assert!(x.len() >= ROWS * stride && stride >= 32 * depth);
    assert!(latents <= GROUP && sums.len() >= ROWS * GROUP);
    for (at, pair) in tiles.chunks_exact(2 * depth).enumerate() {
        for row in (0..ROWS).step_by(STRIP) {
            let sums = &mut sums[row * GROUP + at * 2 * LATENTS..];
            // SAFETY: `dispatch::isa` said AVX-512; a strip of rows and of sums is in bounds.
            unsafe { strip(&x[row * stride..], stride, pair, depth, sums) };
        }
    }
}

/// # Safety
/// `x` has [`STRIP`] rows of `stride`, of which `32 * depth` columns are read; `pair` is `2 * depth` tiles;
/// `sums` has as many rows of [`GROUP`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn strip(x: &[bf16], stride: usize, pair: &[Tile], depth: usize, sums: &mut [f32]) {
    let mut acc = [[_mm512_setzero_ps(); 2]; STRIP];
    let x = x.as_ptr().cast::<i32>();
    for t in 0..depth {
        for line in 0..16 {
            // SAFETY: the caller's promise; a line is 64 bytes.
            let w = [0, depth].map(|of| unsafe {
                _mm512_load_si512(pair.as_ptr().add(of + t).cast::<__m512i>().add(line))
            });
            for (r, acc) in acc.iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                let pair = unsafe { x.add(r * stride / 2 + t * 16 + line).read_unaligned() };
                let pair = _mm512_set1_epi32(pair);
                for (acc, w) in acc.iter_mut().zip(w) {
                    // SAFETY: both are vectors of 512 bits.
                    let (x, w) = unsafe {
                        (
                            std::mem::transmute::<__m512i, __m512bh>(pair),
                            std::mem::transmute::<__m512i, __m512bh>(w),
                        )
                    };
                    *acc = _mm512_dpbf16_ps(*acc, x, w);
                }
            }
        }
    }
    for (r, acc) in acc.iter().enumerate() {
        for (half, acc) in acc.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr().add(r * GROUP + half * 16), *acc) };
        }
    }
}

/// Runs `rounds` times sixteen products that read no memory; returns a number that depends on them.
pub(crate) fn spin(rounds: usize) -> f32 {
    // SAFETY: `dispatch::isa` said AVX-512.
    unsafe { spin_inner(rounds) }
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn spin_inner(rounds: usize) -> f32 {
    let mut acc = [_mm512_setzero_ps(); 16];
    // SAFETY: both are vectors of 512 bits.
    let x = unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_setzero_si512()) };
    for _ in 0..rounds {
        // Opaque, so that the loop is not taken for one round.
        let x = std::hint::black_box(x);
        for acc in &mut acc {
            *acc = _mm512_dpbf16_ps(*acc, x, x);
        }
    }
    acc.iter().map(|a| _mm512_reduce_add_ps(*a)).sum()
}
