//! Activations as products read them: int8 with one scale for each block of 32 values, or bf16.

use std::ops::Range;

use bytemuck::Zeroable;
use half::bf16;

use super::{BLOCK, STRIP, Shared};
use crate::dispatch::{Isa, isa};
use crate::element::Element;
use crate::encoder::Tile as Bf16Tile;
use crate::linear::Products;
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
    /// `-TOP` times the sum of all 32 integers, and of the first and the second 16: what takes the
    /// offset out of a product with weights that are stored as `q + TOP`.
    pub start: i32,
    pub start_half: [i32; 2],
}

/// The offset that makes any signed byte unsigned.
pub(super) const TOP: i32 = 128;

impl XBlock {
    /// `-TOP` times the sum of the integers of half `h`, or of both where there is one group.
    #[inline(always)]
    pub(super) fn start(&self, halves: usize, h: usize) -> i32 {
        if halves == 1 {
            self.start
        } else {
            self.start_half[h]
        }
    }

    /// `scale` times the sum of the integers of half `h`, or of both where there is one group.
    #[inline(always)]
    pub(super) fn sum(&self, halves: usize, h: usize) -> f32 {
        if halves == 1 {
            self.sum
        } else {
            // Exact: a power of two.
            self.scale * (self.start_half[h] as f32 * (-1.0 / TOP as f32))
        }
    }
}

/// Rows of a tile.
pub(super) const TILE: usize = 16;

/// Activations in tiles of [`TILE`] rows, so that what a kernel reads together lies together: int8 blocks as
/// `[block][row]` (the last tile may have fewer rows), or bf16 tiles of a block's columns, strips filled up
/// with rows whose sums nobody reads.
#[derive(Debug, Default)]
pub(crate) struct Activations {
    int8: Vec<XBlock>,
    bf16: Vec<Bf16Tile>,
    /// Which of them: bf16 only where there is AMX.
    products: Products,
    n: usize,
    /// Blocks of a row.
    blocks: usize,
}

/// Some rows of a tile.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    /// `[block][stride]`, beginning with the first row.
    pub x: &'a [XBlock],
    /// Rows of the whole tile.
    pub stride: usize,
    /// These rows.
    pub rows: usize,
}

impl<'a> Tile<'a> {
    /// The rows `first .. first + rows` of these.
    pub(super) fn part(self, first: usize, rows: usize) -> Self {
        assert!(first + rows <= self.rows, "rows of the tile");
        Self {
            x: &self.x[first..],
            rows,
            ..self
        }
    }

    /// Block `b` of row `row`.
    pub(super) fn block(&self, b: usize, row: usize) -> &'a XBlock {
        &self.x[b * self.stride + row]
    }

    /// Whether it holds `blocks` blocks of each row.
    pub(super) fn holds(&self, blocks: usize) -> bool {
        self.rows <= self.stride
            && (blocks == 0 || self.x.len() >= (blocks - 1) * self.stride + self.rows)
    }
}

/// Rows that pass together.
#[derive(Clone, Copy)]
pub(super) enum Strip<'a> {
    /// Of int8, a tile.
    Int8(Tile<'a>),
    /// Of bf16, two tiles `[2][block]`, of which so many rows count.
    Bf16([&'a [Bf16Tile]; 2], usize),
}

impl Strip<'_> {
    /// Rows whose sums count.
    pub(super) fn rows(&self) -> usize {
        match self {
            Self::Int8(tile) => tile.rows,
            Self::Bf16(_, rows) => *rows,
        }
    }
}

impl Activations {
    /// Rounds `x` `[n, columns]`.
    pub(crate) fn round(&mut self, x: &[f32], columns: usize, products: Products) {
        let n = x.len().checked_div(columns).unwrap_or(0);
        self.resize(n, columns / BLOCK, products);
        let blocks = self.shared();
        let strip = |t: usize| {
            let first = t * STRIP;
            let x = &x[first * columns..n.min(first + STRIP) * columns];
            // SAFETY: the rows of a strip are its task's alone, and there are such rows and columns.
            unsafe { blocks.round(first, x, columns) }
        };
        let strips = n.div_ceil(STRIP);
        if x.len() < 1 << 14 {
            (0..strips).for_each(strip);
        } else {
            pool::for_each(strips, strip);
        }
    }

    /// Makes room for `n` rows of `blocks` blocks; what they hold is left to the caller.
    pub(super) fn resize(&mut self, n: usize, blocks: usize, products: Products) {
        self.products = if isa() >= Isa::Amx {
            products
        } else {
            Products::Int8
        };
        self.n = n;
        self.blocks = blocks;
        match self.products {
            Products::Int8 => self.int8.resize(n * blocks, XBlock::default()),
            Products::Bf16 => {
                let tiles = n.next_multiple_of(STRIP) / TILE * blocks;
                self.bf16.resize(tiles, Bf16Tile::zeroed());
            }
        }
    }

    /// Bytes that it holds.
    pub(crate) fn bytes(&self) -> usize {
        self.int8.capacity() * size_of::<XBlock>() + self.bf16.capacity() * size_of::<Bf16Tile>()
    }

    /// Rows.
    pub(super) fn rows(&self) -> usize {
        self.n
    }

    /// How they are multiplied.
    pub(crate) fn products(&self) -> Products {
        self.products
    }

    /// The strips of `rows`, which begin one, each with its first row.
    pub(super) fn strips(&self, rows: Range<usize>) -> impl Iterator<Item = (usize, Strip<'_>)> {
        let (end, blocks) = (rows.end.min(self.n), self.blocks);
        let most = match self.products {
            Products::Int8 => TILE,
            Products::Bf16 => STRIP,
        };
        (rows.start..end).step_by(most).map(move |first| {
            let rows = (end - first).min(most);
            let strip = match self.products {
                Products::Int8 => Strip::Int8(Tile {
                    x: &self.int8[first * blocks..(first + rows) * blocks],
                    stride: rows,
                    rows,
                }),
                Products::Bf16 => {
                    let tiles = &self.bf16[first / TILE * blocks..][..2 * blocks];
                    Strip::Bf16([&tiles[..blocks], &tiles[blocks..]], rows)
                }
            };
            (first, strip)
        })
    }

    /// All of it, to be written by tasks.
    pub(super) fn shared(&mut self) -> Blocks {
        Blocks {
            int8: Shared::new(&mut self.int8),
            bf16: Shared::new(&mut self.bf16),
            products: self.products,
            n: self.n,
            blocks: self.blocks,
        }
    }
}

/// [`Activations`] that tasks write.
#[derive(Clone, Copy)]
pub(super) struct Blocks {
    int8: Shared<XBlock>,
    bf16: Shared<Bf16Tile>,
    products: Products,
    n: usize,
    blocks: usize,
}

impl Blocks {
    /// Rounds `x`, `[rows, columns]`, as all columns of the rows from `first` on, which begins a strip.
    ///
    /// # Safety
    /// There are so many rows and columns, and nobody else accesses the strip.
    unsafe fn round(self, first: usize, x: &[f32], columns: usize) {
        for (i, x) in x.chunks_exact(columns).enumerate() {
            // SAFETY: the caller's promise.
            unsafe { self.row(first + i, 0, x) }
        }
    }

    /// Rounds `x` as the columns of row `row` from block `b` on.
    ///
    /// # Safety
    /// There are such a row and such columns, and nobody else accesses them in its strip.
    pub(super) unsafe fn row(self, row: usize, b: usize, x: &[f32]) {
        let (tile, r) = (row / TILE, row % TILE);
        let n = x.len() / BLOCK;
        match self.products {
            Products::Int8 => {
                let stride = (self.n - tile * TILE).min(TILE);
                let at = tile * TILE * self.blocks + b * stride + r;
                // SAFETY: the caller's promise; between the row's blocks lie those of the tile's other
                // rows, which belong to the same task.
                let out = unsafe { self.int8.part(at, (n - 1) * stride + 1) };
                round(x, out, stride);
            }
            Products::Bf16 => {
                // SAFETY: as above.
                let out = unsafe { self.bf16.part(tile * self.blocks + b, n) };
                for (out, x) in out.iter_mut().zip(x.chunks_exact(BLOCK)) {
                    let line: &mut [bf16] = bytemuck::cast_slice_mut(&mut out.lines_mut()[r]);
                    bf16::store(x, line);
                }
            }
        }
    }
}

/// Rounds one row; its blocks are `stride` apart.
pub(super) fn round(x: &[f32], out: &mut [XBlock], stride: usize) {
    #[cfg(target_arch = "x86_64")]
    if isa() >= Isa::Avx512 {
        // SAFETY: `isa` returns Avx512 only where the processor has these features.
        return unsafe { quantise_avx512(x, out, stride) };
    } else if isa() >= Isa::Avx2 {
        // SAFETY: `isa` returns Avx2 or more only where the processor has these features.
        return unsafe { quantise_avx2(x, out, stride) };
    }
    quantise(x, out, stride);
}

#[inline(always)]
fn quantise(x: &[f32], out: &mut [XBlock], stride: usize) {
    /// Adding and subtracting it rounds a float of magnitude below 2^22 to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    for (x, out) in x
        .as_chunks::<BLOCK>()
        .0
        .iter()
        .zip(out.iter_mut().step_by(stride))
    {
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
        out.start = -TOP * sum;
        out.start_half = sums.map(|s| -TOP * s);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn quantise_avx2(x: &[f32], out: &mut [XBlock], stride: usize) {
    quantise(x, out, stride);
}

/// The same, bit for bit, with what AVX-512 has for it: a conversion that rounds, one that narrows,
/// and sums across a vector.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn quantise_avx512(x: &[f32], out: &mut [XBlock], stride: usize) {
    use std::arch::x86_64::*;
    for (x, out) in x
        .as_chunks::<BLOCK>()
        .0
        .iter()
        .zip(out.iter_mut().step_by(stride))
    {
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
        out.start = -TOP * sum;
        out.start_half = sums.map(|s| -TOP * s);
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
                found.round(&x, 64, Products::Int8);
                assert_eq!(
                    (found.int8[0].q, found.int8[0].sum),
                    ([0; 32], 0.0),
                    "{isa:?} {tiny}"
                );
                assert_eq!(
                    (found.int8[1].q[8], found.int8[1].start),
                    (127, -127 * TOP),
                    "{isa:?}"
                );
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
        quantise(&x, &mut plain, 1);
        assert_eq!((plain[1].scale, plain[1].q), (0.0, [0; 32]));
        assert_eq!(plain[2].q[6], 0);
        on_every_isa(|isa| {
            let mut found = Activations::default();
            found.round(&x, 96, Products::Int8);
            // Two rows of three blocks: one tile, its rows side by side.
            let Some((_, Strip::Int8(tile))) = found.strips(0..2).next() else {
                panic!("a tile of int8");
            };
            for (i, p) in plain.iter().enumerate() {
                let f = tile.block(i % 3, i / 3);
                assert_eq!(f.q, p.q, "{isa:?}");
                assert_eq!((f.scale, f.sum), (p.scale, p.sum), "{isa:?}");
                assert_eq!((f.start, f.start_half), (p.start, p.start_half), "{isa:?}");
            }
        });
    }
}
