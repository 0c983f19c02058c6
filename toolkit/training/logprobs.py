"""Log-probabilities of tokens when each tensor-parallel rank holds a part of the vocabulary."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor


def token_logprobs(logits: Tensor, labels: Tensor, vocabulary: int) -> Tensor:
    """log p(label) of each position, in fp32.

    The rows that pad the vocabulary to a multiple of the tensor-parallel size take no part in the softmax.

    Args:
        logits: (b, s, padded vocabulary / tensor-parallel size), this rank's share.
        labels: (b, s) int64, the token that follows each position; the same on all tensor-parallel ranks.
        vocabulary: tokens of the model, without padding.

    Returns:
        (b, s) float32, the same on all tensor-parallel ranks.
    """
    share = logits.size(-1)
    first = parallel_state.get_tensor_model_parallel_rank() * share
    if first + share > vocabulary:
        padding = torch.arange(first, first + share, device=logits.device) >= vocabulary
        logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
    return -vocab_parallel_cross_entropy(logits, labels)


def response_logprobs(logits: Tensor, labels: Tensor, response: Tensor, vocabulary: int) -> Tensor:
    """Sum of log p over the tokens of each response: (b,) float32.

    Args:
        logits, labels, vocabulary: as in ``token_logprobs``.
        response: (b, s) bool, true where the label belongs to the response (its end-of-turn token included).
    """
    return (token_logprobs(logits, labels, vocabulary) * response).sum(-1)
