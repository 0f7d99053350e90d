"""Prefer some answers to others (DPO): python train_dpo.py --data_path my_pairs.jsonl"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

from core.errors import UserError, run
from core.options import given, option, parse
from core.paths import base_path, bundled_data, lora_path, skill_name
from trainer.options import SKILL_ONLY, SkillOptions

BUNDLED = (bundled_data("pairs_mini.jsonl"),)
DATA_HELP = "files or folders of pairs; dataset/preferences.py lists the styles"
BASE_HELP = "file, of a skill any base (default: newest full_sft_*, of a skill newest rlhf_*, too)"
NAME_HELP = "train a skill of this name on the frozen base (default: all weights, no skill)"
RATES = {False: 1e-4, True: 1e-3}  # of all weights, of a skill
RATE_HELP = "peak learning rate (default: {:g}, for a skill {:g})".format(*RATES.values())


@dataclass
class Options(SkillOptions):
    """Train a model to prefer the chosen answers: all weights (out/rlhf_<dim>.pth), or a skill.

    What the model prefers is compared with what it preferred before (DPO, Rafailov et al. 2023).
    """

    data_path: tuple[Path, ...] = option(BUNDLED, DATA_HELP, group="most used")
    base: Path | None = option(None, BASE_HELP)
    lora_name: str | None = option(None, NAME_HELP, group="most used")
    beta: float = option(0.1, "factor of the preference in the loss", group="training", above=0)
    keep_best: bool = False
    keep: float = 0.05  # results/preferences.json; more holds the style of the base, too
    epochs: int = 6
    learning_rate: float | None = option(None, RATE_HELP)
    weight_decay: float = 0.0
    val_ratio: float = 0.1

    def __post_init__(self):
        if self.learning_rate is None:
            self.learning_rate = RATES[self.lora_name is not None]
        super().__post_init__()
        if self.lora_name is not None:
            skill_name(self.lora_name)


def main(argv: list[str] | None = None) -> Path:
    """Open the base, read the pairs, ask the base about them, train; return the file's path."""
    options, stated = parse(Options, argv), given(Options, argv)
    from dataset.preferences import PreferenceDataset
    from trainer import preferences, stage
    from trainer.runtime import Runtime

    is_skill = options.lora_name is not None
    if not is_skill and (misplaced := sorted(SKILL_ONLY & stated.keys())):
        raise UserError(f"only a skill has {', '.join(misplaced)}: name one by lora_name")
    runtime = Runtime.start(options.device, options.dtype, options.seed)
    if is_skill:
        base = stage.open_skill_base(options, runtime, stated)
        path = lora_path(options.out_dir, options.lora_name, base.model.config.hidden_size)
    else:
        base = stage.open_base(options, runtime, "full_sft")
        path = base_path(options.out_dir, "rlhf", base.model.config.dim)
    stage.check_apart(path, options.skill if is_skill else base.path)
    preferences.check_dropout(base.model, options.lora_dropout)
    data, model = stage.read_data(PreferenceDataset, options, base.tokenizer, runtime), base.model
    if is_skill:
        stage.add_lora(base, options)
    else:
        base = replace(base, model=copy.deepcopy(model).requires_grad_(False).eval())
    preferences.add_references(data, base, options, runtime)
    plugged = preferences.plugged(options, base, data, runtime, model, options.beta)
    if is_skill:
        result = stage.skill_result(path, options, base)
    else:
        result = preferences.whole_result(path, model, options, base)
    return stage.run_stage(model, data.train, options, runtime, **plugged, **result)


if __name__ == "__main__":
    run(main, keep_working=True)
