//! The rows that SAEs are trained on, on their way from the model to the trainers: by parts that fit into
//! memory, and nowhere else.
//!
//! The texts of the corpus are cut, in an order shuffled by the seed, into parts of about `train.buffer`
//! rows; a corpus that is no larger is one part, in its own order. The model runs the texts of a part up to
//! the highest site once, the SAEs train on the rows of all sites in shuffled order, and the next part takes
//! their place. What rows are multiplied by, and which are outliers, is taken from the first part, which is
//! kept in `input.json`.
//!
//! A buffer that is half emptied and filled again would mix rows of neighbouring parts as well. But its
//! content depends on all that went before: a state would have to hold it (half a gigabyte for 131,072 rows of
//! 896, for each site) or the whole stream be run again. Of whole parts, a run that goes on makes the one that
//! it was stopped in once more, and the texts being shuffled, a part is a sample of the corpus as good as any.

use std::ops::Range;
use std::path::Path;

use anyhow::{Result, bail};
use demur_features::harvest::{Products, Sequence, harvest_sites};
use demur_model::hooks::{Role, Site};
use sha2::{Digest, Sha256};

use super::StudyContext;
use super::corpus::{Corpus, TEXTS, Text, read_texts};
use crate::progress::Progress;

/// The corpus of a study, by parts.
pub struct Stream<'a> {
    c: &'a StudyContext,
    sites: &'a [Site],
    texts: Vec<Text>,
    parts: Vec<Range<usize>>,
}

impl<'a> Stream<'a> {
    /// What the stage `harvest` left in `folder`, for rows at `sites`.
    pub fn open(
        c: &'a StudyContext,
        sites: &'a [Site],
        corpus: &Corpus,
        folder: &Path,
    ) -> Result<Self> {
        let file = folder.join(TEXTS);
        let mut texts = read_texts(&file)?;
        let rows: usize = texts.iter().map(Text::n_rows).sum();
        if (texts.len(), rows) != (corpus.train_sequences, corpus.train_rows) {
            bail!(
                "{} has been changed; run with --from harvest",
                file.display()
            );
        }
        let buffer = c.study.train.buffer;
        if rows > buffer {
            texts = shuffled(texts, c.study.seed);
        }
        let rows: Vec<usize> = texts.iter().map(Text::n_rows).collect();
        Ok(Self {
            c,
            sites,
            parts: parts(&rows, buffer),
            texts,
        })
    }

    /// The number of rows in each part.
    pub fn rows(&self) -> Vec<usize> {
        let of = |part: &Range<usize>| {
            self.texts[part.clone()]
                .iter()
                .map(Text::n_rows)
                .sum::<usize>()
        };
        self.parts.iter().map(of).collect()
    }

    /// The rows of a part at each site, `[rows, d_model]`; shows a bar, or tells `bar` how far it is.
    pub fn fill(&self, part: usize, bar: Option<&Progress>) -> Result<Vec<Vec<f32>>> {
        let texts = &self.texts[self.parts[part].clone()];
        let d = self.c.loaded.model.spec().d_model;
        let sequences: Vec<Sequence> = texts
            .iter()
            .map(|t| Sequence {
                source: t.source.clone(),
                tokens: t.tokens.clone(),
                roles: vec![Role::User; t.tokens.len()], // nothing reads them
            })
            .collect();
        let (rows, tokens) = (
            texts.iter().map(Text::n_rows).sum::<usize>(),
            texts.iter().map(|t| t.tokens.len()).sum::<usize>(),
        );
        let mut out: Vec<Vec<f32>> = self
            .sites
            .iter()
            .map(|_| Vec::with_capacity(rows * d))
            .collect();
        let own = bar
            .is_none()
            .then(|| Progress::new("harvest", "tokens", tokens as u64));
        let mut done = 0;
        harvest_sites(
            &self.c.loaded.model,
            self.sites,
            &sequences,
            self.c.study.model.batch_tokens,
            Products::Bf16,
            |i, x| {
                for (out, x) in out.iter_mut().zip(x) {
                    for rows in texts[i].ranges() {
                        out.extend_from_slice(&x[rows.start * d..rows.end * d]);
                    }
                }
                let n = texts[i].tokens.len();
                done += n;
                match (bar, &own) {
                    (Some(bar), _) => {
                        let share = 100.0 * done as f64 / tokens as f64;
                        bar.message(format!("harvest {share:.0} %"));
                        bar.advance(0);
                    }
                    (None, Some(own)) => own.advance(n as u64),
                    (None, None) => {}
                }
                Ok(())
            },
        )?;
        own.into_iter().for_each(Progress::finish);
        Ok(out)
    }
}

/// In the order of a hash of the seed and the place.
fn shuffled<T>(all: Vec<T>, seed: u64) -> Vec<T> {
    let key = |place: usize| {
        let bytes = [seed.to_le_bytes(), (place as u64).to_le_bytes()];
        Sha256::digest(bytes.concat())
    };
    let mut keyed: Vec<_> = all
        .into_iter()
        .enumerate()
        .map(|(i, t)| (key(i), t))
        .collect();
    keyed.sort_by_key(|k| k.0);
    keyed.into_iter().map(|(_, t)| t).collect()
}

/// Cuts texts with so many rows into parts of nearly equal numbers of them, of `buffer` or little more.
fn parts(rows: &[usize], buffer: usize) -> Vec<Range<usize>> {
    let all: usize = rows.iter().sum();
    let n = all.div_ceil(buffer.max(1)).max(1);
    let (mut parts, mut from, mut sum) = (Vec::new(), 0, 0);
    for (i, text) in rows.iter().enumerate() {
        sum += text;
        if i + 1 == rows.len() || sum * n >= all * (parts.len() + 1) {
            parts.push(from..i + 1);
            from = i + 1;
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_has_all_and_depends_on_the_seed() {
        let all = || (0..100).collect::<Vec<i32>>();
        let (one, two) = (shuffled(all(), 1), shuffled(all(), 2));
        assert_eq!(one, shuffled(all(), 1));
        assert!(one != two && one != all());
        let mut sorted = one;
        sorted.sort_unstable();
        assert_eq!(sorted, all());
    }

    #[test]
    fn parts_are_whole_texts_and_nearly_equal() {
        let ends = |rows: &[usize], buffer| -> Vec<usize> {
            parts(rows, buffer).iter().map(|p| p.end).collect()
        };
        assert_eq!(ends(&[3, 4, 5], 12), [3]);
        assert_eq!(ends(&[3, 4, 5], 6), [2, 3]);
        assert_eq!(ends(&[10], 3), [1]);
        assert!(ends(&[], 3).is_empty());
        let rows: Vec<usize> = (0..1000).map(|i| 1 + (i * 37) % 101).collect();
        let all: usize = rows.iter().sum();
        for buffer in [500, 3000, all - 1, all] {
            let parts = parts(&rows, buffer);
            assert_eq!(parts.len(), all.div_ceil(buffer));
            assert!(parts.windows(2).all(|p| p[0].end == p[1].start));
            assert_eq!((parts[0].start, parts[parts.len() - 1].end), (0, 1000));
            for part in parts {
                let n: usize = rows[part].iter().sum();
                assert!(n < buffer + 101, "{n} of {buffer}");
            }
        }
    }
}
