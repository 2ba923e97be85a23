//! All sites beside each other: where unsafe requests differ from look-alikes, and where the direction of
//! refusal acts.

use demur_eval::stats::Estimate;
use demur_features::table::{DirectionEvidence, Separation, SiteEvidence};
use maud::{Markup, html};

use super::chart::{LineChart, Point, Rule, Series};
use super::format::{DASH, change, figure, fixed, interval_of};

/// A line of a drawing: its name and what it reads of a site.
type Line = (&'static str, fn(&SiteEvidence) -> Option<Estimate>);

/// The figures of a comparison; `chosen` is the SAE's site.
pub fn figures(sites: &[SiteEvidence], chosen: &str) -> Markup {
    let separation: [Line; 4] = [
        ("means, last", |s| Some(s.last.direction)),
        ("probe, last", |s| Some(s.last.probe)),
        ("means, all", |s| Some(s.mean.direction)),
        ("probe, all", |s| Some(s.mean.probe)),
    ];
    let acting: [Line; 2] = [
        ("unsafe", |s| Some(refusal(s)?.refusal_logodds_delta_unsafe)),
        ("safe", |s| Some(refusal(s)?.refusal_logodds_delta_safe)),
    ];
    let acts = sites.iter().any(|s| s.refusal.is_some());
    html! {
        div class="beside" id="sites" {
            h3 { "Sites" }
            p class="prose" {
                "Unsafe validation prompts against their look-alikes at every site, by the difference of the means of discovery prompts and by a linear probe on them, of the residual at the last prompt token and of its mean over the user's and the template's. "
                @if acts { "And what is added to the refusal log-odds if the mean of the refused prompts less that of the others, at the last prompt token, is added there to all tokens. " }
                "The ring is the site of the SAE."
            }
            div class="panels two" {
                (panel("AUROC, unsafe against look-alikes", sites, chosen, &separation, (0.4, Some(1.0)), "chance", 0.5))
                @if acts { (panel("Refusal log-odds, nats", sites, chosen, &acting, (lowest(sites), None), "base", 0.0)) }
            }
            details {
                summary { "The sites as a table" }
                (table(sites, chosen))
            }
        }
    }
}

fn refusal(s: &SiteEvidence) -> Option<&DirectionEvidence> {
    s.refusal.as_ref()
}

/// Of all rises the least, at most 0, rounded down to a whole number.
fn lowest(sites: &[SiteEvidence]) -> f64 {
    let both = sites.iter().filter_map(refusal).flat_map(|r| {
        [
            r.refusal_logodds_delta_unsafe.value,
            r.refusal_logodds_delta_safe.value,
        ]
    });
    both.filter(|v| v.is_finite()).fold(0.0, f64::min).floor()
}

fn panel(
    title: &str,
    sites: &[SiteEvidence],
    chosen: &str,
    lines: &[Line],
    (y_min, y_max): (f64, Option<f64>),
    rule: &str,
    at: f64,
) -> Markup {
    let series = lines.iter().enumerate().map(|(i, (name, read))| {
        let point = |(x, site): (usize, &SiteEvidence)| {
            let e = read(site)?;
            Some(Point {
                x: x as f64,
                y: e.value,
                interval: None,
                chosen: site.site == chosen,
                title: format!("{}, {name}: {}", site.site, figure(e.value)),
            })
        };
        Series {
            label: (*name).to_owned(),
            class: format!("s{i}"),
            points: sites.iter().enumerate().filter_map(point).collect(),
        }
    });
    let chart = LineChart {
        summary: format!("{title}, by site; the table below has the figures"),
        x_label: "block",
        x_ticks: (0..sites.len())
            .map(|i| (i as f64, i.to_string()))
            .collect(),
        log_x: false,
        y_min,
        y_max,
        y_format: figure,
        rules: vec![Rule {
            y: at,
            label: rule.to_owned(),
            class: "base",
        }],
        series: series.collect(),
    };
    html! {
        figure class="panel" {
            figcaption { b { (title) } }
            (chart.svg())
        }
    }
}

fn table(sites: &[SiteEvidence], chosen: &str) -> Markup {
    let auroc = |e: &Estimate| html! { td { (fixed(e.value, 3)) " " span class="interval inline" { (interval_of(e, |v| fixed(v, 2))) } } };
    let rise = |e: Option<&Estimate>| {
        html! { td { @if let Some(e) = e { (change(e.value, 2)) " " span class="interval inline" { (interval_of(e, |v| change(v, 2))) } } @else { (DASH) } } }
    };
    html! {
        div class="scroll" tabindex="0" role="region" aria-label="The sites as a table" {
            table class="plain" {
                thead {
                    tr {
                        @for name in ["Site", "Means, last token", "Probe, last token", "Means, all tokens", "Probe, all tokens", "Refusal, unsafe", "Refusal, safe", "KL, nats", "Length of the direction"] {
                            th scope="col" { (name) }
                        }
                    }
                }
                tbody {
                    @for s in sites {
                        @let Separation { direction, probe } = &s.last;
                        tr class=[(s.site == chosen).then_some("chosen")] {
                            th scope="row" class="mono" { (s.site) }
                            (auroc(direction)) (auroc(probe)) (auroc(&s.mean.direction)) (auroc(&s.mean.probe))
                            (rise(refusal(s).map(|r| &r.refusal_logodds_delta_unsafe)))
                            (rise(refusal(s).map(|r| &r.refusal_logodds_delta_safe)))
                            td { (refusal(s).map_or_else(|| DASH.to_owned(), |r| figure(r.kl_benign))) }
                            td { (refusal(s).map_or_else(|| DASH.to_owned(), |r| figure(r.relative_norm))) }
                        }
                    }
                }
            }
        }
        p class="note" { "The length is relative to the mean length of the residual at the last prompt token." }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use demur_eval::stats::mean;

    fn site(name: &str, auroc: f64, rise: Option<f64>) -> SiteEvidence {
        let flat = |v: f64| mean(&[v, v]);
        let separation = Separation {
            direction: flat(auroc),
            probe: flat(auroc),
        };
        SiteEvidence {
            site: name.to_owned(),
            last: separation.clone(),
            mean: separation,
            refusal: rise.map(|r| DirectionEvidence {
                relative_norm: 0.25,
                refusal_logodds_delta_unsafe: flat(r),
                refusal_logodds_delta_safe: flat(-r),
                kl_benign: 0.01,
            }),
        }
    }

    #[test]
    fn sites_are_drawn_and_the_sae_s_is_ringed() {
        let sites = [site("a", 0.7, Some(1.5)), site("b", 1.0, Some(2.5))];
        let page = figures(&sites, "b").into_string();
        // four lines and two, each with one ring
        assert_eq!(page.matches(r#"class="chosen" cx"#).count(), 6, "{page}");
        // 0.4 to 1 is 192 to 14: 0.7 is in the middle
        assert!(page.contains(r#"cy="103""#), "{page}");
        assert!(page.contains("−2.50") && page.contains("0.700"), "{page}");
        assert_eq!(lowest(&sites), -3.0);
        let unsure = figures(&[site("a", f64::NAN, None)], "b").into_string();
        assert!(
            !unsure.contains("NaN") && !unsure.contains("Refusal log-odds"),
            "{unsure}"
        );
    }
}
