//! The arms' table: every metric with its interval, differences from base, what it costs.

use demur_eval::record::{ArmResult, Difference, Metric};
use demur_eval::stats::Estimate;
use maud::{Markup, html};

use super::View;
use super::format::{
    DASH, change, drawable, figure, interval_of, p_value, px, rate, rate_interval,
};
use super::marker::swatch;

/// How a metric is shown.
struct Shown {
    name: String,
    hint: &'static str,
    is_rate: bool,
    /// Drawn from 0 to 100 %, in the colour of unsafe or safe requests.
    drawn: Option<&'static str>,
}

fn shown(metric: &str) -> Shown {
    let (name, hint, is_rate, drawn) = match metric {
        "refusal_unsafe" => ("Unsafe refused", "more is better", true, Some("unsafe")),
        "refusal_safe" => ("Safe refused", "less is better", true, Some("safe")),
        "refusal_logodds_unsafe" => ("Log-odds, unsafe", "of a refusal, first token", false, None),
        "refusal_logodds_safe" => ("Log-odds, safe", "of a refusal, first token", false, None),
        "gibberish" => ("Gibberish", "broken or empty replies", true, None),
        "kl" => ("KL from base", "nats a token, plain text", false, None),
        "ppl" => ("Perplexity", "plain text", false, None),
        other => (other, "", false, None),
    };
    Shown {
        name: name.to_owned(),
        hint,
        is_rate,
        drawn,
    }
}

pub fn section(view: &View<'_>) -> Markup {
    let arms = &view.record.arms;
    let columns = columns(arms);
    html! {
        section id="arms" {
            header {
                h2 { "Every arm, every figure" }
                p {
                    "All arms answered the same prompts with the same decoding. Differences are paired, prompt by prompt; "
                    "their p values are exact McNemar, Holm-adjusted over the arms. Arms that are not meant for use are controls: "
                    "what the SAE alone does, and what any push of this size does."
                }
            }
            @if arms.is_empty() {
                p class="note" { "No arm was run." }
            } @else {
                div class="scroll" tabindex="0" role="region" aria-label="Figures of all arms" {
                    table class="arms" {
                        thead {
                            tr {
                                th scope="col" { "Arm" }
                                @for c in &columns {
                                    (column_head(c, arms))
                                }
                            }
                        }
                        tbody {
                            @for (i, arm) in arms.iter().enumerate() {
                                tr class=(view.arm_class(i)) data-arm=(i) {
                                    th scope="row" {
                                        span class="arm-name" { (swatch(view, i)) " " (arm.title) }
                                        span class="arm-what" { (arm.description) }
                                    }
                                    @for c in &columns {
                                        (cell(view, i, arm, c))
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The metrics of all arms, once each, as (suite, metric).
fn columns(arms: &[ArmResult]) -> Vec<(&str, &str)> {
    let mut out: Vec<(&str, &str)> = Vec::new();
    for m in arms.iter().flat_map(|a| &a.metrics) {
        let key = (m.suite.as_str(), m.metric.as_str());
        if !out.contains(&key) {
            out.push(key);
        }
    }
    out
}

fn find<'m>(arm: &'m ArmResult, (suite, metric): (&str, &str)) -> Option<&'m Metric> {
    arm.metrics
        .iter()
        .find(|m| m.suite == suite && m.metric == metric)
}

/// The number of observations, if it is the same in all arms.
fn common_n(column: (&str, &str), arms: &[ArmResult]) -> Option<usize> {
    let mut all = arms
        .iter()
        .filter_map(|a| find(a, column))
        .map(|m| m.estimate.n);
    let first = all.next()?;
    all.all(|n| n == first).then_some(first)
}

fn column_head(column: &(&str, &str), arms: &[ArmResult]) -> Markup {
    let s = shown(column.1);
    html! {
        th scope="col" {
            (s.name)
            small {
                @if !s.hint.is_empty() { (s.hint) br; }
                @if let Some(n) = common_n(*column, arms) { "n = " (n) ", " }
                (column.0)
            }
        }
    }
}

fn cell(view: &View<'_>, index: usize, arm: &ArmResult, column: &(&str, &str)) -> Markup {
    let Some(m) = find(arm, *column) else {
        return html! { td { (DASH) } };
    };
    let (e, s) = (&m.estimate, shown(column.1));
    let versus = arm.versus_base.iter().find(|d| d.metric == column.1);
    let value = if s.is_rate {
        rate(e.value, e.n)
    } else {
        figure(e.value)
    };
    let interval = if s.is_rate {
        rate_interval(e)
    } else {
        interval_of(e, figure)
    };
    html! {
        td {
            span class="value" { (value) }
            @if interval != DASH {
                span class="interval" { (interval) }
            }
            @if common_n(*column, &view.record.arms).is_none() {
                span class="interval" { "n = " (e.n) }
            }
            @if let Some(kind) = s.drawn {
                (bar(e, kind))
            }
            @if index > 0 {
                @if let Some(d) = versus {
                    (difference(d))
                }
            }
        }
    }
}

/// The interval as a bar from 0 to 100 %, the value as a tick in it.
fn bar(e: &Estimate, kind: &str) -> Markup {
    html! {
        svg class={ "mini " (kind) } viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true" {
            line class="track" x1="0" x2="100" y1="5" y2="5" {}
            @if drawable(e) {
                @if e.lo.is_finite() && e.hi.is_finite() {
                    line class="range" x1=(px(100.0 * e.lo)) x2=(px(100.0 * e.hi)) y1="5" y2="5" {}
                }
                line class="value" x1=(px(100.0 * e.value)) x2=(px(100.0 * e.value)) y1="0" y2="10" {}
            }
        }
    }
}

fn difference(d: &Difference) -> Markup {
    let e = &d.estimate;
    let digits = usize::from(e.n >= 500);
    let points = |v: f64| change(100.0 * v, digits);
    html! {
        span class="versus" title=(format!("paired difference from base over {} prompts", e.n)) {
            b { (points(e.value)) }
            @if e.lo.is_finite() && e.hi.is_finite() {
                " (" (interval_of(e, points)) ")"
            }
            " points"
            br;
            (p_value(d.p))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use demur_eval::stats::wilson;

    fn arm(n: usize) -> ArmResult {
        ArmResult {
            arm: "a".to_owned(),
            title: "A".to_owned(),
            description: String::new(),
            plan_sha256: None,
            metrics: vec![Metric {
                suite: "pairs".to_owned(),
                metric: "gibberish".to_owned(),
                estimate: wilson(1, n),
            }],
            versus_base: Vec::new(),
        }
    }

    #[test]
    fn n_stands_in_the_head_only_if_it_is_common() {
        let column = ("pairs", "gibberish");
        assert_eq!(common_n(column, &[arm(60), arm(60)]), Some(60));
        assert_eq!(common_n(column, &[arm(60), arm(59)]), None);
        assert_eq!(common_n(("other", "gibberish"), &[arm(60)]), None);
    }

    #[test]
    fn bars_are_to_scale() {
        let e = Estimate {
            value: 0.5,
            lo: 0.375,
            hi: 0.625,
            n: 60,
        };
        let svg = bar(&e, "unsafe").into_string();
        assert!(
            svg.contains(r#"class="range" x1="37.5" x2="62.5""#),
            "{svg}"
        );
        assert!(svg.contains(r#"class="value" x1="50" x2="50""#), "{svg}");
    }
}
