//! How fast a model runs here: prefill, decoding one sequence, decoding many.
//!
//! Every figure is the median of [`ROUNDS`] rounds on fixed pseudo-random tokens; logits are computed
//! for the last token of each sequence, nothing is sampled.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::decoder::{KvCache, LogitsAt, Model, SeqInput, Workspace};
use crate::error::ModelError;
use crate::hooks::Role;

const PROMPT: usize = 512;
const STEPS: usize = 32;
const BATCH: usize = 16;
const BATCH_PROMPT: usize = 64;
const ROUNDS: usize = 3;

/// What [`fn@bench`] measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BenchReport {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Prefill of the prompt, tokens a second.
    pub prefill: f64,
    /// Decoding one sequence after the prompt, tokens a second.
    pub decode: f64,
    /// Sequences that decode together.
    pub batch: usize,
    /// Decoding them together, tokens of all a second.
    pub decode_batch: f64,
    /// Threads of the pool.
    pub threads: usize,
    /// Instruction set of the kernels.
    pub isa: String,
}

/// Measures `model`.
///
/// # Errors
/// [`ModelError::TooLong`] if the model's context is too short to measure.
pub fn bench(model: &Model) -> Result<BenchReport, ModelError> {
    let room = model.spec().context.saturating_sub(STEPS).max(1);
    let prompt = PROMPT.min(room);
    let mut ws = Workspace::default();
    let (mut prefill, mut decode, mut decode_batch) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let mut one = vec![model.new_cache()];
        prefill.push(prompt as f64 / feed(model, &mut one, prompt, &mut ws)?);
        decode.push(steps(model, &mut one, &mut ws)?);
        let mut many: Vec<KvCache> = (0..BATCH).map(|_| model.new_cache()).collect();
        feed(model, &mut many, BATCH_PROMPT.min(room), &mut ws)?;
        decode_batch.push(steps(model, &mut many, &mut ws)?);
    }
    Ok(BenchReport {
        prompt,
        prefill: median(prefill),
        decode: median(decode),
        batch: BATCH,
        decode_batch: median(decode_batch),
        threads: rayon::current_num_threads(),
        isa: demur_kernels::dispatch::isa().name().to_owned(),
    })
}

/// Tokens a second of [`STEPS`] passes with one token a sequence.
fn steps(model: &Model, caches: &mut [KvCache], ws: &mut Workspace) -> Result<f64, ModelError> {
    let mut seconds = 0.0;
    for _ in 0..STEPS {
        seconds += feed(model, caches, 1, ws)?;
    }
    Ok((STEPS * caches.len()) as f64 / seconds)
}

/// Adds `n` tokens to every sequence in one pass; returns its seconds.
fn feed(
    model: &Model,
    caches: &mut [KvCache],
    n: usize,
    ws: &mut Workspace,
) -> Result<f64, ModelError> {
    // Weyl's sequence: different tokens, the same in every run.
    let token = |i: usize| (i.wrapping_mul(2_654_435_769) >> 7) % model.spec().d_vocab;
    let tokens: Vec<u32> = (0..n * caches.len()).map(|i| token(i + 1) as u32).collect();
    let roles = vec![Role::User; n];
    let inputs = caches.iter_mut().zip(tokens.chunks_exact(n));
    let mut inputs: Vec<SeqInput<'_>> = inputs
        .map(|(cache, tokens)| SeqInput {
            tokens,
            roles: &roles,
            generated: false,
            cache,
            hook: None,
            hook_sites: &[],
            logits: LogitsAt::Last,
        })
        .collect();
    let start = Instant::now();
    model.forward(&mut inputs, None, ws)?;
    Ok(start.elapsed().as_secs_f64())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
