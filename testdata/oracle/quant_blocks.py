"""Writes `crates/kernels/testdata/quant_blocks.bin`: random blocks of every GGUF type that demur
computes with, and the values that the reference package dequantises them to.

Run from the repository's root, with `pip install gguf==0.19.0 numpy`:

    python testdata/oracle/quant_blocks.py

Format, little endian, one record a type until the end of the file: type id (u32), number of values
(u32), the blocks, the values (f32).
"""

from pathlib import Path
import struct

import gguf
import numpy as np

BLOCKS = 3
OUT = Path("crates/kernels/testdata/quant_blocks.bin")

# Where a block keeps its f16 factors: there random bits would be infinities and NaN.
FACTORS = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}


def blocks(name: str, rng: np.random.Generator) -> np.ndarray:
    kind = gguf.GGMLQuantizationType[name]
    length, size = gguf.GGML_QUANT_SIZES[kind]
    if length == 1:
        x = rng.normal(size=32).astype(np.float32)
        x[:4] = [0.0, -0.0, 1e-6, -65504.0]
        return gguf.quants.quantize(x, kind).view(np.uint8)
    data = rng.integers(0, 256, size=(BLOCKS, size), dtype=np.uint8)
    for at in FACTORS[name]:
        factor = rng.normal(scale=0.02, size=(BLOCKS, 1)).astype(np.float16)
        data[:, at : at + 2] = factor.view(np.uint8)
    return data.reshape(-1)


def main() -> None:
    rng = np.random.default_rng(2)
    with OUT.open("wb") as out:
        for name in ["F32", "F16", "BF16", *FACTORS]:
            kind = gguf.GGMLQuantizationType[name]
            data = blocks(name, rng)
            values = gguf.quants.dequantize(data, kind).astype("<f4").reshape(-1)
            out.write(struct.pack("<II", int(kind), values.size))
            out.write(data.tobytes())
            out.write(values.tobytes())


if __name__ == "__main__":
    main()
