"""MiniMindLM: a Llama-style decoder small enough to read in one sitting.

Token ids -> embedding -> n_layers x (RMSNorm, grouped-query attention with rotary positions,
RMSNorm, SwiGLU) -> RMSNorm -> logits through the transposed embedding. State-dict keys and
arithmetic are MiniMind's (April 2025).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from core.errors import UserError
from model.kernels import IGNORED, linear_cross_entropy, rms_norm, swiglu
from model.LMConfig import LMConfig

KVCache = list[
    tuple[Tensor, Tensor]
]  # per layer: keys and values, each (B, n_kv_heads, S, head_dim)


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)``, the statistics in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rope_table(head_dim: int, length: int, theta: float, device: torch.device) -> Tensor:
    """The rotary angles ``position * theta^(-2i/head_dim)`` as unit complex numbers: complex64
    (length, head_dim/2).
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
    return torch.complex(angles.cos(), angles.sin())


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn each neighbouring pair of features by its position's angle (the complex-pair order, not
    rotate-half).

    ``x`` (B, T, heads, head_dim) of any dtype, ``turns`` (T, head_dim/2) complex64; computed in
    fp32, in one pass.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return (
        torch.view_as_real(pairs * turns[:, None, :]).flatten(-2).type_as(x)
    )  # one angle for all heads


def take(x: Tensor, positions: Tensor | None) -> Tensor:
    """The chosen ``positions`` (N,) of ``x`` (B, T, D), counted through the flattened batch: (N,
    D); None: ``x``.
    """
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
        q = rotate(self.wq(x).view(B, T, -1, self.head_dim), turns).transpose(
            1, 2
        )  # (B, n_heads, T, head_dim)
        k = rotate(self.wk(x).view(B, T, -1, self.head_dim), turns).transpose(
            1, 2
        )  # (B, n_kv_heads, T, head_dim)
        v = self.wv(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        S = k.size(2)
        # is_causal aligns the mask to the first key, so several new tokens after a cache need their
        # own small mask.
        mask = (
            None
            if T == 1 or past is None
            else torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        )
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=T > 1 and past is None,
            enable_gqa=True,
        )
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
    def __init__(self, config: LMConfig):
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        turns: Tensor,
        past: tuple[Tensor, Tensor] | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, T, dim) and this layer's keys and values; with ``positions`` (N,) only those come
        out: (N, dim).
        """
        attended, present = self.attention(self.attention_norm(x), turns, past, positions)
        h = take(x, positions) + attended
        return h + self.feed_forward(self.ffn_norm(h)), present


class MiniMindLM(PreTrainedModel):
    """The decoder. ``save_pretrained`` and ``from_pretrained`` work; training files are plain state
    dicts.
    """

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
        # No buffer: from_pretrained leaves non-persistent buffers as garbage, and .bfloat16() would
        # round the angles.
        self._rope: Tensor | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """N(0, 0.02); what writes into the residual stream is divided by sqrt(2 n_layers)
        (GPT-2).
        """
        if isinstance(module, nn.Linear | nn.Embedding):
            scale = (
                math.sqrt(2 * self.config.n_layers)
                if getattr(module, "writes_residual", False)
                else 1.0
            )
            nn.init.normal_(module.weight, std=0.02 / scale)
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
        past_key_values: KVCache | None = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutputWithPast:
        """Next-token logits, and the loss when ``labels`` are given.

        ``input_ids`` (B, T) int64, right-padded: a position sees only what stands before it, so
        padding and batch-mates never change a row. ``past_key_values`` holds S earlier tokens
        (none: S = 0). ``logits_to_keep`` n > 0 keeps the last n positions, 0 all, a tensor those
        positions. ``labels`` (B, T): the id itself or -100; they are shifted here. Loss = summed
        cross-entropy / ``num_items_in_batch`` (default: the number of supervised targets), 0 when
        nothing is supervised.

        Returns logits (B, T or kept, vocab_size), ``loss`` (scalar, fp32 at least), and
        ``past_key_values`` covering S + T tokens when ``use_cache``. In training mode with
        ``labels``, only positions that predict a supervised target reach the head and the last
        block's output and MLP, and ``logits`` is None; loss and gradients are the same. Raises
        ``UserError`` past ``max_seq_len``, and for ``labels`` together with ``logits_to_keep``.
        """
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise UserError("labels need the logits of all positions: leave logits_to_keep out")
        past = past_key_values or [None] * len(self.layers)
        start = 0 if past[0] is None else past[0][0].size(2)
        turns = self._rope_at(start, input_ids.size(1), input_ids.device)
        positions = None  # that the last block and the head compute; None: all
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()  # of each position
            if self.training:
                positions = (targets != IGNORED).nonzero().flatten()
                targets = targets[positions]
            if num_items_in_batch is None:
                num_items_in_batch = (targets != IGNORED).sum().clamp(min=1)
        h = self.dropout(self.tok_embeddings(input_ids))
        present = []
        for number, (layer, layer_past) in enumerate(zip(self.layers, past, strict=True), 1):
            last = number == len(self.layers)
            h, layer_present = layer(h, turns, layer_past, positions if last else None)
            present.append(layer_present)
        h = self.norm(h)
        cache = present if use_cache else None
        if positions is not None:
            loss = linear_cross_entropy(h, self.output.weight, targets) / num_items_in_batch
            return CausalLMOutputWithPast(loss=loss, past_key_values=cache)
        kept = (
            slice(-logits_to_keep, None)
            if isinstance(logits_to_keep, int) and logits_to_keep
            else logits_to_keep
        )
        logits = self.output(h if isinstance(kept, int) else h[:, kept])
        loss = None
        if labels is not None:
            wide = logits if logits.dtype == torch.float64 else logits.float()
            nats = F.cross_entropy(
                wide.flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum"
            )
            loss = nats / num_items_in_batch
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def compile(self, **settings) -> None:
        """``torch.compile`` each block, for all lengths; state-dict keys and the head's loss stay
        as they are.

        The blocks share their programs. There are several, for a last block computes less and a
        batch of one row is special, but fewer than the 8 after which PyTorch would quietly go on
        uncompiled.
        """
        for layer in self.layers:
            layer.compile(**{"dynamic": True, **settings})

    def _rope_at(self, start: int, length: int, device: torch.device) -> Tensor:
        config = self.config
        if start + length > config.max_seq_len:
            raise UserError(
                f"{start + length} tokens exceed the model's max_seq_len of {config.max_seq_len}"
            )
        if self._rope is None or self._rope.device != device:
            self._rope = rope_table(
                config.dim // config.n_heads, config.max_seq_len, config.rope_theta, device
            )
        return self._rope[start : start + length]
