//! A compiled plan at work on one sequence: gates are read, conditions looked up, rows edited.
//!
//! At a site all its gates are read first, on rows that no intervention of that site has touched;
//! then the interventions whose condition holds edit, in the plan's order, each seeing what the one
//! before left. One SAE encode of the rows serves all of them until a row changes.

use std::sync::Arc;

use demur_kernels::ops::dot;
use demur_model::hooks::{InterventionState, Role, Rows, Site};
use demur_sae::{Codes, Sae};
use serde_json::{Value, json};

use crate::compile::{Compiled, CompiledGate, Parts};
use crate::gate::{Aggregate, Condition, GateState, Scope, Zone};
use crate::plan::{DirectionOp, ErrorTerm, Membership, Op};

/// What a plan remembers of one sequence: each gate's state, and the audit.
#[derive(Clone)]
pub(crate) struct PlanState {
    parts: Arc<Parts>,
    gates: Vec<GateState>,
    memory: Vec<Memory>,
}

#[derive(Clone, Default)]
struct Memory {
    /// Position of the reply's first token, once it is known.
    reply_from: Option<usize>,
    rows_edited: u64,
    edit_norm: f64,   // sum over edited rows of |x' - x| / |x|
    before: Vec<f64>, // sum over edited rows of each edited latent's activation
    after: Vec<f64>,  // and of what the edit made of it
}

/// Codes of the rows at a site, by SAE, as long as no row has changed.
#[derive(Default)]
struct Encoded(Vec<(Arc<Sae>, Codes)>);

impl Encoded {
    fn has(&self, sae: &Arc<Sae>) -> bool {
        self.0.iter().any(|(s, _)| Arc::ptr_eq(s, sae))
    }

    fn of(&mut self, sae: &Arc<Sae>, resid: &[f32], n: usize) -> &Codes {
        let at = self.0.iter().position(|(s, _)| Arc::ptr_eq(s, sae));
        let at = at.unwrap_or_else(|| {
            self.0.push((Arc::clone(sae), sae.encode(resid, n)));
            self.0.len() - 1
        });
        &self.0[at].1
    }
}

impl PlanState {
    pub(crate) fn new(parts: Arc<Parts>) -> Self {
        Self {
            gates: vec![GateState::default(); parts.gates.len()],
            memory: vec![Memory::default(); parts.interventions.len()],
            parts,
        }
    }

    /// Whether an intervention under this condition is on.
    fn is_on(&self, when: Option<&Condition>) -> bool {
        let zone = |name: &str| {
            let mut both = self.parts.gates.iter().zip(&self.gates);
            let named = both.find(|(g, _)| g.name == name);
            named.map_or(Zone::default(), |(_, s)| s.zone())
        };
        when.is_none_or(|when| when.holds(&zone))
    }
}

impl InterventionState for PlanState {
    fn edit(&mut self, site: Site, rows: &Rows<'_>, resid: &mut [f32]) {
        if rows.tokens.is_empty() {
            return;
        }
        let site = site.canonical();
        let parts = Arc::clone(&self.parts);
        let mut encoded = Encoded::default();
        for (gate, state) in parts.gates.iter().zip(&mut self.gates) {
            gate.probe(state, site, rows, resid);
            if gate.site == site {
                gate.read(state, rows, resid, &mut encoded);
            }
        }
        for (i, c) in parts.interventions.iter().enumerate() {
            if c.site == site {
                let on = self.is_on(c.when.as_ref());
                c.apply(on, &mut self.memory[i], rows, resid, &mut encoded);
            }
        }
    }

    fn audit(&self) -> Option<Value> {
        let gates: Vec<Value> = self
            .parts
            .gates
            .iter()
            .zip(&self.gates)
            .map(|(g, s)| {
                json!({
                    "gate": g.name,
                    "site": g.site.to_string(),
                    "score": s.score(&g.gate),
                    "threshold": g.gate.threshold,
                    "open": s.open,
                    "clear": s.zone() == Zone::Clear,
                    "fired": s.ever_open,
                    "changes": s.changes.iter().map(|(pos, open)| json!({"pos": pos, "open": open})).collect::<Vec<_>>(),
                })
            })
            .collect();
        let per: Vec<Value> = self
            .parts
            .interventions
            .iter()
            .zip(&self.memory)
            .map(|(c, m)| {
                let n = m.rows_edited.max(1) as f64;
                let latents: Vec<Value> = c
                    .edits
                    .iter()
                    .zip(m.before.iter().zip(&m.after))
                    .map(|((e, value), (before, after))| {
                        json!({
                            "latent": e.latent, "op": e.op, "value": value,
                            "mean_before": before / n, "mean_after": after / n,
                        })
                    })
                    .collect();
                json!({
                    "site": c.site.to_string(),
                    "on": self.is_on(c.when.as_ref()),
                    "tokens_edited": m.rows_edited,
                    "mean_edit_norm": m.edit_norm / n,
                    "latents": latents,
                })
            })
            .collect();
        Some(json!({ "gates": gates, "interventions": per }))
    }

    fn fork(&self) -> Box<dyn InterventionState> {
        Box::new(self.clone())
    }
}

impl CompiledGate {
    /// Notes what the gate's probes and heads at `site` make of each row.
    fn probe(&self, state: &mut GateState, site: Site, rows: &Rows<'_>, resid: &[f32]) {
        if rows.generated && !self.gate.during_generation {
            return;
        }
        for p in self.probes.iter().filter(|p| p.site == site) {
            let d = p.direction.len();
            state.pending.resize(resid.len() / d * self.columns, 0.0);
            let of_row = state.pending.chunks_exact_mut(self.columns);
            let rows_read = of_row.zip(resid.chunks_exact(d)).zip(rows.roles);
            for ((sums, x), role) in rows_read {
                if rows.generated || self.gate.reads(*role) {
                    sums[p.at] += dot(x, &p.direction);
                }
            }
        }
    }

    /// Reads the new rows of one sequence and decides.
    fn read(&self, state: &mut GateState, rows: &Rows<'_>, resid: &[f32], encoded: &mut Encoded) {
        let (n, gate) = (rows.tokens.len(), &self.gate);
        let d = resid.len() / n;
        if rows.generated && !gate.during_generation {
            state.after_reply = true;
            return;
        }
        let probed = std::mem::take(&mut state.pending);
        let exact = self
            .sae
            .as_ref()
            .filter(|_| gate.membership == Membership::Exact);
        let codes = exact.map(|sae| encoded.of(sae, resid, n));
        let mut latents = vec![0.0f32; gate.weights.len()];
        let last = rows.start_pos + n - 1;
        for t in 0..n {
            match rows.roles[t] {
                Role::Assistant => state.after_reply = true,
                Role::User if state.after_reply => {
                    state.after_reply = false;
                    if gate.scope == Scope::Turn {
                        state.decide(gate, (rows.start_pos + t).saturating_sub(1));
                        state.next_turn(gate);
                    }
                }
                _ => {}
            }
            // The first position is an attention sink of abnormal norm.
            if rows.start_pos + t == 0 || !(rows.generated || gate.reads(rows.roles[t])) {
                continue;
            }
            if gate.aggregate == Aggregate::Attention {
                state.attend(&probed[t * self.columns..(t + 1) * self.columns]);
                continue;
            }
            let x = &resid[t * d..(t + 1) * d];
            let score = match (&self.sae, codes) {
                _ if !self.probes.is_empty() => gate.bias + probed[t],
                (Some(sae), codes) => {
                    for (f, w) in latents.iter_mut().zip(&gate.weights) {
                        *f = match codes {
                            Some(codes) => activation(codes, t, w.latent),
                            None => sae.latent(x, w.latent as usize),
                        };
                    }
                    let both = latents.iter().zip(&gate.weights);
                    both.fold(gate.bias, |s, (f, w)| s + w.weight * f)
                }
                (None, _) => gate.bias + cosine(x, &gate.direction),
            };
            state.push(score, &latents);
        }
        state.decide(gate, last);
    }
}

impl Compiled {
    /// Applies this intervention to the new rows of one sequence, if it is `on`.
    ///
    /// # Shapes
    /// `resid` is `[rows.tokens.len(), d_model]`.
    fn apply(
        &self,
        on: bool,
        memory: &mut Memory,
        rows: &Rows<'_>,
        resid: &mut [f32],
        encoded: &mut Encoded,
    ) {
        let n = rows.tokens.len();
        let d = resid.len() / n;
        if !rows.generated {
            memory.reply_from = None;
        } else if memory.reply_from.is_none() {
            memory.reply_from = Some(rows.start_pos);
        }
        let reply_from = memory.reply_from;
        let covered = |t: usize| self.covers(rows, t, reply_from);
        if !on || !(0..n).any(covered) {
            return;
        }
        memory.before.resize(self.edits.len(), 0.0);
        memory.after.resize(self.edits.len(), 0.0);
        let reads_exactly = self.membership == Membership::Exact && !self.edits.is_empty();
        // One latent of one row is told for less than a whole encode.
        let one = n == 1 && self.edits.len() == 1;
        let exact = self.sae.as_ref().filter(|sae| {
            self.error_term == ErrorTerm::Dropped || (reads_exactly && (!one || encoded.has(sae)))
        });
        let codes = exact.map(|sae| encoded.of(sae, resid, n));
        let reconstruction = match (codes, &self.sae, self.error_term) {
            (Some(codes), Some(sae), ErrorTerm::Dropped) => {
                let mut out = vec![0.0; n * d];
                sae.reconstruct(resid, codes, &mut out);
                Some(out)
            }
            _ => None,
        };
        let read = |t: usize, latent: u32, x: &[f32]| -> f32 {
            match (codes, &self.sae) {
                (Some(codes), _) if self.membership == Membership::Exact => {
                    activation(codes, t, latent)
                }
                (_, Some(sae)) if self.membership == Membership::Exact => {
                    sae.active(x, latent as usize)
                }
                (_, Some(sae)) => sae.latent(x, latent as usize),
                _ => 0.0,
            }
        };
        let mut delta = vec![0.0f32; d];
        let mut changes = vec![0.0f32; self.edits.len()];
        for t in (0..n).filter(|&t| covered(t)) {
            let x = &mut resid[t * d..(t + 1) * d];
            delta.fill(0.0);
            if let Some(sae) = &self.sae {
                let unit = sae.unit(x);
                for (e, (edit, value)) in self.edits.iter().enumerate() {
                    let f = read(t, edit.latent, x);
                    memory.before[e] += f64::from(f);
                    memory.after[e] += f64::from(f);
                    changes[e] = change(edit.op, *value, f);
                    if changes[e] != 0.0 {
                        let by = unit * changes[e];
                        for (o, w) in delta.iter_mut().zip(sae.decoder_row(edit.latent as usize)) {
                            *o += by * w;
                        }
                    }
                }
            }
            if let Some((v, op, value)) = &self.direction {
                let along = match op {
                    DirectionOp::Add => *value,
                    DirectionOp::Ablate => -x.iter().zip(v).map(|(a, b)| a * b).sum::<f32>(),
                };
                for (o, w) in delta.iter_mut().zip(v) {
                    *o += along * w;
                }
            }
            if let Some(reconstruction) = &reconstruction {
                let x_hat = &reconstruction[t * d..(t + 1) * d];
                for ((o, r), x) in delta.iter_mut().zip(x_hat).zip(x.iter()) {
                    *o += r - x;
                }
            }
            let norm = |v: &[f32]| v.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>().sqrt();
            let (size, mut ratio) = (norm(x), norm(&delta));
            ratio /= size.max(f64::MIN_POSITIVE);
            let mut shrink = 1.0f32;
            if let Some(cap) = self.max_edit_norm.map(f64::from).filter(|c| ratio > *c) {
                shrink = (cap / ratio) as f32;
                delta.iter_mut().for_each(|v| *v *= shrink);
                ratio = cap;
            }
            for (x, o) in x.iter_mut().zip(&delta) {
                *x += o;
            }
            for (after, change) in memory.after.iter_mut().zip(&changes) {
                *after += f64::from(change * shrink);
            }
            memory.rows_edited += 1;
            memory.edit_norm += ratio;
        }
        encoded.0.clear();
    }

    fn covers(&self, rows: &Rows<'_>, t: usize, reply_from: Option<usize>) -> bool {
        let (span, pos) = (&self.span, rows.start_pos + t);
        let in_reply = |n: usize| reply_from.is_some_and(|from| pos < from.saturating_add(n));
        (if rows.generated {
            span.generation && span.reply_tokens.is_none_or(in_reply)
        } else {
            span.prompt
        }) && !(span.skip_first && pos == 0)
            && pos >= span.from
            && span.to.is_none_or(|to| pos < to)
            && (span.roles.is_empty() || span.roles.contains(&rows.roles[t]))
    }
}

/// `x . v / |x|`, for `v` of unit norm.
fn cosine(x: &[f32], v: &[f32]) -> f32 {
    let norm = x.iter().map(|a| a * a).sum::<f32>().sqrt();
    x.iter().zip(v).map(|(a, b)| a * b).sum::<f32>() / norm.max(f32::MIN_POSITIVE)
}

/// How much of the latent's decoder row is added, for a latent at `f`.
fn change(op: Op, value: f32, f: f32) -> f32 {
    match op {
        Op::Set => value - f,
        Op::Floor => (value - f).max(0.0),
        Op::Ceiling => (value - f).min(0.0),
        Op::Scale => (value - 1.0) * f,
        Op::Ablate => -f,
        Op::Add => value,
    }
}

/// Activation of `latent` in row `t`: zero outside the top k.
fn activation(codes: &Codes, t: usize, latent: u32) -> f32 {
    let row = t * codes.k..(t + 1) * codes.k;
    codes.idx[row.clone()]
        .iter()
        .zip(&codes.val[row])
        .find_map(|(&j, &v)| (j == latent).then_some(v))
        .unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_by_hand() {
        // (operation, operand, activation before, activation after)
        let cases = [
            (Op::Set, 3.0, 1.0, 3.0),
            (Op::Set, 3.0, 5.0, 3.0),
            (Op::Floor, 3.0, 1.0, 3.0),
            (Op::Floor, 3.0, 5.0, 5.0),
            (Op::Ceiling, 3.0, 1.0, 1.0),
            (Op::Ceiling, 3.0, 5.0, 3.0),
            (Op::Scale, 0.5, 4.0, 2.0),
            (Op::Ablate, 9.0, 4.0, 0.0),
            (Op::Add, 3.0, 1.0, 4.0),
        ];
        for (op, value, before, after) in cases {
            assert_eq!(before + change(op, value, before), after, "{op:?} {value}");
        }
    }
}
