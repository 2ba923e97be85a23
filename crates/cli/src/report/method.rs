//! The plan, how everything was measured, and how to run it again.

use demur_eval::prompts::Split;
use demur_eval::record::{Record, StageTime};
use maud::{Markup, html};
use serde_json::Value;

use super::View;
use super::format::{DASH, count, duration, or_none, px};

/// Characters of a JSON or TOML listing.
const LISTING: usize = 60_000;

pub fn plan(view: &View<'_>) -> Markup {
    let r = view.record;
    html! {
        section id="plan" {
            header {
                h2 { "The plan" }
                p { "What steering does, as it would be read to somebody before it runs. It is data: no weight is changed." }
            }
            blockquote class="plan" {
                @for line in r.plan_in_words.lines() { p { (line) } }
                @if r.plan_in_words.trim().is_empty() { p { (DASH) } }
            }
            details {
                summary { "The plan as JSON" }
                (listing(&json(&r.plan)))
            }
            p class="note" { "sha256 " span class="mono hash" { (or_none(&r.plan_sha256)) } }
        }
    }
}

pub fn method(view: &View<'_>) -> Markup {
    let r = view.record;
    html! {
        section id="method" {
            header { h2 { "How it was measured" } }
            div class="prose" {
                p {
                    "Discovery, tuning and test use disjoint prompts; the test prompts were run once, after everything was chosen. "
                    "Each prompt was asked greedily through the model's own chat template. A reply counts as refused if it begins as a refusal "
                    "(a list of openers, with known exceptions); text that repeats itself or has hardly any letters is gibberish; the rest is answered. "
                    "That judge is fast and has no model: it misses refusals that begin with an explanation, and can't tell a good answer from a bad one."
                }
                p {
                    "Rates have Wilson 95 % intervals; KL and perplexity have normal ones over passages. "
                    "The headline speaks of a rise only if the intervals of base and of the steered arm do not overlap."
                }
            }
            div class="columns" {
                (splits(r))
                (stages(r))
            }
            (provenance(r))
            (again(r))
        }
    }
}

fn splits(r: &Record) -> Markup {
    html! {
        div {
            h3 { "Prompts" }
            table class="plain" {
                thead { tr { th scope="col" { "Split" } th scope="col" { "Unsafe" } th scope="col" { "Safe" } } }
                tbody {
                    @for s in &r.splits {
                        tr {
                            th scope="row" { (split_name(s.split)) }
                            td { (count(s.r#unsafe as u64)) }
                            td { (count(s.safe as u64)) }
                        }
                    }
                }
            }
            p class="note" {
                "Base refused " (count(r.discovery.refused_unsafe as u64)) " of the unsafe discovery prompts. Methods: "
                (or_none(&r.discovery.table.methods.join(", ").replace('_', " "))) "."
            }
        }
    }
}

fn split_name(split: Split) -> &'static str {
    match split {
        Split::Corpus => "corpus",
        Split::Discovery => "discovery",
        Split::Validation => "validation",
        Split::Test => "test",
    }
}

fn stages(r: &Record) -> Markup {
    let longest = r
        .stages
        .iter()
        .map(|s| s.wall_s)
        .filter(|s| s.is_finite())
        .fold(0.0, f64::max);
    html! {
        div {
            h3 { "Time" }
            table class="plain stages" {
                thead { tr { th scope="col" { "Stage" } th scope="col" { "Wall time" } th scope="col" { span class="unseen" { "Share" } } } }
                tbody {
                    @for s in &r.stages { (stage(s, longest)) }
                    tr class="total" { th scope="row" { "all" } td { (duration(r.wall_s)) } td {} }
                }
            }
        }
    }
}

fn stage(s: &StageTime, longest: f64) -> Markup {
    let width = if longest > 0.0 && s.wall_s.is_finite() {
        100.0 * s.wall_s / longest
    } else {
        0.0
    };
    html! {
        tr {
            th scope="row" { (s.name) @if s.cached { " " span class="tag quiet" title="done by a former run" { "kept" } } }
            td { (duration(s.wall_s)) }
            td class="stage-bar" {
                svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true" {
                    rect class="fill" x="0" y="0" width=(px(width)) height="8" {}
                }
            }
        }
    }
}

fn provenance(r: &Record) -> Markup {
    let row = |name: &str, value: Markup| html! { div { dt { (name) } dd { (value) } } };
    let m = &r.model;
    html! {
        h3 { "What exactly was run" }
        dl class="provenance" {
            (row("Model", html! {
                (or_none(&m.name)) ", " (m.architecture) ", " (m.n_layers) " layers, d_model " (count(m.d_model as u64)) ", vocabulary " (count(m.d_vocab as u64)) ", precision " (m.precision)
                br; span class="mono" { (m.file) }
                br; span class="mono hash" { (or_none(&m.sha256)) }
            }))
            (row("SAE", html! { (or_none(&r.sae.source)) br; span class="mono hash" { (or_none(&r.sae.sha256)) } }))
            (row("Plan", html! { span class="mono hash" { (or_none(&r.plan_sha256)) } }))
            (row("Software", html! { "demur " (r.versions.demur) ", record schema " (r.schema) }))
            (row("Machine", html! { (r.device.arch) ", " (r.device.isa) ", " (r.device.threads) " threads" }))
            (row("Seed", html! { (r.seed) }))
        }
        details {
            summary { "Plans of the arms" }
            dl class="provenance" {
                @for a in &r.arms {
                    (row(&a.title, html! { span class="mono hash" { (a.plan_sha256.as_deref().unwrap_or("no plan")) } }))
                }
            }
        }
    }
}

fn again(r: &Record) -> Markup {
    let run = shell(&format!("runs/{}", r.study));
    html! {
        h3 { "Run it again" }
        @match study_toml(&r.config) {
            Some(toml) => {
                p { "Save the study below as " span class="mono" { "study.toml" } ", and:" }
                pre class="listing" { code {
                    "demur study study.toml\n"
                    "demur chat --model " (shell(&r.model.name)) " --plan " (run) "/plan.toml --side-by-side\n"
                    "demur report " (run)
                } }
                details {
                    summary { "The study, defaults included" }
                    (listing(&toml))
                }
            }
            None => {
                details {
                    summary { "The study's config as JSON" }
                    (listing(&json(&r.config)))
                }
            }
        }
    }
}

/// `text` as one word of a shell's command.
fn shell(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// The config as the TOML that `demur study` reads. TOML has no null: what is not set is left out.
fn study_toml(config: &Value) -> Option<String> {
    fn without_nulls(v: &Value) -> Value {
        match v {
            Value::Object(map) => map
                .iter()
                .filter(|(_, v)| !v.is_null())
                .map(|(k, v)| (k.clone(), without_nulls(v)))
                .collect::<serde_json::Map<_, _>>()
                .into(),
            Value::Array(items) => items.iter().map(without_nulls).collect(),
            other => other.clone(),
        }
    }
    if !config.is_object() {
        return None;
    }
    toml::to_string_pretty(&without_nulls(config)).ok()
}

fn json(value: &Value) -> String {
    serde_json::to_string_pretty(value).unwrap_or_else(|_| DASH.to_owned())
}

fn listing(text: &str) -> Markup {
    let cut = super::format::clip(text, LISTING);
    html! {
        pre class="listing" tabindex="0" { code { (cut) } }
        @if cut.len() < text.len() {
            p class="note" { "Cut; the rest is in " span class="mono" { "record.json" } "." }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::study::config::Study;

    #[test]
    fn the_listed_study_is_the_study() {
        for name in ["quickstart", "phi3-refusal"] {
            let study = Study::load(name, &[]).unwrap();
            let config = serde_json::to_value(&study).unwrap();
            let toml = study_toml(&config).unwrap();
            let back: Study = toml::from_str(&toml).unwrap();
            assert_eq!(back, study, "{toml}");
        }
    }

    #[test]
    fn names_are_quoted_for_the_shell() {
        assert_eq!(shell("runs/quickstart"), "runs/quickstart");
        assert_eq!(shell("a; 'b'"), r"'a; '\''b'\'''");
    }

    #[test]
    fn what_is_no_study_is_shown_as_json() {
        assert_eq!(study_toml(&Value::Null), None);
    }
}
