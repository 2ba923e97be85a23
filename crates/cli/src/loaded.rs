//! A model made ready: checkpoint, weights, tokenizer and chat template, from a name or a path.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use demur_kernels::cache::CacheFormat;
use demur_kernels::linear::Precision;
use demur_model::chat::{ChatTemplate, Message};
use demur_model::checkpoint::Checkpoint;
use demur_model::decoder::Model;
use demur_model::tokenizer::Tokenizer;

use crate::fetch::{self, Source};
use crate::progress::note;
use crate::study::config;

/// Everything that a command needs of a model.
pub struct Loaded {
    pub path: PathBuf,
    pub checkpoint: Arc<Checkpoint>,
    pub model: Model,
    pub tokenizer: Tokenizer,
    /// The checkpoint's own chat template, if it has one.
    pub chat: Result<ChatTemplate>,
}

impl Loaded {
    /// Fetches (if need be) and loads the model called `name`.
    pub fn open(name: &str, precision: config::Precision) -> Result<Self> {
        let path = fetch::model_path(name, Source::Any)?;
        let started = Instant::now();
        let checkpoint =
            Checkpoint::open(&path).with_context(|| format!("open {}", path.display()))?;
        let checkpoint = Arc::new(checkpoint);
        let tokenizer = Tokenizer::from_checkpoint(&checkpoint)
            .with_context(|| format!("read the tokenizer of {}", path.display()))?;
        let chat = ChatTemplate::from_checkpoint(&checkpoint).map_err(anyhow::Error::from);
        let precision = match precision {
            config::Precision::Fast => Precision::Fast,
            config::Precision::F32 => Precision::F32,
        };
        let model = Model::load(&checkpoint, precision)
            .with_context(|| format!("load {}", path.display()))?;
        note(format_args!(
            "{:<12} {} in {:.1} s",
            "load",
            path.file_name().unwrap_or_default().to_string_lossy(),
            started.elapsed().as_secs_f64()
        ));
        Ok(Self {
            path,
            checkpoint,
            model,
            tokenizer,
            chat,
        })
    }

    /// The same, with keys and values kept as `kv_cache`.
    pub fn keeping(mut self, kv_cache: config::CacheFormat) -> Self {
        self.model.set_cache_format(match kv_cache {
            config::CacheFormat::F32 => CacheFormat::F32,
            config::CacheFormat::Bf16 => CacheFormat::Bf16,
            config::CacheFormat::Int8 => CacheFormat::Int8,
        });
        self
    }

    /// The chat template, or why there is none.
    pub fn chat(&self) -> Result<&ChatTemplate> {
        match &self.chat {
            Ok(chat) => Ok(chat),
            Err(e) => Err(anyhow::anyhow!("{e:#}")),
        }
    }
}

/// A user's message, after a system prompt if there is one.
pub fn conversation(system: Option<&str>, user: &str) -> Vec<Message> {
    let message = |role: &str, content: &str| Message {
        role: role.to_owned(),
        content: content.to_owned(),
    };
    system
        .map(|s| message("system", s))
        .into_iter()
        .chain(std::iter::once(message("user", user)))
        .collect()
}

/// Sets the number of worker threads, once, before any work.
pub fn set_threads(threads: Option<usize>) -> Result<()> {
    demur_kernels::set_threads(threads.unwrap_or(0)).context("set the number of threads")
}
