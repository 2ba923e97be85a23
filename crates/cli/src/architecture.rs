//! The architecture of an SAE to train, as a command or a study says it.

use anyhow::{Result, bail};
use demur_sae::train::{Architecture, matryoshka};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Weight of the auxiliary loss where there is one.
const AUXK_ALPHA: f64 = 1.0 / 32.0;

/// An architecture's name.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum ArchitectureName {
    /// The k largest activations of each row.
    #[default]
    #[value(name = "topk")]
    TopK,
    /// The largest activations of a batch, k a row on average; one threshold at inference.
    #[value(name = "batchtopk")]
    BatchTopK,
    /// BatchTopK over nested dictionaries, each of which reconstructs alone.
    Matryoshka,
    /// ReLU with an L1 penalty; k is not used.
    Relu,
    /// A threshold for each latent; aims at k active ones.
    #[value(name = "jumprelu")]
    JumpRelu,
    /// A gate and a magnitude for each latent, with an L1 penalty; k is not used.
    Gated,
}

/// An architecture with the settings that only some have; what is not given takes its default.
#[derive(Debug, Clone, Default, PartialEq, clap::Args, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ArchitectureConfig {
    /// What makes latents active.
    #[arg(long = "architecture", value_enum, default_value_t = ArchitectureName::TopK)]
    pub name: ArchitectureName,
    /// Of topk: the 4k largest reconstruct as well, with a weight of 1/8.
    #[arg(long)]
    pub multi_topk: bool,
    /// Of relu and gated: weight of the L1 penalty, on rows of mean norm sqrt(d_model); 5, if not given.
    #[arg(long)]
    pub l1: Option<f64>,
    /// Of jumprelu: the L0 itself is penalised with this weight, beside the FVU; if not given, the L0 is
    /// drawn to k.
    #[arg(long)]
    pub l0: Option<f64>,
    /// Of jumprelu: width of the straight-through estimators, as a fraction of the rows' mean norm; 0.001,
    /// if not given.
    #[arg(long)]
    pub bandwidth: Option<f64>,
    /// Of relu, jumprelu and gated: fraction of the steps over which the penalty rises; 0.1, if not given.
    #[arg(long)]
    pub penalty_warmup: Option<f64>,
    /// Of matryoshka: latents of each group, which sum to the number of latents; 1/32, 1/16, 1/8, 1/4 and
    /// the rest, if not given.
    #[arg(long, value_delimiter = ',')]
    pub group_sizes: Vec<usize>,
}

impl ArchitectureConfig {
    /// Whether everything is at its default.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// The architecture of an SAE of `d_sae` latents, `k` of them active.
    ///
    /// # Errors
    /// A setting of another architecture.
    pub fn resolve(&self, k: usize, d_sae: usize) -> Result<Architecture> {
        let (l1, jump) = (
            matches!(self.name, ArchitectureName::Relu | ArchitectureName::Gated),
            self.name == ArchitectureName::JumpRelu,
        );
        for (key, given, fits) in [
            (
                "multi_topk",
                self.multi_topk,
                self.name == ArchitectureName::TopK,
            ),
            ("l1", self.l1.is_some(), l1),
            ("l0", self.l0.is_some(), jump),
            ("bandwidth", self.bandwidth.is_some(), jump),
            ("penalty_warmup", self.penalty_warmup.is_some(), l1 || jump),
            (
                "group_sizes",
                !self.group_sizes.is_empty(),
                self.name == ArchitectureName::Matryoshka,
            ),
        ] {
            if given && !fits {
                bail!("{key}: {:?} has no such setting; leave it out", self.name);
            }
        }
        let (l1, warmup) = (self.l1.unwrap_or(5.0), self.penalty_warmup.unwrap_or(0.1));
        Ok(match self.name {
            ArchitectureName::TopK => Architecture::TopK {
                multi: self.multi_topk,
            },
            ArchitectureName::BatchTopK => Architecture::BatchTopK,
            ArchitectureName::Matryoshka => Architecture::Matryoshka {
                group_sizes: match &self.group_sizes[..] {
                    [] => matryoshka::default_groups(d_sae),
                    given => given.to_vec(),
                },
            },
            ArchitectureName::Relu => Architecture::Relu { l1, warmup },
            ArchitectureName::Gated => Architecture::Gated { l1, warmup },
            ArchitectureName::JumpRelu => Architecture::JumpRelu {
                l0: self.l0.unwrap_or(1.0),
                target: self.l0.is_none().then_some(k as f64),
                bandwidth: self.bandwidth.unwrap_or(0.001),
                warmup,
            },
        })
    }
}

/// The weight of the auxiliary loss, if `given` none.
pub fn auxk_alpha(given: Option<f64>, architecture: &Architecture) -> f64 {
    given.unwrap_or(match architecture.selects() {
        true => AUXK_ALPHA,
        false => 0.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_of_another_architecture_is_named() {
        let of = |name, l1, l0| ArchitectureConfig {
            name,
            l1,
            l0,
            ..ArchitectureConfig::default()
        };
        let e = of(ArchitectureName::TopK, Some(1.0), None)
            .resolve(3, 64)
            .unwrap_err();
        assert!(e.to_string().starts_with("l1: TopK"), "{e}");
        let jump = of(ArchitectureName::JumpRelu, None, None)
            .resolve(3, 64)
            .unwrap();
        assert!(matches!(
            jump,
            Architecture::JumpRelu {
                target: Some(3.0),
                ..
            }
        ));
        let jump = of(ArchitectureName::JumpRelu, None, Some(0.01))
            .resolve(3, 64)
            .unwrap();
        assert!(matches!(
            jump,
            Architecture::JumpRelu {
                l0: 0.01,
                target: None,
                ..
            }
        ));
        let nested = of(ArchitectureName::Matryoshka, None, None)
            .resolve(3, 64)
            .unwrap();
        let group_sizes = vec![2, 4, 8, 16, 34];
        assert_eq!(nested, Architecture::Matryoshka { group_sizes });
        assert_eq!(auxk_alpha(None, &jump), 0.0);
    }
}
