//! What a gate may see of each of its prompts, pooled and kept.
//!
//! `rows.f32` holds one record a prompt ([`Readings`]), appended as they are read; `keys` the SHA-256 of each
//! one's text, in the same order. For heads of attention `tokens.bf16` holds the user's tokens of each, all sites of a
//! token in turn, and `tokens.ends` where each prompt's end. So reading goes on where it was killed, a gate is trained anew without the
//! model, and of prompts that are added only these are read.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, bail};
use demur_eval::prompts::{self, Known, Label, Prompt, Split};
use demur_eval::wrap::{self, Wrapper};
use demur_features::FeatureError;
use demur_features::attention::TokenRows;
use demur_features::gate::{self, Pooled, Readings};
use demur_features::harvest::Sequence;
use demur_kernels::mmap::Mapped;
use demur_model::hooks::{Role, Site};
use demur_sae::Sae;
use half::bf16;
use sha2::{Digest, Sha256};

use super::config::{GateConfig, Reads};
use super::{StudyContext, with_reply};
use crate::progress::{Progress, note};

/// The files in the folder, and the bytes of a key and of an end.
const ROWS: &str = "rows.f32";
const KEYS: &str = "keys";
const TOKENS: &str = "tokens.bf16";
const ENDS: &str = "tokens.ends";
const KEY: usize = 32;
const END: usize = 8;
/// The style of a prompt under a wrapper.
pub const WRAPPED: &str = "wrapped";

/// What is read of prompts, a row a prompt.
pub struct ReadPrompts {
    /// The latents', in each way of reading.
    pub latents: Vec<Pooled>,
    /// The residual's.
    pub residual: Vec<Pooled>,
    /// The residual of each token; if heads of attention are to be trained.
    pub tokens: Option<Tokens>,
}

/// Tokens of prompts, in a file.
pub struct Tokens {
    file: Mapped,
    /// Of each prompt.
    places: Vec<Range<usize>>,
    width: usize,
}

impl Tokens {
    /// The rows of the prompts.
    pub fn rows(&self) -> TokenRows<'_> {
        let of_prompts = self.places.iter().map(|p| &self.file[p.clone()]);
        TokenRows {
            prompts: of_prompts.collect(),
            width: self.width,
        }
    }
}

/// What is read of `prompts`. What is not in `folder` is read, and added.
pub fn rows(c: &StudyContext, sae: &Sae, prompts: &[Prompt], folder: &Path) -> Result<ReadPrompts> {
    let sites = sites(c)?;
    let readings = Readings::new(latents(c, sae).map(Sae::d_sae), sae.d_model(), sites.len());
    let bytes = 4 * readings.record_len();
    let width = sites.len() * sae.d_model();
    let mut kept = Kept::open(
        folder,
        bytes,
        c.study.gate.reads.contains(&Reads::Attention),
    )?;
    let mut place: HashMap<Key, usize> = HashMap::new();
    place.extend(kept.known.iter().copied().zip(0..));
    let missing: Vec<&Prompt> = prompts
        .iter()
        .filter(|p| !place.contains_key(&key(p)))
        .collect();
    if !missing.is_empty() {
        let done = prompts.len() - missing.len();
        read(c, sae, &missing, done, &mut kept)
            .with_context(|| format!("keep what was read in {}", folder.display()))?;
        place.extend(missing.iter().map(|p| key(p)).zip(kept.known.len()..));
    }
    let tokens = match kept.tokens {
        Some((_, mut ends)) => {
            ends.rewind()?;
            let mut all = Vec::new();
            ends.read_to_end(&mut all)?;
            let ends = all.as_chunks().0.iter();
            let ends: Vec<usize> = ends.map(|b| u64::from_le_bytes(*b) as usize).collect();
            let from = |n: usize| n.checked_sub(1).map_or(0, |before| ends[before]);
            let places = prompts.iter().map(|p| place[&key(p)]);
            Some(Tokens {
                file: Mapped::open(&folder.join(TOKENS))?,
                places: places.map(|n| from(n)..ends[n]).collect(),
                width,
            })
        }
        None => None,
    };
    let mut record = vec![0; bytes];
    let records = prompts.iter().map(|p| -> Result<Vec<f32>> {
        kept.rows
            .seek(SeekFrom::Start((place[&key(p)] * bytes) as u64))?;
        kept.rows
            .read_exact(&mut record)
            .with_context(|| format!("read {}", folder.join(ROWS).display()))?;
        let values = record.as_chunks().0.iter();
        Ok(values.map(|b| f32::from_le_bytes(*b)).collect())
    });
    let (latents, residual) = readings.pooled(records)?;
    Ok(ReadPrompts {
        latents,
        residual,
        tokens,
    })
}

pub type Key = [u8; KEY];

/// Under what a prompt's record is found.
pub fn key(p: &Prompt) -> Key {
    Sha256::digest(&p.prompt).into()
}

/// The files of a folder, whole records of them.
struct Kept {
    rows: File,
    keys: File,
    /// Tokens and their ends, if they are kept, and how many bytes of tokens there are.
    tokens: Option<(File, File)>,
    end: u64,
    known: Vec<Key>,
}

impl Kept {
    /// Opens the files, and cuts what was being written when the process was killed: a torn record, or one without
    /// its key.
    fn open(folder: &Path, record: usize, with_tokens: bool) -> Result<Self> {
        let open = |name: &str| {
            let path = folder.join(name);
            let mut how = OpenOptions::new();
            let how = how.read(true).append(true).create(true);
            how.open(&path)
                .with_context(|| format!("open {}", path.display()))
        };
        let whole = |mut file: &File| -> Result<Vec<u8>> {
            let mut all = Vec::new();
            file.read_to_end(&mut all)
                .with_context(|| format!("read {}", folder.display()))?;
            Ok(all)
        };
        let (rows, keys) = (open(ROWS)?, open(KEYS)?);
        let known = whole(&keys)?;
        let mut known: Vec<Key> = known.as_chunks().0.to_vec();
        known.truncate((rows.metadata()?.len() / record as u64) as usize);
        let (mut tokens, mut end) = (None, 0);
        if with_tokens {
            let (file, ends_file) = (open(TOKENS)?, open(ENDS)?);
            let ends = whole(&ends_file)?;
            let mut ends: Vec<u64> = ends
                .as_chunks()
                .0
                .iter()
                .map(|b| u64::from_le_bytes(*b))
                .collect();
            let there = file.metadata()?.len();
            ends.truncate(known.len());
            while ends.last().is_some_and(|end| *end > there) {
                ends.pop();
            }
            known.truncate(ends.len());
            end = ends.last().copied().unwrap_or_default();
            file.set_len(end)?;
            ends_file.set_len((ends.len() * END) as u64)?;
            tokens = Some((file, ends_file));
        }
        rows.set_len((known.len() * record) as u64)?;
        keys.set_len((known.len() * KEY) as u64)?;
        Ok(Self {
            rows,
            keys,
            tokens,
            end,
            known,
        })
    }
}

/// Reads prompts, of which there are `done` others, and appends their records and keys.
fn read(
    c: &StudyContext,
    sae: &Sae,
    prompts: &[&Prompt],
    done: usize,
    kept: &mut Kept,
) -> Result<()> {
    let items = c.items(prompts)?;
    let sequences: Vec<Sequence> = items.iter().map(|i| with_reply(i, &[])).collect();
    let bar = Progress::new("gate", "prompts", (done + prompts.len()) as u64);
    bar.resume(done as u64);
    let buffered = |file| BufWriter::with_capacity(1 << 20, file);
    let (mut rows, mut keys) = (buffered(&kept.rows), &kept.keys);
    let mut tokens = kept.tokens.as_ref().map(|(t, e)| (buffered(t), e));
    let mut end = kept.end;
    let mut failed = None;
    let result = gate::read(
        &c.loaded.model,
        &sites(c)?,
        latents(c, sae),
        &sequences,
        c.study.model.batch_tokens,
        |i, record, by_site| {
            let mut keep = || -> std::io::Result<()> {
                let bytes: Vec<u8> = record.iter().flat_map(|v| v.to_le_bytes()).collect();
                rows.write_all(&bytes)?;
                if let Some((tokens, ends)) = &mut tokens {
                    let bytes = of_users_tokens(&sequences[i].roles, by_site);
                    tokens.write_all(&bytes)?;
                    end += bytes.len() as u64;
                    ends.write_all(&end.to_le_bytes())?;
                }
                keys.write_all(&key(prompts[i]))
            };
            match keep() {
                Ok(()) => bar.advance(1),
                Err(e) => {
                    failed = Some(e);
                    return Err(FeatureError::Interrupted);
                }
            }
            Ok(())
        },
    );
    if let Some(e) = failed {
        return Err(e.into());
    }
    result?;
    rows.flush()?;
    if let Some((tokens, _)) = &mut tokens {
        tokens.flush()?;
    }
    bar.finish();
    Ok(())
}

/// The user's tokens as [`TokenRows`] has them; the first token of all is an attention sink and is not read.
fn of_users_tokens(roles: &[Role], by_site: &[&[f32]]) -> Vec<u8> {
    let read = (1..roles.len()).filter(|&t| roles[t] == Role::User);
    let of_token = read.flat_map(|t| {
        by_site.iter().flat_map(move |x| {
            let d = x.len() / roles.len();
            &x[t * d..(t + 1) * d]
        })
    });
    of_token
        .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
        .collect()
}

fn latents<'a>(c: &StudyContext, sae: &'a Sae) -> Option<&'a Sae> {
    c.study.gate.reads.contains(&Reads::Latents).then_some(sae)
}

/// The sites whose residual a gate may read, the SAE's the last.
pub fn sites(c: &StudyContext) -> Result<Vec<Site>> {
    let mut sites = Vec::new();
    for name in &c.study.gate.sites {
        let site = name
            .parse::<Site>()?
            .check(c.loaded.model.spec().n_layers)?;
        if site > c.site {
            bail!("gate.sites: {site} is after {}, where the clamp is", c.site);
        }
        sites.push(site);
    }
    sites.push(c.site);
    sites.sort_unstable();
    sites.dedup();
    Ok(sites)
}

/// The gate's prompts: those of the discovery, of the validation and of the test split, in this order.
pub fn prompts(c: &StudyContext) -> Result<Vec<Prompt>> {
    let mut all = match &c.study.prompts.file {
        Some(_) => c.prompts.clone(),
        None => super::shipped_pairs(super::ShippedPairs::All)?,
    };
    all.extend(prompts::shipped_instructions()?);
    let cfg = &c.study.gate;
    let mut held_out = Vec::new();
    for file in &cfg.held_out {
        held_out.extend(prompts::read_rows(file)?);
    }
    let held_out = Known::new(held_out.iter().map(|p| p.prompt.as_str()));
    // Two files may hold the same text, and be drawn apart.
    let text = |p: &Prompt| prompts::normalised(&p.prompt);
    let mut splits: HashMap<String, Option<Split>> =
        all.iter().map(|p| (text(p), p.split)).collect();
    for file in &cfg.files {
        let more = prompts::read_rows(file)?;
        let before = more.len();
        let mut more = drawn(more, cfg.per_file, c.study.seed);
        let taken = more.len();
        more.retain(|p| {
            p.label.is_some()
                && !held_out.resembles(&p.prompt)
                && *splits.entry(text(p)).or_insert(p.split) == p.split
        });
        let place = file.display();
        note(format_args!(
            "{:<12} {} of {before} prompts of {place}; {} more have no label, are like prompts of a test, or are in \
             another split",
            "gate",
            more.len(),
            taken - more.len()
        ));
        prompts::disjoint(&place.to_string(), all.iter().chain(&more))?;
        all.extend(more);
    }
    all.retain(|p| p.label.is_some());
    all.extend(wrapped(&all, cfg, c.study.seed)?);
    let of = |split| all.iter().filter(move |p| p.split == Some(split)).cloned();
    let splits = [Split::Discovery, Split::Validation, Split::Test];
    Ok(splits.into_iter().flat_map(of).collect())
}

/// At most `most` of the prompts (0: all), drawn by `seed`; each in a split, a pair in one.
fn drawn(mut prompts: Vec<Prompt>, most: usize, seed: u64) -> Vec<Prompt> {
    let key = |p: &Prompt| match p.pair {
        Some(pair) => draw(seed, &pair.to_le_bytes()),
        None => draw(seed, p.prompt.as_bytes()),
    };
    // A text that is there twice would be in two splits.
    let mut seen = HashSet::new();
    prompts.retain(|p| seen.insert(p.prompt.clone()));
    prompts.sort_by_cached_key(|p| (key(p), p.id.clone()));
    if most > 0 {
        prompts.truncate(most);
    }
    for (i, group) in prompts.chunk_by_mut(|a, b| key(a) == key(b)).enumerate() {
        for p in group {
            p.split = Some(one_in_five(i));
            p.pair = None;
        }
    }
    prompts
}

/// Where something comes in a drawing by `seed`.
fn draw(seed: u64, what: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    hash.update(what);
    hash.finalize().into()
}

/// One in five is for validation.
fn one_in_five(i: usize) -> Split {
    match i % 5 {
        4 => Split::Validation,
        _ => Split::Discovery,
    }
}

/// Some of the prompts under wrappers: each wrapper is in one split, and around as many unsafe prompts as safe
/// ones, so that it says nothing of what it is around. Which prompt is under which wrapper does not depend on
/// the other prompts.
fn wrapped(prompts: &[Prompt], cfg: &GateConfig, seed: u64) -> Result<Vec<Prompt>> {
    let Some(file) = &cfg.wrappers else {
        return Ok(Vec::new());
    };
    let mut wrappers = wrap::read(file)?;
    wrappers.sort_by_cached_key(|w| draw(seed, w.template.as_bytes()));
    let mut out = Vec::new();
    for split in [Split::Discovery, Split::Validation] {
        let of_split = |(i, w)| (one_in_five(i) == split).then_some(w);
        let wrappers: Vec<&Wrapper> = wrappers.iter().enumerate().filter_map(of_split).collect();
        if wrappers.is_empty() {
            continue;
        }
        // Prompts of a wrapper, the unsafe and the safe ones, each with its place in the drawing.
        let mut around = vec![[Vec::new(), Vec::new()]; wrappers.len()];
        for p in prompts.iter().filter(|p| p.split == Some(split)) {
            let place = draw(seed, p.prompt.as_bytes());
            let [share, wrapper] = [&place[..4], &place[4..8]].map(|b| {
                let word = [b[0], b[1], b[2], b[3]];
                f64::from(u32::from_le_bytes(word)) / f64::from(u32::MAX)
            });
            if share <= cfg.wrapped {
                let at = ((wrapper * wrappers.len() as f64) as usize).min(wrappers.len() - 1);
                around[at][usize::from(p.label == Some(Label::Safe))].push((place, p));
            }
        }
        for (wrapper, mut both) in wrappers.into_iter().zip(around) {
            let n = both[0].len().min(both[1].len());
            both.iter_mut()
                .for_each(|of| of.sort_by_key(|(place, _)| *place));
            let taken = both.iter().flat_map(|of| &of[..n]);
            out.extend(taken.map(|(_, p)| Prompt {
                id: format!("{}@{}", p.id, wrapper.id),
                prompt: wrapper.around(&p.prompt),
                style: Some(WRAPPED.to_owned()),
                pair: None,
                ..(*p).clone()
            }));
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn what_was_being_written_is_cut() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            std::fs::write(folder.path().join(name), bytes).unwrap();
        };
        let length = |name: &str| folder.path().join(name).metadata().unwrap().len();
        let ends: Vec<u8> = [4u64, 10, 12]
            .iter()
            .flat_map(|e| e.to_le_bytes())
            .collect();
        // Three prompts of records of 8 bytes; the third one's tokens are not whole, and a fourth's row is torn.
        write(KEYS, &[7; 3 * KEY + 5]);
        write(ROWS, &[1; 3 * 8 + 3]);
        write(ENDS, &ends);
        write(TOKENS, &[2; 11]);
        let kept = Kept::open(folder.path(), 8, true).unwrap();
        assert_eq!((kept.known.len(), kept.end), (2, 10));
        let lengths = [KEYS, ROWS, ENDS, TOKENS].map(length);
        assert_eq!(lengths, [2 * KEY as u64, 16, 2 * END as u64, 10]);
        // Without tokens only records and keys count.
        write(KEYS, &[7; 3 * KEY]);
        write(ROWS, &[1; 3 * 8]);
        let kept = Kept::open(folder.path(), 8, false).unwrap();
        assert_eq!(kept.known.len(), 3);
        assert!(kept.tokens.is_none());
    }

    #[test]
    fn of_a_prompt_the_users_tokens_are_kept_but_the_first_of_all() {
        use Role::{Template, User};
        let sites: [&[f32]; 2] = [&[1.0, 2.0, 3.0, 4.0], &[-1.0, -2.0, -3.0, 1.003_906_2]];
        let bytes = of_users_tokens(&[User, User, Template, User], &sites);
        let values = bytes.as_chunks().0.iter();
        let values = values.map(|b| bf16::from_le_bytes(*b).to_f32());
        // The last one lies half-way between two, and is rounded to the even one.
        assert_eq!(values.collect::<Vec<f32>>(), [2.0, -2.0, 4.0, 1.0]);
    }

    #[test]
    fn a_wrapper_is_around_as_many_of_either_label_and_in_one_split() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("w.jsonl");
        let line =
            |i: usize| format!("{{\"id\": \"w{i}\", \"template\": \"{i}: {{request}}!\"}}\n");
        std::fs::write(&file, (0..10).map(line).collect::<String>()).unwrap();
        let prompt = |i: usize| Prompt {
            id: format!("p{i}"),
            prompt: format!("request {i}"),
            label: Some([Label::Unsafe, Label::Safe, Label::Safe][i % 3]),
            category: None,
            style: None,
            split: Some(one_in_five(i / 3)),
            pair: Some(7),
        };
        let prompts: Vec<Prompt> = (0..600).map(prompt).collect();
        let cfg = GateConfig {
            wrappers: Some(file),
            wrapped: 0.5,
            ..GateConfig::default()
        };
        let out = wrapped(&prompts, &cfg, 3).unwrap();
        let mut tally = BTreeMap::new();
        for p in &out {
            let wrapper = p.id.split_once('@').unwrap().1;
            let entry = tally.entry(wrapper).or_insert((p.split, [0, 0]));
            assert_eq!(entry.0, p.split, "{wrapper} is in two splits");
            entry.1[usize::from(p.label == Some(Label::Unsafe))] += 1;
            assert_eq!((p.style.as_deref(), p.pair), (Some(WRAPPED), None));
            let is = |q: &&Prompt| p.id.starts_with(&format!("{}@", q.id));
            let inner = &prompts.iter().find(is).unwrap().prompt;
            assert_eq!(p.prompt, format!("{}: {inner}!", &wrapper[1..]));
        }
        assert!(tally.values().all(|(_, [safe, other])| safe == other));
        let of = |split| tally.values().filter(|t| t.0 == Some(split)).count();
        assert_eq!((of(Split::Discovery), of(Split::Validation)), (8, 2));
        // Of 200 unsafe prompts about half.
        assert!((140..=220).contains(&out.len()), "{}", out.len());
        assert!(wrapped(&prompts, &cfg, 3).unwrap() == out);
        assert!(wrapped(&prompts, &cfg, 4).unwrap() != out);
        // A prompt stays under its wrapper when others are added.
        let fewer = wrapped(&prompts[..450], &cfg, 3).unwrap();
        let kept = fewer.iter().filter(|p| out.contains(p)).count();
        assert!(kept * 10 >= fewer.len() * 8, "{kept} of {}", fewer.len());
    }
}
