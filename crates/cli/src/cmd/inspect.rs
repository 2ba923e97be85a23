//! `demur inspect`: a checkpoint's architecture, tensors and memory.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;

use anyhow::Result;
use demur_kernels::linear::Precision;
use demur_model::checkpoint::Checkpoint;
use demur_model::decoder::Model;
use serde_json::json;

use crate::catalogue::DEFAULT_MODEL;
use crate::fetch::{self, Source};
use crate::resident;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// A catalogue name or a path.
    #[arg(default_value = DEFAULT_MODEL)]
    model: String,
    /// List every tensor.
    #[arg(long)]
    tensors: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let path = fetch::model_path(&args.model, Source::Any)?;
    let checkpoint = Arc::new(Checkpoint::open(&path)?);
    let model = Model::load(&checkpoint, Precision::Fast)?;
    let (spec, memory) = (model.spec(), model.memory());
    let peak = resident::peak();
    let mut types: BTreeMap<&str, usize> = BTreeMap::new();
    for t in checkpoint.tensors() {
        *types.entry(t.ty.name()).or_default() += 1;
    }
    let mut out = std::io::stdout().lock();
    if args.json {
        let object = json!({
            "path": path, "architecture": spec.architecture, "n_layers": spec.n_layers,
            "d_model": spec.d_model, "n_heads": spec.n_heads, "n_kv_heads": spec.n_kv_heads,
            "d_head": spec.d_head, "d_mlp": spec.d_mlp, "d_vocab": spec.d_vocab,
            "context": spec.context, "tensor_types": types,
            "memory": {
                "checkpoint_bytes": memory.checkpoint, "weights_bytes": memory.weights,
                "cache_bytes_per_token": memory.cache_per_token,
                "workspace_bytes_per_token": memory.workspace_per_token,
                "peak_resident_bytes": peak,
            },
        });
        writeln!(out, "{object}")?;
        return Ok(());
    }
    let mb = |bytes: f64| format!("{:.1} MB", bytes / 1e6);
    writeln!(out, "{}", path.display())?;
    writeln!(
        out,
        "{}: {} layers, d_model {}, {} heads ({} key-value) of {}, d_mlp {}, vocabulary {}, context {}",
        spec.architecture,
        spec.n_layers,
        spec.d_model,
        spec.n_heads,
        spec.n_kv_heads,
        spec.d_head,
        spec.d_mlp,
        spec.d_vocab,
        spec.context
    )?;
    let types: Vec<String> = types.iter().map(|(t, n)| format!("{n} {t}")).collect();
    writeln!(out, "tensors            {}", types.join(", "))?;
    writeln!(out, "checkpoint         {}", mb(memory.checkpoint as f64))?;
    writeln!(
        out,
        "packed weights     {} ({:.2} of the checkpoint)",
        mb(memory.weights as f64),
        memory.weights as f64 / memory.checkpoint.max(1) as f64
    )?;
    writeln!(
        out,
        "cache per token    {:.1} kB a sequence",
        memory.cache_per_token as f64 / 1e3
    )?;
    writeln!(
        out,
        "activations        {:.1} kB a token of a pass",
        memory.workspace_per_token as f64 / 1e3
    )?;
    if let Some(peak) = peak {
        writeln!(
            out,
            "peak resident      {} ({:.2} of the checkpoint), mapped pages included",
            mb(peak as f64),
            peak as f64 / memory.checkpoint.max(1) as f64
        )?;
    }
    if args.tensors {
        for t in checkpoint.tensors() {
            writeln!(out, "  {:<44} {:<5} {:?}", t.name, t.ty.name(), t.shape)?;
        }
    }
    Ok(())
}
