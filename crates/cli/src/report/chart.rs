//! Frames and line charts as inline SVG. Colours are classes, so that the page's light and dark
//! schemes apply to drawings too.

use maud::{Markup, html};

use super::format::px;
use super::labels::spread;

/// From values to pixels along one axis.
#[derive(Debug, Clone, Copy)]
pub struct Axis {
    pub lo: f64,
    pub hi: f64,
    /// Equal ratios, not equal differences, are equal distances.
    pub log: bool,
    /// Pixel of `lo`.
    pub start: f64,
    /// Pixel of `hi`.
    pub end: f64,
}

impl Axis {
    /// The pixel of `v`, held inside the axis.
    pub fn at(&self, v: f64) -> f64 {
        let scale = |v: f64| if self.log { v.ln() } else { v };
        let (lo, hi) = (scale(self.lo), scale(self.hi));
        let t = if hi > lo {
            (scale(v) - lo) / (hi - lo)
        } else {
            0.5
        };
        self.start + t.clamp(0.0, 1.0) * (self.end - self.start)
    }
}

/// The smallest of 1, 2, 2.5, 5 times a power of ten that is at least `v`.
pub fn nice_ceiling(v: f64) -> f64 {
    if !(v.is_finite() && v > 0.0) {
        return 1.0;
    }
    let power = 10f64.powf(v.log10().floor());
    [1.0, 2.0, 2.5, 5.0, 10.0]
        .into_iter()
        .map(|m| m * power)
        .find(|c| *c >= v * (1.0 - 1e-9))
        .unwrap_or(v)
}

/// A line through points.
pub struct Series {
    /// Written at the line's end.
    pub label: String,
    pub class: String,
    pub points: Vec<Point>,
}

/// A point of a line; one whose `y` is no number interrupts the line.
pub struct Point {
    pub x: f64,
    pub y: f64,
    pub interval: Option<(f64, f64)>,
    pub chosen: bool,
    /// Shown when pointed at.
    pub title: String,
}

/// A line with a name across the whole chart.
pub struct Rule {
    pub y: f64,
    pub label: String,
    pub class: &'static str,
}

/// A small chart of lines: one panel of several.
pub struct LineChart<'a> {
    /// What is drawn, for who can't see it.
    pub summary: String,
    pub x_label: &'a str,
    /// Ticks of the x axis.
    pub x_ticks: Vec<(f64, String)>,
    pub log_x: bool,
    /// Bottom of the y axis.
    pub y_min: f64,
    /// Top of the y axis; the least round number above the values, if not given.
    pub y_max: Option<f64>,
    pub y_format: fn(f64) -> String,
    pub rules: Vec<Rule>,
    pub series: Vec<Series>,
}

const WIDTH: f64 = 340.0;
const HEIGHT: f64 = 236.0;
const LEFT: f64 = 46.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 44.0;
/// Least distance of two labels, baseline to baseline.
const LINE: f64 = 14.0;

impl LineChart<'_> {
    /// The axes.
    pub fn axes(&self) -> (Axis, Axis) {
        let points = || self.series.iter().flat_map(|s| &s.points);
        let xs = || {
            points()
                .map(|p| p.x)
                .chain(self.x_ticks.iter().map(|t| t.0))
        };
        let y_max = self.y_max.unwrap_or_else(|| {
            let top = points()
                .flat_map(|p| [p.y, p.interval.map_or(p.y, |i| i.1)])
                .chain(self.rules.iter().map(|r| r.y))
                .filter(|v| v.is_finite())
                .fold(0.0, f64::max);
            nice_ceiling(top)
        });
        let right = if self.series.iter().all(|s| s.label.is_empty()) {
            16.0
        } else {
            72.0
        };
        let x = Axis {
            lo: xs().filter(|v| v.is_finite()).fold(f64::INFINITY, f64::min),
            hi: xs()
                .filter(|v| v.is_finite())
                .fold(f64::NEG_INFINITY, f64::max),
            log: self.log_x,
            start: LEFT + 10.0,
            end: WIDTH - right,
        };
        let y = Axis {
            lo: self.y_min,
            hi: y_max,
            log: false,
            start: HEIGHT - BOTTOM,
            end: TOP,
        };
        (x, y)
    }

    pub fn svg(&self) -> Markup {
        let (x, y) = self.axes();
        html! {
            svg class="chart" viewBox=(format!("0 0 {WIDTH} {HEIGHT}")) role="img" aria-label=(self.summary) {
                @for i in 0..=4 {
                    @let v = y.lo + (y.hi - y.lo) * f64::from(i) / 4.0;
                    line class=(if i == 0 { "axis" } else { "grid" }) x1=(px(LEFT)) x2=(px(x.end + 6.0)) y1=(px(y.at(v))) y2=(px(y.at(v))) {}
                    text class="tick" x=(px(LEFT - 7.0)) y=(px(y.at(v) + 4.0)) text-anchor="end" { ((self.y_format)(v)) }
                }
                @for (v, label) in thinned(&self.x_ticks, &x) {
                    text class="tick" x=(px(x.at(*v))) y=(px(y.start + 17.0)) text-anchor="middle" { (label) }
                }
                text class="axis-title" x=(px((LEFT + x.end) / 2.0)) y=(px(HEIGHT - 6.0)) text-anchor="middle" { (self.x_label) }
                @for rule in &self.rules {
                    @if rule.y.is_finite() {
                        line class={ "rule " (rule.class) } x1=(px(LEFT)) x2=(px(x.end + 6.0)) y1=(px(y.at(rule.y))) y2=(px(y.at(rule.y))) {}
                    }
                }
                @for (i, s) in self.series.iter().enumerate() {
                    (line(s, i, self.series.len(), &x, &y))
                }
                (self.end_labels(&x, &y))
            }
        }
    }

    /// The names of lines and rules, right of the plot, moved apart.
    fn end_labels(&self, x: &Axis, y: &Axis) -> Markup {
        let mut labels: Vec<(f64, &str, String)> = Vec::new();
        for s in &self.series {
            if let Some(last) = s.points.iter().rev().find(|p| p.y.is_finite()) {
                let class = format!("end-label {}", s.class);
                labels.push((y.at(last.y), &s.label, class));
            }
        }
        for r in self.rules.iter().filter(|r| r.y.is_finite()) {
            labels.push((y.at(r.y), &r.label, format!("end-label {}", r.class)));
        }
        labels.retain(|l| !l.1.is_empty());
        let wanted: Vec<f64> = labels.iter().map(|l| l.0).collect();
        let places = spread(&wanted, LINE, y.end, y.start);
        html! {
            @for ((_, label, class), place) in labels.iter().zip(places) {
                text class=(class) x=(px(x.end + 11.0)) y=(px(place + 4.0)) { (label) }
            }
        }
    }
}

/// The ticks that have room for their labels.
fn thinned<'t>(ticks: &'t [(f64, String)], x: &Axis) -> Vec<&'t (f64, String)> {
    let mut out: Vec<&(f64, String)> = Vec::new();
    for t in ticks {
        let room = |last: &&(f64, String)| {
            let chars = (last.1.chars().count() + t.1.chars().count()) as f64;
            x.at(t.0) - x.at(last.0) > 3.4 * chars + 8.0
        };
        if out.last().is_none_or(room) {
            out.push(t);
        }
    }
    out
}

fn line(s: &Series, index: usize, of: usize, x: &Axis, y: &Axis) -> Markup {
    // Intervals of several lines stand beside each other, not on each other.
    let aside = 3.0 * (index as f64 - (of as f64 - 1.0) / 2.0);
    let few = s.points.len() <= 24;
    html! {
        g class={ "series " (s.class) } {
            @for p in s.points.iter().filter(|p| p.y.is_finite()) {
                @if let Some((lo, hi)) = p.interval {
                    @if lo.is_finite() && hi.is_finite() {
                        line class="whisker" x1=(px(x.at(p.x) + aside)) x2=(px(x.at(p.x) + aside)) y1=(px(y.at(lo))) y2=(px(y.at(hi))) {}
                    }
                }
            }
            @for d in strokes(s, x, y) {
                path class="line" d=(d) {}
            }
            @if few {
                @for p in s.points.iter().filter(|p| p.y.is_finite()) {
                    g class="dot" {
                        title { (p.title) }
                        @if p.chosen {
                            circle class="chosen" cx=(px(x.at(p.x))) cy=(px(y.at(p.y))) r="8.5" {}
                        }
                        circle class="point" cx=(px(x.at(p.x))) cy=(px(y.at(p.y))) r="4" {}
                    }
                }
            }
        }
    }
}

/// The line as SVG paths, a new one after every gap.
fn strokes(s: &Series, x: &Axis, y: &Axis) -> Vec<String> {
    s.points
        .split(|p| !p.y.is_finite())
        .filter(|run| run.len() > 1)
        .map(|run| {
            let places: Vec<String> = run
                .iter()
                .map(|p| format!("{} {}", px(x.at(p.x)), px(y.at(p.y))))
                .collect();
            format!("M{}", places.join("L"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: &[(f64, f64)]) -> LineChart<'static> {
        LineChart {
            summary: String::new(),
            x_label: "x",
            x_ticks: points.iter().map(|p| (p.0, p.0.to_string())).collect(),
            log_x: true,
            y_min: 0.0,
            y_max: None,
            y_format: |v| v.to_string(),
            rules: Vec::new(),
            series: vec![Series {
                label: String::new(),
                class: "s0".to_owned(),
                points: points
                    .iter()
                    .map(|&(x, y)| Point {
                        x,
                        y,
                        interval: None,
                        chosen: false,
                        title: String::new(),
                    })
                    .collect(),
            }],
        }
    }

    #[test]
    fn round_numbers() {
        for (v, expect) in [
            (0.0, 1.0),
            (f64::NAN, 1.0),
            (0.3, 0.5),
            (1.0, 1.0),
            (21.0, 25.0),
            (0.0021, 0.0025),
            (6.0, 10.0),
        ] {
            let got = nice_ceiling(v);
            assert!((got - expect).abs() < 1e-12 * expect, "{v}: {got}");
        }
    }

    #[test]
    fn points_are_where_the_scales_say() {
        // x: 1..4 on a log scale over 56..324, so 2 is at the middle, 190.
        // y: 0..0.5 over 192..14, so 0.25 is at 103.
        let c = chart(&[(1.0, 0.0), (2.0, 0.25), (4.0, 0.5)]);
        let (x, y) = c.axes();
        assert_eq!((x.at(2.0), y.at(0.25)), (190.0, 103.0));
        let svg = c.svg().into_string();
        assert!(svg.contains(r#"d="M56 192L190 103L324 14""#), "{svg}");
        assert!(svg.contains(r#"cx="190" cy="103""#), "{svg}");
    }

    #[test]
    fn a_gap_interrupts_the_line() {
        let c = chart(&[
            (1.0, 0.0),
            (2.0, 0.5),
            (3.0, f64::NAN),
            (4.0, 0.5),
            (5.0, 0.0),
        ]);
        let svg = c.svg().into_string();
        assert_eq!(svg.matches(r#"class="line""#).count(), 2);
        assert!(!svg.contains("NaN"), "{svg}");
    }

    #[test]
    fn values_outside_are_held_inside() {
        let axis = Axis {
            lo: 0.0,
            hi: 1.0,
            log: false,
            start: 10.0,
            end: 20.0,
        };
        assert_eq!(
            (axis.at(2.0), axis.at(-1.0), axis.at(0.5)),
            (20.0, 10.0, 15.0)
        );
        let one_value = Axis { hi: 0.0, ..axis };
        assert_eq!(one_value.at(0.0), 15.0);
    }
}
