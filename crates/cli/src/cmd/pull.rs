//! `demur pull`: a model of the catalogue into the cache.

use anyhow::Result;

use crate::catalogue::{DEFAULT_MODEL, Named, resolve};
use crate::fetch::{self, Source};

#[derive(Debug, clap::Args)]
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
}

pub fn run(args: Args) -> Result<()> {
    let path = match resolve(&args.model)? {
        Named::Path(path) => path,
        Named::Entry(entry) if entry.is_cached()? && !args.force => entry.cached_path()?,
        Named::Entry(entry) => fetch::fetch(&entry, args.from)?,
    };
    println!("{}", path.display());
    Ok(())
}
