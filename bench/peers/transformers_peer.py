"""transformers on PyTorch as a peer: the figures of `demur bench lm` on the same GGUF, dequantised.

    python transformers_peer.py --model FILE.gguf --precision bf16 --threads 2

The load is that of `demur bench lm`: a prompt of 512, tokens after it, 16 sequences after prompts of 64,
and a harvest of 4 x 256 up to the last block without the head. `generate` would add its own cost to each
token, so passes are called one by one. Each figure is the median of three after one pass that warms up.
Needs `pip install torch transformers gguf`. Prints one JSON object as its last line.
"""

import argparse
import json
import os
import statistics
import time

import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

PROMPT, STEPS, BATCH, BATCH_PROMPT, REPEATS = 512, 32, 16, 64, 3


def tokens(sequences, n, vocabulary):
    """The ids of `bench/peers/src/llama_cpp.rs`."""
    at = torch.arange(sequences * n).reshape(sequences, n) + 1
    return (at * 2_654_435_769 >> 7) % vocabulary


def timed(f):
    started = time.perf_counter()
    f()
    return time.perf_counter() - started


def decoded(model, sequences, prompt, vocabulary):
    """Seconds of the prompts and of `STEPS` passes of one token a sequence."""
    cache = DynamicCache()

    def feed(n):
        ids = tokens(sequences, n, vocabulary)
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    first = timed(lambda: feed(prompt))
    return first, sum(timed(lambda: feed(1)) for _ in range(STEPS))


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--model", required=True)
    p.add_argument("--precision", choices=["f32", "bf16"], required=True)
    p.add_argument("--threads", type=int, required=True)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.set_grad_enabled(False)
    folder, name = os.path.split(os.path.abspath(a.model))
    dtype = torch.bfloat16 if a.precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype).eval()
    if any(type(m).__name__ == "GgufLinear" for m in model.modules()):
        raise SystemExit("transformers keeps the weights packed here: take the package `kernels` out")
    vocabulary = model.config.get_text_config().vocab_size
    figures = {k: [] for k in ["prefill_tok_s", "decode_tok_s", "decode16_tok_s", "harvest_tok_s"]}
    for repeat in range(REPEATS + 1):
        prompt, steps = decoded(model, 1, PROMPT, vocabulary)
        _, many = decoded(model, BATCH, BATCH_PROMPT, vocabulary)
        ids = tokens(4, 256, vocabulary)
        harvest = timed(lambda: model.model(ids, use_cache=False))
        if repeat > 0:
            figures["prefill_tok_s"].append(PROMPT / prompt)
            figures["decode_tok_s"].append(STEPS / steps)
            figures["decode16_tok_s"].append(BATCH * STEPS / many)
            figures["harvest_tok_s"].append(4 * 256 / harvest)
    medians = {k: statistics.median(v) for k, v in figures.items()}
    print(json.dumps({**medians, "threads": a.threads}))


if __name__ == "__main__":
    main()
