//! `demur bench sae`: the training step of a TopK SAE on rows of noise.
//!
//! The figures are medians over steps on one batch. The peak is what the bf16 product's instruction
//! does on registers alone, measured before each step, so that both see the same clock; where the
//! processor has no bf16 product it is that of the f32 one.

use std::time::{Duration, Instant};

use anyhow::Result;
use demur_kernels::limits::product_gflops;
use demur_sae::SaeConfig;
use demur_sae::train::{
    Architecture, Input, Precision, Rows, ScaledRows, Timing, TrainConfig, Trainer,
};
use serde_json::json;

use super::bench::median;
use crate::progress::say;
use crate::resident;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Width of the activations.
    #[arg(long, default_value_t = 896)]
    d_model: usize,
    /// Number of latents.
    #[arg(long, default_value_t = 7168)]
    d_sae: usize,
    /// Latents active at once.
    #[arg(long, default_value_t = 32)]
    k: usize,
    /// Rows a step.
    #[arg(long, default_value_t = 4096)]
    batch: usize,
    /// Timed steps, after two that warm up.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// f32 instead of bf16 for the product and the gathers.
    #[arg(long)]
    f32: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let (d, m, k, n) = (args.d_model, args.d_sae, args.k, args.batch);
    let data = noise(n * d);
    let rows = Rows {
        data: &data,
        d_model: d,
    };
    let mut rows = ScaledRows::new(rows, &Input::of(rows, f32::INFINITY), 1);
    let mut x = Vec::new();
    rows.batch(0, 0, n, &mut x);
    let cfg = TrainConfig {
        sae: SaeConfig {
            d_model: d,
            d_sae: m,
            k,
            hook_name: String::new(),
            model_name: "noise".to_owned(),
        },
        architecture: Architecture::default(),
        batch: n,
        steps: 1 << 20,
        lr: None,
        warmup_steps: 1000,
        decay: 0.0,
        auxk_alpha: 0.0,
        dead_after: u64::MAX,
        outlier: f32::INFINITY,
        seed: 1,
        precision: match args.f32 {
            true => Precision::F32,
            false => Precision::Bf16,
        },
        clip: None,
    };
    let mut trainer = Trainer::new(cfg, &rows)?;
    drop(rows);
    drop(data);
    for _ in 0..2 {
        trainer.step(&x);
    }
    let (mut seconds, mut peaks, mut timings) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.rounds.max(1) {
        peaks.push(product_gflops(3));
        let clock = Instant::now();
        trainer.step(&x);
        seconds.push(clock.elapsed().as_secs_f64());
        timings.push(trainer.timing());
    }
    let phase = |of: fn(&Timing) -> Duration| {
        median(
            &mut timings
                .iter()
                .map(|t| of(t).as_secs_f64())
                .collect::<Vec<_>>(),
        )
    };
    let product = phase(|t| t.product);
    let operations = 2.0 * n as f64 * d as f64 * m as f64 / 1e9;
    let (step, peak) = (median(&mut seconds), median(&mut peaks));
    let (state, copies) = trainer.bytes();
    let phases = [
        ("pack", phase(|t| t.pack)),
        ("encode", phase(|t| t.encode)),
        ("product", product),
        ("select", phase(|t| t.select)),
        ("order", phase(|t| t.order)),
        ("decode", phase(|t| t.decode)),
        ("update", phase(|t| t.update)),
    ];
    let figures = [
        ("vectors_per_s", n as f64 / step),
        ("step_ms", 1e3 * step),
        ("encoder_gflops", operations / product),
        ("peak_gflops", peak),
        ("peak_fraction", operations / product / peak),
        ("fused_gflops", operations / phase(|t| t.encode)),
        ("state_mb", state as f64 / 1e6),
        ("copies_mb", copies as f64 / 1e6),
        ("batch_mb", size_of_val(&x[..]) as f64 / 1e6),
        (
            "peak_rss_mb",
            resident::peak().map_or(f64::NAN, |b| b as f64 / 1e6),
        ),
    ];
    let isa = demur_kernels::dispatch::isa().name();
    let threads = demur_kernels::threads();
    if args.json {
        let mut object = json!({
            "d_model": d, "d_sae": m, "k": k, "batch": n, "isa": isa, "threads": threads,
            "precision": if args.f32 { "f32" } else { "bf16" },
        });
        for (key, value) in figures {
            object[key] = json!(value);
        }
        for (key, value) in phases {
            object["phases_ms"][key] = json!(1e3 * value);
        }
        return say(object);
    }
    for (key, value) in figures {
        say(format_args!("{key:<16} {value:>9.2}"))?;
    }
    for (key, value) in phases {
        say(format_args!("  {key:<14} {:>9.2} ms", 1e3 * value))?;
    }
    say(format_args!("threads {threads}, {isa}"))
}

/// Numbers that look like a Gaussian's: sums of four uniform ones.
fn noise(n: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| (0..4).map(|_| uniform()).sum()).collect()
}
