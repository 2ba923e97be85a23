//! Progress of long work: a bar on a terminal, plain lines elsewhere; rate and time left in both.

use std::cell::{Cell, RefCell};
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Seconds between plain lines.
const LINE_EVERY: Duration = Duration::from_secs(5);

static QUIET: AtomicBool = AtomicBool::new(false);
static VERBOSE: AtomicBool = AtomicBool::new(false);

/// Silences progress and notes (`--quiet`), or adds details (`--verbose`).
pub fn set_level(quiet: bool, verbose: bool) {
    QUIET.store(quiet, Ordering::Relaxed);
    VERBOSE.store(verbose, Ordering::Relaxed);
}

/// A line on standard error, unless quiet.
pub fn note(text: impl std::fmt::Display) {
    if !QUIET.load(Ordering::Relaxed) {
        // Nobody may be there to read it; the work goes on.
        let _ = writeln!(std::io::stderr(), "{text}");
    }
}

/// A line on standard error, if verbose.
pub fn detail(text: impl std::fmt::Display) {
    if VERBOSE.load(Ordering::Relaxed) {
        note(text);
    }
}

/// A line of the result, on standard output. Fails when its reader has gone, where `println!` would
/// panic.
pub fn say(text: impl std::fmt::Display) -> anyhow::Result<()> {
    writeln!(std::io::stdout().lock(), "{text}")?;
    Ok(())
}

/// One piece of long work.
pub struct Progress {
    label: String,
    unit: &'static str,
    total: u64,
    done: Cell<u64>,
    before: Cell<u64>,
    started: Instant,
    printed: Cell<Instant>,
    message: RefCell<String>,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Starts; `total` may be 0 when it is not known.
    pub fn new(label: &str, unit: &'static str, total: u64) -> Self {
        let quiet = QUIET.load(Ordering::Relaxed);
        let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::new(total);
            let style = ProgressStyle::with_template(&format!(
                "{{prefix:<12}} {{bar:28}} {{human_pos}}/{{human_len}} {unit}  {{per_sec}}  {{eta}} left  {{msg}}"
            ));
            if let Ok(style) = style {
                bar.set_style(style.progress_chars("━╸ "));
            }
            bar.set_prefix(label.to_owned());
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        let now = Instant::now();
        Self {
            label: label.to_owned(),
            unit,
            total,
            done: Cell::new(0),
            before: Cell::new(0),
            started: now,
            printed: Cell::new(now),
            message: RefCell::default(),
            bar,
        }
    }

    /// `n` more are done.
    pub fn advance(&self, n: u64) {
        self.done.set(self.done.get() + n);
        if let Some(bar) = &self.bar {
            bar.set_position(self.done.get());
        } else if self.printed.get().elapsed() >= LINE_EVERY {
            self.printed.set(Instant::now());
            note(self.line());
        }
    }

    /// `n` were done by an earlier run: they say nothing of the rate.
    pub fn resume(&self, n: u64) {
        self.before.set(n);
        self.done.set(n);
        if let Some(bar) = &self.bar {
            bar.set_position(n);
            bar.reset_eta();
        }
    }

    /// A word beside the bar, for instance a loss.
    pub fn message(&self, text: String) {
        match &self.bar {
            Some(bar) => bar.set_message(text),
            None => *self.message.borrow_mut() = text,
        }
    }

    /// Ends with one line that stays.
    pub fn finish(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let seconds = self.started.elapsed().as_secs_f64();
        note(format_args!(
            "{:<12} {} {} in {seconds:.1} s",
            self.label,
            self.done.get() - self.before.get(),
            self.unit
        ));
    }

    fn line(&self) -> String {
        let done = self.done.get();
        let rate =
            (done - self.before.get()) as f64 / self.started.elapsed().as_secs_f64().max(1e-9);
        if self.total == 0 {
            return format!("{:<12} {done} {}  {rate:.1}/s", self.label, self.unit);
        }
        let left = self.total.saturating_sub(done) as f64 / rate.max(1e-9);
        let line = format!(
            "{:<12} {done}/{} {}  {:.0} %  {rate:.1}/s  {left:.0} s left  {}",
            self.label,
            self.total,
            self.unit,
            100.0 * done as f64 / self.total as f64,
            self.message.borrow(),
        );
        line.trim_end().to_owned()
    }
}
