//! `demur chat`: a conversation in the terminal, steered if asked, beside base if asked.

use std::collections::BTreeMap;
use std::io::{BufRead, IsTerminal, Write};
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use demur_model::chat::Message;
use demur_model::generate::{Engine, EngineConfig, Event, Request};
use demur_model::hooks::Intervention;
use demur_sae::saelens;
use demur_steering::{CompiledPlan, SaeEntry, SaeSet, compile, explain};

use crate::cmd::generate::Common;
use crate::cmd::plan;
use crate::exit::Hinted;
use crate::loaded::Loaded;
use crate::progress::note;
use crate::study::{SAE_NAME, shipped_sae};

const EXAMPLES: &str = "\
Examples:
  demur chat                                       the default model, as it is
  demur chat --plan runs/quickstart/plan.toml      steered by the plan that a study chose
  demur chat --plan runs/quickstart/plan.toml --side-by-side

An empty line or Ctrl-D ends the chat.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// Show base's reply beside the steered one.
    #[arg(long, requires = "plan")]
    side_by_side: bool,
}

/// Compiles the plan against the SAE in `sae`, the one that its study trained, or the one that is
/// shipped.
pub fn steering(
    loaded: &Loaded,
    plan_file: Option<&Path>,
    sae: Option<&Path>,
) -> Result<Option<Arc<CompiledPlan>>> {
    let Some(plan_file) = plan_file else {
        return Ok(None);
    };
    let plan = plan::read(plan_file)?;
    note(explain(&plan));
    let mut saes = SaeSet::new();
    if !plan.saes.is_empty() {
        // A study that trained its SAE keeps it beside the plan.
        let beside = plan_file.parent().map(|p| p.join("train").join("sae"));
        let folder = match sae {
            Some(dir) if dir.join("train").join("sae").is_dir() => {
                Some(dir.join("train").join("sae"))
            }
            Some(dir) => Some(dir.to_owned()),
            None => beside.filter(|p| p.is_dir()),
        };
        let (sae, sha256) = match folder {
            Some(dir) => (saelens::load(&dir)?, saelens::weights_sha256(&dir)?),
            None => shipped_sae()?,
        };
        let entry = SaeEntry {
            sae: Arc::new(sae),
            sha256,
            max_activation: None,
            resid_norm: None,
        };
        let names = plan.saes.keys().cloned().chain([SAE_NAME.to_owned()]);
        saes = names
            .map(|n| (n, entry.clone()))
            .collect::<BTreeMap<_, _>>();
    }
    let spec = loaded.model.spec();
    match compile(&plan, &saes, spec.n_layers, spec.d_model) {
        Ok(compiled) => Ok(Some(Arc::new(compiled))),
        Err(e) => {
            let message = format!("plan {}", plan_file.display());
            let hint = match sae {
                Some(_) => "is this the SAE, and is this the model, that the plan was made for?",
                None => {
                    "--sae DIR names the SAE that the plan was made for, or the folder of its study"
                }
            };
            Err(anyhow::Error::new(e).context(Hinted::new(message, hint)))
        }
    }
}

/// A column of the conversation: its name, what steers it, and what was said in it.
type Column = (&'static str, Option<Arc<dyn Intervention>>, Vec<Message>);

pub fn run(args: Args) -> Result<()> {
    let mut loaded = args.common.open()?;
    args.common.template(&mut loaded)?;
    loaded.chat()?;
    let plan = steering(
        &loaded,
        args.common.plan.as_deref(),
        args.common.sae.as_deref(),
    )?;
    let plan = plan.map(|p| p as Arc<dyn Intervention>);
    let message = |role: &str, content: String| Message {
        role: role.to_owned(),
        content,
    };
    let system: Vec<Message> = args
        .common
        .system
        .iter()
        .map(|s| message("system", s.clone()))
        .collect();
    // One conversation a column: each sees its own replies.
    let mut columns: Vec<Column> = Vec::new();
    if plan.is_none() || args.side_by_side {
        columns.push(("base", None, system.clone()));
    }
    if let Some(plan) = plan {
        columns.push(("steered", Some(plan), system));
    }
    let terminal = std::io::stdin().is_terminal();
    note("Type a message; an empty line or Ctrl-D ends.");
    loop {
        if terminal {
            let mut err = std::io::stderr();
            write!(err, "\n> ")?;
            err.flush()?;
        }
        let mut line = String::new();
        if std::io::stdin().lock().read_line(&mut line)? == 0 || line.trim().is_empty() {
            return Ok(());
        }
        for (name, hook, messages) in &mut columns {
            messages.push(message("user", line.trim().to_owned()));
            let r = loaded.chat()?.encode(&loaded.tokenizer, messages, true)?;
            let request = Request {
                sampling: args.common.sampling(),
                stop: args.common.stop.clone(),
                hook: hook.clone(),
                ..Request::new(r.ids, r.roles, args.common.max_new_tokens)
            };
            let mut out = std::io::stdout().lock();
            if args.side_by_side {
                writeln!(out, "[{name}]")?;
            }
            let mut engine = Engine::new(&loaded.model, &loaded.tokenizer, EngineConfig::default());
            engine.submit(request)?;
            while !engine.is_idle() {
                for event in engine.step()? {
                    match event {
                        Event::Text(_, text) => {
                            write!(out, "{text}")?;
                            out.flush()?;
                        }
                        Event::Done(_, o) => messages.push(message("assistant", o.text)),
                    }
                }
            }
            writeln!(out)?;
        }
    }
}
