//! `demur generate`: one prompt, one reply.

use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use demur_model::chat::{ChatTemplate, Fallback};
use demur_model::generate::{Engine, EngineConfig, Event, Request, Sampling};
use demur_model::hooks::{Intervention, Role};
use demur_model::tokenizer::Special;
use serde_json::json;

use crate::catalogue::DEFAULT_MODEL;
use crate::cmd::chat::steering;
use crate::loaded::{Loaded, conversation};
use crate::study::config::{CacheFormat, Precision};

const EXAMPLES: &str = "\
Examples:
  demur generate 'How do I sharpen a knife?'
  echo 'How do I sharpen a knife?' | demur generate --max-new-tokens 64
  demur generate --plan runs/quickstart/plan.toml --json 'How do I pick a lock?'
  demur generate --model model.gguf --raw 'Once upon a time'";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The prompt; from standard input, if not given.
    prompt: Option<String>,
    #[command(flatten)]
    common: Common,
    /// Give the prompt as it is, without the chat template.
    #[arg(long)]
    raw: bool,
    /// Print one JSON object: text, finish, tokens, and what the plan did.
    #[arg(long)]
    json: bool,
}

/// A template for models that have none.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum Template {
    /// `<|im_start|>role`, the message, `<|im_end|>`.
    Chatml,
    /// `role: message`, for base models.
    Plain,
}

/// What `chat` and `generate` share.
#[derive(Debug, clap::Args)]
pub struct Common {
    /// A catalogue name or a path.
    #[arg(long, short, default_value = DEFAULT_MODEL)]
    pub model: String,
    /// How products are computed.
    #[arg(long, value_enum, default_value_t)]
    pub precision: Precision,
    /// What keys and values are kept as.
    #[arg(long, value_enum, default_value_t)]
    pub kv_cache: CacheFormat,
    /// A steering plan, TOML or JSON; `default` is the shipped one.
    #[arg(long, value_name = "FILE")]
    pub plan: Option<PathBuf>,
    /// Folder of the SAE that the plan names; a study's folder works too.
    #[arg(long, value_name = "DIR")]
    pub sae: Option<PathBuf>,
    /// A system prompt.
    #[arg(long)]
    pub system: Option<String>,
    /// Use this template if the model has none.
    #[arg(long, value_enum, value_name = "NAME")]
    pub chat_template: Option<Template>,
    /// At most this many new tokens.
    #[arg(long, default_value_t = 256)]
    pub max_new_tokens: usize,
    /// Sampling temperature; 0 is greedy: always the likeliest token.
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// Sample from this many likeliest tokens; 0 takes all.
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Sample from the likeliest tokens that together have this probability.
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f32,
    /// Leave out tokens less likely than this fraction of the likeliest.
    #[arg(long, default_value_t = 0.0)]
    pub min_p: f32,
    /// Divides the positive logits of tokens that are there already, multiplies negative ones; 1 is off.
    #[arg(long, default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// Seed of the sampling.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// End the reply at this text; may be repeated.
    #[arg(long)]
    pub stop: Vec<String>,
}

impl Common {
    /// The model that they name, as they ask for it.
    pub fn open(&self) -> Result<Loaded> {
        Ok(Loaded::open(&self.model, self.precision)?.keeping(self.kv_cache))
    }

    pub fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
        }
    }

    /// The template to use: the model's own, or the one asked for.
    pub fn template(&self, loaded: &mut Loaded) -> Result<()> {
        if loaded.chat.is_err()
            && let Some(template) = self.chat_template
        {
            let which = match template {
                Template::Chatml => Fallback::ChatMl,
                Template::Plain => Fallback::Plain,
            };
            loaded.chat = Ok(ChatTemplate::fallback(which)?);
        }
        Ok(())
    }
}

pub fn run(args: Args) -> Result<()> {
    let prompt = match args.prompt {
        Some(p) => p,
        None => {
            if std::io::stdin().is_terminal() {
                anyhow::bail!("give a prompt, or pipe one in");
            }
            let mut text = String::new();
            std::io::stdin()
                .read_to_string(&mut text)
                .context("read standard input")?;
            text
        }
    };
    if prompt.trim().is_empty() {
        anyhow::bail!("the prompt is empty");
    }
    let mut loaded = args.common.open()?;
    args.common.template(&mut loaded)?;
    let (tokens, roles) = if args.raw {
        let t = &loaded.tokenizer;
        let mut ids: Vec<u32> = t.bos().filter(|_| t.add_bos()).into_iter().collect();
        ids.extend(t.encode(&prompt, Special::AsText)?);
        let roles = vec![Role::User; ids.len()];
        (ids, roles)
    } else {
        let messages = conversation(args.common.system.as_deref(), &prompt);
        let r = loaded.chat()?.encode(&loaded.tokenizer, &messages, true)?;
        (r.ids, r.roles)
    };
    let hook = steering(
        &loaded,
        args.common.plan.as_deref(),
        args.common.sae.as_deref(),
    )?;
    let request = Request {
        sampling: args.common.sampling(),
        stop: args.common.stop.clone(),
        hook: hook.map(|h| h as Arc<dyn Intervention>),
        ..Request::new(tokens, roles, args.common.max_new_tokens)
    };
    let mut engine = Engine::new(&loaded.model, &loaded.tokenizer, EngineConfig::default());
    engine.submit(request)?;
    let mut out = std::io::stdout().lock();
    while !engine.is_idle() {
        for event in engine.step()? {
            match event {
                Event::Text(_, text) if !args.json => {
                    write!(out, "{text}")?;
                    out.flush()?;
                }
                Event::Text(..) => {}
                Event::Done(_, o) if args.json => {
                    let finish = format!("{:?}", o.finish).to_lowercase();
                    let object = json!({
                        "text": o.text, "finish": finish, "tokens": o.tokens, "audit": o.audit,
                    });
                    writeln!(out, "{object}")?;
                }
                Event::Done(..) => writeln!(out)?,
            }
        }
    }
    Ok(())
}
