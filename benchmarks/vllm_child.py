"""What vLLM's own code reads in an adapter: python benchmarks/vllm_child.py VLLM ADAPTER OUTPUT

VLLM is a folder of its source. Four of its files are run: those that check and read adapters.
Whatever else they import, which needs its engine, is faked. OUTPUT gets the update of each Linear.
"""

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import torch

REAL = {f"vllm.lora.{name}" for name in ("peft_helper", "lora_model", "lora_weights", "utils")}
LARGEST_RANK = 512
REFUSED = 3  # the exit code where vLLM says why it does not take the adapter
# The Linears of a Llama, as its engine expects them.
EXPECTED = {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}


class Fake(ModuleType):
    """A module that has everything."""

    __path__ = ()

    def __getattr__(self, name: str):
        # Pinned memory is for GPUs.
        return {"PIN_MEMORY": False, "is_pin_memory_available": bool}.get(name, MagicMock())


class Finder(MetaPathFinder, Loader):
    """Finds the real files in ``folder``, and fakes every other module of vLLM."""

    def __init__(self, folder: Path):
        self.folder = folder

    def find_spec(self, name: str, path=None, target=None):
        if name.partition(".")[0] != "vllm":
            return None
        if name in REAL:
            file = (self.folder / name.replace(".", "/")).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        return importlib.util.spec_from_loader(name, self)

    def create_module(self, spec) -> ModuleType:
        return Fake(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """A fake has nothing to run."""


def main(folder: str, adapter: str, output: str) -> None:
    sys.meta_path.insert(0, Finder(Path(folder)))
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_local_dir(adapter, max_position_embeddings=256)
    helper.validate_legal(SimpleNamespace(max_lora_rank=LARGEST_RANK))
    settings = {"lora_model_id": 1, "device": "cpu", "dtype": torch.float32}
    lora = LoRAModel.from_local_checkpoint(adapter, EXPECTED, helper, **settings)
    merged = {name: layer.optimize() for name, layer in lora.loras.items()}  # the scale goes into B
    torch.save({name: layer.lora_b @ layer.lora_a for name, layer in merged.items()}, output)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (ValueError, NotImplementedError) as error:
        print(error)
        sys.exit(REFUSED)
