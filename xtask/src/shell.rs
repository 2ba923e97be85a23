//! Programs, run in the root of the repository.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Runs programs in the root of the repository.
pub struct Shell {
    /// The repository.
    pub root: PathBuf,
}

/// Cargo, the one that runs us.
pub fn cargo<const N: usize>(args: [&str; N]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args);
    command
}

impl Shell {
    pub fn new() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("xtask is not in a repository")?;
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// Runs a program, its output to ours.
    pub fn run(&self, mut command: Command) -> Result<()> {
        let line = line(&command);
        eprintln!("   {line}");
        let status = command
            .current_dir(&self.root)
            .status()
            .with_context(|| format!("can't start `{line}`"))?;
        if !status.success() {
            bail!("`{line}`: {status}");
        }
        Ok(())
    }

    /// Runs a program and returns its standard output.
    pub fn read(&self, mut command: Command) -> Result<String> {
        let line = line(&command);
        eprintln!("   {line}");
        let output = command
            .current_dir(&self.root)
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("can't start `{line}`"))?;
        if !output.status.success() {
            bail!("`{line}`: {}", output.status);
        }
        String::from_utf8(output.stdout).with_context(|| format!("`{line}` wrote no UTF-8"))
    }

    /// A file of the repository.
    pub fn file(&self, path: &str) -> Result<String> {
        std::fs::read_to_string(self.root.join(path)).with_context(|| format!("read {path}"))
    }

    /// The workspace as Cargo sees it, with its dependencies or without.
    pub fn metadata(&self, dependencies: bool) -> Result<serde_json::Value> {
        let mut command = cargo(["metadata", "--format-version", "1"]);
        command.arg(if dependencies {
            "--locked"
        } else {
            "--no-deps"
        });
        Ok(serde_json::from_str(&self.read(command)?)?)
    }
}

fn line(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let mut words = vec![
        program
            .file_stem()
            .unwrap_or(program.as_os_str())
            .to_string_lossy(),
    ];
    words.extend(command.get_args().map(|a| a.to_string_lossy()));
    words.join(" ")
}
