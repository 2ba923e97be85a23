//! The main job, as its users run it.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::Done;
use crate::shell::{Shell, cargo};

/// Arms that the smoke's summary must have.
const ARMS: [&str; 5] = [
    "base",
    "sae_passthrough",
    "clamp",
    "clamp_error_dropped",
    "random_latent",
];
/// What each of them must have.
const METRICS: [&str; 4] = ["refusal_unsafe", "refusal_safe", "kl", "ppl"];

/// The study that needs weights which few have: its config at least is good.
pub fn dry_run(sh: &Shell) -> Result<Done> {
    let command = cargo([
        "run",
        "--release",
        "--locked",
        "--",
        "study",
        "phi3-refusal",
        "--dry-run",
    ]);
    let text = sh.read(command)?;
    ensure!(
        text.contains("blocks.6.hook_resid_post"),
        "`demur study phi3-refusal --dry-run` does not say which site it would steer:\n{text}"
    );
    Ok(Done::Passed)
}

/// `studies/smoke.toml` from nothing to its report.
pub fn smoke(sh: &Shell) -> Result<Done> {
    let runs = Path::new("target").join("smoke");
    let folder = sh.root.join(&runs);
    if folder.exists() {
        std::fs::remove_dir_all(&folder).with_context(|| format!("clear {}", folder.display()))?;
    }
    let mut command = cargo(["run", "--release", "--locked", "--"]);
    command
        .args(["study", "studies/smoke.toml", "--json", "--runs"])
        .arg(&runs);
    let text = sh.read(command)?;
    let last = text.lines().last().context("the study printed nothing")?;
    let summary: Value = serde_json::from_str(last)
        .with_context(|| format!("the last line of --json is no JSON: {last}"))?;
    check_summary(&summary)?;
    let run = folder.join("smoke");
    let record = std::fs::read(run.join("record.json")).context("read record.json")?;
    let record: Value = serde_json::from_slice(&record).context("record.json")?;
    ensure!(
        record["study"] == "smoke",
        "record.json is of the study {}",
        record["study"]
    );
    let report = std::fs::read_to_string(run.join("report.html")).context("read report.html")?;
    let head = report.trim_start().get(..15).unwrap_or_default();
    ensure!(
        head.eq_ignore_ascii_case("<!doctype html>"),
        "report.html begins with '{head}', not as a page"
    );
    Ok(Done::Passed)
}

/// Every arm has both refusal rates and the price on text, as numbers inside of their intervals.
fn check_summary(summary: &Value) -> Result<()> {
    let rows = summary["rows"]
        .as_array()
        .context("the summary has no rows")?;
    for arm in ARMS {
        for metric in METRICS {
            let Some(row) = rows
                .iter()
                .find(|r| r["arm"] == arm && r["metric"] == metric)
            else {
                bail!("the summary has no {metric} of the arm {arm}");
            };
            let number = |key: &str| row[key].as_f64().unwrap_or(f64::NAN);
            let (lo, value, hi) = (number("lo"), number("value"), number("hi"));
            ensure!(
                lo <= value && value <= hi && hi.is_finite(),
                "{metric} of the arm {arm}: {value} in [{lo}, {hi}]"
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{ARMS, METRICS, check_summary};
    use serde_json::{Value, json};

    fn summary(change: impl Fn(&mut Value)) -> Value {
        let mut rows = Vec::new();
        for arm in ARMS {
            for metric in METRICS {
                let mut row =
                    json!({"arm": arm, "metric": metric, "value": 0.5, "lo": 0.4, "hi": 0.6});
                change(&mut row);
                rows.push(row);
            }
        }
        json!({"rows": rows})
    }

    #[track_caller]
    fn refused(key: &str, to: Value) {
        let bad = summary(|row| {
            if row["arm"] == "clamp" && row["metric"] == "kl" {
                row[key] = to.clone();
            }
        });
        let message = check_summary(&bad).unwrap_err().to_string();
        assert!(message.contains("kl of the arm clamp"), "{message}");
    }

    #[test]
    fn a_missing_row_or_number_is_named() {
        check_summary(&summary(|_| {})).unwrap();
        refused("arm", json!("clmap"));
        refused("value", Value::Null);
        refused("hi", json!(0.45));
    }
}
