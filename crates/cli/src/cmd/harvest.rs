//! `demur harvest`: residual-stream activations of texts, to a safetensors file.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use demur_eval::prompts;
use demur_features::harvest::{Products, Sequence, harvest};
use demur_model::hooks::{Role, Site};
use demur_model::tokenizer::Special;
use serde_json::json;

use crate::catalogue::DEFAULT_MODEL;
use crate::loaded::{Loaded, conversation};
use crate::progress::{Progress, say};
use crate::study::config::Precision;
use crate::study::write_atomic;

const EXAMPLES: &str = "\
Examples:
  demur harvest --out a.safetensors                          the requests that demur ships
  demur harvest --prompts my.jsonl --site blocks.6.hook_resid_post

A line of the prompts is {\"id\": \"a\", \"prompt\": \"How do I ...\"}. In Python the file is read with
safetensors.numpy.load_file('a.safetensors')['activations'].";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// JSONL(.gz) of prompts; the ordinary requests that demur ships, if not given.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// A catalogue name or a path.
    #[arg(long, short, default_value = DEFAULT_MODEL)]
    model: String,
    /// The hook site.
    #[arg(long, default_value = "blocks.12.hook_resid_post")]
    site: String,
    /// At most this many prompts.
    #[arg(long, default_value_t = 1000)]
    limit: usize,
    /// Where to write `activations [n, d_model]` and `tokens [n]`; a .json beside it holds the rest.
    #[arg(long, short, default_value = "activations.safetensors")]
    out: PathBuf,
}

pub fn run(args: Args) -> Result<()> {
    let rows = match &args.prompts {
        Some(path) => prompts::read(path)?,
        None => prompts::shipped_benign()?,
    };
    // Now rather than after the work.
    let folder = args.out.parent().filter(|f| !f.as_os_str().is_empty());
    if folder.is_some_and(|f| !f.is_dir()) || args.out.is_dir() {
        bail!(
            "--out {}: it is not a file in a folder that is there",
            args.out.display()
        );
    }
    let loaded = Loaded::open(&args.model, Precision::Fast)?;
    let site: Site = args.site.parse()?;
    let site = site.check(loaded.model.spec().n_layers)?;
    let mut sequences = Vec::new();
    for p in rows.iter().take(args.limit) {
        let (tokens, roles) = match &loaded.chat {
            Ok(chat) => {
                let r = chat.encode(&loaded.tokenizer, &conversation(None, &p.prompt), true)?;
                (r.ids, r.roles)
            }
            Err(_) => {
                let ids = loaded.tokenizer.encode(&p.prompt, Special::AsText)?;
                let n = ids.len();
                (ids, vec![Role::User; n])
            }
        };
        if !tokens.is_empty() {
            sequences.push(Sequence {
                source: p.id.clone(),
                tokens,
                roles,
            });
        }
    }
    if sequences.is_empty() {
        bail!("there is nothing to harvest");
    }
    let total: usize = sequences.iter().map(|s| s.tokens.len()).sum();
    let d = loaded.model.spec().d_model;
    let bar = Progress::new("harvest", "tokens", total as u64);
    let mut data: Vec<u8> = Vec::with_capacity(total * d * 4);
    harvest(
        &loaded.model,
        site,
        &sequences,
        1024,
        Products::Bf16,
        |_, x| {
            data.extend(x.iter().flat_map(|v| v.to_le_bytes()));
            bar.advance((x.len() / d) as u64);
            Ok(())
        },
    )?;
    bar.finish();
    let tokens: Vec<u8> = sequences
        .iter()
        .flat_map(|s| &s.tokens)
        .flat_map(|t| t.to_le_bytes())
        .collect();
    let header = json!({
        "activations": { "dtype": "F32", "shape": [total, d], "data_offsets": [0, data.len()] },
        "tokens": { "dtype": "U32", "shape": [total], "data_offsets": [data.len(), data.len() + tokens.len()] },
    })
    .to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes.extend(tokens);
    write_atomic(&args.out, &bytes)?;
    let lengths: Vec<_> = sequences
        .iter()
        .map(|s| json!([s.source, s.tokens.len()]))
        .collect();
    let manifest = json!({
        "model": args.model, "sha256": loaded.checkpoint.sha256(), "site": site.to_string(),
        "d_model": d, "tokens": total, "sequences": lengths,
    });
    let beside = args.out.with_extension("json");
    write_atomic(&beside, &serde_json::to_vec_pretty(&manifest)?).context("write the manifest")?;
    say(args.out.display())
}
