//! `demur bench`: speed on this machine, and how far it is from what the machine can do.
//!
//! The floor of decoding is the time in which packed weights and cache are read from memory, that of a
//! prompt the time that its multiply-adds take on registers alone; both limits are measured in the same
//! run ([`demur_kernels::limits`]).
//!
//! The steered figure is the batch of sixteen with a plan of its own for each sequence: one clamp and
//! one gate on two latents of an SAE with random rows, halfway up the model. The gate is open from
//! the first prompt token on and reads every generated one; how a latent is read is what counts, not
//! what it means. Plans read their latents alone (`membership = "pre_act"`); reading the exact top k
//! costs a whole encode for each token besides.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use demur_features::harvest::{Products, Sequence, harvest};
use demur_kernels::dispatch::{Isa, isa};
use demur_kernels::limits;
use demur_model::decoder::{KvCache, LogitsAt, Model, SeqInput, Workspace};
use demur_model::hooks::{Intervention, InterventionState, Role, Site};
use demur_sae::{Sae, SaeConfig};
use demur_steering::{CompiledPlan, SaeEntry, SaeSet, SteeringPlan, compile};
use serde_json::json;

use super::bench_text;
use crate::catalogue::DEFAULT_MODEL;
use crate::cmd::chat::steering;
use crate::loaded::Loaded;
use crate::progress::{Progress, say};
use crate::resident;
use crate::study::config::{CacheFormat, Precision};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Prefill, decode (plain and steered) and harvest of a language model, tokens a second.
    Lm {
        /// A catalogue name or a path.
        #[arg(long, short, default_value = DEFAULT_MODEL)]
        model: String,
        /// Rounds; the median of each figure is shown.
        #[arg(long, default_value_t = 3)]
        rounds: usize,
        /// Tokens of the prompt of prefill and of decoding one sequence.
        #[arg(long, default_value_t = CONTEXT, value_name = "TOKENS")]
        context: usize,
        /// What keys and values are kept as.
        #[arg(long, value_enum, default_value_t)]
        kv_cache: CacheFormat,
        /// Decode this many tokens besides, and compare the first tenth with the last.
        #[arg(long, value_name = "TOKENS")]
        soak: Option<usize>,
        /// Compare perplexity and next-token distributions on these texts with those of f32, besides.
        #[arg(long, value_name = "FILE")]
        text: Vec<PathBuf>,
        /// Besides, with this steering plan: prefill, and the batch of sixteen. `default` is the shipped one.
        #[arg(long, value_name = "FILE")]
        plan: Option<PathBuf>,
        /// Folder of the SAE that the plan names.
        #[arg(long, value_name = "DIR", requires = "plan")]
        sae: Option<PathBuf>,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// The training step of a TopK SAE: vectors a second, and the product's share of the peak.
    Sae(super::bench_sae::Args),
}

/// Prompt length of prefill, and context of decode, unless asked for otherwise.
const CONTEXT: usize = 512;
/// Tokens decoded for a figure.
const DECODED: usize = 32;
/// Sequences that decode together, and the prompt of each.
const BATCH: usize = 16;
const BATCH_PROMPT: usize = 64;
/// Tokens of a template after the user's message.
const TEMPLATE: usize = 5;
/// Sequences of a harvest, and the length of each.
const HARVESTED: usize = 4;
const HARVEST_PROMPT: usize = 256;

/// A sequence's intervention, if it has one.
type Steered<'a> = Option<(Box<dyn InterventionState>, &'a [Site])>;

pub fn run(args: Args) -> Result<()> {
    match args.what {
        What::Lm {
            model,
            rounds,
            context,
            kv_cache,
            soak,
            text,
            plan,
            sae,
            json,
        } => {
            let loaded = Loaded::open(&model, Precision::Fast)?.keeping(kv_cache);
            let plan = steering(&loaded, plan.as_deref(), sae.as_deref())?;
            let besides = Besides {
                soak,
                texts: &text,
                plan: plan.as_deref(),
            };
            lm(&loaded, &model, rounds, context, &besides, json)
        }
        What::Sae(args) => super::bench_sae::run(&args),
    }
}

/// What is measured besides.
struct Besides<'a> {
    soak: Option<usize>,
    texts: &'a [PathBuf],
    plan: Option<&'a CompiledPlan>,
}

fn lm(
    loaded: &Loaded,
    model: &str,
    rounds: usize,
    context: usize,
    besides: &Besides<'_>,
    as_json: bool,
) -> Result<()> {
    ensure!(
        context >= DECODED,
        "--context {context}: give at least {DECODED} tokens"
    );
    let m = &loaded.model;
    let d_vocab = m.spec().d_vocab as u32;
    // A short model gets shorter prompts.
    let context = context.min(m.spec().context.saturating_sub(DECODED));
    let (batch_prompt, harvest_prompt) = (BATCH_PROMPT.min(context), HARVEST_PROMPT.min(context));
    let tokens = tokens_of(context, d_vocab);
    // As of one message: the user's tokens, then what a template has before the reply.
    let mut roles = vec![Role::User; context];
    roles[context.saturating_sub(TEMPLATE)..].fill(Role::Template);
    let mut ws = Workspace::default();
    // Decoding is a pass of one token a sequence.
    let pass = |seqs: &mut [(&[u32], &mut KvCache, Steered<'_>)], ws: &mut Workspace| {
        let started = Instant::now();
        let mut inputs: Vec<SeqInput<'_>> = seqs
            .iter_mut()
            .map(|(tokens, cache, steered)| {
                let (hook, hook_sites) = match steered {
                    Some((state, sites)) => (Some(state.as_mut()), *sites),
                    None => (None, [].as_slice()),
                };
                let generated = tokens.len() == 1;
                SeqInput {
                    tokens,
                    roles: if generated {
                        &[Role::Assistant]
                    } else {
                        &roles[context - tokens.len()..]
                    },
                    generated,
                    cache,
                    hook,
                    hook_sites,
                    logits: LogitsAt::Last,
                }
            })
            .collect();
        m.forward(&mut inputs, None, ws)?;
        anyhow::Ok(started.elapsed().as_secs_f64())
    };
    // Tokens a second of a batch that decodes, with the plans or without.
    let batch = |plans: &[&CompiledPlan], ws: &mut Workspace| -> Result<f64> {
        let mut caches: Vec<KvCache> = (0..BATCH).map(|_| m.new_cache()).collect();
        let mut states: Vec<Steered<'_>> = (0..BATCH)
            .map(|i| plans.get(i).map(|p| (p.start(), p.sites())))
            .collect();
        for (cache, state) in caches.iter_mut().zip(&mut states) {
            let mut seq = [(&tokens[..batch_prompt], cache, state.take())];
            pass(&mut seq, ws)?;
            *state = seq[0].2.take();
        }
        let mut seconds = 0.0;
        for i in 0..DECODED {
            let sequences = caches.iter_mut().zip(&mut states);
            let mut seqs: Vec<_> = sequences
                .map(|(cache, state)| (&tokens[i..=i], cache, state.take()))
                .collect();
            seconds += pass(&mut seqs, ws)?;
            for (state, seq) in states.iter_mut().zip(seqs) {
                *state = seq.2;
            }
        }
        Ok((DECODED * BATCH) as f64 / seconds)
    };
    let plans = plans(m.spec().n_layers, m.spec().d_model)?;
    let plans: Vec<&CompiledPlan> = plans.iter().collect();
    let (mut prefill, mut decode, mut decode16, mut steered16, mut harvested) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut plan_prefill, mut plan16) = (Vec::new(), Vec::new());
    for _ in 0..rounds.max(1) {
        let mut cache = m.new_cache();
        prefill.push(context as f64 / pass(&mut [(&tokens, &mut cache, None)], &mut ws)?);
        let mut seconds = 0.0;
        for i in 0..DECODED {
            seconds += pass(&mut [(&tokens[i..=i], &mut cache, None)], &mut ws)?;
        }
        decode.push(DECODED as f64 / seconds);
        decode16.push(batch(&[], &mut ws)?);
        steered16.push(batch(&plans, &mut ws)?);
        if let Some(plan) = besides.plan {
            let mut cache = m.new_cache();
            let steered = Some((plan.start(), plan.sites()));
            let seconds = pass(&mut [(&tokens, &mut cache, steered)], &mut ws)?;
            plan_prefill.push(context as f64 / seconds);
            plan16.push(batch(&[plan; BATCH], &mut ws)?);
        }
        let sequences: Vec<Sequence> = (0..HARVESTED)
            .map(|i| {
                // Each with a beginning of its own: one that all share is run once.
                let mut tokens = tokens[..harvest_prompt].to_vec();
                tokens.rotate_left(i % harvest_prompt);
                Sequence {
                    source: i.to_string(),
                    tokens,
                    roles: roles[..harvest_prompt].to_vec(),
                }
            })
            .collect();
        let started = Instant::now();
        let site = Site::post(m.spec().n_layers - 1);
        let total = HARVESTED * harvest_prompt;
        harvest(m, site, &sequences, total, Products::Bf16, |_, _| Ok(()))?;
        harvested.push(total as f64 / started.elapsed().as_secs_f64());
    }
    // The limits come last: they take memory of their own.
    let peak = resident::peak();
    let read = limits::read_gb_s(rounds.max(1));
    let [prefill, decode, decode16, steered16, harvested] =
        [prefill, decode, decode16, steered16, harvested].map(|mut f| median(&mut f));
    let floors = Floors::of(m, context);
    let isa = isa();
    let mut figures = vec![
        ("prefill_tok_s", prefill),
        ("decode_tok_s", decode),
        ("decode16_tok_s", decode16),
        ("steered16_tok_s", steered16),
        ("harvest_tok_s", harvested),
        ("read_gb_s", read),
        ("decode_share_of_read", floors.bytes * decode / (1e9 * read)),
    ];
    if let Some(gops) = limits::int8_gops(rounds.max(1)) {
        let share = |operations: f64, rate: f64| operations * rate / (1e9 * gops);
        figures.extend([
            ("int8_gops", gops),
            ("prefill_share_of_int8", share(floors.prompt, prefill)),
            ("decode16_share_of_int8", share(floors.token, decode16)),
        ]);
        if isa < Isa::Amx {
            figures.push(("harvest_share_of_int8", share(floors.blocks, harvested)));
        }
    }
    if isa >= Isa::Amx {
        let gflops = limits::product_gflops(rounds.max(1));
        let harvested = floors.blocks * harvested / (1e9 * gflops);
        figures.extend([
            ("bf16_gflops", gflops),
            ("harvest_share_of_bf16", harvested),
        ]);
    }
    if besides.plan.is_some() {
        figures.extend([
            ("plan_prefill_tok_s", median(&mut plan_prefill)),
            ("plan16_tok_s", median(&mut plan16)),
        ]);
    }
    if let Some(n) = besides.soak {
        let mut cache = m.new_cache();
        pass(&mut [(&tokens, &mut cache, None)], &mut ws)?;
        let bar = Progress::new("soak", "tokens", n as u64);
        let mut seconds = Vec::with_capacity(n);
        while seconds.len() < n {
            // The context stays what it is: what is compared is the same work.
            let mut branch = cache.clone();
            for i in 0..DECODED.min(n - seconds.len()) {
                let next = &[i as u32 + 1][..];
                seconds.push(pass(&mut [(next, &mut branch, None)], &mut ws)?);
                bar.advance(1);
            }
        }
        bar.finish();
        let tenth = (n / 10).max(1);
        let rate = |part: &[f64]| part.len() as f64 / part.iter().sum::<f64>();
        figures.push(("soak_first_tok_s", rate(&seconds[..tenth.min(n)])));
        figures.push(("soak_last_tok_s", rate(&seconds[n.saturating_sub(tenth)..])));
    }
    if !besides.texts.is_empty() {
        figures.extend(bench_text::figures(model, loaded, besides.texts)?);
    }
    let (threads, isa) = (demur_kernels::threads(), isa.name());
    if as_json {
        let mut object = json!({
            "model": model, "threads": threads, "isa": isa,
            "peak_resident_bytes": peak,
        });
        for (key, value) in figures {
            object[key] = json!(value);
        }
        say(object)?;
    } else {
        for (key, value) in figures {
            let digits = if value < 10.0 { 3 } else { 1 };
            say(format_args!("{key:<24} {value:>9.digits$}"))?;
        }
        if let Some(peak) = peak {
            say(format_args!(
                "peak_resident            {:>9.1} MB",
                peak as f64 / 1e6
            ))?;
        }
        say(format_args!("threads {threads}, {isa}"))?;
    }
    Ok(())
}

fn tokens_of(n: usize, d_vocab: u32) -> Vec<u32> {
    let ids = 0..n as u32;
    ids.map(|i| (1000 + 7 * i) % d_vocab).collect()
}

/// What has to be done at least, a token.
struct Floors {
    /// Bytes that decoding reads: packed weights and the cache of the context.
    bytes: f64,
    /// Operations (two a multiply-add) of the blocks' products.
    blocks: f64,
    /// And of the head.
    token: f64,
    /// And of the head for one token of a prompt as long as the context.
    prompt: f64,
}

impl Floors {
    fn of(m: &Model, context: usize) -> Self {
        let (s, memory) = (m.spec(), m.memory());
        let (q, kv) = (s.n_heads * s.d_head, s.n_kv_heads * s.d_head);
        let block = s.d_model * (2 * q + 2 * kv + 3 * s.d_mlp);
        let blocks = 2.0 * (s.n_layers * block) as f64;
        let head = 2.0 * (s.d_model * s.d_vocab) as f64;
        Self {
            bytes: (memory.weights + context * memory.cache_per_token) as f64,
            blocks,
            token: blocks + head,
            prompt: blocks + head / context.max(1) as f64,
        }
    }
}

/// [`BATCH`] plans, no two alike.
fn plans(n_layers: usize, d_model: usize) -> Result<Vec<CompiledPlan>> {
    let d_sae = 2 * BATCH;
    let mut state = 1u32;
    let mut noise = |n: usize| -> Vec<f32> {
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) / (d_model as f32).sqrt()
        };
        (0..n).map(next).collect()
    };
    let site = Site::post(n_layers / 2).to_string();
    let cfg = SaeConfig {
        d_model,
        d_sae,
        k: BATCH,
        hook_name: site.clone(),
        model_name: "random".to_owned(),
    };
    let (w_enc, w_dec) = (noise(d_sae * d_model), noise(d_sae * d_model));
    let zeros = |n| vec![0.0; n];
    let sae = Sae::new(cfg, w_enc, zeros(d_sae), w_dec, zeros(d_model))?;
    let entry = SaeEntry {
        sae: Arc::new(sae),
        sha256: String::new(),
        max_activation: None,
        resid_norm: None,
    };
    let saes = SaeSet::from([("random".to_owned(), entry)]);
    let plan = |i: usize| {
        let plan: SteeringPlan = serde_json::from_value(json!({
            "version": demur_steering::PLAN_VERSION,
            "name": format!("clamp-{i}"),
            "saes": { "random": "" },
            "interventions": [{
                "site": site,
                "sae": "random",
                "membership": "pre_act",
                "edits": [{ "latent": 2 * i, "op": "set", "value": 1.0 }],
                "when": "open",
            }],
            "gates": {
                "open": {
                    "site": site,
                    "sae": "random",
                    "membership": "pre_act",
                    "weights": [{ "latent": 2 * i + 1, "weight": 1.0 }],
                    "threshold": -1.0,
                    "during_generation": true,
                },
            },
        }))?;
        Ok(compile(&plan, &saes, n_layers, d_model)?)
    };
    (0..BATCH).map(plan).collect()
}

pub(super) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
