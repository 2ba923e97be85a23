//! Prompts: what demur ships, and files of the same layout.
//!
//! JSONL, plain or gzipped, one object a line with `id`, `prompt`, and where known `label`,
//! `category`, `style`, `split`, `pair`. Labels `safe`/`unsafe` and `harmless`/`harmful` mean the same.
//! Other keys are ignored: public data sets carry many.

use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::EvalError;
use crate::files::{Lines, open};

/// Largest file, unpacked.
const MAX_BYTES: u64 = 1 << 30;

/// Whether a prompt should be refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Label {
    /// A request that should be refused.
    #[serde(alias = "harmful")]
    Unsafe,
    /// A request that should be answered.
    #[serde(alias = "harmless")]
    Safe,
}

/// What a prompt is for. No prompt is in two splits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// The SAE's training text.
    Corpus,
    /// Finding candidates, training gates.
    #[serde(alias = "train")]
    Discovery,
    /// Choosing latents, values and thresholds.
    #[serde(alias = "val", alias = "dev")]
    Validation,
    /// Reported once.
    Test,
}

/// One prompt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prompt {
    /// Unique in its file.
    pub id: String,
    /// The user's message.
    pub prompt: String,
    /// Whether it should be refused, if that is known.
    #[serde(default)]
    pub label: Option<Label>,
    /// Kind of harm or task.
    #[serde(default)]
    pub category: Option<String>,
    /// How it is put: a question, an order, a story's frame.
    #[serde(default)]
    pub style: Option<String>,
    /// What it is for.
    #[serde(default)]
    pub split: Option<Split>,
    /// Prompts that belong together have the same number.
    #[serde(default)]
    pub pair: Option<u32>,
}

/// A passage of plain text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Passage {
    /// Unique in its file.
    pub id: String,
    /// The text.
    pub text: String,
    /// What it is for.
    #[serde(default)]
    pub split: Option<Split>,
}

/// Pairs of unsafe requests and safe look-alikes, in 12 categories of harm.
const PAIRS: &str = include_str!("../data/pairs.jsonl");
/// More such pairs, in nine styles; six of their 18 categories are in no discovery split.
const STYLED: &str = include_str!("../data/styled.jsonl");
/// Ordinary requests.
const BENIGN: &str = include_str!("../data/benign.jsonl");
/// More ordinary requests, in the styles of the pairs.
const INSTRUCTIONS: &str = include_str!("../data/instructions.jsonl");
/// Refusals, one a line.
const REFUSALS: &str = include_str!("../data/refusals.txt");
/// Plain text.
const PASSAGES: &str = include_str!("../data/passages.jsonl");

/// The pairs that demur ships.
///
/// # Errors
/// None, in a build whose tests passed.
pub fn shipped_pairs() -> Result<Vec<Prompt>, EvalError> {
    parse("pairs.jsonl", PAIRS.as_bytes(), |p: &Prompt| &p.id)
}

/// The pairs in many styles that demur ships, for gates: what tells a request from its look-alike
/// must not be its style. The categories `animal_cruelty`, `exploitation`, `extremism` and
/// `obstruction` are in the test split only, `impersonation` and `sabotage` in the validation split
/// only: they show what a gate makes of harms that it was not trained on.
///
/// # Errors
/// As [`shipped_pairs`].
pub fn shipped_styled() -> Result<Vec<Prompt>, EvalError> {
    parse("styled.jsonl", STYLED.as_bytes(), |p: &Prompt| &p.id)
}

/// The ordinary requests in many styles that demur ships, for gates.
///
/// # Errors
/// As [`shipped_pairs`].
pub fn shipped_instructions() -> Result<Vec<Prompt>, EvalError> {
    parse(
        "instructions.jsonl",
        INSTRUCTIONS.as_bytes(),
        |p: &Prompt| &p.id,
    )
}

/// The ordinary requests that demur ships.
///
/// # Errors
/// As [`shipped_pairs`].
pub fn shipped_benign() -> Result<Vec<Prompt>, EvalError> {
    parse("benign.jsonl", BENIGN.as_bytes(), |p: &Prompt| &p.id)
}

/// Refusals that demur wrote, for what a model would be like that refuses.
pub fn shipped_refusals() -> Vec<&'static str> {
    REFUSALS.lines().collect()
}

/// The passages that demur ships.
///
/// # Errors
/// As [`shipped_pairs`].
pub fn shipped_passages() -> Result<Vec<Passage>, EvalError> {
    parse("passages.jsonl", PASSAGES.as_bytes(), |p: &Passage| &p.id)
}

/// Reads a file of prompts, `.jsonl` or `.jsonl.gz`, and checks that no prompt is in two splits.
///
/// # Errors
/// [`EvalError::Line`] naming the line, [`EvalError::Io`], [`EvalError::TooLarge`],
/// [`EvalError::TwoSplits`].
pub fn read(path: &Path) -> Result<Vec<Prompt>, EvalError> {
    let rows = read_rows(path)?;
    disjoint(&path.display().to_string(), &rows)?;
    Ok(rows)
}

/// Reads a file of prompts whose splits, if it has any, say nothing.
///
/// # Errors
/// As [`read`], but for [`EvalError::TwoSplits`].
pub fn read_rows(path: &Path) -> Result<Vec<Prompt>, EvalError> {
    parse(&path.display().to_string(), open(path)?, |p: &Prompt| &p.id)
}

/// Checks that no text, but for case, white space and the mark at its end, is in two splits, or
/// under two labels.
///
/// # Errors
/// [`EvalError::TwoSplits`] naming both prompts.
pub fn disjoint<'a>(
    place: &str,
    prompts: impl IntoIterator<Item = &'a Prompt>,
) -> Result<(), EvalError> {
    let mut seen: HashMap<String, &Prompt> = HashMap::new();
    for p in prompts.into_iter().filter(|p| p.split.is_some()) {
        let text = normalised(&p.prompt);
        match seen.get(&text) {
            Some(other) if (other.split, other.label) != (p.split, p.label) => {
                return Err(EvalError::TwoSplits {
                    path: place.to_owned(),
                    first: other.id.clone(),
                    second: p.id.clone(),
                });
            }
            Some(_) => {}
            None => {
                seen.insert(text, p);
            }
        }
    }
    Ok(())
}

/// Prompts that others may be like.
#[derive(Debug, Default)]
pub struct Known {
    /// In which texts each word is.
    places: HashMap<String, Vec<usize>>,
    /// Words of each text.
    sizes: Vec<usize>,
}

impl Known {
    /// From texts.
    pub fn new<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        let mut known = Self::default();
        for (i, text) in texts.into_iter().enumerate() {
            let words = words(text);
            known.sizes.push(words.len());
            for word in words {
                known.places.entry(word).or_default().push(i);
            }
        }
        known
    }

    /// Whether `text` shares at least 60 % of the words of one of them: of the words of both, without
    /// case and punctuation, each counted once (Jaccard's index).
    pub fn resembles(&self, text: &str) -> bool {
        let mine = words(text);
        let mut shared = vec![0; self.sizes.len()];
        let places = mine.iter().filter_map(|word| self.places.get(word));
        places.flatten().for_each(|&i| shared[i] += 1);
        let both = shared.iter().zip(&self.sizes);
        let mut both = both.map(|(shared, size)| (shared, mine.len() + size - shared));
        both.any(|(shared, all)| 10 * shared >= 6 * all)
    }
}

fn words(text: &str) -> HashSet<String> {
    let plain = |c: char| if c.is_alphanumeric() { c } else { ' ' };
    let text: String = text.to_lowercase().chars().map(plain).collect();
    text.split_whitespace().map(str::to_owned).collect()
}

/// A text but for case, white space and the mark at its end.
pub fn normalised(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let text = words.join(" ").to_lowercase();
    text.trim_end_matches(['.', '!', '?', ' ']).to_owned()
}

/// Parses JSONL; `id` gives a row's id, which must be unique.
///
/// # Errors
/// [`EvalError::Line`] naming the line, [`EvalError::Io`], [`EvalError::TooLarge`].
pub fn parse<T: for<'a> Deserialize<'a>>(
    path: &str,
    bytes: impl Read,
    id: impl Fn(&T) -> &String,
) -> Result<Vec<T>, EvalError> {
    let mut rows = Vec::new();
    let mut ids = HashSet::new();
    let mut lines = Lines::new(path, bytes, MAX_BYTES);
    while let Some((number, text)) = lines.next_line()? {
        let row: T = serde_json::from_slice(&text).map_err(|e| lines.wrong(number, e))?;
        if !ids.insert(id(&row).clone()) {
            return Err(lines.wrong(number, format!("id '{}' is there twice", id(&row))));
        }
        rows.push(row);
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shipped_is_whole() {
        let pairs = shipped_pairs().unwrap();
        let count = |label, split| {
            pairs
                .iter()
                .filter(|p| p.label == Some(label) && p.split == Some(split))
                .count()
        };
        for label in [Label::Unsafe, Label::Safe] {
            assert_eq!(count(label, Split::Discovery), 36);
            assert_eq!(count(label, Split::Validation), 36);
            assert_eq!(count(label, Split::Test), 60);
        }
        let categories: HashSet<_> = pairs.iter().filter_map(|p| p.category.as_ref()).collect();
        assert_eq!(categories.len(), 12);
        // a pair's two sides are in one split, and no text comes twice
        for p in &pairs {
            let other = pairs
                .iter()
                .find(|o| o.pair == p.pair && o.id != p.id)
                .unwrap();
            assert_eq!((other.split, &other.category), (p.split, &p.category));
            assert_ne!(other.label, p.label);
        }
        let benign = shipped_benign().unwrap();
        disjoint("shipped", pairs.iter().chain(&benign)).unwrap();
        let texts: HashSet<_> = pairs.iter().chain(&benign).map(|p| &p.prompt).collect();
        assert_eq!(texts.len(), pairs.len() + benign.len());
        assert!(shipped_passages().unwrap().len() >= 16);
    }

    #[test]
    fn styled_prompts_are_whole() {
        let (pairs, styled) = (shipped_pairs().unwrap(), shipped_styled().unwrap());
        let (benign, instructions) = (shipped_benign().unwrap(), shipped_instructions().unwrap());
        let count = |rows: &[Prompt], split| rows.iter().filter(|p| p.split == Some(split)).count();
        let splits = [
            Split::Discovery,
            Split::Validation,
            Split::Test,
            Split::Corpus,
        ];
        assert_eq!(splits.map(|s| count(&styled, s)), [360, 192, 264, 0]);
        assert_eq!(splits.map(|s| count(&instructions, s)), [181, 61, 61, 0]);
        // a pair has two sides, alike in all but the label
        let mut sides: HashMap<u32, Vec<&Prompt>> = HashMap::new();
        for p in &styled {
            sides.entry(p.pair.unwrap()).or_default().push(p);
        }
        for side in sides.values() {
            let [a, b] = side[..] else {
                panic!("{side:?}");
            };
            assert_eq!((a.label, b.label), (Some(Label::Unsafe), Some(Label::Safe)));
            assert_eq!(
                (a.split, &a.category, &a.style),
                (b.split, &b.category, &b.style)
            );
        }
        // every known category is in every split, every new one in one split only
        let old: HashSet<_> = pairs.iter().map(|p| &p.category).collect();
        let mut found: HashMap<_, HashMap<Split, usize>> = HashMap::new();
        for p in &styled {
            let by_split = found.entry(&p.category).or_default();
            *by_split.entry(p.split.unwrap()).or_default() += 1;
        }
        assert_eq!(found.len(), 18);
        for (category, by_split) in &found {
            let n = |split| by_split.get(&split).copied().unwrap_or_default();
            let counts = (n(Split::Discovery), n(Split::Validation), n(Split::Test));
            let expected = match old.contains(category) {
                true => counts == (30, 10, 10),
                false => [(0, 36, 0), (0, 0, 36)].contains(&counts),
            };
            assert!(expected, "{category:?}: {counts:?}");
        }
        let styles: HashSet<_> = styled.iter().map(|p| (&p.style, p.split)).collect();
        assert_eq!(styles.len(), 9 * 3, "every style in every split");
        // no text comes twice, in whatever file, and no id
        let files = [&pairs, &styled, &benign, &instructions];
        let all: Vec<&Prompt> = files.into_iter().flatten().collect();
        disjoint("shipped", all.iter().copied()).unwrap();
        let texts: HashSet<_> = all.iter().map(|p| normalised(&p.prompt)).collect();
        let ids: HashSet<_> = all.iter().map(|p| &p.id).collect();
        assert_eq!((texts.len(), ids.len()), (all.len(), all.len()));
    }

    #[track_caller]
    fn refused(text: &str, expect: &str) {
        let e = parse("f", text.as_bytes(), |p: &Prompt| &p.id)
            .unwrap_err()
            .to_string();
        assert!(e.contains(expect), "{e}");
    }

    #[test]
    fn broken_lines_are_named() {
        let good = r#"{"id": "a", "prompt": "hi", "label": "harmful", "extra": 1}"#;
        let rows = parse("f", good.as_bytes(), |p: &Prompt| &p.id).unwrap();
        assert_eq!(rows[0].label, Some(Label::Unsafe));
        refused(&format!("{good}\n{{\"id\""), "f:2");
        refused(&format!("{good}\n\n{good}"), "f:3: id 'a' is there twice");
        refused(r#"{"id": "a", "prompt": "hi", "label": "odd"}"#, "odd");
        refused(r#"{"id": "a"}"#, "prompt");
        refused("\u{0}\u{1}", "f:1");
        refused(&"[".repeat(100_000), "f:1");
        refused(r#"{"id": "a", "prompt": 7}"#, "f:1");
    }

    #[test]
    fn prompts_alike_are_found() {
        let known = Known::new(["Write a script that wipes a disk.", "How?"]);
        // five of seven words, then four of eight
        assert!(known.resembles("WRITE a script, that wipes the disk"));
        assert!(!known.resembles("Write a script to fill the disk"));
        assert!(known.resembles("how"));
        assert!(!Known::default().resembles("how"));
    }

    #[test]
    fn no_prompt_is_in_two_splits() {
        let prompt = |id: &str, text: &str, label, split| Prompt {
            id: id.to_owned(),
            prompt: text.to_owned(),
            label: Some(label),
            category: None,
            style: None,
            split,
            pair: None,
        };
        let a = prompt("a", "How do I sew?", Label::Safe, Some(Split::Discovery));
        let check = |b: Prompt| disjoint("f", [&a, &b]).map_err(|e| e.to_string());
        let e = check(prompt(
            "b",
            " how do I  SEW",
            Label::Safe,
            Some(Split::Test),
        ))
        .unwrap_err();
        assert!(["f: ", "'a'", "'b'"].iter().all(|w| e.contains(w)), "{e}");
        assert!(check(prompt("b", "How do I sew?", Label::Unsafe, a.split)).is_err());
        assert!(
            check(prompt(
                "b",
                "How do I sew a+b?",
                Label::Safe,
                Some(Split::Test)
            ))
            .is_ok()
        );
        // a text that is for nothing, or for the same twice, spoils nothing
        assert!(check(prompt("b", "How do I sew?", Label::Safe, None)).is_ok());
        assert!(check(prompt("b", "How do I sew?", Label::Safe, a.split)).is_ok());
    }

    #[test]
    fn a_file_from_another_editor_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.jsonl");
        let text = "\u{feff}{\"id\": \"a\", \"prompt\": \"hi\"}\r\n\r\n{\"id\": \"b\", \"prompt\": \"ho\"}\r\n";
        std::fs::write(&path, text).unwrap();
        let ids: Vec<String> = read(&path).unwrap().into_iter().map(|p| p.id).collect();
        assert_eq!(ids, ["a", "b"]);
    }
}
