//! AMX: `tdpbsud` adds the products of 16 activation rows with 16 weight rows, up to 64 columns of each.
//!
//! A group of columns with factors of its own (32, or 16) is one product; its 256 sums go through the L1
//! cache to the vector units, which scale and add them in the order of the other kernels, so that the
//! bits are theirs. Four groups are multiplied while the four before are added. The intrinsics are not
//! stable, so the instructions stand in `asm!`.

use std::arch::asm;
use std::arch::x86_64::*;

use super::panel::{Panel, Row};
use super::{BLOCK, Line, PANEL, Packed, XBlock};

/// Activation rows of a tile.
pub(super) const TILE: usize = 16;
/// Groups that are multiplied at a time.
const AT_ONCE: usize = 4;

/// What `ldtilecfg` reads: palette 1; tiles 0-3 sums, 4 activations, 6 weights.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    columns: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    /// For groups of `columns`.
    const fn new(columns: usize) -> Self {
        let (mut c, mut r) = ([0; 16], [0; 16]);
        let mut t = 0;
        while t < 4 {
            (c[t], r[t]) = (64, 16);
            t += 1;
        }
        (c[4], r[4]) = (columns as u16, 16);
        (c[6], r[6]) = (64, columns as u8 / 4);
        Self {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            columns: c,
            rows: r,
        }
    }
}

static WHOLE: Config = Config::new(BLOCK);
static HALF: Config = Config::new(BLOCK / 2);

/// This thread's tiles, set up for a matrix and given back at the end.
pub(super) struct Tiles;

impl Tiles {
    /// Call it where `dispatch` said AMX.
    pub(super) fn new(w: &Packed) -> Self {
        let config = if w.halves == 1 { &WHOLE } else { &HALF };
        // SAFETY: `dispatch` found AMX and the system's permission; the configuration is valid.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const *config, options(nostack, readonly)) }
        Self
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: as for `new`.
        unsafe { asm!("tilerelease", options(nostack, nomem)) }
    }
}

/// Activations of a tile's rows, by block, as a product and its sums read them.
#[derive(Default)]
pub(super) struct Stripe {
    /// `[block]`: 16 rows of 32 integers.
    q: Vec<[Line; TILE * BLOCK / 64]>,
    /// `[block]`: each row's scale.
    scale: Vec<Row>,
    /// `[block][halves]`: what each row's sum lacks, as the weights are stored without sign.
    offset: Vec<[i32; PANEL]>,
    /// `[block][halves]`: each row's sum of activations, for the minima.
    sum: Vec<Row>,
}

impl Stripe {
    /// Takes the rows `x`, `[TILE, blocks]`.
    pub(super) fn fill(&mut self, w: &Packed, x: &[XBlock]) {
        assert_eq!(x.len(), TILE * w.blocks);
        self.q.resize(w.blocks, [Line::ZERO; TILE * BLOCK / 64]);
        self.scale.resize(w.blocks, [0.0; TILE]);
        self.offset.resize(w.blocks * w.halves, [0; TILE]);
        self.sum.resize(w.blocks * w.halves, [0.0; TILE]);
        for (r, row) in x.chunks_exact(w.blocks).enumerate() {
            for (b, x) in row.iter().enumerate() {
                let q: &mut [i8] = bytemuck::cast_slice_mut(&mut self.q[b]);
                q[r * BLOCK..(r + 1) * BLOCK].copy_from_slice(&x.q);
                self.scale[b][r] = x.scale;
                if w.halves == 1 {
                    self.offset[b][r] = x.minus * w.offset;
                    self.sum[b][r] = x.sum;
                } else {
                    for (h, minus) in x.minus_half.into_iter().enumerate() {
                        self.offset[2 * b + h][r] = minus * w.offset;
                        self.sum[2 * b + h][r] = -x.scale * minus as f32;
                    }
                }
            }
        }
    }
}

/// Sums of one panel for the rows of a stripe. Needs [`Tiles`] for `w` on this thread.
pub(super) fn tile(
    w: &Packed,
    _tiles: &Tiles,
    panel: Panel<'_>,
    x: &Stripe,
    sums: &mut [Row; TILE],
) {
    assert_eq!(panel.weights.len(), 8 * w.blocks);
    assert_eq!(panel.scales.len(), w.blocks * w.halves);
    assert_eq!(x.offset.len(), w.blocks * w.halves);
    assert_eq!(x.sum.len(), w.blocks * w.halves);
    assert!(x.q.len() == w.blocks && x.scale.len() == w.blocks);
    assert!(panel.mins.is_empty() || panel.mins.len() == panel.scales.len());
    // SAFETY: `dispatch::isa` said AMX, which includes AVX-512; the lengths were checked, and the tiles
    // are set up, as there is a `Tiles`.
    unsafe {
        match (w.halves, panel.mins.is_empty()) {
            (1, true) => kernel::<1, false>(w, panel, x, sums),
            (1, false) => kernel::<1, true>(w, panel, x, sums),
            (_, true) => kernel::<2, false>(w, panel, x, sums),
            (_, false) => kernel::<2, true>(w, panel, x, sums),
        }
    }
}

/// Sums of a group's products, `[activation row][weight row]`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Products([[i32; PANEL]; TILE]);

/// # Safety
/// As `tile` checks.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn kernel<const HALVES: usize, const MIN: bool>(
    w: &Packed,
    panel: Panel<'_>,
    x: &Stripe,
    sums: &mut [Row; TILE],
) {
    let groups = w.blocks * HALVES;
    let mut products = [[Products([[0; PANEL]; TILE]); AT_ONCE]; 2];
    let multiply = |first: usize, out: &mut [Products; AT_ONCE]| {
        for (at, out) in out.iter_mut().enumerate().take(groups - first) {
            let group = first + at;
            let weights = panel.weights[8 / HALVES * group..].as_ptr();
            let q = x.q[group / HALVES].as_ptr().cast::<u8>();
            let out = out.0.as_mut_ptr();
            /// One product, with sums in a tile of its own.
            macro_rules! product {
                ($sums:literal) => {
                    asm!(
                        concat!("tilezero ", $sums),
                        "tileloadd tmm4, [{q} + {row}*1]",
                        "tileloadd tmm6, [{w} + {line}*1]",
                        concat!("tdpbsud ", $sums, ", tmm4, tmm6"),
                        concat!("tilestored [{out} + {line}*1], ", $sums),
                        q = in(reg) q.add(group % HALVES * (BLOCK / HALVES)),
                        w = in(reg) weights,
                        out = in(reg) out,
                        row = in(reg) BLOCK,
                        line = in(reg) 64usize,
                        options(nostack),
                    )
                };
            }
            // SAFETY: a group's weights are 8 / HALVES lines, its activations 16 rows of the block's
            // 32 bytes, its sums a `Products`; the tiles are set up.
            unsafe {
                match at {
                    0 => product!("tmm0"),
                    1 => product!("tmm1"),
                    2 => product!("tmm2"),
                    _ => product!("tmm3"),
                }
            }
        }
    };
    let mut acc = [_mm512_setzero_ps(); TILE];
    multiply(0, &mut products[0]);
    for (turn, first) in (0..groups).step_by(AT_ONCE).enumerate() {
        let [even, odd] = &mut products;
        let (ready, next) = if turn % 2 == 0 {
            (&*even, odd)
        } else {
            (&*odd, even)
        };
        if first + AT_ONCE < groups {
            multiply(first + AT_ONCE, next);
        }
        for (at, products) in ready.iter().enumerate().take(groups - first) {
            let group = first + at;
            let (scales, offset) = (&x.scale[group / HALVES], &x.offset[group]);
            // SAFETY: a row has 16 values.
            let scale = unsafe { _mm512_loadu_ps(panel.scales[group].as_ptr()) };
            for n in 0..TILE {
                // SAFETY: as above.
                let mut sum = unsafe { _mm512_load_si512(products.0[n].as_ptr().cast()) };
                if !MIN {
                    sum = _mm512_add_epi32(sum, _mm512_set1_epi32(offset[n]));
                }
                let scale = _mm512_mul_ps(scale, _mm512_set1_ps(scales[n]));
                acc[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc[n]);
            }
            if MIN {
                // SAFETY: as above.
                let min = unsafe { _mm512_loadu_ps(panel.mins[group].as_ptr()) };
                for n in 0..TILE {
                    acc[n] = _mm512_fmadd_ps(min, _mm512_set1_ps(x.sum[group][n]), acc[n]);
                }
            }
        }
    }
    for (acc, sums) in acc.iter().zip(sums) {
        // SAFETY: a row has 16 values.
        unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), *acc) };
    }
}
