//! Stage `harvest`: text for the SAE, and its activations.
//!
//! Always: held-out chats (the model's own replies to ordinary requests) and passages, on which the
//! SAE is judged. If the study trains an SAE: on-policy chats and files besides, run up to the site,
//! their rows written to `activations.f32`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use demur_eval::arms::{self, Arm, Item};
use demur_eval::files::{self, Lines};
use demur_eval::prompts::{self, Prompt, Split};
use demur_features::FeatureError;
use demur_features::harvest::{Products, Sequence, harvest};
use demur_model::chat::Message;
use demur_model::generate::{Request, Sampling};
use demur_model::hooks::Role;
use demur_model::tokenizer::Special;
use serde::{Deserialize, Serialize};

use super::config::SaeSource;
use super::{StudyContext, with_reply, write_atomic};
use crate::progress::Progress;

/// Reply length of held-out chats, tokens.
const HELD_OUT_REPLY: usize = 32;
/// Held-out chats.
const HELD_OUT_CHATS: usize = 24;

/// What the stage leaves: counts; the sequences and rows are in its folder.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Corpus {
    pub train_sequences: usize,
    /// Rows in `activations.f32`: all tokens but the first of each sequence.
    pub train_rows: usize,
    pub held_out_chat: usize,
    pub held_out_text: usize,
}

/// A sequence on disk.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    source: String,
    tokens: Vec<u32>,
    roles: Vec<Role>,
}

pub fn run(c: &StudyContext, scratch: &Path) -> Result<Corpus> {
    let benign = prompts::shipped_benign()?;
    let held_out: Vec<&Prompt> = benign
        .iter()
        .filter(|p| p.split == Some(Split::Validation))
        .take(HELD_OUT_CHATS)
        .collect();
    let items = c.items(&held_out)?;
    let bar = Progress::new("harvest", "chats", items.len() as u64);
    let replies = arms::run(
        &mut c.engine(),
        &[Arm {
            name: "held_out",
            hook: None,
            items: &items,
        }],
        HELD_OUT_REPLY,
        &c.openers,
        &scratch.join("held_out.jsonl"),
        |_| bar.advance(1),
    )?;
    bar.finish();
    let chats: Vec<Sequence> = items
        .iter()
        .zip(&replies)
        .map(|(i, r)| with_reply(i, &r.tokens))
        .collect();
    let texts = passages(c, None)?;
    write_sequences(&scratch.join("chat.jsonl"), &chats)?;
    write_sequences(&scratch.join("text.jsonl"), &texts)?;
    let mut corpus = Corpus {
        train_sequences: 0,
        train_rows: 0,
        held_out_chat: chats.len(),
        held_out_text: texts.len(),
    };
    if c.study.sae.source == SaeSource::Train {
        let sequences = training_text(c, &benign, scratch)?;
        corpus.train_sequences = sequences.len();
        corpus.train_rows = write_activations(c, &sequences, &scratch.join("activations.f32"))?;
    }
    Ok(corpus)
}

/// The shipped passages of a split, or all, as sequences.
pub fn passages(c: &StudyContext, split: Option<Split>) -> Result<Vec<Sequence>> {
    let all = prompts::shipped_passages()?;
    all.iter()
        .filter(|p| split.is_none() || p.split == split)
        .map(|p| text_sequence(c, &p.id, &p.text))
        .collect()
}

fn text_sequence(c: &StudyContext, source: &str, text: &str) -> Result<Sequence> {
    let t = &c.loaded.tokenizer;
    let bos = t.bos().filter(|_| t.add_bos());
    let mut tokens: Vec<u32> = bos.into_iter().collect();
    tokens.extend(t.encode(text, Special::AsText)?);
    tokens.truncate(c.study.corpus.context.max(2));
    let roles = vec![Role::User; tokens.len()];
    Ok(Sequence {
        source: source.to_owned(),
        tokens,
        roles,
    })
}

/// On-policy chats, then files, up to the limit of tokens.
fn training_text(c: &StudyContext, benign: &[Prompt], scratch: &Path) -> Result<Vec<Sequence>> {
    let corpus = &c.study.corpus;
    let mut sequences = Vec::new();
    if corpus.on_policy {
        let asked: Vec<&Prompt> = benign
            .iter()
            .filter(|p| p.split == Some(Split::Corpus))
            .chain(
                c.prompts
                    .iter()
                    .filter(|p| p.split == Some(Split::Discovery)),
            )
            .collect();
        let items = c.items(&asked)?;
        sequences.extend(on_policy(c, &items, &scratch.join("on_policy.jsonl"))?);
    }
    let mut total: usize = sequences.iter().map(|s| s.tokens.len()).sum();
    for file in &corpus.files {
        read_file(c, file, &mut total, &mut sequences)?;
    }
    if sequences.is_empty() {
        bail!("the corpus is empty: set corpus.on_policy = true or give corpus.files");
    }
    Ok(sequences)
}

/// Samples replies; each is written when it ends, so a killed run keeps them.
fn on_policy(c: &StudyContext, items: &[Item], log: &Path) -> Result<Vec<Sequence>> {
    let corpus = &c.study.corpus;
    let n = items.len() * corpus.samples;
    let done: Vec<Line> = if log.is_file() {
        read_lines(log)?
    } else {
        Vec::new()
    };
    let have: std::collections::HashMap<String, Line> =
        done.into_iter().map(|l| (l.source.clone(), l)).collect();
    let mut file = BufWriter::new(File::options().create(true).append(true).open(log)?);
    let mut sequences: Vec<Option<Sequence>> = (0..n).map(|_| None).collect();
    let (mut requests, mut asked) = (Vec::new(), Vec::new());
    for (i, slot) in sequences.iter_mut().enumerate() {
        let (item, sample) = (&items[i / corpus.samples], i % corpus.samples);
        let source = format!("{}/{sample}", item.id);
        if let Some(line) = have.get(&source) {
            *slot = Some(Sequence {
                source,
                tokens: line.tokens.clone(),
                roles: line.roles.clone(),
            });
            continue;
        }
        let sampling = Sampling {
            temperature: corpus.temperature,
            seed: c.study.seed.wrapping_add(i as u64),
            ..Sampling::default()
        };
        asked.push((i, source));
        requests.push(Request {
            sampling,
            ..Request::new(
                item.tokens.clone(),
                item.roles.clone(),
                corpus.max_new_tokens,
            )
        });
    }
    let bar = Progress::new("on-policy", "chats", n as u64);
    bar.advance((n - asked.len()) as u64);
    let mut failed = None;
    c.engine().run(requests, |at, output| {
        let (i, source) = asked[at].clone();
        let s = Sequence {
            source,
            ..with_reply(&items[i / corpus.samples], &output.tokens)
        };
        let line = Line {
            source: s.source.clone(),
            tokens: s.tokens.clone(),
            roles: s.roles.clone(),
        };
        let text = serde_json::to_string(&line).unwrap_or_default();
        // After a line that could not be written no other may follow: it would be torn, and not last.
        if failed.is_none() {
            failed = writeln!(file, "{text}").and_then(|()| file.flush()).err();
        }
        sequences[i] = Some(s);
        bar.advance(1);
    })?;
    if let Some(e) = failed {
        return Err(e).with_context(|| format!("write {}", log.display()));
    }
    bar.finish();
    Ok(sequences.into_iter().flatten().collect())
}

/// Adds the texts and chats of a JSONL file.
fn read_file(
    c: &StudyContext,
    file: &Path,
    total: &mut usize,
    sequences: &mut Vec<Sequence>,
) -> Result<()> {
    #[derive(Deserialize)]
    struct Row {
        text: Option<String>,
        messages: Option<Vec<Message>>,
    }
    let name = file.display().to_string();
    let mut lines = Lines::new(&name, files::open(file)?, u64::MAX);
    while *total < c.study.corpus.max_tokens
        && let Some((number, line)) = lines.next_line()?
    {
        let row: Row = serde_json::from_slice(&line).map_err(|e| lines.wrong(number, e))?;
        let source = format!("{name}:{number}");
        let mut s = match (row.text, row.messages) {
            (Some(text), _) => text_sequence(c, &source, &text)?,
            (None, Some(messages)) => {
                let chat = c
                    .loaded
                    .chat()?
                    .encode(&c.loaded.tokenizer, &messages, false)?;
                Sequence {
                    source,
                    tokens: chat.ids,
                    roles: chat.roles,
                }
            }
            (None, None) => bail!("{source}: it has neither 'text' nor 'messages'"),
        };
        s.tokens.truncate(c.study.corpus.context);
        s.roles.truncate(c.study.corpus.context);
        *total += s.tokens.len();
        sequences.push(s);
    }
    Ok(())
}

/// Runs sequences to the site and writes the rows of all tokens but the first of each, f32. The file
/// appears when it is whole.
fn write_activations(c: &StudyContext, sequences: &[Sequence], path: &Path) -> Result<usize> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let temp = tempfile::NamedTempFile::new_in(folder)?;
    let mut out = BufWriter::new(temp.as_file().try_clone()?);
    let d = c.loaded.model.spec().d_model;
    let total: usize = sequences.iter().map(|s| s.tokens.len()).sum();
    let bar = Progress::new("harvest", "tokens", total as u64);
    let mut rows = 0;
    let mut failed = None;
    let run = harvest(
        &c.loaded.model,
        c.site,
        sequences,
        c.study.model.batch_tokens,
        Products::Bf16,
        |_, x| {
            let bytes: Vec<u8> = x[d..].iter().flat_map(|v| v.to_le_bytes()).collect();
            if let Err(e) = out.write_all(&bytes) {
                failed = Some(e);
                return Err(FeatureError::Interrupted);
            }
            rows += x.len() / d - 1;
            bar.advance((x.len() / d) as u64);
            Ok(())
        },
    );
    if let Some(e) = failed {
        return Err(e).with_context(|| format!("write {}", path.display()));
    }
    run?;
    out.flush()?;
    temp.as_file().sync_all()?;
    temp.persist(path)?;
    bar.finish();
    Ok(rows)
}

fn write_sequences(path: &Path, sequences: &[Sequence]) -> Result<()> {
    let mut text = String::new();
    for s in sequences {
        let line = Line {
            source: s.source.clone(),
            tokens: s.tokens.clone(),
            roles: s.roles.clone(),
        };
        text.push_str(&serde_json::to_string(&line)?);
        text.push('\n');
    }
    write_atomic(path, text.as_bytes())
}

/// Sequences that a former stage wrote.
pub fn read_sequences(path: &Path) -> Result<Vec<Sequence>> {
    let lines = read_lines(path)?;
    let sequence = |l: Line| Sequence {
        source: l.source,
        tokens: l.tokens,
        roles: l.roles,
    };
    Ok(lines.into_iter().map(sequence).collect())
}

/// Whole lines; a torn last one, of a killed run, is left out and cut off.
fn read_lines(path: &Path) -> Result<Vec<Line>> {
    // Bytes: a torn line may end within a character.
    let text = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
    let whole = text
        .iter()
        .rposition(|b| *b == b'\n')
        .map_or(0, |at| at + 1);
    if whole < text.len() {
        File::options()
            .write(true)
            .open(path)?
            .set_len(whole as u64)?;
    }
    text[..whole.saturating_sub(1)]
        .split(|b| *b == b'\n')
        .filter(|l| !l.is_empty())
        .enumerate()
        .map(|(i, l)| {
            serde_json::from_slice(l).with_context(|| format!("{}:{}", path.display(), i + 1))
        })
        .collect()
}
