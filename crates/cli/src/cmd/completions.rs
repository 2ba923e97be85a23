//! `demur completions`: a completion script for a shell.

use anyhow::Result;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shell.
    shell: clap_complete::Shell,
}

pub fn run(args: Args, command: &mut clap::Command) -> Result<()> {
    clap_complete::generate(args.shell, command, "demur", &mut std::io::stdout());
    Ok(())
}
