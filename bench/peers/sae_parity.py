"""Same rows, same steps: the FVU of demur's SAE and of sparsify's, on held-out rows.

    python sae_parity.py --demur target/release/demur --prompts prompts.jsonl --limit 500 > parity.json

`demur harvest` writes activations of the default model; attention sinks are dropped, rows scaled to a mean
norm of sqrt(d_model), a tenth held out. Both then train the same number of steps with the same batch,
learning rate, warm-up and decay, each with its own initialisation and order of rows, for each seed.
With --rows FILE, activations that are there are taken. Needs torch and eai-sparsify.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent


def last_line(command):
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--demur", default="demur")
    p.add_argument("--prompts", help="JSONL of prompts to harvest; demur's own if not given")
    p.add_argument("--limit", type=int, default=1000, help="prompts at most")
    p.add_argument("--site", default="blocks.12.hook_resid_post")
    p.add_argument("--rows", help="activations that were harvested before")
    p.add_argument("--d-sae", type=int, default=7168)
    p.add_argument("--k", type=int, default=32)
    p.add_argument("--batch", type=int, default=2048)
    p.add_argument("--epochs", type=float, default=10.0)
    p.add_argument("--warmup", type=int, default=50)
    p.add_argument("--auxk-alpha", type=float, default=0.0)
    p.add_argument("--seeds", type=int, default=1)
    p.add_argument("--precisions", nargs="+", default=["f32", "bf16"], help="of demur")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rows = a.rows
        if rows is None:
            rows = str(folder / "harvest.safetensors")
            command = [a.demur, "harvest", "--site", a.site, "--limit", str(a.limit), "--out", rows]
            subprocess.run(command + (["--prompts", a.prompts] if a.prompts else []), check=True, stdout=sys.stderr)
        x = load_file(rows)["activations"]
        norms = np.linalg.norm(x, axis=1)
        x = x[norms <= 10 * np.median(norms)]
        x *= np.sqrt(x.shape[1]) / np.linalg.norm(x, axis=1).mean()
        x = x[np.random.default_rng(0).permutation(len(x))]
        cut = len(x) // 10
        save_file({"activations": x[:cut]}, folder / "held.safetensors")
        save_file({"activations": x[cut:]}, folder / "rows.safetensors")
        train = len(x) - cut
        steps = int(a.epochs * (train // a.batch))
        same = {
            "--d-sae": a.d_sae,
            "--k": a.k,
            "--batch": a.batch,
            "--epochs": a.epochs,
            "--warmup": a.warmup,
            "--auxk-alpha": a.auxk_alpha,
            "--dead-after": train,
        }
        same = [str(word) for pair in same.items() for word in pair]
        held = ["--held-out", str(folder / "held.safetensors")]
        runs = []
        for seed in range(a.seeds):
            script = [sys.executable, str(HERE / "sparsify_peer.py"), "train"]
            theirs = last_line([*script, "--rows", str(folder / "rows.safetensors"), *held, *same, "--seed", str(seed)])
            ours = {}
            for precision in a.precisions:
                command = [a.demur, "sae", "fit", str(folder / "rows.safetensors"), *held, *same]
                command += ["--seed", str(seed), "--decay", str(1 - a.warmup / steps), "--outlier", "1e9"]
                command += ["--out", str(folder / f"{precision}{seed}"), "--checkpoint-every", "1000000", "--json"]
                figures = last_line(command + (["--f32"] if precision == "f32" else []))
                ours[precision] = {
                    "fvu": figures["held_out"]["fvu"],
                    "dead": figures["last"]["dead"],
                    "silent_on_held_out": figures["held_out"]["dead"],
                    "vectors_per_s": figures["vectors_per_s"],
                }
            runs.append({"seed": seed, "sparsify_f32": theirs, "demur": ours})
        ratio = {
            precision: float(np.mean([r["demur"][precision]["fvu"] / r["sparsify_f32"]["fvu"] for r in runs]))
            for precision in a.precisions
        }
        settings = {k: v for k, v in vars(a).items() if k not in ("demur", "prompts", "rows")}
        print(json.dumps({"fvu_ratio": ratio, "train_rows": train, "steps": steps, "runs": runs, "settings": settings}))


if __name__ == "__main__":
    main()
