//! Times other engines beside demur, on one machine in one sitting, and prints ratios.
//!
//! Absolute figures drift with the machine and the hour; a ratio of medians over alternating rounds
//! does not. Every engine runs in a process of its own, so that none finds another's threads or
//! caches; the order turns round with every round.
//!
//! | module | job |
//! | --- | --- |
//! | [`llama_cpp`] | llama.cpp through `llama-cpp-2`, as an engine |
//! | [`compare`] | rounds, medians, ratios |
//! | [`parity`] | how far llama.cpp is from the golden continuations |

mod compare;
mod llama_cpp;
mod parity;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// What is fed, the same for every engine (`demur_model::generate::bench`).
mod load {
    /// Tokens of the prompt.
    pub const PROMPT: usize = 512;
    /// Passes that decode.
    pub const STEPS: usize = 32;
    /// Sequences that decode together.
    pub const BATCH: usize = 16;
    /// Tokens of the prompt of each of them.
    pub const BATCH_PROMPT: usize = 64;
}

/// Other engines beside demur.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Prefill and decoding of a language model: demur and llama.cpp.
    Lm {
        /// The GGUF file.
        #[arg(long)]
        model: PathBuf,
        /// The `demur` binary.
        #[arg(long, default_value = "demur")]
        demur: PathBuf,
        /// Rounds; each runs every engine once.
        #[arg(long, default_value_t = 3)]
        rounds: usize,
        /// Threads of each engine; all cores unless given.
        #[arg(long)]
        threads: Option<usize>,
        /// Prints one JSON object instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// How far llama.cpp is from `testdata/parity/NAME.json`, as JSON.
    Parity {
        /// The GGUF file.
        #[arg(long)]
        model: PathBuf,
        /// The golden file.
        #[arg(long)]
        golden: PathBuf,
        /// Threads.
        #[arg(long, default_value_t = 2)]
        threads: usize,
    },
    /// One measurement of llama.cpp in this process, as JSON.
    LlamaCpp {
        /// The GGUF file.
        #[arg(long)]
        model: PathBuf,
        /// Threads.
        #[arg(long)]
        threads: usize,
    },
}

fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::Lm {
            model,
            demur,
            rounds,
            threads,
            json,
        } => {
            let threads = match threads {
                Some(n) => n,
                None => std::thread::available_parallelism()?.get(),
            };
            compare::lm(&compare::Lm {
                model,
                demur,
                rounds,
                threads,
                json,
            })
        }
        Command::Parity {
            model,
            golden,
            threads,
        } => {
            println!("{}", parity::llama_cpp(&model, &golden, threads)?);
            Ok(())
        }
        Command::LlamaCpp { model, threads } => {
            println!("{}", llama_cpp::measure(&model, threads)?);
            Ok(())
        }
    }
}
