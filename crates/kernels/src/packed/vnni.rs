//! AVX-512 VNNI: `vpdpbusd` adds four products of a row's four columns to one i32 lane, 16 rows at
//! once. The unsigned operand is the weight with its offset, as stored for a single row and [`TOP`] once
//! unpacked; it is taken out by starting the sum at `-offset * sum_i x_i`, which is exact, and with `TOP`
//! no more than a load.

use std::arch::x86_64::*;

use super::activations::{TILE, TOP, Tile};
use super::panel::{Panel, Row};
use super::{Kind, Line, PANEL, Packed, PanelFactors};

/// Sums of one panel for a tile of activations; of [`TILE`] rows the sums, the weights of a block and a
/// scale fill the registers. The integers are unpacked, or with `PACKED` as they are stored, and are then
/// unpacked in registers.
pub(super) fn tile<const PACKED: bool>(
    w: &Packed,
    panel: Panel<'_>,
    x: Tile<'_>,
    sums: &mut [Row],
) {
    let lines = if PACKED { w.kind.lines() } else { 8 };
    assert!(sums.len() == x.rows && x.rows <= TILE && x.holds(w.blocks));
    assert_eq!(panel.weights.len(), w.blocks * lines);
    assert_eq!(panel.scales.len(), w.blocks * w.halves);
    assert!(panel.mins.is_empty() || panel.mins.len() == panel.scales.len());
    let min = !panel.mins.is_empty();
    // Fewer rows at a time where that wastes none.
    let mut first = 0;
    while first < sums.len() {
        let left = sums.len() - first;
        let n = 1 << left.ilog2();
        let sums = &mut sums[first..first + n];
        let x = x.part(first, n);
        /// Picks the instance for the number of rows.
        macro_rules! rows {
            ($bits:expr, $halves:expr, $min:expr) => {
                // SAFETY: `dispatch::isa` said AVX-512; the lengths were checked.
                unsafe {
                    match n {
                        1 => kernel::<$bits, $halves, $min, 1>(w, panel, x, sums),
                        2 => kernel::<$bits, $halves, $min, 2>(w, panel, x, sums),
                        4 => kernel::<$bits, $halves, $min, 4>(w, panel, x, sums),
                        8 => kernel::<$bits, $halves, $min, 8>(w, panel, x, sums),
                        _ => kernel::<$bits, $halves, $min, 16>(w, panel, x, sums),
                    }
                }
            };
        }
        match (if PACKED { w.kind } else { Kind::Bits8 }, w.halves, min) {
            (Kind::Bits4, 1, false) => rows!(4, 1, false),
            (Kind::Bits4, 1, true) => rows!(4, 1, true),
            (Kind::Bits4, _, false) => rows!(4, 2, false),
            (Kind::Bits4, _, true) => rows!(4, 2, true),
            (Kind::Bits5, _, false) => rows!(5, 1, false),
            (Kind::Bits5, _, true) => rows!(5, 1, true),
            (Kind::Bits6, ..) => rows!(6, 2, false),
            (Kind::Bits8, 1, false) => rows!(8, 1, false),
            (Kind::Bits8, 1, true) => rows!(8, 1, true),
            (Kind::Bits8, _, false) => rows!(8, 2, false),
            (Kind::Bits8, _, true) => rows!(8, 2, true),
        }
        first += n;
    }
}

/// Sums of one panel as it is packed for one row: [`tile`], bit for bit, with the factors widened in registers
/// too.
pub(super) fn one(w: &Packed, panel: usize, x: Tile<'_>, sums: &mut Row) {
    assert!(x.rows == 1 && x.holds(w.blocks));
    let lines = w.lines(panel);
    assert_eq!(lines.len(), w.blocks * w.kind.lines());
    // SAFETY: `dispatch::isa` said AVX-512; the lengths were checked.
    unsafe { one_inner(w, panel, lines, x, sums) };
}

/// # Safety
/// Needs the features below; `lines` are the panel's, `x` holds a row.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
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
                    (Kind::Bits8, 1) => row::<8, 1, $min>(w, lines, $factors, x, sums),
                    (Kind::Bits8, _) => row::<8, 2, $min>(w, lines, $factors, x, sums),
                }
            }
        };
    }
    let each = 8 * w.halves;
    match w.factors_of(panel) {
        PanelFactors::Blocks { scales, mins: [] } => {
            bits!(false, |at| (half(&scales[at]), _mm512_setzero_ps()));
        }
        PanelFactors::Blocks { scales, mins } => {
            bits!(true, |at| (half(&scales[at]), half(&mins[at])));
        }
        PanelFactors::Supers { units, scales } => {
            bits!(false, |at| (
                expand(&units[at / each], &scales[at]),
                _mm512_setzero_ps()
            ));
        }
        PanelFactors::SupersWithMins {
            units,
            scales,
            min_units,
            mins,
        } => {
            let minus = _mm512_set1_ps(-0.0);
            bits!(true, |at| (
                expand(&units[at / each], &scales[at]),
                _mm512_xor_ps(expand(&min_units[at / each], &mins[at]), minus),
            ));
        }
    }
}

/// f16 to f32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
fn half(halves: &[u16; PANEL]) -> __m512 {
    // SAFETY: 16 values.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(halves.as_ptr().cast()) })
}

/// A unit times an integer.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
fn expand(unit: &[u16; PANEL], integers: &[i8; PANEL]) -> __m512 {
    // SAFETY: 16 values.
    let integers = _mm512_cvtepi8_epi32(unsafe { _mm_loadu_si128(integers.as_ptr().cast()) });
    _mm512_mul_ps(half(unit), _mm512_cvtepi32_ps(integers))
}

/// # Safety
/// Needs the features below. `lines` holds `w.blocks` blocks of `BITS` bits, `x` as many of one row;
/// `factors` gives scale and minimum of each of a block's `HALVES` groups.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
unsafe fn row<const BITS: usize, const HALVES: usize, const MIN: bool>(
    w: &Packed,
    lines: &[Line],
    factors: impl Fn(usize) -> (__m512, __m512),
    x: Tile<'_>,
    sums: &mut Row,
) {
    let mut acc = _mm512_setzero_ps();
    for (b, weights) in lines.chunks_exact(BITS).enumerate() {
        for line in weights {
            let ahead = std::ptr::from_ref(line).wrapping_add(16 * BITS);
            _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
        }
        // SAFETY: a block of `BITS` bits has as many vectors.
        let v = unsafe { block::<BITS>(weights.as_ptr()) };
        let x = x.block(b, 0);
        let q = x.q.as_chunks::<4>().0;
        for h in 0..HALVES {
            let (scale, min) = factors(b * HALVES + h);
            let mut sum = _mm512_setzero_si512();
            if !MIN {
                let start = x.start(HALVES, h);
                sum = _mm512_set1_epi32(if BITS == 8 {
                    start
                } else {
                    start / TOP * w.offset
                });
            }
            for g in h * 8 / HALVES..(h + 1) * 8 / HALVES {
                let q = i32::from_ne_bytes(q[g].map(|q| q as u8));
                sum = _mm512_dpbusd_epi32(sum, v[g], _mm512_set1_epi32(q));
            }
            let scale = _mm512_mul_ps(scale, _mm512_set1_ps(x.scale));
            acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc);
            if MIN {
                acc = _mm512_fmadd_ps(min, _mm512_set1_ps(x.sum(HALVES, h)), acc);
            }
        }
    }
    // SAFETY: a row has 16 values.
    unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), acc) };
}

/// The integers of a block: vector `g` holds columns `4 g .. 4 g + 4`.
///
/// # Safety
/// `p` points to a packed block of `BITS` bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
pub(super) unsafe fn block<const BITS: usize>(p: *const Line) -> [__m512i; 8] {
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

/// Some milliseconds of products that read no memory; returns the number of operations.
pub(super) fn spin() -> f64 {
    const ROUNDS: usize = 1 << 20;
    // SAFETY: `dispatch::isa` said AVX-512.
    std::hint::black_box(unsafe { spin_inner(ROUNDS) });
    // Sixteen instructions of 64 multiply-adds.
    ROUNDS as f64 * 16.0 * 128.0
}

#[target_feature(enable = "avx512f,avx512vnni")]
fn spin_inner(rounds: usize) -> i32 {
    let mut acc = [_mm512_setzero_si512(); 16];
    for _ in 0..rounds {
        // Opaque, so that the loop is not taken for one round.
        let x = std::hint::black_box(_mm512_setzero_si512());
        for acc in &mut acc {
            *acc = _mm512_dpbusd_epi32(*acc, x, x);
        }
    }
    acc.iter().map(|a| _mm512_reduce_add_epi32(*a)).sum()
}

/// Unpacks a panel's integers into `out`, eight vectors a block; into nothing if `out` is empty or the type
/// is stored so. Where there are no minima they get the offset [`TOP`].
pub(super) fn unpack(w: &Packed, panel: usize, out: &mut [Line]) {
    if out.is_empty() {
        return;
    }
    assert_eq!(out.len(), 8 * w.blocks);
    let lines = w.lines(panel);
    assert_eq!(lines.len(), w.kind.lines() * w.blocks);
    let bias = if w.has_mins() { 0 } else { TOP - w.offset } as i8;
    // SAFETY: `dispatch::isa` said AVX-512; the lengths were checked.
    unsafe {
        match w.kind {
            Kind::Bits4 => unpack_blocks::<4>(lines, bias, out),
            Kind::Bits5 => unpack_blocks::<5>(lines, bias, out),
            Kind::Bits6 => unpack_blocks::<6>(lines, bias, out),
            Kind::Bits8 => unpack_blocks::<8>(lines, bias, out),
        }
    }
}

/// # Safety
/// Needs the features below; `lines` and `out` hold as many blocks, of `BITS` and of eight vectors.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
unsafe fn unpack_blocks<const BITS: usize>(lines: &[Line], bias: i8, out: &mut [Line]) {
    let bias = _mm512_set1_epi8(bias);
    let blocks = lines.chunks_exact(BITS).zip(out.chunks_exact_mut(8));
    for (packed, out) in blocks {
        // SAFETY: a block of `BITS` bits has as many vectors (of four bits four, and so on).
        let v = unsafe { block::<BITS>(packed.as_ptr()) };
        for (v, out) in v.into_iter().zip(out) {
            // SAFETY: 64 bytes, aligned.
            unsafe { _mm512_store_si512(out.0.as_mut_ptr().cast(), _mm512_add_epi8(v, bias)) };
        }
    }
}

/// Sums of one panel for `N` activation rows.
///
/// # Safety
/// Needs the features below. `panel` holds `w.blocks` blocks of `BITS` bits with `HALVES` factors
/// each, minima if `MIN`; `x` and `sums` have `N` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
unsafe fn kernel<const BITS: usize, const HALVES: usize, const MIN: bool, const N: usize>(
    w: &Packed,
    panel: Panel<'_>,
    x: Tile<'_>,
    sums: &mut [Row],
) {
    /// Written out for each row: a loop of 16 is not unrolled, and its sums would live in memory.
    macro_rules! rows {
        (|$n:ident| $body:block) => {
            rows!($n $body 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
        };
        ($n:ident $body:block $($i:literal)*) => {
            $(if $i < N {
                let $n: usize = $i;
                $body
            })*
        };
    }
    let lines = if BITS == 8 { 8 } else { BITS };
    let mut weights = panel.weights.as_ptr();
    let (mut scales, mut mins) = (panel.scales.as_ptr(), panel.mins.as_ptr());
    let mut rows = x.x.as_ptr();
    let mut acc = [_mm512_setzero_ps(); TILE];
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
                let scale = _mm512_loadu_ps(scales.cast());
                rows!(|n| {
                    let x = &*rows.add(n);
                    let mut sum = _mm512_setzero_si512();
                    if !MIN {
                        let start = x.start(HALVES, h);
                        let start = if BITS == 8 {
                            start
                        } else {
                            start / TOP * w.offset
                        };
                        sum = _mm512_set1_epi32(start);
                    }
                    for g in h * 8 / HALVES..(h + 1) * 8 / HALVES {
                        let q = x.q.as_ptr().cast::<i32>().add(g).read_unaligned();
                        sum = _mm512_dpbusd_epi32(sum, v[g], _mm512_set1_epi32(q));
                    }
                    let scale = _mm512_mul_ps(scale, _mm512_set1_ps(x.scale));
                    acc[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc[n]);
                });
                if MIN {
                    let min = _mm512_loadu_ps(mins.cast());
                    rows!(|n| {
                        let sum = (*rows.add(n)).sum(HALVES, h);
                        acc[n] = _mm512_fmadd_ps(min, _mm512_set1_ps(sum), acc[n]);
                    });
                    mins = mins.add(1);
                }
                scales = scales.add(1);
            }
            weights = weights.add(lines);
            rows = rows.wrapping_add(x.stride);
        }
    }
    for (acc, sums) in acc.iter().zip(sums) {
        const { assert!(PANEL == 16) }
        // SAFETY: a row has 16 values.
        unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), *acc) };
    }
}
