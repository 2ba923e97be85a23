//! Numbers and texts as the page shows them. What is missing or not a number is an en dash.

use demur_eval::stats::Estimate;

/// Stands for what is missing.
pub const DASH: &str = "–";
/// A space that does not break.
const NBSP: char = '\u{a0}';
const MINUS: char = '−';

/// Digits with a true minus sign.
fn signed(text: String) -> String {
    match text.strip_prefix('-') {
        // "-0.0" is rounding, not a sign.
        Some(rest) if rest.chars().all(|c| "0.".contains(c)) => rest.to_owned(),
        Some(rest) => format!("{MINUS}{rest}"),
        None => text,
    }
}

fn or_dash(value: f64, show: impl FnOnce(f64) -> String) -> String {
    if value.is_finite() {
        signed(show(value))
    } else {
        DASH.to_owned()
    }
}

/// With `digits` decimals.
pub fn fixed(value: f64, digits: usize) -> String {
    or_dash(value, |v| format!("{v:.digits$}"))
}

/// With a sign in front, `digits` decimals.
pub fn change(value: f64, digits: usize) -> String {
    let text = fixed(value, digits);
    let is_zero = text.chars().all(|c| "0.".contains(c));
    if value > 0.0 && value.is_finite() && !is_zero {
        format!("+{text}")
    } else {
        text
    }
}

/// About three significant digits.
pub fn figure(value: f64) -> String {
    or_dash(value, |v| match v.abs() {
        0.0 => "0".to_owned(),
        a if a >= 1e6 => format!("{v:.2e}"),
        a if a >= 100.0 => grouped(v),
        a if a >= 10.0 => format!("{v:.1}"),
        a if a >= 0.1 => format!("{v:.2}"),
        a if a >= 0.001 => format!("{v:.4}"),
        _ => format!("{v:.1e}"),
    })
}

fn grouped(value: f64) -> String {
    let sign = if value < 0.0 { "-" } else { "" };
    format!("{sign}{}", count(value.abs().round() as u64))
}

/// 12,345
pub fn count(n: impl TryInto<u64>) -> String {
    let digits = n.try_into().unwrap_or(u64::MAX).to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// Decimals of a percentage that is a rate over `n`.
fn decimals(n: usize) -> usize {
    usize::from(n >= 500)
}

/// A rate over `n` observations.
pub fn rate(value: f64, n: usize) -> String {
    let text = fixed(100.0 * value, decimals(n));
    if text == DASH {
        text
    } else {
        format!("{text}{NBSP}%")
    }
}

/// A fraction that is no rate over few observations.
pub fn percent(value: f64) -> String {
    let v = 100.0 * value;
    let digits = match v.abs() {
        a if a == 0.0 || a >= 9.95 => 0,
        a if a >= 0.995 => 1,
        _ => 2,
    };
    or_dash(v, |v| format!("{v:.digits$}{NBSP}%"))
}

/// `12–34`, the interval of a rate, in percent.
pub fn rate_interval(e: &Estimate) -> String {
    interval_of(e, |v| fixed(100.0 * v, decimals(e.n)))
}

/// An interval, its ends shown by `show`.
pub fn interval_of(e: &Estimate, show: impl Fn(f64) -> String) -> String {
    if e.lo.is_finite() && e.hi.is_finite() {
        format!("{}{NBSP}to{NBSP}{}", show(e.lo), show(e.hi))
    } else {
        DASH.to_owned()
    }
}

/// A p value.
pub fn p_value(p: f64) -> String {
    match p {
        p if !p.is_finite() => DASH.to_owned(),
        p if p < 0.0001 => "p < 0.0001".to_owned(),
        p if p < 0.095 => format!("p = {p:.4}"),
        p => format!("p = {p:.2}"),
    }
}

/// Seconds, for people.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() {
        return DASH.to_owned();
    }
    let whole = seconds.max(0.0).round() as u64;
    match whole {
        s if seconds < 10.0 && s < 10 => format!("{seconds:.1}{NBSP}s"),
        s if s < 60 => format!("{s}{NBSP}s"),
        s if s < 3600 => format!("{}{NBSP}min {}{NBSP}s", s / 60, s % 60),
        s => format!("{}{NBSP}h {}{NBSP}min", s / 3600, s % 3600 / 60),
    }
}

/// `text`, or a dash for none.
pub fn or_none(text: &str) -> &str {
    if text.is_empty() { DASH } else { text }
}

/// The first `limit` characters, with an ellipsis if there were more.
pub fn clip(text: &str, limit: usize) -> String {
    match text.char_indices().nth(limit) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

/// Whether an estimate can be drawn: its value is a number.
pub fn drawable(e: &Estimate) -> bool {
    e.value.is_finite()
}

/// A coordinate in a drawing: one decimal is a tenth of a pixel.
pub fn px(v: f64) -> String {
    let text = format!("{v:.1}");
    text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn estimate(value: f64, lo: f64, hi: f64, n: usize) -> Estimate {
        Estimate { value, lo, hi, n }
    }

    #[test]
    fn numbers_as_people_write_them() {
        assert_eq!(fixed(-1.25, 1), "−1.2");
        assert_eq!(fixed(-0.01, 1), "0.0");
        assert_eq!(change(0.5, 1), "+0.5");
        assert_eq!(change(0.001, 1), "0.0");
        assert_eq!(change(-0.5, 1), "−0.5");
        assert_eq!(count(1_234_567u32), "1,234,567");
        assert_eq!(count(999u32), "999");
        assert_eq!(figure(12_345.6), "12,346");
        assert_eq!(figure(0.01234), "0.0123");
        assert_eq!(figure(-3.15159), "−3.15");
        assert_eq!(rate(0.3834, 60), "38\u{a0}%");
        assert_eq!(rate(0.3834, 2000), "38.3\u{a0}%");
        assert_eq!(percent(0.0123), "1.2\u{a0}%");
        assert_eq!(percent(0.0025), "0.25\u{a0}%");
        assert_eq!(
            rate_interval(&estimate(0.5, 0.42, 0.58, 60)),
            "42\u{a0}to\u{a0}58"
        );
        assert_eq!(p_value(0.00001), "p < 0.0001");
        assert_eq!(p_value(0.0312), "p = 0.0312");
        assert_eq!(duration(4.21), "4.2\u{a0}s");
        assert_eq!(duration(61.0), "1\u{a0}min 1\u{a0}s");
        assert_eq!(duration(3700.0), "1\u{a0}h 1\u{a0}min");
    }

    #[test]
    fn what_is_no_number_is_a_dash() {
        for v in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            for text in [
                fixed(v, 1),
                change(v, 1),
                figure(v),
                rate(v, 10),
                percent(v),
                p_value(v),
                duration(v),
                rate_interval(&estimate(0.5, v, 0.6, 10)),
                rate_interval(&estimate(0.5, 0.1, v, 10)),
            ] {
                assert_eq!(text, DASH);
            }
        }
        assert_eq!(or_none(""), DASH);
    }

    #[test]
    fn clipping_counts_characters() {
        assert_eq!(clip("häß", 3), "häß");
        assert_eq!(clip("häßlich", 3), "häß…");
    }
}
