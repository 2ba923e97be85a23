//! Products in bf16 on AMX tiles, for many rows: a panel's weights are dequantised and rounded to bf16, a
//! tile for each block, and the sums stay in tiles over all columns. With int8 they can't: each block has
//! factors of its own, and what it costs to apply them to 16 x 16 integers is more than the product.

use std::arch::x86_64::*;

use super::panel::Row;
use super::{Kind, Packed, STRIP, Sums, vnni};
use crate::encoder::{Tile, amx};

/// This thread's tiles while a task uses them; given back at its end, so that the system need not save them.
pub(super) struct Configured(());

impl Configured {
    pub(super) fn new() -> Self {
        amx::configure();
        Self(())
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        amx::release();
    }
}

/// Sums of two panels (of a single one twice) for a strip.
pub(super) fn strip(_: &Configured, w: [&[Tile]; 2], x: [&[Tile]; 2], sums: &mut Sums) {
    const { assert!(STRIP == 32) }
    let [first, second] = sums.each_mut().map(|s| s.as_mut_ptr().cast::<f32>());
    // SAFETY: the tiles are set up; a panel's sums are 32 rows of 16.
    unsafe {
        let to = [first, second];
        let below = to.map(|s| s.add(16 * 16));
        amx::two_by_two(x, w, [to, below], 16);
    }
}

/// Dequantises a panel, whose factors are unpacked, into a tile for each block.
pub(super) fn unpack(w: &Packed, panel: usize, scales: &[Row], mins: &[Row], out: &mut [Tile]) {
    let lines = w.lines(panel);
    assert_eq!(out.len(), w.blocks);
    assert_eq!(lines.len(), w.kind.lines() * w.blocks);
    assert_eq!(scales.len(), w.blocks * w.halves);
    assert!(mins.is_empty() || mins.len() == scales.len());
    // SAFETY: `dispatch::isa` said AMX, which includes AVX-512 BF16; the lengths were checked.
    unsafe {
        match w.kind {
            Kind::Bits4 => unpack_blocks::<4>(w, panel, scales, mins, out),
            Kind::Bits5 => unpack_blocks::<5>(w, panel, scales, mins, out),
            Kind::Bits6 => unpack_blocks::<6>(w, panel, scales, mins, out),
            Kind::Bits8 => unpack_blocks::<8>(w, panel, scales, mins, out),
        }
    }
}

/// # Safety
/// Needs the features below; `out` has a tile for each block, the panel `BITS` vectors for each of them,
/// `scales` and `mins` (if any) `w.halves` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma")]
unsafe fn unpack_blocks<const BITS: usize>(
    w: &Packed,
    panel: usize,
    scales: &[Row],
    mins: &[Row],
    out: &mut [Tile],
) {
    // Words of two vectors, one after the other, to pairs: 0, 16, 1, 17 and so on.
    let words: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 16) as u16);
    // SAFETY: 64 bytes.
    let pairs = unsafe { _mm512_loadu_si512(words.as_ptr().cast()) };
    let byte = _mm512_set1_epi32(255);
    let offset = _mm512_set1_ps(-w.offset as f32);
    let blocks = w.lines(panel).chunks_exact(BITS).zip(out);
    for (b, (lines, out)) in blocks.enumerate() {
        // SAFETY: a block of `BITS` bits has as many vectors.
        let v = unsafe { vnni::block::<BITS>(lines.as_ptr()) };
        for (g, v) in v.into_iter().enumerate() {
            let at = b * w.halves + g * w.halves / 8;
            // SAFETY: rows of 16 values.
            let scale = unsafe { _mm512_loadu_ps(scales[at].as_ptr()) };
            let base = match mins.get(at) {
                // SAFETY: as above.
                Some(min) => unsafe { _mm512_loadu_ps(min.as_ptr()) },
                // Exact: a power of two.
                None => _mm512_mul_ps(offset, scale),
            };
            let column = |bytes: __m512i| {
                let u = _mm512_cvtepi32_ps(_mm512_and_si512(bytes, byte));
                _mm512_fmadd_ps(u, scale, base)
            };
            let first = _mm512_cvtne2ps_pbh(column(_mm512_srli_epi32::<8>(v)), column(v));
            let second = _mm512_cvtne2ps_pbh(
                column(_mm512_srli_epi32::<24>(v)),
                column(_mm512_srli_epi32::<16>(v)),
            );
            for (i, words) in [first, second].into_iter().enumerate() {
                // SAFETY: both are vectors of 512 bits, and a line has 64 bytes.
                unsafe {
                    let words = std::mem::transmute::<__m512bh, __m512i>(words);
                    let line = out.lines_mut()[2 * g + i].as_mut_ptr();
                    _mm512_storeu_si512(line.cast(), _mm512_permutexvar_epi16(pairs, words));
                }
            }
        }
    }
}
