//! Arms: the same prompts under different interventions, in one batch-filling pass, resumable.
//!
//! Replies are appended to a JSONL file as they end, one line an (arm, prompt). A run that was killed
//! reads what is there, drops a torn last line, and asks only for the rest. Since a reply does not
//! depend on its batch, an interrupted run ends with the same replies as an uninterrupted one.

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use demur_model::generate::{Engine, Request};
use demur_model::hooks::{Intervention, Role};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::EvalError;
use crate::files::resume;
use crate::judge::{Verdict, judge, refusal_log_odds};

/// A prompt, tokenised.
#[derive(Debug, Clone)]
pub struct Item {
    /// The prompt's id.
    pub id: String,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Their roles.
    pub roles: Vec<Role>,
}

/// An arm: a name, an intervention, and the prompts as this arm asks them.
#[derive(Debug, Clone)]
pub struct Arm<'a> {
    /// Its name in records.
    pub name: &'a str,
    /// What it does; nothing, for base.
    pub hook: Option<Arc<dyn Intervention>>,
    /// Its prompts.
    pub items: &'a [Item],
}

/// A reply, judged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// The arm's name.
    pub arm: String,
    /// The prompt's id.
    pub id: String,
    /// The reply.
    pub text: String,
    /// The reply's tokens.
    pub tokens: Vec<u32>,
    /// What the opener judge says.
    pub verdict: Verdict,
    /// Log-odds of a refusal at the first reply token.
    pub logodds: f32,
    /// What the intervention did.
    #[serde(default)]
    pub audit: Option<Value>,
}

/// Runs `arms`, reading and appending `log`. Replies come in the order of arms and items. `known` is told how
/// many are there from an earlier run, `on_reply` of each that is new.
///
/// # Errors
/// [`EvalError::Io`], [`EvalError::Line`] for a log that is not ours, [`EvalError::Twice`], or what
/// the model refuses.
pub fn run(
    engine: &mut Engine<'_>,
    arms: &[Arm<'_>],
    max_new_tokens: usize,
    openers: &[u32],
    log: &Path,
    known: impl FnOnce(usize),
    mut on_reply: impl FnMut(&Reply),
) -> Result<Vec<Reply>, EvalError> {
    let io = |source| EvalError::Io {
        path: log.display().to_string(),
        source,
    };
    let mut names = HashSet::new();
    if let Some(id) = arms
        .iter()
        .flat_map(|arm| arm.items.iter().map(|i| (arm.name, i.id.as_str())))
        .find(|key| !names.insert(*key))
    {
        return Err(EvalError::Twice {
            arm: id.0.to_owned(),
            id: id.1.to_owned(),
        });
    }
    let (mut file, done) = resume::<Reply>(log)?;
    let mut replies: HashMap<(String, String), Reply> = done
        .into_iter()
        .map(|r| ((r.arm.clone(), r.id.clone()), r))
        .collect();
    let mut requests = Vec::new();
    let mut asked = Vec::new();
    let mut n_known = 0;
    for arm in arms {
        for item in arm.items {
            let key = (arm.name.to_owned(), item.id.clone());
            if replies.contains_key(&key) {
                n_known += 1;
                continue;
            }
            asked.push(key);
            requests.push(Request {
                hook: arm.hook.clone(),
                first_logits: true,
                ..Request::new(item.tokens.clone(), item.roles.clone(), max_new_tokens)
            });
        }
    }
    known(n_known);
    let mut failed = None;
    engine.run(requests, |at, output| {
        let (arm, id) = asked[at].clone();
        let reply = Reply {
            arm,
            id,
            verdict: judge(&output.text),
            logodds: output
                .first_logits
                .as_deref()
                .map_or(0.0, |l| refusal_log_odds(l, openers)),
            text: output.text.clone(),
            tokens: output.tokens.clone(),
            audit: output.audit.clone(),
        };
        let line = serde_json::to_string(&reply).unwrap_or_default() + "\n";
        // After a line that could not be written no other may follow: it would be torn, and not last.
        if failed.is_none() {
            failed = file.write_all(line.as_bytes()).err();
        }
        on_reply(&reply);
        replies.insert(asked[at].clone(), reply);
    })?;
    if let Some(e) = failed {
        return Err(io(e));
    }
    file.sync_all().map_err(io)?;
    Ok(arms
        .iter()
        .flat_map(|arm| {
            arm.items
                .iter()
                .map(|i| (arm.name.to_owned(), i.id.clone()))
        })
        .filter_map(|key| replies.remove(&key))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(id: &str) -> Reply {
        Reply {
            arm: "base".to_owned(),
            id: id.to_owned(),
            text: "I'm sorry, but no.\nReally.".to_owned(),
            tokens: vec![1, 2],
            verdict: Verdict::Refusal,
            logodds: 1.25,
            audit: None,
        }
    }

    #[test]
    fn a_torn_line_is_dropped_and_the_rest_kept() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("replies.jsonl");
        let lines: Vec<String> = ["a", "b"]
            .iter()
            .map(|id| serde_json::to_string(&reply(id)).unwrap())
            .collect();
        std::fs::write(&log, format!("{}\n{}", lines[0], &lines[1][..20])).unwrap();
        let (mut file, done) = resume::<Reply>(&log).unwrap();
        assert_eq!(done, [reply("a")]);
        file.write_all(format!("{}\n", lines[1]).as_bytes())
            .unwrap();
        drop(file);
        assert_eq!(resume::<Reply>(&log).unwrap().1, [reply("a"), reply("b")]);
    }

    #[test]
    fn a_log_that_is_not_ours_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("replies.jsonl");
        std::fs::write(&log, "{\"hello\": 1}\n").unwrap();
        assert!(
            resume::<Reply>(&log)
                .unwrap_err()
                .to_string()
                .contains(":1:")
        );
    }
}
