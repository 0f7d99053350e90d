"""MiniMindLM: a Llama-style decoder small enough to read in one sitting.

Token ids -> embedding -> n_layers x (RMSNorm, grouped-query attention with rotary positions, RMSNorm, SwiGLU)
-> RMSNorm -> logits through the transposed embedding. State-dict keys and arithmetic are MiniMind's (April 2025).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from core.errors import UserError
from model.LMConfig import LMConfig

KVCache = list[tuple[Tensor, Tensor]]  # per layer: keys and values, each (B, n_kv_heads, S, head_dim)
IGNORED = -100  # the label of a position that is not learned, PyTorch's own default


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)``, the statistics in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), (x.size(-1),), eps=self.eps).type_as(x)


def rope_tables(head_dim: int, length: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles ``position * theta^(-2i/head_dim)``: two fp32 (length, head_dim/2)."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each neighbouring pair of features by its position's angle (the complex-pair order, not rotate-half).

    ``x`` (B, T, heads, head_dim) of any dtype, ``cos`` and ``sin`` (T, head_dim/2) fp32; computed in fp32.
    """
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None, :], sin[:, None, :]  # one angle for all heads
    turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    return turned.flatten(-2).type_as(x)


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
        self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        B, T, _ = x.shape
        q = rotate(self.wq(x).view(B, T, -1, self.head_dim), cos, sin).transpose(1, 2)  # (B, n_heads, T, head_dim)
        k = rotate(self.wk(x).view(B, T, -1, self.head_dim), cos, sin).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        v = self.wv(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        S = k.size(2)
        # is_causal aligns the mask to the first key, so several new tokens after a cache need their own small mask.
        mask = None if T == 1 or past is None else torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=T > 1 and past is None,
            enable_gqa=True,
        )
        return self.resid_dropout(self.wo(y.transpose(1, 2).reshape(B, T, -1))), (k, v)


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
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class MiniMindBlock(nn.Module):
    def __init__(self, config: LMConfig):
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, present = self.attention(self.attention_norm(x), cos, sin, past)
        h = x + attended
        return h + self.feed_forward(self.ffn_norm(h)), present


class MiniMindLM(PreTrainedModel):
    """The decoder. ``save_pretrained`` and ``from_pretrained`` work; training files are plain state dicts."""

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
        # No buffer: from_pretrained leaves non-persistent buffers as garbage, and .bfloat16() would round the angles.
        self._rope: tuple[Tensor, Tensor] | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """N(0, 0.02); what writes into the residual stream is divided by sqrt(2 n_layers) (GPT-2)."""
        if isinstance(module, nn.Linear | nn.Embedding):
            scale = math.sqrt(2 * self.config.n_layers) if getattr(module, "writes_residual", False) else 1.0
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

        ``input_ids`` (B, T) int64, right-padded: a position sees only what stands before it, so padding and
        batch-mates never change a row. ``past_key_values`` holds S earlier tokens (none: S = 0). ``logits_to_keep``
        n > 0 keeps the last n positions, 0 all, a tensor those positions. ``labels`` (B, T): the id itself or -100;
        they are shifted here. Loss = summed cross-entropy / ``num_items_in_batch`` (default: the number of supervised
        targets), 0 when nothing is supervised.

        Returns logits (B, T or kept, vocab_size), ``loss`` (scalar, fp32 at least), and ``past_key_values`` covering
        S + T tokens when ``use_cache``. Raises ``UserError`` past ``max_seq_len``.
        """
        past = past_key_values or [None] * len(self.layers)
        start = 0 if past[0] is None else past[0][0].size(2)
        cos, sin = self._rope_at(start, input_ids.size(1), input_ids.device)
        h = self.dropout(self.tok_embeddings(input_ids))
        present = []
        for layer, layer_past in zip(self.layers, past, strict=True):
            h, layer_present = layer(h, cos, sin, layer_past)
            present.append(layer_present)
        h = self.norm(h)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self.output(h if isinstance(kept, int) else h[:, kept])
        loss = None if labels is None else next_token_loss(logits, labels, num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=present if use_cache else None)

    def _rope_at(self, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        config = self.config
        if start + length > config.max_seq_len:
            raise UserError(f"{start + length} tokens exceed the model's max_seq_len of {config.max_seq_len}")
        if self._rope is None or self._rope[0].device != device:
            self._rope = rope_tables(config.dim // config.n_heads, config.max_seq_len, config.rope_theta, device)
        cos, sin = self._rope
        return cos[start : start + length], sin[start : start + length]


def next_token_loss(logits: Tensor, labels: Tensor, num_items: int | Tensor | None = None) -> Tensor:
    """Cross-entropy in nats of ``labels`` (B, T) one step ahead of ``logits`` (B, T, V), summed, / ``num_items``.

    In fp32, or fp64 for fp64 logits. ``num_items`` None divides by the number of supervised targets.
    """
    targets = labels[:, 1:].flatten()
    if num_items is None:
        num_items = (targets != IGNORED).sum().clamp(min=1)
    logits = logits[:, :-1].flatten(0, 1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / num_items
