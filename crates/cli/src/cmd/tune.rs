//! `demur tune`: a study up to its plan, chosen on validation prompts; the test prompts stay untouched.

use anyhow::Result;
use demur_eval::record::{Calibration, SweepPoint};
use demur_eval::stats::Estimate;
use serde_json::json;

use super::study::Which;
use crate::exit;
use crate::progress::say;
use crate::study::{Options, Planned, plan_only};

const EXAMPLES: &str = "\
Examples:
  demur tune refusal
  demur tune refusal --set calibrate.aim_refusal_unsafe=0.95 --set calibrate.max_chat_kl=0.05
  demur tune my.toml --json";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    which: Which,
    /// Print one JSON object: the plan's file, the sweep, and the front of the gate's settings.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let study = args.which.load()?;
    exit::say_how_to_go_on();
    let planned = plan_only(
        study,
        &Options {
            runs: args.which.runs,
            from: None,
        },
    )?;
    if args.json {
        return say(json!({
            "plan": planned.file,
            "tune": { "aim": planned.tuned.aim, "sweep": planned.tuned.sweep },
            "calibration": planned.calibrated.map(|c| c.calibration),
        }));
    }
    show(&planned)
}

fn show(planned: &Planned) -> Result<()> {
    let tuned = &planned.tuned;
    say(format_args!(
        "the clamp: {}\n\n{:<30} {:<20} {:<20} {:>9}",
        tuned.aim, "latents at value", "unsafe refused", "safe refused", "KL, nats"
    ))?;
    line("base", &tuned.base_unsafe, &tuned.base_safe, None, false)?;
    for p in &tuned.sweep {
        line(
            &name(p),
            &p.refusal_unsafe,
            &p.refusal_safe,
            Some(p.kl),
            p.chosen,
        )?;
    }
    if let Some(c) = &planned.calibrated {
        front(&c.calibration)?;
    }
    say(format_args!("\n{}", planned.file.display()))
}

fn front(c: &Calibration) -> Result<()> {
    say(format_args!(
        "\nthe gate: {}\n\n{:<30} {:<20} {:<20} {:>9}",
        c.aim, "open from (clamp), clear below", "unsafe refused", "safe refused", "KL, nats"
    ))?;
    line("base", &c.base_unsafe, &c.base_safe, None, false)?;
    for s in &c.front {
        let clear = s
            .clear
            .map_or_else(String::new, |c| format!(", {c:.2} (damping {})", s.damp));
        let name = format!("{:.2} ({}){clear}", s.threshold, s.clamp);
        line(
            &name,
            &s.refusal_unsafe,
            &s.refusal_safe,
            Some(s.chat_kl),
            s.chosen,
        )?;
    }
    Ok(())
}

fn name(p: &SweepPoint) -> String {
    let latents: Vec<String> = p.latents.iter().map(u32::to_string).collect();
    format!("{} at {} {}", latents.join(", "), p.value, p.unit)
}

fn line(
    name: &str,
    on_unsafe: &Estimate,
    on_safe: &Estimate,
    kl: Option<f64>,
    chosen: bool,
) -> Result<()> {
    let rate = |e: &Estimate| {
        let percent = [e.value, e.lo, e.hi].map(|v| 100.0 * v);
        format!("{:.0} % [{:.0}, {:.0}]", percent[0], percent[1], percent[2])
    };
    let kl = kl.map_or_else(|| "-".to_owned(), |kl| format!("{kl:.4}"));
    say(format_args!(
        "{name:<30} {:<20} {:<20} {kl:>9}{}",
        rate(on_unsafe),
        rate(on_safe),
        if chosen { "  chosen" } else { "" }
    ))
}
