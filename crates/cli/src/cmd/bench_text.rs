//! What fast arithmetic and a rounded cache cost: perplexity of a text, and the KL divergence of next-token
//! distributions from those of f32.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use demur_eval::text;
use demur_kernels::cache::CacheFormat;
use demur_kernels::linear::Products;
use demur_model::decoder::{Capture, LogitsAt, Model, SeqInput, Workspace};
use demur_model::hooks::Role;
use demur_model::tokenizer::Special;

use crate::loaded::Loaded;
use crate::progress::Progress;
use crate::study::config::Precision;

/// Tokens that see each other.
const WINDOW: usize = 256;
/// The most tokens that are read.
const TOKENS: usize = 20_000;

/// How a text is read: the keys of its figures, products (the head's are int8 always), keys and values.
const WAYS: [([&str; 3], Products, CacheFormat); 4] = [
    (
        ["ppl_int8", "ppl_int8_off", "kl_int8"],
        Products::Int8,
        CacheFormat::F32,
    ),
    (
        ["ppl_bf16", "ppl_bf16_off", "kl_bf16"],
        Products::Bf16,
        CacheFormat::F32,
    ),
    (
        ["ppl_kv_bf16", "ppl_kv_bf16_off", "kl_kv_bf16"],
        Products::Int8,
        CacheFormat::Bf16,
    ),
    (
        ["ppl_kv_int8", "ppl_kv_int8_off", "kl_kv_int8"],
        Products::Int8,
        CacheFormat::Int8,
    ),
];

/// Figures of `fast` in all [`WAYS`], beside those of f32.
pub(super) fn figures(
    model: &str,
    fast: &Loaded,
    texts: &[impl AsRef<Path>],
) -> Result<Vec<(&'static str, f64)>> {
    let mut whole = String::new();
    for path in texts {
        let path = path.as_ref();
        whole +=
            &std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    }
    let mut tokens = fast.tokenizer.encode(&whole, Special::AsText)?;
    tokens.truncate(TOKENS);
    let window = WINDOW.min(fast.model.spec().context);
    ensure!(
        tokens.len() > 1,
        "the texts have fewer than two tokens; give longer ones"
    );
    let exact = Loaded::open(model, Precision::F32)?;
    let d_vocab = fast.model.spec().d_vocab;
    let (mut f32_nll, mut scores, mut n) = (0.0, [(0.0, 0.0); WAYS.len()], 0);
    let bar = Progress::new("text", "tokens", tokens.len() as u64);
    let mut ws = Workspace::default();
    for tokens in tokens.chunks(window).filter(|t| t.len() > 1) {
        let f32 = (Products::Int8, CacheFormat::F32);
        let base = logits(&exact.model, f32, tokens, &mut ws)?;
        f32_nll += text::score(tokens, &base, &base, d_vocab).nll;
        for ((_, products, cache), (nll, kl)) in WAYS.into_iter().zip(&mut scores) {
            let these = logits(&fast.model, (products, cache), tokens, &mut ws)?;
            let score = text::score(tokens, &base, &these, d_vocab);
            *nll += score.nll;
            *kl += score.kl;
        }
        n += tokens.len() - 1;
        bar.advance(tokens.len() as u64);
    }
    bar.finish();
    let mean = |sum: f64| sum / n as f64;
    let ppl_f32 = mean(f32_nll).exp();
    let mut figures = vec![("text_tokens", n as f64), ("ppl_f32", ppl_f32)];
    for (([ppl, off, kl], ..), (nll, sum)) in WAYS.into_iter().zip(scores) {
        let perplexity = mean(nll).exp();
        figures.extend([
            (ppl, perplexity),
            (off, perplexity / ppl_f32 - 1.0),
            (kl, mean(sum)),
        ]);
    }
    Ok(figures)
}

/// Logits of all tokens, `[tokens, d_vocab]`.
fn logits(
    model: &Model,
    (products, cache): (Products, CacheFormat),
    tokens: &[u32],
    ws: &mut Workspace,
) -> Result<Vec<f32>> {
    let mut cache = model.new_cache_as(cache);
    let mut input = [SeqInput {
        tokens,
        roles: &vec![Role::User; tokens.len()],
        generated: false,
        cache: &mut cache,
        hook: None,
        hook_sites: &[],
        logits: LogitsAt::All,
    }];
    let mut capture = Capture {
        products,
        ..Capture::default()
    };
    let logits = model.forward(&mut input, Some(&mut capture), ws)?;
    Ok(logits.rows().flatten().copied().collect())
}
