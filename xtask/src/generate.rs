//! docs/reference: pages that the binary prints about itself.

use anyhow::{Result, bail};

use crate::Done;
use crate::shell::{Shell, cargo};

/// A page and the arguments of `demur` that print it.
const PAGES: [(&str, [&str; 2]); 3] = [
    ("docs/reference/cli.md", ["reference", "cli"]),
    ("docs/reference/study.md", ["reference", "study"]),
    ("docs/reference/plan.schema.json", ["plan", "schema"]),
];

fn page(sh: &Shell, [command, what]: [&str; 2]) -> Result<String> {
    // In release, as the studies after it need the binary: no second build of everything.
    sh.read(cargo([
        "run",
        "--release",
        "--quiet",
        "--locked",
        "--",
        command,
        what,
    ]))
}

/// Writes every page.
pub fn write(sh: &Shell) -> Result<()> {
    for (path, args) in PAGES {
        std::fs::write(sh.root.join(path), page(sh, args)?)?;
    }
    Ok(())
}

/// Compares every page with what it would be.
pub fn check(sh: &Shell) -> Result<Done> {
    for (path, args) in PAGES {
        let (fresh, committed) = (page(sh, args)?, sh.file(path)?.replace("\r\n", "\n"));
        if let Some(line) = first_difference(&committed, &fresh) {
            bail!("{path} is out of date from line {line} on: run `cargo xtask generate`");
        }
    }
    Ok(Done::Passed)
}

/// The first line, counted from 1, at which two texts differ.
fn first_difference(a: &str, b: &str) -> Option<usize> {
    if a == b {
        return None;
    }
    let same = a.lines().zip(b.lines()).take_while(|(a, b)| a == b).count();
    Some(same + 1)
}

#[cfg(test)]
mod tests {
    use super::first_difference;

    #[test]
    fn the_first_line_that_differs_is_named() {
        assert_eq!(first_difference("a\nb\n", "a\nb\n"), None);
        assert_eq!(first_difference("a\nb\n", "a\nc\n"), Some(2));
        assert_eq!(first_difference("a\n", "a\nb\n"), Some(2));
        assert_eq!(first_difference("a", "a\n"), Some(2));
    }
}
