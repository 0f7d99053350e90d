"""MiniMindLM: a Llama-style decoder small enough to read in one sitting.

Token ids -> embedding -> n_layers x (RMSNorm, grouped-query attention with rotary positions,
RMSNorm, SwiGLU) -> RMSNorm -> logits through the transposed embedding. State-dict keys and
arithmetic are MiniMind's (April 2025).
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from core.errors import UserError
from model.kernels import IGNORED, linear_cross_entropy, rms_norm, swiglu
from model.LMConfig import LMConfig

# Per layer: keys and values, each (B, n_kv_heads, S, head_dim).
KVCache = list[tuple[Tensor, Tensor]]
# transformers 5.24 renamed `past_key_values`, as an argument and in outputs, to `cache`.
CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)``, the statistics in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rope_table(head_dim: int, length: int, theta: float, device: torch.device) -> Tensor:
    """The angles ``position * theta^(-2i/head_dim)`` as unit complex64 (length, head_dim/2)."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
    return torch.complex(angles.cos(), angles.sin())


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn each pair of neighbouring features (not rotate-half) by its position's angle, in fp32.

    ``x`` (B, T, heads, head_dim) of any dtype, ``turns`` (T, head_dim/2) complex64.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns[:, None, :]).flatten(-2).type_as(x)


def take(x: Tensor, positions: Tensor | None) -> Tensor:
    """``x`` (B, T, D) at the ``positions`` (N,) of the flattened batch, (N, D); None keeps all."""
    return x if positions is None else x.flatten(0, 1).index_select(0, positions)


class Attention(nn.Module):
    """Causal self-attention in which ``n_heads`` queries share ``n_kv_heads`` keys and values."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.head_dim = config.dim // config.n_heads
        self.dropout = config.dropout
        self.wq = nn.Linear(config.dim, config.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * self.head_dim, config.dim, bias=False)
        self.wo.writes_residual = True
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, turns: Tensor, past: tuple[Tensor, Tensor] | None, positions: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        B, T, _ = x.shape
        q = rotate(self.wq(x).view(B, T, -1, self.head_dim), turns)
        k = rotate(self.wk(x).view(B, T, -1, self.head_dim), turns)
        v = self.wv(x).view(B, T, -1, self.head_dim)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, head_dim)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        is_causal = T > 1 and past is None  # in this order: a compiled T is no plain number
        mask, dropout = None, self.dropout if self.training else 0.0
        if T > 1 and past is not None:
            # is_causal aligns its mask to the first key: wrong for new tokens after a cache.
            S = k.size(2)
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, enable_gqa=True)
        y = take(y.transpose(1, 2).reshape(B, T, -1), positions)
        return self.resid_dropout(self.wo(y)), (k, v)


class FeedForward(nn.Module):
    """SwiGLU: ``w2(silu(w1 x) * w3 x)`` (Shazeer 2020)."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2.writes_residual = True
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(swiglu(self.w1(x), self.w3(x))))


class MiniMindBlock(nn.Module):
    """Attention and MLP, each after an RMSNorm and each added to the residual stream."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Tensor, turns: Tensor, past: tuple[Tensor, Tensor] | None, positions: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The hidden states, at ``positions`` as in ``take``, and this layer's keys and values."""
        attended, present = self.attention(self.attention_norm(x), turns, past, positions)
        h = take(x, positions) + attended
        return h + self.feed_forward(self.ffn_norm(h)), present


class MiniMindLM(PreTrainedModel):
    """The decoder. ``save_pretrained`` works; the files of training are plain state dicts."""

    config_class = LMConfig
    # transformers ties only what is named here, and only with tie_word_embeddings in the config.
    _tied_weights_keys = {"output.weight": "tok_embeddings.weight"}  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: LMConfig | None = None):
        config = config or LMConfig()
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(MiniMindBlock(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        # No buffer: from_pretrained leaves it as garbage, and .bfloat16() would round the angles.
        self._rope: Tensor | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """N(0, 0.02), divided by sqrt(2 n_layers) where a layer writes the residual (GPT-2)."""
        if isinstance(module, nn.Linear | nn.Embedding):
            std = 0.02
            if getattr(module, "writes_residual", False):
                std /= math.sqrt(2 * self.config.n_layers)
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tok_embeddings

    def get_output_embeddings(self) -> nn.Linear:
        return self.output

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        cache: KVCache | None = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor = 0,
        past_key_values: KVCache | None = None,
    ) -> CausalLMOutputWithPast:
        """Compute next-token logits, and the loss when ``labels`` are given.

        ``input_ids`` (B, T) int64, right-padded: padding and batch-mates never change a row.
        ``cache`` holds S earlier tokens (none: S = 0); older versions of transformers call it
        ``past_key_values``. ``logits_to_keep`` n > 0 keeps the last n positions, 0 keeps all, and a
        tensor names them. ``labels`` (B, T) are the ids themselves or -100; they are shifted here.
        The loss is the summed cross-entropy / ``num_items_in_batch`` (default: the number of
        supervised targets), and 0 when nothing is supervised.

        Returns logits (B, T or kept, vocab_size), ``loss`` (scalar, fp32 at least), and a cache of
        S + T tokens when ``use_cache``. In training mode with ``labels``, only supervised positions
        reach the head and the last block's output and MLP, and ``logits`` is None. Raises
        ``UserError`` past ``max_seq_len``, and for ``labels`` together with ``logits_to_keep``.
        """
        past, keeps_last = cache or past_key_values, isinstance(logits_to_keep, int)
        if labels is None:
            h, present = self._hidden(input_ids, past, None)
            kept = slice(-logits_to_keep, None) if keeps_last else logits_to_keep
            output = {"logits": self.output(h[:, kept])}
        else:
            if not keeps_last or logits_to_keep != 0:
                raise UserError("labels need the logits of all positions: leave out logits_to_keep")
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()  # of each position
            supervised = (targets != IGNORED).nonzero().flatten()
            if num_items_in_batch is None:
                num_items_in_batch = max(len(supervised), 1)
            h, present = self._hidden(input_ids, past, supervised if self.training else None)
            output = {} if self.training else {"logits": self.output(h)}
            h = h if self.training else h.flatten(0, 1)[supervised]
            nats = linear_cross_entropy(h, self.output.weight, targets[supervised])
            output["loss"] = nats / num_items_in_batch
        return CausalLMOutputWithPast(**output, **({CACHE: present} if use_cache else {}))

    def _hidden(
        self, input_ids: Tensor, past: KVCache | None, positions: Tensor | None
    ) -> tuple[Tensor, KVCache]:
        """The normed hidden states, at ``positions`` as in ``take``, and all keys and values."""
        config, device = self.config, input_ids.device
        start = past[0][0].size(2) if past else 0
        end = start + input_ids.size(1)
        if end > config.max_seq_len:
            limit = f"the model's max_seq_len of {config.max_seq_len}"
            raise UserError(f"{end} tokens exceed {limit}")
        if self._rope is None or self._rope.device != device:
            head_dim = config.dim // config.n_heads
            self._rope = rope_table(head_dim, config.max_seq_len, config.rope_theta, device)
        turns, present = self._rope[start:end], []
        h = self.dropout(self.tok_embeddings(input_ids))
        past = past or [None] * len(self.layers)
        for layer, layer_past in zip(self.layers, past, strict=True):
            # Only the last may leave positions out: keys and values of a next one need them all.
            wanted = positions if layer is self.layers[-1] else None
            h, layer_present = layer(h, turns, layer_past, wanted)
            present.append(layer_present)
        return self.norm(h), present

    def compile(self, **settings) -> None:
        """``torch.compile`` each block, for all lengths; state-dict keys and the loss stay.

        The blocks share their programs. There are several (a last block computes less, a batch of
        one row is special), but fewer than the 8 beyond which PyTorch silently stops compiling.
        """
        # PyTorch would remark on the complex rotary positions at every start.
        warnings.filterwarnings("ignore", "Torchinductor does not support code generation for comp")
        for layer in self.layers:
            layer.compile(**{"dynamic": True, **settings})
