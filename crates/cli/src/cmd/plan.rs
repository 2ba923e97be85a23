//! `demur plan`: steering plans, checked and explained before they run.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use demur_steering::{SteeringPlan, explain};

use crate::progress::say;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Check the plan's syntax, names and numbers.
    Check {
        /// The plan, TOML or JSON.
        plan: PathBuf,
    },
    /// Print the JSON Schema of plans.
    Schema,
    /// Say in words what the plan does.
    Explain {
        /// The plan, TOML or JSON.
        plan: PathBuf,
    },
}

pub fn run(args: Args) -> Result<()> {
    match args.action {
        Action::Check { plan } => {
            let plan = read(&plan)?;
            say(format_args!("ok: {} ({})", plan.name, plan.sha256()))
        }
        Action::Schema => say(format_args!("{:#}", SteeringPlan::schema())),
        Action::Explain { plan } => say(explain(&read(&plan)?)),
    }
}

/// Reads a plan, by its extension: `.json`, or TOML.
pub fn read(path: &Path) -> Result<SteeringPlan> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let plan = if path.extension().is_some_and(|e| e == "json") {
        SteeringPlan::from_json(&text)
    } else {
        SteeringPlan::from_toml(&text)
    };
    plan.with_context(|| format!("plan {}", path.display()))
}
