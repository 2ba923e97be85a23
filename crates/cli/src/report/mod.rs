//! The report: one self-contained HTML page, a view of the record.
//!
//! Nothing is computed anew here; figures are placed, formatted and drawn. Everything that comes from
//! the record is foreign text (a model wrote much of it): it reaches the page through [`maud`], which
//! escapes what is spliced in, and the page's content security policy lets no script run but the one
//! in `script.js`. The page needs no network and is whole without scripts.
//!
//! One file a section, in the order of the page; [`chart`], [`labels`] and [`marker`] draw.

mod arms;
mod categories;
mod chart;
pub mod evaluation;
mod features;
mod format;
mod front;
mod gate;
mod hero;
mod labels;
mod marker;
mod method;
mod page;
mod replies;
mod sae;
mod sample;
mod sets;
mod sites;
mod strengths;
mod sweep;
mod tradeoff;

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod tests;

#[cfg(test)]
pub use fixture::sample as sample_record;

use anyhow::Result;
use demur_eval::record::{ArmReply, ArmResult, Record, ReplyRow};

/// The page for `record`.
pub fn render(record: &Record) -> Result<String> {
    page::page(&View::new(record)).map(maud::PreEscaped::into_string)
}

/// The record, with what every section asks about its arms.
struct View<'a> {
    record: &'a Record,
    /// The arm that the headline is about.
    headline: Option<usize>,
}

impl<'a> View<'a> {
    fn new(record: &'a Record) -> Self {
        Self {
            record,
            headline: headline_arm(record),
        }
    }

    /// The first arm: the model as it is.
    fn base(&self) -> Option<&'a ArmResult> {
        self.record.arms.first()
    }

    fn headline(&self) -> Option<&'a ArmResult> {
        self.headline.and_then(|i| self.record.arms.get(i))
    }

    /// The class that gives an arm its colour: base and the headline's arm have their own, the
    /// others take turns.
    fn arm_class(&self, arm: usize) -> String {
        match arm {
            0 => "arm-base".to_owned(),
            i if Some(i) == self.headline => "arm-main".to_owned(),
            i => format!("arm-{}", (i - 1) % 5),
        }
    }

    /// What `arm` replied in `row`.
    fn reply(&self, row: &'a ReplyRow, arm: usize) -> Option<&'a ArmReply> {
        let name = &self.record.arms.get(arm)?.arm;
        row.replies.iter().find(|r| r.arm == *name)
    }
}

/// The arm of the headline. A headline about none leaves the plain clamp, or whatever comes after base.
fn headline_arm(record: &Record) -> Option<usize> {
    let steered = || record.arms.iter().enumerate().skip(1);
    let named = |name: &str| steered().find(|(_, a)| a.arm == name);
    let of_headline = record.verdict.arm.as_deref();
    of_headline
        .and_then(named)
        .or_else(|| named("clamp"))
        .or_else(|| steered().next())
        .map(|(i, _)| i)
}
