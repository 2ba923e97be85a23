use proptest::prelude::*;

use super::*;
use crate::dispatch::on_every_isa;
use crate::element::Element;

/// Small integers: exact in bf16 and in any order of sums, with many ties.
fn integers(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 28) as f32) - 7.0
        })
        .collect()
}

fn rows<E: Element>(x: &[f32], n: usize, d: usize) -> Vec<E> {
    let mut out = vec![E::default(); n.next_multiple_of(ROWS) * E::stride(d)];
    for (row, x) in out.chunks_exact_mut(E::stride(d)).zip(x.chunks_exact(d)) {
        E::store(x, &mut row[..d]);
    }
    out
}

/// The codes of a row by a full sort, in the order of the latents.
fn sorted(x: &[f32], w: &[f32], b: &[f32], k: usize) -> Vec<(u32, f32)> {
    let d = x.len();
    let mut pre: Vec<(u32, f32)> = w
        .chunks_exact(d)
        .zip(b)
        .map(|(w, b)| x.iter().zip(w).map(|(x, w)| x * w).sum::<f32>() + b)
        .enumerate()
        .map(|(j, v)| (j as u32, v))
        .filter(|e| e.1 > 0.0)
        .collect();
    pre.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    pre.truncate(k);
    pre.sort_by_key(|e| e.0);
    pre.resize(k, (0, 0.0));
    pre
}

fn encode<E: Element>(w: &E::Encoder, b: &[f32], x: &[f32], d: usize, k: usize) -> Vec<(u32, f32)> {
    let n = x.len() / d;
    let (mut idx, mut val) = (vec![9; n * k], vec![9.0; n * k]);
    E::encode_topk(w, b, &rows::<E>(x, n, d), d, k, &mut idx, &mut val);
    idx.into_iter().zip(val).collect()
}

#[test]
fn a_row_by_hand() {
    // Latents (1, 0), (0, 1), (1, 1), (-1, 0) with biases 0, 0.5, 0, 9; x = (2, 1): 2, 1.5, 3, 7.
    let w = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, -1.0, 0.0];
    let b = [0.0, 0.5, 0.0, 9.0];
    let found = encode::<f32>(&w, &b, &[2.0, 1.0, -9.0, -9.0], 2, 2);
    // Of the second row only the last latent is positive: 9 + 9.
    assert_eq!(found, [(2, 3.0), (3, 7.0), (3, 18.0), (0, 0.0)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Against a full sort, for both operands, on every instruction set.
    #[test]
    fn agrees_with_a_full_sort(
        n in 1usize..70, m in 1usize..700, d in 1usize..80, k in 1usize..40, seed in any::<u32>(),
    ) {
        let k = k.min(m);
        let (x, w) = (integers(n * d, seed), integers(m * d, seed ^ 1));
        let b = integers(m, seed ^ 2);
        let tiles = Bf16Tiles::new(&w, d);
        let expected: Vec<_> = x.chunks_exact(d).flat_map(|x| sorted(x, &w, &b, k)).collect();
        let mut found = Vec::new();
        on_every_isa(|isa| {
            found.push((isa, "f32", encode::<f32>(&w, &b, &x, d, k)));
            found.push((isa, "bf16", encode::<half::bf16>(&tiles, &b, &x, d, k)));
        });
        for (isa, operand, codes) in found {
            for (i, (f, e)) in codes.iter().zip(&expected).enumerate() {
                prop_assert_eq!(f, e, "entry {} of row {}, {:?} {}", i % k, i / k, isa, operand);
            }
        }
    }
}

/// Fractions that bf16 can't hold: each product against the reference on the same tiles.
#[test]
fn products_agree_with_the_reference() {
    for d in [5, 64, 200] {
        let noise = |n, seed| -> Vec<f32> {
            let fine = integers(n, seed ^ 77);
            integers(n, seed)
                .iter()
                .zip(fine)
                .map(|(a, b)| a + 0.0137 * b)
                .collect()
        };
        let (x, w) = (noise(ROWS * d, 3), noise(GROUP * d, 4));
        let (x, tiles) = (rows::<bf16>(&x, ROWS, d), Bf16Tiles::new(&w, d));
        let stride = <bf16 as Element>::stride(d);
        let mut expected = vec![0.0; ROWS * GROUP];
        block_reference(&x, stride, &tiles.tiles, tiles.depth, &mut expected);
        on_every_isa(|isa| {
            let mut found = vec![f32::NAN; ROWS * GROUP];
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Amx => {
                    let product = OnAmx(Bf16 {
                        w: &tiles,
                        x: &x,
                        stride,
                    });
                    let mut own = Vec::new();
                    product.begin(0, ROWS, &mut own);
                    product.block(0, 0, 0, &own, &mut found);
                    product.end();
                }
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => avx512::block(&x, stride, &tiles.tiles, tiles.depth, &mut found),
                _ => return,
            }
            for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
                let near = (f - e).abs() <= 1e-4 + 1e-5 * e.abs();
                assert!(near, "{isa:?}, d {d}, sum {i}: {f} against {e}");
            }
        });
    }
}

#[test]
fn equal_values_and_what_is_not_a_number() {
    // All latents alike: the lowest win. A row that is not a number has no codes.
    let (m, k) = (600, 5);
    let x = [1.0, f32::NAN];
    on_every_isa(|_| {
        let found = encode::<f32>(&vec![2.0; m], &vec![0.0; m], &x, 1, k);
        let expected: Vec<_> = (0..k as u32)
            .map(|j| (j, 2.0))
            .chain(vec![(0, 0.0); k])
            .collect();
        assert_eq!(found, expected);
    });
}

#[test]
fn gathered_latents_are_their_rows() {
    let (m, d) = (50, 40);
    let w = integers(m * d, 8);
    let some = [3u32, 17, 18, 49];
    let picked: Vec<f32> = some
        .iter()
        .flat_map(|&j| &w[j as usize * d..][..d])
        .copied()
        .collect();
    let (tiles, expected) = (
        Bf16Tiles::new(&w, d).gather(&some),
        Bf16Tiles::new(&picked, d),
    );
    assert_eq!(
        bytemuck::cast_slice::<_, u8>(&tiles.tiles),
        bytemuck::cast_slice::<_, u8>(&expected.tiles)
    );
}

#[test]
fn the_same_bits_for_any_number_of_threads() {
    let (n, m, d, k) = (300, 500, 96, 7);
    let noise = |n, seed| -> Vec<f32> { integers(n, seed).iter().map(|v| v * 0.3).collect() };
    let (x, w, b) = (noise(n * d, 5), noise(m * d, 6), noise(m, 7));
    let tiles = Bf16Tiles::new(&w, d);
    on_every_isa(|isa| {
        let mut first = None;
        for threads in 1..=8 {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let codes = pool.install(|| encode::<bf16>(&tiles, &b, &x, d, k));
            let bits: Vec<_> = codes.iter().map(|c| (c.0, c.1.to_bits())).collect();
            assert_eq!(
                &bits,
                first.get_or_insert_with(|| bits.clone()),
                "{isa:?}, {threads} threads"
            );
        }
    });
}
