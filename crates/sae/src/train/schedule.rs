//! Which step of a run reads which rows.
//!
//! The rows of a run come in *parts*, each of which fits into memory: one part if all do, and then a
//! pass over them is an epoch. A pass reads the parts in order, each in an order of its rows that is
//! shuffled anew in every pass ([`super::ScaledRows::batch`]).
//!
//! A run must know its number of steps before it has seen its rows, as the learning rate depends on it,
//! and outliers, which are left out, show only when rows are there. So the share that is kept of the
//! first part ([`super::Input`]) is taken for that of all: part `c` has
//!
//! ```text
//! n_c = floor(R_c / batch) - floor(R_{c-1} / batch),    R_c = rows of parts 0..=c  *  share kept
//! ```
//!
//! batches. Of a part with fewer rows than that, some are read twice; of one with more, some are not
//! read. So the step alone says which rows come next, and nothing else needs to be saved for a run to
//! go on.

use std::ops::Range;

use super::data::Input;

/// The steps of a run, by pass and part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    /// Steps of a pass up to the end of each part.
    ends: Vec<usize>,
    steps: usize,
}

impl Schedule {
    /// Of parts with these numbers of `rows`, outliers included; `input` is of the first.
    ///
    /// A single part is read `ceil(kept * epochs / batch)` times a batch: what is left of a batch at the
    /// end of a pass is made up for by a further one. Of several it is not, as a step of a further pass
    /// would need a whole part.
    pub fn new(rows: &[usize], input: &Input, batch: usize, epochs: f64) -> Self {
        let batch = batch.max(1);
        let mut sum = 0u128;
        let kept_to = |n: &usize| {
            sum += *n as u128;
            (sum * input.kept as u128 / input.rows.max(1) as u128) as usize
        };
        let kept: Vec<usize> = rows.iter().map(kept_to).collect();
        let all = kept.last().copied().unwrap_or(0);
        let steps = match rows.len() {
            1 => (all as f64 * epochs / batch as f64).ceil(),
            _ => ((all / batch) as f64 * epochs).ceil(),
        };
        Self::of(kept.iter().map(|n| n / batch).collect(), steps as usize)
    }

    /// Of `steps` steps, at least one, where a pass has done `ends[c]` of them at the end of part `c`.
    pub fn of(mut ends: Vec<usize>, steps: usize) -> Self {
        // Without a whole batch there is one that is not whole, which the trainer refuses.
        match ends.last_mut() {
            Some(last) => *last = (*last).max(1),
            None => ends.push(1),
        }
        Self {
            ends,
            steps: steps.max(1),
        }
    }

    /// Steps in all.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Passes in all, the last of which may be cut short.
    pub fn passes(&self) -> usize {
        self.steps.div_ceil(self.pass())
    }

    /// The steps, counted from the beginning of the run, that read `part` in `pass`.
    pub fn of_part(&self, pass: usize, part: usize) -> Range<usize> {
        let from = match part.checked_sub(1) {
            Some(before) => self.ends.get(before).copied().unwrap_or(self.pass()),
            None => 0,
        };
        let to = self.ends.get(part).copied().unwrap_or(self.pass());
        let at = |step: usize| (pass * self.pass() + step).min(self.steps);
        at(from)..at(to)
    }

    /// Steps of a whole pass.
    fn pass(&self) -> usize {
        self.ends.last().copied().unwrap_or(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(rows: usize, kept: usize) -> Input {
        Input {
            rows,
            kept,
            scale: 1.0,
            limit: 1.0,
        }
    }

    #[test]
    fn one_part_is_read_in_epochs() {
        // 1000 rows, 950 kept: 9 batches of 100 an epoch, and ceil(28.5) in three
        let s = Schedule::new(&[1000], &input(1000, 950), 100, 3.0);
        assert_eq!((s.steps(), s.passes()), (29, 4));
        assert_eq!(s.of_part(0, 0), 0..9);
        assert_eq!(s.of_part(2, 0), 18..27);
        assert_eq!(s.of_part(3, 0), 27..29);
        assert_eq!(s.of_part(4, 0), 29..29);
    }

    #[test]
    fn several_parts_are_read_in_order_and_no_batch_is_lost_between() {
        // kept: 450, 900, 1125, in batches of 100: 4, 9 and 11 by their ends
        let s = Schedule::new(&[500, 500, 250], &input(500, 450), 100, 1.0);
        assert_eq!((s.steps(), s.passes()), (11, 1));
        let parts: Vec<_> = (0..3).map(|part| s.of_part(0, part)).collect();
        assert_eq!(parts, [0..4, 4..9, 9..11]);
        // a pass and a half
        let s = Schedule::new(&[500, 500, 250], &input(500, 450), 100, 1.5);
        assert_eq!((s.steps(), s.passes()), (17, 2));
        let parts: Vec<_> = (0..3).map(|part| s.of_part(1, part)).collect();
        assert_eq!(parts, [11..15, 15..17, 17..17]);
    }

    #[test]
    fn every_step_is_in_one_part() {
        for (rows, batch, epochs) in [
            (vec![70, 64, 71, 3], 32, 2.3),
            (vec![10], 32, 1.0),
            (vec![], 8, 1.0),
            (vec![5, 5, 5, 5, 5, 5, 5], 11, 1.0),
        ] {
            let first = rows.first().copied().unwrap_or(0);
            let s = Schedule::new(&rows, &input(first, first), batch, epochs);
            let mut next = 0;
            for pass in 0..s.passes() {
                for part in 0..rows.len().max(1) {
                    let steps = s.of_part(pass, part);
                    assert_eq!(steps.start, next, "{rows:?}");
                    next = steps.end;
                }
            }
            assert_eq!(next, s.steps(), "{rows:?}");
        }
    }
}
