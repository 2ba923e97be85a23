"""Makes tiny SAEs in the formats of other libraries, with their codes and reconstructions.

    python make_saes.py ../saes

Each folder of `../saes` is as its library writes it (SAELens, sparsify and dictionary_learning by
their own `save`), plus `golden.safetensors`: rows `x [n, d]`, activations `acts [n, m]` and
reconstructions `x_hat [n, d_out]`, computed by that library. openai, Gemma Scope, Llama Scope and the
Phi-3 files have no library that installs: theirs are written here and computed by the documented
equations in numpy (`by_equations`).

    pip install sae-lens==6.54.12 eai-sparsify==1.3.3 dictionary-learning==0.1.0 -r requirements.txt
"""

import json
import os
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernels need a GPU
D, M, K, N = 8, 24, 4, 12
OUT = Path(sys.argv[1])
rng = np.random.default_rng(11)


def noise(*shape, scale=0.5):
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def tensor(*shape, scale=0.5):
    return torch.from_numpy(noise(*shape, scale=scale))


def golden(name, x, acts, x_hat):
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    out = {"x": x, "acts": acts.to_dense() if acts.is_sparse else acts, "x_hat": x_hat}
    save_file({k: v.detach().float().contiguous() for k, v in out.items()}, folder / "golden.safetensors")
    active = (out["acts"] > 0).sum().item()
    assert 0 < active < out["acts"].numel(), name
    return folder


X = tensor(N, D, scale=2.0) + 0.3


def fill(module, **scales):
    """Random parameters, so that no bias or threshold is left at its initial zero."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(tensor(*p.shape, scale=scales.get(name, 0.4)))
            if name == "threshold":
                p.abs_()


def saelens():
    from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
    from sae_lens.saes.transcoder import (
        JumpReLUTranscoder,
        JumpReLUTranscoderConfig,
        SkipTranscoder,
        SkipTranscoderConfig,
        Transcoder,
        TranscoderConfig,
    )

    plain = dict(d_in=D, d_sae=M)
    over = dict(d_in=D, d_sae=M, d_out=D - 2, apply_b_dec_to_input=False)
    for name, cls, cfg in [
        ("topk", TopKSAE, TopKSAEConfig(k=K, **plain)),
        ("topk-rescaled", TopKSAE, TopKSAEConfig(k=K, rescale_acts_by_decoder_norm=True, **plain)),
        ("topk-layer-norm", TopKSAE, TopKSAEConfig(k=K, normalize_activations="layer_norm", **plain)),
        ("standard", StandardSAE, StandardSAEConfig(**plain)),
        ("standard-rescaled-input", StandardSAE, StandardSAEConfig(normalize_activations="constant_norm_rescale", **plain)),
        ("standard-uncentred", StandardSAE, StandardSAEConfig(apply_b_dec_to_input=False, **plain)),
        ("jumprelu", JumpReLUSAE, JumpReLUSAEConfig(**plain)),
        ("gated", GatedSAE, GatedSAEConfig(**plain)),
        ("transcoder", Transcoder, TranscoderConfig(**over)),
        ("skip-transcoder", SkipTranscoder, SkipTranscoderConfig(**over)),
        ("jumprelu-transcoder", JumpReLUTranscoder, JumpReLUTranscoderConfig(**over)),
    ]:
        cfg.metadata.model_name = "tiny"
        cfg.metadata.hook_name = "blocks.1.hook_resid_post"
        sae = cls(cfg)
        fill(sae)
        with torch.no_grad():
            acts = sae.encode(X)
            x_hat = sae(X)
        folder = golden(f"saelens-{name}", X, acts, x_hat)
        sae.save_model(folder)

    # The flat layout, whose writer is gone; this library still reads it.
    folder = OUT / "saelens-flat-topk"
    folder.mkdir(parents=True, exist_ok=True)
    state = {"W_enc": tensor(D, M), "W_dec": tensor(M, D), "b_enc": tensor(M), "b_dec": tensor(D)}
    save_file(state, folder / "sae_weights.safetensors")
    cfg = {
        "d_in": D, "d_sae": M, "dtype": "float32", "device": "cpu", "model_name": "tiny",
        "hook_point": "blocks.1.hook_resid_post", "hook_point_layer": 1, "hook_point_head_index": None,
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False, "normalize_activations": "none", "context_size": 128,
        "prepend_bos": True, "dataset_path": "none", "sae_lens_training_version": "3.20.0",
    }
    (folder / "cfg.json").write_text(json.dumps(cfg))
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    with torch.no_grad():
        golden("saelens-flat-topk", X, sae.encode(X), sae(X))


def sparsify():
    from sparsify import SparseCoder, SparseCoderConfig

    for name, cfg in [
        ("topk", SparseCoderConfig(expansion_factor=M // D, k=K)),
        ("skip-transcoder", SparseCoderConfig(num_latents=M, k=K, transcode=True, skip_connection=True)),
    ]:
        coder = SparseCoder(D, cfg)
        fill(coder)
        with torch.no_grad():
            top, idx, _ = coder.encode(X)
            acts = torch.zeros(N, M).scatter(1, idx, top)
            x_hat = coder(X).sae_out
        folder = golden(f"sparsify-{name}", X, acts, x_hat)
        coder.save_to_disk(folder)


def dictionary_learning():
    from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    for name, ae in [
        ("standard", AutoEncoder(D, M)),
        ("new", AutoEncoderNew(D, M)),
        ("gated", GatedAutoEncoder(D, M)),
        ("topk", AutoEncoderTopK(D, M, K)),
        ("batch-topk", BatchTopKSAE(D, M, K)),
        ("matryoshka", MatryoshkaBatchTopKSAE(D, M, K, [6, 6, 12])),
        ("jumprelu", JumpReluAutoEncoder(D, M)),
    ]:
        fill(ae)
        if name in ("batch-topk", "matryoshka"):
            ae.threshold.fill_(0.4)
        with torch.no_grad():
            acts, x_hat = ae.encode(X), ae(X)
        folder = golden(f"dictionary-learning-{name}", X, acts, x_hat)
        torch.save(ae.state_dict(), folder / "ae.pt")
        trainer = {
            "dict_class": type(ae).__name__, "activation_dim": D, "dict_size": M, "k": K,
            "lm_name": "tiny", "layer": 1, "submodule_name": "resid_post_layer_1",
        }
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"d_submodule": D}}))


def by_equations():
    x = X.numpy()
    relu = lambda v: np.maximum(v, 0)

    def done(name, acts, x_hat):
        return golden(name, X, torch.from_numpy(acts.astype(np.float32)), torch.from_numpy(x_hat.astype(np.float32)))

    # openai
    enc, dec, b, pre = noise(M, D), noise(D, M), noise(M), noise(D)
    mean, std = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
    p = ((x - mean) / (std + 1e-5) - pre) @ enc.T + b
    cut = np.sort(p, 1)[:, -K][:, None]
    acts = relu(p) * (p >= cut)
    folder = done("openai-topk", acts, (acts @ dec.T + pre) * std + mean)
    state = OrderedDict({
        "pre_bias": torch.from_numpy(pre), "encoder.weight": torch.from_numpy(enc),
        "latent_bias": torch.from_numpy(b), "decoder.weight": torch.from_numpy(dec.T.copy()).T,
        "stats_last_nonzero": torch.zeros(M, dtype=torch.long),
        "activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"},
    })
    torch.save(state, folder / "sae.pt")

    # Gemma Scope, both
    p = dict(W_enc=noise(D, M), W_dec=noise(M, D), b_enc=noise(M), b_dec=noise(D), threshold=np.abs(noise(M)))
    pre = x @ p["W_enc"] + p["b_enc"]
    acts = relu(pre) * (pre > p["threshold"])
    x_hat = acts @ p["W_dec"] + p["b_dec"]
    folder = done("gemma-scope", acts, x_hat)
    np.savez(folder / "params.npz", **p)
    skip = noise(D, D)
    folder = done("gemma-scope-2-transcoder", acts, x_hat + x @ skip)
    lower = {k.lower(): torch.from_numpy(v) for k, v in p.items()}
    save_file({**lower, "affine_skip_connection": torch.from_numpy(skip)}, folder / "params.safetensors")

    # Llama Scope
    enc, dec, b, b_dec, norm, threshold = noise(M, D), noise(D, M), noise(M), noise(D), 7.0, 0.5
    s = np.sqrt(D) / norm
    p = (x * s) @ enc.T + b
    acts = relu(p) * (p > threshold * s)
    folder = done("llama-scope", acts, (acts @ dec.T + b_dec) / s)
    (folder / "checkpoints").mkdir(exist_ok=True)
    save_file({
        "encoder.weight": torch.from_numpy(enc), "encoder.bias": torch.from_numpy(b),
        "decoder.weight": torch.from_numpy(dec), "decoder.bias": torch.from_numpy(b_dec),
    }, folder / "checkpoints" / "final.safetensors")
    (folder / "hyperparams.json").write_text(json.dumps({
        "d_model": D, "d_sae": M, "jump_relu_threshold": threshold, "act_fn": "jumprelu",
        "hook_point_in": "blocks.1.hook_resid_post", "hook_point_out": "blocks.1.hook_resid_post",
        "dataset_average_activation_norm": {"in": norm, "out": norm}, "norm_activation": "dataset-wise",
    }))

    # Phi-3
    enc, dec, b, b_dec = noise(D, M), noise(M, D), noise(M), noise(D)
    s_gate, b_gate, factor, norm = noise(M), noise(M), np.array([1.5], np.float32), np.array([5.0], np.float32)
    q = (x * np.sqrt(D) / norm) @ enc
    acts = (q + b > 0) * relu(q * np.log1p(np.exp(s_gate)) * factor + b_gate)
    folder = done("phi3", acts, acts @ dec + b_dec)
    save_file({k: torch.from_numpy(v) for k, v in dict(
        W_enc=enc, W_dec=dec, b_enc=b, b_dec=b_dec, s_gate=s_gate, b_gate=b_gate,
        scaling_factor=factor, mean_norm=norm,
    ).items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text("")


if __name__ == "__main__":
    torch.manual_seed(11)
    for make in [saelens, sparsify, dictionary_learning, by_equations]:
        make()
