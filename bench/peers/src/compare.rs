//! Alternating rounds, medians and ratios.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use serde_json::{Map, Value, json};

const FIGURES: [&str; 3] = ["prefill_tok_s", "decode_tok_s", "decode16_tok_s"];
const PEER: &str = "llama.cpp";

/// A comparison of language models, resolved.
pub struct Lm {
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
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..args.rounds.max(1) {
        let mut turns = [true, false];
        turns.rotate_left(round % 2);
        for demur in turns {
            if demur {
                ours.push(demur_lm(args)?);
            } else {
                theirs.push(llama_cpp(args)?);
            }
        }
        eprintln!("round {} of {}", round + 1, args.rounds.max(1));
    }
    let (ours_median, theirs_median) = (medians(&ours)?, medians(&theirs)?);
    let ratio: Map<String, Value> = FIGURES
        .iter()
        .zip(ours_median.iter().zip(&theirs_median))
        .map(|(name, (a, b))| ((*name).to_owned(), json!(a / b)))
        .collect();
    if args.json {
        let named = |m: &[f64]| -> Map<String, Value> {
            FIGURES
                .iter()
                .zip(m)
                .map(|(n, v)| ((*n).to_owned(), json!(v)))
                .collect()
        };
        let record = json!({
            "ratio": { PEER: ratio },
            "median": { "demur": named(&ours_median), PEER: named(&theirs_median) },
            "rounds": { "demur": ours, PEER: theirs },
            "model": args.model.file_name().map(|n| n.to_string_lossy()),
            "threads": args.threads,
            "cpu": cpu(),
        });
        println!("{record}");
    } else {
        println!("{:<16} {:>10} {:>10} {:>7}", "", "demur", PEER, "ratio");
        for (i, name) in FIGURES.iter().enumerate() {
            let (a, b) = (ours_median[i], theirs_median[i]);
            println!("{name:<16} {a:>10.1} {b:>10.1} {:>7.2}", a / b);
        }
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

fn llama_cpp(args: &Lm) -> anyhow::Result<Value> {
    let this = std::env::current_exe()?;
    let mut command = Command::new(&this);
    command.arg("llama-cpp").arg("--model").arg(&args.model);
    command.args(["--threads", &args.threads.to_string()]);
    last_line(command, &this)
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

fn medians(runs: &[Value]) -> anyhow::Result<Vec<f64>> {
    FIGURES
        .iter()
        .map(|name| {
            let values: Option<Vec<f64>> = runs.iter().map(|r| r.get(name)?.as_f64()).collect();
            let mut values = values.with_context(|| format!("a run has no figure {name}"))?;
            Ok(median(&mut values))
        })
        .collect()
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
