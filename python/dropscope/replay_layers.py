"""Replay of the torch functions that hide dropout inside: attention and recurrent networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from dropscope.entry_points import running
from dropscope.intercept import Call, Handlers, attention_body
from dropscope.mask_op import wide
from dropscope.replay import arguments, described, replaying

_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_RECURRENT = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")
_PACKED = ("data", "batch_sizes", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional")


def _multi_head_attention(call: Call) -> Any:
    """Inside, whatever its batch_first says, weights are (B·heads, T, S) or (B, heads, T, S)."""
    replay = replaying(call)
    before, replay.batch_dim = replay.batch_dim, 0
    try:
        return attention_body(call)
    finally:
        replay.batch_dim = before


def _attention(call: Call) -> Any:
    """dropout(softmax(scale · Q Kᵀ + mask)) V, written out; the mask's units are (heads, T, S) of a sample."""
    given = arguments(call, _ATTENTION)
    p = given.get("dropout_p", 0.0)
    if p == 0.0:
        return NotImplemented
    query, key, value, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    causal = given.get("is_causal", False)
    if causal and mask is not None:
        raise ValueError(f"replay_dropout: {described(call)} must not have both attn_mask and is_causal")
    if given.get("enable_gqa", False):
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scale = given.get("scale")
    scores = (query @ key.mT).to(wide(query.dtype)) * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    weights = replaying(call).drop(call, _softmax(scores, mask).to(value.dtype), p, dim=0)
    return weights @ value


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the last dimension; a row that is masked throughout gives 0, and so do its derivatives."""
    if mask is None:
        return scores.softmax(-1)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    else:
        scores = scores + mask
    dead = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)


def _recurrent(call: Call) -> Any:
    """Layer by layer, with the dropout between layers as a dropout call of its own."""
    packed = len(call.args) > 3 and isinstance(call.args[3], Sequence)
    given = arguments(call, _PACKED if packed else _RECURRENT)
    layers, p = given["num_layers"], given["dropout"]
    if not given["train"] or p == 0.0 or layers == 1:
        return NotImplemented
    lstm = call.func is torch.lstm
    states = list(given["hx"]) if lstm else [given["hx"]]
    states = [state.chunk(layers) for state in states]
    weights, each = given["params"], len(given["params"]) // layers
    last: tuple[Any, ...] = (given["has_biases"], 1, 0.0, True, given["bidirectional"])
    last = last if packed else (*last, given["batch_first"])
    out, final = given["data"] if packed else given["input"], []
    for layer in range(layers):
        if layer and packed:
            out = _drop_packed(call, out, given["batch_sizes"], given["data"], p)
        elif layer:
            out = replaying(call).drop(call, out, p, dim=0 if given["batch_first"] else 1)
        state = tuple(chunks[layer] for chunks in states)
        head = (out, given["batch_sizes"]) if packed else (out,)
        out, *last_states = call.func(
            *head, state if lstm else state[0], weights[layer * each : (layer + 1) * each], *last
        )
        final.append(last_states)
    return (out, *(torch.cat(parts) for parts in zip(*final, strict=True)))


def _drop_packed(call: Call, x: Tensor, sizes: Tensor, data: Tensor, p: float) -> Tensor:
    """Dropout on packed rows; unit t·H + h of a sample, as if padded, so the mask does not depend on the padding."""
    inputs = [item for _, given in running() for item in given if isinstance(item, PackedSequence)]
    source = next((packed for packed in inputs if packed.data is data), None)
    if source is None:
        raise ValueError(f"replay_dropout: {described(call)} must be called by its module: a packed batch is sorted")
    order = source.sorted_indices
    steps, batch = len(sizes), int(sizes[0])
    present = (torch.arange(batch) < sizes.unsqueeze(1)).to(x.device)

    def rows(keep: Tensor) -> Tensor:
        return (keep if order is None else keep[order]).transpose(0, 1)[present]

    return replaying(call).gate(call, x, p, (batch, steps, x.shape[-1]), 0, rows)


LAYERS: Handlers = {
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recurrent),
}
"""The rules of attention and of recurrent networks."""
