//! `demur gate`: train a gate, or see what one makes of prompts.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use demur_eval::prompts::{self, Label};
use demur_eval::stats::Estimate;
use demur_features::gate::{Detection, Group, detection, recall_at};
use demur_features::harvest::Sequence;
use demur_steering::explain_gate;
use serde_json::json;

use crate::catalogue::DEFAULT_MODEL;
use crate::cmd::chat::steering;
use crate::cmd::plan;
use crate::cmd::study::Which;
use crate::exit;
use crate::loaded::{Loaded, conversation};
use crate::progress::say;
use crate::study::config::Precision;
use crate::study::{GATE_NAME, Options, REFUSES_NAME, TrainedGate, gate_only, gate_scores};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

const EXAMPLES: &str = "\
Examples:
  demur gate train                                     for the default model, on what demur ships
  demur gate train my.toml --set gate.recall=0.9
  demur gate test my.jsonl --plan runs/quickstart/gate.toml";

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Train the gate of a study: its stages pull, harvest, train and gate.
    #[command(after_help = EXAMPLES)]
    Train {
        #[command(flatten)]
        which: Which,
        /// Print one JSON object: the gate and all its figures.
        #[arg(long)]
        json: bool,
    },
    /// Run the gates of a plan on labelled prompts: how many are caught, how many falsely.
    Test {
        /// JSONL(.gz) of prompts with `label`.
        prompts: PathBuf,
        /// The plan with the gates; `default` is the shipped one.
        #[arg(long, default_value = "runs/quickstart/gate.toml", value_name = "FILE")]
        plan: PathBuf,
        /// Folder of the SAE that the plan names; a study's folder works too.
        #[arg(long, value_name = "DIR")]
        sae: Option<PathBuf>,
        /// A catalogue name or a path.
        #[arg(long, short, default_value = DEFAULT_MODEL)]
        model: String,
        /// Print one JSON object a gate.
        #[arg(long)]
        json: bool,
    },
}

pub fn run(args: Args) -> Result<()> {
    match args.action {
        Action::Train { which, json } => {
            let study = which.load()?;
            exit::say_how_to_go_on();
            let runs = which.runs;
            let (plan, gate) = gate_only(study, &Options { runs, from: None })?;
            if json {
                return say(json!({ "plan": plan, "trained": gate }));
            }
            show(&plan, &gate)
        }
        Action::Test {
            prompts,
            plan,
            sae,
            model,
            json,
        } => test(&prompts, &plan, sae.as_deref(), &model, json),
    }
}

fn show(plan: &Path, trained: &TrainedGate) -> Result<()> {
    let explained = explain_gate(GATE_NAME, &trained.gate);
    let penalty = trained.tried.first();
    let penalty = penalty.map_or(String::new(), |best| format!(" Penalty {}.", best.l2));
    say(format_args!("{}\n{explained}{penalty}\n", plan.display()))?;
    let groups = |split: &str, groups: &[Group]| -> Result<()> {
        for g in groups {
            line(&format!("{split}: {}", g.name), &g.detection)?;
        }
        Ok(())
    };
    say(HEAD)?;
    groups(
        "validation",
        &trained.validation.groups[..3.min(trained.validation.groups.len())],
    )?;
    groups("test", &trained.test.groups)?;
    for other in &trained.beside {
        line(&format!("validation: {}", other.name), &other.validation)?;
        line(&format!("test: {}", other.name), &other.test)?;
    }
    if let Some(refuses) = &trained.refuses {
        line(
            "validation: what base refuses, by its gate",
            &refuses.validation,
        )?;
    }
    say(format_args!(
        "\ntest: recall at 5 % false alarms {:.3}, expected calibration error {:.3}",
        trained.test.recall_at_5_percent, trained.test.calibration_error
    ))
}

const HEAD: &str =
    "                                              AUROC  caught                  false alarms";

fn line(name: &str, d: &Detection) -> Result<()> {
    let rate = |e: &Estimate| match e.n {
        0 => "-".to_owned(),
        n => format!(
            "{:.0} % [{:.0}, {:.0}] of {n}",
            100.0 * e.value,
            100.0 * e.lo,
            100.0 * e.hi
        ),
    };
    let auroc = d.auroc.map_or("-".to_owned(), |a| format!("{a:.3}"));
    let (caught, alarms) = (rate(&d.recall), rate(&d.false_alarm));
    say(format_args!(
        "{name:<44}  {auroc:>5}  {caught:<22}  {alarms}"
    ))
}

fn test(file: &Path, plan_file: &Path, sae: Option<&Path>, model: &str, json: bool) -> Result<()> {
    let rows = prompts::read(file)?;
    let rows: Vec<_> = rows.iter().filter(|p| p.label.is_some()).collect();
    if rows.is_empty() {
        bail!("{}: no prompt has a label", file.display());
    }
    let plan = plan::read(plan_file)?;
    let loaded = Loaded::open(model, Precision::Fast)?;
    let compiled = steering(&loaded, Some(plan_file), sae)?.context("a plan was given")?;
    if plan.gates.is_empty() {
        bail!("plan {}: it has no gate", plan_file.display());
    }
    let mut sequences = Vec::with_capacity(rows.len());
    for p in &rows {
        let messages = conversation(None, &p.prompt);
        let rendered = loaded.chat()?.encode(&loaded.tokenizer, &messages, true)?;
        sequences.push(Sequence {
            source: p.id.clone(),
            tokens: rendered.ids,
            roles: rendered.roles,
        });
    }
    let scores = gate_scores(&loaded.model, &compiled, plan.gates.len(), &sequences)?;
    // The labels say nothing of what base would refuse.
    let of_labels = |((name, _), _): &((&String, _), _)| name.as_str() != REFUSES_NAME;
    for ((name, gate), scores) in plan.gates.iter().zip(scores).filter(of_labels) {
        let labels = rows.iter().map(|p| p.label == Some(Label::Unsafe));
        let scored: Vec<(f64, bool)> = scores.into_iter().zip(labels).collect();
        let found = detection(&scored, f64::from(gate.threshold));
        if json {
            let each = rows.iter().zip(&scored);
            let each: Vec<_> = each.map(|(p, s)| json!([p.id, s.0, s.1])).collect();
            say(json!({ "gate": name, "detection": found, "scores": each }))?;
        } else {
            say(HEAD)?;
            line(name, &found)?;
            let at_5 = recall_at(&scored, 0.05);
            say(format_args!("recall at 5 % false alarms {at_5:.3}"))?;
        }
    }
    Ok(())
}
