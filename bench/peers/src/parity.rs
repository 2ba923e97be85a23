//! How far llama.cpp is from the golden continuations that demur's own parity tests hold it to.
//!
//! The rule is that of `crates/model/tests/it/parity.rs`: a continuation is followed until the most
//! probable token is another one than the golden; compared is the log-probability of the choice.

use std::num::NonZeroU32;
use std::path::Path;

use anyhow::Context as _;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;
use serde_json::{Value, json};

/// Follows every prompt of `golden` with the model in `path`.
pub fn llama_cpp(path: &Path, golden: &Path, threads: usize) -> anyhow::Result<Value> {
    let bytes = std::fs::read(golden).with_context(|| format!("read {}", golden.display()))?;
    let golden: Value = serde_json::from_slice(&bytes)?;
    let mut backend = LlamaBackend::init()?;
    backend.void_logs();
    let model = LlamaModel::load_from_file(&backend, path, &LlamaModelParams::default())
        .with_context(|| format!("llama.cpp cannot load {}", path.display()))?;
    let threads = i32::try_from(threads)?;
    let params = LlamaContextParams::default()
        .with_n_ctx(NonZeroU32::new(1024))
        .with_n_threads(threads)
        .with_n_threads_batch(threads);
    let mut context = model.new_context(&backend, params)?;
    let (mut equal, mut off, mut parted) = (0, Vec::new(), Vec::new());
    let prompts = golden["prompts"].as_array().context("no prompts")?;
    for prompt in prompts {
        let list = |key: &str| prompt[key].as_array().cloned().unwrap_or_default();
        let mut new: Vec<i32> = list("ids").iter().filter_map(as_id).collect();
        let mut at = 0;
        context.clear_kv_cache();
        let steps = list("continuation").into_iter().zip(list("logprob"));
        let mut whole = true;
        for (step, (token, logprob)) in steps.enumerate() {
            let mut batch = LlamaBatch::new(new.len(), 1);
            for (i, id) in new.iter().enumerate() {
                batch.add(LlamaToken(*id), at + i as i32, &[0], i + 1 == new.len())?;
            }
            context.decode(&mut batch)?;
            let (top, found) = top(context.get_logits_ith(new.len() as i32 - 1));
            at += new.len() as i32;
            let difference = (found - logprob.as_f64().context("a log-probability")?).abs();
            if Some(top) != as_id(&token) {
                parted.push(json!({ "step": step, "off": difference }));
                whole = false;
                break;
            }
            off.push(difference);
            new = vec![top];
        }
        equal += usize::from(whole);
    }
    Ok(json!({
        "model": golden["model"],
        "equal": equal,
        "of": prompts.len(),
        "parted": parted,
        "worst": off.iter().copied().fold(0.0, f64::max),
        "mean": off.iter().sum::<f64>() / off.len() as f64,
    }))
}

fn as_id(value: &Value) -> Option<i32> {
    value.as_i64().and_then(|id| i32::try_from(id).ok())
}

/// The most probable token and its log-probability.
fn top(logits: &[f32]) -> (i32, f64) {
    let mut best = 0;
    for (i, v) in logits.iter().enumerate() {
        if *v > logits[best] {
            best = i;
        }
    }
    let largest = f64::from(logits[best]);
    let sum: f64 = logits.iter().map(|v| (f64::from(*v) - largest).exp()).sum();
    (best as i32, -sum.ln())
}
