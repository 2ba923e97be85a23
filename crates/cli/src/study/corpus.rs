//! Stage `harvest`: text for the SAE, as tokens. Activations are made of it where they are needed.
//!
//! Always: held-out chats (the model's own replies to ordinary requests) and passages, on which the
//! SAE is judged. If the study trains SAEs: on-policy chats and files besides, in `texts.jsonl`, with
//! the positions that are trained on.
//!
//! Files are read side by side: the next text is one of the file that has least tokens for its weight,
//! until there are `corpus.max_tokens`.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, bail};
use demur_eval::arms::{Arm, Item};
use demur_eval::files::{self, Lines};
use demur_eval::prompts::{self, Prompt, Split};
use demur_features::harvest::Sequence;
use demur_model::chat::Message;
use demur_model::generate::{Request, Sampling};
use demur_model::hooks::Role;
use demur_model::tokenizer::Special;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::config::SaeSource;
use super::{StudyContext, with_reply, write_atomic};
use crate::progress::{Progress, note};

/// Reply length of held-out chats, tokens.
const HELD_OUT_REPLY: usize = 32;
/// Held-out chats.
const HELD_OUT_CHATS: usize = 24;
/// What is trained on, in the stage's folder.
pub const TEXTS: &str = "texts.jsonl";

/// What the stage leaves: counts; the sequences and rows are in its folder.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Corpus {
    pub train_sequences: usize,
    /// Tokens that are trained on: those of the roles asked for, but the first of each sequence.
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

/// A sequence that is trained on, as it is on disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Text {
    pub source: String,
    pub tokens: Vec<u32>,
    /// The positions that are trained on: from, and up to but without.
    rows: Vec<(usize, usize)>,
}

impl Text {
    /// Of a sequence, the tokens that `is_wanted` by their role, but the first.
    fn of(s: Sequence, is_wanted: impl Fn(Role) -> bool) -> Self {
        let mut rows: Vec<(usize, usize)> = Vec::new();
        for (at, role) in s.roles.iter().enumerate().skip(1) {
            match rows.last_mut() {
                _ if !is_wanted(*role) => {}
                Some((_, end)) if *end == at => *end += 1,
                _ => rows.push((at, at + 1)),
            }
        }
        Self {
            source: s.source,
            tokens: s.tokens,
            rows,
        }
    }

    /// The positions that are trained on.
    pub fn ranges(&self) -> impl Iterator<Item = Range<usize>> {
        self.rows.iter().map(|(from, to)| *from..*to)
    }

    /// How many they are.
    pub fn n_rows(&self) -> usize {
        self.ranges().map(|r| r.len()).sum()
    }

    /// Whether its positions are there, in order.
    fn is_sound(&self) -> bool {
        let mut before = 0;
        self.rows.iter().all(|&(from, to)| {
            let sound = before <= from && from < to && to <= self.tokens.len();
            before = to;
            sound
        })
    }
}

pub fn run(c: &StudyContext, scratch: &Path) -> Result<Corpus> {
    let benign = prompts::shipped_benign()?;
    let held_out: Vec<&Prompt> = benign
        .iter()
        .filter(|p| p.split == Some(Split::Validation))
        .take(HELD_OUT_CHATS)
        .collect();
    let items = c.items(&held_out)?;
    let base = Arm {
        name: "held_out",
        hook: None,
        items: &items,
    };
    let replies = c.replies("harvest", &[base], HELD_OUT_REPLY, scratch)?;
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
        let texts = training_texts(c, &benign, scratch)?;
        corpus.train_sequences = texts.len();
        corpus.train_rows = texts.iter().map(Text::n_rows).sum();
        write_lines(&scratch.join(TEXTS), &texts)?;
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
fn training_texts(c: &StudyContext, benign: &[Prompt], scratch: &Path) -> Result<Vec<Text>> {
    let corpus = &c.study.corpus;
    let is_wanted = |role| corpus.roles.contains(&role);
    let mut texts = Vec::new();
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
        let chats = on_policy(c, &items, &scratch.join("on_policy.jsonl"))?;
        texts.extend(chats.into_iter().map(|s| Text::of(s, is_wanted)));
        for round in 0..corpus.written_refusals {
            let refusing = written_refusals(c, &items, round)?;
            texts.extend(refusing.into_iter().map(|s| Text::of(s, is_wanted)));
        }
    }
    read_files(c, &mut texts)?;
    texts.retain(|t| t.n_rows() > 0);
    if texts.is_empty() {
        bail!(
            "the corpus is empty: set corpus.on_policy = true or give corpus.files, and roles that they have"
        );
    }
    Ok(texts)
}

/// Each prompt with a refusal that demur wrote for a reply, another one each round.
pub fn written_refusals(c: &StudyContext, items: &[Item], round: usize) -> Result<Vec<Sequence>> {
    let texts = prompts::shipped_refusals();
    let replies = texts
        .iter()
        .map(|text| Ok(c.loaded.tokenizer.encode(text, Special::AsText)?))
        .collect::<Result<Vec<_>>>()?;
    let refusing = items.iter().enumerate().map(|(i, item)| Sequence {
        source: format!("{}/refusal{round}", item.id),
        ..with_reply(item, &replies[(i + round) % replies.len()])
    });
    Ok(refusing.collect())
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
    bar.resume((n - asked.len()) as u64);
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

/// A file of the corpus while it is read.
struct Source {
    name: String,
    lines: Lines<Box<dyn Read>>,
    weight: f64,
    /// Tokens taken of it.
    tokens: usize,
    ended: bool,
}

/// Adds the texts and chats of the files, by their weights.
fn read_files(c: &StudyContext, texts: &mut Vec<Text>) -> Result<()> {
    let corpus = &c.study.corpus;
    if corpus.files.is_empty() {
        return Ok(());
    }
    let open = |(i, file): (usize, &std::path::PathBuf)| {
        let name = file.display().to_string();
        Ok(Source {
            lines: Lines::new(&name, files::open(file)?, u64::MAX),
            name,
            weight: corpus.weights.get(i).copied().unwrap_or(1.0),
            tokens: 0,
            ended: false,
        })
    };
    let mut sources: Vec<Source> = corpus
        .files
        .iter()
        .enumerate()
        .map(open)
        .collect::<Result<_>>()?;
    let mut total: usize = texts.iter().map(|t| t.tokens.len()).sum();
    let bar = Progress::new("read", "tokens", corpus.max_tokens as u64);
    bar.resume(total.min(corpus.max_tokens) as u64);
    while total < corpus.max_tokens
        && let Some(source) = next_source(&mut sources)
    {
        let Some((number, line)) = source.lines.next_line()? else {
            source.ended = true;
            continue;
        };
        let text = read_line(c, source, number, &line)?;
        source.tokens += text.tokens.len();
        total += text.tokens.len();
        bar.advance(text.tokens.len() as u64);
        texts.push(text);
    }
    bar.finish();
    for s in &sources {
        let (tokens, name, end) = (s.tokens, &s.name, if s.ended { ", all it has" } else { "" });
        note(format_args!(
            "{:<12} {tokens} tokens of {name}{end}",
            "read"
        ));
    }
    Ok(())
}

/// The source that has least for its weight, of those that have more; the first, if there are several.
fn next_source(sources: &mut [Source]) -> Option<&mut Source> {
    let share = |s: &Source| s.tokens as f64 / s.weight;
    let left = sources.iter_mut().filter(|s| !s.ended);
    left.min_by(|a, b| share(a).total_cmp(&share(b)))
}

/// A text, or a chat.
fn read_line(c: &StudyContext, source: &Source, number: usize, line: &[u8]) -> Result<Text> {
    #[derive(Deserialize)]
    struct Row {
        text: Option<String>,
        messages: Option<Vec<Message>>,
    }
    let corpus = &c.study.corpus;
    let row: Row = serde_json::from_slice(line).map_err(|e| source.lines.wrong(number, e))?;
    let place = format!("{}:{number}", source.name);
    match (row.text, row.messages) {
        (Some(text), _) => Ok(Text::of(text_sequence(c, &place, &text)?, |_| true)),
        (None, Some(messages)) => {
            let chat = c
                .loaded
                .chat()?
                .encode(&c.loaded.tokenizer, &messages, false)
                .with_context(|| place.clone())?;
            let mut s = Sequence {
                source: place,
                tokens: chat.ids,
                roles: chat.roles,
            };
            s.tokens.truncate(corpus.context);
            s.roles.truncate(corpus.context);
            Ok(Text::of(s, |role| corpus.roles.contains(&role)))
        }
        (None, None) => bail!("{place}: it has neither 'text' nor 'messages'"),
    }
}

fn write_sequences(path: &Path, sequences: &[Sequence]) -> Result<()> {
    let line = |s: &Sequence| Line {
        source: s.source.clone(),
        tokens: s.tokens.clone(),
        roles: s.roles.clone(),
    };
    write_lines(path, &sequences.iter().map(line).collect::<Vec<_>>())
}

fn write_lines(path: &Path, lines: &[impl Serialize]) -> Result<()> {
    let mut text = Vec::new();
    for line in lines {
        serde_json::to_writer(&mut text, line)?;
        text.push(b'\n');
    }
    write_atomic(path, &text)
}

/// What is trained on, as [`run`] wrote it.
pub fn read_texts(path: &Path) -> Result<Vec<Text>> {
    let texts: Vec<Text> = read_lines(path)?;
    match texts.iter().find(|t| !t.is_sound()) {
        Some(t) => bail!("{}: '{}' has no such positions", path.display(), t.source),
        None => Ok(texts),
    }
}

/// Sequences that a former stage wrote.
pub fn read_sequences(path: &Path) -> Result<Vec<Sequence>> {
    let lines: Vec<Line> = read_lines(path)?;
    let sequence = |l: Line| Sequence {
        source: l.source,
        tokens: l.tokens,
        roles: l.roles,
    };
    Ok(lines.into_iter().map(sequence).collect())
}

/// Whole lines; a torn last one, of a killed run, is left out and cut off.
fn read_lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn source(weight: f64, tokens: usize, ended: bool) -> Source {
        Source {
            name: String::new(),
            lines: Lines::new("", Box::new(std::io::empty()), 0),
            weight,
            tokens,
            ended,
        }
    }

    #[test]
    fn files_are_read_by_their_weights() {
        let mut sources = vec![source(1.0, 0, false), source(3.0, 0, false)];
        let mut order = Vec::new();
        for _ in 0..400 {
            let s = next_source(&mut sources).unwrap();
            s.tokens += 10;
            order.push(s.weight as usize);
        }
        assert_eq!(order[..5], [1, 3, 3, 3, 1]);
        assert_eq!((sources[0].tokens, sources[1].tokens), (1000, 3000));
        sources[1].ended = true;
        assert_eq!(next_source(&mut sources).unwrap().weight, 1.0);
        sources[0].ended = true;
        assert!(next_source(&mut sources).is_none());
    }

    #[test]
    fn a_text_says_which_positions_are_trained_on() {
        use Role::{Assistant as A, Template as T, User as U};
        let text = |wanted: &[Role]| {
            let roles = vec![T, T, U, U, T, A, A, A];
            let s = Sequence {
                source: "s".to_owned(),
                tokens: (0..8).collect(),
                roles,
            };
            Text::of(s, |r| wanted.contains(&r))
        };
        assert_eq!(text(&[T, U, A]).rows, [(1, 8)]);
        assert_eq!(text(&[U, A]).rows, [(2, 4), (5, 8)]);
        assert_eq!(text(&[T]).rows, [(1, 2), (4, 5)]);
        assert!(text(&[Role::System]).rows.is_empty());
        assert_eq!(text(&[U, A]).n_rows(), 5);
        let with = |rows: &[(usize, usize)]| Text {
            rows: rows.to_vec(),
            ..text(&[])
        };
        assert!(with(&[(1, 3), (3, 8)]).is_sound());
        for rows in [&[(1, 9)][..], &[(3, 3)], &[(4, 5), (1, 2)], &[(5, 2)]] {
            assert!(!with(rows).is_sound(), "{rows:?}");
        }
    }
}
