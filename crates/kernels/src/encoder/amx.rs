//! AMX: `tdpbf16ps` adds the products of 16 rows x 32 columns with 32 columns x 16 latents to 16 x 16
//! sums, in 16 cycles.
//!
//! Four tiles of sums take two tiles of rows and two of weights: one load for each product, which the
//! caches bear. The intrinsics are not stable, so the instructions stand in `asm!`.

use std::arch::asm;

use super::{GROUP, LATENTS, ROWS, Tile};

/// What `ldtilecfg` reads: palette 1, eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    columns: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    columns: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Sets this thread's tiles up. Call it where `dispatch` said AMX, before a product.
pub(crate) fn configure() {
    // SAFETY: `dispatch` found AMX and the system's permission; the configuration is valid.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly)) }
}

/// Gives the tiles back, so that the system need not save them.
pub(crate) fn release() {
    // SAFETY: as for `configure`.
    unsafe { asm!("tilerelease", options(nostack, nomem)) }
}

/// Asks for tiles to be brought to the L2 cache.
pub(super) fn prefetch(tiles: &[Tile]) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    for line in bytemuck::cast_slice::<_, [u8; 64]>(tiles) {
        // SAFETY: a prefetch changes nothing; every x86-64 has it.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) }
    }
}

/// Sums of [`ROWS`] rows, `[2, depth]` tiles, with the latents of `tiles`, `[latents / 16, depth]`.
pub(super) fn block(x: &[Tile], tiles: &[Tile], depth: usize, sums: &mut [f32]) {
    assert!(depth > 0 && x.len() == ROWS / 16 * depth);
    assert!(tiles.len() / depth * LATENTS <= GROUP && sums.len() >= ROWS * GROUP);
    for (at, pair) in tiles.chunks_exact(2 * depth).enumerate() {
        let sums = &mut sums[at * 2 * LATENTS..];
        let (x, w) = ([&x[..depth], &x[depth..]], [&pair[..depth], &pair[depth..]]);
        // SAFETY: `configure` ran on this thread; two by two tiles of sums end in the last of ROWS rows,
        // before `latents`.
        unsafe {
            let base = sums.as_mut_ptr();
            let to = |row: usize, latent: usize| base.add(row * GROUP + latent);
            let to = [[to(0, 0), to(0, LATENTS)], [to(16, 0), to(16, LATENTS)]];
            two_by_two(x, w, to, GROUP);
        }
    }
}

/// Sums of two tiles of rows with two of outputs, each of as many tiles of columns: those of rows `i` and
/// outputs `j` go to `sums[i][j]`, whose rows are `stride` floats apart.
///
/// # Safety
/// [`configure`] ran on this thread. Nobody else accesses the 16 rows of 16 floats at each of `sums`.
pub(crate) unsafe fn two_by_two(
    x: [&[Tile]; 2],
    w: [&[Tile]; 2],
    sums: [[*mut f32; 2]; 2],
    stride: usize,
) {
    let depth = x[0].len();
    assert!(depth > 0 && x[1].len() == depth && w.iter().all(|w| w.len() == depth));
    // SAFETY: the caller's promise; all operands are `depth` tiles.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{x0} + {line}*1]",
            "tileloadd tmm6, [{w0} + {line}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{w1} + {line}*1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{x1} + {line}*1]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {x0}, 1024",
            "add {x1}, 1024",
            "add {w0}, 1024",
            "add {w1}, 1024",
            "dec {depth}",
            "jnz 2b",
            "tilestored [{s00} + {row}*1], tmm0",
            "tilestored [{s01} + {row}*1], tmm1",
            "tilestored [{s10} + {row}*1], tmm2",
            "tilestored [{s11} + {row}*1], tmm3",
            x0 = inout(reg) x[0].as_ptr() => _,
            x1 = inout(reg) x[1].as_ptr() => _,
            w0 = inout(reg) w[0].as_ptr() => _,
            w1 = inout(reg) w[1].as_ptr() => _,
            s00 = in(reg) sums[0][0],
            s01 = in(reg) sums[0][1],
            s10 = in(reg) sums[1][0],
            s11 = in(reg) sums[1][1],
            line = in(reg) 64usize,
            row = in(reg) 4 * stride,
            depth = inout(reg) depth => _,
            options(nostack),
        );
    }
}

/// Runs `rounds` times four products that read no memory.
pub(crate) fn spin(rounds: usize) {
    configure();
    // SAFETY: the tiles are set up; no memory is accessed.
    unsafe {
        asm!(
            "tilezero tmm4",
            "tilezero tmm5",
            "tilezero tmm6",
            "tilezero tmm7",
            "2:",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "dec {rounds}",
            "jnz 2b",
            rounds = inout(reg) rounds.max(1) => _,
            options(nostack, nomem),
        );
    }
    release();
}
