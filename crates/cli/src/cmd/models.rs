//! `demur models`: the catalogue.

use std::io::Write;

use anyhow::Result;
use serde_json::json;

use crate::catalogue::{DEFAULT_MODEL, cache_dir, entries};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let all = entries()?;
    let mut out = std::io::stdout().lock();
    if args.json {
        let mut rows = Vec::new();
        for e in &all {
            rows.push(json!({
                "name": e.name, "title": e.title, "architecture": e.architecture,
                "licence": e.licence, "bytes": e.bytes, "sha256": e.sha256,
                "cached": e.is_cached()?, "path": e.cached_path()?, "default": e.name == DEFAULT_MODEL,
            }));
        }
        writeln!(out, "{}", json!({ "cache": cache_dir()?, "models": rows }))?;
        return Ok(());
    }
    for e in &all {
        let size = e
            .bytes
            .map_or("-".to_owned(), |b| format!("{:.0} MB", b as f64 / 1e6));
        let state = match (e.is_cached()?, e.name == DEFAULT_MODEL) {
            (true, true) => "cached, default",
            (true, false) => "cached",
            (false, true) => "default",
            (false, false) => "",
        };
        writeln!(
            out,
            "{:<30} {:>8}  {:<8} {}  {state}",
            e.name, size, e.architecture, e.title
        )?;
    }
    writeln!(out, "\ncache: {}", cache_dir()?.display())?;
    Ok(())
}
