//! `demur report`: the report of a record, written again.

use std::path::PathBuf;

use anyhow::{Context, Result};
use demur_eval::record::Record;

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
    let path = if args.run.is_dir() {
        args.run.join("record.json")
    } else {
        args.run
    };
    let record = Record::read(&path).context("hint: run `demur study` first")?;
    let out = args
        .out
        .unwrap_or_else(|| path.with_file_name("report.html"));
    write_atomic(&out, report::render(&record)?.as_bytes())?;
    println!("{}", out.display());
    Ok(())
}
