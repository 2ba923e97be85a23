//! Quantised weights packed for integer products, and the products.
//!
//! # Layout
//!
//! Output rows go in panels of 16, the inner dimension in blocks of 32. A block's integers are eight
//! vectors of 64 bytes: vector `g` holds, for each of the 16 rows, those of columns `4 g .. 4 g + 4`.
//! One broadcast of 4 activation bytes against one vector is then 64 products for 16 outputs, with no
//! horizontal sum at the end. They are stored without sign, `u = q + offset`, in as many bits as the
//! file has for them:
//!
//! | bits | vectors of a block |
//! | --- | --- |
//! | 4 | four: groups 0-3 in the low nibbles, 4-7 in the high ones |
//! | 5 | the same, then one of fifth bits: bit `g` of a byte belongs to group `g` |
//! | 6 | the same, then two of upper bits: two bits of a byte for each of groups 0-3 and 4-7 |
//! | 8 | eight |
//!
//! Scales and minima are 16 values a group of 16 or 32 columns, as in the file: f16, or (K-quants)
//! one f16 unit for 256 columns and small integers. Nothing is quantised again, and nothing takes
//! more memory than in the file, Q2_K and Q3_K aside, which are kept in 4 bits.
//!
//! # Product
//!
//! Activations are rounded to int8 with one f32 scale for each 32 values (as llama.cpp's Q8_0).
//! `y = sum_b s_w s_x sum_i (u_i - offset) x_i + m_w s_x sum_i x_i`; the integer sums are exact, and the
//! f32 sum runs over blocks in ascending order whatever the number of activation rows, so a row's
//! result does not depend on its batch.
//!
//! A task takes some panels, unpacks them to a byte an integer and f32 factors (`panel.rs`), and lets
//! strips of activations pass; what is unpacked stays in the L2 cache. For a few rows AVX-512 unpacks in
//! registers instead, for a single one AVX2 does.
//!
//! Where it is asked for ([`Products::Bf16`]) and there is AMX, both operands are bf16 instead (`bf16.rs`).

mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod bf16;
mod dequantise;
mod gated;
mod panel;
#[cfg(target_arch = "x86_64")]
mod vnni;

use std::cell::RefCell;
use std::ops::Range;

use half::f16;

pub(crate) use self::activations::Activations;
use self::activations::{Strip, TILE, Tile, XBlock};
pub(crate) use self::gated::Gated;
use self::panel::{Panel, Row, Scratch};
use crate::dispatch::{Isa, isa};
use crate::linear::{L2_ACTIVATIONS, L2_WEIGHTS, Products, READ_AHEAD};
use crate::pool;
use crate::quant::{GgmlType, Unpacked, group_len, unpack_block};

/// Columns of a block.
pub(crate) const BLOCK: usize = 32;
/// Rows of a panel.
pub(crate) const PANEL: usize = 16;
/// The most rows of activations that pass together.
const STRIP: usize = 2 * TILE;
/// With no more rows than these, integers are unpacked in registers.
fn in_registers() -> usize {
    match isa() {
        Isa::Avx512 | Isa::Amx => 32,
        Isa::Avx2 => 1,
        Isa::Portable => 0,
    }
}

/// Sums of two panels for a strip, `[panel][row]`.
type Sums = [[Row; STRIP]; 2];

thread_local! {
    static SCRATCH: RefCell<[Scratch; 2]> = RefCell::default();
}

/// Bits that an integer is stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Bits4,
    Bits5,
    Bits6,
    Bits8,
}

impl Kind {
    /// Vectors of a block.
    fn lines(self) -> usize {
        match self {
            Self::Bits4 => 4,
            Self::Bits5 => 5,
            Self::Bits6 => 6,
            Self::Bits8 => 8,
        }
    }
}

/// A vector of packed integers.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

impl Line {
    const ZERO: Self = Self([0; 64]);
}

/// Scales and minima, one for each row of a panel.
#[derive(Debug)]
enum Factors {
    /// f16, `[panel][block]`; no minima for symmetric types.
    Blocks {
        scales: Vec<[u16; PANEL]>,
        mins: Vec<[u16; PANEL]>,
    },
    /// Units `[panel][columns / 256]` in f16, integers `[panel][block][halves]`.
    Supers {
        units: Vec<[u16; PANEL]>,
        scales: Vec<[i8; PANEL]>,
    },
    /// The same twice; what is subtracted is a minimum unit times its integer.
    SupersWithMins {
        units: Vec<[u16; PANEL]>,
        scales: Vec<[i8; PANEL]>,
        min_units: Vec<[u16; PANEL]>,
        mins: Vec<[i8; PANEL]>,
    },
}

/// The factors of one panel.
#[derive(Clone, Copy)]
enum PanelFactors<'a> {
    /// f16, `[block]`; no minima for symmetric types.
    Blocks {
        scales: &'a [[u16; PANEL]],
        mins: &'a [[u16; PANEL]],
    },
    /// Units `[columns / 256]` in f16, integers `[block][halves]`.
    Supers {
        units: &'a [[u16; PANEL]],
        scales: &'a [[i8; PANEL]],
    },
    /// The same twice.
    SupersWithMins {
        units: &'a [[u16; PANEL]],
        scales: &'a [[i8; PANEL]],
        min_units: &'a [[u16; PANEL]],
        mins: &'a [[i8; PANEL]],
    },
}

impl Factors {
    fn bytes(&self) -> usize {
        let rows = match self {
            Self::Blocks { scales, mins } => 2 * (scales.len() + mins.len()),
            Self::Supers { units, scales } => 2 * units.len() + scales.len(),
            Self::SupersWithMins {
                units,
                scales,
                min_units,
                mins,
            } => 2 * (units.len() + min_units.len()) + scales.len() + mins.len(),
        };
        rows * PANEL
    }
}

/// A packed matrix `[out, in]`.
#[derive(Debug)]
pub(crate) struct Packed {
    kind: Kind,
    rows: usize,
    blocks: usize,
    /// Groups of columns in a block that have factors of their own.
    halves: usize,
    offset: i32,
    weights: Vec<Line>,
    factors: Factors,
}

/// A panel's part of every buffer, while it is packed.
struct Part<'a> {
    weights: &'a mut [Line],
    units: &'a mut [[u16; PANEL]],
    min_units: &'a mut [[u16; PANEL]],
    scales: &'a mut [[i8; PANEL]],
    mins: &'a mut [[i8; PANEL]],
}

/// Splits `n` items off the front.
fn take<'a, T>(rest: &mut &'a mut [T], n: usize) -> &'a mut [T] {
    let (front, back) = std::mem::take(rest).split_at_mut(n);
    *rest = back;
    front
}

/// A pointer to the output that tasks share; each writes columns of its own panels only.
pub(crate) struct Shared<T>(*mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

// SAFETY: tasks write disjoint elements, and the borrow of the output outlives the parallel loop.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(y: &mut [T]) -> Self {
        Self(y.as_mut_ptr())
    }

    /// # Safety
    /// `at .. at + n` is in bounds of the output and no other task accesses it.
    pub(crate) unsafe fn part<'a>(self, at: usize, n: usize) -> &'a mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(at), n) }
    }
}

/// How a product is cut into tasks: outputs in `groups` of `group`, rows in `chunks` of `rows`. All groups
/// of a chunk come before the next chunk, so that threads share the activations that they read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cut {
    pub group: usize,
    pub groups: usize,
    pub rows: usize,
    pub chunks: usize,
}

impl Cut {
    pub(crate) fn tasks(&self) -> usize {
        self.groups * self.chunks
    }

    /// Outputs and rows of a task; the last of each may be more than there are.
    pub(crate) fn part(&self, task: usize) -> (Range<usize>, Range<usize>) {
        let (chunk, group) = (task / self.groups, task % self.groups);
        (
            group * self.group..(group + 1) * self.group,
            chunk * self.rows..(chunk + 1) * self.rows,
        )
    }
}

/// How panels are made ready.
enum Way {
    /// As they are packed, but for the factors.
    Packed,
    /// Unpacked.
    Unpacked,
    /// In bf16.
    #[cfg(target_arch = "x86_64")]
    Bf16(bf16::Configured),
}

/// Some panels of a matrix, made ready for strips of activations.
struct Ready<'a> {
    w: &'a Packed,
    scratch: &'a mut Scratch,
    first: usize,
    way: Way,
}

impl<'a> Ready<'a> {
    /// For `n` rows of `x`.
    fn new(
        w: &'a Packed,
        scratch: &'a mut Scratch,
        panels: Range<usize>,
        x: &Activations,
        n: usize,
    ) -> Self {
        let first = panels.start;
        let way = match x.products() {
            #[cfg(target_arch = "x86_64")]
            Products::Bf16 => {
                scratch.dequantise(w, panels);
                Way::Bf16(bf16::Configured::new())
            }
            _ if n <= in_registers() => Way::Packed,
            _ => {
                scratch.unpack(w, panels, true);
                Way::Unpacked
            }
        };
        Self {
            w,
            scratch,
            first,
            way,
        }
    }

    /// The sums of one or two panels for a strip.
    fn strip(&mut self, panels: Range<usize>, x: Strip<'_>, sums: &mut Sums) {
        let w = self.w;
        match (x, &self.way) {
            #[cfg(target_arch = "x86_64")]
            (Strip::Bf16(x, _), Way::Bf16(configured)) => {
                let pair = [panels.start, panels.end - 1];
                let pair = pair.map(|p| self.scratch.tiles(w, p - self.first));
                bf16::strip(configured, pair, x, sums);
            }
            (Strip::Int8(x), Way::Packed) => {
                for (panel, sums) in panels.zip(sums) {
                    #[cfg(target_arch = "x86_64")]
                    if x.rows == 1 {
                        w.one(panel, x, &mut sums[0]);
                        continue;
                    }
                    self.scratch.unpack(w, panel..panel + 1, false);
                    w.tile::<true>(self.scratch.panel(w, 0, panel), x, &mut sums[..x.rows]);
                }
            }
            (Strip::Int8(x), _) => {
                for (panel, sums) in panels.zip(sums) {
                    let panel = self.scratch.panel(w, panel - self.first, panel);
                    w.tile::<false>(panel, x, &mut sums[..x.rows]);
                }
            }
            (Strip::Bf16(..), _) => unreachable!("bf16 rows meet bf16 panels"),
        }
    }
}

impl Packed {
    /// Packs `rows` rows of `columns` values of a quantised type; `bytes` is the whole matrix.
    ///
    /// The caller has checked that `columns` is a multiple of 32 and of the type's block, and that
    /// `bytes` has the right length. `read` is called whenever some [`READ_AHEAD`] bytes were read.
    pub(crate) fn new(
        ty: GgmlType,
        bytes: &[u8],
        rows: usize,
        columns: usize,
        mut read: impl FnMut(),
    ) -> Self {
        let (kind, offset) = match ty {
            GgmlType::Q4_0 => (Kind::Bits4, 8),
            GgmlType::Q4_1 | GgmlType::Q4K | GgmlType::Q2K => (Kind::Bits4, 0),
            GgmlType::Q3K => (Kind::Bits4, 4),
            GgmlType::Q5_0 => (Kind::Bits5, 16),
            GgmlType::Q5_1 | GgmlType::Q5K => (Kind::Bits5, 0),
            GgmlType::Q6K => (Kind::Bits6, 32),
            _ => (Kind::Bits8, 128),
        };
        let with_mins = matches!(
            ty,
            GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q2K | GgmlType::Q4K | GgmlType::Q5K
        );
        let halves = BLOCK / group_len(ty);
        let (blocks, panels) = (columns / BLOCK, rows.div_ceil(PANEL));
        let in_supers = ty.block_len() == 256;
        let (units_each, groups_each) = if in_supers {
            (columns / 256, blocks * halves)
        } else {
            (blocks, 0)
        };
        let if_mins = |n: usize| if with_mins { n } else { 0 };
        let mut weights = vec![Line::ZERO; panels * blocks * kind.lines()];
        let mut units = vec![[0u16; PANEL]; panels * units_each];
        let mut min_units = vec![[0u16; PANEL]; if_mins(panels * units_each)];
        let mut scales = vec![[0i8; PANEL]; panels * groups_each];
        let mut mins = vec![[0i8; PANEL]; if_mins(panels * groups_each)];
        let row_bytes = columns / ty.block_len() * ty.block_bytes();
        let mut parts: Vec<Part<'_>> = Vec::with_capacity(panels);
        let mut rest = Part {
            weights: &mut weights,
            units: &mut units,
            min_units: &mut min_units,
            scales: &mut scales,
            mins: &mut mins,
        };
        for _ in 0..panels {
            parts.push(Part {
                weights: take(&mut rest.weights, blocks * kind.lines()),
                units: take(&mut rest.units, units_each),
                min_units: take(&mut rest.min_units, if_mins(units_each)),
                scales: take(&mut rest.scales, groups_each),
                mins: take(&mut rest.mins, if_mins(groups_each)),
            });
        }
        let pack = |panel: usize, part: &mut Part<'_>| {
            let mut block = Unpacked::default();
            for r in 0..PANEL.min(rows - panel * PANEL) {
                let row = panel * PANEL + r;
                let bytes = &bytes[row * row_bytes..(row + 1) * row_bytes];
                for (at, b) in bytes.chunks_exact(ty.block_bytes()).enumerate() {
                    unpack_block(ty, b, &mut block);
                    part.units[at][r] = f16::from_f32(block.unit).to_bits();
                    if with_mins {
                        part.min_units[at][r] = f16::from_f32(block.min_unit).to_bits();
                    }
                    if in_supers {
                        let groups = 256 / group_len(ty);
                        for g in 0..groups {
                            part.scales[at * groups + g][r] = block.scale_q[g];
                            if with_mins {
                                part.mins[at * groups + g][r] = block.min_q[g];
                            }
                        }
                    }
                    for i in 0..ty.block_len() {
                        let column = at * ty.block_len() + i;
                        let lines = &mut part.weights[column / BLOCK * kind.lines()..];
                        let u = (i32::from(block.q[i]) + offset) as u8;
                        put(kind, &mut lines[..kind.lines()], r, column % BLOCK, u);
                    }
                }
            }
        };
        let at_once = (READ_AHEAD / (PANEL * row_bytes).max(1)).max(1);
        for (i, parts) in parts.chunks_mut(at_once).enumerate() {
            pool::for_each_row(parts, 1, |p, part| pack(i * at_once + p, &mut part[0]));
            read();
        }
        let factors = match (in_supers, with_mins) {
            (false, _) => Factors::Blocks {
                scales: units,
                mins: min_units,
            },
            (true, false) => Factors::Supers { units, scales },
            (true, true) => Factors::SupersWithMins {
                units,
                scales,
                min_units,
                mins,
            },
        };
        Self {
            kind,
            rows,
            blocks,
            halves,
            offset,
            weights,
            factors,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.weights.len() * size_of::<Line>() + self.factors.bytes()
    }

    fn has_mins(&self) -> bool {
        match &self.factors {
            Factors::Blocks { mins, .. } => !mins.is_empty(),
            Factors::Supers { .. } => false,
            Factors::SupersWithMins { .. } => true,
        }
    }

    /// The factors of a panel, as packed.
    fn factors_of(&self, panel: usize) -> PanelFactors<'_> {
        let of = |each: usize| panel * each..(panel + 1) * each;
        let (blocks, groups) = (of(self.blocks), of(self.blocks * self.halves));
        let supers = of(self.blocks * BLOCK / 256);
        match &self.factors {
            Factors::Blocks { scales, mins } => PanelFactors::Blocks {
                scales: &scales[blocks.clone()],
                mins: mins.get(blocks).unwrap_or_default(),
            },
            Factors::Supers { units, scales } => PanelFactors::Supers {
                units: &units[supers],
                scales: &scales[groups],
            },
            Factors::SupersWithMins {
                units,
                scales,
                min_units,
                mins,
            } => PanelFactors::SupersWithMins {
                units: &units[supers.clone()],
                scales: &scales[groups.clone()],
                min_units: &min_units[supers],
                mins: &mins[groups],
            },
        }
    }

    /// The integers of a panel, as packed.
    fn lines(&self, panel: usize) -> &[Line] {
        let each = self.blocks * self.kind.lines();
        &self.weights[panel * each..(panel + 1) * each]
    }

    /// Tasks for `n` rows, whose outputs are those of `panels` panels at a time: a task should be worth
    /// some microseconds, its unpacked weights and its activations should stay in the L2 cache, and
    /// there should be several for each thread.
    pub(crate) fn cut(&self, n: usize, panels: usize, products: Products) -> Cut {
        let units = self.rows.div_ceil(PANEL * panels);
        let integers = self.blocks * BLOCK * PANEL * panels;
        let enough = (1 << 18) / (integers * n.min(8)).max(1);
        let even = units / (4 * crate::threads());
        // Bytes of unpacked weights, and of a strip's rows; in bf16 those may take more of the cache, as
        // what they save is unpacking, which counts for more there.
        let (bytes, strip, room) = match products {
            Products::Int8 => {
                let strip = STRIP * self.blocks * size_of::<XBlock>();
                (integers + integers / 4, strip, L2_ACTIVATIONS)
            }
            Products::Bf16 => {
                let strip = STRIP * self.blocks * BLOCK * size_of::<f16>();
                (2 * integers, strip, L2_ACTIVATIONS / 2 * 3)
            }
        };
        let group = if n == 1 {
            even.clamp(1, enough.max(1))
        } else {
            let fit = (L2_WEIGHTS / bytes.max(1)).max(1);
            even.clamp(1, fit).max(enough.min(fit))
        };
        // Pairs of panels pass together.
        let group = if products == Products::Bf16 && panels == 1 {
            group.next_multiple_of(2)
        } else {
            group
        };
        let rows = STRIP * (room / strip.max(1)).max(2);
        Cut {
            group,
            groups: units.div_ceil(group),
            rows,
            chunks: n.div_ceil(rows),
        }
    }

    /// `y[n, out] = x W^T + bias` for some panels' outputs and some rows.
    ///
    /// # Safety
    /// `out` is `[n, rows]`; nobody else accesses the columns of these panels in these rows.
    pub(crate) unsafe fn task(
        &self,
        (panels, rows): (Range<usize>, Range<usize>),
        x: &Activations,
        bias: Option<&[f32]>,
        out: Shared<f32>,
    ) {
        let panels = panels.start..panels.end.min(self.rows.div_ceil(PANEL));
        let write = |row: usize, panel: usize, sums: &Row| {
            let first = panel * PANEL;
            let columns = (self.rows - first).min(PANEL);
            // SAFETY: the panel's columns are below `rows` and the activation row below `n`, so the
            // part is in bounds; they are this task's.
            let out = unsafe { out.part(row * self.rows + first, columns) };
            match (bias, out.first_chunk_mut::<PANEL>()) {
                (Some(bias), _) => {
                    let sums = sums.iter().zip(&bias[first..first + columns]);
                    out.iter_mut().zip(sums).for_each(|(o, (s, b))| *o = s + b);
                }
                (None, Some(out)) => *out = *sums,
                (None, None) => out.copy_from_slice(&sums[..columns]),
            }
        };
        SCRATCH.with_borrow_mut(|[scratch, _]| {
            let mut sums = [[[0.0; PANEL]; STRIP]; 2];
            let n = rows.end.min(x.rows()) - rows.start;
            let mut ready = Ready::new(self, scratch, panels.clone(), x, n);
            for (first, x) in x.strips(rows) {
                for start in panels.clone().step_by(2) {
                    let pair = start..panels.end.min(start + 2);
                    ready.strip(pair.clone(), x, &mut sums);
                    for (panel, sums) in pair.zip(&sums) {
                        for (i, sums) in sums[..x.rows()].iter().enumerate() {
                            write(first + i, panel, sums);
                        }
                    }
                }
            }
        });
    }

    /// The sums of one panel for a single row, from what is packed.
    #[cfg(target_arch = "x86_64")]
    fn one(&self, panel: usize, x: Tile<'_>, sums: &mut Row) {
        if isa() >= Isa::Avx512 {
            vnni::one(self, panel, x, sums);
        } else {
            avx2::one(self, panel, x, sums);
        }
    }

    /// The sums of one panel for the activation rows of a tile.
    fn tile<const PACKED: bool>(&self, panel: Panel<'_>, x: Tile<'_>, sums: &mut [Row]) {
        #[cfg(target_arch = "x86_64")]
        if isa() >= Isa::Avx512 {
            return vnni::tile::<PACKED>(self, panel, x, sums);
        } else if isa() >= Isa::Avx2 {
            return avx2::tile(self, panel, x, sums);
        }
        self.tile_portable(panel, x, sums);
    }

    fn tile_portable(&self, panel: Panel<'_>, x: Tile<'_>, sums: &mut [Row]) {
        let groups = 8 / self.halves;
        for (row, sums) in sums.iter_mut().enumerate() {
            *sums = [0.0; PANEL];
            for b in 0..self.blocks {
                let x = x.block(b, row);
                for h in 0..self.halves {
                    let mut dots = [0i32; PANEL];
                    for g in h * groups..(h + 1) * groups {
                        let line = &panel.weights[8 * b + g].0;
                        for (dot, w) in dots.iter_mut().zip(line.as_chunks::<4>().0) {
                            for (w, q) in w.iter().zip(&x.q[4 * g..]) {
                                *dot += (i32::from(*w) - self.offset) * i32::from(*q);
                            }
                        }
                    }
                    let at = b * self.halves + h;
                    let x_sum = x.sum(self.halves, h);
                    for r in 0..PANEL {
                        sums[r] += dots[r] as f32 * (panel.scales[at][r] * x.scale);
                        if let Some(mins) = panel.mins.get(at) {
                            sums[r] += mins[r] * x_sum;
                        }
                    }
                }
            }
        }
    }
}

/// Some milliseconds of the int8 instruction on registers; the number of operations, or `None` where the
/// product is not a single instruction.
pub(crate) fn spin() -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    if isa() >= Isa::Avx512 {
        return Some(vnni::spin());
    }
    None
}

/// Stores the integer of row `r` and column `i` of a block.
fn put(kind: Kind, lines: &mut [Line], r: usize, i: usize, u: u8) {
    let (g, lane) = (i / 4, 4 * r + i % 4);
    if kind == Kind::Bits8 {
        lines[g].0[lane] = u;
        return;
    }
    lines[g % 4].0[lane] |= (u & 15) << (4 * (g / 4));
    match kind {
        Kind::Bits5 => lines[4].0[lane] |= (u >> 4) << g,
        Kind::Bits6 => lines[4 + g / 4].0[lane] |= (u >> 4) << (2 * (g % 4)),
        Kind::Bits4 | Kind::Bits8 => {}
    }
}
