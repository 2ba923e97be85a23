//! `demur bench`: speed on this machine.
//!
//! The steered figure is the batch of sixteen with a plan of its own for each sequence: one clamp and
//! one gate on two latents of an SAE with random rows, halfway up the model. The gate is open from
//! the first prompt token on and reads every generated one; how a latent is read is what counts, not
//! what it means. Plans read their latents alone (`membership = "pre_act"`); reading the exact top k
//! costs a whole encode for each token besides.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use demur_features::harvest::{Sequence, harvest};
use demur_model::decoder::{KvCache, LogitsAt, SeqInput, Workspace};
use demur_model::hooks::{Intervention, InterventionState, Role, Site};
use demur_sae::{Sae, SaeConfig};
use demur_steering::{CompiledPlan, SaeEntry, SaeSet, SteeringPlan, compile};
use serde_json::json;

use crate::catalogue::DEFAULT_MODEL;
use crate::loaded::Loaded;
use crate::progress::say;
use crate::resident;
use crate::study::config::Precision;

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
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// The training step of a TopK SAE: vectors a second, and the product's share of the peak.
    Sae(super::bench_sae::Args),
}

/// Prompt length of prefill, and context of decode.
const CONTEXT: usize = 512;
/// Tokens decoded for a figure.
const DECODED: usize = 32;
/// Sequences that decode together, and the prompt of each.
const BATCH: usize = 16;
const BATCH_PROMPT: usize = 64;

/// A sequence's intervention, if it has one.
type Steered<'a> = Option<(Box<dyn InterventionState>, &'a [Site])>;

pub fn run(args: Args) -> Result<()> {
    match args.what {
        What::Lm {
            model,
            rounds,
            json,
        } => lm(&model, rounds, json),
        What::Sae(args) => super::bench_sae::run(&args),
    }
}

fn lm(model: &str, rounds: usize, as_json: bool) -> Result<()> {
    let loaded = Loaded::open(model, Precision::Fast)?;
    let m = &loaded.model;
    let d_vocab = m.spec().d_vocab as u32;
    let tokens: Vec<u32> = (0..CONTEXT as u32)
        .map(|i| (1000 + 7 * i) % d_vocab)
        .collect();
    let roles = vec![Role::User; CONTEXT];
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
                SeqInput {
                    tokens,
                    roles: &roles[..tokens.len()],
                    generated: tokens.len() == 1,
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
    let batch = |plans: &[CompiledPlan], ws: &mut Workspace| -> Result<f64> {
        let mut caches: Vec<KvCache> = (0..BATCH).map(|_| m.new_cache()).collect();
        let mut states: Vec<Steered<'_>> = (0..BATCH)
            .map(|i| plans.get(i).map(|p| (p.start(), p.sites())))
            .collect();
        for (cache, state) in caches.iter_mut().zip(&mut states) {
            let mut seq = [(&tokens[..BATCH_PROMPT], cache, state.take())];
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
    let (mut prefill, mut decode, mut decode16, mut steered16, mut harvested) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds.max(1) {
        let mut cache = m.new_cache();
        prefill.push(CONTEXT as f64 / pass(&mut [(&tokens, &mut cache, None)], &mut ws)?);
        let mut seconds = 0.0;
        for i in 0..DECODED {
            seconds += pass(&mut [(&tokens[i..=i], &mut cache, None)], &mut ws)?;
        }
        decode.push(DECODED as f64 / seconds);
        decode16.push(batch(&[], &mut ws)?);
        steered16.push(batch(&plans, &mut ws)?);
        let sequences: Vec<Sequence> = (0..4)
            .map(|i| Sequence {
                source: i.to_string(),
                tokens: tokens[..256].to_vec(),
                roles: roles[..256].to_vec(),
            })
            .collect();
        let started = Instant::now();
        let site = Site::post(m.spec().n_layers - 1);
        harvest(m, site, &sequences, 1024, |_, _| Ok(()))?;
        harvested.push(1024.0 / started.elapsed().as_secs_f64());
    }
    let figures = [
        ("prefill_tok_s", median(&mut prefill)),
        ("decode_tok_s", median(&mut decode)),
        ("decode16_tok_s", median(&mut decode16)),
        ("steered16_tok_s", median(&mut steered16)),
        ("harvest_tok_s", median(&mut harvested)),
    ];
    let (threads, isa) = (
        demur_kernels::threads(),
        demur_kernels::dispatch::isa().name(),
    );
    if as_json {
        let mut object = json!({
            "model": model, "threads": threads, "isa": isa,
            "peak_resident_bytes": resident::peak(),
        });
        for (key, value) in figures {
            object[key] = json!(value);
        }
        say(object)?;
    } else {
        for (key, value) in figures {
            say(format_args!("{key:<16} {value:>9.1}"))?;
        }
        if let Some(peak) = resident::peak() {
            say(format_args!(
                "peak resident    {:>9.1} MB",
                peak as f64 / 1e6
            ))?;
        }
        say(format_args!("threads {threads}, {isa}"))?;
    }
    Ok(())
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
                "gate": {
                    "weights": [{ "latent": 2 * i + 1, "weight": 1.0 }],
                    "threshold": -1.0,
                    "during_generation": true,
                },
            }],
        }))?;
        Ok(compile(&plan, &saes, n_layers, d_model)?)
    };
    (0..BATCH).map(plan).collect()
}

pub(super) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
