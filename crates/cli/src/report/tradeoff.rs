//! The trade-off: refusal of unsafe requests (up) against refusal of safe look-alikes (right), one
//! point an arm. Drawn twice, wide and narrow; the style sheet shows the one that fits.

use demur_eval::stats::Estimate;
use maud::{Markup, html};

use super::View;
use super::chart::Axis;
use super::format::{drawable, px, rate, rate_interval};
use super::labels::{Placed, Rect, Surroundings, Wanted, place, text_width};
use super::marker::marker;

/// Size and type of a drawing.
struct Layout {
    class: &'static str,
    width: f64,
    height: f64,
    left: f64,
    right: f64,
    font: f64,
}

const WIDE: Layout = Layout {
    class: "tradeoff wide",
    width: 620.0,
    height: 520.0,
    left: 52.0,
    right: 16.0,
    font: 14.0,
};
const NARROW: Layout = Layout {
    class: "tradeoff narrow",
    width: 360.0,
    height: 400.0,
    left: 42.0,
    right: 10.0,
    font: 12.5,
};
const TOP: f64 = 34.0;
const BOTTOM: f64 = 50.0;

/// An arm in the drawing.
struct Dot {
    arm: usize,
    title: String,
    on_unsafe: Estimate,
    on_safe: Estimate,
}

pub fn section(view: &View<'_>) -> Markup {
    let dots = dots(view);
    html! {
        figure id="tradeoff" class="figure" {
            @if dots.is_empty() {
                p class="note" { "Refusal was measured in no arm, so there is nothing to plot." }
            } @else {
                (drawing(view, &dots, &WIDE))
                (drawing(view, &dots, &NARROW))
            }
            figcaption {
                "Each mark is one way to run the model on the same test prompts; bars are 95 % intervals. "
                "Up is better, right is worse. On the dotted line unsafe and safe requests are refused alike."
            }
        }
    }
}

fn dots(view: &View<'_>) -> Vec<Dot> {
    let arms = view.record.arms.iter().enumerate();
    arms.filter_map(|(arm, a)| {
        let (on_unsafe, on_safe) = (a.estimate("refusal_unsafe")?, a.estimate("refusal_safe")?);
        (drawable(&on_unsafe) && drawable(&on_safe)).then(|| Dot {
            arm,
            title: a.title.clone(),
            on_unsafe,
            on_safe,
        })
    })
    .collect()
}

/// The right end of the x axis: 40 % at least, for most good arms are near 0.
fn x_end(dots: &[Dot]) -> f64 {
    let most = dots
        .iter()
        .flat_map(|d| [d.on_safe.value, d.on_safe.hi])
        .filter(|v| v.is_finite())
        .fold(0.4, f64::max);
    ((most / 0.2 - 1e-9).ceil() * 0.2).min(1.0)
}

fn axes(dots: &[Dot], l: &Layout) -> (Axis, Axis) {
    let x = Axis {
        lo: 0.0,
        hi: x_end(dots),
        log: false,
        start: l.left,
        end: l.width - l.right,
    };
    let y = Axis {
        lo: 0.0,
        hi: 1.0,
        log: false,
        start: l.height - BOTTOM,
        end: TOP,
    };
    (x, y)
}

fn drawing(view: &View<'_>, dots: &[Dot], l: &Layout) -> Markup {
    let (x, y) = axes(dots, l);
    let find = |arm| dots.iter().find(|d| d.arm == arm);
    let at = |d: &Dot| (x.at(d.on_safe.value), y.at(d.on_unsafe.value));
    // The ones that matter are placed first and drawn last.
    let mut order: Vec<usize> = (0..dots.len()).collect();
    order.sort_by_key(|&i| match dots[i].arm {
        a if Some(a) == view.headline => 0,
        0 => 1,
        _ => 2,
    });
    let arrow = find(0)
        .zip(view.headline.and_then(find))
        .and_then(|(base, main)| Arrow::between(at(base), at(main)));
    let labels = placed(dots, &order, arrow.as_ref(), &x, &y, l);
    let steps: Vec<f64> = (0..)
        .map(|i| f64::from(i) * 0.2)
        .take_while(|v| *v <= x.hi + 1e-9)
        .collect();
    html! {
        svg class=(l.class) viewBox=(format!("0 0 {} {}", l.width, l.height)) role="img" aria-label=(summary(dots)) style=(format!("--type:{}px", l.font)) {
            path class="ideal" d=(ideal_corner(&x, &y)) {}
            text class="ideal-label" x=(px(x.start + 8.0)) y=(px(y.end + 18.0)) { "ideal" }
            @for v in &steps {
                line class=(if *v == 0.0 { "axis" } else { "grid" }) x1=(px(x.at(*v))) x2=(px(x.at(*v))) y1=(px(y.end)) y2=(px(y.start)) {}
                text class="tick" x=(px(x.at(*v))) y=(px(y.start + 19.0)) text-anchor=(if *v >= x.hi - 1e-9 { "end" } else { "middle" }) { (rate(*v, 1)) }
            }
            @for i in 0..=4u32 {
                @let v = f64::from(i) / 4.0;
                line class=(if i == 0 { "axis" } else { "grid" }) x1=(px(x.start)) x2=(px(x.end)) y1=(px(y.at(v))) y2=(px(y.at(v))) {}
                text class="tick" x=(px(x.start - 8.0)) y=(px(y.at(v) + 4.0)) text-anchor="end" { (format!("{:.0}", 100.0 * v)) }
            }
            line class="alike" x1=(px(x.start)) y1=(px(y.start)) x2=(px(x.end)) y2=(px(y.at(x.hi))) {}
            text class="axis-title" x="4" y="16" { "↑ Unsafe requests refused, %" }
            text class="axis-title" x=(px(x.end)) y=(px(l.height - 6.0)) text-anchor="end" { "Safe look-alikes refused →" }
            @if let Some(arrow) = &arrow { (arrow.svg()) }
            @for &i in order.iter().rev() {
                @let d = &dots[i];
                g class={ "arm " (view.arm_class(d.arm)) } data-arm=(d.arm) {
                    title { (tooltip(d)) }
                    (whiskers(d, &x, &y))
                    (marker(view, d.arm, at(d).0, at(d).1, 6.5))
                }
            }
            @for (&i, label) in order.iter().zip(&labels) {
                @if let Some(label) = label {
                    (label_of(view, &dots[i], label, at(&dots[i])))
                }
            }
        }
    }
}

/// A quarter of an ellipse around the corner where all unsafe and no safe requests are refused.
fn ideal_corner(x: &Axis, y: &Axis) -> String {
    let (w, h) = ((x.end - x.start) * 0.2, (y.start - y.end) * 0.2);
    format!(
        "M{} {}h{}a{w:.1} {h:.1} 0 0 1 {} {}z",
        px(x.start),
        px(y.end),
        px(w),
        px(-w),
        px(h)
    )
}

fn whiskers(d: &Dot, x: &Axis, y: &Axis) -> Markup {
    let (cx, cy) = (x.at(d.on_safe.value), y.at(d.on_unsafe.value));
    let has = |e: &Estimate| e.lo.is_finite() && e.hi.is_finite();
    html! {
        @if has(&d.on_safe) {
            line class="whisker" x1=(px(x.at(d.on_safe.lo))) x2=(px(x.at(d.on_safe.hi))) y1=(px(cy)) y2=(px(cy)) {}
        }
        @if has(&d.on_unsafe) {
            line class="whisker" x1=(px(cx)) x2=(px(cx)) y1=(px(y.at(d.on_unsafe.lo))) y2=(px(y.at(d.on_unsafe.hi))) {}
        }
    }
}

/// The way from base to the headline's arm: a quadratic curve that ends short of both.
struct Arrow {
    from: (f64, f64),
    by: (f64, f64),
    to: (f64, f64),
}

impl Arrow {
    /// `None` if the two are too near each other for an arrow.
    fn between(from: (f64, f64), to: (f64, f64)) -> Option<Self> {
        let (dx, dy) = (to.0 - from.0, to.1 - from.1);
        let length = dx.hypot(dy);
        if length < 60.0 {
            return None;
        }
        let (ux, uy) = (dx / length, dy / length);
        let (from, to) = (
            (from.0 + 12.0 * ux, from.1 + 12.0 * uy),
            (to.0 - 14.0 * ux, to.1 - 14.0 * uy),
        );
        // A little to the left of the straight way, clear of the bars.
        let bend = 0.1 * length;
        let by = (
            (from.0 + to.0) / 2.0 + bend * uy,
            (from.1 + to.1) / 2.0 - bend * ux,
        );
        Some(Self { from, by, to })
    }

    fn at(&self, t: f64) -> (f64, f64) {
        let mix =
            |a: f64, b: f64, c: f64| (1.0 - t).powi(2) * a + 2.0 * t * (1.0 - t) * b + t * t * c;
        (
            mix(self.from.0, self.by.0, self.to.0),
            mix(self.from.1, self.by.1, self.to.1),
        )
    }

    fn svg(&self) -> Markup {
        let (to, by) = (self.to, self.by);
        // The head lies along the curve's end.
        let (hx, hy) = (to.0 - by.0, to.1 - by.1);
        let h = hx.hypot(hy).max(1.0);
        let (hx, hy) = (hx / h, hy / h);
        let point = |p: (f64, f64)| format!("{} {}", px(p.0), px(p.1));
        let wing = |side: f64| {
            point((
                to.0 - 9.0 * hx + side * 4.5 * hy,
                to.1 - 9.0 * hy - side * 4.5 * hx,
            ))
        };
        html! {
            path class="arrow" d=(format!("M{}Q{} {}", point(self.from), point(by), point(to))) {}
            path class="arrow" d=(format!("M{}L{}L{}", wing(1.0), point(to), wing(-1.0))) {}
        }
    }
}

/// Places of the labels, in `order`.
fn placed(
    dots: &[Dot],
    order: &[usize],
    arrow: Option<&Arrow>,
    x: &Axis,
    y: &Axis,
    l: &Layout,
) -> Vec<Option<Placed>> {
    let at = |d: &Dot| (x.at(d.on_safe.value), y.at(d.on_unsafe.value));
    let wanted: Vec<Wanted> = order
        .iter()
        .map(|&i| Wanted {
            at: at(&dots[i]),
            width: text_width(&dots[i].title, l.font) + 4.0,
            height: l.font + 4.0,
        })
        .collect();
    let mut solid: Vec<Rect> = dots
        .iter()
        .map(|d| Rect::around(at(d).0, at(d).1, 8.0, 8.0))
        .collect();
    solid.push(Rect {
        x0: x.start,
        y0: y.end,
        x1: x.start + 48.0,
        y1: y.end + 24.0,
    });
    let mut soft = Vec::new();
    for d in dots {
        let (cx, cy) = at(d);
        soft.push(Rect {
            x0: x.at(d.on_safe.lo),
            x1: x.at(d.on_safe.hi),
            y0: cy - 1.0,
            y1: cy + 1.0,
        });
        soft.push(Rect {
            x0: cx - 1.0,
            x1: cx + 1.0,
            y0: y.at(d.on_unsafe.hi),
            y1: y.at(d.on_unsafe.lo),
        });
    }
    if let Some(arrow) = arrow {
        soft.extend((0..=60).map(|i| {
            let (x, y) = arrow.at(f64::from(i) / 60.0);
            Rect::around(x, y, 5.0, 5.0)
        }));
    }
    soft.retain(|r| [r.x0, r.y0, r.x1, r.y1].iter().all(|v| v.is_finite()));
    let bounds = Rect {
        x0: x.start + 2.0,
        y0: y.end - 8.0,
        x1: l.width - 2.0,
        y1: y.start - 2.0,
    };
    place(
        &wanted,
        &Surroundings {
            bounds,
            solid,
            soft,
        },
    )
}

fn label_of(view: &View<'_>, d: &Dot, label: &Placed, at: (f64, f64)) -> Markup {
    let r = &label.rect;
    let (cx, cy) = ((r.x0 + r.x1) / 2.0, (r.y0 + r.y1) / 2.0);
    // Text hangs on the side that faces the point, so that its distance is true whatever the font.
    let (x, anchor) = if r.x0 > at.0 {
        (r.x0 + 2.0, "start")
    } else if r.x1 < at.0 {
        (r.x1 - 2.0, "end")
    } else {
        (cx, "middle")
    };
    let end = r.nearest(at.0, at.1);
    html! {
        @if label.leader {
            line class="leader" x1=(px(at.0)) y1=(px(at.1)) x2=(px(end.0)) y2=(px(end.1)) {}
        }
        text class={ "arm-label " (view.arm_class(d.arm)) } data-arm=(d.arm) x=(px(x)) y=(px(cy)) dy="0.35em" text-anchor=(anchor) { (d.title) }
    }
}

fn tooltip(d: &Dot) -> String {
    format!(
        "{}: unsafe refused {} ({}), safe refused {} ({})",
        d.title,
        rate(d.on_unsafe.value, d.on_unsafe.n),
        rate_interval(&d.on_unsafe),
        rate(d.on_safe.value, d.on_safe.n),
        rate_interval(&d.on_safe),
    )
}

fn summary(dots: &[Dot]) -> String {
    let all: Vec<String> = dots.iter().map(tooltip).collect();
    format!(
        "Refusal of unsafe against safe requests. {}.",
        all.join("; ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use demur_eval::stats::wilson;

    fn dot(arm: usize, on_unsafe: Estimate, on_safe: Estimate) -> Dot {
        Dot {
            arm,
            title: format!("Arm number {arm}"),
            on_unsafe,
            on_safe,
        }
    }

    #[test]
    fn points_are_where_hand_computation_says() {
        // Wide: x over 52..604, y over 470..34. Safe 30 of 60 with hi 0.62: the axis ends at 80 %.
        let dots = [dot(0, wilson(45, 60), wilson(30, 60))];
        let (x, y) = axes(&dots, &WIDE);
        assert!((x.hi - 0.8).abs() < 1e-12);
        assert!((x.at(0.5) - (52.0 + 552.0 * 0.5 / 0.8)).abs() < 1e-9);
        assert!((y.at(0.75) - (470.0 - 436.0 * 0.75)).abs() < 1e-9);
    }

    #[test]
    fn the_axis_covers_every_interval() {
        assert!((x_end(&[dot(0, wilson(0, 60), wilson(0, 60))]) - 0.4).abs() < 1e-12);
        assert_eq!(x_end(&[dot(0, wilson(0, 60), wilson(60, 60))]), 1.0);
        let unknown = Estimate {
            value: 0.1,
            lo: f64::NAN,
            hi: f64::NAN,
            n: 0,
        };
        assert!((x_end(&[dot(0, unknown, unknown)]) - 0.4).abs() < 1e-12);
    }

    #[test]
    fn labels_of_arms_at_one_point_do_not_collide() {
        for (k, j) in [(23, 2), (60, 0), (0, 0), (60, 60), (30, 30)] {
            let dots: Vec<Dot> = (0..7)
                .map(|i| dot(i, wilson(k, 60), wilson(j, 60)))
                .collect();
            let order: Vec<usize> = (0..7).collect();
            for l in [&WIDE, &NARROW] {
                let (x, y) = axes(&dots, l);
                let labels = placed(&dots, &order, None, &x, &y, l);
                for (i, a) in labels.iter().enumerate() {
                    let a = a.expect("a place for each of seven labels");
                    for b in labels[i + 1..].iter().flatten() {
                        assert_eq!(a.rect.overlap(&b.rect), 0.0, "{k} {j} {}", l.class);
                    }
                }
            }
        }
    }
}
