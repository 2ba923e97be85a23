//! AVX2: `vpmaddubsw` adds two products of unsigned weights and signed activations in i16:
//! `2 * 15 * 127`, `2 * 31 * 127` and `2 * 63 * 127` leave room for 8, 4 and 2 such sums before they
//! are widened. Eight-bit weights are made signed, `|w| * sign(w) x`, and widen at once.

use std::arch::x86_64::*;

use super::activations::{TOP, Tile};
use super::panel::{Panel, Row};
use super::{Kind, Packed};

/// Activation rows whose sums fill the registers.
const ROWS: usize = 4;

/// Sums of one panel, unpacked, for a tile of activations.
pub(super) fn tile(w: &Packed, panel: Panel<'_>, x: Tile<'_>, sums: &mut [Row]) {
    assert!(sums.len() == x.rows && x.holds(w.blocks));
    for (at, sums) in sums.chunks_mut(ROWS).enumerate() {
        rows(w, panel, x.part(ROWS * at, sums.len()), sums);
    }
}

/// The same for up to [`ROWS`] rows.
fn rows(w: &Packed, panel: Panel<'_>, x: Tile<'_>, sums: &mut [Row]) {
    assert_eq!(panel.weights.len(), w.blocks * 8);
    assert_eq!(panel.scales.len(), w.blocks * w.halves);
    /// Picks the instance for the number of rows.
    macro_rules! rows {
        ($bits:expr, $halves:expr, $min:expr) => {
            match sums.len() {
                // SAFETY: `dispatch::isa` said AVX2; the lengths were checked.
                1 => unsafe { kernel::<$bits, $halves, $min, 1>(w, panel, x, sums) },
                // SAFETY: as above.
                2 => unsafe { kernel::<$bits, $halves, $min, 2>(w, panel, x, sums) },
                // SAFETY: as above.
                3 => unsafe { kernel::<$bits, $halves, $min, 3>(w, panel, x, sums) },
                // SAFETY: as above; a tile has at most four rows.
                _ => unsafe { kernel::<$bits, $halves, $min, 4>(w, panel, x, sums) },
            }
        };
    }
    match (w.kind, w.halves, panel.mins.is_empty()) {
        (Kind::Bits4, 1, true) => rows!(4, 1, false),
        (Kind::Bits4, 1, false) => rows!(4, 1, true),
        (Kind::Bits4, _, true) => rows!(4, 2, false),
        (Kind::Bits4, _, false) => rows!(4, 2, true),
        (Kind::Bits5, _, true) => rows!(5, 1, false),
        (Kind::Bits5, _, false) => rows!(5, 1, true),
        (Kind::Bits6, ..) => rows!(6, 2, false),
        (Kind::Bits8, ..) => rows!(8, 1, false),
    }
}

/// Products of four vectors of weights with 16 activations.
///
/// # Safety
/// Needs AVX2; `q` points to 16 integers.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn half_block<const BITS: usize>(v: &[__m256i; 4], q: *const i32) -> __m256i {
    let ones = _mm256_set1_epi16(1);
    // SAFETY: the caller's promise.
    let act = |g: usize| unsafe { _mm256_set1_epi32(q.add(g).read_unaligned()) };
    if BITS == 8 {
        let top = _mm256_set1_epi8(-128);
        let signed = |g: usize| {
            let w = _mm256_xor_si256(v[g], top);
            let x = _mm256_sign_epi8(act(g), w);
            _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), x), ones)
        };
        return _mm256_add_epi32(
            _mm256_add_epi32(signed(0), signed(1)),
            _mm256_add_epi32(signed(2), signed(3)),
        );
    }
    let product = |g: usize| _mm256_maddubs_epi16(v[g], act(g));
    let a = _mm256_add_epi16(product(0), product(1));
    let b = _mm256_add_epi16(product(2), product(3));
    if BITS == 6 {
        _mm256_add_epi32(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones))
    } else {
        _mm256_madd_epi16(_mm256_add_epi16(a, b), ones)
    }
}

/// Sums of one panel for `N` activation rows.
///
/// # Safety
/// Needs AVX2 and FMA. `panel` holds `w.blocks` blocks of unpacked integers below `2^BITS` with
/// `HALVES` factors each, minima if `MIN`; `x` and `sums` have `N` rows.
#[target_feature(enable = "avx2,fma")]
unsafe fn kernel<const BITS: usize, const HALVES: usize, const MIN: bool, const N: usize>(
    w: &Packed,
    panel: Panel<'_>,
    x: Tile<'_>,
    sums: &mut [Row],
) {
    // Eight of the panel's rows at a time.
    for part in 0..2 {
        let mut weights = panel.weights.as_ptr().cast::<u8>().wrapping_add(32 * part);
        let mut scales = panel.scales.as_ptr().cast::<f32>().wrapping_add(8 * part);
        let mut mins = panel.mins.as_ptr().cast::<f32>().wrapping_add(8 * part);
        let mut rows = x.x.as_ptr();
        let mut acc = [_mm256_setzero_ps(); N];
        for _ in 0..w.blocks {
            // SAFETY: the pointers advance by one block at a time over the lengths that the caller
            // promises.
            unsafe {
                let mut wide = [_mm256_setzero_si256(); N];
                for h in 0..2 {
                    let v: [__m256i; 4] = std::array::from_fn(|g| {
                        _mm256_load_si256(weights.add(64 * (4 * h + g)).cast())
                    });
                    for n in 0..N {
                        let q = (*rows.add(n)).q.as_ptr().add(16 * h).cast();
                        let part = half_block::<BITS>(&v, q);
                        wide[n] = if HALVES == 2 {
                            part
                        } else {
                            _mm256_add_epi32(wide[n], part)
                        };
                    }
                    if HALVES == 1 && h == 0 {
                        continue;
                    }
                    let scale = _mm256_loadu_ps(scales);
                    for n in 0..N {
                        let x = &*rows.add(n);
                        if BITS != 8 && !MIN {
                            let start = _mm256_set1_epi32(x.start(HALVES, h) / TOP * w.offset);
                            wide[n] = _mm256_add_epi32(wide[n], start);
                        }
                        let scale = _mm256_mul_ps(scale, _mm256_set1_ps(x.scale));
                        acc[n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(wide[n]), scale, acc[n]);
                        if MIN {
                            let min = _mm256_loadu_ps(mins);
                            let sum = _mm256_set1_ps(x.sum(HALVES, h));
                            acc[n] = _mm256_fmadd_ps(min, sum, acc[n]);
                        }
                    }
                    scales = scales.add(16);
                    mins = mins.wrapping_add(16);
                }
                weights = weights.add(512);
                rows = rows.wrapping_add(x.stride);
            }
        }
        for (acc, sums) in acc.iter().zip(&mut *sums) {
            // SAFETY: a row has 16 values.
            unsafe { _mm256_storeu_ps(sums[8 * part..].as_mut_ptr(), *acc) };
        }
    }
}
