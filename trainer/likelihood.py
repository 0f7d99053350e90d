"""Scores of a language model as lm-evaluation-harness 0.4.13 defines them, from log-likelihoods."""

import math
import re
from collections.abc import Sequence
from statistics import mean, stdev

import torch
from torch import Tensor, nn

from dataset.choices import ChoiceQuestion
from dataset.requests import Request, batches_of, collated
from trainer.metrics import nats_of
from trainer.runtime import Runtime

SPACE = re.compile(r"\s+")


@torch.no_grad()
def loglikelihoods(
    model: nn.Module, requests: Sequence[Request], runtime: Runtime, batch_size: int
) -> Tensor:
    """``log p(continuation | context)`` of each request in nats, (requests,) float64 on the CPU.

    Requests of like length are computed together, at most ``batch_size``; no other request and no
    padding changes the result beyond rounding. The model keeps its mode.
    """
    was_training = model.training
    model.eval()
    found = torch.zeros(len(requests), dtype=torch.float64)
    for part in batches_of(requests, batch_size):
        inputs, targets = (x.to(runtime.device) for x in collated([requests[n] for n in part]))
        nats = nats_of(model, {"input_ids": inputs}, targets, runtime)
        found[part] = -nats.cpu().double().sum(1)
    model.train(was_training)
    return found


def text_scores(texts: Sequence[str], likelihoods: Sequence[float]) -> dict[str, float]:
    """The perplexities of a word and of a byte over all ``texts``, and the bits of a byte.

    ``exp(-sum of log-likelihoods / number of words)``, where words are what blanks part (``\\s+``;
    infinite beyond a float, as for Chinese without blanks), and likewise of UTF-8 bytes, whose
    bits are the same in base 2: ``weighted_perplexity`` and ``bits_per_byte`` of
    lm_eval/api/metrics.py on the counts of ``PerplexityTask`` (lm_eval/api/task.py).
    """
    nats = -float(sum(likelihoods))
    words = sum(len(SPACE.split(text)) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    scores = {"word_perplexity": exponential(nats / words)}
    scores["byte_perplexity"] = exponential(nats / size)
    return scores | {"bits_per_byte": nats / size / math.log(2)}


def exponential(nats: float) -> float:
    """``exp``, infinite beyond a float."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def choice_scores(
    questions: Sequence[ChoiceQuestion],
    answers: Sequence[Sequence[str]],
    likelihoods: Sequence[Sequence[float]],
) -> dict[str, float]:
    """The shares of questions whose right answer is the likeliest, each with its standard error.

    ``acc`` compares log-likelihoods, ``acc_norm`` those divided by the answer's characters,
    ``acc_bytes`` by its UTF-8 bytes; of equal ones the first counts. The error, ``<name>_stderr``,
    is the sample's standard deviation / sqrt(n), NaN for one question. Sources:
    ``ConfigurableTask.process_results`` (lm_eval/api/task.py) and ``mean_stderr``
    (lm_eval/api/metrics.py).
    """
    hits: dict[str, list[float]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for each, texts, values in zip(questions, answers, likelihoods, strict=True):
        sizes = [1] * len(texts), [*map(len, texts)], [len(text.encode()) for text in texts]
        for found, size in zip(hits.values(), sizes, strict=True):
            scaled = [value / n for value, n in zip(values, size, strict=True)]
            found.append(float(scaled.index(max(scaled)) == each.answer))
    scores = {}
    for name, found in hits.items():
        error = stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
        scores |= {name: mean(found), f"{name}_stderr": error}
    return scores
