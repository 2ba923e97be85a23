//! The encoder of a TopK autoencoder: product and selection in one pass.
//!
//! ```text
//! pre[r, j] = x[r] . w[j] + b[j]          the k largest positive ones of each row are kept
//! ```
//!
//! The product is all of the dense work of a training step, and its result is never stored: a task
//! takes some rows, lets the latents pass in groups of [`GROUP`], and each row keeps candidates above
//! a bar that rises ([`select`]). What is live is a block of [`ROWS`] x [`GROUP`] sums in the L1 cache.
//!
//! # Layout of bf16
//!
//! Rows of `x` are plain, padded to an odd number of cache lines. Weights are in tiles of 16 pairs of
//! columns by 16 latents: one 64-byte line holds a pair of columns for each of 16 latents, which is what
//! `tdpbf16ps` takes as its second operand and what `vdpbf16ps` multiplies with a broadcast pair of `x`.
//! Tiles of the same latents are contiguous.
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
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod peak;
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

pub use peak::peak_gflops;

/// Rows of a block of sums; inputs are padded to a multiple.
pub const ROWS: usize = 32;
/// Latents of a block of sums.
const GROUP: usize = 128;
/// Latents of a tile.
const LATENTS: usize = 16;
/// Columns of a tile.
const COLUMNS: usize = 32;
/// Bytes of rows and candidates that a task keeps in its L2 cache.
const L2_ROWS: usize = 3 << 19;
/// Every so many blocks are timed.
const TIMED: usize = 8;

/// 16 pairs of columns by 16 latents.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Tile([[[u16; 2]; LATENTS]; COLUMNS / 2]);

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
}

/// A pass over rows in tasks: `block(sums, first_row, first_latent)` fills `[ROWS, GROUP]` sums.
fn pass(
    latents: usize,
    bias: &[f32],
    row_bytes: usize,
    k: usize,
    idx: &mut [u32],
    val: &mut [f32],
    begin: impl Fn() + Sync,
    block: impl Fn(&mut [f32], usize, usize) + Sync,
    end: impl Fn() + Sync,
) -> EncodeTime {
    assert_eq!(idx.len(), val.len());
    let n = idx.len() / k.max(1);
    let bias = Candidates::padded(bias, latents, GROUP);
    let rows = rows_of_task(n, row_bytes + Candidates::bytes(k, GROUP));
    let (product, select) = (AtomicU64::new(0), AtomicU64::new(0));
    idx.par_chunks_mut(rows * k)
        .zip(val.par_chunks_mut(rows * k))
        .enumerate()
        .for_each_init(Scratch::default, |scratch, (task, (idx, val))| {
            let (first, n) = (task * rows, idx.len() / k);
            scratch.sums.resize(ROWS * GROUP, 0.0);
            scratch.candidates.reset(n, k, GROUP);
            begin();
            let mut count = 0;
            let (mut in_product, mut in_select) = (Duration::ZERO, Duration::ZERO);
            for (group, bias) in bias.chunks_exact(GROUP).enumerate() {
                for r in (0..n).step_by(ROWS) {
                    let timed = count % TIMED == 0;
                    count += 1;
                    let clock = timed.then(Instant::now);
                    block(&mut scratch.sums, first + r, group * GROUP);
                    let middle = timed.then(Instant::now);
                    let candidates = &mut scratch.candidates;
                    for (i, sums) in scratch.sums.chunks_exact(GROUP).take(n - r).enumerate() {
                        candidates.offer(r + i, sums, bias, (group * GROUP) as u32);
                    }
                    if let (Some(clock), Some(middle)) = (clock, middle) {
                        in_product += middle - clock;
                        in_select += middle.elapsed();
                    }
                }
            }
            end();
            let clock = Instant::now();
            let out = idx.chunks_exact_mut(k).zip(val.chunks_exact_mut(k));
            for (row, (idx, val)) in out.enumerate() {
                scratch.candidates.finish(row, idx, val);
            }
            let scale = |d: Duration| {
                d.as_nanos() as u64 * count as u64 / count.div_ceil(TIMED).max(1) as u64
            };
            product.fetch_add(scale(in_product), Ordering::Relaxed);
            let rest = clock.elapsed().as_nanos() as u64;
            select.fetch_add(scale(in_select) + rest, Ordering::Relaxed);
        });
    EncodeTime {
        product: Duration::from_nanos(product.into_inner()),
        select: Duration::from_nanos(select.into_inner()),
    }
}

/// Rows of a task: as many as fit the cache, in tasks of equal size, a whole number for each thread.
fn rows_of_task(n: usize, bytes_each: usize) -> usize {
    let fit = (L2_ROWS / bytes_each).max(ROWS);
    let threads = crate::threads();
    let tasks = n.div_ceil(fit).max(1).next_multiple_of(threads);
    n.div_ceil(tasks).next_multiple_of(ROWS)
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
    let of = |first_row: usize, first_latent: usize| {
        let x = &x[first_row * stride..(first_row + ROWS) * stride];
        let from = first_latent / LATENTS * w.depth;
        let to = (from + GROUP / LATENTS * w.depth).min(w.tiles.len());
        (x, &w.tiles[from..to])
    };
    #[cfg(target_arch = "x86_64")]
    if isa() >= Isa::Amx {
        let block = |sums: &mut [f32], row, latent| {
            let (x, tiles) = of(row, latent);
            amx::block(x, stride, tiles, w.depth, sums);
        };
        return pass(
            w.latents,
            b_enc,
            row_bytes,
            k,
            idx,
            val,
            amx::configure,
            block,
            amx::release,
        );
    } else if isa() >= Isa::Avx512 {
        let block = |sums: &mut [f32], row, latent| {
            let (x, tiles) = of(row, latent);
            avx512::block(x, stride, tiles, w.depth, sums);
        };
        return pass(
            w.latents,
            b_enc,
            row_bytes,
            k,
            idx,
            val,
            || (),
            block,
            || (),
        );
    }
    let block = |sums: &mut [f32], row, latent| {
        let (x, tiles) = of(row, latent);
        block_reference(x, stride, tiles, w.depth, sums);
    };
    pass(
        w.latents,
        b_enc,
        row_bytes,
        k,
        idx,
        val,
        || (),
        block,
        || (),
    )
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
    let block = |sums: &mut [f32], row: usize, latent: usize| {
        let columns = GROUP.min(latents - latent);
        let x = Matrix::row_major(&x[row * d..(row + ROWS) * d], d);
        let w = Matrix::transposed(&w[latent * d..(latent + columns) * d], d);
        matmul_with(ROWS, columns, d, x, w, sums, GROUP, false, 1);
    };
    pass(latents, b_enc, 4 * d, k, idx, val, || (), block, || ())
}
