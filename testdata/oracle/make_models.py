"""Makes the tiny checkpoints and their golden outputs (see ../README.md).

For every family: random weights under a `config.json` as published models have it, the outputs of
`transformers` in f32 (eager attention), and, where llama.cpp's converter knows the family, the same
weights as GGUF under that converter's names and conventions.

    python make_models.py ../models        # all
    python make_models.py ../models phi3   # one

Versions that made the committed files: `requirements.txt`.
"""

import json
import math
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 96
TOKENS = 24

COMMON = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    rope_theta=10000.0,
)

GEMMA = dict(
    head_dim=16,
    hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh",
    tie_word_embeddings=True,
    query_pre_attn_scalar=16,
    rms_norm_eps=1e-6,
    sliding_window=6,
)

# The sliding windows are shorter than the sequence, LongRoPE's original context too.
FAMILIES = {
    "llama": dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        max_position_embeddings=128,
        rope_scaling=dict(
            rope_type="llama3",
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "mistral": dict(
        model_type="mistral",
        architectures=["MistralForCausalLM"],
        sliding_window=7,
        head_dim=16,
    ),
    "qwen2": dict(
        model_type="qwen2",
        architectures=["Qwen2ForCausalLM"],
        tie_word_embeddings=True,
        use_sliding_window=False,
        sliding_window=8,
        max_window_layers=1,
        rope_theta=1000000.0,
    ),
    "qwen3": dict(
        model_type="qwen3",
        architectures=["Qwen3ForCausalLM"],
        head_dim=16,
        attention_bias=False,
        use_sliding_window=False,
    ),
    "phi3": dict(
        model_type="phi3",
        architectures=["Phi3ForCausalLM"],
        num_key_value_heads=4,
        sliding_window=9,
    ),
    "phi3-longrope": dict(
        model_type="phi3",
        architectures=["Phi3ForCausalLM"],
        original_max_position_embeddings=16,
        partial_rotary_factor=0.5,
        rope_scaling=dict(
            type="longrope",
            short_factor=[1.0, 1.25],
            long_factor=[1.5, 3.0],
        ),
    ),
    "gemma2": dict(
        model_type="gemma2",
        architectures=["Gemma2ForCausalLM"],
        num_hidden_layers=3,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
        **GEMMA,
    ),
    "gemma3": dict(
        model_type="gemma3_text",
        architectures=["Gemma3ForCausalLM"],
        num_hidden_layers=7,
        intermediate_size=32,
        rope_theta=1000000.0,
        rope_local_base_freq=10000.0,
        rope_scaling=dict(rope_type="linear", factor=8.0),
        sliding_window_pattern=6,
        **GEMMA,
    ),
}


def randomise(model, seed):
    """Weights with every part of the model at work; rounded to bf16, so that files are exact."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                centre = 0.0 if "gemma" in model.config.model_type else 1.0
                p.copy_(centre + 0.2 * noise)
            elif name.endswith("bias"):
                p.copy_(0.3 * noise)
            elif "embed_tokens" in name:
                p.copy_(noise * (0.3 if model.config.tie_word_embeddings else 1.0))
            else:
                p.copy_(noise * 1.5 / math.sqrt(p.shape[1]))
            p.copy_(p.to(torch.bfloat16).to(torch.float32))


def golden(model, tokens):
    """Residuals and logits of one sequence: pre is [d], mid and post are [layers, n, d]."""
    got = {"mid": [], "post": []}

    def keep(name):
        return lambda _module, args: got[name].append(args[0].detach()[0].clone())

    hooks = []
    layers = model.model.layers
    for i, layer in enumerate(layers):
        sandwich = hasattr(layer, "pre_feedforward_layernorm")
        norm = layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm
        hooks.append(norm.register_forward_pre_hook(keep("mid")))
        after = layers[i + 1].input_layernorm if i + 1 < len(layers) else model.model.norm
        hooks.append(after.register_forward_pre_hook(keep("post")))
    pre = []
    hooks.append(layers[0].input_layernorm.register_forward_pre_hook(
        lambda _m, args: pre.append(args[0].detach()[0].clone())))
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return {
        "tokens": torch.tensor(tokens, dtype=torch.int32),
        "resid_pre": pre[0],
        "resid_mid": torch.stack(got["mid"]),
        "resid_post": torch.stack(got["post"]),
        "logits": logits.contiguous(),
    }


# ---------------------------------------------------------------------------------------- GGUF

ARCH = {"gemma3_text": "gemma3"}

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name, sandwich):
    stem, end = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.{end}"
    _, _, layer, part = stem.split(".", 3)
    if part == "post_attention_layernorm":
        part = "post_attention_norm" if sandwich else "ffn_norm"
    else:
        part = NAMES[part]
    return f"blk.{layer}.{part}.{end}"


def interleave(w, heads):
    """llama.cpp's order of the rows of queries and keys: pairs (i, i + half) next to each other."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(path, config, state, quantise=lambda name: None, tokenizer=None):
    kind = config["model_type"]
    arch = ARCH.get(kind, kind)
    gemma = arch.startswith("gemma")
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    d_head = config.get("head_dim", config["hidden_size"] // heads)
    w = gguf.GGUFWriter(path, arch)
    w.add_block_count(config["num_hidden_layers"])
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(heads)
    w.add_head_count_kv(kv)
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_freq_base(config["rope_theta"])
    if "head_dim" in config:
        w.add_key_length(d_head)
        w.add_value_length(d_head)
    rot = int(d_head * config.get("partial_rotary_factor", 1.0))
    if arch in ("llama", "phi3"):
        w.add_rope_dimension_count(rot)
    if config.get("sliding_window") and arch not in ("llama", "qwen2", "qwen3"):
        w.add_sliding_window(config["sliding_window"])
    if "attn_logit_softcapping" in config:
        w.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        w.add_final_logit_softcapping(config["final_logit_softcapping"])
    scaling = config.get("rope_scaling") or {}
    rope = scaling.get("rope_type", scaling.get("type"))
    extra = {}
    if rope == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(scaling["factor"])
    elif rope == "llama3":
        extra["rope_freqs.weight"] = llama3_divisors(config["rope_theta"], rot, scaling)
    elif rope == "longrope":
        original = config["original_max_position_embeddings"]
        ratio = config["max_position_embeddings"] / original
        w.add_rope_scaling_orig_ctx_len(original)
        w.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(ratio) / math.log(original)))
        for length in ("short", "long"):
            factors = np.array(scaling[f"{length}_factor"], dtype=np.float32)
            extra[f"rope_factors_{length}.weight"] = factors
    if tokenizer:
        tokenizer(w)
    for name, tensor in extra.items():
        w.add_tensor(name, tensor)
    for name, tensor in state.items():
        value = tensor.to(torch.float32).numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            value = interleave(value, heads if "q_proj" in name else kv)
        if gemma and name.endswith("norm.weight"):
            value = value + 1.0
        target = gguf_name(name, gemma)
        ty = quantise(target) if value.ndim == 2 else None
        if ty in FACTORS:
            w.add_tensor(target, random_blocks(value, ty), raw_dtype=ty)
        elif ty:
            w.add_tensor(target, gguf.quants.quantize(value, ty), raw_dtype=ty)
        elif value.ndim == 2:
            bf16 = torch.from_numpy(np.ascontiguousarray(value)).to(torch.bfloat16)
            raw = bf16.view(torch.uint8).numpy()
            w.add_tensor(target, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            w.add_tensor(target, np.ascontiguousarray(value, dtype=np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def llama3_divisors(base, dim, scaling):
    """What a frequency is divided by, as llama.cpp's converter computes it."""
    low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
    high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
    out = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * base ** (i / dim)
        if wavelength < high:
            out.append(1.0)
        elif wavelength > low:
            out.append(scaling["factor"])
        else:
            smooth = (scaling["original_max_position_embeddings"] / wavelength - scaling["low_freq_factor"]) / (
                scaling["high_freq_factor"] - scaling["low_freq_factor"])
            out.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(out, dtype=np.float32)


# ---------------------------------------------------------------------------------------- chat

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["e r", "i n", "t h", "Ġ t", "th e", "Ġt h", "Ġth e", "o n", "r e", "a n", "Ġ a", "in g", "Ġ s", "o r", "e n", "Ã ©"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokens():
    """The 256 characters that byte-level BPE writes bytes with, in order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(rest)) for b in range(256)]


def chat_tokenizer(w):
    tokens = byte_tokens() + [m.replace(" ", "") for m in MERGES] + CONTROL
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("qwen2")
    w.add_token_list(tokens)
    w.add_token_types([1] * (len(tokens) - len(CONTROL)) + [3] * len(CONTROL))
    w.add_token_merges(MERGES)
    w.add_bos_token_id(tokens.index("<|endoftext|>"))
    w.add_eos_token_id(tokens.index("<|im_end|>"))
    w.add_add_bos_token(False)
    w.add_chat_template(TEMPLATE)


def chat_config():
    vocab = 256 + len(MERGES) + len(CONTROL)
    return {**COMMON, **FAMILIES["qwen2"], "hidden_size": 64, "intermediate_size": 96,
            "vocab_size": vocab, "max_position_embeddings": 256, "rope_theta": 10000.0}


def quantised(name):
    """The mix of types of a Q4_K_M file, in types whose blocks fit the width."""
    types = gguf.GGMLQuantizationType
    for part, ty in (("token_embd", types.Q8_0), ("attn_v", types.Q8_0), ("ffn_down", types.Q5_1),
                     ("ffn_up", types.Q4_1), ("attn_q", types.Q5_0)):
        if part in name:
            return ty
    return types.Q4_0


# Where a block of these types keeps its f16 factors, and the factor that gives values of size 1.
FACTORS = {
    gguf.GGMLQuantizationType.Q2_K: {80: 0.1, 82: 0.1},
    gguf.GGMLQuantizationType.Q3_K: {108: 0.025},
    gguf.GGMLQuantizationType.Q4_K: {0: 0.005, 2: 0.037},
    gguf.GGMLQuantizationType.Q5_K: {0: 0.0025, 2: 0.037},
    gguf.GGMLQuantizationType.Q6_K: {208: 0.0007},
}


def random_blocks(value, ty):
    """Random blocks of a type that the package reads but does not write, of about `value`'s size."""
    rng = np.random.default_rng(int(ty) * 1000 + value.shape[0])
    length, size = gguf.GGML_QUANT_SIZES[ty]
    data = rng.integers(0, 256, size=(value.shape[0], value.shape[1] // length, size), dtype=np.uint8)
    for at, factor in FACTORS[ty].items():
        factors = factor * value.std() * rng.uniform(0.8, 1.2, size=(*data.shape[:2], 1))
        data[:, :, at : at + 2] = factors.astype(np.float16).view(np.uint8)
    return data.reshape(value.shape[0], -1)


def k_quantised(name):
    """Every K type once a layer."""
    types = gguf.GGMLQuantizationType
    for part, ty in (("attn_q", types.Q2_K), ("attn_k", types.Q3_K), ("attn_v", types.Q6_K),
                     ("attn_output", types.Q5_K), ("ffn_down", types.Q3_K)):
        if part in name:
            return ty
    return types.Q4_K


def build(config, folder, seed):
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    loaded = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(loaded, attn_implementation="eager").float().eval()
    randomise(model, seed)
    state = {k: v for k, v in model.state_dict().items()
             if not (config["tie_word_embeddings"] and k == "lm_head.weight")}
    return model, state


def sequence(seed, vocab, n):
    return torch.randint(3, vocab, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def family(name, out):
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    config = {**COMMON, **FAMILIES[name]}
    seed = 1 + list(FAMILIES).index(name)
    model, state = build(config, folder, seed)
    save_file({k: v.to(torch.bfloat16) for k, v in state.items()}, folder / "model.safetensors")
    # llama.cpp has no family with Mistral's window.
    if name != "mistral":
        write_gguf(folder / "model.gguf", config, state)
    tokens = sequence(seed, VOCAB, TOKENS)
    save_file(golden(model, tokens), folder / "golden.safetensors")
    if name == "phi3-longrope":
        save_file(golden(model, tokens[:12]), folder / "golden-short.safetensors")


def quantised_model(name, out, config, seed, quantise, tokenizer=None):
    """A quantised GGUF; the golden outputs are of the dequantised weights."""
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    model, state = build(config, folder, seed)
    (folder / "config.json").unlink()
    write_gguf(folder / "model.gguf", config, state, quantise, tokenizer)
    back = {gguf_name(name, False): p for name, p in model.named_parameters()}
    with torch.no_grad():
        for tensor in gguf.GGUFReader(folder / "model.gguf").tensors:
            value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            back[tensor.name].copy_(torch.from_numpy(value.copy()).reshape(back[tensor.name].shape))
    save_file(golden(model, sequence(seed, config["vocab_size"], TOKENS)), folder / "golden.safetensors")


def k_quants(out):
    """The types of 256 values a block need rows of that width."""
    config = {**COMMON, **FAMILIES["qwen2"], "hidden_size": 256, "intermediate_size": 256,
              "num_hidden_layers": 1}
    quantised_model("k-quants", out, config, 101, k_quantised)


def chat(out):
    """A tokenizer and a chat template too."""
    quantised_model("chat", out, chat_config(), 100, quantised, chat_tokenizer)


def sharded(out):
    """Llama without rope scaling as published large models are: f16, in two files under an index."""
    folder = out / "llama-sharded"
    folder.mkdir(parents=True, exist_ok=True)
    config = {**COMMON, **FAMILIES["llama"]}
    del config["rope_scaling"]
    model, _ = build(config, folder, 102)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(torch.float16).to(torch.float32))
    save_file(golden(model, sequence(102, VOCAB, TOKENS)), folder / "golden.safetensors")
    model.to(torch.float16).save_pretrained(folder, max_shard_size="24KB")
    (folder / "generation_config.json").unlink(missing_ok=True)


SPECIAL = {"chat": chat, "k-quants": k_quants, "llama-sharded": sharded}


def main():
    out = Path(sys.argv[1])
    for name in sys.argv[2:] or [*FAMILIES, *SPECIAL]:
        SPECIAL[name](out) if name in SPECIAL else family(name, out)
        print(name)


main()
