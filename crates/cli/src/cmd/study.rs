//! `demur study`: the main job.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use crate::study::config::{SaeSource, Study};
use crate::study::{Options, dry_run, run_study};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// A TOML file, or a built-in study: quickstart, quickstart-sae, phi3-refusal.
    #[arg(default_value = "quickstart")]
    study: String,
    /// Run this stage and all after it anew: pull, harvest, train, discover, tune, evaluate, report.
    #[arg(long, value_name = "STAGE")]
    from: Option<String>,
    /// Check the study and say what it would do.
    #[arg(long)]
    dry_run: bool,
    /// Change a value, for instance `--set evaluate.max_new_tokens=16`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Folder for runs.
    #[arg(long, default_value = "runs", value_name = "DIR")]
    runs: PathBuf,
    /// Train the SAE anew instead of loading the shipped one.
    #[arg(long)]
    retrain: bool,
    /// Print the figures as one JSON object, as the last line.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let mut sets = args.sets;
    if args.retrain {
        // The shipped SAE's own settings.
        let recipe = Study::load("quickstart-sae", &[])?;
        let mut study = Study::load(&args.study, &sets)?;
        study.sae.source = SaeSource::Train;
        study.corpus = recipe.corpus;
        study.train = recipe.train;
        return finish(study, args.from, args.runs, args.dry_run, args.json);
    }
    let study = Study::load(&args.study, &std::mem::take(&mut sets))?;
    finish(study, args.from, args.runs, args.dry_run, args.json)
}

fn finish(
    study: Study,
    from: Option<String>,
    runs: PathBuf,
    dry: bool,
    as_json: bool,
) -> Result<()> {
    if dry {
        dry_run(&study, &runs);
        return Ok(());
    }
    let record = run_study(
        study,
        &Options {
            runs: runs.clone(),
            from,
        },
    )?;
    println!("\n{}", record.verdict.headline);
    for line in &record.verdict.lines {
        println!("  {line}");
    }
    println!(
        "  report: {}",
        runs.join(&record.study).join("report.html").display()
    );
    if as_json {
        let object = json!({
            "study": record.study,
            "model": record.model.name,
            "wall_s": record.wall_s,
            "rows": record.rows(),
        });
        println!("{object}");
    }
    Ok(())
}
