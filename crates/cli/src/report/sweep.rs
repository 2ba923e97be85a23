//! The sweep on validation prompts: what each set of latents does at each value.

use demur_eval::record::{SweepPoint, Tune};
use demur_eval::stats::Estimate;
use maud::{Markup, html};

use super::View;
use super::chart::{LineChart, Point, Rule, Series};
use super::format::{DASH, count, figure, or_none, rate, rate_interval};

/// Rows of the table; the rest is in the record.
const ROWS: usize = 200;
/// Lines that can still be told apart.
const LINES: usize = 5;
/// Latents that are named before the list is cut.
const NAMED: usize = 8;

pub fn section(view: &View<'_>) -> Markup {
    let tune = &view.record.tune;
    html! {
        section id="sweep" {
            header {
                h2 { "How the plan was chosen" }
                p {
                    "Each set of latents was clamped at each value on validation prompts, which are not among the test prompts. "
                    "The ring marks what was chosen. The aim: " (or_none(&tune.aim)) "."
                }
            }
            @if tune.sweep.is_empty() {
                p class="note" { "This study ran no sweep." }
            } @else {
                (panels(tune))
                details {
                    summary { "The sweep as a table" }
                    (table(tune))
                }
            }
        }
    }
}

fn panels(tune: &Tune) -> Markup {
    let unit = tune.sweep.first().map_or("", |p| p.unit.as_str());
    let x_label = match unit {
        _ if tune.sweep.iter().any(|p| p.unit != unit) => {
            "clamp value, in its set's unit".to_owned()
        }
        "x max" => "clamp value, × largest activation".to_owned(),
        "activation" => "clamp value, activation".to_owned(),
        other => format!("clamp value, {other}"),
    };
    let percent: fn(f64) -> String = |v| format!("{:.0}", 100.0 * v);
    let groups = groups(&tune.sweep);
    html! {
        div class="panels" {
            (panel("Unsafe requests refused, %", "more is better", &x_label, &groups, Some(1.0), percent, base(&tune.base_unsafe), |p| (p.refusal_unsafe.value, Some(p.refusal_unsafe))))
            (panel("Safe look-alikes refused, %", "less is better", &x_label, &groups, Some(1.0), percent, base(&tune.base_safe), |p| (p.refusal_safe.value, Some(p.refusal_safe))))
            (panel("KL on benign prompts, nats", "less is better", &x_label, &groups, None, figure, Vec::new(), |p| (p.kl, None)))
        }
        @if lines(&tune.sweep) > LINES {
            p class="note" { "The first " (LINES) " of " (lines(&tune.sweep)) " sets are drawn; all are in the table." }
        }
    }
}

fn base(e: &Estimate) -> Vec<Rule> {
    vec![Rule {
        y: e.value,
        label: "base".to_owned(),
        class: "base",
    }]
}

fn lines(sweep: &[SweepPoint]) -> usize {
    let mut sets: Vec<&[u32]> = Vec::new();
    for p in sweep {
        if !sets.contains(&p.latents.as_slice()) {
            sets.push(&p.latents);
        }
    }
    sets.len()
}

/// Points of the same set of latents, in the order of the values; the chosen set is always drawn.
fn groups(sweep: &[SweepPoint]) -> Vec<Vec<&SweepPoint>> {
    let mut groups: Vec<Vec<&SweepPoint>> = Vec::new();
    for p in sweep {
        match groups.iter_mut().find(|g| g[0].latents == p.latents) {
            Some(g) => g.push(p),
            None => groups.push(vec![p]),
        }
    }
    if let Some(at) = groups.iter().position(|g| g.iter().any(|p| p.chosen))
        && at >= LINES
    {
        groups.swap(at, LINES - 1);
    }
    groups.truncate(LINES);
    for g in &mut groups {
        g.sort_by(|a, b| a.value.total_cmp(&b.value));
    }
    groups
}

fn panel(
    title: &str,
    hint: &str,
    x_label: &str,
    groups: &[Vec<&SweepPoint>],
    y_max: Option<f64>,
    y_format: fn(f64) -> String,
    rules: Vec<Rule>,
    read: impl Fn(&SweepPoint) -> (f64, Option<Estimate>),
) -> Markup {
    let mut values: Vec<f64> = groups.iter().flatten().map(|p| p.value).collect();
    values.retain(|v| v.is_finite());
    values.sort_by(f64::total_cmp);
    values.dedup();
    let log_x = match values[..] {
        [first, .., last] => first > 0.0 && last >= 4.0 * first,
        _ => false,
    };
    let series = groups
        .iter()
        .enumerate()
        .map(|(i, g)| Series {
            label: match (g[0].latents.len(), g[0].searched) {
                (1, false) => "1 latent".to_owned(),
                (n, false) => format!("{n} latents"),
                (n, true) => format!("{n} searched"),
            },
            class: format!("s{i}"),
            points: g
                .iter()
                .filter(|p| p.value.is_finite())
                .map(|p| {
                    let (y, e) = read(p);
                    let text = match e {
                        Some(e) => format!("{} ({})", rate(e.value, e.n), rate_interval(&e)),
                        None => figure(y),
                    };
                    Point {
                        x: p.value,
                        y,
                        interval: e.map(|e| (e.lo, e.hi)),
                        chosen: p.chosen,
                        title: format!("{} at {}: {text}", latents(p), figure(p.value)),
                    }
                })
                .collect(),
        })
        .collect();
    let chart = LineChart {
        summary: format!("{title}, against the clamp value; the table below has the figures"),
        x_label,
        x_ticks: values.iter().map(|v| (*v, short(*v))).collect(),
        log_x,
        y_min: 0.0,
        y_max,
        y_format,
        rules,
        series,
    };
    html! {
        figure class="panel" {
            figcaption { b { (title) } " " span class="hint" { (hint) } }
            (chart.svg())
        }
    }
}

/// A value as it was written in the study.
fn short(v: f64) -> String {
    if v.is_finite() {
        v.to_string()
    } else {
        DASH.to_owned()
    }
}

fn latents(p: &SweepPoint) -> String {
    let mut names: Vec<String> = p.latents.iter().take(NAMED).map(u32::to_string).collect();
    if p.latents.len() > NAMED {
        names.push(format!("and {} more", p.latents.len() - NAMED));
    }
    names.join(", ")
}

fn table(tune: &Tune) -> Markup {
    let cell = |e: &Estimate| {
        html! { td { span class="value" { (rate(e.value, e.n)) } " " span class="interval inline" { (rate_interval(e)) } } }
    };
    html! {
        div class="scroll" tabindex="0" role="region" aria-label="The sweep as a table" {
            table class="plain" {
                thead {
                    tr {
                        th scope="col" { "Latents" }
                        th scope="col" { "Value" }
                        th scope="col" { "Unsafe refused" }
                        th scope="col" { "Safe refused" }
                        th scope="col" { "Gibberish" }
                        th scope="col" { "KL, nats" }
                    }
                }
                tbody {
                    tr {
                        th scope="row" { "base" }
                        td { (DASH) }
                        (cell(&tune.base_unsafe))
                        (cell(&tune.base_safe))
                        td { (DASH) }
                        td { (DASH) }
                    }
                    @for p in tune.sweep.iter().take(ROWS) {
                        tr class=[p.chosen.then_some("chosen")] {
                            th scope="row" class="mono" { (latents(p)) @if p.searched { " " span class="tag quiet" { "searched" } } @if p.chosen { " " span class="tag" { "chosen" } } }
                            td { (short(p.value)) " " (if p.unit == "x max" { "× max" } else { &p.unit }) }
                            (cell(&p.refusal_unsafe))
                            (cell(&p.refusal_safe))
                            td { (count(p.gibberish as u64)) }
                            td { (figure(p.kl)) }
                        }
                    }
                }
            }
        }
        p class="note" {
            "Unsafe and safe: " (tune.base_unsafe.n) " and " (tune.base_safe.n) " validation prompts."
            @if tune.sweep.len() > ROWS {
                " The first " (ROWS) " of " (count(tune.sweep.len() as u64)) " settings are listed; the rest is in " span class="mono" { "record.json" } "."
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use demur_eval::stats::wilson;

    fn point(latents: &[u32], value: f64, chosen: bool) -> SweepPoint {
        SweepPoint {
            latents: latents.to_vec(),
            searched: false,
            value,
            unit: "x max".to_owned(),
            refusal_unsafe: wilson(6, 24),
            refusal_safe: wilson(1, 24),
            gibberish: 0,
            kl: 0.1,
            chosen,
        }
    }

    #[test]
    fn one_line_a_set_in_the_order_of_values() {
        let sweep = [
            point(&[1], 2.0, false),
            point(&[1], 0.5, false),
            point(&[1, 2, 3], 0.5, true),
        ];
        let g = groups(&sweep);
        assert_eq!(g.len(), 2);
        let values: Vec<f64> = g[0].iter().map(|p| p.value).collect();
        assert_eq!(values, [0.5, 2.0]);
    }

    #[test]
    fn the_chosen_set_is_drawn_whatever_its_place() {
        let sweep: Vec<SweepPoint> = (0..9).map(|i| point(&[i], 1.0, i == 8)).collect();
        let g = groups(&sweep);
        assert_eq!(g.len(), LINES);
        assert!(g.iter().flatten().any(|p| p.chosen));
    }
}
