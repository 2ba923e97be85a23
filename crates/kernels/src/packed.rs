//! Quantised weights packed for integer products, and the products.
//!
//! # Layout
//!
//! Output rows go in panels of 8, the inner dimension in blocks of 32. A block of a panel is eight
//! vectors of 32 bytes: vector `g` holds, for each of the 8 rows, the integers of columns
//! `4 g .. 4 g + 4`. One broadcast of 4 activation bytes against one vector is then 32 products for
//! 8 outputs, with no horizontal sum at the end. Types of at most four bits keep two vectors in one
//! (low and high nibbles). Scales and minima follow as 8 values a group of 16 or 32 columns, in f16
//! where the file has them in f16. Nothing is quantised again: the packed weights are the file's.
//!
//! # Product
//!
//! Activations are rounded to int8 with one f32 scale for each 32 values (as llama.cpp's Q8_0). With
//! `q` the weight's integer stored without sign as `u = q + offset`,
//! `y = sum_b s_w s_x sum_i u_i x_i + (m_w - offset s_w) s_x sum_i x_i`; the integer sums are exact,
//! and the f32 sum runs over blocks in ascending order whatever the number of activation rows, so a
//! row's result does not depend on its batch.
//!
//! On AVX2 `vpmaddubsw` adds two products of unsigned weights and signed activations in i16:
//! `2 * 15 * 127`, `2 * 31 * 127` and `2 * 63 * 127` leave room for 8, 4 and 2 such sums before they
//! are widened. Eight-bit weights use `|w| * sign(w) x` and widen at once.

use std::ops::Range;

use half::f16;
use rayon::prelude::*;

use crate::dispatch::{Isa, isa};
use crate::quant::{GgmlType, Unpacked, group_len, unpack_block};

/// Columns of a block.
pub(crate) const BLOCK: usize = 32;
/// Rows of a panel.
pub(crate) const PANEL: usize = 8;
/// Activation rows of a tile.
const TILE: usize = 4;
/// Bytes of weights that a task keeps in its cache.
const L2_WEIGHTS: usize = 192 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Two integers of at most 4 bits a byte.
    Nibble,
    /// Unsigned, at most 5 bits, one scale a block.
    Byte5,
    /// Unsigned, at most 6 bits, two scales a block.
    Byte6,
    /// Signed, 8 bits.
    Byte8,
}

/// Scales or minima: `[panel][block][half][8]`.
#[derive(Debug)]
enum Factors {
    F16(Vec<u16>),
    F32(Vec<f32>),
}

impl Factors {
    fn bytes(&self) -> usize {
        match self {
            Self::F16(v) => v.len() * 2,
            Self::F32(v) => v.len() * 4,
        }
    }

    fn get(&self, i: usize) -> f32 {
        match self {
            Self::F16(v) => f16::from_bits(v[i]).to_f32(),
            Self::F32(v) => v[i],
        }
    }
}

/// A packed matrix `[out, in]`.
#[derive(Debug)]
pub(crate) struct Packed {
    kind: Kind,
    rows: usize,
    blocks: usize,
    halves: usize,
    offset: i32,
    weights: Vec<u8>,
    scales: Factors,
    mins: Option<Factors>,
}

/// One block of activations as a kernel reads it: everything at small offsets from one pointer.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct XBlock {
    q: [i8; BLOCK],
    scale: f32,
    /// `scale` times the sum of all 32 integers, and of the first and second 16.
    sum: f32,
    sum_half: [f32; 2],
}

/// Activations as int8 blocks, `[n, in / 32]`.
#[derive(Debug, Default)]
pub(crate) struct Activations(Vec<XBlock>);

impl Activations {
    /// Rounds `x` `[n, columns]`.
    pub(crate) fn round(&mut self, x: &[f32], columns: usize) {
        self.0.resize(x.len() / BLOCK, XBlock::default());
        let one = |(x, out): (&[f32], &mut [XBlock])| {
            #[cfg(target_arch = "x86_64")]
            if isa() >= Isa::Avx2 {
                // SAFETY: `isa` returns Avx2 or more only where the processor has these features.
                return unsafe { quantise_avx2(x, out) };
            }
            quantise(x, out);
        };
        let blocks = columns / BLOCK;
        if x.len() < 1 << 14 {
            one((x, &mut self.0));
        } else {
            x.par_chunks(columns)
                .zip(self.0.par_chunks_mut(blocks))
                .for_each(one);
        }
    }
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
        let mut rounded = [0.0f32; BLOCK];
        for i in 0..BLOCK {
            rounded[i] = (x[i] * inverse + ROUND) - ROUND;
        }
        let mut sums = [0.0f32; 2];
        for i in 0..16 {
            sums[0] += rounded[i];
            sums[1] += rounded[16 + i];
        }
        for i in 0..BLOCK {
            // |rounded| is at most 127; NaN becomes 0.
            out.q[i] = rounded[i] as i32 as i8;
        }
        out.scale = largest / 127.0;
        out.sum = out.scale * (sums[0] + sums[1]);
        out.sum_half = [out.scale * sums[0], out.scale * sums[1]];
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn quantise_avx2(x: &[f32], out: &mut [XBlock]) {
    quantise(x, out);
}

/// A pointer to the output that tasks share; each writes columns of its own panels only.
#[derive(Clone, Copy)]
pub(crate) struct Shared(*mut f32);

// SAFETY: tasks write disjoint elements, and the borrow of the output outlives the parallel loop.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub(crate) fn new(y: &mut [f32]) -> Self {
        Self(y.as_mut_ptr())
    }

    /// # Safety
    /// `at` is in bounds of the output and no other task accesses it.
    pub(crate) unsafe fn write(self, at: usize, value: f32) {
        // SAFETY: the caller's promise.
        unsafe { *self.0.add(at) = value }
    }
}

impl Packed {
    /// Packs `rows` rows of `columns` values of a quantised type; `bytes` is the whole matrix.
    ///
    /// The caller has checked that `columns` is a multiple of 32 and of the type's block, and that
    /// `bytes` has the right length.
    pub(crate) fn new(ty: GgmlType, bytes: &[u8], rows: usize, columns: usize) -> Self {
        let (kind, offset) = match ty {
            GgmlType::Q4_0 => (Kind::Nibble, 8),
            GgmlType::Q4_1 | GgmlType::Q4K => (Kind::Nibble, 0),
            GgmlType::Q5_0 => (Kind::Byte5, 16),
            GgmlType::Q5_1 | GgmlType::Q5K => (Kind::Byte5, 0),
            GgmlType::Q2K => (Kind::Byte6, 0),
            GgmlType::Q3K => (Kind::Byte6, 4),
            GgmlType::Q6K => (Kind::Byte6, 32),
            _ => (Kind::Byte8, 0),
        };
        let with_min = matches!(
            ty,
            GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q2K | GgmlType::Q4K | GgmlType::Q5K
        );
        let f16_factors = ty.block_len() == 32;
        let halves = 32 / group_len(ty);
        let (blocks, panels) = (columns / BLOCK, rows.div_ceil(PANEL));
        let block_bytes = if kind == Kind::Nibble { 128 } else { 256 };
        let factors = panels * blocks * halves * PANEL;
        let mut weights = vec![0u8; panels * blocks * block_bytes];
        let mut scales = vec![0.0f32; factors];
        let mut mins = vec![0.0f32; if with_min { factors } else { 0 }];
        let row_bytes = columns / ty.block_len() * ty.block_bytes();
        let per_panel = blocks * halves * PANEL;
        let min_chunk = if with_min { per_panel } else { 1 };
        let mut min_panels: Vec<&mut [f32]> = mins.chunks_mut(min_chunk).collect();
        min_panels.resize_with(panels, Default::default);
        weights
            .par_chunks_mut(blocks * block_bytes)
            .zip(scales.par_chunks_mut(per_panel))
            .zip(min_panels.into_par_iter())
            .enumerate()
            .for_each(|(panel, ((weights, scales), mins))| {
                let mut block = Unpacked::default();
                let group = group_len(ty);
                for r in 0..PANEL.min(rows - panel * PANEL) {
                    let row = panel * PANEL + r;
                    let bytes = &bytes[row * row_bytes..(row + 1) * row_bytes];
                    for (at, b) in bytes.chunks_exact(ty.block_bytes()).enumerate() {
                        unpack_block(ty, b, &mut block);
                        for i in 0..ty.block_len() {
                            let column = at * ty.block_len() + i;
                            let (b, i32th) = (column / BLOCK, column % BLOCK);
                            let u = (i32::from(block.q[i]) + offset) as u8;
                            let (g, lane) = (i32th / 4, r * 4 + i32th % 4);
                            if kind == Kind::Nibble {
                                weights[b * 128 + (g % 4) * 32 + lane] |= u << (4 * (g / 4));
                            } else {
                                weights[b * 256 + g * 32 + lane] = u;
                            }
                            if i % group == 0 {
                                let f = (b * halves + i32th / group) * PANEL + r;
                                scales[f] = block.scale[i / group];
                                if with_min {
                                    mins[f] = block.min[i / group];
                                }
                            }
                        }
                    }
                }
            });
        let store = |v: Vec<f32>| {
            if f16_factors {
                Factors::F16(v.iter().map(|&x| f16::from_f32(x).to_bits()).collect())
            } else {
                Factors::F32(v)
            }
        };
        Self {
            kind,
            rows,
            blocks,
            halves,
            offset,
            weights,
            scales: store(scales),
            mins: with_min.then(|| store(mins)),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.weights.len() + self.scales.bytes() + self.mins.as_ref().map_or(0, Factors::bytes)
    }

    /// Panels a task and number of tasks for `n` rows: a task should be worth some ten microseconds,
    /// its weights should stay in the L2 cache while tiles of activations pass, and there should be
    /// several for each thread.
    pub(crate) fn split(&self, n: usize) -> (usize, usize) {
        let panels = self.rows.div_ceil(PANEL);
        let panel_bytes = (self.bytes() / panels.max(1)).max(1);
        let work = self.blocks * BLOCK * PANEL * n;
        let enough = (200_000 / work.max(1)).max(1);
        let group = if n <= 4 {
            enough.max(panels / (8 * crate::threads()))
        } else {
            (L2_WEIGHTS / panel_bytes).clamp(enough, (panels / (4 * crate::threads())).max(enough))
        };
        (group, panels.div_ceil(group))
    }

    /// `y[n, out] = x W^T + bias` for some panels' outputs.
    ///
    /// # Safety
    /// `out` is `[n, rows]`; nobody else accesses the columns of these panels.
    pub(crate) unsafe fn task(
        &self,
        panels: Range<usize>,
        x: &Activations,
        n: usize,
        bias: Option<&[f32]>,
        out: Shared,
    ) {
        assert_eq!(x.0.len(), n * self.blocks, "activations are [n, in / 32]");
        let panels = panels.start..panels.end.min(self.rows.div_ceil(PANEL));
        let mut sums = [[0.0f32; PANEL]; TILE];
        for first in (0..n).step_by(TILE) {
            let tile = (n - first).min(TILE);
            for panel in panels.clone() {
                self.panel(panel, x, first, &mut sums[..tile]);
                for (t, sums) in sums[..tile].iter().enumerate() {
                    let rows = (self.rows - panel * PANEL).min(PANEL);
                    for (r, sum) in sums[..rows].iter().enumerate() {
                        let row = panel * PANEL + r;
                        let value = sum + bias.map_or(0.0, |b| b[row]);
                        // SAFETY: `row` is below `rows` and the activation row below `n`, so the
                        // element is in bounds; the column is this task's.
                        unsafe { out.write((first + t) * self.rows + row, value) };
                    }
                }
            }
        }
    }

    /// The sums of one panel for up to four activation rows from `first` on.
    fn panel(&self, panel: usize, x: &Activations, first: usize, sums: &mut [[f32; PANEL]]) {
        #[cfg(target_arch = "x86_64")]
        if isa() >= Isa::Avx2 {
            return avx2::panel(self, panel, x, first, sums);
        }
        self.panel_portable(panel, x, first, sums);
    }

    fn weight(&self, panel: usize, block: usize, g: usize, lane: usize) -> i32 {
        match self.kind {
            Kind::Nibble => {
                let at = (panel * self.blocks + block) * 128 + (g % 4) * 32 + lane;
                i32::from((self.weights[at] >> (4 * (g / 4))) & 15)
            }
            Kind::Byte8 => {
                let at = (panel * self.blocks + block) * 256 + g * 32 + lane;
                i32::from(self.weights[at] as i8)
            }
            Kind::Byte5 | Kind::Byte6 => {
                let at = (panel * self.blocks + block) * 256 + g * 32 + lane;
                i32::from(self.weights[at])
            }
        }
    }

    fn panel_portable(
        &self,
        panel: usize,
        x: &Activations,
        first: usize,
        sums: &mut [[f32; PANEL]],
    ) {
        for (t, sums) in sums.iter_mut().enumerate() {
            *sums = [0.0; PANEL];
            let row = &x.0[(first + t) * self.blocks..(first + t + 1) * self.blocks];
            for (b, x) in row.iter().enumerate() {
                for h in 0..self.halves {
                    let groups = 8 / self.halves;
                    let x_sum = if self.halves == 1 {
                        x.sum
                    } else {
                        x.sum_half[h]
                    };
                    let factor = ((panel * self.blocks + b) * self.halves + h) * PANEL;
                    for (r, sum) in sums.iter_mut().enumerate() {
                        let mut dot = 0;
                        for g in h * groups..(h + 1) * groups {
                            for j in 0..4 {
                                let q = i32::from(x.q[g * 4 + j]);
                                dot += self.weight(panel, b, g, r * 4 + j) * q;
                            }
                        }
                        let scale = self.scales.get(factor + r);
                        let min = self.mins.as_ref().map_or(0.0, |m| m.get(factor + r))
                            - self.offset as f32 * scale;
                        *sum += dot as f32 * (scale * x.scale) + min * x_sum;
                    }
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{Activations, Factors, Kind, PANEL, Packed, XBlock};

    const NIBBLE: u8 = 0;
    const BYTE5: u8 = 1;
    const BYTE6: u8 = 2;
    const BYTE8: u8 = 3;

    pub(super) fn panel(
        w: &Packed,
        panel: usize,
        x: &Activations,
        first: usize,
        sums: &mut [[f32; PANEL]],
    ) {
        let rows = &x.0[first * w.blocks..(first + sums.len()) * w.blocks];
        /// Picks the instance for the number of rows.
        macro_rules! rows {
            ($kind:expr, $half:expr, $min:expr) => {
                match sums.len() {
                    // SAFETY: `dispatch::isa` said AVX2; `rows` holds the rows of `sums`.
                    1 => unsafe { kernel::<$kind, $half, $min, 1>(w, panel, rows, sums) },
                    // SAFETY: as above.
                    2 => unsafe { kernel::<$kind, $half, $min, 2>(w, panel, rows, sums) },
                    // SAFETY: as above.
                    3 => unsafe { kernel::<$kind, $half, $min, 3>(w, panel, rows, sums) },
                    // SAFETY: as above; a tile has at most four rows.
                    _ => unsafe { kernel::<$kind, $half, $min, 4>(w, panel, rows, sums) },
                }
            };
        }
        let half = matches!(w.scales, Factors::F16(_));
        match (w.kind, half, w.mins.is_some()) {
            (Kind::Nibble, true, false) => rows!(NIBBLE, true, false),
            (Kind::Nibble, true, true) => rows!(NIBBLE, true, true),
            (Kind::Nibble, false, _) => rows!(NIBBLE, false, true),
            (Kind::Byte5, true, false) => rows!(BYTE5, true, false),
            (Kind::Byte5, true, true) => rows!(BYTE5, true, true),
            (Kind::Byte5, false, _) => rows!(BYTE5, false, true),
            (Kind::Byte6, _, false) => rows!(BYTE6, false, false),
            (Kind::Byte6, _, true) => rows!(BYTE6, false, true),
            (Kind::Byte8, _, _) => rows!(BYTE8, true, false),
        }
    }

    /// Where eight factors begin, as bytes.
    fn start(f: &Factors, at: usize) -> *const u8 {
        match f {
            Factors::F16(v) => v[at..].as_ptr().cast(),
            Factors::F32(v) => v[at..].as_ptr().cast(),
        }
    }

    /// Eight factors.
    ///
    /// # Safety
    /// Needs F16C; `p` points to eight f16 (`HALF`) or f32.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn factors<const HALF: bool>(p: *const u8) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe {
            if HALF {
                _mm256_cvtph_ps(_mm_loadu_si128(p.cast()))
            } else {
                _mm256_loadu_ps(p.cast())
            }
        }
    }

    /// Products of four vectors of weights with 16 activations: sums of two in i16, ready to widen.
    ///
    /// # Safety
    /// Needs AVX2; `q` points to 16 integers.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn half_block<const KIND: u8>(v: &[__m256i; 4], q: *const i32) -> __m256i {
        let ones = _mm256_set1_epi16(1);
        // SAFETY: the caller's promise.
        let act = |g: usize| unsafe { _mm256_set1_epi32(q.add(g).read_unaligned()) };
        if KIND == BYTE8 {
            let signed = |g: usize| {
                let x = _mm256_sign_epi8(act(g), v[g]);
                _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(v[g]), x), ones)
            };
            return _mm256_add_epi32(
                _mm256_add_epi32(signed(0), signed(1)),
                _mm256_add_epi32(signed(2), signed(3)),
            );
        }
        let product = |g: usize| _mm256_maddubs_epi16(v[g], act(g));
        let a = _mm256_add_epi16(product(0), product(1));
        let b = _mm256_add_epi16(product(2), product(3));
        if KIND == BYTE6 {
            _mm256_add_epi32(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones))
        } else {
            _mm256_madd_epi16(_mm256_add_epi16(a, b), ones)
        }
    }

    /// Sums of one panel for `N` activation rows.
    ///
    /// # Safety
    /// Needs AVX2, FMA and F16C. `x` holds `N` rows of `w.blocks` blocks, `sums` at least `N` rows.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn kernel<const KIND: u8, const HALF: bool, const MIN: bool, const N: usize>(
        w: &Packed,
        panel: usize,
        x: &[XBlock],
        sums: &mut [[f32; PANEL]],
    ) {
        let blocks = w.blocks;
        let block_bytes = if KIND == NIBBLE { 128 } else { 256 };
        let halves = if KIND == BYTE6 { 2 } else { 1 };
        let factor_bytes = if HALF { 2 } else { 4 } * PANEL;
        let first_factor = panel * blocks * halves * PANEL;
        let mut weights = w.weights[panel * blocks * block_bytes..].as_ptr();
        let mut scales = start(&w.scales, first_factor);
        let mut mins = w.mins.as_ref().map_or(scales, |m| start(m, first_factor));
        let low = _mm256_set1_epi8(15);
        let minus_offset = _mm256_set1_ps(-w.offset as f32);
        let mut acc = [_mm256_setzero_ps(); N];
        let mut rows = [x.as_ptr(); N];
        for (n, row) in rows.iter_mut().enumerate() {
            *row = x[n * blocks..].as_ptr();
        }
        for _ in 0..blocks {
            // SAFETY: the pointers advance by one block at a time over `blocks` blocks of the
            // panel's weights and factors and of each row; prefetching touches nothing.
            unsafe {
                if N == 1 {
                    // Decoding is bound by memory: ask for the weights some blocks ahead.
                    for line in 0..block_bytes / 64 {
                        let ahead = weights.wrapping_add(4 * block_bytes + 64 * line);
                        _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                    }
                }
                let mut wide = [_mm256_setzero_si256(); N];
                for h in 0..2 {
                    let mut v = [_mm256_setzero_si256(); 4];
                    for (g, v) in v.iter_mut().enumerate() {
                        *v = if KIND == NIBBLE {
                            let both = _mm256_loadu_si256(weights.add(32 * g).cast());
                            let part = if h == 0 {
                                both
                            } else {
                                _mm256_srli_epi16(both, 4)
                            };
                            _mm256_and_si256(part, low)
                        } else {
                            _mm256_loadu_si256(weights.add(128 * h + 32 * g).cast())
                        };
                    }
                    for n in 0..N {
                        let q = (*rows[n]).q.as_ptr().add(16 * h).cast();
                        let part = half_block::<KIND>(&v, q);
                        wide[n] = if halves == 2 {
                            part
                        } else {
                            _mm256_add_epi32(wide[n], part)
                        };
                    }
                    if halves == 2 || h == 1 {
                        let s = factors::<HALF>(scales);
                        let mut m = _mm256_mul_ps(s, minus_offset);
                        if MIN {
                            m = factors::<HALF>(mins);
                        }
                        for n in 0..N {
                            let x = &*rows[n];
                            let scale = _mm256_mul_ps(s, _mm256_set1_ps(x.scale));
                            acc[n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(wide[n]), scale, acc[n]);
                            if KIND != BYTE8 {
                                let sum = if halves == 2 { x.sum_half[h] } else { x.sum };
                                acc[n] = _mm256_fmadd_ps(m, _mm256_set1_ps(sum), acc[n]);
                            }
                        }
                        scales = scales.add(factor_bytes);
                        mins = mins.add(if MIN { factor_bytes } else { 0 });
                    }
                }
                weights = weights.add(block_bytes);
                for row in &mut rows {
                    *row = row.add(1);
                }
            }
        }
        for (acc, sums) in acc.iter().zip(sums) {
            // SAFETY: `sums` has eight values.
            unsafe { _mm256_storeu_ps(sums.as_mut_ptr(), *acc) };
        }
    }
}
