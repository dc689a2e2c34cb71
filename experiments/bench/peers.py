"""The same operations in other libraries, as functions of the inputs that ours take.

Each function gives those of the libraries that are installed, for a device and for decoding or not.
"""

import importlib
import os
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.hugging_face import import_transformers

ATTENTION = "attention (another function)"  # there for its time alone
Sides = dict[str, Callable[..., Tensor]]


def imported(module: str, name: str) -> Callable | None:
    """Return a function of a package, or None where the package is not there or does not work."""
    try:
        if module.startswith("transformers"):
            import_transformers()
        return vars(importlib.import_module(module))[name]
    except Exception:  # packages that are built for a GPU fail in many ways without one
        return None


def present(sides: dict[str, Callable | None]) -> Sides:
    return {name: side for name, side in sides.items() if side is not None}


def delta_peers(device: str, decode: bool) -> Sides:
    """Return other gated delta rules. flash-linear-attention hands over to FlashQLA where that is installed: it is
    there twice, with and without that. FlashInfer has no gradients and takes decays, not their logarithms."""
    name = "fused_recurrent_gated_delta_rule" if decode else "chunk_gated_delta_rule"
    theirs = "torch_recurrent_gated_delta_rule" if decode else "torch_chunk_gated_delta_rule"
    on_gpu = lambda module, function: imported(module, function) if device == "cuda" else None  # noqa: E731
    fla = on_gpu("fla.ops.gated_delta_rule", name)
    qla, infer = (None if decode else on_gpu(module, name) for module in ("flash_qla", "flashinfer.gdn_prefill"))
    hf = imported("transformers.models.qwen3_next.modeling_qwen3_next", theirs)

    def run(f, q, k, v, g, beta, initial_state=None):
        if f is hf and v.shape[2] > q.shape[2]:
            q, k = (x.repeat_interleave(v.shape[2] // q.shape[2], dim=2) for x in (q, k))
        return f(q, k, v, g=g, beta=beta, initial_state=initial_state, output_final_state=decode)[0]

    def alone(f, **inputs):
        with mock.patch.dict(os.environ, {"FLA_FLASH_QLA": "0"}):
            return run(f, **inputs)

    def packed(f, q, k, v, g, beta):
        (B, T), given = q.shape[:2], (q, k, v, g.float().exp(), beta.float())
        if torch.is_grad_enabled() and any(x.requires_grad for x in given):
            raise NotImplementedError("FlashInfer's gated delta rule has no gradients")
        boundaries = torch.arange(B + 1, device=q.device) * T
        q, k, v, decays, beta = (x.flatten(0, 1).contiguous() for x in given)
        return f(q, k, v, decays, beta, cu_seqlens=boundaries).view(B, T, *v.shape[1:])

    def attention(q, k, v, g, beta):
        q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    sides = {
        "flash-linear-attention": fla and partial(run, fla),
        "flash-linear-attention, FLA_FLASH_QLA=0": fla and qla and partial(alone, fla),
        "FlashQLA": qla and partial(run, qla),
        "FlashInfer": infer and partial(packed, infer),
        "transformers": hf and partial(run, hf),
    }
    return present(sides | {ATTENTION: None if decode else attention})


def ssd_peers(device: str, decode: bool) -> Sides:
    module = "transformers.models.mamba2.modeling_mamba2"
    if decode:
        step = imported("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
        sides = {"mamba-ssm": step if device == "cuda" else None}
        sides["transformers"] = imported(module, "mamba2_selective_state_update")

        def update(f, x, dt, A, B, C, D, initial_states):
            P, N = initial_states.shape[2:]
            A, D = A[:, None, None].expand(-1, P, N), D[:, None].expand(-1, P)
            dt = dt[:, 0, :, None].expand(-1, -1, P)
            if f is sides["transformers"]:
                dt, A = dt[..., :1], A[..., :1]
            return f(initial_states.clone(), x[:, 0], dt, A, B[:, 0], C[:, 0], D)[:, None]

        return present({name: f and partial(update, f) for name, f in sides.items()})
    chunks = imported("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined") if device == "cuda" else None
    hf = imported(module, "mamba2_chunk_scan")

    def scan(f, chunk_size, x, dt, A, B, C, D):
        found = f(x, dt, A, B, C, chunk_size, D=D)
        return found[0] if isinstance(found, tuple) else found

    sides = {"mamba-ssm": chunks and partial(scan, chunks, 256), "transformers": hf and partial(scan, hf, 64)}
    return present(sides)


def conv_peers(device: str, decode: bool) -> Sides:
    if decode:
        return {}
    cuda = imported("causal_conv1d", "causal_conv1d_fn") if device == "cuda" else None
    hf = imported("transformers.models.mamba2.modeling_mamba2", "causal_conv1d_fn")
    run = lambda f, x, weight, bias: f(x.mT, weight, bias, activation="silu").mT  # noqa: E731
    return present({"causal-conv1d": cuda and partial(run, cuda), "transformers": hf and partial(run, hf)})


def sparse_peers(device: str, decode: bool) -> Sides:
    """Return dense causal attention, for its time: what picking keys is to save."""

    def dense(q, k, v, indices):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return {ATTENTION: dense}


def latent_peers(device: str, decode: bool) -> Sides:
    """Return FlashMLA's sparse attention, which has no gradients and takes one sequence of bfloat16."""
    flash = imported("flash_mla", "flash_mla_sparse_fwd") if device == "cuda" else None

    def forward(f, q, latent, rest, indices):
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, latent, rest)):
            raise NotImplementedError("FlashMLA's sparse attention has no gradients")
        kv = torch.cat([latent, rest], dim=-1)[0]  # both one head
        return f(q[0], kv, indices[0][:, None].int(), q.shape[-1] ** -0.5, latent.shape[-1])[0][None]

    return present({"FlashMLA": flash and partial(forward, flash)})


def grouped_peers(device: str, decode: bool) -> Sides:
    """Return PyTorch's grouped product, and one product per expert."""

    def grouped(x, weight, counts):
        return F.grouped_mm(x, weight, offs=counts.cumsum(0, dtype=torch.int32))

    def each(x, weight, counts):
        return torch.cat([part @ matrix for part, matrix in zip(x.split(counts.tolist()), weight, strict=True)])

    return present({"F.grouped_mm": grouped if device == "cuda" else None, "one product per expert": each})


def head_peers(device: str, decode: bool) -> Sides:
    """Return the head with its logits in memory."""

    def logits(hidden, weight, targets, token_weights):
        losses = F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")
        return (losses * token_weights.detach()).sum()

    return {"F.cross_entropy of logits": logits}
