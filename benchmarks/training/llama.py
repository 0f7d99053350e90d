"""Our model as transformers' LlamaForCausalLM, which is what users of PEFT have, and its LoRA as
ours.
"""

from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from model.LMConfig import LMConfig

NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
TARGETS = ["q_proj", "o_proj"]  # wq and wo


def llama_of(config: LMConfig, tensors: dict[str, Tensor]) -> LlamaForCausalLM:
    """The same function of the same weights, computed by transformers."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.hidden_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
        )
    )
    theirs = {}
    for name, tensor in tensors.items():
        module, layer = name.removesuffix(".weight"), ""
        if module.startswith("layers."):
            _, number, module = module.split(".", 2)
            layer = f"model.layers.{number}."
        if module in NAMES:  # the head is tied to the embedding
            if module in ("attention.wq", "attention.wk"):
                tensor = halves_of_pairs(tensor, config.dim // config.n_heads)
            theirs[f"{layer}{NAMES[module]}.weight"] = tensor
    missing, unexpected = model.load_state_dict(theirs, strict=False)
    assert not unexpected and missing == ["lm_head.weight"], (missing, unexpected)
    model.tie_weights()
    return model


def lora_of_llama(model: nn.Module, head_dim: int) -> dict[str, Tensor]:
    """The trained LoRA of PEFT's model around ``llama_of``'s, under the keys of our LoRA files."""
    ours = {theirs: name for name, theirs in NAMES.items()}
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            _, _, name = name.partition("model.layers.")
            module, letter = name.removesuffix(".default.weight").rsplit(".lora_", 1)
            number, module = module.split(".", 1)
            tensor = parameter.detach()
            if (module, letter) == ("self_attn.q_proj", "B"):
                tensor = pairs_of_halves(tensor, head_dim)
            tensors[f"layers.{number}.{ours[module]}.lora.{letter}.weight"] = tensor
    return tensors


def halves_of_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """The rows of (heads x head_dim, N), sorted so that a rotary pair 2 i, 2 i + 1 becomes i, i +
    head_dim / 2.
    """
    return weight.view(-1, head_dim // 2, 2, weight.size(1)).transpose(1, 2).reshape(weight.shape)


def pairs_of_halves(weight: Tensor, head_dim: int) -> Tensor:
    return weight.view(-1, 2, head_dim // 2, weight.size(1)).transpose(1, 2).reshape(weight.shape)
