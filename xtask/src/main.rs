//! Project automation.
//!
//! ```text
//! cargo xtask ci              everything that CI runs, cheapest first; stops at the first failure
//! cargo xtask ci fmt clippy   only these steps
//! cargo xtask generate        writes docs/reference/ anew
//! ```
#![forbid(unsafe_code)]

mod dependencies;
mod generate;
mod rules;
mod shell;
mod studies;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use shell::{Shell, cargo};

/// How a step ended well.
enum Done {
    Passed,
    /// Not done, for this reason; it is said loudly, twice.
    Skipped(String),
}

struct Step {
    name: &'static str,
    title: &'static str,
    run: fn(&Shell) -> Result<Done>,
}

/// In the order of their cost.
const STEPS: [Step; 10] = [
    Step {
        name: "fmt",
        title: "the code is formatted",
        run: fmt,
    },
    Step {
        name: "rules",
        title: "what ARCHITECTURE.md and the README promise",
        run: rules::check,
    },
    Step {
        name: "msrv",
        title: "no dependency needs a newer Rust than we state",
        run: dependencies::msrv,
    },
    Step {
        name: "deny",
        title: "dependencies: bans, licences, sources",
        run: dependencies::deny,
    },
    Step {
        name: "clippy",
        title: "no warnings in any target",
        run: clippy,
    },
    Step {
        name: "docs",
        title: "the documentation builds, all links resolve",
        run: docs,
    },
    Step {
        name: "generated",
        title: "docs/reference is what the code says",
        run: generate::check,
    },
    Step {
        name: "test",
        title: "all tests",
        run: test,
    },
    Step {
        name: "dry-run",
        title: "the paper's study is valid",
        run: studies::dry_run,
    },
    Step {
        name: "smoke",
        title: "a whole study on a tiny model",
        run: studies::smoke,
    },
];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let result = match args.split_first() {
        Some((command, steps)) if command == "ci" => ci(steps),
        Some((command, [])) if command == "generate" => {
            Shell::new().and_then(|sh| generate::write(&sh))
        }
        _ => {
            let names: Vec<&str> = STEPS.iter().map(|s| s.name).collect();
            eprintln!(
                "usage: cargo xtask ci [STEP]...\n       cargo xtask generate\nsteps: {}",
                names.join(", ")
            );
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the named steps, or all, and prints a table of how they ended.
fn ci(names: &[String]) -> Result<()> {
    if let Some(unknown) = names.iter().find(|n| !STEPS.iter().any(|s| s.name == **n)) {
        let known: Vec<&str> = STEPS.iter().map(|s| s.name).collect();
        bail!(
            "there is no step '{unknown}'; the steps are {}",
            known.join(", ")
        );
    }
    let sh = Shell::new()?;
    let chosen: Vec<&Step> = STEPS
        .iter()
        .filter(|s| names.is_empty() || names.iter().any(|n| n == s.name))
        .collect();
    let started = Instant::now();
    let mut table = Vec::new();
    let mut failed = None;
    for step in &chosen {
        eprintln!("\n== {}: {}", step.name, step.title);
        let began = Instant::now();
        let result = (step.run)(&sh);
        let took = began.elapsed();
        let how = match &result {
            Ok(Done::Passed) => "passed".to_owned(),
            Ok(Done::Skipped(why)) => format!("SKIPPED: {why}"),
            Err(_) => "FAILED".to_owned(),
        };
        eprintln!("== {}: {how} in {}", step.name, seconds(took));
        table.push((step.name, how, took));
        if let Err(e) = result {
            failed = Some(e.context(format!(
                "step '{}' failed; alone: cargo xtask ci {0}",
                step.name
            )));
            break;
        }
    }
    eprintln!("\n{:<12} {:>9}  result", "step", "time");
    for (name, how, took) in &table {
        eprintln!("{name:<12} {:>9}  {how}", seconds(*took));
    }
    for step in &chosen[table.len()..] {
        eprintln!("{:<12} {:>9}  not run", step.name, "-");
    }
    eprintln!("{:<12} {:>9}", "all", seconds(started.elapsed()));
    failed.map_or(Ok(()), Err)
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

fn fmt(sh: &Shell) -> Result<Done> {
    sh.run(cargo(["fmt", "--all", "--check"]))?;
    sh.run(cargo([
        "fmt",
        "--manifest-path",
        "fuzz/Cargo.toml",
        "--check",
    ]))?;
    Ok(Done::Passed)
}

fn clippy(sh: &Shell) -> Result<Done> {
    sh.run(cargo([
        "clippy",
        "--locked",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]))?;
    Ok(Done::Passed)
}

fn docs(sh: &Shell) -> Result<Done> {
    let mut doc = cargo(["doc", "--locked", "--workspace", "--no-deps"]);
    doc.env("RUSTDOCFLAGS", "-D warnings");
    sh.run(doc)?;
    Ok(Done::Passed)
}

fn test(sh: &Shell) -> Result<Done> {
    // As in the README.
    sh.run(cargo(["test", "--workspace"]))?;
    Ok(Done::Passed)
}
