//! `demur completions`: a completion script for a shell.

use std::io::Write;

use anyhow::Result;

const EXAMPLES: &str = "\
Examples:
  demur completions bash > ~/.local/share/bash-completion/completions/demur
  demur completions zsh > ~/.zfunc/_demur
  demur completions fish > ~/.config/fish/completions/demur.fish";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The shell.
    shell: clap_complete::Shell,
}

pub fn run(args: Args, command: &mut clap::Command) -> Result<()> {
    // Not straight to standard output: the generator panics when its reader has gone.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, command, "demur", &mut script);
    std::io::stdout().lock().write_all(&script)?;
    Ok(())
}
