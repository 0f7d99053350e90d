"""MiniMind's side of parity_minimind.py, in a process of its own because MiniMind's package, too,
is called ``model``.

    python -I minimind_child.py CHECKOUT FOLDER...

Each FOLDER holds job.json, ours.pth and ours_lora.pth; theirs.pth, theirs_lora.pth and logits.pth
are added to it.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

# torch.load of weights alone, whatever torch's default is.
from transformers.modeling_utils import load_state_dict


def main(checkout: str, folders: list[Path]) -> None:
    sys.path.insert(0, checkout)
    from model.LMConfig import LMConfig  # MiniMind's, as are the next two
    from model.model import MiniMindLM
    from model.model_lora import apply_lora, load_lora, save_lora

    found = sys.modules["model.model"].__file__
    assert found.startswith(checkout), f"another package `model` came first: {found}"
    for folder in folders:
        job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        ids, rank = torch.tensor(job["ids"]), job["rank"]
        # The one change to MiniMind's settings: every layer stores a mask of max_seq_len^2 floats,
        # 2 GB at 8 x 8192.
        config = job["config"] | {"max_seq_len": ids.size(1)}
        logits = {}

        model = MiniMindLM(LMConfig(**config)).eval()
        model.load_state_dict(load_state_dict(folder / "ours.pth"), strict=True)
        logits["ours"] = whole(model, ids)
        logits["ours_cached"] = one_by_one(model, ids, job["prompt"])
        apply_lora(model, rank)
        load_lora(model, folder / "ours_lora.pth")
        logits["ours_lora"] = whole(model, ids)
        logits["ours_lora_cached"] = one_by_one(model, ids, job["prompt"])

        torch.manual_seed(0)
        model = MiniMindLM(LMConfig(**config)).eval()
        randomize(model, ("norm.weight",), 1.0, 0.3)
        torch.save(model.state_dict(), folder / "theirs.pth")
        logits["theirs"] = whole(model, ids)
        apply_lora(model, rank)
        randomize(model, ("lora.A.weight", "lora.B.weight"), 0.0, 0.1)
        save_lora(model, folder / "theirs_lora.pth")
        logits["theirs_lora"] = whole(model, ids)
        torch.save(logits, folder / "logits.pth")


def randomize(model: nn.Module, endings: tuple[str, ...], mean: float, std: float) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(endings):
            nn.init.normal_(parameter, mean, std)


@torch.no_grad()
def whole(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits


@torch.no_grad()
def one_by_one(model: nn.Module, ids: Tensor, prompt: int) -> Tensor:
    """Logits of all positions: ``prompt`` tokens at once, then one at a time from the cache."""
    out = model(ids[:, :prompt], use_cache=True)
    logits, cache = [out.logits], out.past_key_values
    for at in range(prompt, ids.size(1)):
        out = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True, start_pos=at)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


if __name__ == "__main__":
    main(sys.argv[1], [Path(folder) for folder in sys.argv[2:]])
