//! The training step of a TopK SAE: demur beside EleutherAI's sparsify on PyTorch.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, bail};
use serde_json::{Map, Value, json};

use crate::compare::{cpu, last_line, median};

/// Engines, demur's first.
const ENGINES: [&str; 3] = ["demur", "sparsify_f32", "sparsify_bf16"];

/// The key of the encoder's product alone, in bf16: demur's, which selects as it goes, over PyTorch's.
const PRODUCT: &str = "torch_product_bf16";

/// A comparison of training steps, resolved.
pub struct Sae {
    /// `d_model x d_sae : batch`.
    pub shapes: Vec<Shape>,
    /// Latents active at once.
    pub k: usize,
    /// The `demur` binary.
    pub demur: PathBuf,
    /// A Python that has torch and sparsify.
    pub python: PathBuf,
    /// Rounds.
    pub rounds: usize,
    /// Threads of each engine.
    pub threads: usize,
    /// JSON instead of a table.
    pub json: bool,
}

/// A size of the step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    d_model: usize,
    d_sae: usize,
    batch: usize,
}

impl std::str::FromStr for Shape {
    type Err = anyhow::Error;

    /// Reads `896x7168:4096`.
    fn from_str(text: &str) -> anyhow::Result<Self> {
        let parse = || {
            let (sizes, batch) = text.split_once(':')?;
            let (d_model, d_sae) = sizes.split_once('x')?;
            Some(Self {
                d_model: d_model.parse().ok()?,
                d_sae: d_sae.parse().ok()?,
                batch: batch.parse().ok()?,
            })
        };
        parse().with_context(|| {
            format!("{text}: a shape is d_model x d_sae : batch, as in 896x7168:4096")
        })
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.d_model, self.d_sae)
    }
}

/// Runs the rounds and prints medians and ratios, demur's vectors a second over the peer's.
pub fn sae(args: &Sae) -> anyhow::Result<()> {
    if args.shapes.is_empty() {
        bail!("there is no shape to run");
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/sparsify_peer.py");
    let mut runs: Map<String, Value> = Map::new();
    let mut medians: Map<String, Value> = Map::new();
    let mut ratio: Map<String, Value> = Map::new();
    for shape in &args.shapes {
        let mut of_shape: [Vec<Value>; 3] = Default::default();
        for round in 0..args.rounds.max(1) {
            for turn in 0..ENGINES.len() {
                let engine = (turn + round) % ENGINES.len();
                of_shape[engine].push(run(args, *shape, engine, script)?);
            }
            eprintln!("{shape}: round {} of {}", round + 1, args.rounds.max(1));
        }
        let mut rates = [0.0; 3];
        for (rate, runs) in rates.iter_mut().zip(&of_shape) {
            *rate = median_of(runs, "vectors_per_s")?;
        }
        let product =
            median_of(&of_shape[0], "encoder_gflops")? / median_of(&of_shape[2], "product_gflops")?;
        let name = shape.to_string();
        ratio.entry(PRODUCT).or_insert_with(|| json!({}))[&name] = json!(product);
        for (i, engine) in ENGINES.iter().enumerate() {
            medians.entry(*engine).or_insert_with(|| json!({}))[&name] = json!(rates[i]);
            runs.entry(*engine).or_insert_with(|| json!({}))[&name] = json!(of_shape[i]);
            if i > 0 {
                ratio.entry(*engine).or_insert_with(|| json!({}))[&name] =
                    json!(rates[0] / rates[i]);
            }
        }
    }
    if args.json {
        let record = json!({
            "ratio": ratio,
            "median_vectors_per_s": medians,
            "rounds": runs,
            "k": args.k,
            "threads": args.threads,
            "cpu": cpu(),
        });
        println!("{record}");
        return Ok(());
    }
    println!(
        "{:<16} {:>10} {:>14} {:>14}",
        "vectors/s", ENGINES[0], ENGINES[1], ENGINES[2]
    );
    for shape in &args.shapes {
        let rate = |engine: &str| {
            medians[engine][shape.to_string()]
                .as_f64()
                .unwrap_or(f64::NAN)
        };
        let of = |engine| {
            format!(
                "{:.0} ({:.2} x)",
                rate(engine),
                rate("demur") / rate(engine)
            )
        };
        println!(
            "{shape:<16} {:>10.0} {:>14} {:>14}",
            rate("demur"),
            of(ENGINES[1]),
            of(ENGINES[2])
        );
        let product = ratio[PRODUCT][shape.to_string()].as_f64();
        let product = product.unwrap_or(f64::NAN);
        println!("{:<16} demur's product, in bf16, is {product:.2} x PyTorch's alone", "");
    }
    Ok(())
}

/// The median of a figure that each run has.
fn median_of(runs: &[Value], key: &str) -> anyhow::Result<f64> {
    let each: Option<Vec<f64>> = runs.iter().map(|r| r[key].as_f64()).collect();
    Ok(median(
        &mut each.with_context(|| format!("a run has no {key}"))?,
    ))
}

/// One measurement in a process of its own.
fn run(args: &Sae, shape: Shape, engine: usize, script: &str) -> anyhow::Result<Value> {
    let sizes = [
        ("--d-model", shape.d_model),
        ("--d-sae", shape.d_sae),
        ("--k", args.k),
        ("--batch", shape.batch),
    ];
    let threads = args.threads.to_string();
    let program = if engine == 0 {
        &args.demur
    } else {
        &args.python
    };
    let mut command = Command::new(program);
    if engine == 0 {
        command.args(["bench", "sae", "--json", "--threads", &threads]);
    } else {
        let precision = if engine == 1 { "f32" } else { "bf16" };
        command.args([
            script,
            "bench",
            "--threads",
            &threads,
            "--precision",
            precision,
        ]);
    }
    for (flag, value) in sizes {
        command.arg(flag).arg(value.to_string());
    }
    last_line(command, program)
}

#[cfg(test)]
mod tests {
    use super::Shape;

    #[test]
    fn shapes_are_read() {
        let shape: Shape = "896x7168:4096".parse().expect("a shape");
        assert_eq!((shape.d_model, shape.d_sae, shape.batch), (896, 7168, 4096));
        assert_eq!(shape.to_string(), "896x7168");
        for bad in ["896x7168", "896:1", "ax7168:1", ""] {
            assert!(bad.parse::<Shape>().is_err(), "{bad}");
        }
    }
}
