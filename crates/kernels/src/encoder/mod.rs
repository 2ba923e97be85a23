//! The encoder of a TopK autoencoder: product and selection in one pass.
//!
//! ```text
//! pre[r, j] = x[r] . w[j] + b[j]          the k largest positive ones of each row are kept
//! ```
//!
//! The product is all of the dense work of a training step, and its result is never stored: a task
//! takes some rows, lets the latents pass in groups of 128, and each row keeps candidates above a bar
//! that rises (`select.rs`). What is live is a block of 32 x 128 sums in the L1 cache.
//!
//! # Layout of bf16
//!
//! Rows of `x` are plain, padded to an odd number of cache lines. Weights are in tiles of 16 pairs of
//! columns by 16 latents: one 64-byte line holds a pair of columns for each of 16 latents, which is what
//! `tdpbf16ps` takes as its second operand and what `vdpbf16ps` multiplies with a broadcast pair of `x`.
//! Tiles of the same latents are contiguous. For AMX a task copies its rows into tiles as well, so that
//! the lines of a tile are one piece of memory.
//!
//! | set | product |
//! | --- | --- |
//! | AMX | `tdpbf16ps`, 2 x 2 tiles of 16 x 16 sums |
//! | AVX-512 | `vdpbf16ps`, 8 rows x 32 latents in registers |
//! | others | f32 through the `gemm` crate; on bf16 operands a scalar loop, the reference |
//!
//! Rows depend on nothing beside them, and the order of every sum is fixed: results have the same bits
//! for any number of threads. Between instruction sets they differ by rounding.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
mod select;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytemuck::Zeroable;
use half::bf16;
use rayon::prelude::*;

use self::select::Candidates;
use crate::dispatch::{Isa, isa};
use crate::element::round;
use crate::gemm::{Matrix, matmul_with};

/// Rows of a block of sums; inputs are padded to a multiple.
pub const ROWS: usize = 32;
/// Latents of a block of sums.
const GROUP: usize = 128;
/// Latents of a tile.
const LATENTS: usize = 16;
/// Columns of a tile.
const COLUMNS: usize = 32;
/// The most rows of a task, and bytes of its rows and their candidates.
const TASK_ROWS: usize = 256;
const TASK_BYTES: usize = 4 << 20;
/// Every so many blocks are timed; odd, so that the first block of a group is not over-represented.
const TIMED: usize = 7;

/// 16 pairs of columns by 16 latents.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Tile([[[u16; 2]; LATENTS]; COLUMNS / 2]);

impl Tile {
    /// The tile as 16 rows of columns.
    pub(crate) fn lines_mut(&mut self) -> &mut [[u16; COLUMNS]; 16] {
        bytemuck::cast_mut(&mut self.0)
    }
}

/// Encoder weights `[latents, columns]` in bf16, in the order in which the product reads them.
#[derive(Debug, Clone)]
pub struct Bf16Tiles {
    latents: usize,
    /// Tiles of one row of latents.
    depth: usize,
    tiles: Vec<Tile>, // [latents / 16, depth], latents padded to a multiple of 32
}

/// The tiles of some latents, to be written.
#[derive(Debug)]
pub struct TileRows<'a> {
    depth: usize,
    tiles: &'a mut [Tile],
}

impl Bf16Tiles {
    /// Rounds `w`, `[latents, d]`.
    pub fn new(w: &[f32], d: usize) -> Self {
        let latents = w.len() / d.max(1);
        let mut out = Self::zeros(latents, d);
        let depth = out.depth;
        let mut rows = TileRows {
            depth,
            tiles: &mut out.tiles,
        };
        for (latent, w) in w.chunks_exact(d.max(1)).enumerate() {
            rows.set(latent, w);
        }
        out
    }

    fn zeros(latents: usize, d: usize) -> Self {
        let depth = d.div_ceil(COLUMNS);
        let blocks = latents.div_ceil(2 * LATENTS) * 2;
        Self {
            latents,
            depth,
            tiles: vec![Tile::zeroed(); blocks * depth],
        }
    }

    /// Latents in parts of `latents`, in order.
    ///
    /// # Panics
    /// If `latents` is not a multiple of 16.
    pub fn chunks_mut(&mut self, latents: usize) -> impl Iterator<Item = TileRows<'_>> {
        assert!(latents > 0 && latents.is_multiple_of(LATENTS));
        let depth = self.depth;
        self.tiles
            .chunks_mut(latents / LATENTS * depth.max(1))
            .map(move |tiles| TileRows { depth, tiles })
    }

    /// The weights of some latents.
    pub fn gather(&self, latents: &[u32]) -> Self {
        let mut out = Self::zeros(latents.len(), self.depth * COLUMNS);
        for (to, &from) in latents.iter().enumerate() {
            let (from, to) = (self.place(from as usize), out.place(to));
            for t in 0..self.depth {
                for pair in 0..COLUMNS / 2 {
                    out.tiles[to.0 + t].0[pair][to.1] = self.tiles[from.0 + t].0[pair][from.1];
                }
            }
        }
        out
    }

    /// First tile and lane of a latent.
    fn place(&self, latent: usize) -> (usize, usize) {
        (latent / LATENTS * self.depth, latent % LATENTS)
    }

    /// Memory in bytes.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.tiles[..])
    }
}

impl TileRows<'_> {
    /// Rounds the weights of the part's latent `at`.
    ///
    /// # Panics
    /// If there is no such latent, or `w` has more columns than the tiles.
    pub fn set(&mut self, at: usize, w: &[f32]) {
        let (block, lane) = (at / LATENTS, at % LATENTS);
        let tiles = &mut self.tiles[block * self.depth..(block + 1) * self.depth];
        let (whole, rest) = w.as_chunks::<COLUMNS>();
        assert!(w.len() <= tiles.len() * COLUMNS, "more columns than tiles");
        for (tile, w) in tiles.iter_mut().zip(whole) {
            for (line, w) in tile.0.iter_mut().zip(w.as_chunks::<2>().0) {
                line[lane] = [round(w[0]).to_bits(), round(w[1]).to_bits()];
            }
        }
        for (i, w) in rest.iter().enumerate() {
            tiles[whole.len()].0[i / 2][lane][i % 2] = round(*w).to_bits();
        }
    }
}

/// Time of a pass, of all threads together.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct EncodeTime {
    /// Spent in the product; a sample of the blocks is timed.
    pub product: Duration,
    /// Spent in the selection, in the same way.
    pub select: Duration,
}

/// What a thread works with.
#[derive(Default)]
struct Scratch {
    sums: Vec<f32>, // [ROWS, GROUP]
    candidates: Candidates,
    x: Vec<Tile>,
}

/// How blocks of sums are computed.
trait Product: Sync {
    /// Starts a task on rows from `first` on; `x` is the task's own.
    fn begin(&self, first: usize, rows: usize, x: &mut Vec<Tile>) {
        let _ = (first, rows, x);
    }

    /// Sums of the [`ROWS`] rows from `first + row` on with the [`GROUP`] latents from `latent` on.
    fn block(&self, first: usize, row: usize, latent: usize, x: &[Tile], sums: &mut [f32]);

    /// Ends a task.
    fn end(&self) {}
}

/// A pass over rows in tasks; see the module.
fn pass(
    product: &impl Product,
    bias: &[f32],
    row_bytes: usize,
    k: usize,
    idx: &mut [u32],
    val: &mut [f32],
) -> EncodeTime {
    assert_eq!(idx.len(), val.len());
    let n = idx.len() / k.max(1);
    let bias = Candidates::padded(bias, GROUP);
    let rows = rows_of_task(n, row_bytes + Candidates::bytes(k, GROUP));
    let (in_product, in_select) = (AtomicU64::new(0), AtomicU64::new(0));
    idx.par_chunks_mut(rows * k)
        .zip(val.par_chunks_mut(rows * k))
        .enumerate()
        .for_each_init(Scratch::default, |scratch, (task, (idx, val))| {
            let Scratch {
                sums,
                candidates,
                x,
            } = scratch;
            let (first, n) = (task * rows, idx.len() / k);
            sums.resize(ROWS * GROUP, 0.0);
            candidates.reset(n, k, GROUP);
            product.begin(first, n, x);
            let (mut blocks, mut times) = (0usize, [Duration::ZERO; 2]);
            for (group, bias) in bias.chunks_exact(GROUP).enumerate() {
                for row in (0..n).step_by(ROWS) {
                    let start = blocks.is_multiple_of(TIMED).then(Instant::now);
                    product.block(first, row, group * GROUP, x, sums);
                    let middle = start.map(|_| Instant::now());
                    for (i, sums) in sums.chunks_exact(GROUP).take(n - row).enumerate() {
                        candidates.offer(row + i, sums, bias, (group * GROUP) as u32);
                    }
                    if let (Some(start), Some(middle)) = (start, middle) {
                        times[0] += middle - start;
                        times[1] += middle.elapsed();
                    }
                    blocks += 1;
                }
            }
            product.end();
            let start = Instant::now();
            let out = idx.chunks_exact_mut(k).zip(val.chunks_exact_mut(k));
            for (row, (idx, val)) in out.enumerate() {
                candidates.finish(row, idx, val);
            }
            let all = blocks as f64 / blocks.div_ceil(TIMED).max(1) as f64;
            let [of_product, of_select] = times.map(|t| t.mul_f64(all));
            let of_select = of_select + start.elapsed();
            in_product.fetch_add(of_product.as_nanos() as u64, Ordering::Relaxed);
            in_select.fetch_add(of_select.as_nanos() as u64, Ordering::Relaxed);
        });
    EncodeTime {
        product: Duration::from_nanos(in_product.into_inner()),
        select: Duration::from_nanos(in_select.into_inner()),
    }
}

/// Rows of a task: tasks of equal size, a whole number for each thread. The weights pass once for each
/// task, so many rows spare memory; few stay in the cache.
fn rows_of_task(n: usize, bytes_each: usize) -> usize {
    let fit = (TASK_BYTES / bytes_each).clamp(ROWS, TASK_ROWS);
    let tasks = n.div_ceil(fit).max(1).next_multiple_of(crate::threads());
    n.div_ceil(tasks).next_multiple_of(ROWS)
}

/// Rows and weights in bf16.
struct Bf16<'a> {
    w: &'a Bf16Tiles,
    x: &'a [bf16],
    stride: usize,
}

impl<'a> Bf16<'a> {
    fn rows(&self, first: usize) -> &'a [bf16] {
        &self.x[first * self.stride..(first + ROWS) * self.stride]
    }

    /// The tiles of a group of latents.
    fn group(&self, latent: usize) -> &'a [Tile] {
        let from = latent / LATENTS * self.w.depth;
        let tiles = &self.w.tiles[from..];
        &tiles[..tiles.len().min(GROUP / LATENTS * self.w.depth)]
    }
}

#[cfg(target_arch = "x86_64")]
struct OnAmx<'a>(Bf16<'a>);

#[cfg(target_arch = "x86_64")]
impl Product for OnAmx<'_> {
    /// Copies the rows into tiles: the lines of a tile are then one piece of memory.
    fn begin(&self, first: usize, rows: usize, x: &mut Vec<Tile>) {
        let (depth, stride) = (self.0.w.depth, self.0.stride);
        let rows = rows.next_multiple_of(ROWS);
        x.resize(rows / 16 * depth, Tile::zeroed());
        let from = &self.0.x[first * stride..(first + rows) * stride];
        for (r, row) in from.chunks_exact(stride).enumerate() {
            let lines = bytemuck::cast_slice::<_, [u16; COLUMNS]>(&row[..depth * COLUMNS]);
            for (tile, line) in x[r / 16 * depth..].iter_mut().zip(lines) {
                tile.lines_mut()[r % 16] = *line;
            }
        }
        amx::configure();
    }

    fn block(&self, _: usize, row: usize, latent: usize, x: &[Tile], sums: &mut [f32]) {
        let depth = self.0.w.depth;
        // A part of the next group for each block of rows, so that it is in the L2 cache in time.
        let (at, blocks) = (row / ROWS, x.len() / (ROWS / 16 * depth));
        let next = self
            .0
            .group((latent + GROUP).min(self.0.w.tiles.len() / depth * LATENTS));
        let (from, to) = (next.len() * at / blocks, next.len() * (at + 1) / blocks);
        amx::prefetch(&next[from..to]);
        let x = &x[row / 16 * depth..(row + ROWS) / 16 * depth];
        amx::block(x, self.0.group(latent), depth, sums);
    }

    fn end(&self) {
        amx::release();
    }
}

#[cfg(target_arch = "x86_64")]
struct OnAvx512<'a>(Bf16<'a>);

#[cfg(target_arch = "x86_64")]
impl Product for OnAvx512<'_> {
    fn block(&self, first: usize, row: usize, latent: usize, _: &[Tile], sums: &mut [f32]) {
        let (x, tiles) = (self.0.rows(first + row), self.0.group(latent));
        avx512::block(x, self.0.stride, tiles, self.0.w.depth, sums);
    }
}

struct Reference<'a>(Bf16<'a>);

impl Product for Reference<'_> {
    fn block(&self, first: usize, row: usize, latent: usize, _: &[Tile], sums: &mut [f32]) {
        let (x, tiles) = (self.0.rows(first + row), self.0.group(latent));
        block_reference(x, self.0.stride, tiles, self.0.w.depth, sums);
    }
}

/// As [`crate::element::Element::encode_topk`] for bf16.
pub(crate) fn topk_bf16(
    w: &Bf16Tiles,
    b_enc: &[f32],
    x: &[bf16],
    k: usize,
    idx: &mut [u32],
    val: &mut [f32],
) -> EncodeTime {
    let n = idx.len() / k.max(1);
    let stride = (w.depth | 1) * COLUMNS;
    assert_eq!(b_enc.len(), w.latents, "a bias for each latent");
    assert!(
        x.len() >= n.next_multiple_of(ROWS) * stride,
        "rows are padded"
    );
    let row_bytes = 2 * stride;
    let operands = Bf16 { w, x, stride };
    #[cfg(target_arch = "x86_64")]
    if isa() >= Isa::Amx {
        return pass(&OnAmx(operands), b_enc, row_bytes, k, idx, val);
    } else if isa() >= Isa::Avx512 {
        return pass(&OnAvx512(operands), b_enc, row_bytes, k, idx, val);
    }
    pass(&Reference(operands), b_enc, row_bytes, k, idx, val)
}

/// The scalar product of a block: what the others are tested against.
fn block_reference(x: &[bf16], stride: usize, tiles: &[Tile], depth: usize, sums: &mut [f32]) {
    for (x, sums) in x.chunks_exact(stride).zip(sums.chunks_exact_mut(GROUP)) {
        for (tiles, sums) in tiles
            .chunks_exact(depth)
            .zip(sums.chunks_exact_mut(LATENTS))
        {
            for (lane, sum) in sums.iter_mut().enumerate() {
                let lines = tiles.iter().flat_map(|t| &t.0);
                let pairs = lines.flat_map(|line| line[lane]);
                *sum = x
                    .iter()
                    .zip(pairs)
                    .map(|(x, w)| x.to_f32() * bf16::from_bits(w).to_f32())
                    .sum();
            }
        }
    }
}

/// As [`crate::element::Element::encode_topk`] for f32.
pub(crate) fn topk_f32(
    w: &[f32],
    b_enc: &[f32],
    x: &[f32],
    d: usize,
    k: usize,
    idx: &mut [u32],
    val: &mut [f32],
) -> EncodeTime {
    let (n, latents) = (idx.len() / k.max(1), b_enc.len());
    assert_eq!(w.len(), latents * d, "w is [latents, d]");
    assert!(x.len() >= n.next_multiple_of(ROWS) * d, "rows are padded");
    pass(&OnF32 { w, x, d }, b_enc, 4 * d, k, idx, val)
}

struct OnF32<'a> {
    w: &'a [f32],
    x: &'a [f32],
    d: usize,
}

impl Product for OnF32<'_> {
    fn block(&self, first: usize, row: usize, latent: usize, _: &[Tile], sums: &mut [f32]) {
        let (d, row) = (self.d, first + row);
        let columns = GROUP.min(self.w.len() / d - latent);
        let x = Matrix::row_major(&self.x[row * d..(row + ROWS) * d], d);
        let w = Matrix::transposed(&self.w[latent * d..(latent + columns) * d], d);
        matmul_with(ROWS, columns, d, x, w, sums, GROUP, false, 1);
    }
}
