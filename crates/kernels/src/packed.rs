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
//! `y = sum_b s_w s_x (sum_i u_i x_i - offset sum_i x_i) + m_w s_x sum_i x_i`; the integer sums are
//! exact, and the f32 sum runs over blocks in ascending order whatever the number of activation
//! rows, so a row's result does not depend on its batch.
//!
//! On AVX2 `vpmaddubsw` adds two products of unsigned weights and signed activations in i16:
//! `2 * 15 * 127`, `2 * 31 * 127` and `2 * 63 * 127` leave room for 8, 4 and 2 such sums before they
//! are widened. Eight-bit weights use `|w| * sign(w) x` and widen at once.

use half::f16;
use rayon::prelude::*;

use crate::dispatch::{Isa, isa};
use crate::quant::{GgmlType, Unpacked, group_len, unpack_block};

/// Columns of a block.
pub(crate) const BLOCK: usize = 32;
/// Rows of a panel.
pub(crate) const PANEL: usize = 8;

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

/// Activations as int8: what one product reads.
#[derive(Debug, Default)]
pub(crate) struct Activations {
    q: Vec<i8>,      // [n, in]
    scale: Vec<f32>, // [n, in / 32]
    sum: Vec<i32>,   // [n, in / 32, 2]: sums of 16 integers each
}

impl Activations {
    /// Rounds `x` `[n, columns]` to int8 blocks.
    pub(crate) fn quantise(&mut self, x: &[f32], columns: usize) {
        let n = x.len() / columns;
        let blocks = columns / BLOCK;
        self.q.resize(x.len(), 0);
        self.scale.resize(n * blocks, 0.0);
        self.sum.resize(n * blocks * 2, 0);
        let one = |x: &[f32], q: &mut [i8], scale: &mut [f32], sum: &mut [i32]| {
            #[cfg(target_arch = "x86_64")]
            if isa() == Isa::Avx2 {
                // SAFETY: `isa` returns Avx2 only where the processor has these features.
                return unsafe { quantise_row_avx2(x, q, scale, sum) };
            }
            quantise_row(x, q, scale, sum);
        };
        let rows = self
            .q
            .par_chunks_mut(columns)
            .zip(self.scale.par_chunks_mut(blocks))
            .zip(self.sum.par_chunks_mut(blocks * 2))
            .zip(x.par_chunks(columns));
        if n < 16 {
            let rows = self
                .q
                .chunks_mut(columns)
                .zip(self.scale.chunks_mut(blocks))
                .zip(self.sum.chunks_mut(blocks * 2))
                .zip(x.chunks(columns));
            rows.for_each(|(((q, scale), sum), x)| one(x, q, scale, sum));
        } else {
            rows.for_each(|(((q, scale), sum), x)| one(x, q, scale, sum));
        }
    }
}

#[inline(always)]
fn quantise_row(x: &[f32], q: &mut [i8], scale: &mut [f32], sum: &mut [i32]) {
    /// Adding and subtracting it rounds a float of magnitude below 2^22 to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    for (b, (x, q)) in x
        .chunks_exact(BLOCK)
        .zip(q.chunks_exact_mut(BLOCK))
        .enumerate()
    {
        let mut lanes = [0.0f32; 8];
        for x in x.chunks_exact(8) {
            for (m, v) in lanes.iter_mut().zip(x) {
                *m = m.max(v.abs());
            }
        }
        let largest = lanes.iter().copied().fold(0.0, f32::max);
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        scale[b] = largest / 127.0;
        for (q, v) in q.iter_mut().zip(x) {
            *q = ((v * inverse + ROUND) - ROUND) as i32 as i8;
        }
        for h in 0..2 {
            sum[2 * b + h] = q[16 * h..16 * h + 16].iter().map(|&v| i32::from(v)).sum();
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn quantise_row_avx2(x: &[f32], q: &mut [i8], scale: &mut [f32], sum: &mut [i32]) {
    quantise_row(x, q, scale, sum);
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

    /// `y[n, out] = x W^T + bias` for quantised activations.
    pub(crate) fn forward(&self, x: &Activations, n: usize, bias: Option<&[f32]>, y: &mut [f32]) {
        assert!(
            x.q.len() == n * self.blocks * BLOCK && y.len() == n * self.rows,
            "shapes are checked by Linear"
        );
        let out = Shared::new(y);
        let panels = self.rows.div_ceil(PANEL);
        let run = |panel: usize| {
            let mut sums = [[0.0f32; PANEL]; 4];
            let mut first = 0;
            while first < n {
                let tile = (n - first).min(4);
                self.panel(panel, x, first, &mut sums[..tile]);
                for (t, sums) in sums[..tile].iter().enumerate() {
                    for (r, sum) in sums.iter().enumerate() {
                        let row = panel * PANEL + r;
                        if row < self.rows {
                            let value = sum + bias.map_or(0.0, |b| b[row]);
                            // SAFETY: `row` is below `rows` and the activation row below `n`, so the
                            // element is in bounds; panels partition the rows among tasks.
                            unsafe { out.write((first + t) * self.rows + row, value) };
                        }
                    }
                }
                first += tile;
            }
        };
        // A task should be worth some ten microseconds.
        let work = self.blocks * BLOCK * PANEL * n;
        let least = (200_000 / work.max(1)).max(1);
        (0..panels)
            .into_par_iter()
            .with_min_len(least)
            .for_each(run);
    }

    /// The sums of one panel for up to four activation rows from `first` on.
    fn panel(&self, panel: usize, x: &Activations, first: usize, sums: &mut [[f32; PANEL]]) {
        #[cfg(target_arch = "x86_64")]
        if isa() == Isa::Avx2 {
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
        let columns = self.blocks * BLOCK;
        for (t, sums) in sums.iter_mut().enumerate() {
            *sums = [0.0; PANEL];
            let row = first + t;
            for b in 0..self.blocks {
                let q = &x.q[row * columns + b * BLOCK..row * columns + (b + 1) * BLOCK];
                let x_scale = x.scale[row * self.blocks + b];
                let x_sum = &x.sum[(row * self.blocks + b) * 2..][..2];
                for h in 0..self.halves {
                    let groups = 8 / self.halves;
                    let x_sum = if self.halves == 1 {
                        x_sum[0] + x_sum[1]
                    } else {
                        x_sum[h]
                    };
                    let factor = ((panel * self.blocks + b) * self.halves + h) * PANEL;
                    for (r, sum) in sums.iter_mut().enumerate() {
                        let mut dot = -self.offset * x_sum;
                        for g in h * groups..(h + 1) * groups {
                            for j in 0..4 {
                                dot +=
                                    self.weight(panel, b, g, r * 4 + j) * i32::from(q[g * 4 + j]);
                            }
                        }
                        *sum += dot as f32 * (self.scales.get(factor + r) * x_scale);
                        if let Some(mins) = &self.mins {
                            *sum += mins.get(factor + r) * (x_scale * x_sum as f32);
                        }
                    }
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{Activations, BLOCK, Factors, Kind, PANEL, Packed};

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
        /// Picks the instance for the number of rows.
        macro_rules! rows {
            ($kind:expr, $half:expr, $min:expr) => {
                match sums.len() {
                    // SAFETY: `dispatch::isa` said AVX2; `kernel` states what it reads, and
                    // `Packed::forward` checked the lengths.
                    1 => unsafe { kernel::<$kind, $half, $min, 1>(w, panel, x, first, sums) },
                    // SAFETY: as above.
                    2 => unsafe { kernel::<$kind, $half, $min, 2>(w, panel, x, first, sums) },
                    // SAFETY: as above.
                    3 => unsafe { kernel::<$kind, $half, $min, 3>(w, panel, x, first, sums) },
                    // SAFETY: as above; a tile has at most four rows.
                    _ => unsafe { kernel::<$kind, $half, $min, 4>(w, panel, x, first, sums) },
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

    #[inline(always)]
    unsafe fn factors<const HALF: bool>(f: &Factors, at: usize) -> __m256 {
        match f {
            // SAFETY: the caller passes an index with 8 factors from it on; AVX2 and F16C are there.
            Factors::F16(v) if HALF => unsafe {
                _mm256_cvtph_ps(_mm_loadu_si128(v.as_ptr().add(at).cast()))
            },
            // SAFETY: as above.
            Factors::F32(v) if !HALF => unsafe { _mm256_loadu_ps(v.as_ptr().add(at)) },
            _ => unsafe_unreachable(),
        }
    }

    #[cold]
    fn unsafe_unreachable() -> __m256 {
        unreachable!("the instance matches the factors' type")
    }

    /// Sums of one panel for `N` activation rows.
    ///
    /// # Safety
    /// Needs AVX2, FMA and F16C. Reads `w`'s panel and rows `first .. first + N` of `x`, which must
    /// have `w.blocks` blocks each; `sums` has at least `N` rows.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn kernel<const KIND: u8, const HALF: bool, const MIN: bool, const N: usize>(
        w: &Packed,
        panel: usize,
        x: &Activations,
        first: usize,
        sums: &mut [[f32; PANEL]],
    ) {
        // SAFETY: every pointer below stays in the vectors it comes from, by the caller's promise.
        unsafe {
            let blocks = w.blocks;
            let block_bytes = if KIND == NIBBLE { 128 } else { 256 };
            let halves = if KIND == BYTE6 { 2 } else { 1 };
            let mut weights = w.weights.as_ptr().add(panel * blocks * block_bytes);
            let ones = _mm256_set1_epi16(1);
            let low = _mm256_set1_epi8(15);
            let zero = _mm256_setzero_si256();
            let mut acc = [_mm256_setzero_ps(); N];
            for b in 0..blocks {
                let mut v = [zero; 8];
                if KIND == NIBBLE {
                    for i in 0..4 {
                        let both = _mm256_loadu_si256(weights.add(32 * i).cast());
                        v[i] = _mm256_and_si256(both, low);
                        v[i + 4] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
                    }
                } else {
                    for (i, v) in v.iter_mut().enumerate() {
                        *v = _mm256_loadu_si256(weights.add(32 * i).cast());
                    }
                }
                weights = weights.add(block_bytes);
                if N == 1 {
                    // Decoding is bound by memory: ask for the weights some blocks ahead.
                    for line in 0..block_bytes / 64 {
                        _mm_prefetch::<_MM_HINT_T0>(
                            weights.wrapping_add(3 * block_bytes + 64 * line).cast(),
                        );
                    }
                }
                let factor = (panel * blocks + b) * halves * PANEL;
                let s0 = factors::<HALF>(&w.scales, factor);
                let s1 = if halves == 2 {
                    factors::<HALF>(&w.scales, factor + PANEL)
                } else {
                    s0
                };
                let (m0, m1) = match &w.mins {
                    Some(mins) if MIN => (
                        factors::<HALF>(mins, factor),
                        if halves == 2 {
                            factors::<HALF>(mins, factor + PANEL)
                        } else {
                            s0
                        },
                    ),
                    _ => (s0, s0),
                };
                for n in 0..N {
                    let row = first + n;
                    let at = row * blocks + b;
                    let q = x.q.as_ptr().add(at * BLOCK).cast::<i32>();
                    let act = |g: usize| _mm256_set1_epi32(q.add(g).read_unaligned());
                    let x_scale = _mm256_set1_ps(*x.scale.as_ptr().add(at));
                    let x_sum = x.sum.as_ptr().add(2 * at);
                    let pair = |g: usize| {
                        _mm256_add_epi16(
                            _mm256_maddubs_epi16(v[g], act(g)),
                            _mm256_maddubs_epi16(v[g + 1], act(g + 1)),
                        )
                    };
                    if KIND == BYTE6 {
                        for h in 0..2 {
                            let wide = _mm256_add_epi32(
                                _mm256_madd_epi16(pair(4 * h), ones),
                                _mm256_madd_epi16(pair(4 * h + 2), ones),
                            );
                            let sum = *x_sum.add(h);
                            let (s, m) = if h == 0 { (s0, m0) } else { (s1, m1) };
                            acc[n] = accumulate::<MIN>(acc[n], wide, w.offset, sum, s, m, x_scale);
                        }
                        continue;
                    }
                    let wide = match KIND {
                        NIBBLE => {
                            let a = _mm256_add_epi16(pair(0), pair(2));
                            let b = _mm256_add_epi16(pair(4), pair(6));
                            _mm256_madd_epi16(_mm256_add_epi16(a, b), ones)
                        }
                        BYTE5 => _mm256_add_epi32(
                            _mm256_madd_epi16(_mm256_add_epi16(pair(0), pair(2)), ones),
                            _mm256_madd_epi16(_mm256_add_epi16(pair(4), pair(6)), ones),
                        ),
                        _ => {
                            let mut wide = zero;
                            for (g, v) in v.iter().enumerate() {
                                let signed = _mm256_sign_epi8(act(g), *v);
                                let products = _mm256_maddubs_epi16(_mm256_abs_epi8(*v), signed);
                                wide = _mm256_add_epi32(wide, _mm256_madd_epi16(products, ones));
                            }
                            wide
                        }
                    };
                    let sum = *x_sum + *x_sum.add(1);
                    acc[n] = accumulate::<MIN>(acc[n], wide, w.offset, sum, s0, m0, x_scale);
                }
            }
            for (acc, sums) in acc.iter().zip(sums) {
                _mm256_storeu_ps(sums.as_mut_ptr(), *acc);
            }
        }
    }

    /// Adds one group: `acc + (wide - offset * sum) s x + m (x sum)`.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn accumulate<const MIN: bool>(
        acc: __m256,
        wide: __m256i,
        offset: i32,
        sum: i32,
        s: __m256,
        m: __m256,
        x_scale: __m256,
    ) -> __m256 {
        let dot = if MIN {
            wide
        } else {
            _mm256_sub_epi32(wide, _mm256_set1_epi32(offset * sum))
        };
        let acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(s, x_scale), acc);
        if MIN {
            let shift = _mm256_mul_ps(x_scale, _mm256_set1_ps(sum as f32));
            _mm256_fmadd_ps(m, shift, acc)
        } else {
            acc
        }
    }
}
