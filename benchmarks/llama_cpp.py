"""llama.cpp in a process of its own, as a judge of GGUF files."""

import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from interop.check import probe

# The process may abort where a file is wrong. It ends with our pipe.
SERVER = """
import sys, xllamacpp as llama
path, *adapters = sys.argv[1:]
params = llama.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = path, 256, 1, False
params.n_gpu_layers, params.fit_params, params.verbosity = 0, False, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.lora_adapters = [llama.CommonAdapterLoraInfo(name, 1.0) for name in adapters]
server = llama.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def llama_cpp(*files: Path) -> Iterator[Callable]:
    """``ask(path, **fields)`` of a llama.cpp server with these files, a base and adapters."""
    command = [sys.executable, "-c", SERVER, *map(str, files)]
    child = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, encoding="utf-8")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with child:
        address = child.stdout.readline().strip()
        assert address.startswith("http"), "llama.cpp does not take the files"

        def ask(path, **fields):
            header = {"Content-Type": "application/json"}
            request = urllib.request.Request(address + path, json.dumps(fields).encode(), header)
            with direct.open(request, timeout=60) as answer:
                return json.load(answer)

        yield ask
        child.stdin.close()
        assert child.wait(60) == 0


def log_probabilities(ask: Callable, ids: list[int], **fields) -> dict[int, float]:
    """llama.cpp's of the likeliest tokens after ``ids``, by token, without its cache."""
    fields |= {"n_predict": 1, "n_probs": 256, "cache_prompt": False}
    # It shows them only beside whole characters: it is made to say an "a", afterwards.
    fields |= {"temperature": 0, "logit_bias": [["a", 1000]]}
    (found,) = ask("/completion", prompt=ids, **fields)["completion_probabilities"]
    assert len(found["top_logprobs"]) == 256
    return {entry["id"]: entry["logprob"] for entry in found["top_logprobs"]}


def apart(ask: Callable, model: nn.Module, **fields) -> float:
    """The largest difference of log probabilities, llama.cpp's and ours, over 16 positions."""
    ids, differences = probe(model.config.vocab_size)[0, :16].tolist(), []
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    for n in range(16):
        theirs = log_probabilities(ask, ids[: n + 1], **fields)
        differences += [abs(found - float(ours[n, token])) for token, found in theirs.items()]
    return max(differences)
