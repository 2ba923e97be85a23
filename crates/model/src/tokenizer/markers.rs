//! Markers: the tokens that are looked for in the text itself, before any merging.
//!
//! A vocabulary holds two kinds of them. *Control* markers (`<|im_start|>`, `<end_of_turn>`)
//! carry the structure of a chat; *user-defined* markers (Gemma's runs of line ends) are plain
//! text that the model was trained to see as one token. The difference decides safety: a control
//! marker inside the words of a user must stay words, so [`Markers::find`] takes the byte ranges
//! that are *literal* and never lets a control marker touch one. User-defined markers are found
//! everywhere.
//!
//! Matching is leftmost-longest. Candidates are grouped by first byte and tried by length, so a
//! position that no marker starts at costs one table look-up; an automaton would be faster on
//! text made of markers and costs far more to build for Gemma's 6,400.

use std::collections::HashMap;
use std::ops::Range;

/// One token that is matched in the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Marker {
    /// Its id.
    pub id: u32,
    /// The text that it stands for.
    pub text: String,
    /// Structure, not text: never matched inside a literal range.
    pub control: bool,
    /// Only matched when no word character touches it.
    pub single_word: bool,
    /// Swallows white space before it.
    pub lstrip: bool,
    /// Swallows white space after it.
    pub rstrip: bool,
}

impl Marker {
    /// A marker without the rarer flags.
    pub fn new(id: u32, text: &str, control: bool) -> Self {
        Self {
            id,
            text: text.to_owned(),
            control,
            single_word: false,
            lstrip: false,
            rstrip: false,
        }
    }
}

/// A piece of the text: a marker's id, or plain text.
pub(crate) type Piece = (Option<u32>, Range<usize>);

/// A set of markers, ready to be looked for.
#[derive(Clone, Debug)]
pub(crate) struct Markers {
    by_text: HashMap<String, Marker>,
    /// Lengths of the markers that start with each byte, longest first.
    lengths: Vec<Vec<usize>>,
}

impl Markers {
    /// Empty texts are left out; of two markers with one text the last stays.
    pub fn new(markers: impl IntoIterator<Item = Marker>) -> Self {
        let mut by_text = HashMap::new();
        let mut lengths = vec![Vec::new(); 256];
        for marker in markers {
            if let Some(&first) = marker.text.as_bytes().first() {
                lengths[usize::from(first)].push(marker.text.len());
                by_text.insert(marker.text.clone(), marker);
            }
        }
        for of_byte in &mut lengths {
            of_byte.sort_unstable_by(|a, b| b.cmp(a));
            of_byte.dedup();
        }
        Self { by_text, lengths }
    }

    pub fn is_empty(&self) -> bool {
        self.by_text.is_empty()
    }

    pub fn get(&self, text: &str) -> Option<&Marker> {
        self.by_text.get(text)
    }

    /// Cuts `text` into markers and the text between them. `is_literal` says whether a byte range
    /// touches text that must stay text.
    pub fn find(&self, text: &str, is_literal: impl Fn(Range<usize>) -> bool) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut plain_from = 0;
        let mut at = 0;
        while at < text.len() {
            let Some(marker) = self.match_at(text, at, plain_from, &is_literal) else {
                at += 1;
                continue;
            };
            let (mut start, mut end) = (at, at + marker.text.len());
            if marker.lstrip {
                start = text[..start].trim_end().len().max(plain_from);
            }
            if marker.rstrip {
                end = text.len() - text[end..].trim_start().len();
            }
            if plain_from < start {
                pieces.push((None, plain_from..start));
            }
            pieces.push((Some(marker.id), start..end));
            plain_from = end;
            at = end;
        }
        if plain_from < text.len() {
            pieces.push((None, plain_from..text.len()));
        }
        pieces
    }

    /// The longest marker that may start at byte `at`.
    fn match_at(
        &self,
        text: &str,
        at: usize,
        plain_from: usize,
        is_literal: &impl Fn(Range<usize>) -> bool,
    ) -> Option<&Marker> {
        let lengths = &self.lengths[usize::from(text.as_bytes()[at])];
        lengths.iter().find_map(|&length| {
            let marker = self.by_text.get(text.get(at..at.checked_add(length)?)?)?;
            let range = at..at + length;
            if marker.control && is_literal(range.clone()) {
                return None;
            }
            let is_word = |c: char| c.is_alphanumeric() || c == '_';
            if marker.single_word
                && (text[plain_from..at]
                    .chars()
                    .next_back()
                    .is_some_and(is_word)
                    || text[range.end..].chars().next().is_some_and(is_word))
            {
                return None;
            }
            Some(marker)
        })
    }
}

/// Whether a user-defined token is written like chat structure. Converters disagree about the
/// type of such tokens, and a user must not be able to write any of them. `<s>` and `</s>` are not
/// here: in Gemma's vocabulary they are HTML.
pub(crate) fn looks_like_control(text: &str) -> bool {
    let bar = |s: &str| s.len() > 4 && s.starts_with("<|") && s.ends_with("|>");
    let wide_bar = |s: &str| s.starts_with("<｜") && s.ends_with("｜>");
    bar(text)
        || wide_bar(text)
        || matches!(
            text,
            "<start_of_turn>"
                | "<end_of_turn>"
                | "<start_of_image>"
                | "<end_of_image>"
                | "<bos>"
                | "<eos>"
                | "[INST]"
                | "[/INST]"
                | "[SYSTEM_PROMPT]"
                | "[/SYSTEM_PROMPT]"
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn markers() -> Markers {
        let mut strip = Marker::new(7, "<|user|>", true);
        strip.rstrip = true;
        Markers::new([
            Marker::new(1, "<|a|>", true),
            Marker::new(2, "<|a|><|a|>", true),
            Marker::new(3, "\n\n", false),
            Marker::new(4, "\n\n\n", false),
            Marker::new(9, "", true),
            strip,
        ])
    }

    #[track_caller]
    fn check(text: &str, literal: Range<usize>, expect: &[(Option<u32>, &str)]) {
        let pieces = markers().find(text, |r| r.start < literal.end && literal.start < r.end);
        let got: Vec<_> = pieces
            .iter()
            .map(|(id, r)| (*id, &text[r.clone()]))
            .collect();
        assert_eq!(got, expect);
    }

    #[test]
    fn leftmost_longest() {
        check(
            "é<|a|><|a|>x",
            0..0,
            &[(None, "é"), (Some(2), "<|a|><|a|>"), (None, "x")],
        );
        check(
            "\n\n\n\n\n",
            0..0,
            &[(Some(4), "\n\n\n"), (Some(3), "\n\n")],
        );
        check("", 0..0, &[]);
    }

    #[test]
    fn control_never_touches_a_literal_range() {
        check("<|a|>", 0..5, &[(None, "<|a|>")]);
        // One literal byte in the middle is enough; the text around is still parsed.
        check("<|a|><|a|>", 6..7, &[(Some(1), "<|a|>"), (None, "<|a|>")]);
        check("\n\n", 0..2, &[(Some(3), "\n\n")]);
    }

    #[test]
    fn strip_swallows_white_space() {
        check(
            "<|user|> \n hi",
            0..0,
            &[(Some(7), "<|user|> \n "), (None, "hi")],
        );
    }
}
