"""demur's capability suites beside EleutherAI's lm-evaluation-harness, item by item.

    demur eval arc_easy --limit 500 --data DATA --out runs/parity-arc_easy
    python lm_eval_parity.py MODEL.gguf --data DATA --run runs/parity-arc_easy -o parity-arc_easy.json

reads the answers of a demur run (its arm `base`), asks the same items of `lm_eval` with
`transformers` on the same weights, dequantised to f32, and counts the items on which both make the
same choice (choices by log-likelihood) or get the same marks (`exact_match`, written answers). The
tasks are lm_eval's own YAML files; only the source of the rows is replaced, by the files in DATA.

Wanted: the same choice on at least 99 % of 500 items a task, the same metric within 0.5 points.

    pip install torch transformers gguf lm-eval==0.4.13
"""

import argparse
import collections
import gzip
import importlib.util
import json
import tempfile
import time
from pathlib import Path

import lm_eval
import torch
import yaml
from lm_eval import evaluator
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    else:
        raise SystemExit(f"{suite} has no counterpart in lm_eval")


def load(path, batch):
    """`testdata/oracle/parity.py` loads the same way."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=batch, device="cpu")


def main():
    args = argparse.ArgumentParser()
    args.add_argument("model", type=Path)
    args.add_argument("--data", type=Path, required=True)
    args.add_argument("--run", type=Path, required=True, help="folder of `demur eval ... --out`")
    args.add_argument("--batch", type=int, default=8)
    args.add_argument("-o", "--out", type=Path)
    args = args.parse_args()

    ours = collections.defaultdict(dict)
    for line in (args.run / "answers.jsonl").read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        if answer["arm"] == "base":
            ours[answer["suite"]][answer["id"]] = answer
    lm = load(args.model, args.batch)
    found = {}
    for suite, answers in ours.items():
        started = time.time()
        theirs = {}
        with tempfile.TemporaryDirectory() as folder:
            for t in tasks(suite, args.data, Path(folder), set(answers)):
                name = t.config.task
                t.set_fewshot_seed(1234)
                result = evaluator.evaluate(lm, {name: t}, log_samples=True, bootstrap_iters=0)
                for sample in result["samples"][name]:
                    theirs.setdefault(sample["doc"]["id"], []).append(sample)
        assert set(theirs) == set(answers), "not the same items"
        metrics = list(next(iter(answers.values()))["metrics"])
        same, off, sums = 0, 0.0, {m: [0.0, 0.0] for m in metrics}
        for id, answer in answers.items():
            samples = theirs[id]
            if suite == "gsm8k":
                marks = {"exact_match" if s["filter"] == "strict-match" else "exact_match_flexible": s["exact_match"] for s in samples}
                same += marks == answer["metrics"]
            else:
                s = samples[0]
                scores = [float(r[0]) for r in s["filtered_resps"]]
                same += max(range(len(scores)), key=scores.__getitem__) == answer["choice"]
                off = max([off] + [abs(a - b) for a, b in zip(scores, answer["logprobs"])])
                marks = {m: s["acc_norm"] if m == "acc_norm" else s["acc"] for m in metrics}
            for m in metrics:
                sums[m][0] += answer["metrics"][m]
                sums[m][1] += marks[m]
        n = len(answers)
        found[suite] = {
            "n": n,
            "same": same,
            "same_percent": 100 * same / n,
            "largest_logprob_difference": off,
            "metrics": {m: {"demur": a / n, "lm_eval": b / n, "points": 100 * (a - b) / n} for m, (a, b) in sums.items()},
            "lm_eval_seconds": time.time() - started,
        }
        print(json.dumps({suite: found[suite]}), flush=True)
        if args.out:
            record = {"model": args.model.name, "lm_eval": lm_eval.__version__, "suites": found}
            args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


main()
