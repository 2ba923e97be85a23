//! Causal attention over ragged sequences with caches: grouped heads, sliding window, soft cap.
//!
//! `out = softmax(scale q kᵀ + mask) v`, one task a (sequence, key-value head). The queries of a task
//! are the rows of all its grouped heads, 8 or 16 at a time: a vector holds one number for each of them,
//! so scores need no sum across a vector, and softmax and masks work on whole vectors. Each key that is
//! read serves all of them. Scores of a tile stay in a buffer of `16 x length`: the cost in memory is
//! linear in the context, and a second pass over the scores is cheaper than the rescaling that an online
//! softmax pays.
//!
//! Every sum runs over positions in ascending order and what a query does not see weighs exactly 0, so
//! a row's result has the same bits whatever it is batched with (as long as the cache is finite:
//! 0 times infinity is not 0).

use std::cell::RefCell;

use crate::cache::CacheRows;
use crate::dispatch::{Isa, isa};
use crate::ops;
use crate::pool;

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
    pub k: &'a CacheRows,
    /// As `k`.
    pub v: &'a CacheRows,
    /// Position of the first query.
    pub start: usize,
    /// `[n, n_heads, d_head]`.
    pub out: &'a mut [f32],
}

/// Queries in a tile: one vector of AVX-512, and of narrower ones.
const WIDE: usize = 16;
const TILE: usize = 8;
/// Keys that are scored together: as many sums as hide the latency of a multiply-add.
const KEYS: usize = 8;
/// Values of a head that are mixed together, for four queries at once.
const WIDTH: usize = 16;
/// The same on AVX-512.
#[cfg(target_arch = "x86_64")]
const WIDE_MIX: usize = 32;

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
    let q_row = n_heads * d_head;
    let mut tasks = Vec::new();
    for seq in seqs.iter_mut() {
        let n = seq.q.len() / q_row.max(1);
        let length = (seq.start + n) * n_kv_heads;
        assert!(
            seq.k.heads() >= length && seq.v.heads() >= length,
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
    pool::for_each_row(&mut tasks, 1, |_, task| {
        let [task] = task else { return };
        if isa() >= Isa::Avx512 && task.out.len() > TILE {
            WIDE_SCRATCH.with_borrow_mut(|scratch| task.run::<WIDE>(shape, scratch));
        } else {
            SCRATCH.with_borrow_mut(|scratch| task.run::<TILE>(shape, scratch));
        }
    });
}

/// Queries `first ..` of one key-value head; query `i` is row `i / group`, head `i % group`.
struct Task<'a> {
    q: &'a [f32],
    k: &'a CacheRows,
    v: &'a CacheRows,
    start: usize,
    kv: usize,
    first: usize,
    out: Vec<&'a mut [f32]>,
}

impl Task<'_> {
    /// In tiles of `N` queries.
    fn run<const N: usize>(&mut self, shape: &AttentionShape, scratch: &mut Scratch<N>) {
        let AttentionShape {
            n_heads,
            n_kv_heads,
            d_head,
            ..
        } = *shape;
        let group = n_heads / n_kv_heads;
        let oldest = |p: usize| shape.window.map_or(0, |w| (p + 1).saturating_sub(w));
        // Where all its heads begin, and how far one position is from the next.
        let (base, keys, values, stride);
        match (self.k.as_f32(), self.v.as_f32()) {
            (Some(k), Some(v)) => {
                (base, stride) = (0, n_kv_heads * d_head);
                (keys, values) = (&k[self.kv * d_head..], &v[self.kv * d_head..]);
            }
            _ => {
                base = oldest(self.start + self.first / group);
                let last = self.start + (self.first + self.out.len() - 1) / group;
                let (first, n) = (base * n_kv_heads + self.kv, last + 1 - base);
                self.k.widen(first, n_kv_heads, n, &mut scratch.keys);
                self.v.widen(first, n_kv_heads, n, &mut scratch.values);
                stride = d_head;
                (keys, values) = (&scratch.keys[..], &scratch.values[..]);
            }
        }
        for (t, out) in self.out.chunks_mut(N).enumerate() {
            let first = self.first + t * N;
            // A tile that is not full repeats its last query.
            let query = |i: usize| first + i.min(out.len() - 1);
            let position = |i: usize| self.start + query(i) / group;
            let from = oldest(position(0));
            let cache = (from - base) * stride;
            let tile = Tile::<N> {
                q: std::array::from_fn(|i| {
                    let (row, head) = (query(i) / group, self.kv * group + query(i) % group);
                    &self.q[(row * n_heads + head) * d_head..][..d_head]
                }),
                seen_from: std::array::from_fn(|i| (oldest(position(i)) - from) as u32),
                seen_to: std::array::from_fn(|i| (position(i) - from) as u32),
                keys: &keys[cache..],
                values: &values[cache..],
                stride,
                length: position(N - 1) + 1 - from,
                scale: shape.scale,
                softcap: shape.softcap,
            };
            tile.run(&mut scratch.q, &mut scratch.scores, out);
        }
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch<TILE>> = RefCell::default();
    static WIDE_SCRATCH: RefCell<Scratch<WIDE>> = RefCell::default();
}

/// Buffers of a thread.
#[derive(Default)]
struct Scratch<const N: usize> {
    q: Vec<[f32; N]>,      // [d_head], scaled
    scores: Vec<[f32; N]>, // [length]
    // Of a rounded cache: what the head's queries see, `[positions, d_head]`.
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// `N` queries with the stretch of the cache that at least one of them sees.
struct Tile<'a, const N: usize> {
    q: [&'a [f32]; N],
    /// First and last position that each query sees, counted from the first key.
    seen_from: [u32; N],
    seen_to: [u32; N],
    keys: &'a [f32],
    values: &'a [f32],
    /// Values from one position to the next.
    stride: usize,
    length: usize,
    scale: f32,
    softcap: Option<f32>,
}

impl<const N: usize> Tile<'_, N> {
    fn run(&self, q: &mut Vec<[f32; N]>, scores: &mut Vec<[f32; N]>, out: &mut [&mut [f32]]) {
        #[cfg(target_arch = "x86_64")]
        if isa() >= Isa::Avx512 {
            // SAFETY: `isa` returns Avx512 or more only where the processor has these features.
            return unsafe { self.run_avx512(q, scores, out) };
        } else if isa() >= Isa::Avx2 {
            // SAFETY: as above.
            return unsafe { self.run_avx2(q, scores, out) };
        }
        self.body::<false, false>(q, scores, out);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    fn run_avx512(
        &self,
        q: &mut Vec<[f32; N]>,
        scores: &mut Vec<[f32; N]>,
        out: &mut [&mut [f32]],
    ) {
        self.body::<true, true>(q, scores, out);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn run_avx2(&self, q: &mut Vec<[f32; N]>, scores: &mut Vec<[f32; N]>, out: &mut [&mut [f32]]) {
        self.body::<true, false>(q, scores, out);
    }

    #[inline(always)]
    fn body<const FMA: bool, const AVX512: bool>(
        &self,
        q: &mut Vec<[f32; N]>,
        scores: &mut Vec<[f32; N]>,
        out: &mut [&mut [f32]],
    ) {
        q.clear();
        q.extend((0..self.q[0].len()).map(|i| self.q.map(|q| q[i] * self.scale)));
        scores.clear();
        scores.resize(self.length, [0.0; N]);
        let whole = self.length / KEYS * KEYS;
        for p in (0..whole).step_by(KEYS) {
            let scores = &mut scores[p..p + KEYS];
            #[cfg(target_arch = "x86_64")]
            if AVX512 && let Some((q, scores)) = wide::<N>(q, scores) {
                // SAFETY: only `run_avx512` asks for it.
                unsafe { self.score_avx512(q, p, scores) };
                continue;
            }
            self.score::<FMA, KEYS>(q, p, scores);
        }
        for p in whole..self.length {
            self.score::<FMA, 1>(q, p, &mut scores[p..p + 1]);
        }
        let sums = self.weigh(scores);
        for (first, out) in out.chunks_mut(4).enumerate() {
            let mut from = 0;
            #[cfg(target_arch = "x86_64")]
            if AVX512 {
                // SAFETY: only `run_avx512` asks for it.
                from = unsafe { self.mix_avx512(4 * first, scores, &sums, out) };
            }
            self.mix::<FMA>(4 * first, from, scores, &sums, out);
        }
    }

    /// [`Self::mix`] of [`WIDE_MIX`] values at a time; returns how many of a head it has done.
    ///
    /// # Safety
    /// Needs AVX-512.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    unsafe fn mix_avx512(
        &self,
        first: usize,
        weights: &[[f32; N]],
        sums: &[f32; N],
        out: &mut [&mut [f32]],
    ) -> usize {
        use std::arch::x86_64::*;
        let d = self.q[0].len();
        let whole = d / WIDE_MIX * WIDE_MIX;
        for from in (0..whole).step_by(WIDE_MIX) {
            let mut acc = [[_mm512_setzero_ps(); 2]; 4];
            let rows = self.values[from..].chunks(self.stride);
            for (weights, row) in weights.iter().zip(rows) {
                let (Some(weights), Some(row)) = (
                    weights[first..].first_chunk::<4>(),
                    row.first_chunk::<WIDE_MIX>(),
                ) else {
                    break; // no row is shorter than a head
                };
                // SAFETY: 32 values.
                let row = unsafe {
                    [
                        _mm512_loadu_ps(row.as_ptr()),
                        _mm512_loadu_ps(row[16..].as_ptr()),
                    ]
                };
                for (acc, weight) in acc.iter_mut().zip(weights) {
                    let weight = _mm512_set1_ps(*weight);
                    acc[0] = _mm512_fmadd_ps(weight, row[0], acc[0]);
                    acc[1] = _mm512_fmadd_ps(weight, row[1], acc[1]);
                }
            }
            for (t, (out, acc)) in out.iter_mut().zip(acc).enumerate() {
                let inverse = _mm512_set1_ps(1.0 / sums[first + t]);
                let out = &mut out[from..from + WIDE_MIX];
                // SAFETY: 32 values.
                unsafe {
                    _mm512_storeu_ps(out.as_mut_ptr(), _mm512_mul_ps(acc[0], inverse));
                    _mm512_storeu_ps(out[16..].as_mut_ptr(), _mm512_mul_ps(acc[1], inverse));
                }
            }
        }
        whole
    }

    /// [`Self::score`] of [`KEYS`] keys: the sums stay in registers only where they are spelled out.
    ///
    /// # Safety
    /// Needs AVX-512.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    unsafe fn score_avx512(&self, q: &[[f32; WIDE]], p: usize, scores: &mut [[f32; WIDE]; KEYS]) {
        use std::arch::x86_64::*;
        let keys: [&[f32]; KEYS] =
            std::array::from_fn(|j| &self.keys[(p + j) * self.stride..][..q.len()]);
        let mut acc = [_mm512_setzero_ps(); KEYS];
        for (i, q) in q.iter().enumerate() {
            // SAFETY: 16 values.
            let q = unsafe { _mm512_loadu_ps(q.as_ptr()) };
            for (acc, key) in acc.iter_mut().zip(keys) {
                // SAFETY: a key is as long as a query.
                let key = _mm512_set1_ps(unsafe { *key.get_unchecked(i) });
                *acc = _mm512_fmadd_ps(q, key, *acc);
            }
        }
        for (scores, acc) in scores.iter_mut().zip(acc) {
            // SAFETY: 16 values.
            unsafe { _mm512_storeu_ps(scores.as_mut_ptr(), acc) };
        }
    }

    /// Scores of `K` keys from `p` on.
    #[inline(always)]
    fn score<const FMA: bool, const K: usize>(
        &self,
        q: &[[f32; N]],
        p: usize,
        scores: &mut [[f32; N]],
    ) {
        let d = q.len();
        let keys: [&[f32]; K] = std::array::from_fn(|j| &self.keys[(p + j) * self.stride..][..d]);
        let mut acc = [[0.0f32; N]; K];
        for (i, q) in q.iter().enumerate() {
            for (acc, key) in acc.iter_mut().zip(keys) {
                for lane in 0..N {
                    acc[lane] = mul_add::<FMA>(q[lane], key[i], acc[lane]);
                }
            }
        }
        scores.copy_from_slice(&acc);
    }

    /// Turns scores into `e^(score - max)`, zero where a query does not look; returns their sums.
    #[inline(always)]
    fn weigh(&self, scores: &mut [[f32; N]]) -> [f32; N] {
        if let Some(cap) = self.softcap {
            for scores in scores.iter_mut() {
                for s in scores {
                    *s = cap * ops::tanh(*s / cap);
                }
            }
        }
        let sees = |p: usize, lane: usize| {
            (p as u32 >= self.seen_from[lane]) & (p as u32 <= self.seen_to[lane])
        };
        let mut max = [f32::NEG_INFINITY; N];
        for (p, scores) in scores.iter().enumerate() {
            for lane in 0..N {
                let larger = (scores[lane] > max[lane]) & sees(p, lane);
                max[lane] = if larger { scores[lane] } else { max[lane] };
            }
        }
        let mut sums = [0.0f32; N];
        for (p, scores) in scores.iter_mut().enumerate() {
            for lane in 0..N {
                let e = ops::exp(scores[lane] - max[lane]);
                scores[lane] = if sees(p, lane) { e } else { 0.0 };
                sums[lane] += scores[lane];
            }
        }
        sums
    }

    /// Weighted means of the values, those of a head from `done` on, for up to four queries from `first` on.
    #[inline(always)]
    fn mix<const FMA: bool>(
        &self,
        first: usize,
        done: usize,
        weights: &[[f32; N]],
        sums: &[f32; N],
        out: &mut [&mut [f32]],
    ) {
        let d = self.q[0].len();
        let whole = d / WIDTH * WIDTH;
        for from in (done..whole).step_by(WIDTH) {
            // Fixed lengths only: these sums must stay in registers.
            let mut acc = [[0.0f32; WIDTH]; 4];
            let rows = self.values[from..].chunks(self.stride);
            for (weights, row) in weights.iter().zip(rows) {
                let (Some(weights), Some(row)) = (
                    weights[first..].first_chunk::<4>(),
                    row.first_chunk::<WIDTH>(),
                ) else {
                    break; // no row is shorter than a head
                };
                for t in 0..4 {
                    for i in 0..WIDTH {
                        acc[t][i] = mul_add::<FMA>(weights[t], row[i], acc[t][i]);
                    }
                }
            }
            for (t, (out, acc)) in out.iter_mut().zip(&acc).enumerate() {
                let inverse = 1.0 / sums[first + t];
                for (o, a) in out[from..from + WIDTH].iter_mut().zip(acc) {
                    *o = a * inverse;
                }
            }
        }
        for i in whole..d {
            for (t, out) in out.iter_mut().enumerate() {
                let values = self.values[i..].iter().step_by(self.stride);
                let sum = weights
                    .iter()
                    .zip(values)
                    .fold(0.0, |sum, (w, v)| mul_add::<FMA>(w[first + t], *v, sum));
                out[i] = sum / sums[first + t];
            }
        }
    }
}

/// Queries and scores of a wide tile.
#[cfg(target_arch = "x86_64")]
type WideScores<'a> = (&'a [[f32; WIDE]], &'a mut [[f32; WIDE]; KEYS]);

/// Queries and scores of a tile as those of a wide one, if it is.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn wide<'a, const N: usize>(
    q: &'a [[f32; N]],
    scores: &'a mut [[f32; N]],
) -> Option<WideScores<'a>> {
    if N != WIDE {
        return None;
    }
    let q = q.as_flattened().as_chunks::<WIDE>().0;
    let scores = scores.as_flattened_mut().as_chunks_mut::<WIDE>().0;
    Some((q, scores.first_chunk_mut()?))
}

/// `a b + c`, rounded once where the instruction set does that.
#[inline(always)]
fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::CacheFormat;
    use crate::dispatch::on_every_isa;
    use crate::testing::noise;

    fn kept(format: CacheFormat, d_head: usize, x: &[f32]) -> CacheRows {
        let mut rows = CacheRows::new(format, d_head);
        rows.push(x);
        rows
    }

    /// What `rows` gives back.
    fn rounded(rows: &CacheRows) -> Vec<f32> {
        let mut out = Vec::new();
        rows.widen(0, 1, rows.heads(), &mut out);
        out
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
            for format in [CacheFormat::F32, CacheFormat::Bf16, CacheFormat::Int8] {
                let (k, v) = (kept(format, d_head, &k), kept(format, d_head, &v));
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
                // Of what the cache kept: nothing else is rounded.
                let expected = reference(&shape, &q, &rounded(&k), &rounded(&v), start);
                for (i, (f, e)) in out.iter().zip(&expected).enumerate() {
                    let near = (f64::from(*f) - e).abs() <= 1e-5;
                    assert!(
                        near,
                        "{format:?} n {n} start {start} d_head {d_head}, at {i}: {f} against {e}"
                    );
                }
            }
        }
    }

    #[test]
    fn one_at_a_time_has_the_same_bits() {
        on_every_isa(|_| {
            for format in [CacheFormat::F32, CacheFormat::Bf16, CacheFormat::Int8] {
                check_one_at_a_time(format);
            }
        });
    }

    fn check_one_at_a_time(format: CacheFormat) {
        let shape = AttentionShape {
            n_heads: 4,
            n_kv_heads: 2,
            d_head: 16,
            scale: 0.25,
            window: None,
            softcap: None,
        };
        let n = 37;
        let q = noise(n * 64, 1);
        let (k, v) = (noise(n * 32, 2), noise(n * 32, 3));
        let (k, v) = (kept(format, 16, &k), kept(format, 16, &v));
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
