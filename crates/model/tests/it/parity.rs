//! Real checkpoints against `transformers` on the same weights, dequantised to f32.
//!
//! The goldens of `testdata/parity` hold ten greedy continuations of 64 tokens with the
//! log-probability of each choice, and a perplexity over 20,000 tokens. The weights and the text are
//! not in the repository, so these tests run when asked for:
//!
//! ```text
//! DEMUR_MODELS=folder-of-gguf-files DEMUR_PARITY_TEXT=text.jsonl.gz \
//!     cargo test --release -p demur-model --test it parity -- --ignored --nocapture --test-threads=1
//! ```
//!
//! In f32 a continuation agrees if its tokens are the golden ones up to a near-tie: where it first
//! chooses another token, the log-probability of the choice is within [`LOGPROB`] of the golden one. That
//! proves the implementation. The fast products round activations to int8, which no implementation does
//! without noise (some hundredths of a nat here), so of them the table shows where they part and what is
//! asserted is the price: the perplexity is within [`PERPLEXITY`] of the reference.
//! Everything after that has another context and is not compared. Prompts go through the
//! checkpoint's own chat template and the text through its tokenizer, so both are tested too, the
//! tokenizer also on the difficult texts of `tokenizers.rs`.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::sync::Arc;

use demur_kernels::linear::Precision;
use demur_kernels::ops::log_softmax_at;
use demur_model::chat::{ChatTemplate, Message};
use demur_model::checkpoint::Checkpoint;
use demur_model::decoder::{KvCache, LogitsAt, Model, SeqInput, Workspace};
use demur_model::hooks::Role;
use demur_model::tokenizer::{Special, Tokenizer};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::tokenizers::Difficult;

/// How far a top-1 log-probability may be off in f32 where a continuation leaves the golden one.
const LOGPROB: f32 = 0.05;
/// How far a perplexity may be off, as a fraction.
const PERPLEXITY: f64 = 0.005;

#[derive(Deserialize)]
struct Golden {
    file: String,
    sha256: String,
    chat: bool,
    prompts: Vec<Prompt>,
    texts: Vec<Difficult>,
    perplexity: Text,
}

#[derive(Deserialize)]
struct Prompt {
    prompt: String,
    ids: Vec<u32>,
    continuation: Vec<u32>,
    logprob: Vec<f32>,
}

#[derive(Deserialize)]
struct Text {
    text_sha256: String,
    window: usize,
    windows: usize,
    bos: Option<u32>,
    ids_sha256: String,
    perplexity: f64,
}

#[derive(Deserialize)]
struct Row {
    text: String,
}

fn from_env(name: &str) -> PathBuf {
    PathBuf::from(std::env::var_os(name).unwrap_or_else(|| panic!("set {name}; see the module")))
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

/// Logits of new tokens.
fn step(
    model: &Model,
    ws: &mut Workspace,
    tokens: &[u32],
    cache: &mut KvCache,
    at: LogitsAt,
) -> Vec<Vec<f32>> {
    let mut seqs = [SeqInput {
        tokens,
        roles: &vec![Role::User; tokens.len()],
        generated: false,
        cache,
        hook: None,
        hook_sites: &[],
        logits: at,
    }];
    let logits = model.forward(&mut seqs, None, ws).unwrap();
    logits.rows().map(<[f32]>::to_vec).collect()
}

/// How a continuation compares: steps that agree, the largest difference of a top-1 log-probability
/// over them and the sum of all, and the difference at the first that does not agree.
struct Agreement {
    steps: usize,
    worst: f32,
    sum: f64,
    at_difference: Option<f32>,
}

fn continuation(model: &Model, ws: &mut Workspace, golden: &Prompt) -> Agreement {
    let mut cache = model.new_cache();
    let mut new = golden.ids.clone();
    let (mut worst, mut sum) = (0.0f32, 0.0);
    for (steps, (&token, &logprob)) in golden.continuation.iter().zip(&golden.logprob).enumerate() {
        let row = step(model, ws, &new, &mut cache, LogitsAt::Last).remove(0);
        let top = (0..row.len())
            .max_by(|&a, &b| row[a].total_cmp(&row[b]))
            .unwrap();
        let off = (log_softmax_at(&row, top) - logprob).abs();
        if top != token as usize {
            return Agreement {
                steps,
                worst,
                sum,
                at_difference: Some(off),
            };
        }
        worst = worst.max(off);
        sum += f64::from(off);
        new = vec![token];
    }
    Agreement {
        steps: golden.continuation.len(),
        worst,
        sum,
        at_difference: None,
    }
}

fn encode(
    golden: &Golden,
    prompt: &str,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
) -> Vec<u32> {
    let Some(template) = template else {
        let mut ids = tokenizer.encode(prompt, Special::AsText).unwrap();
        ids.splice(0..0, golden.perplexity.bos);
        return ids;
    };
    let message = Message {
        role: "user".to_owned(),
        content: prompt.to_owned(),
    };
    template.encode(tokenizer, &[message], true).unwrap().ids
}

/// The ids that the golden perplexity was computed on, checked against their hash.
fn text_ids(golden: &Text, tokenizer: &Tokenizer) -> Vec<u32> {
    let path = from_env("DEMUR_PARITY_TEXT");
    let sum = hex(&Sha256::digest(std::fs::read(&path).unwrap()));
    assert_eq!(
        sum,
        golden.text_sha256,
        "{} is another text",
        path.display()
    );
    let file = flate2::read::MultiGzDecoder::new(std::fs::File::open(&path).unwrap());
    let wanted = golden.windows * (golden.window - usize::from(golden.bos.is_some()));
    let mut ids = Vec::new();
    for line in BufReader::new(file).lines() {
        let row: Row = serde_json::from_str(&line.unwrap()).unwrap();
        ids.extend(tokenizer.encode(&row.text, Special::Parse).unwrap());
        if ids.len() >= wanted {
            break;
        }
    }
    ids.truncate(wanted);
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    assert_eq!(
        hex(&Sha256::digest(&bytes)),
        golden.ids_sha256,
        "the text's ids"
    );
    ids
}

fn perplexity(model: &Model, ws: &mut Workspace, golden: &Text, ids: &[u32]) -> f64 {
    let (mut total, mut count) = (0.0f64, 0usize);
    for window in ids.chunks(golden.window - usize::from(golden.bos.is_some())) {
        let window: Vec<u32> = golden
            .bos
            .into_iter()
            .chain(window.iter().copied())
            .collect();
        let rows = step(model, ws, &window, &mut model.new_cache(), LogitsAt::All);
        for (row, &next) in rows.iter().zip(&window[1..]) {
            total -= f64::from(log_softmax_at(row, next as usize));
            count += 1;
        }
    }
    (total / count as f64).exp()
}

#[track_caller]
fn check(name: &str, precision: Precision) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join(format!("../../testdata/parity/{name}.json"));
    let golden: Golden = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let checkpoint =
        Arc::new(Checkpoint::open(&from_env("DEMUR_MODELS").join(&golden.file)).unwrap());
    assert_eq!(
        checkpoint.sha256(),
        golden.sha256,
        "{} is another file",
        golden.file
    );
    let tokenizer = Tokenizer::from_checkpoint(&checkpoint).unwrap();
    let template = golden
        .chat
        .then(|| ChatTemplate::from_checkpoint(&checkpoint).unwrap());
    for text in &golden.texts {
        text.check(name, &tokenizer);
    }
    let model = Model::load(&checkpoint, precision).unwrap();
    let mut ws = Workspace::default();

    let (mut equal, mut worst, mut differ) = (0, 0.0f32, Vec::new());
    let (mut sum, mut steps) = (0.0, 0);
    for prompt in &golden.prompts {
        let ids = encode(&golden, &prompt.prompt, &tokenizer, template.as_ref());
        assert_eq!(ids, prompt.ids, "ids of {:?}", prompt.prompt);
        let found = continuation(&model, &mut ws, prompt);
        worst = worst.max(found.worst);
        sum += found.sum;
        steps += found.steps;
        match found.at_difference {
            None => equal += 1,
            Some(off) => differ.push((found.steps, off)),
        }
    }
    let ids = text_ids(&golden.perplexity, &tokenizer);
    let found = perplexity(&model, &mut ws, &golden.perplexity, &ids);
    let relative = found / golden.perplexity.perplexity - 1.0;
    let listed: Vec<String> = differ
        .iter()
        .map(|(at, off)| format!("step {at}: {off:.4}"))
        .collect();
    println!(
        "| {name} | {precision:?} | {equal}/{} | {} | {worst:.4} | {:.4} | {found:.4} | {:.4} | {:+.3} % |",
        golden.prompts.len(),
        if listed.is_empty() {
            "-".to_owned()
        } else {
            listed.join(", ")
        },
        sum / steps.max(1) as f64,
        golden.perplexity.perplexity,
        100.0 * relative,
    );
    for (at, off) in differ {
        assert!(
            precision == Precision::Fast || off < LOGPROB,
            "{name}: at step {at} the top-1 log-probability is off by {off}"
        );
    }
    assert!(
        relative.abs() < PERPLEXITY,
        "{name}: perplexity {found}, off by {relative}"
    );
}

macro_rules! parity {
    ($($test:ident: $name:literal, $precision:ident;)*) => {$(
        #[test]
        #[ignore = "needs real checkpoints: DEMUR_MODELS and DEMUR_PARITY_TEXT"]
        fn $test() {
            check($name, Precision::$precision);
        }
    )*};
}

parity! {
    smollm2_f32: "smollm2-135m-instruct", F32;
    smollm2_fast: "smollm2-135m-instruct", Fast;
    gemma3_f32: "gemma-3-270m", F32;
    gemma3_fast: "gemma-3-270m", Fast;
    qwen2_f32: "qwen2.5-coder-0.5b-instruct", F32;
    qwen2_fast: "qwen2.5-coder-0.5b-instruct", Fast;
}
