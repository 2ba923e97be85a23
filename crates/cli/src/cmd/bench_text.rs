//! What fast arithmetic costs: perplexity of a text, and the KL divergence of next-token distributions from
//! those of f32.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use demur_eval::text;
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

/// Figures of `fast`, with its int8 and its bf16 products (the head's are int8 always), beside those of f32.
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
    let ways = [
        (&exact.model, Products::Int8),
        (&fast.model, Products::Int8),
        (&fast.model, Products::Bf16),
    ];
    let d_vocab = fast.model.spec().d_vocab;
    let (mut nll, mut from_f32, mut n) = ([0.0; 3], [0.0; 3], 0);
    let bar = Progress::new("text", "tokens", tokens.len() as u64);
    let mut workspaces = ways.map(|_| Workspace::default());
    for tokens in tokens.chunks(window).filter(|t| t.len() > 1) {
        let mut base = Vec::new();
        for (way, (model, products)) in ways.into_iter().enumerate() {
            let these = logits(model, products, tokens, &mut workspaces[way])?;
            if way == 0 {
                base.clone_from(&these);
            }
            let score = text::score(tokens, &base, &these, d_vocab);
            nll[way] += score.nll;
            from_f32[way] += score.kl;
        }
        n += tokens.len() - 1;
        bar.advance(tokens.len() as u64);
    }
    bar.finish();
    let mean = |sum: f64| sum / n as f64;
    let [ppl_f32, ppl_int8, ppl_bf16] = nll.map(|sum| mean(sum).exp());
    Ok(vec![
        ("text_tokens", n as f64),
        ("ppl_f32", ppl_f32),
        ("ppl_int8", ppl_int8),
        ("ppl_bf16", ppl_bf16),
        ("ppl_int8_off", ppl_int8 / ppl_f32 - 1.0),
        ("ppl_bf16_off", ppl_bf16 / ppl_f32 - 1.0),
        ("kl_int8", mean(from_f32[1])),
        ("kl_bf16", mean(from_f32[2])),
    ])
}

/// Logits of all tokens, `[tokens, d_vocab]`.
fn logits(
    model: &Model,
    products: Products,
    tokens: &[u32],
    ws: &mut Workspace,
) -> Result<Vec<f32>> {
    let mut cache = model.new_cache();
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
