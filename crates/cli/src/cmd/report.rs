//! `demur report`: the report of a record, written again.

use std::path::{Path, PathBuf};

use anyhow::Result;
use demur_eval::record::Record;

use crate::exit::Hinted;
use crate::progress::say;
use crate::report;
use crate::study::write_atomic;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// A run's folder, or its record.json.
    #[arg(default_value = "runs/quickstart")]
    run: PathBuf,
    /// Where to write it; beside the record, if not given.
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
}

pub fn run(args: Args) -> Result<()> {
    let (path, record) = read_record(&args.run)?;
    let out = args
        .out
        .unwrap_or_else(|| path.with_file_name("report.html"));
    write_atomic(&out, report::render(&record)?.as_bytes())?;
    say(out.display())
}

/// The record of a run, given its folder or the file itself.
pub fn read_record(run: &Path) -> Result<(PathBuf, Record)> {
    let path = if run.is_dir() {
        run.join("record.json")
    } else {
        run.to_owned()
    };
    if !path.exists() {
        let hint = match run.join("pull.json").is_file() {
            true => "its study has not ended: run the same `demur study` again, and it goes on",
            false => "run `demur study` first, or give the folder of a run: runs/NAME",
        };
        let message = format!("{} is not there", path.display());
        return Err(Hinted::new(message, hint).into());
    }
    let record = Record::read(&path)?;
    Ok((path, record))
}
