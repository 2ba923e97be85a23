//! Causal attention over ragged sequences with caches: grouped heads, sliding window, soft cap.
//!
//! `out = softmax(scale q kᵀ + mask) v`, one task a (sequence, key-value head). The queries of a task
//! are the rows of all its grouped heads, eight at a time: they share each key row that is read, and
//! eight dot products end in one vector. Scores of a tile stay in a buffer of `8 x length`, so the
//! cost in memory is linear in the context. A row's result has the same bits whatever it is batched
//! with.

use rayon::prelude::*;

use crate::dispatch::{Isa, isa};
use crate::ops;

/// What is the same for all sequences of a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub n_heads: usize,
    /// Key-value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub d_head: usize,
    /// Multiplies the scores; usually `1 / sqrt(d_head)`.
    pub scale: f32,
    /// A query sees its own position and the `window - 1` before it.
    pub window: Option<usize>,
    /// Scores become `cap tanh(score / cap)`.
    pub softcap: Option<f32>,
}

/// One sequence: its new queries and its cache, which already holds the new keys and values.
#[derive(Debug)]
pub struct SeqAttention<'a> {
    /// `[n, n_heads, d_head]`.
    pub q: &'a [f32],
    /// `[start + n, n_kv_heads, d_head]`, or longer.
    pub k: &'a [f32],
    /// As `k`.
    pub v: &'a [f32],
    /// Position of the first query.
    pub start: usize,
    /// `[n, n_heads, d_head]`.
    pub out: &'a mut [f32],
}

/// Queries in a tile.
const TILE: usize = 8;

/// Attention of every sequence in `seqs`.
///
/// # Panics
/// If a slice is shorter than its shape says.
pub fn attention(shape: &AttentionShape, seqs: &mut [SeqAttention<'_>]) {
    let AttentionShape {
        n_heads,
        n_kv_heads,
        d_head,
        ..
    } = *shape;
    let (q_row, kv_row) = (n_heads * d_head, n_kv_heads * d_head);
    let mut tasks = Vec::new();
    for seq in seqs.iter_mut() {
        let n = seq.q.len() / q_row.max(1);
        let length = (seq.start + n) * kv_row;
        assert!(
            seq.k.len() >= length && seq.v.len() >= length,
            "the cache holds all positions"
        );
        assert_eq!(seq.out.len(), seq.q.len(), "out is as q");
        let group = n_heads / n_kv_heads;
        // The output's rows, apart by head, so that tasks own what they write.
        let mut heads: Vec<Vec<&mut [f32]>> = (0..n_kv_heads).map(|_| Vec::new()).collect();
        for row in seq.out.chunks_exact_mut(q_row.max(1)) {
            for (h, head) in row.chunks_exact_mut(d_head).enumerate() {
                heads[h / group].push(head);
            }
        }
        for (kv, out) in heads.into_iter().enumerate() {
            // Long prompts in several tasks, so that few heads still fill all threads.
            let per_task = (256 / group).max(1) * group;
            let mut out = out.into_iter();
            let mut first = 0;
            while first < n * group {
                let rows: Vec<&mut [f32]> = out.by_ref().take(per_task).collect();
                let count = rows.len();
                tasks.push(Task {
                    q: seq.q,
                    k: seq.k,
                    v: seq.v,
                    start: seq.start,
                    kv,
                    first,
                    out: rows,
                });
                first += count;
            }
        }
    }
    tasks.into_par_iter().for_each(|mut task| task.run(shape));
}

/// Queries `first ..` of one key-value head; query `i` is row `i / group`, head `i % group`.
struct Task<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    start: usize,
    kv: usize,
    first: usize,
    out: Vec<&'a mut [f32]>,
}

impl Task<'_> {
    fn run(&mut self, shape: &AttentionShape) {
        let AttentionShape {
            n_heads,
            n_kv_heads,
            d_head,
            ..
        } = *shape;
        let group = n_heads / n_kv_heads;
        let kv_row = n_kv_heads * d_head;
        let mut scores = Vec::new();
        for (t, out) in self.out.chunks_mut(TILE).enumerate() {
            let first = self.first + t * TILE;
            let queries: Vec<(&[f32], usize)> = (first..first + out.len())
                .map(|i| {
                    let (row, head) = (i / group, self.kv * group + i % group);
                    let at = (row * n_heads + head) * d_head;
                    (&self.q[at..at + d_head], self.start + row)
                })
                .collect();
            let last = queries.iter().map(|q| q.1).max().unwrap_or(0);
            let oldest = queries.iter().map(|q| q.1).min().unwrap_or(0);
            let from = shape.window.map_or(0, |w| (oldest + 1).saturating_sub(w));
            let length = last + 1 - from;
            scores.clear();
            scores.resize(TILE * length, 0.0f32);
            let mut rows = [queries[0].0; TILE];
            for (row, q) in rows.iter_mut().zip(&queries) {
                *row = q.0;
            }
            let keys = &self.k[from * kv_row + self.kv * d_head..];
            score_tile(&rows, keys, kv_row, length, shape.scale, &mut scores);
            let values = &self.v[from * kv_row + self.kv * d_head..];
            for (i, ((_, position), out)) in queries.iter().zip(out.iter_mut()).enumerate() {
                let begin = shape.window.map_or(0, |w| (position + 1).saturating_sub(w)) - from;
                let row = &mut scores[i * length..(i + 1) * length][begin..=position - from];
                if let Some(cap) = shape.softcap {
                    ops::softcap(row, cap);
                }
                ops::softmax(row);
                out.fill(0.0);
                weighted_sum(row, &values[begin * kv_row..], kv_row, out);
            }
        }
    }
}

#[inline(always)]
fn score_tile_body<const FMA: bool>(
    q: &[&[f32]; TILE],
    keys: &[f32],
    stride: usize,
    length: usize,
    scale: f32,
    scores: &mut [f32],
) {
    let d = q[0].len();
    let whole = d / 8 * 8;
    for p in 0..length {
        let key = &keys[p * stride..p * stride + d];
        let mut acc = [[0.0f32; 8]; TILE];
        for at in (0..whole).step_by(8) {
            let k = &key[at..at + 8];
            for (acc, q) in acc.iter_mut().zip(q) {
                let q = &q[at..at + 8];
                for i in 0..8 {
                    acc[i] = if FMA {
                        q[i].mul_add(k[i], acc[i])
                    } else {
                        q[i] * k[i] + acc[i]
                    };
                }
            }
        }
        for (t, (a, q)) in acc.iter().zip(q).enumerate() {
            let mut sum = ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
            for i in whole..d {
                sum += q[i] * key[i];
            }
            scores[t * length + p] = sum * scale;
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn score_tile_avx2(
    q: &[&[f32]; TILE],
    keys: &[f32],
    stride: usize,
    length: usize,
    scale: f32,
    scores: &mut [f32],
) {
    score_tile_body::<true>(q, keys, stride, length, scale, scores);
}

/// `scores[t, p] = scale q_t . k_p` for `length` keys, `stride` values apart.
fn score_tile(
    q: &[&[f32]; TILE],
    keys: &[f32],
    stride: usize,
    length: usize,
    scale: f32,
    scores: &mut [f32],
) {
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx2 {
        // SAFETY: `isa` returns Avx2 only where the processor has these features.
        return unsafe { score_tile_avx2(q, keys, stride, length, scale, scores) };
    }
    score_tile_body::<false>(q, keys, stride, length, scale, scores);
}

#[inline(always)]
fn weighted_sum_body<const FMA: bool>(p: &[f32], values: &[f32], stride: usize, out: &mut [f32]) {
    let d = out.len();
    // 64 outputs stay in registers over all positions.
    for from in (0..d).step_by(64) {
        let width = (d - from).min(64);
        let mut acc = [0.0f32; 64];
        if width == 64 {
            for (j, &p) in p.iter().enumerate() {
                let v = &values[j * stride + from..j * stride + from + 64];
                for i in 0..64 {
                    acc[i] = if FMA {
                        p.mul_add(v[i], acc[i])
                    } else {
                        p * v[i] + acc[i]
                    };
                }
            }
        } else {
            for (j, &p) in p.iter().enumerate() {
                let v = &values[j * stride + from..j * stride + from + width];
                for (a, v) in acc.iter_mut().zip(v) {
                    *a = if FMA { p.mul_add(*v, *a) } else { p * v + *a };
                }
            }
        }
        out[from..from + width].copy_from_slice(&acc[..width]);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn weighted_sum_avx2(p: &[f32], values: &[f32], stride: usize, out: &mut [f32]) {
    weighted_sum_body::<true>(p, values, stride, out);
}

/// `out = sum_j p_j v_j` for values `stride` apart.
fn weighted_sum(p: &[f32], values: &[f32], stride: usize, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx2 {
        // SAFETY: `isa` returns Avx2 only where the processor has these features.
        return unsafe { weighted_sum_avx2(p, values, stride, out) };
    }
    weighted_sum_body::<false>(p, values, stride, out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::on_every_isa;

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    /// One query at a time, in f64, straight from the definition.
    fn reference(
        shape: &AttentionShape,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        start: usize,
    ) -> Vec<f64> {
        let AttentionShape {
            n_heads,
            n_kv_heads,
            d_head,
            ..
        } = *shape;
        let mut out = Vec::new();
        for (i, q) in q.chunks_exact(d_head).enumerate() {
            let (position, head) = (start + i / n_heads, i % n_heads);
            let kv = head / (n_heads / n_kv_heads);
            let at = |p: usize| (p * n_kv_heads + kv) * d_head;
            let seen: Vec<usize> = (0..=position)
                .filter(|p| shape.window.is_none_or(|w| position - p < w))
                .collect();
            let scores: Vec<f64> = seen
                .iter()
                .map(|&p| {
                    let dot: f64 = q
                        .iter()
                        .zip(&k[at(p)..at(p) + d_head])
                        .map(|(a, b)| f64::from(*a) * f64::from(*b))
                        .sum();
                    let s = dot * f64::from(shape.scale);
                    shape
                        .softcap
                        .map_or(s, |c| f64::from(c) * (s / f64::from(c)).tanh())
                })
                .collect();
            let sum: f64 = scores.iter().map(|s| s.exp()).sum();
            for j in 0..d_head {
                out.push(
                    seen.iter()
                        .zip(&scores)
                        .map(|(&p, s)| s.exp() / sum * f64::from(v[at(p) + j]))
                        .sum(),
                );
            }
        }
        out
    }

    #[test]
    fn matches_the_definition() {
        on_every_isa(|_| check_against_the_definition());
    }

    fn check_against_the_definition() {
        for (n, start, d_head, window, softcap) in [
            (1, 0, 8, None, None),
            (1, 30, 64, None, None),
            (13, 0, 64, None, Some(5.0)),
            (13, 7, 20, Some(4), None),
            (70, 3, 12, Some(16), Some(2.0)),
            (300, 0, 8, None, None),
        ] {
            let shape = AttentionShape {
                n_heads: 6,
                n_kv_heads: 2,
                d_head,
                scale: 0.3,
                window,
                softcap,
            };
            let q = noise(n * 6 * d_head, 1);
            let k = noise((start + n) * 2 * d_head, 2);
            let v = noise((start + n) * 2 * d_head, 3);
            let mut out = vec![f32::NAN; q.len()];
            attention(
                &shape,
                &mut [SeqAttention {
                    q: &q,
                    k: &k,
                    v: &v,
                    start,
                    out: &mut out,
                }],
            );
            let expected = reference(&shape, &q, &k, &v, start);
            for (i, (f, e)) in out.iter().zip(&expected).enumerate() {
                let near = (f64::from(*f) - e).abs() <= 1e-5;
                assert!(
                    near,
                    "n {n} start {start} d_head {d_head}, at {i}: {f} against {e}"
                );
            }
        }
    }

    #[test]
    fn one_at_a_time_has_the_same_bits() {
        on_every_isa(|_| check_one_at_a_time());
    }

    fn check_one_at_a_time() {
        let shape = AttentionShape {
            n_heads: 4,
            n_kv_heads: 2,
            d_head: 16,
            scale: 0.25,
            window: None,
            softcap: None,
        };
        let n = 37;
        let (q, k, v) = (noise(n * 64, 1), noise(n * 32, 2), noise(n * 32, 3));
        let mut all = vec![0.0; q.len()];
        attention(
            &shape,
            &mut [SeqAttention {
                q: &q,
                k: &k,
                v: &v,
                start: 0,
                out: &mut all,
            }],
        );
        for p in 0..n {
            let mut one = vec![0.0; 64];
            let q = &q[p * 64..(p + 1) * 64];
            attention(
                &shape,
                &mut [SeqAttention {
                    q,
                    k: &k,
                    v: &v,
                    start: p,
                    out: &mut one,
                }],
            );
            assert_eq!(one, all[p * 64..(p + 1) * 64], "position {p}");
        }
    }
}
