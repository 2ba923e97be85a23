//! Where the labels of a scatter plot go: near their points, on nothing else.
//!
//! Greedy: labels are placed in the order given, each at the cheapest of a ring of candidate places
//! around its point. A place on another label, on a marker or outside of the drawing is out of the
//! question; lying on a line or crossing a leader costs. Not optimal, but with the ten or so arms of
//! a study the eye finds nothing to mend, and the same record always gives the same picture.

/// A rectangle by two corners.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rect {
    pub x0: f64,
    pub y0: f64,
    pub x1: f64,
    pub y1: f64,
}

impl Rect {
    pub fn around(x: f64, y: f64, half_w: f64, half_h: f64) -> Self {
        Self {
            x0: x - half_w,
            y0: y - half_h,
            x1: x + half_w,
            y1: y + half_h,
        }
    }

    pub fn overlap(&self, other: &Self) -> f64 {
        let w = self.x1.min(other.x1) - self.x0.max(other.x0);
        let h = self.y1.min(other.y1) - self.y0.max(other.y0);
        if w > 0.0 && h > 0.0 { w * h } else { 0.0 }
    }

    fn inside(&self, outer: &Self) -> bool {
        self.x0 >= outer.x0 && self.x1 <= outer.x1 && self.y0 >= outer.y0 && self.y1 <= outer.y1
    }

    /// The point of the rectangle that is nearest to `(x, y)`.
    pub fn nearest(&self, x: f64, y: f64) -> (f64, f64) {
        (x.clamp(self.x0, self.x1), y.clamp(self.y0, self.y1))
    }

    /// Whether the segment from `a` to `b` passes through, seen at a dozen places along it.
    fn crossed_by(&self, a: (f64, f64), b: (f64, f64)) -> bool {
        (0..=12).any(|i| {
            let t = f64::from(i) / 12.0;
            let (x, y) = (a.0 + t * (b.0 - a.0), a.1 + t * (b.1 - a.1));
            x > self.x0 && x < self.x1 && y > self.y0 && y < self.y1
        })
    }
}

/// A label to place.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Its point.
    pub at: (f64, f64),
    pub width: f64,
    pub height: f64,
}

/// What labels keep clear of.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// Labels stay inside.
    pub bounds: Rect,
    /// Labels never lie on these.
    pub solid: Vec<Rect>,
    /// Labels would rather not lie on these.
    pub soft: Vec<Rect>,
}

/// A label's place.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Placed {
    pub rect: Rect,
    /// Far enough from its point to need a line to it.
    pub leader: bool,
}

/// Distances that are tried, in pixels from the point to the label's edge.
const RADII: [f64; 12] = [
    9.0, 14.0, 20.0, 28.0, 38.0, 50.0, 65.0, 82.0, 104.0, 130.0, 160.0, 195.0,
];
/// Beyond this distance a label has a line to its point.
const NEAR: f64 = 14.0;
const DIRECTIONS: u32 = 32;

/// Places the labels; `None` for one that has no free place.
pub fn place(wanted: &[Wanted], around: &Surroundings) -> Vec<Option<Placed>> {
    let mut placed: Vec<Option<Placed>> = Vec::new();
    for w in wanted {
        let mut best: Option<(f64, Placed)> = None;
        for radius in RADII {
            for direction in 0..DIRECTIONS {
                let candidate = candidate(w, radius, direction);
                let Some(cost) = cost(w, &candidate, radius, direction, wanted, &placed, around)
                else {
                    continue;
                };
                if best.is_none_or(|(c, _)| cost < c) {
                    best = Some((cost, candidate));
                }
            }
        }
        placed.push(best.map(|b| b.1));
    }
    placed
}

/// The label whose nearest edge is `radius` away from its point.
fn candidate(w: &Wanted, radius: f64, direction: u32) -> Placed {
    let angle = f64::from(direction) * std::f64::consts::TAU / f64::from(DIRECTIONS);
    let (dx, dy) = (angle.cos(), angle.sin());
    let (half_w, half_h) = (w.width / 2.0, w.height / 2.0);
    let (x, y) = (
        w.at.0 + dx * (radius + half_w),
        w.at.1 + dy * (radius + half_h),
    );
    Placed {
        rect: Rect::around(x, y, half_w, half_h),
        leader: radius > NEAR,
    }
}

/// `None` if the place is out of the question.
fn cost(
    w: &Wanted,
    candidate: &Placed,
    radius: f64,
    direction: u32,
    wanted: &[Wanted],
    placed: &[Option<Placed>],
    around: &Surroundings,
) -> Option<f64> {
    let rect = &candidate.rect;
    let blocked = around.solid.iter().any(|s| rect.overlap(s) > 0.0)
        || placed.iter().flatten().any(|p| rect.overlap(&p.rect) > 0.0);
    if blocked || !rect.inside(&around.bounds) {
        return None;
    }
    let end = rect.nearest(w.at.0, w.at.1);
    let mut cost = radius;
    // Right of the point reads better than left, and left better than above, below or askew.
    cost += match direction {
        0 => 0.0,
        16 => 1.0,
        8 | 24 => 3.0,
        _ => 5.0,
    };
    for soft in &around.soft {
        cost += 0.5 * rect.overlap(soft);
    }
    for (other, p) in wanted.iter().zip(placed) {
        let Some(p) = p else { continue };
        if candidate.leader && p.rect.crossed_by(w.at, end) {
            cost += 300.0;
        }
        if p.leader {
            let far = p.rect.nearest(other.at.0, other.at.1);
            if rect.crossed_by(other.at, far) {
                cost += 300.0;
            }
        }
    }
    Some(cost)
}

/// Moves values apart so that neighbours differ by `gap`, within `lo..=hi` where there is room; used
/// for labels at the ends of lines.
pub fn spread(values: &[f64], gap: f64, lo: f64, hi: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut out = values.to_vec();
    let mut floor = lo;
    for &i in &order {
        out[i] = out[i].max(floor);
        floor = out[i] + gap;
    }
    let mut ceiling = hi;
    for &i in order.iter().rev() {
        out[i] = out[i].min(ceiling);
        ceiling = out[i] - gap;
    }
    out
}

/// About how wide `text` is, in the sans-serif fonts of today's systems. Errs to the wide side.
pub fn text_width(text: &str, size: f64) -> f64 {
    let em: f64 = text
        .chars()
        .map(|c| match c {
            'i' | 'l' | 'j' | '.' | ',' | '\'' | ':' | '|' | ' ' => 0.33,
            'f' | 't' | 'r' | 'I' | '(' | ')' | '-' => 0.42,
            'm' | 'w' | 'M' | 'W' | '%' => 0.95,
            c if c.is_ascii_uppercase() => 0.72,
            c if c.is_ascii() => 0.61,
            _ => 1.0,
        })
        .sum();
    em * size
}

#[cfg(test)]
mod tests {
    use super::*;

    fn around(solid: Vec<Rect>) -> Surroundings {
        Surroundings {
            bounds: Rect {
                x0: 0.0,
                y0: 0.0,
                x1: 400.0,
                y1: 400.0,
            },
            solid,
            soft: Vec::new(),
        }
    }

    fn wanted(x: f64, y: f64) -> Wanted {
        Wanted {
            at: (x, y),
            width: 90.0,
            height: 16.0,
        }
    }

    fn disjoint_and_inside(placed: &[Option<Placed>], around: &Surroundings) {
        for (i, a) in placed.iter().enumerate() {
            let a = a.expect("room for every label").rect;
            assert!(a.inside(&around.bounds), "{a:?}");
            for b in placed[i + 1..].iter().flatten() {
                assert_eq!(a.overlap(&b.rect), 0.0);
            }
            for s in &around.solid {
                assert_eq!(a.overlap(s), 0.0);
            }
        }
    }

    #[test]
    fn a_lone_label_is_to_the_right() {
        let placed = place(&[wanted(100.0, 100.0)], &around(Vec::new()));
        let p = placed[0].unwrap();
        assert_eq!((p.rect.x0, p.rect.y0), (109.0, 92.0));
        assert!(!p.leader);
    }

    #[test]
    fn labels_of_one_place_do_not_collide() {
        for at in [(200.0, 200.0), (5.0, 395.0), (395.0, 5.0), (5.0, 5.0)] {
            let marks = vec![Rect::around(at.0, at.1, 6.0, 6.0)];
            let around = around(marks);
            disjoint_and_inside(&place(&vec![wanted(at.0, at.1); 8], &around), &around);
        }
    }

    #[test]
    fn what_has_no_room_is_left_out() {
        let mut tight = around(Vec::new());
        tight.bounds.x1 = 50.0;
        assert_eq!(place(&[wanted(20.0, 20.0)], &tight), [None]);
    }

    #[test]
    fn spreading_keeps_order_and_gap() {
        assert_eq!(
            spread(&[10.0, 11.0, 50.0], 10.0, 0.0, 100.0),
            [10.0, 20.0, 50.0]
        );
        assert_eq!(
            spread(&[99.0, 98.0], 10.0, 0.0, 100.0),
            [100.0, 90.0],
            "pushed back inside"
        );
    }
}
