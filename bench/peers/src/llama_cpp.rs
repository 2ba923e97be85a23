//! llama.cpp: prefill of one prompt, decoding after it, decoding many sequences together.
//!
//! Its defaults are kept (f16 cache, flash attention where it chooses it); a batch is 512 tokens. Tokens
//! are those of demur's own bench, logits are computed for the last token of each sequence, nothing
//! is sampled. Each figure is the median of [`REPEATS`] after one pass that warms up.

use std::num::NonZeroU32;
use std::path::Path;
use std::time::Instant;

use anyhow::Context as _;
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;
use serde_json::{Value, json};

use crate::load::{BATCH, BATCH_PROMPT, PROMPT, STEPS};

const REPEATS: usize = 3;

/// Tokens a second: `prefill_tok_s`, `decode_tok_s`, `decode16_tok_s` (of all sequences).
pub fn measure(path: &Path, threads: usize) -> anyhow::Result<Value> {
    let mut backend = LlamaBackend::init()?;
    backend.void_logs();
    let model = LlamaModel::load_from_file(&backend, path, &LlamaModelParams::default())
        .with_context(|| format!("llama.cpp cannot load {}", path.display()))?;
    let threads = i32::try_from(threads)?;
    let context = |sequences: usize, each: usize| {
        let params = LlamaContextParams::default()
            .with_n_ctx(NonZeroU32::new((sequences * each) as u32))
            .with_n_seq_max(sequences as u32)
            .with_n_batch((sequences * BATCH_PROMPT).max(PROMPT) as u32)
            .with_n_ubatch(PROMPT as u32)
            .with_n_threads(threads)
            .with_n_threads_batch(threads);
        model.new_context(&backend, params)
    };
    let vocabulary = model.n_vocab() as usize;

    let mut one = Run {
        context: context(1, 1024)?,
        sequences: 1,
        vocabulary,
    };
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    for round in 0..=REPEATS {
        let (p, d) = one.round(PROMPT)?;
        if round > 0 {
            prefill.push(PROMPT as f64 / p);
            decode.push(STEPS as f64 / d);
        }
    }
    drop(one);
    let mut many = Run {
        context: context(BATCH, 256)?,
        sequences: BATCH,
        vocabulary,
    };
    let mut decode_many = Vec::new();
    for round in 0..=REPEATS {
        let (_, d) = many.round(BATCH_PROMPT)?;
        if round > 0 {
            decode_many.push((BATCH * STEPS) as f64 / d);
        }
    }
    Ok(json!({
        "prefill_tok_s": crate::compare::median(&mut prefill),
        "decode_tok_s": crate::compare::median(&mut decode),
        "decode16_tok_s": crate::compare::median(&mut decode_many),
        "threads": threads,
    }))
}

struct Run<'m> {
    context: LlamaContext<'m>,
    sequences: usize,
    vocabulary: usize,
}

impl Run<'_> {
    /// Empties the cache, then seconds of the prompt and of [`STEPS`] passes of one token a sequence.
    fn round(&mut self, prompt: usize) -> anyhow::Result<(f64, f64)> {
        self.context.clear_kv_cache();
        let first = self.feed(0, prompt)?;
        let mut seconds = 0.0;
        for step in 0..STEPS {
            seconds += self.feed(prompt + step, 1)?;
        }
        Ok((first, seconds))
    }

    /// Adds `n` tokens to every sequence from position `start`; returns the seconds.
    fn feed(&mut self, start: usize, n: usize) -> anyhow::Result<f64> {
        let mut batch = LlamaBatch::new(n * self.sequences, 1);
        for s in 0..self.sequences {
            for i in 0..n {
                let at = s * n + i + 1;
                let id = (at.wrapping_mul(2_654_435_769) >> 7) % self.vocabulary;
                let last = i + 1 == n;
                batch.add(LlamaToken(id as i32), (start + i) as i32, &[s as i32], last)?;
            }
        }
        let clock = Instant::now();
        self.context.decode(&mut batch)?;
        self.context.synchronize();
        Ok(clock.elapsed().as_secs_f64())
    }
}
