"""Which tools take a skill, and in which form: what each refuses, and what it gets silently wrong.

A tool's verdict is ``WORKS`` where that tool itself has judged such files, in the tests or in
benchmarks/interop.py.
"""

from dataclasses import dataclass

from interop.minimind import RANK
from model.lora.skill_file import Skill

ADAPTER, MERGED, FILE = "adapter", "merged base", "skill file itself"
WORKS, REFUSED, WRONG = "works", "refused", "loaded wrongly if you insist"
NOT_RUN = "written for it, not run here"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes


@dataclass(frozen=True)
class Verdict:
    """What a tool does with a form of the skill; ``written`` is the format to write it in."""

    tool: str
    form: str
    verdict: str
    why: str
    written: str = ""


def verdicts(skill: Skill, is_ours: bool, square: set[str]) -> list[Verdict]:
    """All tools on a skill; ``is_ours``: its base is a MiniMindLM, not another model.

    ``square``: the names of the base's square Linears.
    """
    lacks = obstacles(skill, is_ours, square)
    rank = max(skill[1].ranks.values())
    fitting = next((each for each in VLLM_RANKS if each >= rank), None)
    lacks["rank"] = "" if fitting else f"its rank {rank} is above {VLLM_RANKS[-1]}"
    vllm = f"start it with enable_lora and max_lora_rank {fitting}"
    plain = ("extra", "foreign", "dora")
    rows = [
        ("transformers", MERGED, "huggingface", ("extra",), WORKS, ""),
        ("PEFT", ADAPTER, "peft", ("extra", "partly"), WORKS, ""),
        ("vLLM", ADAPTER, "peft", ("extra", "dora", "rank"), NOT_RUN, vllm),
        ("vLLM", MERGED, "huggingface", ("extra",), NOT_RUN, ""),
        ("llama.cpp", ADAPTER, "gguf", plain, WORKS, ""),
        ("llama.cpp", MERGED, "gguf", ("extra", "foreign"), WORKS, ""),
        ("Ollama", ADAPTER, "gguf", plain, NOT_RUN, ""),
        ("Ollama", MERGED, "gguf", ("extra", "foreign"), NOT_RUN, ""),
        ("mlx-lm", ADAPTER, "", ("mlx",), WORKS, ""),
        ("mlx-lm", MERGED, "huggingface", ("extra",), WORKS, ""),
        ("MiniMind", ADAPTER, "minimind", (*plain, "odd"), WORKS, ""),
        ("MiniMind", MERGED, "minimind", ("extra", "foreign"), WORKS, ""),
    ]
    found = []
    for tool, form, written, needs, verdict, note in rows:
        if reason := next((lacks[need] for need in needs if lacks[need]), ""):
            verdict, note, written = REFUSED, reason, ""
        found.append(Verdict(tool, form, verdict, note, written))
    if not lacks["extra"] and not lacks["foreign"]:
        reason = next((lacks[need] for need in ("odd", "dora", "scaled") if lacks[need]), "")
        found.append(Verdict("MiniMind", FILE, WRONG if reason else WORKS, reason))
    return found


def obstacles(skill: Skill, is_ours: bool, square: set[str]) -> dict[str, str]:
    """What may keep a skill out of a tool, by short names; "" where it does not."""
    tensors, meta = skill
    extra = [name for name in tensors if name.startswith("_")]
    dora = {f"{target}.lora.magnitude" in tensors for target in meta.targets}
    odd = sorted(set(meta.targets) - square)
    plain = set(meta.scaling.values()) == {1.0} and set(meta.ranks.values()) == {RANK}
    return {
        "extra": f"it holds more than updates ({extra[0]})" if extra else "",
        "foreign": "" if is_ours else "its base is a Hugging Face model",
        "dora": "it is a DoRA; merge it" if True in dora else "",
        "partly": "it is a DoRA on some targets only; merge it" if len(dora) > 1 else "",
        "odd": f"it updates {odd[0]}, which is not square; merge it" if odd else "",
        "scaled": "" if plain else f"its scales are not 1 or its ranks not {RANK}",
        "mlx": "its adapters have another format; merge it",
    }
