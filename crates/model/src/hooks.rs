//! Hook sites on the residual stream, and the interventions that read and edit there.
//!
//! A site is a layer and a point in it. `blocks.6.hook_resid_post` is the stream after block 6;
//! `layers.6` and `model.layers.6` are other names of it. The stream before block 7 is the stream
//! after block 6, so `blocks.7.hook_resid_pre` is the same site; [`Site::canonical`] says which.
//!
//! The model knows no SAE: an [`Intervention`] is data that another crate compiled, and its
//! [`InterventionState`] is what it remembers of one sequence. Sequences without one pay nothing,
//! and run bit for bit the unhooked model.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::ModelError;

/// A point within a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Point {
    /// Before the block.
    Pre,
    /// Between attention and MLP.
    Mid,
    /// After the block.
    Post,
}

/// A place on the residual stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Site {
    /// Index of the block.
    pub layer: usize,
    /// Where in the block.
    pub point: Point,
}

impl Site {
    /// The stream after block `layer`.
    pub fn post(layer: usize) -> Self {
        Self {
            layer,
            point: Point::Post,
        }
    }

    /// One name for each place: `resid_pre` of block `i + 1` is `resid_post` of block `i`.
    pub fn canonical(self) -> Self {
        match self {
            Self {
                layer,
                point: Point::Pre,
            } if layer > 0 => Self::post(layer - 1),
            site => site,
        }
    }

    /// Checks the layer against the model.
    ///
    /// # Errors
    /// [`ModelError::SiteLayer`].
    pub fn check(self, n_layers: usize) -> Result<Self, ModelError> {
        if self.layer < n_layers {
            return Ok(self.canonical());
        }
        Err(ModelError::SiteLayer {
            site: self.to_string(),
            last: n_layers.saturating_sub(1),
        })
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let point = match self.point {
            Point::Pre => "pre",
            Point::Mid => "mid",
            Point::Post => "post",
        };
        write!(f, "blocks.{}.hook_resid_{point}", self.layer)
    }
}

impl FromStr for Site {
    type Err = ModelError;

    fn from_str(name: &str) -> Result<Self, ModelError> {
        let error = || ModelError::Site {
            name: name.to_owned(),
        };
        let number = |s: &str| {
            let plain = !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
            plain
                .then(|| s.parse::<usize>().ok())
                .flatten()
                .ok_or_else(error)
        };
        if let Some(layer) = name
            .strip_prefix("model.layers.")
            .or_else(|| name.strip_prefix("layers."))
        {
            return Ok(Self::post(number(layer)?));
        }
        let (layer, point) = name
            .strip_prefix("blocks.")
            .and_then(|rest| rest.split_once('.'))
            .ok_or_else(error)?;
        let point = match point {
            "hook_resid_pre" => Point::Pre,
            "hook_resid_mid" => Point::Mid,
            "hook_resid_post" => Point::Post,
            _ => return Err(error()),
        };
        Ok(Self {
            layer: number(layer)?,
            point,
        })
    }
}

/// Who wrote a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The chat template, BOS included.
    Template,
    /// The system prompt.
    System,
    /// The user.
    User,
    /// The model.
    Assistant,
}

/// The new rows of one sequence that an intervention sees.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// Position of the first row in the sequence.
    pub start_pos: usize,
    /// The rows' tokens.
    pub tokens: &'a [u32],
    /// The rows' roles, as many as tokens.
    pub roles: &'a [Role],
    /// Whether the model wrote these tokens.
    pub generated: bool,
}

/// What is done to the residual stream: immutable, shared by the sequences that use it.
pub trait Intervention: fmt::Debug + Send + Sync {
    /// The sites that it reads or edits, canonical.
    fn sites(&self) -> &[Site];
    /// Identity, for caches of keys and values: an edited residual reaches later layers' caches.
    fn fingerprint(&self) -> [u8; 32];
    /// Whether it does nothing.
    fn is_empty(&self) -> bool;
    /// Whether what it does to a row depends on that row alone, so that a sequence may come in any
    /// pieces. Not so where a gate reads the prompt before it decides about its first token.
    fn row_wise(&self) -> bool {
        false
    }
    /// The state of a new sequence.
    fn start(&self) -> Box<dyn InterventionState>;
}

/// What an intervention remembers of one sequence.
pub trait InterventionState: Send {
    /// Edits the new rows of the sequence at `site`. A prompt comes whole, in one call a site.
    ///
    /// # Shapes
    /// `resid` is `[rows.tokens.len(), d_model]`.
    fn edit(&mut self, site: Site, rows: &Rows<'_>, resid: &mut [f32]);
    /// What it did, for records.
    fn audit(&self) -> Option<serde_json::Value> {
        None
    }
    /// A copy, for a sequence that goes on from the same prefix.
    fn fork(&self) -> Box<dyn InterventionState>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_aliases() {
        for (name, expected) in [
            ("blocks.6.hook_resid_post", "blocks.6.hook_resid_post"),
            ("layers.6", "blocks.6.hook_resid_post"),
            ("model.layers.6", "blocks.6.hook_resid_post"),
            ("blocks.7.hook_resid_pre", "blocks.6.hook_resid_post"),
            ("blocks.0.hook_resid_pre", "blocks.0.hook_resid_pre"),
            ("blocks.3.hook_resid_mid", "blocks.3.hook_resid_mid"),
        ] {
            assert_eq!(
                name.parse::<Site>().unwrap().canonical().to_string(),
                expected
            );
        }
        for wrong in [
            "layers.",
            "layers.-1",
            "blocks.6",
            "blocks.6.hook_resid",
            "layer.6",
            "",
            "layers.+1",
        ] {
            assert!(wrong.parse::<Site>().is_err(), "{wrong}");
        }
        assert!(Site::post(4).check(4).is_err());
    }
}
