//! Attention at the default model's shape (14 heads over 2, d_head 64): a prompt of 512, one token at
//! a context of 2,048, and 16 sequences decoding at 512, over a cache of each format. Throughput counts the products that the mask
//! leaves, `4 d_head` operations a query head and key.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use demur_bench::noise;
use demur_kernels::attention::{AttentionShape, SeqAttention, attention};
use demur_kernels::cache::{CacheFormat, CacheRows};

fn ladder(c: &mut Criterion) {
    let shape = AttentionShape {
        n_heads: 14,
        n_kv_heads: 2,
        d_head: 64,
        scale: 0.125,
        window: None,
        softcap: None,
    };
    let (q_row, kv_row) = (14 * 64, 2 * 64);
    let mut group = c.benchmark_group("attention");
    for (name, sequences, n, start) in [
        ("prefill 512", 1, 512, 0),
        ("decode at 2048", 1, 1, 2047),
        ("16 decode at 512", 16, 1, 511),
    ] {
        let length = start + n;
        let q = noise(sequences * n * q_row, 1);
        let mut out = vec![0.0; q.len()];
        let keys: usize = (start + 1..=length).sum();
        group.throughput(Throughput::Elements(
            (sequences * keys * shape.n_heads * 4 * shape.d_head) as u64,
        ));
        for format in [CacheFormat::F32, CacheFormat::Bf16, CacheFormat::Int8] {
            let caches = |seed| -> Vec<CacheRows> {
                let values = noise(sequences * length * kv_row, seed);
                let kept = values.chunks(length * kv_row).map(|values| {
                    let mut rows = CacheRows::new(format, shape.d_head);
                    rows.push(values);
                    rows
                });
                kept.collect()
            };
            let (k, v) = (caches(2), caches(3));
            group.bench_function(BenchmarkId::new(name, format!("{format:?}")), |b| {
                b.iter(|| {
                    let mut seqs: Vec<SeqAttention<'_>> = (q.chunks(n * q_row))
                        .zip(k.iter().zip(&v))
                        .zip(out.chunks_mut(n * q_row))
                        .map(|((q, (k, v)), out)| SeqAttention {
                            q,
                            k,
                            v,
                            start,
                            out,
                        })
                        .collect();
                    attention(&shape, &mut seqs);
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, ladder);
criterion_main!(benches);
