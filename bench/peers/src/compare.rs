//! Alternating rounds, medians and ratios.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use serde_json::{Map, Value, json};

/// The figures, of which not every peer has each.
const FIGURES: [&str; 4] = [
    "prefill_tok_s",
    "decode_tok_s",
    "decode16_tok_s",
    "harvest_tok_s",
];

/// Another engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Peer {
    /// llama.cpp, in this program.
    #[value(name = "llama.cpp")]
    LlamaCpp,
    /// candle, in this program.
    #[value(name = "candle")]
    Candle,
    /// transformers on PyTorch, weights and activations in bf16.
    #[value(name = "transformers_bf16")]
    TransformersBf16,
    /// The same in f32.
    #[value(name = "transformers_f32")]
    TransformersF32,
}

impl Peer {
    fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |v| v.get_name().to_owned())
    }

    /// One measurement, in a process of its own.
    fn measure(self, args: &Lm) -> anyhow::Result<Value> {
        let threads = args.threads.to_string();
        let precision = match self {
            Self::TransformersBf16 => "bf16",
            Self::TransformersF32 => "f32",
            Self::LlamaCpp | Self::Candle => {
                let this = std::env::current_exe()?;
                let mut command = Command::new(&this);
                if self == Self::LlamaCpp {
                    command.args(["llama-cpp", "--threads", &threads]);
                } else {
                    command.arg("candle").env("RAYON_NUM_THREADS", &threads);
                }
                command.arg("--model").arg(&args.model);
                return last_line(command, &this);
            }
        };
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/transformers_peer.py");
        let mut command = Command::new(&args.python);
        command.args([script, "--precision", precision, "--threads", &threads]);
        command.arg("--model").arg(&args.model);
        last_line(command, &args.python)
    }
}

/// A comparison of language models, resolved.
pub struct Lm {
    /// The other engines.
    pub peers: Vec<Peer>,
    /// A Python for those that need it.
    pub python: PathBuf,
    /// The GGUF file.
    pub model: PathBuf,
    /// The `demur` binary.
    pub demur: PathBuf,
    /// Rounds.
    pub rounds: usize,
    /// Threads of each engine.
    pub threads: usize,
    /// JSON instead of a table.
    pub json: bool,
}

/// Runs the rounds and prints medians and ratios, demur's figure over the peer's.
pub fn lm(args: &Lm) -> anyhow::Result<()> {
    let engines: Vec<Option<Peer>> = std::iter::once(None)
        .chain(args.peers.iter().copied().map(Some))
        .collect();
    let name = |engine: &Option<Peer>| engine.map_or_else(|| "demur".to_owned(), Peer::name);
    let mut runs: Vec<Vec<Value>> = vec![Vec::new(); engines.len()];
    for round in 0..args.rounds.max(1) {
        for turn in 0..engines.len() {
            let at = (turn + round) % engines.len();
            let run = match engines[at] {
                None => demur_lm(args),
                Some(peer) => peer.measure(args),
            };
            runs[at].push(run.with_context(|| name(&engines[at]))?);
        }
        eprintln!("round {} of {}", round + 1, args.rounds.max(1));
    }
    let medians: Vec<Map<String, Value>> = runs.iter().map(|r| medians(r)).collect();
    let (ours, theirs) = (&medians[0], &medians[1..]);
    let over = |theirs: &Map<String, Value>| -> Map<String, Value> {
        let both = theirs.iter().filter_map(|(figure, b)| {
            let ratio = ours.get(figure)?.as_f64()? / b.as_f64()?;
            Some((figure.clone(), json!(ratio)))
        });
        both.collect()
    };
    let ratios: Vec<Map<String, Value>> = theirs.iter().map(over).collect();
    if args.json {
        let by_name = |of: &[Map<String, Value>], engines: &[Option<Peer>]| -> Map<String, Value> {
            let named = engines.iter().zip(of);
            named.map(|(e, m)| (name(e), json!(m))).collect()
        };
        let rounds: Map<String, Value> = engines
            .iter()
            .zip(&runs)
            .map(|(e, r)| (name(e), json!(r)))
            .collect();
        let record = json!({
            "ratio": by_name(&ratios, &engines[1..]),
            "median": by_name(&medians, &engines),
            "rounds": rounds,
            "model": args.model.file_name().map(|n| n.to_string_lossy()),
            "threads": args.threads,
            "cpu": cpu(),
        });
        println!("{record}");
        return Ok(());
    }
    print!("{:<16}", "tokens/s");
    engines.iter().for_each(|e| print!(" {:>20}", name(e)));
    println!();
    for figure in FIGURES {
        print!("{figure:<16}");
        for (at, of) in medians.iter().enumerate() {
            let value = of.get(figure).and_then(Value::as_f64);
            let ratio = at
                .checked_sub(1)
                .and_then(|at| ratios[at].get(figure)?.as_f64());
            print!(
                " {:>20}",
                match (value, ratio) {
                    (Some(v), Some(r)) => format!("{v:.1} ({r:.2} x)"),
                    (Some(v), None) => format!("{v:.1}"),
                    (None, _) => "-".to_owned(),
                }
            );
        }
        println!();
    }
    Ok(())
}

fn demur_lm(args: &Lm) -> anyhow::Result<Value> {
    let mut command = Command::new(&args.demur);
    command
        .args(["bench", "lm", "--json", "--model"])
        .arg(&args.model);
    command.env("DEMUR_THREADS", args.threads.to_string());
    let mut figures = last_line(command, &args.demur)?;
    // A path of this machine; the record names the file.
    if let Some(figures) = figures.as_object_mut() {
        figures.remove("model");
    }
    Ok(figures)
}

/// The last line of a program's standard output, as JSON.
pub fn last_line(mut command: Command, program: &Path) -> anyhow::Result<Value> {
    let name = program.display();
    let output = command
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        bail!("{name} failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next_back().unwrap_or_default();
    serde_json::from_str(line).with_context(|| format!("{name} printed no JSON: {line}"))
}

/// Of each figure that all runs have.
fn medians(runs: &[Value]) -> Map<String, Value> {
    let of = |figure: &&str| {
        let values: Option<Vec<f64>> = runs.iter().map(|r| r.get(*figure)?.as_f64()).collect();
        Some(((*figure).to_owned(), json!(median(&mut values?))))
    };
    FIGURES.iter().filter_map(of).collect()
}

/// The middle value; of an even number, the mean of the middle two.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values {
        [] => f64::NAN,
        _ if values.len() % 2 == 1 => values[middle],
        _ => (values[middle - 1] + values[middle]) / 2.0,
    }
}

/// The processor's name, where the system tells it.
pub fn cpu() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|l| l.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn median_by_hand() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&mut []).is_nan());
    }
}
