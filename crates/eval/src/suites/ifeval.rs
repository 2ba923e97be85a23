//! IFEval (Zhou et al. 2023): requests with constraints that a program can check.
//!
//! Each constraint is a variant of [`Instruction`] with the arguments of the data file. What counts
//! as followed is what lm-evaluation-harness counts, but for what it leaves to other libraries:
//!
//! | there | here |
//! | --- | --- |
//! | `langdetect` | the crate `whatlang`, which knows no Swahili: such an answer counts as not followed |
//! | NLTK's trained splitter of sentences | an end mark before white space, but for common abbreviations |
//! | NLTK's words for words in capitals | text between white space and marks other than `-`, `'`, `.` |
//! | a letter that is none: a random one | the character itself |
//!
//! *Strict* checks the reply; *loose* also the reply without its first line, its last line, both, and
//! each of these without asterisks.

use std::collections::BTreeMap;
use std::path::Path;

use regex::{Regex, escape};
use serde_json::{Map, Value};

use super::{Ask, Item, Marking};
use crate::error::EvalError;
use crate::rows::{Row, read};

/// The harness's limit on a reply.
const MAX_NEW_TOKENS: usize = 1280;
/// The answers that `constrained_response` allows.
const ANSWERS: [&str; 3] = [
    "My answer is yes.",
    "My answer is no.",
    "My answer is maybe.",
];
/// Before whose full stop no sentence ends.
const ABBREVIATIONS: [&str; 22] = [
    "mr", "mrs", "ms", "dr", "prof", "st", "vs", "jr", "sr", "inc", "ltd", "co", "corp", "e.g",
    "i.e", "u.s", "u.k", "a.m", "p.m", "no", "fig", "etc",
];

/// Fewer than a number, or at least that many.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Count {
    less: bool,
    than: usize,
}

impl Count {
    fn holds(self, n: usize) -> bool {
        (n < self.than) == self.less
    }
}

/// A constraint.
#[derive(Debug, Clone, PartialEq)]
enum Instruction {
    Keywords(Vec<String>),
    Frequency(String, Count),
    Forbidden(Vec<String>),
    Letter(String, Count),
    Language(String),
    Sentences(Count),
    Words(Count),
    Paragraphs(usize),
    FirstWord {
        paragraphs: usize,
        nth: usize,
        word: String,
    },
    Placeholders(usize),
    Postscript(String),
    Bullets(usize),
    OneAnswer,
    Highlights(usize),
    Sections(String, usize),
    Json,
    Title,
    TwoReplies,
    Repeat(String),
    End(String),
    Capitals(Count),
    Upper,
    Lower,
    NoComma,
    Quoted,
}

/// The arguments of an instruction, for messages with their row.
struct Arguments<'r>(&'r Row, &'r Map<String, Value>);

impl Arguments<'_> {
    fn text(&self, key: &str) -> Result<String, EvalError> {
        let text = self.1.get(key).and_then(Value::as_str);
        text.map(|t| t.trim().to_owned()).ok_or_else(|| {
            self.0
                .wrong(&format!("kwargs.{key}"), "is missing or no text")
        })
    }

    fn number(&self, key: &str) -> Result<usize, EvalError> {
        // Tables that went through a frame of numbers have 3.0 for 3.
        let n = self.1.get(key).and_then(Value::as_f64);
        n.filter(|n| *n >= 0.0 && n.fract() == 0.0 && *n < 1e9)
            .map(|n| n as usize)
            .ok_or_else(|| {
                self.0
                    .wrong(&format!("kwargs.{key}"), "is missing or no number")
            })
    }

    fn texts(&self, key: &str) -> Result<Vec<String>, EvalError> {
        let list = self.1.get(key).and_then(Value::as_array);
        let texts = list.and_then(|l| l.iter().map(|v| v.as_str().map(str::to_owned)).collect());
        texts.ok_or_else(|| {
            self.0
                .wrong(&format!("kwargs.{key}"), "is missing or no list of texts")
        })
    }

    fn count(&self, relation: &str, number: &str) -> Result<Count, EvalError> {
        let less = match self.text(relation)?.as_str() {
            "less than" => true,
            "at least" => false,
            other => {
                let reason = format!("'{other}' is neither `less than` nor `at least`");
                return Err(self.0.wrong(&format!("kwargs.{relation}"), reason));
            }
        };
        let than = self.number(number)?;
        Ok(Count { less, than })
    }
}

impl Instruction {
    fn new(id: &str, row: &Row, arguments: &Map<String, Value>) -> Result<Self, EvalError> {
        let a = Arguments(row, arguments);
        Ok(match id {
            "keywords:existence" => Self::Keywords(a.texts("keywords")?),
            "keywords:frequency" => {
                Self::Frequency(a.text("keyword")?, a.count("relation", "frequency")?)
            }
            "keywords:forbidden_words" => Self::Forbidden(a.texts("forbidden_words")?),
            "keywords:letter_frequency" => {
                let letter = a.text("letter")?.to_lowercase();
                Self::Letter(letter, a.count("let_relation", "let_frequency")?)
            }
            "language:response_language" => Self::Language(a.text("language")?),
            "length_constraints:number_sentences" => {
                Self::Sentences(a.count("relation", "num_sentences")?)
            }
            "length_constraints:number_words" => Self::Words(a.count("relation", "num_words")?),
            "length_constraints:number_paragraphs" => Self::Paragraphs(a.number("num_paragraphs")?),
            "length_constraints:nth_paragraph_first_word" => Self::FirstWord {
                paragraphs: a.number("num_paragraphs")?,
                nth: a.number("nth_paragraph")?,
                word: a.text("first_word")?.to_lowercase(),
            },
            "detectable_content:number_placeholders" => {
                Self::Placeholders(a.number("num_placeholders")?)
            }
            "detectable_content:postscript" => Self::Postscript(a.text("postscript_marker")?),
            "detectable_format:number_bullet_lists" => Self::Bullets(a.number("num_bullets")?),
            "detectable_format:constrained_response" => Self::OneAnswer,
            "detectable_format:number_highlighted_sections" => {
                Self::Highlights(a.number("num_highlights")?)
            }
            "detectable_format:multiple_sections" => {
                Self::Sections(a.text("section_spliter")?, a.number("num_sections")?)
            }
            "detectable_format:json_format" => Self::Json,
            "detectable_format:title" => Self::Title,
            "combination:two_responses" => Self::TwoReplies,
            "combination:repeat_prompt" => Self::Repeat(a.text("prompt_to_repeat")?.to_lowercase()),
            "startend:end_checker" => Self::End(a.text("end_phrase")?.to_lowercase()),
            "startend:quotation" => Self::Quoted,
            "change_case:capital_word_frequency" => {
                Self::Capitals(a.count("capital_relation", "capital_frequency")?)
            }
            "change_case:english_capital" => Self::Upper,
            "change_case:english_lowercase" => Self::Lower,
            "punctuation:no_comma" => Self::NoComma,
            other => {
                let reason = format!("'{other}' is no instruction that demur can check");
                return Err(row.wrong("instruction_id_list", reason));
            }
        })
    }

    fn followed(&self, reply: &str) -> bool {
        if reply.trim().is_empty() {
            return false;
        }
        match self {
            Self::Keywords(words) => words.iter().all(|w| occurrences(&escape(w), reply) > 0),
            Self::Frequency(word, n) => n.holds(occurrences(&escape(word), reply)),
            Self::Forbidden(words) => words
                .iter()
                .all(|w| occurrences(&format!(r"\b{}\b", escape(w)), reply) == 0),
            Self::Letter(letter, n) => n.holds(reply.to_lowercase().matches(letter).count()),
            Self::Language(code) => is_in(code, reply),
            Self::Sentences(n) => n.holds(sentences(reply)),
            Self::Words(n) => n.holds(occurrences(r"\w+", reply)),
            Self::Paragraphs(n) => paragraphs(reply) == Some(*n),
            Self::FirstWord {
                paragraphs,
                nth,
                word,
            } => first_word(reply, *paragraphs, *nth).as_deref() == Some(word),
            Self::Placeholders(n) => occurrences(r"\[.*?\]", reply) >= *n,
            Self::Postscript(mark) => {
                let pattern = match mark.as_str() {
                    "P.P.S" => r"p\.\s?p\.\s?s".to_owned(),
                    "P.S." => r"p\.\s?s\.".to_owned(),
                    other => escape(&other.to_lowercase()),
                };
                occurrences(&pattern, &reply.to_lowercase()) > 0
            }
            Self::Bullets(n) => {
                let stars = occurrences(r"(?m)^\s*\*[^*].*$", reply);
                stars + occurrences(r"(?m)^\s*-.*$", reply) == *n
            }
            Self::OneAnswer => ANSWERS.iter().any(|a| reply.contains(a)),
            Self::Highlights(n) => highlights(reply) >= *n,
            Self::Sections(mark, n) => {
                occurrences(&format!(r"(?-i){}\s?\d+", escape(mark)), reply) >= *n
            }
            Self::Json => {
                let mut text = reply.trim();
                for fence in ["```json", "```Json", "```JSON", "```"] {
                    text = text.strip_prefix(fence).unwrap_or(text);
                }
                let text = text.strip_suffix("```").unwrap_or(text).trim();
                serde_json::from_str::<Value>(text).is_ok()
            }
            Self::Title => found(r"<<[^\n]+>>", reply).iter().any(|t| {
                let inner = t.trim_start_matches('<').trim_end_matches('>');
                !inner.trim().is_empty()
            }),
            Self::TwoReplies => two_replies(reply),
            Self::Repeat(request) => reply.trim().to_lowercase().starts_with(request),
            Self::End(phrase) => {
                let reply = reply.trim().trim_matches('"').to_lowercase();
                reply.ends_with(phrase)
            }
            Self::Capitals(n) => n.holds(capitals(reply)),
            Self::Upper => {
                !reply.chars().any(char::is_lowercase)
                    && reply.chars().any(char::is_uppercase)
                    && is_in("en", &reply.to_lowercase())
            }
            Self::Lower => {
                !reply.chars().any(char::is_uppercase)
                    && reply.chars().any(char::is_lowercase)
                    && is_in("en", reply)
            }
            Self::NoComma => !reply.contains(','),
            Self::Quoted => {
                let reply = reply.trim();
                reply.len() > 1 && reply.starts_with('"') && reply.ends_with('"')
            }
        }
    }
}

/// What a pattern finds, letters of either case. The patterns are ours, and what of them comes from
/// a file is escaped.
fn found<'t>(pattern: &str, text: &'t str) -> Vec<&'t str> {
    let pattern = Regex::new(&format!("(?i){pattern}"));
    pattern.map_or_else(
        |_| Vec::new(),
        |p| p.find_iter(text).map(|m| m.as_str()).collect(),
    )
}

fn occurrences(pattern: &str, text: &str) -> usize {
    found(pattern, text).len()
}

/// Whether the text is in the language with this ISO 639-1 code. A text without words is in any.
fn is_in(code: &str, text: &str) -> bool {
    const CODES: [(&str, &str); 30] = [
        ("en", "eng"),
        ("de", "deu"),
        ("fr", "fra"),
        ("es", "spa"),
        ("pt", "por"),
        ("it", "ita"),
        ("nl", "nld"),
        ("ru", "rus"),
        ("uk", "ukr"),
        ("bg", "bul"),
        ("pl", "pol"),
        ("fi", "fin"),
        ("sv", "swe"),
        ("tr", "tur"),
        ("vi", "vie"),
        ("ko", "kor"),
        ("ja", "jpn"),
        ("th", "tha"),
        ("ar", "ara"),
        ("fa", "pes"),
        ("ur", "urd"),
        ("hi", "hin"),
        ("mr", "mar"),
        ("ne", "nep"),
        ("bn", "ben"),
        ("gu", "guj"),
        ("pa", "pan"),
        ("ta", "tam"),
        ("te", "tel"),
        ("kn", "kan"),
    ];
    match whatlang::detect_lang(text) {
        None => true,
        Some(lang) => CODES.contains(&(code, lang.code())),
    }
}

/// Sentences: parts that end in a mark before white space, and what is left.
fn sentences(text: &str) -> usize {
    let ends = |word: &str| {
        let bare = word.trim_end_matches(['"', '\'', ')', ']', '”', '’', '*']);
        let Some(stem) = bare.strip_suffix('.') else {
            return bare.ends_with(['!', '?']);
        };
        let stem = stem.trim_start_matches(|c: char| !c.is_alphanumeric());
        let initial = stem.chars().count() == 1 && stem.chars().all(char::is_uppercase);
        !initial && !ABBREVIATIONS.contains(&stem.to_lowercase().as_str())
    };
    let words: Vec<&str> = text.split_whitespace().collect();
    let ended = words.iter().filter(|w| ends(w)).count();
    ended + usize::from(words.last().is_some_and(|w| !ends(w)))
}

/// Parts between `***`; none if one in the middle is blank.
fn paragraphs(text: &str) -> Option<usize> {
    let parts: Vec<&str> = text.split("***").collect();
    let blank = |i: &usize| parts[*i].trim().is_empty();
    let blanks: Vec<usize> = (0..parts.len()).filter(blank).collect();
    let inside = blanks.iter().any(|&i| i != 0 && i + 1 != parts.len());
    (!inside).then(|| parts.len() - blanks.len())
}

/// The first word of paragraph `nth`, if there are `count` paragraphs.
fn first_word(text: &str, count: usize, nth: usize) -> Option<String> {
    let parts: Vec<&str> = text.split("\n\n").collect();
    let n = parts.iter().filter(|p| !p.trim().is_empty()).count();
    if n != count || nth == 0 || nth > n {
        return None;
    }
    let word = parts[nth - 1].split_whitespace().next()?;
    let word = word.trim_start_matches('\'').trim_start_matches('"');
    let end = word.find(['.', ',', '?', '!', '\'', '"']);
    Some(word[..end.unwrap_or(word.len())].to_lowercase())
}

fn highlights(text: &str) -> usize {
    let filled = |pattern: &str| {
        let all = found(pattern, text);
        all.iter()
            .filter(|h| !h.trim_matches('*').trim().is_empty())
            .count()
    };
    filled(r"\*[^\n*]*\*") + filled(r"\*\*[^\n*]*\*\*")
}

fn two_replies(text: &str) -> bool {
    let parts: Vec<&str> = text.split("******").map(str::trim).collect();
    let last = parts.len() - 1;
    if (1..last).any(|i| parts[i].is_empty()) {
        return false;
    }
    let filled: Vec<&&str> = parts.iter().filter(|p| !p.is_empty()).collect();
    filled.len() == 2 && filled[0] != filled[1]
}

/// Words without a small letter and with a capital one.
fn capitals(text: &str) -> usize {
    let inside = |c: char| c.is_alphanumeric() || matches!(c, '-' | '\'' | '.' | '_');
    let words = text.split(|c: char| !inside(c));
    let capital =
        |w: &&str| w.chars().any(char::is_uppercase) && !w.chars().any(char::is_lowercase);
    words.filter(capital).count()
}

/// The constraints of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Instructions(Vec<Instruction>);

impl Instructions {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The metrics of a reply: `inst_level_*` are the share of the constraints that are followed,
    /// `prompt_level_*` whether all are.
    pub fn mark(&self, reply: &str) -> BTreeMap<String, f64> {
        let lines: Vec<&str> = reply.split('\n').collect();
        let part = |from: usize, to: usize| lines.get(from..to).unwrap_or_default().join("\n");
        let n = lines.len();
        let mut loose = vec![
            reply.to_owned(),
            part(1, n).trim().to_owned(),
            part(0, n - 1).trim().to_owned(),
            part(1, n.saturating_sub(1)).trim().to_owned(),
        ];
        loose.extend(loose.clone().iter().map(|r| r.replace('*', "")));
        let mut metrics = BTreeMap::new();
        for (name, replies) in [("strict", &loose[..1]), ("loose", &loose[..])] {
            let followed = |i: &&Instruction| replies.iter().any(|r| i.followed(r));
            let kept = self.0.iter().filter(followed).count();
            let share = kept as f64 / self.0.len().max(1) as f64;
            metrics.insert(format!("inst_level_{name}_acc"), share);
            let all = f64::from(u8::from(kept == self.0.len()));
            metrics.insert(format!("prompt_level_{name}_acc"), all);
        }
        metrics
    }
}

/// `ifeval`: the request as plain text, no examples.
pub fn ifeval(path: &Path) -> Result<Vec<Item>, EvalError> {
    let one = |(at, row): (usize, &Row)| {
        let ids = row.texts(&["instruction_id_list"])?;
        let given = row.find(&["kwargs"]).and_then(Value::as_array);
        let given = given.filter(|g| g.len() == ids.len());
        let given =
            given.ok_or_else(|| row.wrong("kwargs", "is no list with one entry an instruction"))?;
        let mut all = Vec::new();
        for (id, arguments) in ids.iter().zip(given) {
            let object = arguments.as_object();
            let object =
                object.ok_or_else(|| row.wrong("kwargs", "has an entry that is no object"))?;
            all.push(Instruction::new(id, row, object)?);
        }
        let id = row.label(&["id", "key"]).unwrap_or_else(|| at.to_string());
        Ok(Item::alone(
            "ifeval",
            id,
            Ask::Write {
                prompt: row.text(&["prompt"])?.to_owned(),
                until: Vec::new(),
                max_new_tokens: MAX_NEW_TOKENS,
                marking: Marking::Instructions(Instructions(all)),
            },
        ))
    };
    read(path)?.iter().enumerate().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::jsonl;
    use serde_json::json;

    #[track_caller]
    fn check(id: &str, arguments: Value, reply: &str, expected: bool) {
        let row = jsonl("f", "{}".as_bytes()).unwrap().remove(0);
        let i = Instruction::new(id, &row, arguments.as_object().unwrap()).unwrap();
        assert_eq!(i.followed(reply), expected, "{id} {reply:?}");
    }

    #[test]
    fn words_and_letters_by_hand() {
        let keywords = json!({ "keywords": ["Tree", "c++"] });
        check(
            "keywords:existence",
            keywords.clone(),
            "trees and C++",
            true,
        );
        check("keywords:existence", keywords, "trees", false);
        let twice = json!({ "keyword": "sun", "frequency": 2, "relation": "at least" });
        check("keywords:frequency", twice.clone(), "Sunny sun", true);
        check("keywords:frequency", twice, "the sun", false);
        let no = json!({ "forbidden_words": ["sun"] });
        check("keywords:forbidden_words", no.clone(), "a sunny day", true);
        check("keywords:forbidden_words", no, "the Sun!", false);
        let few = json!({ "letter": "q", "let_frequency": 2.0, "let_relation": "less than" });
        check("keywords:letter_frequency", few.clone(), "Quick", true);
        check("keywords:letter_frequency", few, "quiQ", false);
        let many = json!({ "num_words": 3, "relation": "at least" });
        check(
            "length_constraints:number_words",
            many.clone(),
            "one two-three",
            true,
        );
        check("length_constraints:number_words", many, "one two", false);
        let loud = json!({ "capital_frequency": 2, "capital_relation": "at least" });
        check(
            "change_case:capital_word_frequency",
            loud.clone(),
            "I SAY: no",
            true,
        );
        check(
            "change_case:capital_word_frequency",
            loud,
            "I say 42",
            false,
        );
        check("punctuation:no_comma", json!({}), "a; b", true);
        check("punctuation:no_comma", json!({}), "a, b", false);
    }

    #[test]
    fn lengths_by_hand() {
        let three = json!({ "num_sentences": 3, "relation": "less than" });
        let id = "length_constraints:number_sentences";
        check(id, three.clone(), "Dr. Who came. He left (at last).", true);
        check(id, three, "One. \"Two!\" Three", false);
        let two = json!({ "num_paragraphs": 2 });
        let id = "length_constraints:number_paragraphs";
        check(id, two.clone(), "a\n***\nb", true);
        check(id, two.clone(), "***\na\n***\nb\n***", true);
        check(id, two.clone(), "a\n***\n\n***\nb", false);
        check(id, two, "a", false);
        let word = json!({ "num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then" });
        let id = "length_constraints:nth_paragraph_first_word";
        check(id, word.clone(), "First.\n\n\"Then, he left", true);
        check(id, word.clone(), "First.\n\nThenceforth", false);
        check(id, word, "First.\n\nThen\n\nMore", false);
    }

    #[test]
    fn formats_by_hand() {
        let n = |key: &str, n: usize| json!({ key: n });
        let id = "detectable_content:number_placeholders";
        check(id, n("num_placeholders", 2), "[a] and [b c]", true);
        check(id, n("num_placeholders", 2), "[a\n] and [b]", false);
        let id = "detectable_format:number_bullet_lists";
        check(id, n("num_bullets", 3), "* a\n  - b\n* c", true);
        check(id, n("num_bullets", 2), "** a **\n* b", false);
        let id = "detectable_format:number_highlighted_sections";
        check(id, n("num_highlights", 2), "*a* and *b*", true);
        check(id, n("num_highlights", 2), "*a* and * *", false);
        let mark = json!({ "section_spliter": "Part", "num_sections": 2 });
        let id = "detectable_format:multiple_sections";
        check(id, mark.clone(), "Part 1\na\nPart 2\nb", true);
        check(id, mark, "Part 1\na\npart 2", false);
        let id = "detectable_content:postscript";
        check(
            id,
            json!({ "postscript_marker": "P.S." }),
            "Bye\nP. S. Write!",
            true,
        );
        check(
            id,
            json!({ "postscript_marker": "P.P.S" }),
            "Bye\nP.S. Write!",
            false,
        );
        check(
            "detectable_format:title",
            json!({}),
            "<<A day>>\ntext",
            true,
        );
        check("detectable_format:title", json!({}), "<< >>\ntext", false);
        check(
            "detectable_format:json_format",
            json!({}),
            "```json\n{\"a\": 1}\n```",
            true,
        );
        check("detectable_format:json_format", json!({}), "{a: 1}", false);
        let id = "detectable_format:constrained_response";
        check(id, json!({}), "My answer is no.", true);
        check(id, json!({}), "No.", false);
        check("combination:two_responses", json!({}), "a\n******\nb", true);
        check(
            "combination:two_responses",
            json!({}),
            "a\n******\na",
            false,
        );
        let ask = json!({ "prompt_to_repeat": "Say it." });
        check(
            "combination:repeat_prompt",
            ask.clone(),
            " say it. It.",
            true,
        );
        check("combination:repeat_prompt", ask, "It. Say it.", false);
        let end = json!({ "end_phrase": "That is all." });
        check(
            "startend:end_checker",
            end.clone(),
            "Well. that is all.\"",
            true,
        );
        check("startend:end_checker", end, "That is all. Bye", false);
        check("startend:quotation", json!({}), "\"a\" ", true);
        check("startend:quotation", json!({}), "\"", false);
    }

    #[test]
    fn languages_by_hand() {
        let en = "the weather was fine and we went to the lake with all of our friends.";
        check("change_case:english_lowercase", json!({}), en, true);
        check(
            "change_case:english_lowercase",
            json!({}),
            "The weather",
            false,
        );
        let de = "das wetter war schön und wir sind mit unseren freunden an den see gefahren.";
        check("change_case:english_lowercase", json!({}), de, false);
        check(
            "change_case:english_capital",
            json!({}),
            &en.to_uppercase(),
            true,
        );
        check("change_case:english_capital", json!({}), en, false);
        let id = "language:response_language";
        check(id, json!({ "language": "de" }), de, true);
        check(id, json!({ "language": "hi" }), de, false);
        check(
            id,
            json!({ "language": "kn" }),
            "ನನ್ನ ಹೆಸರು ಮಾರಾ ಮತ್ತು ನಾನು ಇಲ್ಲಿ ವಾಸಿಸುತ್ತೇನೆ",
            true,
        );
    }

    #[test]
    fn strict_loose_and_shares() {
        let line = r#"{"prompt": "?", "instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}"#;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ifeval.jsonl");
        std::fs::write(&path, line).unwrap();
        let Ask::Write {
            marking: Marking::Instructions(i),
            ..
        } = &ifeval(&path).unwrap()[0].ask
        else {
            panic!()
        };
        // Without its first line the reply is quoted and has no comma.
        let m = i.mark("Sure, here:\n\"text\"");
        let of = |name: &str| m[&format!("{name}_acc")];
        assert_eq!(
            (of("inst_level_strict"), of("prompt_level_strict")),
            (0.0, 0.0)
        );
        assert_eq!(
            (of("inst_level_loose"), of("prompt_level_loose")),
            (1.0, 1.0)
        );
        let m = i.mark("\"one, two\"");
        assert_eq!(
            (m["inst_level_strict_acc"], m["prompt_level_strict_acc"]),
            (0.5, 0.0)
        );
        for (ids, kwargs, words) in [
            ("\"odd:one\"", "{}", "odd:one"),
            ("\"startend:end_checker\"", "{}", "kwargs.end_phrase"),
            ("\"punctuation:no_comma\"", "", "kwargs"),
        ] {
            let line = format!(
                r#"{{"prompt": "?", "instruction_id_list": [{ids}], "kwargs": [{kwargs}]}}"#
            );
            std::fs::write(&path, line).unwrap();
            let e = ifeval(&path).unwrap_err().to_string();
            assert!(e.contains(words) && e.contains("ifeval.jsonl:1"), "{e}");
        }
    }
}
