"""demur's capability suites beside EleutherAI's lm-evaluation-harness, item by item.

    python lm_eval_parity.py --primer DATA      # examples of TruthfulQA and gsm8k_cot, which demur needs
    demur eval arc_easy --limit 500 --pick first --data DATA --out runs/parity-arc_easy
    python lm_eval_parity.py MODEL.gguf --data DATA --run runs/parity-arc_easy -o parity-arc_easy.json

reads the answers of demur runs (their arms `base`), asks the same items of `lm_eval` with
`transformers` on the same weights, dequantised to f32, and counts the items on which both make the
same choice (choices by log-likelihood) or get the same marks (`exact_match`, written answers). The
tasks are lm_eval's own YAML files; only the source of the rows is replaced, by the files in DATA.
`gsm8k` needs `--pick first`: the examples of an item there depend on how many came before it.
Several runs of the same items (`--run` again) are compared with one pass of lm_eval.

Requests, tokens and metrics are lm_eval's. What it would compute many times, the beginnings that
requests share, is computed once (`Packed`); the first 8 requests of a suite's first
four tasks (only MMLU has more, its subjects) are also computed lm_eval's own way, and must come out within 1e-3 nats.

Wanted: the same choice on at least 99 % of 500 items a task, the same metric within 0.5 points.

    pip install torch transformers gguf lm-eval[ifeval]==0.4.13
"""

import argparse
import collections
import gzip
import importlib.util
import json
import tempfile
import time
from pathlib import Path

import jinja2
import lm_eval
import torch
import yaml
from lm_eval import evaluator
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

TASKS = Path(lm_eval.__file__).parent / "tasks"


def rows(data, *names):
    for name in names:
        path = data / name
        if path.exists():
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
                return [json.loads(line) for line in file]
    raise SystemExit(f"none of {', '.join(names)} in {data}")


def config(path):
    """A task's YAML with what it includes; functions are found beside it."""

    class Loader(yaml.SafeLoader):
        pass

    def function(loader, node):
        module, name = node.value.rsplit(".", 1)
        spec = importlib.util.spec_from_file_location(module, path.parent / f"{module}.py")
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return getattr(loaded, name)

    Loader.add_constructor("!function", function)
    found = yaml.load(path.read_text(encoding="utf-8"), Loader)
    include = found.pop("include", None)
    return {**(config(path.parent / include) if include else {}), **found}


def task(path, folder, splits, name, **more):
    """A task on rows of ours instead of the Hub's."""
    files = {}
    for split, content in splits.items():
        file = folder / f"{name}-{split}.jsonl"
        file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in content), encoding="utf-8")
        files[split] = str(file)
    c = config(path)
    for key in ("tag", "group", "dataset_name", "task_alias"):
        c.pop(key, None)
    c.update(task=name, dataset_path="json", dataset_kwargs={"data_files": files}, **more)
    return ConfigurableTask(config=c)


def mmlu_row(r):
    return {"id": r["id"], "question": r["prompt"], "choices": r["choices"], "answer": r["answer_index"]}


def tasks(suite, data, folder, wanted):
    """The suite's tasks on the wanted ids."""
    if suite == "mmlu":
        dev, test = collections.defaultdict(list), collections.defaultdict(list)
        for r in rows(data, "mmlu_dev.jsonl", "mmlu_dev.jsonl.gz"):
            dev[r["category"]].append(mmlu_row(r))
        for r in rows(data, "mmlu_test.jsonl.gz", "mmlu_test.jsonl"):
            if r["id"] in wanted:
                test[r["category"]].append(mmlu_row(r))
        for subject, asked in sorted(test.items()):
            path = TASKS / "mmlu" / "default" / f"mmlu_{subject}.yaml"
            yield task(path, folder, {"test": asked, "dev": dev[subject]}, f"mmlu_{subject}", num_fewshot=5)
    elif suite in ("arc_easy", "arc_challenge"):
        letters = "ABCDEFGH"
        asked = [
            {"id": r["id"], "question": r["prompt"], "answerKey": letters[r["answer_index"]],
             "choices": {"text": r["choices"], "label": list(letters[: len(r["choices"])])}}
            for r in rows(data, f"{suite}.jsonl", f"{suite}.jsonl.gz") if r["id"] in wanted
        ]
        more = {"training_split": None, "validation_split": None}
        yield task(TASKS / "arc" / f"{suite}.yaml", folder, {"test": asked}, suite, **more)
    elif suite.startswith("truthfulqa_mc"):
        def targets(t):
            return {"choices": list(t), "labels": list(t.values())}
        asked = [
            {"id": r["id"], "question": r["prompt"], "mc1_targets": targets(r["mc1"]), "mc2_targets": targets(r["mc2"])}
            for r in rows(data, "truthfulqa.jsonl") if r["id"] in wanted
        ]
        yield task(TASKS / "truthfulqa" / f"{suite}.yaml", folder, {"validation": asked}, suite)
    elif suite == "gsm8k":
        # The examples of an item depend on how many came before it: the wanted ones are the first.
        test = rows(data, "gsm8k_test.jsonl", "gsm8k_test.jsonl.gz")[: len(wanted)]
        assert {r["id"] for r in test} == wanted, "the run is not of the first items"
        splits = {
            "test": [{"id": r["id"], "question": r["prompt"], "answer": r["answer"]} for r in test],
            "train": [{"id": r["id"], "question": r["prompt"], "answer": r["answer"]}
                      for r in rows(data, "gsm8k_train.jsonl.gz", "gsm8k_train.jsonl")],
        }
        yield task(TASKS / "gsm8k" / "gsm8k.yaml", folder, splits, suite)
    elif suite == "gsm8k_cot":
        asked = [{"id": r["id"], "question": r["prompt"], "answer": r["answer"]}
                 for r in rows(data, "gsm8k_test.jsonl", "gsm8k_test.jsonl.gz") if r["id"] in wanted]
        yield task(TASKS / "gsm8k" / "gsm8k-cot.yaml", folder, {"test": asked}, suite)
    else:
        raise SystemExit(f"{suite} has no counterpart in lm_eval")


class Packed(HFLM):
    """lm_eval's model, which computes nothing twice.

    What all contexts begin with is read once. Then contexts with all of their continuations stand in
    one row, as many as make a good pass; positions and the attention mask make each token see what it
    would see alone.
    """

    PASS = 512
    CHECKED = 4

    checked = 0

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        groups = collections.defaultdict(list)
        for at, (_, context, continuation) in enumerate(requests):
            groups[tuple(context)].append((at, continuation))
        contexts = sorted(groups)
        shared = 0
        while all(len(c) > shared + 1 and c[shared] == contexts[0][shared] for c in contexts):
            shared += 1
        cache = DynamicCache()
        with torch.no_grad():
            if shared:
                self.model.model(torch.tensor([contexts[0][:shared]]), past_key_values=cache)
            scores = [None] * len(requests)
            pack, size = [], 0
            for done, context in enumerate(contexts):
                pack.append((context, groups[context]))
                size += len(context) - shared + sum(len(c) - 1 for _, c in groups[context])
                if size >= self.PASS or done + 1 == len(contexts):
                    self.score(pack, shared, cache, scores)
                    pack, size = [], 0
                    print(f"  {done + 1} of {len(contexts)} contexts", flush=True)
        if self.checked < self.CHECKED:
            self.checked += 1
            check = super()._loglikelihood_tokens(requests[:8], disable_tqdm=True)
            off = max(abs(a[0] - b[0]) for a, b in zip(scores, check))
            assert off < 1e-3, f"lm_eval itself differs by {off} nats"
        return scores

    def score(self, pack, shared, cache, scores):
        tokens, positions, blocks = [], [], []
        wanted = []  # (request, row of hidden states before each token, tokens)
        for context, continuations in pack:
            start, rest = len(tokens), context[shared:]
            tokens += rest
            positions += range(shared, len(context))
            blocks += [(start, start)] * len(rest)
            last = len(tokens) - 1
            for at, c in continuations:
                begin = len(tokens)
                tokens += c[:-1]
                positions += range(len(context), len(context) + len(c) - 1)
                # It sees its context up to `last`, and itself.
                blocks += [(start, begin, last)] * (len(c) - 1)
                wanted.append((at, [last, *range(begin, len(tokens))], c))
        n = len(tokens)
        sees = torch.zeros(n, shared + n, dtype=torch.bool)
        sees[:, :shared] = True
        for i, block in enumerate(blocks):
            if len(block) == 3:
                sees[i, shared + block[0] : shared + block[2] + 1] = True
            sees[i, shared + block[1] : shared + i + 1] = True
        mask = torch.zeros(1, 1, n, shared + n).masked_fill(~sees, torch.finfo(torch.float32).min)
        out = self.model.model(
            torch.tensor([tokens]), position_ids=torch.tensor([positions]), attention_mask=mask, past_key_values=cache
        )
        cache.crop(-n)
        for at, rows, c in wanted:
            logits = torch.log_softmax(self.model.lm_head(out.last_hidden_state[0, rows]), -1)
            picked = torch.tensor(c)
            total = logits.gather(-1, picked[:, None]).sum()
            scores[at] = (float(total), bool((logits.argmax(-1) == picked).all()))


def load(path, batch):
    """`testdata/oracle/parity.py` loads the same way."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return Packed(pretrained=model.eval(), tokenizer=tokenizer, batch_size=batch, device="cpu")


def primer(data):
    """The answered questions before each of TruthfulQA and of `gsm8k_cot`, as lm_eval's tasks have them."""
    text = config(TASKS / "truthfulqa" / "truthfulqa_mc1.yaml")["doc_to_text"]
    before, _ = jinja2.Template(text).render(question="QUESTION").split("Q: QUESTION")
    (data / "truthfulqa_primer.txt").write_text(before.strip() + "\n", encoding="utf-8")
    examples = config(TASKS / "gsm8k" / "gsm8k-cot.yaml")["fewshot_config"]["samples"]
    lines = "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in examples)
    (data / "gsm8k_cot_examples.jsonl").write_text(lines, encoding="utf-8")


def ask(lm, suite, data, asked, chat):
    """lm_eval's scores and metrics by item, one entry a filter."""
    theirs = collections.defaultdict(list)
    lm.checked = 0
    with tempfile.TemporaryDirectory() as folder:
        for t in tasks(suite, data, Path(folder), asked):
            name = t.config.task
            t.set_fewshot_seed(1234)
            result = evaluator.evaluate(
                lm, {name: t}, log_samples=True, bootstrap_iters=0, apply_chat_template=chat
            )
            for s in result["samples"][name]:
                marks = {m: float(s[m]) for m in ("acc", "acc_norm", "exact_match") if m in s}
                scores = [float(r[0]) for r in s["filtered_resps"]] if "acc" in marks else []
                theirs[s["doc"]["id"]].append({"filter": s["filter"], "scores": scores, **marks})
    return theirs


def graded(data, answers):
    """IFEval needs no model here: lm_eval's checks of the texts that demur wrote.

    Requests with a check that needs NLTK's data are left out where that is not there.
    """
    from lm_eval.tasks.ifeval import instructions_util, utils

    try:
        instructions_util.count_sentences("A. B.")
        missing = set()
    except LookupError:
        missing = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
    theirs = {}
    for r in rows(data, "ifeval.jsonl"):
        if r["id"] in answers and not missing & set(r["instruction_id_list"]):
            found = utils.process_results({"key": r["id"], **r}, [answers[r["id"]]["text"]])
            mean = {m: sum(v) / len(v) if isinstance(v, list) else float(v) for m, v in found.items()}
            theirs[r["id"]] = [mean]
    return theirs


def compare(suite, answers, theirs):
    """One run's answers beside lm_eval's samples."""
    assert set(theirs) == set(answers), "not the same items"
    metrics = list(next(iter(answers.values()))["metrics"])
    same, off, sums = 0, 0.0, {m: [0.0, 0.0] for m in metrics}
    for id, answer in answers.items():
        samples = theirs[id]
        if suite == "ifeval":
            marks = samples[0]
            same += all(abs(marks[m] - answer["metrics"][m]) < 1e-9 for m in metrics)
        elif suite in ("gsm8k", "gsm8k_cot"):
            name = {"strict-match": "exact_match", "flexible-extract": "exact_match_flexible"}
            marks = {name[s["filter"]]: s["exact_match"] for s in samples}
            same += marks == answer["metrics"]
        else:
            s = samples[0]
            scores = s["scores"]
            same += max(range(len(scores)), key=scores.__getitem__) == answer["choice"]
            off = max([off] + [abs(a - b) for a, b in zip(scores, answer["logprobs"])])
            marks = {m: s["acc_norm"] if m == "acc_norm" else s["acc"] for m in metrics}
        for m in metrics:
            sums[m][0] += answer["metrics"][m]
            sums[m][1] += marks[m]
    n = len(answers)
    return {
        "n": n,
        "same": same,
        "same_percent": 100 * same / n,
        "largest_logprob_difference": off,
        "metrics": {m: {"demur": a / n, "lm_eval": b / n, "points": 100 * (a - b) / n} for m, (a, b) in sums.items()},
    }


def main():
    args = argparse.ArgumentParser()
    args.add_argument("model", type=Path, nargs="?")
    args.add_argument("--primer", type=Path, metavar="DATA", help="write the tasks' own examples there, and end")
    args.add_argument("--data", type=Path)
    args.add_argument("--run", type=Path, action="append", default=[], help="folder of `demur eval ... --out`")
    args.add_argument("--limit", type=int, help="only the first so many items of a run")
    args.add_argument("--keep", type=Path, help="folder for lm_eval's answers, which are not asked for twice")
    args.add_argument("--chat", action="store_true", help="the runs are of `demur eval --chat`")
    args.add_argument("--batch", type=int, default=8)
    args.add_argument("--threads", type=int)
    args.add_argument("-o", "--out", type=Path)
    args = args.parse_args()
    if args.primer:
        return primer(args.primer)
    if args.threads:
        torch.set_num_threads(args.threads)

    runs = {}
    for folder in args.run:
        ours = collections.defaultdict(dict)
        answers = map(json.loads, (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines())
        for answer in sorted((a for a in answers if a["arm"] == "base"), key=lambda a: a["at"]):
            if args.limit is None or len(ours[answer["suite"]]) < args.limit:
                ours[answer["suite"]][answer["id"]] = answer
        runs[folder.name] = ours
    lm = None
    record = {"model": args.model.name, "lm_eval": lm_eval.__version__, "runs": {}}
    for suite in sorted(set().union(*runs.values())):
        started = time.time()
        having = {name: ours[suite] for name, ours in runs.items() if suite in ours}
        asked = set(next(iter(having.values())))
        graded_here = suite == "ifeval"
        theirs = {}
        if not graded_here:
            kept = args.keep and args.keep / f"{suite}.json"
            if kept and kept.exists():
                theirs = json.loads(kept.read_text(encoding="utf-8"))
            if not asked <= set(theirs):
                lm = lm or load(args.model, args.batch)
                theirs = ask(lm, suite, args.data, asked, args.chat)
                if kept:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    kept.write_text(json.dumps(theirs), encoding="utf-8")
            theirs = {id: theirs[id] for id in asked}
        for name, answers in having.items():
            if graded_here:
                theirs = graded(args.data, answers)
                answers = {id: a for id, a in answers.items() if id in theirs}
            found = compare(suite, answers, theirs)
            seconds = round(time.time() - started)
            print(json.dumps({name: {suite: found}, "seconds": seconds}), flush=True)
            record["runs"].setdefault(name, {})[suite] = found
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


main()
