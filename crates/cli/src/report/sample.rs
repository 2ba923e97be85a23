//! Which replies are worth reading first: a few of every kind of change between base and the
//! headline's arm, from as many categories as there are.

use demur_eval::judge::Verdict;
use demur_eval::prompts::Label;
use demur_eval::record::ReplyRow;

use super::View;

/// A kind of change, in the order of interest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Unsafe, answered by base and refused now.
    Gained,
    /// Safe, answered by base and refused now.
    OverRefused,
    /// Broken now and not before.
    Broken,
    /// Unsafe, refused by base and answered now.
    Lost,
    /// Unsafe, answered by both.
    Missed,
    /// Safe, refused by base and answered now.
    Freed,
    /// Safe, answered by both.
    StillHelps,
}

/// All kinds with the number of samples that each may have.
const KINDS: [(Change, usize); 7] = [
    (Change::Gained, 3),
    (Change::OverRefused, 3),
    (Change::Broken, 2),
    (Change::Lost, 2),
    (Change::Missed, 2),
    (Change::Freed, 2),
    (Change::StillHelps, 2),
];

impl Change {
    pub fn title(self) -> &'static str {
        match self {
            Self::Gained => "Unsafe, answered by base, refused when steered",
            Self::OverRefused => "Safe, answered by base, refused when steered",
            Self::Broken => "Broken when steered",
            Self::Lost => "Unsafe, refused by base, answered when steered",
            Self::Missed => "Unsafe, answered by both",
            Self::Freed => "Safe, refused by base, answered when steered",
            Self::StillHelps => "Safe, answered by both",
        }
    }

    /// `None` for an unsafe or safe request that both refuse: nothing to see.
    fn of(label: Label, base: Verdict, steered: Verdict) -> Option<Self> {
        use Verdict::{Compliance, Empty, Gibberish, Refusal};
        let broken = |v| matches!(v, Gibberish | Empty);
        match (label, base, steered) {
            (_, b, s) if broken(s) => (!broken(b)).then_some(Self::Broken),
            (_, Refusal, Refusal) => None,
            (Label::Unsafe, _, Refusal) => Some(Self::Gained),
            (Label::Unsafe, Refusal, _) => Some(Self::Lost),
            (Label::Unsafe, _, Compliance) => Some(Self::Missed),
            (Label::Safe, _, Refusal) => Some(Self::OverRefused),
            (Label::Safe, Refusal, _) => Some(Self::Freed),
            (Label::Safe, _, _) => Some(Self::StillHelps),
            (Label::Unsafe, _, _) => None,
        }
    }
}

/// Kinds that occur, each with how often and its samples.
pub fn samples<'a>(view: &View<'a>) -> Vec<(Change, usize, Vec<&'a ReplyRow>)> {
    let Some(main) = view.headline else {
        return Vec::new();
    };
    let kind = |row: &'a ReplyRow| {
        let (base, steered) = (view.reply(row, 0)?, view.reply(row, main)?);
        Change::of(row.label, base.verdict, steered.verdict)
    };
    KINDS
        .iter()
        .filter_map(|&(change, most)| {
            let all: Vec<&ReplyRow> = view
                .record
                .replies
                .iter()
                .filter(|r| kind(r) == Some(change))
                .collect();
            let picked = varied(&all, most);
            (!picked.is_empty()).then_some((change, all.len(), picked))
        })
        .collect()
}

/// At most `most` rows, new categories before known ones, else in order.
fn varied<'a>(rows: &[&'a ReplyRow], most: usize) -> Vec<&'a ReplyRow> {
    let mut picked: Vec<&ReplyRow> = Vec::new();
    for known in [false, true] {
        for row in rows {
            let seen = picked.iter().any(|p| p.category == row.category);
            let taken = picked.iter().any(|p| std::ptr::eq(*p, *row));
            if picked.len() < most && !taken && seen <= known {
                picked.push(row);
            }
        }
    }
    picked
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: &str, category: &str) -> ReplyRow {
        ReplyRow {
            id: id.to_owned(),
            label: Label::Unsafe,
            category: category.to_owned(),
            prompt: String::new(),
            replies: Vec::new(),
        }
    }

    #[test]
    fn kinds_by_hand() {
        use Verdict::{Compliance, Empty, Gibberish, Refusal};
        for (label, base, steered, expect) in [
            (Label::Unsafe, Compliance, Refusal, Some(Change::Gained)),
            (Label::Unsafe, Refusal, Compliance, Some(Change::Lost)),
            (Label::Unsafe, Compliance, Compliance, Some(Change::Missed)),
            (Label::Unsafe, Refusal, Refusal, None),
            (Label::Safe, Compliance, Refusal, Some(Change::OverRefused)),
            (Label::Safe, Refusal, Compliance, Some(Change::Freed)),
            (
                Label::Safe,
                Compliance,
                Compliance,
                Some(Change::StillHelps),
            ),
            (Label::Safe, Refusal, Refusal, None),
            (Label::Unsafe, Refusal, Gibberish, Some(Change::Broken)),
            (Label::Safe, Compliance, Empty, Some(Change::Broken)),
            (Label::Safe, Gibberish, Empty, None),
        ] {
            assert_eq!(
                Change::of(label, base, steered),
                expect,
                "{label:?} {base:?} {steered:?}"
            );
        }
    }

    #[test]
    fn categories_take_turns() {
        let rows = [row("1", "a"), row("2", "a"), row("3", "b"), row("4", "a")];
        let rows: Vec<&ReplyRow> = rows.iter().collect();
        let ids =
            |most| -> Vec<&str> { varied(&rows, most).iter().map(|r| r.id.as_str()).collect() };
        assert_eq!(ids(2), ["1", "3"]);
        assert_eq!(ids(3), ["1", "3", "2"]);
        assert_eq!(ids(9).len(), 4);
    }
}
