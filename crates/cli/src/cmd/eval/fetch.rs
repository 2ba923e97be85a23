//! `demur eval fetch`: the files of suites, from the Hub.

use std::path::PathBuf;

use anyhow::{Result, bail};
use demur_eval::suites::{spelled, suite};

use crate::exit::Usage;
use crate::fetch::dataset_file;
use crate::progress::{note, say};

/// Number of the only part of a file.
const WHOLE: &str = "00000-of-00001";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Names of suites, separated by commas.
    #[arg(required = true, value_delimiter = ',', value_name = "SUITE")]
    suites: Vec<String>,
    /// Folder for the files; each lies under the name of its repository.
    #[arg(long, env = "DEMUR_DATA", default_value = "data", value_name = "DIR")]
    data: PathBuf,
    /// A branch, tag or commit of the repositories.
    #[arg(long, default_value = "main")]
    revision: String,
    /// Fetch files even if they are there.
    #[arg(long)]
    force: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let mut known = Vec::new();
    for name in &args.suites {
        let suite = suite(name).map_err(|e| anyhow::Error::new(e).context(Usage))?;
        let Some(hub) = suite.hub else {
            bail!("no data set of the Hub is known for {name}");
        };
        known.push((suite, hub));
    }
    for (suite, hub) in known {
        for file in hub.files {
            let file = file.replace('*', WHOLE);
            let place = args.data.join(hub.repo).join(&file);
            if place.is_file() && !args.force {
                note(format_args!("{} is there", place.display()));
                continue;
            }
            let sha256 = dataset_file(hub.repo, &args.revision, &file, &place)?;
            say(format_args!("{sha256}  {}", place.display()))?;
        }
        if let Some(names) = suite.absent(std::slice::from_ref(&args.data)) {
            note(format_args!(
                "{} needs {} too, which is not on the Hub",
                suite.name,
                spelled(names)
            ));
        }
    }
    Ok(())
}
