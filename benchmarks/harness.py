"""lm-evaluation-harness on a local task: its log-likelihoods and scores beside ours."""

import json
from pathlib import Path

import torch

from core.paths import bundled_data
from dataset.choices import asked, clean_choices
from dataset.requests import pair_requests
from scripts.exam import read_questions
from trainer.likelihood import loglikelihoods
from trainer.runtime import Runtime

ROWS, CHOICES = 24, 4
TASK = {"task": "world", "dataset_path": "json", "test_split": "test"}
TASK |= {"output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:"}
TASK |= {"doc_to_choice": "{{choices.text}}"}
TASK |= {"doc_to_target": "{{choices.label.index(answerKey)}}"}
TASK |= {"metric_list": [{"metric": name} for name in ("acc", "acc_norm")]}


def write_task(folder: Path) -> Path:
    """Write the task and its rows (ARC's) into ``folder``; returns the file of the rows.

    The wrong choices of a question are the answers to the next ones.
    """
    asks = read_questions(bundled_data("probes_general.jsonl"))
    rows, labels = [], "ABCD"
    for n, each in enumerate(asks[:ROWS]):
        texts = [asks[n + k].expect[0] for k in range(CHOICES)]
        right = n % CHOICES
        texts = texts[-right:] + texts[:-right] if right else texts
        choices = {"text": texts, "label": list(labels)}
        row = {"question": each.turns[-1], "choices": choices, "answerKey": labels[right]}
        rows.append(json.dumps(row, ensure_ascii=False))
    data = folder / "rows.jsonl"
    data.write_text("\n".join(rows), encoding="utf-8")
    where = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    task = json.dumps(TASK | {"dataset_kwargs": where})  # which is YAML, too
    (folder / "world.yaml").write_text(task, encoding="utf-8")
    return data


def harness(task: Path, folder: Path, adapter: Path | None) -> tuple[list[float], dict]:
    """The log-likelihood of every choice of a written task, and the scores, by its ``hf`` model."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task), include_defaults=False)
    model = {"pretrained": str(folder), "dtype": "float32"}
    model |= {"peft": str(adapter)} if adapter else {}
    settings = {"device": "cpu", "batch_size": 8, "task_manager": manager, "log_samples": True}
    found = lm_eval.simple_evaluate("hf", model, ["world"], bootstrap_iters=0, **settings)
    samples = sorted(found["samples"]["world"], key=lambda sample: sample["doc_id"])
    likelihoods = [choice[0][0] for sample in samples for choice in sample["resps"]]
    scores = {name: found["results"]["world"][f"{name},none"] for name in ("acc", "acc_norm")}
    return likelihoods, scores


def likelihoods(model, tokenizer, data: Path, length: int) -> list[float]:
    """Ours, of the same choices."""
    requests = []
    for line in data.read_text(encoding="utf-8").splitlines():
        context, texts = asked(clean_choices(json.loads(line)), "texts", "en")
        requests += pair_requests(tokenizer, context, texts, length)
    return loglikelihoods(model, requests, Runtime.start("cpu", "float32"), 8).tolist()


def apart(ours: tuple[list[float], dict], theirs: tuple[list[float], dict]) -> float:
    """The largest difference of log-likelihoods and of scores."""
    pairs = [*zip(ours[0], theirs[0], strict=True)]
    pairs += [(ours[1][name], theirs[1][name]) for name in theirs[1]]
    return float((torch.tensor(pairs).diff(dim=1)).abs().max())
