//! SAEs that are built into the binary.

use anyhow::{Result, bail};
use demur_sae::Sae;
use demur_sae::saelens::{Files, parse};

/// `(name, files)`.
const SHIPPED: [(&str, Files<'static>); 1] = [(
    "qwen2.5-coder-0.5b-l12",
    Files {
        config: include_bytes!("../../saes/qwen2.5-coder-0.5b-l12/cfg.json"),
        weights: include_bytes!("../../saes/qwen2.5-coder-0.5b-l12/sae_weights.safetensors"),
        manifest: Some(include_bytes!(
            "../../saes/qwen2.5-coder-0.5b-l12/manifest.json"
        )),
    },
)];

/// The shipped SAE of this name, the sha256 of its weights, and its manifest.
pub fn load(name: &str) -> Result<(Sae, String, serde_json::Value)> {
    let Some((_, files)) = SHIPPED.iter().find(|s| s.0 == name) else {
        let names: Vec<_> = SHIPPED.iter().map(|s| s.0).collect();
        bail!(
            "no SAE called '{name}' is shipped; shipped are: {}",
            names.join(", ")
        );
    };
    let sae = parse(name, *files)?;
    let manifest: serde_json::Value = serde_json::from_slice(files.manifest.unwrap_or(b"null"))?;
    let sha256 = manifest["sha256"]["sae_weights.safetensors"]
        .as_str()
        .unwrap_or_default();
    Ok((sae, sha256.to_owned(), manifest))
}
