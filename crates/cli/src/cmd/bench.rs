//! `demur bench`: speed on this machine.

use std::time::Instant;

use anyhow::Result;
use demur_features::harvest::{Sequence, harvest};
use demur_model::decoder::{KvCache, LogitsAt, SeqInput, Workspace};
use demur_model::hooks::{Role, Site};
use serde_json::json;

use crate::catalogue::DEFAULT_MODEL;
use crate::loaded::Loaded;
use crate::progress::say;
use crate::study::config::Precision;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Prefill, decode and harvest of a language model, tokens a second.
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
}

/// Prompt length of prefill, and context of decode.
const CONTEXT: usize = 512;
/// Tokens decoded for a figure.
const DECODED: usize = 32;
/// Sequences that decode together.
const BATCH: usize = 16;

pub fn run(args: Args) -> Result<()> {
    let What::Lm {
        model,
        rounds,
        json: as_json,
    } = args.what;
    let loaded = Loaded::open(&model, Precision::Fast)?;
    let m = &loaded.model;
    let d_vocab = m.spec().d_vocab as u32;
    let tokens: Vec<u32> = (0..CONTEXT as u32)
        .map(|i| (1000 + 7 * i) % d_vocab)
        .collect();
    let roles = vec![Role::User; CONTEXT];
    let mut ws = Workspace::default();
    let pass = |seqs: &mut [(&[u32], &mut KvCache)], ws: &mut Workspace| -> Result<f64> {
        let started = Instant::now();
        let mut inputs: Vec<SeqInput<'_>> = seqs
            .iter_mut()
            .map(|(tokens, cache)| SeqInput {
                tokens,
                roles: &roles[..tokens.len()],
                generated: false,
                cache,
                hook: None,
                hook_sites: &[],
                logits: LogitsAt::Last,
            })
            .collect();
        m.forward(&mut inputs, None, ws)?;
        Ok(started.elapsed().as_secs_f64())
    };
    let (mut prefill, mut decode, mut decode16, mut harvested) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds.max(1) {
        let mut cache = m.new_cache();
        prefill.push(CONTEXT as f64 / pass(&mut [(&tokens, &mut cache)], &mut ws)?);
        let mut seconds = 0.0;
        for i in 0..DECODED {
            seconds += pass(&mut [(&tokens[i..=i], &mut cache)], &mut ws)?;
        }
        decode.push(DECODED as f64 / seconds);
        let mut caches: Vec<KvCache> = (0..BATCH).map(|_| m.new_cache()).collect();
        for cache in &mut caches {
            pass(&mut [(&tokens[..64], cache)], &mut ws)?;
        }
        seconds = 0.0;
        for i in 0..DECODED {
            let mut seqs: Vec<_> = caches.iter_mut().map(|c| (&tokens[i..=i], c)).collect();
            seconds += pass(&mut seqs, &mut ws)?;
        }
        decode16.push((DECODED * BATCH) as f64 / seconds);
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
        ("harvest_tok_s", median(&mut harvested)),
    ];
    let (threads, isa) = (
        demur_kernels::threads(),
        demur_kernels::dispatch::isa().name(),
    );
    if as_json {
        let mut object = json!({ "model": model, "threads": threads, "isa": isa });
        for (key, value) in figures {
            object[key] = json!(value);
        }
        say(object)?;
    } else {
        for (key, value) in figures {
            say(format_args!("{key:<16} {value:>9.1}"))?;
        }
        say(format_args!("threads {threads}, {isa}"))?;
    }
    Ok(())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
