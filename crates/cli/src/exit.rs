//! How a command ends: 0 well, 1 in failure, 2 for a command line that can't be meant, 130 on Ctrl-C.

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

/// A message with a way out, which is printed on a line of its own.
#[derive(Debug)]
pub struct Hinted {
    message: String,
    hint: String,
}

impl Hinted {
    pub fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: hint.into(),
        }
    }

    /// The way out.
    pub fn hint(&self) -> &str {
        &self.hint
    }
}

impl fmt::Display for Hinted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Hinted {}

/// An error of the command line: an argument that names nothing.
#[derive(Debug)]
pub struct Usage;

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("usage")
    }
}

/// Prints an error and gives the exit code that it stands for.
pub fn report(e: &anyhow::Error, verbose: bool) -> ExitCode {
    if is_broken_pipe(e) {
        return ExitCode::SUCCESS;
    }
    // Nobody may be there to read it, which is no reason to panic.
    let say = |text: &str| drop(writeln!(std::io::stderr(), "{text}"));
    let usage = e.downcast_ref::<Usage>().is_some();
    let mut causes = e.chain().skip(usize::from(usage)).map(ToString::to_string);
    let first = causes.next().unwrap_or_default();
    if verbose {
        say(&format!("error: {first}"));
        causes.for_each(|c| say(&format!("  because: {c}")));
    } else {
        // A cause that its error already tells is not told twice.
        let mut line = first;
        for cause in causes {
            if !line.contains(&cause) {
                line = format!("{line}: {cause}");
            }
        }
        say(&format!("error: {line}"));
    }
    if let Some(hinted) = e.downcast_ref::<Hinted>() {
        say(&format!("  hint: {}", hinted.hint()));
    }
    ExitCode::from(if usage { 2 } else { 1 })
}

/// Whether the reader of our output has gone, as in `demur models | head -1`.
fn is_broken_pipe(e: &anyhow::Error) -> bool {
    e.chain().any(|c| {
        c.downcast_ref::<std::io::Error>()
            .is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
    })
}

/// On Ctrl-C, says how to go on and ends with 130. Nothing needs to be put right first: what is
/// written is whole or not there.
pub fn say_how_to_go_on() {
    // Without the handler Ctrl-C still ends the process, only without a word.
    let _ = ctrlc::set_handler(|| {
        let _ = writeln!(
            std::io::stderr(),
            "\nstopped; run the same command to go on"
        );
        std::process::exit(130);
    });
}
