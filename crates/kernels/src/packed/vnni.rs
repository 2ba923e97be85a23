//! AVX-512 VNNI: `vpdpbusd` adds four products of a row's four columns to one i32 lane, 16 rows at
//! once. The unsigned operand is the weight as stored; its offset is taken out by starting the sum at
//! `-offset * sum_i x_i`, which is exact.

use std::arch::x86_64::*;

use super::activations::XBlock;
use super::panel::{Panel, Row};
use super::{Kind, Line, PANEL, Packed};

/// Activation rows of a tile.
pub(super) const TILE: usize = 8;

/// Sums of one panel, unpacked, for up to [`TILE`] rows of activations.
pub(super) fn tile(w: &Packed, panel: Panel<'_>, x: &[XBlock], sums: &mut [Row]) {
    assert_eq!(x.len(), sums.len() * w.blocks);
    assert_eq!(panel.weights.len(), w.blocks * 8);
    assert_eq!(panel.scales.len(), w.blocks * w.halves);
    /// Picks the instance for the number of rows.
    macro_rules! rows {
        ($halves:expr, $min:expr, $($n:literal)*) => {
            match sums.len() {
                // SAFETY: `dispatch::isa` said AVX-512; the lengths were checked.
                $($n => unsafe { kernel::<8, $halves, $min, $n>(w, panel, x, sums) },)*
                _ => unreachable!("a tile has at most eight rows"),
            }
        };
    }
    match (w.halves, panel.mins.is_empty()) {
        (1, true) => rows!(1, false, 1 2 3 4 5 6 7 8),
        (1, false) => rows!(1, true, 1 2 3 4 5 6 7 8),
        (_, true) => rows!(2, false, 1 2 3 4 5 6 7 8),
        (_, false) => rows!(2, true, 1 2 3 4 5 6 7 8),
    }
}

/// Sums of one panel, its integers as packed, for one row of activations: decoding is bound by what
/// is read from memory.
pub(super) fn row(w: &Packed, panel: Panel<'_>, x: &[XBlock], sums: &mut Row) {
    assert_eq!(x.len(), w.blocks);
    assert_eq!(panel.weights.len(), w.blocks * w.kind.lines());
    assert_eq!(panel.scales.len(), w.blocks * w.halves);
    let sums = std::slice::from_mut(sums);
    /// Picks the instance for the type.
    macro_rules! row {
        ($bits:literal) => {
            match (w.halves, panel.mins.is_empty()) {
                // SAFETY: `dispatch::isa` said AVX-512; the lengths were checked.
                (1, true) => unsafe { kernel::<$bits, 1, false, 1>(w, panel, x, sums) },
                // SAFETY: as above.
                (1, false) => unsafe { kernel::<$bits, 1, true, 1>(w, panel, x, sums) },
                // SAFETY: as above.
                (_, true) => unsafe { kernel::<$bits, 2, false, 1>(w, panel, x, sums) },
                // SAFETY: as above.
                (_, false) => unsafe { kernel::<$bits, 2, true, 1>(w, panel, x, sums) },
            }
        };
    }
    match w.kind {
        Kind::Bits4 => row!(4),
        Kind::Bits5 => row!(5),
        Kind::Bits6 => row!(6),
        Kind::Bits8 => row!(8),
    }
}

/// The integers of a block: vector `g` holds columns `4 g .. 4 g + 4`.
///
/// # Safety
/// `p` points to a packed block of `BITS` bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
unsafe fn block<const BITS: usize>(p: *const Line) -> [__m512i; 8] {
    // SAFETY: the caller's promise; lines are aligned.
    let line = |i: usize| unsafe { _mm512_load_si512(p.add(i).cast()) };
    if BITS == 8 {
        return std::array::from_fn(line);
    }
    let low = _mm512_set1_epi8(15);
    let mut w = [_mm512_setzero_si512(); 8];
    for g in 0..4 {
        let both = line(g);
        w[g] = _mm512_and_si512(both, low);
        w[g + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(both), low);
    }
    // (a & b) | c
    const AND_OR: i32 = 0xEA;
    if BITS == 5 {
        let (plane, bit) = (line(4), _mm512_set1_epi8(16));
        let high = [
            _mm512_slli_epi16::<4>(plane),
            _mm512_slli_epi16::<3>(plane),
            _mm512_slli_epi16::<2>(plane),
            _mm512_slli_epi16::<1>(plane),
            plane,
            _mm512_srli_epi16::<1>(plane),
            _mm512_srli_epi16::<2>(plane),
            _mm512_srli_epi16::<3>(plane),
        ];
        for g in 0..8 {
            w[g] = _mm512_ternarylogic_epi32::<AND_OR>(high[g], bit, w[g]);
        }
    }
    if BITS == 6 {
        let bits = _mm512_set1_epi8(0x30);
        for half in 0..2 {
            let plane = line(4 + half);
            let high = [
                _mm512_slli_epi16::<4>(plane),
                _mm512_slli_epi16::<2>(plane),
                plane,
                _mm512_srli_epi16::<2>(plane),
            ];
            for g in 0..4 {
                let at = 4 * half + g;
                w[at] = _mm512_ternarylogic_epi32::<AND_OR>(high[g], bits, w[at]);
            }
        }
    }
    w
}

/// Sums of one panel for `N` activation rows.
///
/// # Safety
/// Needs the features below. `panel` holds `w.blocks` blocks of `BITS` bits with `HALVES` factors
/// each, minima if `MIN`; `x` holds `N` rows of `w.blocks` blocks, `sums` at least `N` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
unsafe fn kernel<const BITS: usize, const HALVES: usize, const MIN: bool, const N: usize>(
    w: &Packed,
    panel: Panel<'_>,
    x: &[XBlock],
    sums: &mut [Row],
) {
    let lines = if BITS == 8 { 8 } else { BITS };
    let offset = _mm512_set1_epi32(w.offset);
    let mut weights = panel.weights.as_ptr();
    let (mut scales, mut mins) = (panel.scales.as_ptr(), panel.mins.as_ptr());
    let mut rows = [x.as_ptr(); N];
    for (n, row) in rows.iter_mut().enumerate() {
        *row = x[n * w.blocks..].as_ptr();
    }
    let mut acc = [_mm512_setzero_ps(); N];
    for _ in 0..w.blocks {
        // SAFETY: the pointers advance by one block at a time over the lengths that the caller
        // promises; prefetching touches nothing.
        unsafe {
            if N == 1 {
                for line in 0..lines {
                    let ahead = weights.wrapping_add(16 * lines + line);
                    _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                }
            }
            let v = block::<BITS>(weights);
            for h in 0..HALVES {
                let mut sum = [_mm512_setzero_si512(); N];
                if !MIN {
                    for n in 0..N {
                        let minus = if HALVES == 1 {
                            (*rows[n]).minus
                        } else {
                            (*rows[n]).minus_half[h]
                        };
                        sum[n] = _mm512_mullo_epi32(_mm512_set1_epi32(minus), offset);
                    }
                }
                for g in h * 8 / HALVES..(h + 1) * 8 / HALVES {
                    for n in 0..N {
                        let q = (*rows[n]).q.as_ptr().cast::<i32>().add(g).read_unaligned();
                        sum[n] = _mm512_dpbusd_epi32(sum[n], v[g], _mm512_set1_epi32(q));
                    }
                }
                let scale = _mm512_loadu_ps(scales.cast());
                for n in 0..N {
                    let scale = _mm512_mul_ps(scale, _mm512_set1_ps((*rows[n]).scale));
                    acc[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[n]), scale, acc[n]);
                }
                if MIN {
                    let min = _mm512_loadu_ps(mins.cast());
                    for n in 0..N {
                        let x = &*rows[n];
                        let sum = if HALVES == 1 {
                            x.sum
                        } else {
                            -x.scale * x.minus_half[h] as f32
                        };
                        acc[n] = _mm512_fmadd_ps(min, _mm512_set1_ps(sum), acc[n]);
                    }
                    mins = mins.add(1);
                }
                scales = scales.add(1);
            }
            weights = weights.add(lines);
            for row in &mut rows {
                *row = row.add(1);
            }
        }
    }
    for (acc, sums) in acc.iter().zip(sums) {
        const { assert!(PANEL == 16) }
        // SAFETY: a row has 16 values.
        unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), *acc) };
    }
}
