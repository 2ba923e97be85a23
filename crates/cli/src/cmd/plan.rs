//! `demur plan`: steering plans, checked, explained and compared before they run.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use demur_steering::{Change, SteeringPlan, diff, explain};
use serde_json::json;

use crate::cmd::chat::steering;
use crate::loaded::Loaded;
use crate::progress::say;
use crate::study::config::Precision;
use crate::study::default_plan;

/// The name of the shipped plan.
const DEFAULT: &str = "default";

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Check the plan's syntax, names and numbers; with --model also that it fits.
    Check {
        /// The plan, TOML or JSON; `default` is the shipped one.
        plan: PathBuf,
        /// Check sites, widths and latents against this model: a catalogue name or a path.
        #[arg(long, short, value_name = "MODEL")]
        model: Option<String>,
        /// Folder of the SAE that the plan names; a study's folder works too.
        #[arg(long, value_name = "DIR", requires = "model")]
        sae: Option<PathBuf>,
    },
    /// Print the JSON Schema of plans.
    Schema,
    /// Say in words what the plan does.
    Explain {
        /// The plan, TOML or JSON; `default` is the shipped one.
        plan: PathBuf,
    },
    /// Say where two plans differ, defaults written out.
    Diff {
        /// The first plan, TOML or JSON.
        first: PathBuf,
        /// The second.
        second: PathBuf,
        /// Print one JSON object a change.
        #[arg(long)]
        json: bool,
    },
}

pub fn run(args: Args) -> Result<()> {
    match args.action {
        Action::Check {
            plan: file,
            model,
            sae,
        } => {
            let plan = read(&file)?;
            if let Some(model) = model {
                let loaded = Loaded::open(&model, Precision::Fast)?;
                steering(&loaded, Some(&file), sae.as_deref())?;
            }
            say(format_args!("ok: {} ({})", plan.name, plan.sha256()))
        }
        Action::Schema => say(format_args!("{:#}", SteeringPlan::schema())),
        Action::Explain { plan } => say(explain(&read(&plan)?)),
        Action::Diff {
            first,
            second,
            json,
        } => show(&diff(&read(&first)?, &read(&second)?), json),
    }
}

fn show(changes: &[Change], json: bool) -> Result<()> {
    for c in changes {
        if json {
            say(json!({ "place": c.place, "before": c.before, "after": c.after }))?;
            continue;
        }
        say(&c.place)?;
        for (sign, value) in [("-", &c.before), ("+", &c.after)] {
            if let Some(value) = value {
                say(format_args!("  {sign} {value}"))?;
            }
        }
    }
    if changes.is_empty() && !json {
        say("the plans do the same")?;
    }
    Ok(())
}

/// Reads a plan, by its extension: `.json`, or TOML. `default`, if it is no file, is the shipped one.
pub fn read(path: &Path) -> Result<SteeringPlan> {
    if path == Path::new(DEFAULT) && !path.exists() {
        return default_plan();
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let plan = if path.extension().is_some_and(|e| e == "json") {
        SteeringPlan::from_json(&text)
    } else {
        SteeringPlan::from_toml(&text)
    };
    plan.with_context(|| format!("plan {}", path.display()))
}
