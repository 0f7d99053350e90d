"""After ``import interop.auto``, transformers opens what ``MiniMindLM.save_pretrained`` wrote.

    import interop.auto
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=2)

It is a file of its own because training and chatting need nothing of transformers' generation. Code
that is not ours needs a stock folder instead, which llama.py writes.
"""

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from core.errors import UserError
from model.LMConfig import LMConfig
from model.model import CACHE, KVCache, MiniMindLM


class MiniMindForCausalLM(MiniMindLM, GenerationMixin):
    """A ``MiniMindLM`` that takes what transformers passes to a causal language model."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        cache: DynamicCache | KVCache | None = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor = 0,
        past_key_values: DynamicCache | KVCache | None = None,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast | tuple:
        """``MiniMindLM.forward``, also with a mask, and with a ``DynamicCache``, which grows by T.

        ``attention_mask`` (B, S + T) has 1 at ids and 0 at padding, which must stand on the right:
        there causal attention hides it from every id, so that it changes nothing. Raises
        ``UserError`` for any other mask or cache, and as ``MiniMindLM.forward`` does.
        """
        past = cache if past_key_values is None else past_key_values
        theirs = past if isinstance(past, DynamicCache) else None
        if theirs is not None:
            past = pairs_of(theirs)
        elif past is not None and not isinstance(past, list):
            kind = type(past).__name__
            raise UserError(f"a {kind} cannot hold this model's keys: generate with a DynamicCache")
        before = past[0][0].size(2) if past else 0
        check_right_padded(attention_mask, before + input_ids.size(1))
        settings = {"labels": labels, "num_items_in_batch": num_items_in_batch}
        settings |= {"use_cache": use_cache or theirs is not None, CACHE: past or None}
        output = super().forward(input_ids, logits_to_keep=logits_to_keep, **settings)
        if theirs is not None:
            for n, (keys, values) in enumerate(output[CACHE]):
                new = slice(-input_ids.size(1), None)
                theirs.update(keys[:, :, new], values[:, :, new], n)
            output[CACHE] = theirs
        return output if return_dict else output.to_tuple()

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args, attention_mask: Tensor | None = None, **kwargs
    ) -> dict:
        """As in transformers. Raises ``UserError`` for prompts of several lengths."""
        if attention_mask is not None and not attention_mask.all():
            way_out = "generate for each length alone, or with the Llama folder of this base"
            raise UserError(f"padding in the prompts' attention_mask, left or right: {way_out}")
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)


def check_right_padded(mask: Tensor | None, width: int) -> None:
    """Raise ``UserError`` unless ``mask`` is None or (B, ``width``), all zeros after a zero."""
    if mask is None:
        return
    if mask.dim() != 2:
        raise UserError(f"attention_mask has {mask.dim()} dimensions, not 2: one row for each text")
    if mask.size(1) != width:
        ids = f"{width} ids, those in the cache included"
        raise UserError(f"attention_mask has {mask.size(1)} columns for {ids}: give one for each")
    kept = mask.bool()
    if torch.any(kept[:, 1:] & ~kept[:, :-1]):
        left = "attention_mask has padding before an id (left padding)"
        raise UserError(f"{left}, which this model cannot hide: pad on the right")


def pairs_of(cache: DynamicCache) -> KVCache:
    """The keys and values of each layer; none of a cache that is empty."""
    if cache.offloading:
        raise UserError("an offloaded cache cannot hold this model's keys: use a plain one")
    held = cache.layers if cache.get_seq_length() else []
    return [(layer.keys, layer.values) for layer in held]


# Importing this file registers the classes: that is what it is for.
AutoConfig.register(LMConfig.model_type, LMConfig, exist_ok=True)
AutoModelForCausalLM.register(LMConfig, MiniMindForCausalLM, exist_ok=True)
