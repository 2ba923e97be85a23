//! `act(W_gate x) * W_up x` without its parts in memory: a task computes some columns of both products,
//! applies the activation and rounds the result, all in the cache.

use std::ops::Range;

use super::activations::{Activations, Blocks};
use super::{BLOCK, PANEL, Packed, Ready, SCRATCH, STRIP};
use crate::ops::{self, Activation};
use crate::pool;

/// Panels whose columns are one block of the result.
const PANELS: usize = BLOCK / PANEL;

/// The first half of a gated MLP.
pub(crate) struct Gated<'a> {
    pub gate: (&'a Packed, Option<&'a [f32]>),
    pub up: (&'a Packed, Option<&'a [f32]>),
    pub activation: Activation,
}

impl Gated<'_> {
    /// `out = act(W_gate x) * W_up x`, rounded. Both matrices are as large, their rows a multiple of 32.
    pub(crate) fn forward(&self, x: &Activations, n: usize, out: &mut Activations) {
        let blocks = self.gate.0.rows / BLOCK;
        out.resize(n, blocks, x.products());
        let out = out.shared();
        let cut = self.gate.0.cut(n, 2 * PANELS, x.products());
        // A unit of the cut is both matrices' panels; of one matrix there are half as many.
        let groups = blocks.div_ceil(cut.group);
        let cut = super::Cut { groups, ..cut };
        pool::for_each(cut.tasks(), |task| {
            let (units, rows) = cut.part(task);
            // SAFETY: tasks partition blocks and rows.
            unsafe { self.task(units.start..units.end.min(blocks), rows, x, out) };
        });
    }

    /// # Safety
    /// `out` has room for the rows of `x`; nobody else accesses these blocks of these rows.
    unsafe fn task(&self, units: Range<usize>, rows: Range<usize>, x: &Activations, out: Blocks) {
        let panels = units.start * PANELS..units.end * PANELS;
        let n = rows.end.min(x.rows()) - rows.start;
        SCRATCH.with_borrow_mut(|[first, second]| {
            let mut both = [(self.gate, first), (self.up, second)].map(|((w, bias), scratch)| {
                let values = [0.0f32; STRIP * BLOCK]; // [row][column]
                (Ready::new(w, scratch, panels.clone(), x, n), bias, values)
            });
            let mut sums = [[[0.0; PANEL]; STRIP]; PANELS];
            for (first, x) in x.strips(rows) {
                for unit in units.clone() {
                    let panels = unit * PANELS..(unit + 1) * PANELS;
                    for (ready, bias, values) in &mut both {
                        ready.strip(panels.clone(), x, &mut sums);
                        let values = values.as_chunks_mut::<PANEL>().0;
                        for (half, (panel, sums)) in panels.clone().zip(&sums).enumerate() {
                            let values = values[half..].iter_mut().step_by(PANELS);
                            let bias = bias.map(|b| &b[panel * PANEL..(panel + 1) * PANEL]);
                            for (sums, out) in sums[..x.rows()].iter().zip(values) {
                                *out = *sums;
                                if let Some(bias) = bias {
                                    out.iter_mut().zip(bias).for_each(|(o, b)| *o += b);
                                }
                            }
                        }
                    }
                    let [(_, _, gate), (_, _, up)] = &mut both;
                    let values = x.rows() * BLOCK;
                    ops::gate_one(self.activation, &mut gate[..values], &up[..values]);
                    for (i, gate) in gate[..values].chunks_exact(BLOCK).enumerate() {
                        // SAFETY: the unit is one of the blocks, the row one of the strip's; they are
                        // this task's, by the caller's promise.
                        unsafe { out.row(first + i, unit, gate) }
                    }
                }
            }
        });
    }
}
