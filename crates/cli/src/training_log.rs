//! What training leaves for people and tools to watch: `metrics.jsonl`, an object a step, and a TensorBoard
//! event file, in the folder of the state that a stopped run goes on from.
//!
//! On resume both are cut to the steps of the state: what came after is done again and not twice in them.
//!
//! # Event files
//!
//! A record is `length u64, crc(length) u32, bytes, crc(bytes) u32`, little-endian, where `crc` is CRC-32C,
//! rotated right by 15 bits, plus `0xa282ead8`. The bytes are a message `tensorflow.Event`:
//!
//! | field | is |
//! | --- | --- |
//! | 1, double | seconds since 1970 |
//! | 2, int64 | step |
//! | 3, string | in the first record only: `brain.Event:2` |
//! | 5, `Summary` | field 1, repeated: `Value` with 1, string, the key and 2, float, the value |
//!
//! Keys are those of SAELens and sparsify: `losses/overall_loss`, `metrics/explained_variance` (1 - FVU of
//! the batch), `metrics/l0`, `sparsity/dead_features`, `details/current_learning_rate`, `fvu/<site>`,
//! `dead_pct/<site>`.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result};
use demur_eval::record::CurvePoint;
use demur_sae::SaeConfig;
use demur_sae::train::StepStats;
use serde_json::{Value, json};

use crate::study::write_atomic;

/// One JSON object a step.
pub const METRICS: &str = "metrics.jsonl";
/// Points of a curve.
const POINTS: usize = 100;
/// Found by TensorBoard by the first two parts of its name.
pub const EVENTS: &str = "events.out.tfevents.demur";
/// The mark of the format, in the first record.
const VERSION: &str = "brain.Event:2";

/// Both logs of a run, open.
pub struct TrainingLog {
    metrics: File,
    events: File,
    site: String,
    d_sae: usize,
}

impl TrainingLog {
    /// Opens the logs in `folder` of a run that has done `done` steps; returns the last metrics, too.
    pub fn open(folder: &Path, done: usize, sae: &SaeConfig) -> Result<(Self, Value)> {
        let (metrics, events) = (folder.join(METRICS), folder.join(EVENTS));
        let last = cut_metrics(&metrics, done)?;
        let before = read(&events)?;
        let mut kept = before[..kept(&before, done)].to_vec();
        if kept.is_empty() {
            record(&event(now(), 0, Some(VERSION), &[]), &mut kept);
        }
        write_atomic(&events, &kept)?;
        let append = |path: &Path| {
            let file = OpenOptions::new().create(true).append(true).open(path);
            file.with_context(|| format!("open {}", path.display()))
        };
        let log = Self {
            metrics: append(&metrics)?,
            events: append(&events)?,
            site: sae.hook_name.clone(),
            d_sae: sae.d_sae,
        };
        Ok((log, last))
    }

    /// Adds a step; returns its metrics.
    pub fn add(&mut self, s: &StepStats, vectors_per_s: f64) -> Result<Value> {
        let mut line = serde_json::to_value(s)?;
        line["vectors_per_s"] = json!(vectors_per_s);
        writeln!(self.metrics, "{line}")?;
        let site = &self.site;
        let values = [
            ("losses/overall_loss".to_owned(), s.loss),
            ("metrics/explained_variance".to_owned(), 1.0 - s.fvu),
            ("metrics/l0".to_owned(), s.l0),
            (
                "sparsity/dead_features".to_owned(),
                s.dead * self.d_sae as f64,
            ),
            ("details/current_learning_rate".to_owned(), s.lr),
            (format!("fvu/{site}"), s.fvu),
            (format!("dead_pct/{site}"), s.dead),
        ];
        let mut bytes = Vec::new();
        record(&event(now(), s.step as u64, None, &values), &mut bytes);
        self.events.write_all(&bytes)?;
        Ok(line)
    }

    /// Brings both to the disk; before the state that follows them is saved.
    pub fn sync(&self) -> Result<()> {
        self.metrics.sync_all()?;
        Ok(self.events.sync_all()?)
    }
}

/// The course of a training of so many `steps`, from its metrics in `folder`: about a hundred points.
pub fn curve(folder: &Path, steps: usize) -> Result<Vec<CurvePoint>> {
    let path = folder.join(METRICS);
    let bytes = read(&path)?;
    let every = (steps / POINTS).max(1);
    let mut curve = Vec::new();
    for line in bytes.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
        let s: StepStats =
            serde_json::from_slice(line).with_context(|| format!("read {}", path.display()))?;
        if s.step.is_multiple_of(every) || s.step == steps {
            curve.push(CurvePoint {
                step: s.step,
                fvu: s.fvu,
                loss: s.loss,
                dead: s.dead,
                lr: s.lr,
            });
        }
    }
    Ok(curve)
}

/// What a log holds; nothing if there is none yet.
fn read(path: &Path) -> Result<Vec<u8>> {
    match std::fs::read(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        read => read.with_context(|| format!("read {}", path.display())),
    }
}

/// Cuts the metrics to the lines up to step `done`; returns the last.
fn cut_metrics(path: &Path, done: usize) -> Result<Value> {
    let bytes = read(path)?;
    let lines: Vec<Value> = bytes
        .split(|b| *b == b'\n')
        .filter_map(|l| serde_json::from_slice(l).ok())
        .filter(|v: &Value| v["step"].as_u64().is_some_and(|s| s <= done as u64))
        .collect();
    let text: String = lines.iter().map(|l| format!("{l}\n")).collect();
    write_atomic(path, text.as_bytes())?;
    Ok(lines.last().cloned().unwrap_or(Value::Null))
}

/// Bytes of the whole records up to step `done`.
fn kept(bytes: &[u8], done: usize) -> usize {
    let mut at = 0;
    while let Some(event) = next_record(&bytes[at..]) {
        match step_of(event) {
            Some(step) if step <= done as u64 => at += event.len() + 16,
            _ => break,
        }
    }
    at
}

/// The bytes of the first record, if it is whole.
fn next_record(bytes: &[u8]) -> Option<&[u8]> {
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let (sum, rest) = rest.split_first_chunk::<4>()?;
    let n = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let (event, rest) = rest.split_at_checked(n)?;
    let end = rest.first_chunk::<4>()?;
    let sound = masked(length) == u32::from_le_bytes(*sum);
    (sound && masked(event) == u32::from_le_bytes(*end)).then_some(event)
}

/// The step of an event that [`event`] made: its second field.
fn step_of(event: &[u8]) -> Option<u64> {
    let rest = event.get(9..)?.strip_prefix(&[2 << 3])?;
    let mut step = 0u64;
    for (i, b) in rest.iter().take(9).enumerate() {
        step |= u64::from(b & 0x7f) << (7 * i);
        if b & 0x80 == 0 {
            return Some(step);
        }
    }
    None
}

fn record(event: &[u8], out: &mut Vec<u8>) {
    let length = (event.len() as u64).to_le_bytes();
    out.extend(length);
    out.extend(masked(&length).to_le_bytes());
    out.extend(event);
    out.extend(masked(event).to_le_bytes());
}

fn event(seconds: f64, step: u64, version: Option<&str>, values: &[(String, f64)]) -> Vec<u8> {
    let mut out = vec![(1 << 3) | 1];
    out.extend(seconds.to_le_bytes());
    out.push(2 << 3);
    varint(step, &mut out);
    if let Some(version) = version {
        field(3, version.as_bytes(), &mut out);
    }
    if !values.is_empty() {
        let mut summary = Vec::new();
        for (key, v) in values {
            let mut value = Vec::new();
            field(1, key.as_bytes(), &mut value);
            value.push((2 << 3) | 5);
            value.extend((*v as f32).to_le_bytes());
            field(1, &value, &mut summary);
        }
        field(5, &summary, &mut out);
    }
    out
}

/// A field of bytes.
fn field(number: u8, bytes: &[u8], out: &mut Vec<u8>) {
    out.push((number << 3) | 2);
    varint(bytes.len() as u64, out);
    out.extend(bytes);
}

fn varint(mut v: u64, out: &mut Vec<u8>) {
    while v >= 0x80 {
        out.push(v as u8 | 0x80);
        v >>= 7;
    }
    out.push(v as u8);
}

fn masked(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), bit by bit: records are some hundred bytes.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, b| {
        (0..8).fold(crc ^ u32::from(*b), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 & 0u32.wrapping_sub(crc & 1))
        })
    })
}

fn now() -> f64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0.0, |d| d.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reader of its own: fields of a message, with their wire types.
    fn fields(mut bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
        fn number(bytes: &mut &[u8]) -> u64 {
            let mut v = 0;
            for i in 0.. {
                let b = bytes[i];
                v += u64::from(b % 128) * 128u64.pow(i as u32);
                if b < 128 {
                    *bytes = &bytes[i + 1..];
                    break;
                }
            }
            v
        }
        let mut all = Vec::new();
        while !bytes.is_empty() {
            let tag = number(&mut bytes);
            let n = match tag % 8 {
                0 => {
                    let v = number(&mut bytes);
                    all.push((tag / 8, v.to_le_bytes().to_vec()));
                    continue;
                }
                1 => 8,
                5 => 4,
                2 => number(&mut bytes) as usize,
                other => panic!("wire type {other}"),
            };
            all.push((tag / 8, bytes[..n].to_vec()));
            bytes = &bytes[n..];
        }
        all
    }

    /// Steps, and the values of each.
    fn decode(bytes: &[u8]) -> Vec<(u64, Vec<(String, f32)>)> {
        let mut at = 0;
        let mut all = Vec::new();
        while at < bytes.len() {
            let n = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            let event = fields(&bytes[at + 12..at + 12 + n]);
            at += n + 16;
            let step = u64::from_le_bytes(event[1].1[..].try_into().unwrap());
            let mut values = Vec::new();
            for (number, bytes) in &event[2..] {
                if *number == 3 {
                    assert_eq!(bytes, b"brain.Event:2");
                    continue;
                }
                assert_eq!(*number, 5);
                for (_, value) in fields(bytes) {
                    let of = fields(&value);
                    let key = String::from_utf8(of[0].1.clone()).unwrap();
                    values.push((key, f32::from_le_bytes(of[1].1[..].try_into().unwrap())));
                }
            }
            all.push((step, values));
        }
        all
    }

    fn stats(step: usize) -> StepStats {
        StepStats {
            step,
            loss: 0.5,
            fvu: 0.25,
            l0: 31.5,
            dead: 0.125,
            lr: 1e-3,
        }
    }

    fn sae() -> SaeConfig {
        SaeConfig {
            d_model: 2,
            d_sae: 16,
            k: 1,
            hook_name: "blocks.1.hook_resid_post".to_owned(),
            model_name: String::new(),
        }
    }

    #[test]
    fn sums_by_the_standard() {
        // RFC 3720, B.4, and the check value of CRC-32C
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn what_is_written_is_decoded_and_no_step_comes_twice() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path();
        let (mut log, last) = TrainingLog::open(place, 0, &sae()).unwrap();
        assert_eq!(last, Value::Null);
        for step in 1..=200 {
            log.add(&stats(step), 1.0).unwrap();
        }
        log.sync().unwrap();
        // killed at 200 with a torn record, gone on from the state of step 150
        let events = place.join(EVENTS);
        let mut bytes = std::fs::read(&events).unwrap();
        bytes.extend([7; 21]);
        std::fs::write(&events, &bytes).unwrap();
        let (mut log, last) = TrainingLog::open(place, 150, &sae()).unwrap();
        assert_eq!(last["step"], 150);
        for step in 151..=300 {
            log.add(&stats(step), 1.0).unwrap();
        }
        let all = decode(&std::fs::read(&events).unwrap());
        let steps: Vec<u64> = all.iter().map(|e| e.0).collect();
        assert_eq!(steps, (0..=300).collect::<Vec<u64>>());
        let expected = [
            ("losses/overall_loss", 0.5),
            ("metrics/explained_variance", 0.75),
            ("metrics/l0", 31.5),
            ("sparsity/dead_features", 2.0),
            ("details/current_learning_rate", 1e-3),
            ("fvu/blocks.1.hook_resid_post", 0.25),
            ("dead_pct/blocks.1.hook_resid_post", 0.125),
        ]
        .map(|(key, value)| (key.to_owned(), value));
        assert!(all[0].1.is_empty());
        assert!(all[1..].iter().all(|e| e.1 == expected));
        let lines = std::fs::read_to_string(place.join(METRICS)).unwrap();
        assert_eq!(lines.lines().count(), 300);
    }

    #[test]
    fn a_broken_record_ends_what_is_kept() {
        let mut bytes = Vec::new();
        let mut ends = vec![0];
        for step in 0..3 {
            record(
                &event(1.0, step, None, &[("a".to_owned(), 2.0)]),
                &mut bytes,
            );
            ends.push(bytes.len());
        }
        assert_eq!(kept(&bytes, 9), ends[3]);
        assert_eq!(kept(&bytes, 1), ends[2]);
        for at in 0..bytes.len() {
            let whole = ends.iter().rposition(|e| *e <= at).unwrap();
            assert_eq!(kept(&bytes[..at], 9), ends[whole], "cut at {at}");
            let mut flipped = bytes.clone();
            flipped[at] ^= 4;
            assert_eq!(kept(&flipped, 9), ends[whole], "flipped at {at}");
        }
    }
}
