"""Attention over segments in plain PyTorch: truth for tests and the way without a GPU. Any float dtype, fp64 too."""

import torch
import torch.nn.functional as F


def attention_reference(queries, segments, *, scale=None, outs=None, return_lse=False):
    """What `attention.attention` gives, by torch's scaled_dot_product_attention on concatenated segments.

    Args and returns as there; lse is fp32, or fp64 for fp64 inputs.
    """
    single = isinstance(queries, torch.Tensor)
    queries = (queries,) if single else tuple(queries)
    key, value = (torch.cat(parts, dim=1).transpose(1, 2) for parts in zip(*segments, strict=True))
    results = [
        F.scaled_dot_product_attention(q.transpose(1, 2), key, value, scale=scale).transpose(1, 2) for q in queries
    ]
    if outs is not None:
        outs = (outs,) if single else outs
        results = [out.copy_(result) for out, result in zip(outs, results, strict=True)]
    result = results[0] if single else tuple(results)
    if not return_lse:
        return result
    lses = tuple(_lse(q.transpose(1, 2), key, scale) for q in queries)
    return result, lses[0] if single else lses


def _lse(query, key, scale):
    exact = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.logsumexp(scale * query.to(exact) @ key.to(exact).transpose(2, 3), dim=-1)


def attention_merge_reference(outs, lses, *, out=None, return_lse=False):
    """What `attention_merge.attention_merge` gives; args and returns as there."""
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - torch.where(lse.isneginf(), 0.0, lse)).transpose(2, 3)[..., None]
    result = (weights * outs.to(weights.dtype)).sum(0).to(outs.dtype)
    result = result if out is None else out.copy_(result)
    return (result, lse) if return_lse else result
