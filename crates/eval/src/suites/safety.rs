//! Requests that should be refused, and requests that should not.
//!
//! One reader for the layouts of the public sets, by their names of the same things. XSTest's types
//! say whether a prompt is safe; a label that contradicts its type is an error.

use std::path::Path;

use super::{Ask, Item};
use crate::error::EvalError;
use crate::prompts::Label;
use crate::rows::{Row, read};

const PROMPT: [&str; 7] = [
    "prompt",
    "Goal",
    "goal",
    "forbidden_prompt",
    "Behavior",
    "question",
    "instruction",
];
const CATEGORY: [&str; 6] = [
    "category",
    "type",
    "SemanticCategory",
    "Category",
    "subcategory",
    "harm_category",
];
const ID: [&str; 6] = ["id", "id_v2", "BehaviorID", "Index", "question_id", "index"];
const LABEL: [&str; 2] = ["label", "prompt_harm_label"];
/// HarmBench's sorts: standard, contextual, copyright.
const SORT: [&str; 2] = ["FunctionalCategory", "functional_category"];
const CONTEXT: [&str; 2] = ["context", "ContextString"];

/// Reads a file of prompts. `given` is the label of rows that have none; in the sets that hold
/// harmful requests only, they are unsafe.
///
/// # Errors
/// [`EvalError::Field`] and the others of [`read`].
pub fn prompts(suite: &str, path: &Path, given: Option<Label>) -> Result<Vec<Item>, EvalError> {
    let harmful = [
        "advbench",
        "harmbench",
        "jailbreakbench",
        "strongreject",
        "sorrybench",
    ];
    let given = given.or(harmful.contains(&suite).then_some(Label::Unsafe));
    let rows = read(path)?;
    let one = |(at, row): (usize, &Row)| prompt(suite, at, row, given);
    rows.iter().enumerate().map(one).collect()
}

fn prompt(suite: &str, at: usize, row: &Row, given: Option<Label>) -> Result<Item, EvalError> {
    let mut asked = match row.find(&["turns"]) {
        // SORRY-Bench has its one request in a list.
        Some(_) if row.find(&PROMPT).is_none() => row
            .texts(&["turns"])?
            .into_iter()
            .next()
            .ok_or_else(|| row.wrong("turns", "is empty"))?,
        _ => row.text(&PROMPT)?.to_owned(),
    };
    if asked.trim().is_empty() {
        return Err(row.wrong("prompt", "is empty"));
    }
    if let Some(context) = row.label(&CONTEXT) {
        // As HarmBench puts it.
        asked = format!("{context}\n\n---\n\n{asked}");
    }
    let id = row.label(&ID).unwrap_or_else(|| format!("{suite}-{at}"));
    let category = row.label(&CATEGORY);
    let said = row
        .label(&LABEL)
        .as_deref()
        .map(|l| label(row, l))
        .transpose()?;
    let by_type = match &category {
        Some(c) if suite == "xstest" && c.starts_with("contrast_") => Some(Label::Unsafe),
        Some(_) if suite == "xstest" => Some(Label::Safe),
        _ => None,
    };
    if let (Some(said), Some(by_type)) = (said, by_type)
        && said != by_type
    {
        let reason = format!("says {said:?} where the type says {by_type:?}");
        return Err(row.wrong("label", reason));
    }
    let mut parts = Vec::new();
    if let Some(c) = &category {
        parts.push(format!("{suite}/{c}"));
    }
    if let Some(sort) = row.label(&SORT) {
        parts.push(format!("{suite}/{sort}"));
    }
    if let Some(adversarial) = row.label(&["adversarial"]) {
        let name = if ["true", "True", "1"].contains(&adversarial.as_str()) {
            "adversarial"
        } else {
            "vanilla"
        };
        parts.push(format!("{suite}/{name}"));
    }
    // A safe prompt of XSTest and its contrasts turn on the same word.
    let cluster = match row.label(&["focus"]) {
        Some(focus) if suite == "xstest" => focus,
        _ => id.clone(),
    };
    Ok(Item {
        suite: suite.to_owned(),
        cluster,
        id,
        parts,
        ask: Ask::Chat {
            turns: vec![asked],
            label: said.or(by_type).or(given),
        },
    })
}

fn label(row: &Row, text: &str) -> Result<Label, EvalError> {
    match text.trim().to_lowercase().as_str() {
        "unsafe" | "harmful" => Ok(Label::Unsafe),
        "safe" | "harmless" | "unharmful" | "benign" => Ok(Label::Safe),
        other => Err(row.wrong("label", format!("'{other}' is neither unsafe nor safe"))),
    }
}

/// The user's side of conversations with `messages`: each message is sent in turn, and the model's
/// own replies take the place of the recorded ones.
///
/// # Errors
/// As [`prompts`].
pub fn scripted(suite: &str, path: &Path) -> Result<Vec<Item>, EvalError> {
    let rows = read(path)?;
    let one = |(at, row): (usize, &Row)| {
        let messages = row.find(&["messages"]).and_then(|m| m.as_array());
        let messages = messages.ok_or_else(|| row.wrong("messages", "is missing or no list"))?;
        let mut turns = Vec::new();
        for m in messages.iter().filter(|m| m["role"] == "user") {
            let text = m["content"].as_str();
            let text =
                text.ok_or_else(|| row.wrong("messages.content", "is missing or no text"))?;
            turns.push(text.to_owned());
        }
        if turns.is_empty() {
            return Err(row.wrong("messages", "has no message of the user"));
        }
        let id = row.label(&ID).unwrap_or_else(|| format!("{suite}-{at}"));
        let said = row
            .label(&LABEL)
            .as_deref()
            .map(|l| label(row, l))
            .transpose()?;
        // A conversation with a harmful goal is one that should be refused in the end.
        let label = said.or(row.label(&["objective"]).map(|_| Label::Unsafe));
        Ok(Item::alone(suite, id, Ask::Chat { turns, label }))
    };
    rows.iter().enumerate().map(one).collect()
}

/// Goals of attacks: rows that are marked as harmful, or as nothing in a file that marks none.
///
/// # Errors
/// As [`prompts`].
pub fn goals(suite: &str, path: &Path) -> Result<Vec<Item>, EvalError> {
    let mut items = prompts(suite, path, None)?;
    let label = |i: &Item| match i.ask {
        Ask::Chat { label, .. } => label,
        _ => None,
    };
    if items.iter().any(|i| label(i).is_some()) {
        items.retain(|i| label(i) == Some(Label::Unsafe));
    }
    for item in &mut items {
        if let Ask::Chat { turns, .. } = &mut item.ask {
            let goal = std::mem::take(turns).concat();
            item.ask = Ask::Attack { goal };
        }
    }
    Ok(items)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(suite: &str, name: &str, text: &str) -> Result<Vec<Item>, EvalError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        prompts(suite, &path, None)
    }

    #[track_caller]
    fn reads(suite: &str, name: &str, text: &str, asked: &str, given: Label, parts: &[&str]) {
        let items = load(suite, name, text).unwrap();
        let ask = Ask::Chat {
            turns: vec![asked.to_owned()],
            label: Some(given),
        };
        assert_eq!(items[0].ask, ask);
        assert_eq!(items[0].parts, parts);
    }

    #[test]
    fn layouts_of_the_public_sets() {
        use Label::{Safe, Unsafe};
        let csv = "id,prompt,type,label,focus,note\n1,Kill it?,contrast_homonyms,unsafe,kill,\n";
        reads(
            "xstest",
            "x.csv",
            csv,
            "Kill it?",
            Unsafe,
            &["xstest/contrast_homonyms"],
        );
        let csv = "id,type,prompt,focus\n1,homonyms,Kill it?,kill\n";
        reads(
            "xstest",
            "x.csv",
            csv,
            "Kill it?",
            Safe,
            &["xstest/homonyms"],
        );
        let csv = "goal,target\nDo harm,\"Sure, here\"\n";
        reads("advbench", "a.csv", csv, "Do harm", Unsafe, &[]);
        let csv = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n\
                   Do harm,contextual,illegal,,Some text,b1\nDo more,standard,illegal,,,b2\n";
        reads(
            "harmbench",
            "h.csv",
            csv,
            "Some text\n\n---\n\nDo harm",
            Unsafe,
            &["harmbench/illegal", "harmbench/contextual"],
        );
        let csv =
            "Index,Goal,Target,Behavior,Category,Source\n0,Do harm,Sure,Harm,Fraud,Original\n";
        reads(
            "jailbreakbench",
            "j.csv",
            csv,
            "Do harm",
            Unsafe,
            &["jailbreakbench/Fraud"],
        );
        let csv = "category,source,forbidden_prompt\nViolence,custom,Do harm\n";
        reads(
            "strongreject",
            "s.csv",
            csv,
            "Do harm",
            Unsafe,
            &["strongreject/Violence"],
        );
        let line = r#"{"prompt": "Hi", "adversarial": true, "prompt_harm_label": "unharmful", "subcategory": "benign"}"#;
        let parts = ["wildguardtest/benign", "wildguardtest/adversarial"];
        reads("wildguardtest", "w.jsonl", line, "Hi", Safe, &parts);
        let line =
            r#"{"question_id": 7, "category": "3", "turns": ["Do harm"], "prompt_style": "base"}"#;
        reads(
            "sorrybench",
            "s.jsonl",
            line,
            "Do harm",
            Unsafe,
            &["sorrybench/3"],
        );
        // A file of no known set has the labels that it has.
        let items = load("own", "p.jsonl", r#"{"prompt": "Hi"}"#).unwrap();
        assert!(matches!(items[0].ask, Ask::Chat { label: None, .. }));
    }

    #[test]
    fn labels_that_were_swapped_are_refused() {
        let csv = "id,prompt,type,label\n1,Kill it?,contrast_homonyms,safe\n";
        let e = load("xstest", "x.csv", csv).unwrap_err().to_string();
        assert!(e.contains("x.csv:2") && e.contains("`label`"), "{e}");
        let e = load("own", "p.jsonl", r#"{"prompt": "Hi", "label": "odd"}"#).unwrap_err();
        assert!(e.to_string().contains("'odd'"), "{e}");
        assert!(load("own", "p.jsonl", r#"{"prompt": " "}"#).is_err());
    }

    #[test]
    fn goals_are_the_harmful_rows() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("g.jsonl");
        let rows =
            "{\"prompt\": \"a\", \"label\": \"harmful\"}\n{\"prompt\": \"b\", \"label\": null}\n";
        std::fs::write(&path, rows).unwrap();
        let asks: Vec<Ask> = goals("s", &path)
            .unwrap()
            .into_iter()
            .map(|i| i.ask)
            .collect();
        assert_eq!(
            asks,
            [Ask::Attack {
                goal: "a".to_owned()
            }]
        );
        std::fs::write(&path, "{\"goal\": \"a\"}\n{\"goal\": \"b\"}\n").unwrap();
        assert_eq!(goals("s", &path).unwrap().len(), 2);
    }

    #[test]
    fn a_conversation_keeps_the_users_side() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.jsonl");
        let line = r#"{"id": "c", "objective": "harm", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]}"#;
        std::fs::write(&path, line).unwrap();
        let items = scripted("s", &path).unwrap();
        let ask = Ask::Chat {
            turns: vec!["a".to_owned(), "c".to_owned()],
            label: Some(Label::Unsafe),
        };
        assert_eq!(items[0].ask, ask);
        std::fs::write(
            &path,
            r#"{"messages": [{"role": "assistant", "content": "b"}]}"#,
        )
        .unwrap();
        assert!(scripted("s", &path).is_err());
    }
}
