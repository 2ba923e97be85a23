//! The SAEs and the plan that are built into the binary.

use anyhow::{Context, Result, bail};
use demur_sae::Sae;
use demur_sae::saelens::{Files, parse};
use demur_steering::SteeringPlan;

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

/// What `default` means where a plan is asked for.
const DEFAULT_PLAN: &str = include_str!("../../plans/default.toml");

/// The plan that is shipped for the default model and its SAE.
pub fn plan() -> Result<SteeringPlan> {
    SteeringPlan::from_toml(DEFAULT_PLAN).context("the shipped plan")
}

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::study::REFUSES_NAME;
    use demur_steering::Condition;

    #[test]
    fn the_default_plan_is_for_the_shipped_sae() {
        let plan = plan().unwrap();
        let (sae, sha256, _) = load("qwen2.5-coder-0.5b-l12").unwrap();
        assert_eq!(plan.saes["main"], sha256);
        let gate = &plan.gates["unsafe"];
        assert!(
            gate.heads
                .iter()
                .flat_map(|h| h.query.iter().chain(&h.value))
                .all(|p| p.direction.len() == sae.d_model())
        );
        // Where the gate is open and where it is clear the same latent is pushed opposite ways.
        let [on, off] = &plan.interventions[..] else {
            panic!("{:?}", plan.interventions.len());
        };
        let name = || "unsafe".to_owned();
        assert_eq!(on.when, Some(Condition::Gate(name())));
        // It is damped only where base would refuse.
        let clear = Condition::Clear { clear: name() };
        let refuses = Condition::Gate(REFUSES_NAME.to_owned());
        let all = vec![clear, refuses];
        assert_eq!(off.when, Some(Condition::All { all }));
        let [probe] = &plan.gates[REFUSES_NAME].probes[..] else {
            panic!("{:?}", plan.gates[REFUSES_NAME].probes.len());
        };
        assert_eq!(probe.direction.len(), sae.d_model());
        assert!(gate.clear.is_some_and(|clear| clear <= gate.threshold));
        assert_eq!(on.edits[0].latent, off.edits[0].latent);
        assert!(on.edits[0].value > 0.0 && off.edits[0].value < 0.0);
    }
}
