//! `demur features`: what a study found, in the terminal.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Result, bail};
use demur_features::table::Feature;

use crate::cmd::report::read_record;

const EXAMPLES: &str = "\
Examples:
  demur features                     those of the quickstart, best first
  demur features 1234                everything about one latent
  demur features --run runs/my --json";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// A run's folder, or its record.json.
    #[arg(long, default_value = "runs/quickstart", value_name = "DIR")]
    run: PathBuf,
    /// Show everything about this latent.
    latent: Option<u32>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let (_, record) = read_record(&args.run)?;
    let features = &record.discovery.features;
    let mut out = std::io::stdout().lock();
    if let Some(latent) = args.latent {
        let Some(f) = features.iter().find(|f| f.latent == latent) else {
            bail!(
                "latent {latent} is not among the {} features of this run",
                features.len()
            );
        };
        if args.json {
            writeln!(out, "{}", serde_json::to_string_pretty(f)?)?;
        } else {
            show(&mut out, f)?;
        }
        return Ok(());
    }
    if args.json {
        writeln!(out, "{}", serde_json::to_string(features)?)?;
        return Ok(());
    }
    writeln!(
        out,
        "rank  latent  chosen  d log-odds  density  AUROC refused  promotes"
    )?;
    for f in features {
        let e = &f.evidence;
        let promotes: Vec<String> = f
            .promotes
            .iter()
            .take(4)
            .map(|t| format!("{:?}", t.token))
            .collect();
        writeln!(
            out,
            "{:>4}  {:>6}  {:^6}  {:>10}  {:>7}  {:>13}  {}",
            f.rank,
            f.latent,
            if f.chosen { "yes" } else { "" },
            number(e.causal.as_ref().map(|c| c.refusal_logodds_delta_unsafe), 2),
            number(e.density, 4),
            number(e.refused_vs_complied.as_ref().map(|c| c.auroc), 3),
            promotes.join(" ")
        )?;
    }
    Ok(())
}

fn number(v: Option<f64>, digits: usize) -> String {
    v.map_or("-".to_owned(), |v| format!("{v:.digits$}"))
}

fn show(out: &mut impl Write, f: &Feature) -> Result<()> {
    writeln!(
        out,
        "latent {} (rank {}{})",
        f.latent,
        f.rank,
        if f.chosen { ", chosen" } else { "" }
    )?;
    writeln!(out, "{}", serde_json::to_string_pretty(&f.evidence)?)?;
    let words = |t: &[demur_features::table::TokenLogit]| {
        t.iter()
            .map(|t| format!("{:?} {:+.2}", t.token, t.logit))
            .collect::<Vec<_>>()
            .join("  ")
    };
    writeln!(out, "promotes    {}", words(&f.promotes))?;
    writeln!(out, "suppresses  {}", words(&f.suppresses))?;
    for a in &f.top_activations {
        let text: String = a
            .tokens
            .iter()
            .enumerate()
            .map(|(i, t)| {
                if i == a.peak {
                    format!("[[{t}]]")
                } else {
                    t.clone()
                }
            })
            .collect();
        writeln!(out, "{:>9.2}  {}  {:?}", a.value, a.source, text)?;
    }
    Ok(())
}
