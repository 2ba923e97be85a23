//! One feature, the sets and the sites as text.

use std::io::Write;

use anyhow::Result;
use demur_features::stats::Estimate;
use demur_features::table::{Feature, Histogram, SetEvidence, SetSearch, SiteEvidence, TokenLogit};

use crate::exit::Hinted;

/// Bars of a histogram in a line.
const BARS: usize = 50;

/// Everything about one feature.
pub fn feature(out: &mut impl Write, f: &Feature) -> Result<()> {
    writeln!(
        out,
        "latent {} (rank {}{})",
        f.latent,
        f.rank,
        if f.chosen { ", chosen" } else { "" }
    )?;
    writeln!(out, "{}", serde_json::to_string_pretty(&f.evidence)?)?;
    let words = |t: &[TokenLogit]| {
        t.iter()
            .map(|t| format!("{:?} {:+.2}", t.token, t.logit))
            .collect::<Vec<_>>()
            .join("  ")
    };
    writeln!(out, "promotes    {}", words(&f.promotes))?;
    writeln!(out, "suppresses  {}", words(&f.suppresses))?;
    for (name, h) in [("activations", &f.activations), ("logits", &f.logits)] {
        if let Some(h) = h {
            let all: u64 = h.counts.iter().sum();
            writeln!(
                out,
                "{name:<11} {:.3} {} {:.3}  n {all}",
                h.lo,
                bars(h),
                h.hi
            )?;
        }
    }
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

/// A histogram in a line, each bar by the square root of its count: a bin with anything in it is seen.
fn bars(h: &Histogram) -> String {
    const STEPS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let highest = h.counts.iter().copied().max().unwrap_or(0).max(1) as f64;
    let bar = |&n: &u64| match n {
        0 => ' ',
        n => STEPS[((n as f64 / highest).sqrt() * 7.0).round().clamp(0.0, 7.0) as usize],
    };
    h.counts.iter().take(BARS).map(bar).collect()
}

/// The best set of each size, then the pairs, the strongest interaction first.
pub fn sets(out: &mut impl Write, found: Option<&SetSearch>, json: bool) -> Result<()> {
    let Some(found) = found else {
        let hint = "run the study with --set discovery.sets.size=3 (or what size you like)";
        return Err(Hinted::new("this run searched for no sets", hint).into());
    };
    if json {
        return Ok(writeln!(out, "{}", serde_json::to_string(found)?)?);
    }
    writeln!(
        out,
        "each latent at {} times its largest activation; KL at most {}",
        found.value, found.max_kl
    )?;
    let parts: [(&str, Vec<&SetEvidence>); 3] = [
        ("best of each size", found.sets.iter().collect()),
        ("alone", found.singles.iter().collect()),
        ("pairs", found.strongest_pairs()),
    ];
    for (name, sets) in parts {
        writeln!(
            out,
            "\n{name:<24}  {:>22}  {:>22}  {:>7}  {:>22}  {:>22}",
            "log-odds unsafe", "log-odds safe", "KL", "interaction", "gain"
        )?;
        for s in sets {
            let latents: Vec<String> = s.latents.iter().map(u32::to_string).collect();
            writeln!(
                out,
                "{:<24}  {:>22}  {:>22}  {:>7.4}  {:>22}  {:>22}",
                latents.join("+"),
                estimate(Some(&s.refusal_logodds_delta_unsafe), 2),
                estimate(Some(&s.refusal_logodds_delta_safe), 2),
                s.kl_benign,
                estimate(s.interaction.as_ref(), 2),
                estimate(s.gain.as_ref(), 2),
            )?;
        }
    }
    Ok(())
}

/// One line a site.
pub fn sites(out: &mut impl Write, sites: &[SiteEvidence], json: bool) -> Result<()> {
    if sites.is_empty() {
        let hint = "run the study with --set discovery.compare_sites=true";
        return Err(Hinted::new("this run compared no sites", hint).into());
    }
    if json {
        return Ok(writeln!(out, "{}", serde_json::to_string(sites)?)?);
    }
    writeln!(
        out,
        "{:<26}  {:>20}  {:>20}  {:>20}  {:>20}  {:>20}  {:>20}  {:>7}",
        "AUROC, then log-odds",
        "means, last token",
        "probe, last token",
        "means, all tokens",
        "probe, all tokens",
        "refusal unsafe",
        "refusal safe",
        "KL"
    )?;
    for s in sites {
        let refusal = s.refusal.as_ref();
        writeln!(
            out,
            "{:<26}  {:>20}  {:>20}  {:>20}  {:>20}  {:>20}  {:>20}  {:>7}",
            s.site,
            estimate(Some(&s.last.direction), 3),
            estimate(Some(&s.last.probe), 3),
            estimate(Some(&s.mean.direction), 3),
            estimate(Some(&s.mean.probe), 3),
            estimate(refusal.map(|r| &r.refusal_logodds_delta_unsafe), 2),
            estimate(refusal.map(|r| &r.refusal_logodds_delta_safe), 2),
            refusal.map_or("-".to_owned(), |r| format!("{:.4}", r.kl_benign)),
        )?;
    }
    Ok(())
}

fn estimate(e: Option<&Estimate>, digits: usize) -> String {
    match e {
        Some(e) if e.value.is_finite() => format!(
            "{:.digits$} [{:.digits$}, {:.digits$}]",
            e.value, e.lo, e.hi
        ),
        _ => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_by_hand() {
        // square roots 1, 0, 1/4, 1/2 of the highest: steps 7, none, 1.75 and 3.5
        let h = Histogram {
            lo: 0.0,
            hi: 1.0,
            counts: vec![16, 0, 1, 4],
        };
        assert_eq!(bars(&h), "█ ▃▅");
        let empty = Histogram {
            counts: Vec::new(),
            ..h
        };
        assert_eq!(bars(&empty), "");
    }
}
