//! `demur sae fit`: an SAE on harvested activations.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use demur_sae::metrics::QualityMeter;
use demur_sae::saelens::{self, WeightType};
use demur_sae::train::{Checkpoints, Input, Precision, Rows, Schedule, TrainConfig};
use demur_sae::{SaeConfig, activations};
use serde_json::json;

use crate::architecture::{ArchitectureConfig, auxk_alpha};
use crate::exit;
use crate::progress::say;
use crate::training::{Job, Parts, SiteRows, Training};

/// Rows that are coded together when quality is measured.
const HELD_OUT_ROWS: usize = 1024;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// A safetensors file with `activations [n, d_model]`, as `demur harvest` writes it.
    rows: PathBuf,
    /// Another, to measure quality on.
    #[arg(long, value_name = "FILE")]
    held_out: Option<PathBuf>,
    /// Folder for `sae/`, `metrics.jsonl`, a TensorBoard event file, and the states until training has ended.
    #[arg(long, short, default_value = "fit")]
    out: PathBuf,
    /// Latents for each dimension of the activations.
    #[arg(long, default_value_t = 8)]
    expansion: usize,
    /// Number of latents, instead of --expansion.
    #[arg(long)]
    d_sae: Option<usize>,
    #[command(flatten)]
    architecture: ArchitectureConfig,
    /// Latents active at once: of topk exactly, of batchtopk and matryoshka on average; what jumprelu aims
    /// at.
    #[arg(long, default_value_t = 32)]
    k: usize,
    /// Rows a step.
    #[arg(long, default_value_t = 4096)]
    batch: usize,
    /// Passes over the rows.
    #[arg(long, default_value_t = 1.0)]
    epochs: f64,
    /// Peak learning rate; 2e-4 / sqrt(d_sae / 2^14), if not given.
    #[arg(long)]
    lr: Option<f64>,
    /// Steps over which it rises.
    #[arg(long, default_value_t = 1000)]
    warmup: usize,
    /// Fraction of the steps, at the end, over which it falls to 0.
    #[arg(long, default_value_t = 0.25)]
    decay: f64,
    /// Weight of the loss that revives dead latents, 0 to leave it out; 1/32 for topk, batchtopk and
    /// matryoshka, if not given. The others have none.
    #[arg(long)]
    auxk_alpha: Option<f64>,
    /// Rows without firing after which a latent is dead; those of one pass, if not given.
    #[arg(long)]
    dead_after: Option<u64>,
    /// Rows with a norm above this many medians are left out.
    #[arg(long, default_value_t = 10.0)]
    outlier: f32,
    /// The most that the norm of all gradients may be.
    #[arg(long)]
    clip: Option<f64>,
    /// f32 instead of bf16 for the product and the gathers.
    #[arg(long)]
    f32: bool,
    /// Seeds initialisation and the order of rows.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Steps between states that a stopped run goes on from.
    #[arg(long, default_value_t = 200)]
    checkpoint_every: usize,
    /// States that are kept: if the newest is damaged, the one before is used. Each takes 24 bytes times
    /// d_model times d_sae.
    #[arg(long, default_value_t = 3)]
    checkpoints: usize,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let file = activations::load(&args.rows)?;
    let d = file.d_model;
    let rows = Rows {
        data: &file.data,
        d_model: d,
    };
    let input = Input::of(rows, args.outlier);
    let batch = args.batch.min(input.kept.max(1));
    let steps = (input.kept / batch) as f64 * args.epochs;
    let schedule = Schedule::of(vec![input.kept / batch], steps as usize);
    let d_sae = args.d_sae.unwrap_or(d * args.expansion);
    let architecture = args.architecture.resolve(args.k, d_sae)?;
    let cfg = TrainConfig {
        sae: SaeConfig {
            d_model: d,
            d_sae,
            k: args.k,
            hook_name: file.site.unwrap_or_default(),
            model_name: file.model.unwrap_or_default(),
        },
        batch,
        steps: schedule.steps(),
        lr: args.lr,
        warmup_steps: args.warmup,
        decay: args.decay,
        auxk_alpha: auxk_alpha(args.auxk_alpha, &architecture),
        architecture,
        dead_after: args.dead_after.unwrap_or(input.kept as u64),
        outlier: args.outlier,
        seed: args.seed,
        precision: match args.f32 {
            true => Precision::F32,
            false => Precision::Bf16,
        },
        clip: args.clip,
    };
    std::fs::create_dir_all(&args.out).with_context(|| format!("make {}", args.out.display()))?;
    let states = Checkpoints::new(&args.out, args.checkpoints);
    let job = Job {
        cfg,
        site: 0,
        folder: args.out.clone(),
    };
    let site = SiteRows {
        input,
        schedule,
        batch,
    };
    exit::say_how_to_go_on();
    let mut data = file.data;
    let mut parts = Parts::new(1, d, Box::new(|_, _| Ok(vec![std::mem::take(&mut data)])));
    let ended = Training {
        jobs: std::slice::from_ref(&job),
        sites: std::slice::from_ref(&site),
        seed: args.seed,
        states: &states,
        checkpoint_every: args.checkpoint_every,
    }
    .run(&mut parts)?;
    let (cfg, last) = (&job.cfg, &ended.last[0]);
    let training = json!({
        "rows": input.kept, "steps": cfg.steps, "batch": batch, "epochs": args.epochs,
        "seed": args.seed, "architecture": cfg.architecture, "final_fvu": last["fvu"], "demur": env!("CARGO_PKG_VERSION"),
    });
    let sae = ended.trainers[0].finish()?;
    let folder = args.out.join("sae");
    saelens::save(&sae, &folder, WeightType::F32, &training)?;
    // Only now: a run that is killed before this line goes on from it.
    states.clear()?;
    let held_out = match &args.held_out {
        Some(path) => {
            let held = activations::load(path)?;
            if held.d_model != d {
                bail!("{}: rows of {}, not {d}", path.display(), held.d_model);
            }
            let mut meter = QualityMeter::new(d, cfg.sae.d_sae);
            for rows in held.data.chunks(HELD_OUT_ROWS * d) {
                meter.add_rows(&sae, rows);
            }
            Some(meter.quality())
        }
        None => None,
    };
    let rate = (ended.steps * batch) as f64 / ended.seconds;
    if args.json {
        return say(json!({
            "folder": folder, "steps": cfg.steps, "batch": batch, "d_sae": cfg.sae.d_sae,
            "last": last, "held_out": held_out, "vectors_per_s": rate,
        }));
    }
    say(folder.display())?;
    let fvu = last["fvu"].as_f64().unwrap_or(f64::NAN);
    say(format_args!(
        "  {} steps, {rate:.0} rows/s, FVU of the last batch {fvu:.4}",
        cfg.steps
    ))?;
    match held_out {
        Some(q) => say(format_args!("  held out: FVU {:.4}, L0 {:.1}", q.fvu, q.l0)),
        None => Ok(()),
    }
}
