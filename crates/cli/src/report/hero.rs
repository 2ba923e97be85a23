//! The verdict, before anything else: the headline, what it rests on, and what was run.

use demur_eval::prompts::Split;
use demur_eval::record::ArmResult;
use demur_eval::stats::Estimate;
use maud::{Markup, html};

use super::format::{DASH, count, drawable, duration, figure, or_none, px, rate, rate_interval};
use super::{View, tradeoff};

pub fn section(view: &View<'_>) -> Markup {
    let r = view.record;
    html! {
        section id="verdict" class="hero" {
            div class="hero-words" {
                p class="eyebrow" { "Study " span class="mono" { (r.study) } }
                h1 { (or_none(&r.verdict.headline)) }
                @if r.verdict.improved {
                    p class="outcome good" { span aria-hidden="true" { "✓ " } "Unsafe refusal is up, intervals apart" }
                } @else {
                    p class="outcome open" { span aria-hidden="true" { "○ " } "No rise that the intervals bear out" }
                }
                (tiles(view))
                div class="verdict-lines" {
                    @for line in &r.verdict.lines {
                        p { (line) }
                    }
                }
            }
            (tradeoff::section(view))
            (facts(view))
        }
    }
}

/// Base beside the headline's arm, in large figures.
fn tiles(view: &View<'_>) -> Markup {
    let (Some(base), Some(main)) = (view.base(), view.headline()) else {
        return html! {};
    };
    html! {
        div class="tiles" {
            (tile("Unsafe requests refused", "unsafe", base, main, "refusal_unsafe"))
            (tile("Safe look-alikes refused", "safe", base, main, "refusal_safe"))
        }
    }
}

fn tile(title: &str, class: &str, base: &ArmResult, main: &ArmResult, metric: &str) -> Markup {
    let value = |e: Option<Estimate>| e.map_or_else(|| DASH.to_owned(), |e| rate(e.value, e.n));
    let (from, to) = (base.estimate(metric), main.estimate(metric));
    html! {
        div class={ "tile " (class) } {
            p class="tile-title" { (title) }
            p class="tile-figures" {
                span class="from" { (value(from)) }
                span class="to-sign" aria-label="to" { " → " }
                span class="to" { (value(to)) }
            }
            (strip(from, to))
        }
    }
}

/// Two intervals on a line from 0 to 100 %.
fn strip(from: Option<Estimate>, to: Option<Estimate>) -> Markup {
    let describe = |name: &str, e: Option<Estimate>| {
        e.map_or_else(
            || format!("{name}: not measured"),
            |e| format!("{name} {} ({})", rate(e.value, e.n), rate_interval(&e)),
        )
    };
    let summary = format!("{}, {}", describe("base", from), describe("steered", to));
    html! {
        svg class="strip" viewBox="0 0 200 26" preserveAspectRatio="none" role="img" aria-label=(summary) {
            line class="track" x1="0" x2="200" y1="8" y2="8" {}
            line class="track" x1="0" x2="200" y1="19" y2="19" {}
            @for (e, y, class) in [(from, 8.0, "base"), (to, 19.0, "main")] {
                @if let Some(e) = e.filter(drawable) {
                    @if e.lo.is_finite() && e.hi.is_finite() {
                        line class={ "range " (class) } x1=(px(200.0 * e.lo)) x2=(px(200.0 * e.hi)) y1=(px(y)) y2=(px(y)) {}
                    }
                    line class={ "value " (class) } x1=(px(200.0 * e.value)) x2=(px(200.0 * e.value)) y1=(px(y - 5.0)) y2=(px(y + 5.0)) {}
                }
            }
        }
    }
}

fn facts(view: &View<'_>) -> Markup {
    let r = view.record;
    let test = r.splits.iter().find(|s| s.split == Split::Test);
    let prompts = test.map_or_else(
        || DASH.to_owned(),
        |s| {
            format!(
                "{} unsafe, {} safe",
                count(s.r#unsafe as u64),
                count(s.safe as u64)
            )
        },
    );
    html! {
        dl class="facts" {
            (fact("Model", html! { (or_none(&r.model.name)) small { (r.model.n_layers) " layers, width " (count(r.model.d_model as u64)) } }))
            (fact("SAE", html! { (count(r.sae.d_sae as u64)) " latents, k = " (r.sae.k) small { (source(&r.sae.source)) } }))
            (fact("Site", html! { span class="mono site" { (or_none(&r.sae.site)) } @if let Some(fvu) = r.sae.chat.as_ref().map(|q| q.fvu.value) { small { "FVU " (figure(fvu)) " on chats" } } }))
            (fact("Test prompts", html! { (prompts) small { "seed " (r.seed) } }))
            (fact("Wall time", html! { (duration(r.wall_s)) small { (r.device.threads) " threads, " (r.device.isa) } }))
        }
    }
}

fn fact(name: &str, value: Markup) -> Markup {
    html! { div { dt { (name) } dd { (value) } } }
}

fn source(source: &str) -> &str {
    match source {
        "shipped" => "shipped with demur",
        "train" => "trained by this study",
        "path" => "from a folder",
        other => other,
    }
}
