//! `demur eval judges`: judges against replies that people have sorted.

use std::path::Path;

use anyhow::{Result, bail};
use demur_eval::judge::Verdict;
use demur_eval::rows::{self, Row};
use demur_eval::stats::{kappa, wilson};
use serde_json::json;

use super::{Cast, Judging};
use crate::progress::say;

/// Whether people call the reply a refusal; nothing, if it has no label. WildGuardTest has replies
/// without one, where its annotators did not agree.
fn refusal(row: &Row) -> Result<Option<bool>> {
    const NAMES: [&str; 3] = ["refusal", "human_refusal", "response_refusal_label"];
    match row.label(&NAMES).as_deref() {
        Some("true" | "True" | "1" | "refusal") => Ok(Some(true)),
        Some("false" | "False" | "0" | "compliance") => Ok(Some(false)),
        None if row.has(NAMES[2]) => Ok(None),
        _ => Err(row.wrong("refusal", "is neither true nor false").into()),
    }
}

pub fn run(labels: &Path, judging: &Judging, show: bool, as_json: bool) -> Result<()> {
    let read = rows::read(labels)?;
    let mut replies = Vec::new();
    for row in &read {
        let Some(refused) = refusal(row)? else {
            continue;
        };
        let prompt = row.label(&["prompt"]).unwrap_or_default();
        replies.push((prompt, row.text(&["response"])?, refused));
    }
    let unlabelled = read.len() - replies.len();
    if replies.is_empty() {
        bail!("{} has no reply with a label", labels.display());
    }
    if unlabelled > 0 {
        say(format_args!(
            "{unlabelled} rows have no label and are left out"
        ))?;
    }
    let names = match judging.judges.as_slice() {
        [] => vec!["opener".to_owned(), "rules".to_owned()],
        names => names.to_vec(),
    };
    let cast = Cast::new(names.iter(), judging.patience)?;
    let truth: Vec<bool> = replies.iter().map(|r| r.2).collect();
    let mut all = Vec::new();
    for judge in cast.judges(&names, judging)? {
        let name = judge.name();
        let verdicts: Vec<Verdict> = replies
            .iter()
            .map(|(p, r, _)| judge.verdict(p, r).unwrap_or(Verdict::Unjudged))
            .collect();
        let says: Vec<bool> = verdicts
            .iter()
            .map(|v| matches!(v, Verdict::Refusal | Verdict::Partial))
            .collect();
        let count = |t: bool, s: bool| {
            truth
                .iter()
                .zip(&says)
                .filter(|(a, b)| (**a, **b) == (t, s))
                .count()
        };
        let right = count(true, true) + count(false, false);
        let e = wilson(right, truth.len());
        let k = kappa(&truth, &says);
        let of = |sort: Verdict| verdicts.iter().filter(|v| **v == sort).count();
        let (partial, failed) = (of(Verdict::Partial), of(Verdict::Unjudged));
        say(format_args!(
            "{name:<10} kappa {k:.3}, agreement {:.3} [{:.3}, {:.3}], n {}: missed {} refusals, {} \
             false alarms, {partial} partial, {failed} not judged",
            e.value,
            e.lo,
            e.hi,
            e.n,
            count(true, false),
            count(false, true)
        ))?;
        if show {
            let differ = replies.iter().zip(&says).filter(|(r, s)| r.2 != **s);
            for ((prompt, reply, refused), _) in differ {
                say(format_args!("--- refusal: {refused}\n> {prompt}\n{reply}"))?;
            }
        }
        all.push(json!({
            "judge": name, "kappa": k, "agreement": e, "missed": count(true, false),
            "false_alarms": count(false, true), "partial": partial, "not_judged": failed,
        }));
    }
    if as_json {
        say(json!({ "labels": labels, "unlabelled": unlabelled, "judges": all }))?;
    }
    Ok(())
}
