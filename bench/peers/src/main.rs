//! Times other engines beside demur, on one machine in one sitting, and prints ratios.
//!
//! Absolute figures drift with the machine and the hour; a ratio of medians over alternating rounds
//! does not. Every engine runs in a process of its own, so that none finds another's threads or
//! caches; the order turns round with every round.
//!
//! | module | job |
//! | --- | --- |
//! | `llama_cpp` | llama.cpp through `llama-cpp-2`, as an engine (feature `llama`) |
//! | `candle` | candle, as an engine (feature `candle`) |
//! | [`sae`] | sparsify's training step, in Python |
//! | [`compare`] | rounds, medians, ratios |
//! | [`parity`] | how far llama.cpp is from the golden continuations |

#[cfg(feature = "candle")]
mod candle;
mod compare;
#[cfg(feature = "llama")]
mod llama_cpp;
#[cfg(feature = "llama")]
mod parity;
mod sae;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// What is fed, the same for every engine (`demur bench lm`).
#[cfg(any(feature = "llama", feature = "candle"))]
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
    /// Prefill, decoding and harvest of a language model: demur and its peers.
    Lm {
        /// The peers: `llama.cpp`, `candle`, `transformers_bf16`, `transformers_f32`.
        #[arg(
            long,
            value_delimiter = ',',
            default_value = "llama.cpp,candle,transformers_bf16,transformers_f32"
        )]
        peers: Vec<compare::Peer>,
        /// A Python with torch, transformers and gguf, for the peers that need it.
        #[arg(long, default_value = "python3")]
        python: PathBuf,
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
    #[cfg(feature = "llama")]
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
    /// The training step of a TopK SAE: demur and sparsify on PyTorch, f32 and bf16 autocast.
    Sae {
        /// `d_model x d_sae : batch`; may be repeated.
        #[arg(long = "shape", default_values = ["896x7168:4096", "3072x24576:1024"])]
        shapes: Vec<sae::Shape>,
        /// Latents active at once.
        #[arg(long, default_value_t = 32)]
        k: usize,
        /// The `demur` binary.
        #[arg(long, default_value = "demur")]
        demur: PathBuf,
        /// A Python with torch and eai-sparsify.
        #[arg(long, default_value = "python3")]
        python: PathBuf,
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
    /// One measurement of candle in this process, as JSON.
    #[cfg(feature = "candle")]
    Candle {
        /// The GGUF file.
        #[arg(long)]
        model: PathBuf,
    },
    /// One measurement of llama.cpp in this process, as JSON.
    #[cfg(feature = "llama")]
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
            peers,
            python,
            model,
            demur,
            rounds,
            threads,
            json,
        } => {
            let threads = threads_or_all(threads)?;
            compare::lm(&compare::Lm {
                peers,
                python,
                model,
                demur,
                rounds,
                threads,
                json,
            })
        }
        #[cfg(feature = "llama")]
        Command::Parity {
            model,
            golden,
            threads,
        } => {
            println!("{}", parity::llama_cpp(&model, &golden, threads)?);
            Ok(())
        }
        Command::Sae {
            shapes,
            k,
            demur,
            python,
            rounds,
            threads,
            json,
        } => sae::sae(&sae::Sae {
            shapes,
            k,
            demur,
            python,
            rounds,
            threads: threads_or_all(threads)?,
            json,
        }),
        #[cfg(feature = "candle")]
        Command::Candle { model } => {
            println!("{}", candle::measure(&model)?);
            Ok(())
        }
        #[cfg(feature = "llama")]
        Command::LlamaCpp { model, threads } => {
            println!("{}", llama_cpp::measure(&model, threads)?);
            Ok(())
        }
    }
}

fn threads_or_all(threads: Option<usize>) -> anyhow::Result<usize> {
    Ok(match threads {
        Some(n) => n,
        None => std::thread::available_parallelism()?.get(),
    })
}
