//! Pre-activations of all latents by tiles of rows, for architectures that select by a rule of each
//! latent: what the rule lets pass becomes entries, and the rest is forgotten with the tile.

use demur_kernels::gemm::{Matrix, matmul_with};
use rayon::prelude::*;

use super::Params;
use super::architecture::Rule;
use super::codes::TileEntries;

/// Rows of a tile: fixed, and the last is padded, so that a row's numbers depend on nothing beside it.
const TILE: usize = 64;

/// Entries of the rows `x`, `[n, d]`.
pub(super) fn encode(p: &Params, x: &[f32], rule: &Rule) -> Vec<TileEntries> {
    let (d, m) = (p.b_dec.w.len(), p.b_enc.w.len());
    x.par_chunks(TILE * d)
        .map_init(
            || (vec![0.0f32; TILE * d], vec![0.0f32; TILE * m]),
            |(centred, pre), x| {
                centred[x.len()..].fill(0.0);
                for (c, x) in centred.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                    for ((c, x), b) in c.iter_mut().zip(x).zip(&p.b_dec.w) {
                        *c = x - b;
                    }
                }
                let rows = Matrix::row_major(centred, d);
                let weights = Matrix::transposed(&p.w_enc.w, d);
                matmul_with(TILE, m, d, rows, weights, pre, m, false, 1);
                let mut tile = TileEntries::default();
                for pre in pre.chunks_exact(m).take(x.len() / d) {
                    let before = tile.idx.len();
                    for (j, (p, b)) in pre.iter().zip(&p.b_enc.w).enumerate() {
                        let p = p + b;
                        if let Some(f) = rule.entry(j, p) {
                            tile.idx.push(j as u32);
                            tile.val.push(f);
                            if rule.keeps_pre() {
                                tile.pre.push(p);
                            }
                        }
                    }
                    tile.lengths.push((tile.idx.len() - before) as u32);
                }
                tile
            },
        )
        .collect()
}
