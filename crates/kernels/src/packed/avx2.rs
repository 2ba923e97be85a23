//! AVX2: `vpmaddubsw` adds two products of unsigned weights and signed activations in i16:
//! `2 * 15 * 127`, `2 * 31 * 127` and `2 * 63 * 127` leave room for 8, 4 and 2 such sums before they
//! are widened. Eight-bit weights are made signed, `|w| * sign(w) x`, and widen at once.

use std::arch::x86_64::*;

use super::activations::{TOP, Tile};
use super::panel::{Panel, Row};
use super::{Kind, Line, PANEL, Packed, PanelFactors};

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

/// Sums of one panel as it is packed for one row: [`tile`], bit for bit, with integers and factors unpacked in
/// registers.
pub(super) fn one(w: &Packed, panel: usize, x: Tile<'_>, sums: &mut Row) {
    assert!(x.rows == 1 && x.holds(w.blocks));
    let lines = w.lines(panel);
    assert_eq!(lines.len(), w.blocks * w.kind.lines());
    // SAFETY: `dispatch::isa` said AVX2; the lengths were checked.
    unsafe { one_inner(w, panel, lines, x, sums) };
}

/// # Safety
/// Needs the features below; `lines` are the panel's, `x` holds a row.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn one_inner(w: &Packed, panel: usize, lines: &[Line], x: Tile<'_>, sums: &mut Row) {
    /// Picks the instance for the integers, given how factors are read.
    macro_rules! bits {
        ($min:expr, $factors:expr) => {
            // SAFETY: the caller's promise.
            unsafe {
                match (w.kind, w.halves) {
                    (Kind::Bits4, 1) => row::<4, 1, $min>(w, lines, $factors, x, sums),
                    (Kind::Bits4, _) => row::<4, 2, $min>(w, lines, $factors, x, sums),
                    (Kind::Bits5, _) => row::<5, 1, $min>(w, lines, $factors, x, sums),
                    (Kind::Bits6, _) => row::<6, 2, $min>(w, lines, $factors, x, sums),
                    (Kind::Bits8, _) => row::<8, 1, $min>(w, lines, $factors, x, sums),
                }
            }
        };
    }
    let each = 8 * w.halves;
    match w.factors_of(panel) {
        PanelFactors::Blocks { scales, mins: [] } => {
            bits!(false, |at, p| (half(&scales[at], p), _mm256_setzero_ps()));
        }
        PanelFactors::Blocks { scales, mins } => {
            bits!(true, |at, p| (half(&scales[at], p), half(&mins[at], p)));
        }
        PanelFactors::Supers { units, scales } => {
            bits!(false, |at, p| (
                expand(&units[at / each], &scales[at], p),
                _mm256_setzero_ps()
            ));
        }
        PanelFactors::SupersWithMins {
            units,
            scales,
            min_units,
            mins,
        } => {
            let minus = _mm256_set1_ps(-0.0);
            bits!(true, |at, p| (
                expand(&units[at / each], &scales[at], p),
                _mm256_xor_ps(expand(&min_units[at / each], &mins[at], p), minus),
            ));
        }
    }
}

/// f16 to f32, of eight rows of a panel.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn half(halves: &[u16; PANEL], part: usize) -> __m256 {
    let of: &[u16; 8] = &halves.as_chunks().0[part];
    // SAFETY: eight values.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(of.as_ptr().cast()) })
}

/// A unit times an integer, of eight rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn expand(unit: &[u16; PANEL], integers: &[i8; PANEL], part: usize) -> __m256 {
    let of: &[i8; 8] = &integers.as_chunks().0[part];
    // SAFETY: eight bytes.
    let wide = _mm256_cvtepi8_epi32(unsafe { _mm_loadl_epi64(of.as_ptr().cast()) });
    _mm256_mul_ps(half(unit, part), _mm256_cvtepi32_ps(wide))
}

/// # Safety
/// Needs the features below. `lines` holds `w.blocks` blocks of `BITS` bits, `x` as many of one row;
/// `factors` gives scale and minimum of each of a block's `HALVES` groups for eight rows of the panel.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn row<const BITS: usize, const HALVES: usize, const MIN: bool>(
    w: &Packed,
    lines: &[Line],
    factors: impl Fn(usize, usize) -> (__m256, __m256),
    x: Tile<'_>,
    sums: &mut Row,
) {
    let mut acc = [_mm256_setzero_ps(); 2];
    for (b, weights) in lines.chunks_exact(BITS).enumerate() {
        for line in weights {
            let ahead = std::ptr::from_ref(line).wrapping_add(16 * BITS);
            _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
        }
        let x = x.block(b, 0);
        for (part, acc) in acc.iter_mut().enumerate() {
            // SAFETY: a block of `BITS` bits has as many vectors.
            let v = unsafe { block::<BITS>(weights.as_ptr(), part) };
            let sum = |h: usize| {
                // SAFETY: a block has 32 activations.
                unsafe { half_block::<BITS>(&v[h], x.q.as_ptr().add(16 * h).cast()) }
            };
            for h in 0..HALVES {
                let mut wide = sum(h);
                if HALVES == 1 {
                    wide = _mm256_add_epi32(wide, sum(1));
                }
                if BITS != 8 && !MIN {
                    let start = _mm256_set1_epi32(x.start(HALVES, h) / TOP * w.offset);
                    wide = _mm256_add_epi32(wide, start);
                }
                let (scale, min) = factors(b * HALVES + h, part);
                let scale = _mm256_mul_ps(scale, _mm256_set1_ps(x.scale));
                *acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(wide), scale, *acc);
                if MIN {
                    *acc = _mm256_fmadd_ps(min, _mm256_set1_ps(x.sum(HALVES, h)), *acc);
                }
            }
        }
    }
    for (part, acc) in acc.into_iter().enumerate() {
        // SAFETY: a row has 16 values.
        unsafe { _mm256_storeu_ps(sums[8 * part..].as_mut_ptr(), acc) };
    }
}

/// The integers of eight rows of a block, in two halves of four vectors: vector `g` of half `h` holds columns
/// `16 h + 4 g .. 16 h + 4 g + 4`.
///
/// # Safety
/// `p` points to a packed block of `BITS` bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn block<const BITS: usize>(p: *const Line, part: usize) -> [[__m256i; 4]; 2] {
    // SAFETY: the caller's promise; lines are aligned.
    let line = |i: usize| unsafe { _mm256_load_si256(p.add(i).cast::<__m256i>().add(part)) };
    if BITS == 8 {
        return [[0, 1, 2, 3], [4, 5, 6, 7]].map(|half| half.map(line));
    }
    let low = _mm256_set1_epi8(15);
    let mut w = [[_mm256_setzero_si256(); 4]; 2];
    for g in 0..4 {
        let both = line(g);
        w[0][g] = _mm256_and_si256(both, low);
        w[1][g] = _mm256_and_si256(_mm256_srli_epi16::<4>(both), low);
    }
    let with = |w: &mut __m256i, high: __m256i, bits: __m256i| {
        *w = _mm256_or_si256(*w, _mm256_and_si256(high, bits));
    };
    if BITS == 5 {
        let (plane, bit) = (line(4), _mm256_set1_epi8(16));
        with(&mut w[0][0], _mm256_slli_epi16::<4>(plane), bit);
        with(&mut w[0][1], _mm256_slli_epi16::<3>(plane), bit);
        with(&mut w[0][2], _mm256_slli_epi16::<2>(plane), bit);
        with(&mut w[0][3], _mm256_slli_epi16::<1>(plane), bit);
        with(&mut w[1][0], plane, bit);
        with(&mut w[1][1], _mm256_srli_epi16::<1>(plane), bit);
        with(&mut w[1][2], _mm256_srli_epi16::<2>(plane), bit);
        with(&mut w[1][3], _mm256_srli_epi16::<3>(plane), bit);
    }
    if BITS == 6 {
        let bits = _mm256_set1_epi8(0x30);
        for (half, w) in w.iter_mut().enumerate() {
            let plane = line(4 + half);
            with(&mut w[0], _mm256_slli_epi16::<4>(plane), bits);
            with(&mut w[1], _mm256_slli_epi16::<2>(plane), bits);
            with(&mut w[2], plane, bits);
            with(&mut w[3], _mm256_srli_epi16::<2>(plane), bits);
        }
    }
    w
}
