"""EleutherAI's sparsify as a peer: its training step timed, and its training on saved activations.

    python sparsify_peer.py bench --d-model 896 --d-sae 7168 --k 32 --batch 4096 --precision f32
    python sparsify_peer.py train --rows rows.safetensors --held-out held.safetensors ...

The step is that of `sparsify.Trainer` with `optimizer = adam`: unit-norm decoder, forward, backward,
the gradient along decoder rows removed, Adam, counters of what fired. The eager decoder, as the Triton
one needs a GPU. Needs `pip install torch eai-sparsify`. Prints one JSON object as its last line.
"""

import argparse
import json
import os
import statistics
import time

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"

import torch
from safetensors.torch import load_file
from sparsify import SparseCoder, SparseCoderConfig
from transformers import get_linear_schedule_with_warmup


class Run:
    """`sparsify.Trainer.fit` on rows instead of a model's hooks."""

    def __init__(self, a, mean, steps):
        cfg = SparseCoderConfig(num_latents=a.d_sae, k=a.k)
        torch.manual_seed(a.seed)
        self.sae = SparseCoder(a.d_model, cfg, dtype=torch.float32)
        self.sae.b_dec.data = mean
        lr = 2e-4 / (a.d_sae / 2**14) ** 0.5
        self.adam = torch.optim.Adam(self.sae.parameters(), lr=lr)
        self.schedule = get_linear_schedule_with_warmup(self.adam, a.warmup, steps)
        self.idle = torch.zeros(a.d_sae, dtype=torch.long)
        self.alpha, self.dead_after = a.auxk_alpha, a.dead_after
        self.autocast = a.precision == "bf16"

    def step(self, x):
        sae = self.sae
        sae.set_decoder_norm_to_unit_norm()
        dead = self.idle > self.dead_after if self.alpha > 0 else None
        variance = (x - x.mean(0)).pow(2).sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            out = sae(x=x, y=x, dead_mask=dead, total_variance=variance)
        (out.fvu + self.alpha * out.auxk_loss).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        self.adam.step()
        self.adam.zero_grad()
        self.schedule.step()
        fired = torch.zeros_like(self.idle, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        self.idle += len(x)
        self.idle[fired] = 0
        return float(out.fvu.detach())


def bench(a):
    torch.manual_seed(0)
    x = torch.randn(a.batch, a.d_model)
    run = Run(a, x.mean(0), 1000)
    run.step(x)
    seconds = []
    for _ in range(a.rounds):
        started = time.perf_counter()
        run.step(x)
        seconds.append(time.perf_counter() - started)
    step = statistics.median(seconds)
    return {"step_ms": 1e3 * step, "vectors_per_s": a.batch / step, "product_gflops": product(a)}


def product(a):
    """The encoder's product alone, in `precision`: what PyTorch's matrix library reaches."""
    dtype = torch.bfloat16 if a.precision == "bf16" else torch.float32
    x = torch.randn(a.batch, a.d_model).to(dtype)
    w = torch.randn(a.d_sae, a.d_model).to(dtype)
    seconds = []
    with torch.no_grad():
        for _ in range(3 + a.rounds):
            started = time.perf_counter()
            torch.nn.functional.linear(x, w)
            seconds.append(time.perf_counter() - started)
    return 2e-9 * a.batch * a.d_model * a.d_sae / statistics.median(seconds[3:])


def train(a):
    x = load_file(a.rows)["activations"]
    held = load_file(a.held_out)["activations"]
    a.d_model = x.shape[1]
    per_epoch = len(x) // a.batch
    steps = int(a.epochs * per_epoch)
    run = Run(a, x.mean(0), steps)
    order = None
    started = time.perf_counter()
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(x))
        at = step % per_epoch * a.batch
        run.step(x[order[at : at + a.batch]])
    seconds = time.perf_counter() - started
    error, fired = 0.0, torch.zeros(a.d_sae, dtype=torch.bool)
    with torch.no_grad():
        run.sae.set_decoder_norm_to_unit_norm()
        for rows in held.split(a.batch):
            out = run.sae(rows)
            error += float((rows - out.sae_out).double().pow(2).sum())
            fired[out.latent_indices[out.latent_acts > 0]] = True
    variance = float((held - held.mean(0)).double().pow(2).sum())
    return {
        "fvu": error / variance,
        "dead": float((run.idle > a.dead_after).float().mean()),
        "silent_on_held_out": 1.0 - float(fired.float().mean()),
        "steps": steps,
        "vectors_per_s": steps * a.batch / seconds,
    }


def main():
    p = argparse.ArgumentParser()
    p.add_argument("what", choices=["bench", "train"])
    p.add_argument("--d-model", type=int)
    p.add_argument("--d-sae", type=int, required=True)
    p.add_argument("--k", type=int, default=32)
    p.add_argument("--batch", type=int, default=4096)
    p.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--rounds", type=int, default=3, help="timed steps")
    p.add_argument("--rows", help="safetensors with activations [n, d_model]")
    p.add_argument("--held-out", help="the same, to measure on")
    p.add_argument("--epochs", type=float, default=1.0)
    p.add_argument("--warmup", type=int, default=1000)
    p.add_argument("--auxk-alpha", type=float, default=0.0)
    p.add_argument("--dead-after", type=int, default=10_000_000)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    figures = bench(a) if a.what == "bench" else train(a)
    figures |= {"precision": a.precision, "threads": a.threads, "torch": torch.__version__}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
