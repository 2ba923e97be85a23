//! Refusals that demur wrote, beside the model's own replies to the same prompts: what is different in the residual, and
//! which latents that is made of.
//!
//! A contrast of a text that shows something with one that does not, as in contrastive activation addition
//! (arXiv 2312.06681), over the tokens of the reply.

use anyhow::Result;
use demur_eval::arms::Item;
use demur_features::activations::CodedSequence;
use demur_sae::Sae;

use super::super::StudyContext;
use super::super::corpus::written_refusals;
use super::Codes;

/// Latents that are kept.
const PARTS: usize = 64;

/// The discovery prompts with written refusals for replies.
pub struct Written {
    pub chats: Vec<CodedSequence>,
    /// The residual of each, `[tokens, d_model]`.
    rows: Vec<Vec<f32>>,
    d_model: usize,
}

impl Written {
    pub fn new(c: &StudyContext, sae: &Sae, items: &[Item]) -> Result<Self> {
        let mut codes = Codes::new(c, sae);
        let chats = codes.of(&written_refusals(c, items, 0)?, "written")?;
        Ok(Self {
            chats,
            rows: codes.rows,
            d_model: sae.d_model(),
        })
    }

    /// Latents that add to the difference between written refusals and own replies, over the first `window` tokens: the
    /// one that adds most first, with its mean activation in refusals. A latent adds the difference of its means times its
    /// decoder row, of which what is along the sum of all counts.
    pub fn parts(
        &self,
        sae: &Sae,
        own: &[CodedSequence],
        items: &[Item],
        window: usize,
    ) -> Vec<(u32, f32)> {
        let means = |chats: &[CodedSequence]| {
            let (mut sum, mut n) = (vec![0.0f64; sae.d_sae()], 0usize);
            for (item, chat) in items.iter().zip(chats) {
                let from = item.tokens.len();
                let reply = from..chat.tokens.len().min(from + window);
                n += reply.len();
                let at = reply.start * chat.codes.k..reply.end * chat.codes.k;
                for (j, v) in chat.codes.idx[at.clone()].iter().zip(&chat.codes.val[at]) {
                    sum[*j as usize] += f64::from(*v);
                }
            }
            sum.into_iter()
                .map(|s| s / n.max(1) as f64)
                .collect::<Vec<f64>>()
        };
        let (refusing, own) = (means(&self.chats), means(own));
        let by = |j: usize| refusing[j] - own[j];
        let mut all = vec![0.0f32; sae.d_model()];
        for j in 0..sae.d_sae() {
            for (a, w) in all.iter_mut().zip(sae.decoder_row(j)) {
                *a += by(j) as f32 * w;
            }
        }
        let along = |j: usize| {
            let both = sae.decoder_row(j).iter().zip(&all);
            by(j) * both.map(|(w, a)| f64::from(w * a)).sum::<f64>()
        };
        let mut parts: Vec<(u32, f64)> = (0..sae.d_sae())
            .filter(|&j| by(j) > 0.0)
            .map(|j| (j as u32, along(j)))
            .filter(|(_, along)| *along > 0.0)
            .collect();
        parts.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        parts.truncate(PARTS);
        parts
            .into_iter()
            .map(|(j, _)| (j, refusing[j as usize] as f32))
            .collect()
    }

    /// Mean residual over the first `window` tokens of the written refusals, less that of the model's own replies.
    pub fn direction(&self, own: &[Vec<f32>], items: &[Item], window: usize) -> Vec<f32> {
        let d = self.d_model;
        let mut sum = vec![0.0; d];
        for (item, (written, own)) in items.iter().zip(self.rows.iter().zip(own)) {
            for (rows, sign) in [(written, 1.0), (own, -1.0)] {
                let reply = rows.chunks_exact(d).skip(item.tokens.len()).take(window);
                let n = reply.len().max(1) as f32;
                for row in reply {
                    sum.iter_mut()
                        .zip(row)
                        .for_each(|(s, v)| *s += sign * v / n);
                }
            }
        }
        let n = items.len().max(1) as f32;
        sum.into_iter().map(|s| s / n).collect()
    }
}

#[cfg(test)]
mod tests {
    use demur_model::hooks::Role;
    use demur_sae::{Codes, SaeConfig};

    use super::*;

    fn chat(codes: &[(u32, f32)]) -> CodedSequence {
        CodedSequence {
            source: String::new(),
            tokens: vec![0; codes.len()],
            roles: vec![Role::Assistant; codes.len()],
            codes: Codes {
                n: codes.len(),
                k: 1,
                idx: codes.iter().map(|c| c.0).collect(),
                val: codes.iter().map(|c| c.1).collect(),
            },
        }
    }

    /// By hand. Decoder rows (1, 0), (0, 1) and (-1, 0). Behind a prompt of one token the refusal has latent 0 at 2 and at 4, the
    /// model's own reply latents 1 and 2 at 2 each: means 3, 0, 0 and 0, 1, 1. The difference is (3, -1, -1), in the
    /// residual (4, -1); of the latents only 0 rises, and it is along the sum. The token after the window does not count.
    #[test]
    fn what_refusals_are_made_of() {
        let sae = Sae::new(
            SaeConfig {
                d_model: 2,
                d_sae: 3,
                k: 1,
                hook_name: "blocks.0.hook_resid_post".to_owned(),
                model_name: String::new(),
            },
            vec![0.0; 6],
            vec![0.0; 3],
            vec![1.0, 0.0, 0.0, 1.0, -1.0, 0.0],
            vec![0.0; 2],
        )
        .unwrap();
        let items = [Item {
            id: "a".to_owned(),
            tokens: vec![0],
            roles: vec![Role::User],
        }];
        let written = Written {
            chats: vec![chat(&[(1, 9.0), (0, 2.0), (0, 4.0), (1, 50.0)])],
            rows: vec![vec![9.0, 9.0, 2.0, 0.0, 4.0, 2.0, 7.0, 7.0]],
            d_model: 2,
        };
        let own = [chat(&[(1, 9.0), (1, 2.0), (2, 2.0)])];
        assert_eq!(written.parts(&sae, &own, &items, 2), [(0, 3.0)]);
        let own = [vec![9.0, 9.0, 1.0, 1.0, 1.0, 3.0]];
        assert_eq!(written.direction(&own, &items, 2), [2.0, -1.0]);
    }
}
