//! Prompts: what demur ships, and files of the same layout.
//!
//! JSONL, plain or gzipped, one object a line with `id`, `prompt`, and where known `label`,
//! `category`, `split`, `pair`. Labels `safe`/`unsafe` and `harmless`/`harmful` mean the same. Other
//! keys are ignored: public data sets carry many.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::EvalError;

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
    /// Finding candidates.
    Discovery,
    /// Choosing latents and values.
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
/// Ordinary requests.
const BENIGN: &str = include_str!("../data/benign.jsonl");
/// Plain text.
const PASSAGES: &str = include_str!("../data/passages.jsonl");

/// The pairs that demur ships.
///
/// # Errors
/// None, in a build whose tests passed.
pub fn shipped_pairs() -> Result<Vec<Prompt>, EvalError> {
    parse("pairs.jsonl", PAIRS.as_bytes(), |p: &Prompt| &p.id)
}

/// The ordinary requests that demur ships.
///
/// # Errors
/// As [`shipped_pairs`].
pub fn shipped_benign() -> Result<Vec<Prompt>, EvalError> {
    parse("benign.jsonl", BENIGN.as_bytes(), |p: &Prompt| &p.id)
}

/// The passages that demur ships.
///
/// # Errors
/// As [`shipped_pairs`].
pub fn shipped_passages() -> Result<Vec<Passage>, EvalError> {
    parse("passages.jsonl", PASSAGES.as_bytes(), |p: &Passage| &p.id)
}

/// Reads a file of prompts, `.jsonl` or `.jsonl.gz`.
///
/// # Errors
/// [`EvalError::Line`] naming the line, [`EvalError::Io`], [`EvalError::TooLarge`].
pub fn read(path: &Path) -> Result<Vec<Prompt>, EvalError> {
    parse(&path.display().to_string(), open(path)?, |p: &Prompt| &p.id)
}

/// Opens a file, unpacking `.gz`.
///
/// # Errors
/// [`EvalError::Io`].
pub fn open(path: &Path) -> Result<Box<dyn Read>, EvalError> {
    let file = File::open(path).map_err(|source| EvalError::Io {
        path: path.display().to_string(),
        source,
    })?;
    Ok(if path.extension().is_some_and(|e| e == "gz") {
        Box::new(flate2::read::MultiGzDecoder::new(file))
    } else {
        Box::new(file)
    })
}

/// Parses JSONL; `id` gives a row's id, which must be unique.
///
/// # Errors
/// As [`read`].
pub fn parse<T: for<'a> Deserialize<'a>>(
    path: &str,
    bytes: impl Read,
    id: impl Fn(&T) -> &String,
) -> Result<Vec<T>, EvalError> {
    let mut rows = Vec::new();
    let mut ids = HashSet::new();
    let mut reader = BufReader::new(bytes.take(MAX_BYTES + 1));
    let (mut text, mut line, mut total) = (Vec::new(), 0, 0u64);
    loop {
        text.clear();
        let n = reader
            .read_until(b'\n', &mut text)
            .map_err(|source| EvalError::Io {
                path: path.to_owned(),
                source,
            })?;
        if n == 0 {
            return Ok(rows);
        }
        line += 1;
        total += n as u64;
        if total > MAX_BYTES {
            return Err(EvalError::TooLarge {
                path: path.to_owned(),
                limit: MAX_BYTES,
            });
        }
        if text.trim_ascii().is_empty() {
            continue;
        }
        let error = |reason: String| EvalError::Line {
            path: path.to_owned(),
            line,
            reason,
        };
        let row: T = serde_json::from_slice(&text).map_err(|e| error(e.to_string()))?;
        if !ids.insert(id(&row).clone()) {
            return Err(error(format!("id '{}' is there twice", id(&row))));
        }
        rows.push(row);
    }
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
        let texts: HashSet<_> = pairs.iter().chain(&benign).map(|p| &p.prompt).collect();
        assert_eq!(texts.len(), pairs.len() + benign.len());
        assert!(shipped_passages().unwrap().len() >= 16);
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
    }
}
