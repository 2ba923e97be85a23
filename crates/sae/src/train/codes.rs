//! Codes of a batch in training: entries by row, their gradients, and the same entries by latent.

use std::ops::Range;

use rayon::prelude::*;

/// Latents of a row and their values, in the order of the latents.
pub(super) type RowEntries = Vec<(u32, f32)>;

/// Entries of some rows, one row behind the other.
#[derive(Debug, Default)]
pub(super) struct TileEntries {
    /// Entries of each row.
    pub lengths: Vec<u32>,
    pub idx: Vec<u32>,
    pub val: Vec<f32>,
    /// Pre-activations, where they are not the values.
    pub pre: Vec<f32>,
}

/// Codes of a batch. A row's entries are side by side, in the order of their latents; rows may differ in
/// their number, and there may be room between them that is not used.
#[derive(Debug, Default)]
pub(super) struct Codes {
    rows: Vec<Range<u32>>,
    pub idx: Vec<u32>,
    pub val: Vec<f32>,
    /// Pre-activations, where they are not the values.
    pub pre: Vec<f32>,
    /// Gradients to the encoder's product.
    pub grad: Vec<f32>,
    /// Gradients to a parameter of the latent's own, where it has one.
    pub own: Vec<f32>,
    /// Places of entries and their rows, latent by latent.
    at: Vec<u32>,
    at_row: Vec<u32>,
    /// Where a latent's places start; one more than latents.
    starts: Vec<u32>,
}

impl Codes {
    /// Takes `k` entries a row from `encode`, of which those above 0 come first and count.
    pub(super) fn select<T>(
        &mut self,
        n: usize,
        k: usize,
        encode: impl FnOnce(&mut [u32], &mut [f32]) -> T,
    ) -> T {
        self.idx.resize(n * k, 0);
        self.val.resize(n * k, 0.0);
        let returned = encode(&mut self.idx, &mut self.val);
        self.rows.clear();
        self.rows.extend((0..n).map(|r| {
            let row = &self.val[r * k..(r + 1) * k];
            let active = row.partition_point(|v| *v > 0.0);
            (r * k) as u32..(r * k + active) as u32
        }));
        self.grad.resize(n * k, 0.0);
        returned
    }

    /// Takes rows of any length.
    pub(super) fn take(&mut self, rows: &[RowEntries]) {
        self.lay_out(rows.iter().map(|row| row.len() as u32));
        self.idx.clear();
        self.val.clear();
        self.idx.extend(rows.iter().flatten().map(|e| e.0));
        self.val.extend(rows.iter().flatten().map(|e| e.1));
        self.grad.resize(self.idx.len(), 0.0);
    }

    /// Takes tiles of rows.
    pub(super) fn take_tiles(&mut self, tiles: &[TileEntries]) {
        self.lay_out(tiles.iter().flat_map(|t| &t.lengths).copied());
        self.idx.clear();
        self.val.clear();
        self.pre.clear();
        for tile in tiles {
            self.idx.extend_from_slice(&tile.idx);
            self.val.extend_from_slice(&tile.val);
            self.pre.extend_from_slice(&tile.pre);
        }
        self.grad.resize(self.idx.len(), 0.0);
        self.own.resize(self.pre.len(), 0.0);
    }

    fn lay_out(&mut self, lengths: impl Iterator<Item = u32>) {
        let mut at = 0;
        self.rows.clear();
        self.rows.extend(lengths.map(|n| {
            let start = at;
            at += n;
            start..at
        }));
    }

    /// Whether there are no rows.
    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Places of a row's entries.
    pub(super) fn row(&self, r: usize) -> Range<usize> {
        self.rows[r].start as usize..self.rows[r].end as usize
    }

    /// Where each part of `each` of `n` rows ends, as places.
    pub(super) fn ends(&self, n: usize, each: usize) -> Vec<usize> {
        let end = |r: usize| match self.rows.get(r) {
            Some(row) => row.start as usize,
            None => self.idx.len(),
        };
        (0..n).step_by(each).map(|r| end(r + each)).collect()
    }

    /// Activations of the entries, row by row.
    pub(super) fn vals(&self) -> impl Iterator<Item = f32> {
        let rows = (0..self.rows.len()).map(|r| self.row(r));
        rows.flat_map(|row| self.val[row].iter().copied())
    }

    /// Entries with an activation.
    pub(super) fn active(&self) -> u64 {
        let rows = (0..self.rows.len()).into_par_iter();
        rows.map(|r| self.val[self.row(r)].iter().filter(|v| **v > 0.0).count() as u64)
            .sum()
    }

    /// Sorts the entries by latent, each latent's by row.
    pub(super) fn order(&mut self, d_sae: usize) {
        self.starts.clear();
        self.starts.resize(d_sae + 1, 0);
        for row in &self.rows {
            for &j in &self.idx[row.start as usize..row.end as usize] {
                self.starts[j as usize + 1] += 1;
            }
        }
        for j in 0..d_sae {
            self.starts[j + 1] += self.starts[j];
        }
        self.at.resize(self.starts[d_sae] as usize, 0);
        self.at_row.resize(self.starts[d_sae] as usize, 0);
        let mut next = self.starts.clone();
        for (r, row) in self.rows.iter().enumerate() {
            for i in row.clone() {
                let place = &mut next[self.idx[i as usize] as usize];
                self.at[*place as usize] = i;
                self.at_row[*place as usize] = r as u32;
                *place += 1;
            }
        }
    }

    /// Forgets all entries.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Places and rows of a latent's entries.
    pub(super) fn of(&self, latent: usize) -> (&[u32], &[u32]) {
        match self.starts.get(latent..latent + 2) {
            Some(s) => {
                let range = s[0] as usize..s[1] as usize;
                (&self.at[range.clone()], &self.at_row[range])
            }
            None => (&[], &[]),
        }
    }
}

/// One latent's entries, side by side.
#[derive(Default)]
pub(super) struct Entries {
    /// Rows of the gradient that the entries see.
    pub seen: Vec<u32>,
    pub vals: Vec<f32>,
    pub grads: Vec<f32>,
    pub own: Vec<f32>,
}

impl Entries {
    /// Reads a latent's entries; of the `levels` gradients of a row they see number `level`. Returns the
    /// entries' rows.
    pub(super) fn read<'a>(
        &mut self,
        codes: &'a Codes,
        latent: usize,
        levels: usize,
        level: usize,
    ) -> &'a [u32] {
        let (at, rows) = codes.of(latent);
        let gather = |from: &[f32], to: &mut Vec<f32>| {
            to.clear();
            to.extend(at.iter().map(|&i| from[i as usize]));
        };
        gather(&codes.val, &mut self.vals);
        gather(&codes.grad, &mut self.grads);
        self.own.clear();
        if !codes.own.is_empty() {
            gather(&codes.own, &mut self.own);
        }
        self.seen.clear();
        let seen = |r: &u32| r * levels as u32 + level as u32;
        self.seen.extend(rows.iter().map(seen));
        rows
    }
}
