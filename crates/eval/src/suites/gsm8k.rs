//! Word problems with a number as answer, written out.

use std::path::Path;
use std::sync::LazyLock;

use regex::Regex;

use super::python_random::Random;
use super::{Ask, Item, Marking};
use crate::error::EvalError;
use crate::rows::{Row, read};

/// The harness's seed for examples.
const SEED: u32 = 1234;
/// The harness's limit on a reply.
const MAX_NEW_TOKENS: usize = 256;

/// How a written answer is marked: what a pattern finds in it must be the reference, both without
/// commas, dollar signs, what stands before `#### `, a full stop at the end, and case.
#[derive(Debug, Clone, PartialEq)]
pub struct Number {
    /// The reference.
    pub reference: String,
    /// Whether the strict pattern is that of reasoning in words.
    pub words: bool,
}

static HASHES: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"#### (\-?[0-9\.\,]+)").ok());
static WORDED: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"The answer is (\-?[0-9\.\,]+).").ok());
static ANY_NUMBER: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"(-?[$0-9.,]{2,})|(-?[0-9]+)").ok());

impl Number {
    /// `(strict, flexible)`: by the first match of the strict pattern, and by the last number.
    pub fn mark(&self, reply: &str) -> (bool, bool) {
        let pattern = if self.words { &WORDED } else { &HASHES };
        let group = |c: regex::Captures<'_>| {
            let groups = c.iter().skip(1).flatten();
            groups
                .map(|m| m.as_str().to_owned())
                .find(|s| !s.is_empty())
        };
        let strict = pattern
            .as_ref()
            .and_then(|p| p.captures(reply))
            .and_then(group);
        let flexible = ANY_NUMBER
            .as_ref()
            .and_then(|p| p.captures_iter(reply).last())
            .and_then(group);
        let right =
            |found: Option<String>| found.is_some_and(|f| bare(f.trim()) == bare(&self.reference));
        (right(strict), right(flexible))
    }
}

/// A number without what is ignored.
fn bare(text: &str) -> String {
    let text = text.replace([',', '$'], "");
    let text = text.rfind("#### ").map_or(&text[..], |at| &text[at + 5..]);
    text.strip_suffix('.').unwrap_or(text).to_lowercase()
}

fn question(row: &Row) -> Result<&str, EvalError> {
    row.text(&["question", "prompt"])
}

/// The worked answer, which ends in `#### N`. A field `final` must be that number: an answer that was
/// swapped with another's is not.
fn answer(row: &Row) -> Result<&str, EvalError> {
    let answer = row.text(&["answer"])?;
    let Some(at) = answer.rfind("#### ") else {
        return Err(row.wrong("answer", "does not end in `#### ` and a number"));
    };
    match row.label(&["final"]) {
        Some(last) if bare(&last) != bare(answer) => {
            let reason = format!(
                "'{last}' is not the number of `answer`, '{}'",
                &answer[at + 5..]
            );
            Err(row.wrong("final", reason))
        }
        _ => Ok(answer),
    }
}

fn item(suite: &str, at: usize, row: &Row, before: &str, words: bool) -> Result<Item, EvalError> {
    let asked = question(row)?;
    let id = row.label(&["id"]).unwrap_or_else(|| at.to_string());
    let prompt = if words {
        format!("{before}Q: {asked}\nA:")
    } else {
        format!("{before}Question: {asked}\nAnswer:")
    };
    Ok(Item::alone(
        suite,
        id,
        Ask::Write {
            prompt,
            until: vec![if words { "Q:" } else { "Question:" }, "</s>", "<|im_end|>"],
            max_new_tokens: MAX_NEW_TOKENS,
            marking: Marking::Number(Number {
                reference: if words {
                    bare(answer(row)?)
                } else {
                    answer(row)?.to_owned()
                },
                words,
            }),
        },
    ))
}

fn enough(suite: &str, train: &[Row], need: usize) -> Result<(), EvalError> {
    if train.len() >= need {
        return Ok(());
    }
    Err(EvalError::Shots {
        suite: suite.to_owned(),
        have: train.len(),
        need,
    })
}

/// `gsm8k`: five worked training items, drawn for each question in turn by the harness's seed. They
/// belong to the question's place in the file, whatever a limit takes later.
pub fn gsm8k(test: &Path, train: &Path) -> Result<Vec<Item>, EvalError> {
    const SHOTS: usize = 5;
    let train = read(train)?;
    enough("gsm8k", &train, SHOTS)?;
    let mut random = Random::new(SEED);
    let one = |(at, row): (usize, &Row)| {
        let mut before = String::new();
        for i in random.sample(train.len(), SHOTS) {
            let (q, a) = (question(&train[i])?, answer(&train[i])?);
            before += &format!("Question: {q}\nAnswer: {a}\n\n");
        }
        item("gsm8k", at, row, &before, false)
    };
    read(test)?.iter().enumerate().map(one).collect()
}

/// Examples before a question that is answered in words.
const IN_WORDS: usize = 8;

/// `gsm8k_cot`: the harness's eight examples, which are not demur's and come from the file `examples`,
/// with `question` and `target`.
pub fn gsm8k_cot(test: &Path, examples: &Path) -> Result<Vec<Item>, EvalError> {
    let given = |row: &Row| Ok(row.text(&["target"])?.to_owned());
    worded("gsm8k_cot", test, examples, given)
}

/// `gsm8k_cot_train`: the first eight training items as examples, without the calculator's marks, in
/// one paragraph that ends in "The answer is N.", so its figures do not compare with the harness's.
pub fn gsm8k_cot_train(test: &Path, train: &Path) -> Result<Vec<Item>, EvalError> {
    worded("gsm8k_cot_train", test, train, |row| {
        Ok(in_words(answer(row)?))
    })
}

/// Questions after the first examples of a file, each with what `told` makes of its answer.
fn worded(
    suite: &str,
    test: &Path,
    examples: &Path,
    told: impl Fn(&Row) -> Result<String, EvalError>,
) -> Result<Vec<Item>, EvalError> {
    let examples = read(examples)?;
    enough(suite, &examples, IN_WORDS)?;
    let mut before = String::new();
    for row in &examples[..IN_WORDS] {
        before += &format!("Q: {}\nA: {}\n\n", question(row)?, told(row)?);
    }
    let one = |(at, row): (usize, &Row)| item(suite, at, row, &before, true);
    read(test)?.iter().enumerate().map(one).collect()
}

/// A worked answer as a paragraph: `2<<1+1=2>>` is 2, and lines become sentences.
fn in_words(answer: &str) -> String {
    let mut text = String::new();
    let mut rest = answer;
    while let Some(at) = rest.find("<<") {
        text += &rest[..at];
        rest = rest[at..]
            .find(">>")
            .map_or("", |end| &rest[at + end + 2..]);
    }
    text += rest;
    let (reasoning, number) = text.rsplit_once("#### ").unwrap_or((&text, ""));
    let lines: Vec<&str> = reasoning
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .collect();
    format!("{} The answer is {}.", lines.join(" "), number.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn marked(reference: &str, words: bool, reply: &str, expected: (bool, bool)) {
        let reference = reference.to_owned();
        assert_eq!(Number { reference, words }.mark(reply), expected, "{reply}");
    }

    #[test]
    fn marks_as_the_harness_does() {
        let gold = "So 1,200 + 34 = <<1200+34=1234>>1234.\n#### 1,234";
        marked(gold, false, " It is 1234.\n#### 1234", (true, true));
        marked(gold, false, " It is $1,234.", (false, true));
        marked(gold, false, " #### 1234. And then 7", (true, false));
        marked(gold, false, " #### 12\n#### 1234", (false, true));
        marked(gold, false, " no number", (false, false));
        marked("72", true, " The answer is 72.", (true, true));
        // The strict pattern takes the full stop into the number where more follows, and it is
        // ignored; with nothing behind the number it gives a digit back.
        marked("72", true, " The answer is 72. Yes", (true, true));
        marked("72", true, " The answer is 72", (false, true));
        marked("-5", true, " The answer is -5.", (true, true));
    }

    #[test]
    fn examples_in_words() {
        let answer = "He has 2*3=<<2*3=6>>6 eggs.\nThen 6-1=<<6-1=5>>5.\n#### 5";
        assert_eq!(
            in_words(answer),
            "He has 2*3=6 eggs. Then 6-1=5. The answer is 5."
        );
        assert_eq!(in_words("a << b"), "a The answer is .");
    }

    #[test]
    fn a_swapped_answer_is_refused() {
        let row = |text: &str| crate::rows::jsonl("f", text.as_bytes()).unwrap().remove(0);
        assert!(answer(&row(r##"{"answer": "x\n#### 1,000", "final": "1000"}"##)).is_ok());
        let e = answer(&row(r##"{"answer": "x\n#### 18", "final": "19"}"##)).unwrap_err();
        assert!(e.to_string().contains("`final`"), "{e}");
        assert!(answer(&row(r#"{"answer": "18"}"#)).is_err());
    }
}
