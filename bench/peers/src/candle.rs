//! candle: its own quantised models, on the CPU with its defaults.
//!
//! The load is that of [`llama_cpp`](crate::llama_cpp), of one sequence: its quantised models refuse prompts
//! of several ("input tensor is not contiguous"), and can't stop before the head, so it has no figures
//! for sixteen sequences and for the harvest.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, bail};
use candle_core::quantized::gguf_file::Content;
use candle_core::{Device, Tensor};
use candle_transformers::models::{quantized_gemma3, quantized_llama, quantized_qwen2};
use serde_json::{Value, json};

use crate::compare::median;
use crate::load::{PROMPT, STEPS};

const REPEATS: usize = 3;

/// The families that candle reads from GGUF and that the catalogue has.
enum Model {
    Llama(quantized_llama::ModelWeights),
    Qwen2(quantized_qwen2::ModelWeights),
    Gemma3(quantized_gemma3::ModelWeights),
}

impl Model {
    fn open(path: &Path) -> anyhow::Result<(Self, usize)> {
        let mut file = std::fs::File::open(path)?;
        let content = Content::read(&mut file)?;
        let embed = content.tensor_infos.get("token_embd.weight");
        let vocabulary = embed
            .context("the file has no token_embd.weight")?
            .shape
            .dims()[0];
        let architecture = content.metadata.get("general.architecture");
        let architecture = architecture.context("the file names no architecture")?;
        let cpu = &Device::Cpu;
        let model = match architecture.to_string()?.as_str() {
            "llama" => Self::Llama(quantized_llama::ModelWeights::from_gguf(
                content, &mut file, cpu,
            )?),
            "qwen2" => Self::Qwen2(quantized_qwen2::ModelWeights::from_gguf(
                content, &mut file, cpu,
            )?),
            "gemma3" => Self::Gemma3(quantized_gemma3::ModelWeights::from_gguf(
                content, &mut file, cpu,
            )?),
            other => bail!("candle is asked for llama, qwen2 and gemma3 only, not {other}"),
        };
        Ok((model, vocabulary))
    }

    /// Feeds `n` ids at position `start`; at 0 the cache begins anew. Returns the seconds.
    fn feed(&mut self, start: usize, n: usize, vocabulary: usize) -> anyhow::Result<f64> {
        let id = |i: usize| ((i + 1).wrapping_mul(2_654_435_769) >> 7) % vocabulary;
        let ids: Vec<u32> = (0..n).map(|i| id(i) as u32).collect();
        let x = Tensor::from_vec(ids, (1, n), &Device::Cpu)?;
        let clock = Instant::now();
        match self {
            Self::Llama(m) => m.forward(&x, start)?,
            Self::Qwen2(m) => m.forward(&x, start)?,
            Self::Gemma3(m) => m.forward(&x, start)?,
        };
        Ok(clock.elapsed().as_secs_f64())
    }
}

/// Tokens a second: `prefill_tok_s`, `decode_tok_s`.
pub fn measure(path: &Path) -> anyhow::Result<Value> {
    let (mut model, vocabulary) =
        Model::open(path).with_context(|| format!("candle cannot load {}", path.display()))?;
    let (mut prefills, mut decodes) = (Vec::new(), Vec::new());
    for round in 0..=REPEATS {
        let prefill = model.feed(0, PROMPT, vocabulary)?;
        let mut decode = 0.0;
        for step in 0..STEPS {
            decode += model.feed(PROMPT + step, 1, vocabulary)?;
        }
        if round > 0 {
            prefills.push(PROMPT as f64 / prefill);
            decodes.push(STEPS as f64 / decode);
        }
    }
    Ok(json!({
        "prefill_tok_s": median(&mut prefills),
        "decode_tok_s": median(&mut decodes),
    }))
}
