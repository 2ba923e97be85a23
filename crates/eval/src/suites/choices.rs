//! Multiple choice by log-likelihood.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use super::{Ask, Gold, Item};
use crate::error::EvalError;
use crate::rows::{Row, read, read_csv};

/// Examples before an MMLU question.
const SHOTS: usize = 5;
const LETTERS: [&str; 4] = ["A", "B", "C", "D"];
/// Columns of the original files, which have no line of names.
const COLUMNS: [&str; 6] = ["question", "A", "B", "C", "D", "answer"];

/// Answered questions before each of TruthfulQA.
pub const PRIMED: usize = 6;

/// MMLU's categories: those of its authors.
const CATEGORIES: [(&str, &str); 3] = [
    (
        "humanities",
        "formal_logic high_school_european_history high_school_us_history \
         high_school_world_history international_law jurisprudence logical_fallacies moral_disputes \
         moral_scenarios philosophy prehistory professional_law world_religions",
    ),
    (
        "social_sciences",
        "econometrics high_school_geography high_school_government_and_politics \
         high_school_macroeconomics high_school_microeconomics high_school_psychology \
         human_sexuality professional_psychology public_relations security_studies sociology \
         us_foreign_policy",
    ),
    (
        "other",
        "business_ethics clinical_knowledge college_medicine global_facts human_aging management \
         marketing medical_genetics miscellaneous nutrition professional_accounting \
         professional_medicine virology",
    ),
];

fn category(subject: &str) -> &'static str {
    let known = CATEGORIES
        .iter()
        .find(|(_, subjects)| subjects.split_whitespace().any(|s| s == subject));
    known.map_or("stem", |(name, _)| name)
}

/// A question with four choices.
struct Four {
    id: Option<String>,
    question: String,
    choices: [String; 4],
    answer: usize,
}

impl Four {
    fn new(row: &Row) -> Result<Self, EvalError> {
        let choices = if row.find(&["choices"]).is_some() {
            row.texts(&["choices"])?
        } else {
            let one = |l: &&str| row.text(&[l]).map(str::to_owned);
            LETTERS.iter().map(one).collect::<Result<_, _>>()?
        };
        let choices: [String; 4] = choices
            .try_into()
            .map_err(|c: Vec<String>| row.wrong("choices", format!("are {}, not 4", c.len())))?;
        Ok(Self {
            id: row.label(&["id"]),
            question: row.text(&["question", "prompt"])?.to_owned(),
            choices,
            answer: letter_or_index(row, LETTERS.len())?,
        })
    }

    fn asked(&self) -> String {
        let mut text = self.question.trim().to_owned();
        for (letter, choice) in LETTERS.iter().zip(&self.choices) {
            text += &format!("\n{letter}. {choice}");
        }
        text + "\nAnswer:"
    }
}

/// The right choice. A letter and an index, where both are there, must agree: labels that were
/// shifted or swapped do not.
fn letter_or_index(row: &Row, choices: usize) -> Result<usize, EvalError> {
    let index = match row.find(&["answer_index"]) {
        Some(_) => Some(row.index(&["answer_index"])?),
        None => None,
    };
    let letter = match row.find(&["answer"]) {
        Some(Value::String(s)) => match LETTERS.iter().position(|l| *l == s.trim()) {
            None => return Err(row.wrong("answer", format!("'{s}' is none of A, B, C, D"))),
            found => found,
        },
        Some(_) => Some(row.index(&["answer"])?),
        None => None,
    };
    let answer = match (index, letter) {
        (Some(i), Some(l)) if i != l => {
            let reason = format!("{i} is not the choice that `answer` names, {l}");
            return Err(row.wrong("answer_index", reason));
        }
        (Some(i), _) | (None, Some(i)) => i,
        (None, None) => row.index(&["answer_index", "answer"])?,
    };
    if answer >= choices {
        return Err(row.wrong("answer_index", format!("{answer} of {choices} choices")));
    }
    Ok(answer)
}

/// Questions by subject, subjects and questions in their order: from a file with `category` or
/// `subject`, from several, or from a folder of `SUBJECT_test.csv`.
fn subjects(path: &Path) -> Result<BTreeMap<String, Vec<Four>>, EvalError> {
    let mut all: BTreeMap<String, Vec<Four>> = BTreeMap::new();
    let io = |source| EvalError::Io {
        path: path.display().to_string(),
        source,
    };
    let mut files = Vec::new();
    if path.is_dir() {
        for entry in std::fs::read_dir(path).map_err(io)? {
            files.push(entry.map_err(io)?.path());
        }
        files.retain(|f| f.extension().is_some_and(|e| e == "csv"));
    }
    if files.is_empty() {
        for row in read(path)? {
            let subject = row.text(&["category", "subject"])?.replace(' ', "_");
            all.entry(subject).or_default().push(Four::new(&row)?);
        }
        return Ok(all);
    }
    for file in files {
        let stem = file.file_stem().unwrap_or_default().to_string_lossy();
        let subject = stem.trim_end_matches("_test").trim_end_matches("_dev");
        let rows = read_csv(&file, &COLUMNS)?;
        let fours = rows.iter().map(Four::new).collect::<Result<_, _>>()?;
        all.insert(subject.to_owned(), fours);
    }
    Ok(all)
}

/// `mmlu`: the subject's first five development questions, answered, then the question; choices are
/// the letters.
pub fn mmlu(test: &Path, dev: &Path) -> Result<Vec<Item>, EvalError> {
    let (test, dev) = (subjects(test)?, subjects(dev)?);
    let mut items = Vec::new();
    for (subject, questions) in &test {
        let shots = dev.get(subject).map_or(&[][..], Vec::as_slice);
        if shots.len() < SHOTS {
            return Err(EvalError::Shots {
                suite: format!("mmlu_{subject}"),
                have: shots.len(),
                need: SHOTS,
            });
        }
        let spoken = subject.replace('_', " ");
        let mut before = format!(
            "The following are multiple choice questions (with answers) about {spoken}.\n\n"
        );
        for shot in &shots[..SHOTS] {
            before += &format!("{} {}\n\n", shot.asked(), LETTERS[shot.answer]);
        }
        for (i, q) in questions.iter().enumerate() {
            let id = q.id.clone().unwrap_or_else(|| format!("{subject}-{i}"));
            items.push(Item {
                suite: "mmlu".to_owned(),
                cluster: id.clone(),
                id,
                parts: vec![
                    format!("mmlu_{}", category(subject)),
                    format!("mmlu_{subject}"),
                ],
                ask: Ask::Choose {
                    context: before.clone() + &q.asked(),
                    choices: LETTERS.map(str::to_owned).to_vec(),
                    gold: Gold::One {
                        index: q.answer,
                        metric: "acc",
                        norm: false,
                    },
                },
            });
        }
    }
    Ok(items)
}

/// `arc_easy` and `arc_challenge`: the question, no examples; choices are the answers' texts.
pub fn arc(suite: &str, path: &Path) -> Result<Vec<Item>, EvalError> {
    let one = |(i, row): (usize, &Row)| {
        let (question, choices, index) = arc_row(row)?;
        let id = row.label(&["id"]).unwrap_or_else(|| i.to_string());
        Ok(Item::alone(
            suite,
            id,
            Ask::Choose {
                context: format!("Question: {question}\nAnswer:"),
                choices,
                gold: Gold::One {
                    index,
                    metric: "acc",
                    norm: true,
                },
            },
        ))
    };
    read(path)?.iter().enumerate().map(one).collect()
}

/// The layouts: `prompt`, `choices`, `answer_index`; the Hub's `question`, `choices.text`,
/// `choices.label`, `answerKey`; AI2's `question.stem`, `question.choices[].text`, `answerKey`.
fn arc_row(row: &Row) -> Result<(String, Vec<String>, usize), EvalError> {
    if row.find(&["answer_index"]).is_some() {
        let choices = row.texts(&["choices"])?;
        let index = row.index(&["answer_index"])?;
        if index >= choices.len() {
            return Err(row.wrong(
                "answer_index",
                format!("{index} of {} choices", choices.len()),
            ));
        }
        return Ok((
            row.text(&["prompt", "question"])?.to_owned(),
            choices,
            index,
        ));
    }
    let texts = |v: &Value, field: &str| -> Result<Vec<String>, EvalError> {
        let list = v.as_array().ok_or_else(|| row.wrong(field, "is no list"))?;
        let text = |v: &Value| v.as_str().map(str::to_owned);
        let all: Option<Vec<_>> = list.iter().map(text).collect();
        all.ok_or_else(|| row.wrong(field, "is no list of texts"))
    };
    let (question, choices, labels) = match row.find(&["question"]) {
        Some(Value::Object(q)) => {
            let stem = q.get("stem").and_then(Value::as_str);
            let stem = stem.ok_or_else(|| row.wrong("question.stem", "is missing or no text"))?;
            let all = q.get("choices").and_then(Value::as_array);
            let all = all.ok_or_else(|| row.wrong("question.choices", "is missing or no list"))?;
            let column = |key: &str| Value::Array(all.iter().map(|c| c[key].clone()).collect());
            let choices = texts(&column("text"), "question.choices.text")?;
            (
                stem.to_owned(),
                choices,
                texts(&column("label"), "question.choices.label")?,
            )
        }
        _ => {
            let question = row.text(&["question"])?.to_owned();
            let both = row.object(&["choices"])?;
            let column = |key: &str| both.get(key).cloned().unwrap_or_default();
            let choices = texts(&column("text"), "choices.text")?;
            (question, choices, texts(&column("label"), "choices.label")?)
        }
    };
    let key = row.text(&["answerKey"])?;
    let index = labels.iter().position(|l| l == key);
    let index = index.filter(|i| *i < choices.len()).ok_or_else(|| {
        row.wrong(
            "answerKey",
            format!("'{key}' is none of {}", labels.join(", ")),
        )
    })?;
    Ok((question, choices, index))
}

/// The answered questions before each of TruthfulQA: lines `Q: ...` and `A: ...` in turn.
fn primer(path: &Path) -> Result<String, EvalError> {
    let wrong = |reason: String| EvalError::Primer {
        path: path.display().to_string(),
        need: PRIMED,
        reason,
    };
    let text = std::fs::read_to_string(path).map_err(|e| wrong(e.to_string()))?;
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    let mut pairs = Vec::new();
    for two in lines.split(|l| l.is_empty()).filter(|two| !two.is_empty()) {
        match two {
            [q, a] if q.starts_with("Q: ") && a.starts_with("A: ") => {
                pairs.push(format!("{q}\n{a}"));
            }
            _ => return Err(wrong(format!("'{}' is no such pair", two.join(" / ")))),
        }
    }
    if pairs.len() != PRIMED {
        return Err(wrong(format!("it has {} pairs", pairs.len())));
    }
    Ok(pairs.join("\n\n"))
}

/// `truthfulqa_mc1` and `truthfulqa_mc2`: six answered questions, which are the file `primer`'s, then
/// the question; choices are the answers.
pub fn truthfulqa(path: &Path, primed: &Path, second: bool) -> Result<Vec<Item>, EvalError> {
    let before = primer(primed)?;
    let suite = if second {
        "truthfulqa_mc2"
    } else {
        "truthfulqa_mc1"
    };
    let names: &[&str] = if second {
        &["mc2", "mc2_targets"]
    } else {
        &["mc1", "mc1_targets"]
    };
    let one = |(i, row): (usize, &Row)| {
        let (choices, labels) = targets(row, names, row.object(names)?)?;
        // The set's first answers are true; where labels were swapped they are not.
        if labels.first() != Some(&true) {
            return Err(row.wrong(names[0], "must begin with a true answer"));
        }
        let gold = if second {
            Gold::True(labels)
        } else if labels[1..].contains(&true) {
            return Err(row.wrong(names[0], "has more than one true answer"));
        } else {
            Gold::One {
                index: 0,
                metric: "mc1",
                norm: false,
            }
        };
        let id = row.label(&["id"]).unwrap_or_else(|| i.to_string());
        let question = row.text(&["question", "prompt"])?;
        Ok(Item::alone(
            suite,
            id,
            Ask::Choose {
                context: format!("{before}\n\nQ: {question}\nA:"),
                choices,
                gold,
            },
        ))
    };
    read(path)?.iter().enumerate().map(one).collect()
}

/// Either `{answer: 0 or 1, ...}` or `{"choices": [...], "labels": [...]}`.
fn targets(
    row: &Row,
    names: &[&str],
    object: &Map<String, Value>,
) -> Result<(Vec<String>, Vec<bool>), EvalError> {
    let wrong = || row.wrong(names[0], "has an answer that is not marked 0 or 1");
    let truth = |v: &Value| match v.as_u64() {
        Some(n @ 0..=1) => Ok(n == 1),
        _ => Err(wrong()),
    };
    if let (Some(Value::Array(choices)), Some(Value::Array(labels))) =
        (object.get("choices"), object.get("labels"))
    {
        let texts: Option<Vec<String>> = choices
            .iter()
            .map(|c| c.as_str().map(str::to_owned))
            .collect();
        let texts = texts
            .filter(|t| t.len() == labels.len())
            .ok_or_else(wrong)?;
        return Ok((texts, labels.iter().map(truth).collect::<Result<_, _>>()?));
    }
    let labels = object.values().map(truth).collect::<Result<_, _>>()?;
    Ok((object.keys().cloned().collect(), labels))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::jsonl;

    fn row(text: &str) -> Row {
        jsonl("f", text.as_bytes()).unwrap().remove(0)
    }

    #[test]
    fn layouts_of_arc_are_one_question() {
        let expected = ("Which?".to_owned(), vec!["x".to_owned(), "y".to_owned()], 1);
        for text in [
            r#"{"prompt": "Which?", "choices": ["x", "y"], "answer_index": 1}"#,
            r#"{"question": "Which?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}"#,
            r#"{"question": {"stem": "Which?", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]}, "answerKey": "B"}"#,
        ] {
            assert_eq!(arc_row(&row(text)).unwrap(), expected);
        }
        for (text, field) in [
            (
                r#"{"prompt": "?", "choices": ["x"], "answer_index": 1}"#,
                "answer_index",
            ),
            (
                r#"{"question": "?", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": "C"}"#,
                "answerKey",
            ),
            (
                r#"{"question": {"stem": "?"}, "answerKey": "C"}"#,
                "question.choices",
            ),
            (r#"{"question": "?"}"#, "choices"),
        ] {
            let e = arc_row(&row(text)).unwrap_err().to_string();
            assert!(e.contains("f:1") && e.contains(field), "{e}");
        }
    }

    #[test]
    fn labels_that_were_swapped_are_refused() {
        let four = |answer: &str, index: usize| {
            Four::new(&row(&format!(
                r#"{{"prompt": "?", "choices": ["w", "x", "y", "z"], "answer": "{answer}", "answer_index": {index}}}"#
            )))
        };
        assert_eq!(four("C", 2).unwrap().answer, 2);
        let e = four("C", 1).err().unwrap().to_string();
        assert!(e.contains("`answer_index`"), "{e}");
        assert!(four("E", 4).is_err());
    }

    #[test]
    fn mmlu_asks_as_it_is_defined() {
        let folder = tempfile::tempdir().unwrap();
        for (split, n) in [("dev", 5), ("test", 3)] {
            let dir = folder.path().join(split);
            std::fs::create_dir(&dir).unwrap();
            for (subject, more) in [("world_religions", 0), ("virology", 1)] {
                let lines: String = (0..n + more)
                    .map(|i| format!("\" What is {i}, then?\",a,b,c,d,{}\n", LETTERS[i % 4]))
                    .collect();
                std::fs::write(dir.join(format!("{subject}_{split}.csv")), lines).unwrap();
            }
        }
        let load = || mmlu(&folder.path().join("test"), &folder.path().join("dev"));
        let items = load().unwrap();
        assert_eq!(items.len(), 7);
        let Ask::Choose { context, gold, .. } = &items[5].ask else {
            panic!()
        };
        let begin = "The following are multiple choice questions (with answers) about world \
                     religions.\n\nWhat is 0, then?\nA. a\nB. b\nC. c\nD. d\nAnswer: A\n\nWhat is 1, then?\n";
        assert!(context.starts_with(begin), "{context}");
        let end = "Answer: A\n\nWhat is 1, then?\nA. a\nB. b\nC. c\nD. d\nAnswer:";
        assert!(context.ends_with(end), "{context}");
        assert!(matches!(gold, Gold::One { index: 1, .. }));
        assert_eq!(items[5].parts, ["mmlu_humanities", "mmlu_world_religions"]);
        assert_eq!(items[0].parts[0], "mmlu_other");
        std::fs::write(folder.path().join("dev/virology_dev.csv"), "q,a,b,c,d,A\n").unwrap();
        assert!(matches!(load(), Err(EvalError::Shots { have: 1, .. })));
    }

    #[test]
    fn truthfulqa_targets() {
        let write = |text: &str| {
            let folder = tempfile::tempdir().unwrap();
            let (path, primed) = (folder.path().join("t.jsonl"), folder.path().join("p.txt"));
            std::fs::write(&path, text).unwrap();
            let pairs: Vec<String> = (0..6).map(|i| format!("Q: {i}?\nA: {i}.\n")).collect();
            std::fs::write(&primed, pairs.join("\n")).unwrap();
            truthfulqa(&path, &primed, true)
        };
        let items =
            write(r#"{"question": "Why?", "mc2_targets": {"yes": 1, "so": 1, "no": 0}}"#).unwrap();
        let Ask::Choose {
            context,
            choices,
            gold,
        } = &items[0].ask
        else {
            panic!()
        };
        assert_eq!(choices.len(), 3);
        assert_eq!(*gold, Gold::True(vec![true, true, false]));
        assert!(context.starts_with("Q: 0?\nA: 0.\n\nQ: 1?\n"), "{context}");
        assert!(
            context.ends_with("\n\nQ: 5?\nA: 5.\n\nQ: Why?\nA:"),
            "{context}"
        );
        // Two questions of the set have a true answer after a false one.
        let late = write(r#"{"question": "Why?", "mc2": {"yes": 1, "no": 0, "so": 1}}"#).unwrap();
        let Ask::Choose { gold, .. } = &late[0].ask else {
            panic!()
        };
        assert_eq!(*gold, Gold::True(vec![true, false, true]));
        let listed = r#"{"prompt": "Why?", "mc2": {"choices": ["a", "b"], "labels": [1, 0]}}"#;
        assert_eq!(write(listed).unwrap().len(), 1);
        for bad in [
            r#"{"prompt": "Why?", "mc2": {"choices": ["a"], "labels": [1, 0]}}"#,
            r#"{"prompt": "Why?", "mc2": {"a": 0, "b": 1}}"#,
            r#"{"prompt": "Why?", "mc2": {"a": 2}}"#,
        ] {
            assert!(write(bad).unwrap_err().to_string().contains("`mc2`"));
        }
    }

    #[test]
    fn a_primer_is_six_answered_questions() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("truthfulqa_primer.txt");
        let refused = |words: &[&str]| {
            let e = primer(&path).unwrap_err().to_string();
            assert!(
                e.contains("truthfulqa_primer.txt") && e.contains("6"),
                "{e}"
            );
            assert!(words.iter().all(|w| e.contains(w)), "{e}");
        };
        refused(&["No such file"]);
        std::fs::write(&path, "Q: a?\nA: b.\n").unwrap();
        refused(&["it has 1 pairs"]);
        std::fs::write(&path, "Q: a?\nb.\n").unwrap();
        refused(&["'Q: a? / b.'"]);
    }
}
