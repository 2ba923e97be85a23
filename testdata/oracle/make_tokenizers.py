"""Tiny tokenizers of every kind with the ids that the reference gives to difficult texts.

    python make_tokenizers.py ../tokenizers

writes for each kind a folder with `tokenizer.json` (as `transformers` saves it), `model.gguf` (the
same vocabulary under the keys of the format's specification, and no tensors) and `golden.json`: for each
text its ids with control tokens as plain characters and with control tokens parsed, and the decoded ids.

- `qwen2`, `gpt2`, `smollm`, `llama3`: byte-level BPE trained on the texts below, in the tokenizer class of
  the family (`smollm` and `llama3` have none: their published `tokenizer.json` is built by hand).
- `llama`, `gemma`: SentencePiece BPE with byte fallback, trained by `sentencepiece`, whose own ids are the
  golden ones (with and without the dummy prefix). `transformers` gives the same or this script stops.

`TEXTS` is also what the real checkpoints are asked (`parity.py`).
"""

import io
import json
import sys
from pathlib import Path

from difficult import TEXTS

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PROSE = [
    "The lock keeper's daughter doesn't mind the rain; she'll wait until the boats have gone through.",
    "In 1984 there were 12,345 of them, and by 2026 only 678 were left in the whole of the country.",
    "def area(width, height):\n    if width < 0 or height < 0:\n        raise ValueError('negative')\n    return width * height\n",
    "Der Schlüssel liegt unter der Matte. La clé est sous le paillasson. La llave está debajo del felpudo.",
    "Ключ лежит под ковриком. 鍵はマットの下にあります。钥匙在垫子下面。المفتاح تحت السجادة. המפתח מתחת לשטיח.",
]


def byte_tokens():
    """The 256 characters that byte-level BPE writes bytes with, in order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(rest)) for b in range(256)]


def trained(pre_tokenizer, normalizer=None, size=640):
    """Vocabulary and merges."""
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, initial_alphabet=byte_tokens(), show_progress=False)
    tokenizer.train_from_iterator(TEXTS + PROSE * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(m) for m in model["merges"]]


def with_control(vocab):
    return {**vocab, **{t: len(vocab) + i for i, t in enumerate(CONTROL)}}


def by_hand(pre_tokenizer, ignore_merges=False):
    """A tokenizer that no class of `transformers` builds."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab, merges = trained(pre_tokenizer)
    tokenizer = Tokenizer(models.BPE(with_control(vocab), merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=CONTROL[2]), vocab, merges


def qwen2():
    from tokenizers import Regex, normalizers, pre_tokenizers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX, Qwen2Tokenizer

    cut = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    vocab, merges = trained(cut, normalizers.NFC())
    tokenizer = Qwen2Tokenizer(vocab=with_control(vocab), merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL[1:]})
    return tokenizer, vocab, merges


def gpt2():
    from tokenizers import pre_tokenizers
    from transformers import GPT2Tokenizer

    vocab, merges = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer = GPT2Tokenizer(vocab=with_control(vocab), merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL[1:]})
    return tokenizer, vocab, merges


def smollm():
    from tokenizers import pre_tokenizers

    return by_hand(pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]))


def llama3():
    import inspect

    from tokenizers import Regex, pre_tokenizers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    pattern = inspect.signature(TikTokenConverter).parameters["pattern"].default
    return by_hand(pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]), ignore_merges=True)


def write_gguf(path, architecture, fill):
    import gguf

    w = gguf.GGUFWriter(path, architecture)
    fill(w)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()


def encodings(tokenizer, text):
    """Ids with control tokens as characters, and parsed."""
    backend = tokenizer.backend_tokenizer
    found = []
    for as_text in (True, False):
        backend.encode_special_tokens = as_text
        found.append(backend.encode(text, add_special_tokens=False).ids)
    backend.encode_special_tokens = False
    return found


def byte_level(folder, pre, build):
    tokenizer, vocab, merges = build()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    tokens = sorted(with_control(vocab), key=with_control(vocab).get)

    def fill(w):
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre(pre)
        w.add_token_list(tokens)
        w.add_token_types([1] * len(vocab) + [3] * len(CONTROL))
        w.add_token_merges([" ".join(m) for m in merges])
        w.add_eos_token_id(tokens.index("<|im_end|>"))
        w.add_add_bos_token(False)

    write_gguf(folder / "model.gguf", "llama", fill)
    golden = []
    for text in TEXTS:
        as_text, parsed = encodings(tokenizer, text)
        golden.append({"text": text, "as_text": as_text, "parsed": parsed,
                       "decoded": tokenizer.backend_tokenizer.decode(as_text, skip_special_tokens=False)})
    return golden


def sentence_piece(folder, dummy_prefix, names, own=()):
    """`names` are the pieces that begin and end a text; `own` are plain pieces taken whole wherever they
    stand, as Gemma's line breaks and HTML tags are."""
    import sentencepiece as spm

    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(l for t in TEXTS + PROSE * 3 for l in t.split("\n") if l.strip()),
        model_writer=model, model_type="bpe", vocab_size=700, byte_fallback=True, character_coverage=0.98,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=dummy_prefix,
        split_digits=True, allow_whitespace_only_pieces=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        bos_piece=names[0], eos_piece=names[1], user_defined_symbols=list(own),
        control_symbols=["<start_of_turn>", "<end_of_turn>"], num_threads=1, minloglevel=2,
        hard_vocab_limit=False)
    sp = spm.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [sp.id_to_piece(i) for i in range(len(sp))]
    scores = [sp.get_score(i) for i in range(len(sp))]

    def kind(i):
        return 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 4 if pieces[i] in own else 1

    def fill(w):
        w.add_tokenizer_model("llama")
        w.add_tokenizer_pre("default")
        # As the converter writes pieces of one's own: with spaces for SentencePiece's sign.
        w.add_token_list([p.replace("▁", " ") if kind(i) == 4 else p for i, p in enumerate(pieces)])
        w.add_token_scores(scores)
        w.add_token_types([kind(i) for i in range(len(sp))])
        w.add_bos_token_id(1)
        w.add_eos_token_id(2)
        w.add_unk_token_id(0)
        w.add_add_bos_token(True)
        w.add_add_space_prefix(dummy_prefix)

    folder.mkdir(parents=True, exist_ok=True)
    write_gguf(folder / "model.gguf", "llama", fill)

    # The same vocabulary for `transformers`: all ways to join two pieces, the best score first.
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    vocab = {p: i for i, p in enumerate(pieces)}
    normal = [p for i, p in enumerate(pieces) if kind(i) == 1]
    merges = [(p[:at], p[at:]) for p in normal for at in range(1, len(p)) if p[:at] in vocab and p[at:] in vocab]
    merges.sort(key=lambda m: (-scores[vocab[m[0] + m[1]]], vocab[m[0]], vocab[m[1]]))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if dummy_prefix else space
    strip = [decoders.Strip(content=" ", left=1)] if dummy_prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    tokenizer.add_special_tokens(
        [AddedToken(p, special=True, normalized=False) for i, p in enumerate(pieces) if kind(i) in (2, 3)])
    tokenizer.add_tokens([AddedToken(p, special=False, normalized=True) for p in own])
    tokenizer.save(str(folder / "tokenizer.json"))

    golden = []
    for text in TEXTS:
        as_text = sp.encode(text)
        tokenizer.encode_special_tokens = True
        other = tokenizer.encode(text, add_special_tokens=False).ids
        assert as_text == other, (text, as_text, other)
        tokenizer.encode_special_tokens = False
        parsed = tokenizer.encode(text, add_special_tokens=False).ids
        golden.append({"text": text, "as_text": as_text, "parsed": parsed, "decoded": sp.decode(as_text)})
    return golden


def main():
    out = Path(sys.argv[1])
    kinds = {
        "qwen2": lambda f: byte_level(f, "qwen2", qwen2),
        "gpt2": lambda f: byte_level(f, "gpt-2", gpt2),
        "smollm": lambda f: byte_level(f, "smollm", smollm),
        "llama3": lambda f: byte_level(f, "llama-bpe", llama3),
        "llama": lambda f: sentence_piece(f, True, ("<s>", "</s>")),
        "gemma": lambda f: sentence_piece(
            f, False, ("<bos>", "<eos>"), ("\n\n", "▁▁▁▁", "<s>", "</s>", "<br>", "<unused>")),
    }
    for name, make in kinds.items():
        golden = make(out / name)
        lines = ",\n".join(json.dumps(g, ensure_ascii=True) for g in golden)
        (out / name / "golden.json").write_text(f"[\n{lines}\n]\n")
        print(name, sum(len(g["as_text"]) for g in golden), "ids")


if __name__ == "__main__":
    main()
