"""The numbers that define a MiniMindLM."""

import sys

from transformers import PretrainedConfig

from core.errors import UserError

LARGEST = 1 << 20  # a larger size is a typing error or a damaged file


class LMConfig(PretrainedConfig):
    """Architecture of a ``MiniMindLM``; the defaults make 25,829,888 parameters.

    ``hidden_dim`` None derives the SwiGLU width ``multiple_of * ceil(int(8 * dim / 3) /
    multiple_of)`` at once, so that a saved config never depends on a later version's rule.
    ``n_kv_heads`` None means one key/value head for each query head. Raises ``UserError`` for
    combinations that no model can have.
    """

    model_type = "minimind"
    # The names that code for models of other makers asks for.
    attribute_map = {  # noqa: RUF012
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_seq_len",
    }

    def __init__(
        self,
        dim: int = 512,
        n_layers: int = 8,
        n_heads: int = 8,
        n_kv_heads: int | None = 2,
        vocab_size: int = 6400,
        hidden_dim: int | None = None,
        multiple_of: int = 64,
        norm_eps: float = 1e-5,
        max_seq_len: int = 8192,
        rope_theta: float = 1e6,
        dropout: float = 0.0,
        tie_word_embeddings: bool = True,
        **kwargs,
    ):
        if n_kv_heads is None:
            n_kv_heads = n_heads
        sizes = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads}
        sizes |= {"vocab_size": vocab_size, "multiple_of": multiple_of, "max_seq_len": max_seq_len}
        if hidden_dim is not None:
            sizes["hidden_dim"] = hidden_dim
        for name, value in sizes.items():
            if not isinstance(value, int) or not 1 <= value <= LARGEST:
                raise UserError(f"{name}={value} must be a whole number from 1 to {LARGEST:,}")
            setattr(self, name, value)
        if dim % n_heads or (dim // n_heads) % 2:
            wanted = f"n_heads={n_heads} heads of even width (rotary pairs)"
            raise UserError(f"dim={dim} must split into {wanted}")
        if n_heads % n_kv_heads:
            raise UserError(f"n_heads={n_heads} must be a multiple of n_kv_heads={n_kv_heads}")
        if not 0.0 <= dropout < 1.0:
            raise UserError(f"dropout={dropout} must lie in [0, 1)")
        if not (norm_eps > 0 and rope_theta > 0):
            raise UserError(f"norm_eps={norm_eps} and rope_theta={rope_theta} must be positive")
        if not tie_word_embeddings:
            raise UserError("tie_word_embeddings=False: the head shares the embedding's weight")
        self.hidden_dim = hidden_dim or multiple_of * -(-int(8 * dim / 3) // multiple_of)
        self.norm_eps, self.rope_theta, self.dropout = norm_eps, rope_theta, dropout
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


def context_of(config: PretrainedConfig) -> int:
    """The most tokens that a model with this config takes; ``sys.maxsize`` if it has no bound."""
    found = getattr(config, "max_position_embeddings", None) or 0
    return found if found > 0 else sys.maxsize


def check_length(config: PretrainedConfig, max_seq_len: int) -> None:
    """Raise ``UserError`` if rows of ``max_seq_len`` tokens do not fit the model's context."""
    if max_seq_len > (context := context_of(config)):
        raise UserError(f"max_seq_len {max_seq_len} exceeds the model's context of {context}")
