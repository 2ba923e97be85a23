"""Golden outputs of real checkpoints: what `transformers` says on the same weights, dequantised to f32.

    python parity.py MODEL.gguf --name qwen2.5-coder-0.5b-instruct --text text.jsonl.gz -o ../parity

writes `../parity/NAME.json`:

- `prompts`: ten prompts of ours, their ids (through the checkpoint's chat template where it has one,
  with the BOS token where the tokenizer adds it), and the greedy continuation of 64 tokens: at each
  step the most probable token, its log-probability and the runner-up's. Generation does not stop at
  an end token, so that all continuations are of one length.
- `texts`: the texts of `difficult.py` with their ids, control tokens as plain characters and parsed.
- `perplexity`: `exp` of the mean negative log-likelihood over the text. The `text` of the file's
  rows, in order, is tokenised row by row without special tokens and joined; the ids are cut into
  consecutive windows of 512 positions (511 and the BOS token where the tokenizer adds it) until
  40 are full. Each window is independent and its first position is not scored. No text is kept:
  only the file's sha256, and that of the ids as little-endian u32.

A second engine must give the same continuations, or, where it first differs, a top-1 log-probability
within 0.05 of ours there; and the same perplexity within 0.5 %.

Versions that made the committed files: `requirements.txt`.
"""

import argparse
import gzip
import hashlib
import json
import math
from pathlib import Path

import gguf
import torch
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from difficult import TEXTS

STEPS = 64
WINDOW = 512
WINDOWS = 40

PROMPTS = [
    "What is the capital of Australia?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Explain in two sentences why the sky is blue.",
    "Translate 'good morning, my friend' into French and German.",
    "List five uses of an old newspaper.",
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey?",
    "Write a short poem about the sea in winter.",
    "How do I make a pot of green tea?",
    "Can you explain to me how a pin tumbler lock works?",
    "Give me the opening line of a detective story set in Lisbon.",
]

# A base model has no turns: it continues prose.
OPENINGS = [
    "The capital of Australia is",
    "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
    "The sky is blue because",
    "The most useful French phrases for travellers are:\n\n1.",
    "An old newspaper can be used in many ways. For example,",
    "A train leaves at 9:40 and arrives at 13:05. The journey takes",
    "In winter the sea",
    "To make a pot of green tea, first",
    "A pin tumbler lock has",
    "It was past midnight in Lisbon when the inspector",
]


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_tokenizer(path):
    """The checkpoint's tokenizer. `transformers` does not read `tokenizer.ggml.pre`, which says how a
    text is composed and cut before merging; where its default is not that of the published tokenizer, it
    is set."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    field = gguf.GGUFReader(path).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ])
    if field is not None and field.contents() == "qwen2":
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def adds_bos(tokenizer):
    ids = tokenizer("a").input_ids
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def difficult(tokenizer):
    """Ids of the difficult texts, by the backend: no marker of ours is put around them."""
    backend, found = tokenizer.backend_tokenizer, []
    for text in TEXTS:
        backend.encode_special_tokens = True
        as_text = backend.encode(text, add_special_tokens=False).ids
        backend.encode_special_tokens = False
        parsed = backend.encode(text, add_special_tokens=False).ids
        found.append({"text": text, "as_text": as_text, "parsed": parsed})
    return found


def greedy(model, ids):
    """The continuation with the log-probabilities of the first and second choice at each step."""
    steps = []
    past, new = None, torch.tensor([ids])
    for _ in range(STEPS):
        out = model(new, past_key_values=past, use_cache=True)
        past = out.past_key_values
        top = torch.log_softmax(out.logits[0, -1].double(), -1).topk(2)
        steps.append((top.indices[0].item(), top.values[0].item(), top.values[1].item()))
        new = top.indices[:1][None]
    tokens, first, second = zip(*steps)
    return {
        "continuation": list(tokens),
        "logprob": [round(v, 5) for v in first],
        "runner_up": [round(v, 5) for v in second],
    }


def window_ids(tokenizer, path, bos):
    per_window = WINDOW - (bos is not None)
    ids = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            ids += tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids
            if len(ids) >= per_window * WINDOWS:
                break
    ids = ids[: per_window * WINDOWS]
    assert len(ids) == per_window * WINDOWS, "the text is too short"
    return ids, per_window


def perplexity(model, tokenizer, path, bos):
    ids, per_window = window_ids(tokenizer, path, bos)
    total, count = 0.0, 0
    for start in range(0, len(ids), per_window):
        window = ([] if bos is None else [bos]) + ids[start : start + per_window]
        logits = model(torch.tensor([window]), use_cache=False).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="none")
        total += nll.double().sum().item()
        count += len(window) - 1
        print(f"\r{count} tokens, perplexity {math.exp(total / count):.4f}", end="", flush=True)
    print()
    raw = b"".join(i.to_bytes(4, "little") for i in ids)
    return {
        "text_sha256": sha256(path),
        "window": WINDOW,
        "windows": WINDOWS,
        "bos": bos,
        "ids_sha256": hashlib.sha256(raw).hexdigest(),
        "scored": count,
        "perplexity": math.exp(total / count),
    }


def write(record, path):
    """JSON with lists of numbers on one line each."""
    compact = []
    for line in json.dumps(record, ensure_ascii=True, indent=1).split("\n"):
        bare = line.strip()
        number = bare.rstrip(",").lstrip("-").replace(".", "", 1).replace("e-", "", 1).isdigit()
        if compact and (number or bare in ("]", "],")) and compact[-1][-1] not in "{}":
            compact[-1] += bare + (" " if bare.endswith(",") and bare != "]," else "")
        else:
            compact.append(line)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(line.rstrip() for line in compact) + "\n")


def main():
    args = argparse.ArgumentParser()
    args.add_argument("model", type=Path)
    args.add_argument("--name", required=True)
    args.add_argument("--text", type=Path, required=True, help="JSONL.gz with a field `text`")
    args.add_argument("-o", "--out", type=Path, required=True)
    args = args.parse_args()

    torch.manual_seed(0)
    tokenizer = load_tokenizer(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model.parent, gguf_file=args.model.name, dtype=torch.float32, attn_implementation="eager").eval()
    chat = tokenizer.chat_template is not None
    bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None
    found = []
    with torch.inference_mode():
        for prompt in PROMPTS if chat else OPENINGS:
            if chat:
                text = tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
                ids = tokenizer(text, add_special_tokens=False).input_ids
            else:
                ids = tokenizer(prompt).input_ids
            found.append({"prompt": prompt, "ids": ids, **greedy(model, ids)})
            print(repr(tokenizer.decode(found[-1]["continuation"])))
        scored = perplexity(model, tokenizer, args.text, bos)
    record = {
        "model": args.name,
        "file": args.model.name,
        "sha256": sha256(args.model),
        "architecture": model.config.model_type,
        "chat": chat,
        "prompts": found,
        "texts": difficult(tokenizer),
        "perplexity": scored,
    }
    write(record, args.out / f"{args.name}.json")


if __name__ == "__main__":
    main()
