"""Operations of the mixers and channels: tensors in and out, several backends each.

The face of the package is the functions below. One folder per operation, all with the same files:

    __init__.py          the public function: signature, shapes, errors; and OPERATION, for trials and tests
    reference.py         the definition, as plain as can be; every other backend is tested against it in float64
    chunked.py           the fast path on any device and the count of its FLOPs (depthwise.py for the convolution,
                         segments.py for the grouped product, blocks.py for the indexer and the cross entropy,
                         gathered.py and masked.py for sparse attention)
    triton_kernels.py    the kernels for GPUs
    triton_operators.py  their registration with PyTorch: autograd, torch.compile, FlopCounterMode (operators.py where
                         the fast path is registered too)
    problems.py          random problems for trials, tests and benchmarks

`fast_weights/` is the delta rule, `delta/` its case with one gate per head and one key. Attention has no kernels of
ours for GPUs but paths through PyTorch's own: `block_rows.py` is its fast path on a CPU, `fused.py` what it takes of
PyTorch, `pairs.py` which key each query sees, `largest.py` the largest score of each head.

`common/` holds what they share: choice and trial of a backend, packed sequences, checks of arguments, launches of
Triton kernels with their block sizes, and Triton functions on tiles. A new operation is a folder with these files,
its block sizes in `common/launch.py`, a line here, its calls in `experiments/bench/compiled.py`, and tests: a recurrent
one a case in `tests/kernels/cases.py`, by which it is held to the duties of all, the others a file of their own.
`hugging_face.py` keeps this package apart from one of the same name.
"""

from kernels.common.arguments import check_boundaries
from kernels.convolution import causal_conv1d, causal_conv1d_flops
from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_flops
from kernels.delta import gated_delta_rule, gated_delta_rule_flops
from kernels.delta_step import gated_delta_step, gated_delta_step_flops
from kernels.fast_weights import delta_rule, delta_rule_flops
from kernels.grouped import grouped_matmul, grouped_matmul_flops
from kernels.indexer import (
    lightning_indexer,
    lightning_indexer_flops,
    lightning_indexer_keys,
    lightning_indexer_loss,
    lightning_indexer_loss_flops,
)
from kernels.softmax_attention import attention, attention_flops, largest_scores
from kernels.sparse import sparse_attention, sparse_attention_flops
from kernels.state_space import ssd, ssd_flops

__all__ = [
    "attention",
    "attention_flops",
    "causal_conv1d",
    "causal_conv1d_flops",
    "check_boundaries",
    "delta_rule",
    "delta_rule_flops",
    "gated_delta_rule",
    "gated_delta_rule_flops",
    "gated_delta_step",
    "gated_delta_step_flops",
    "grouped_matmul",
    "grouped_matmul_flops",
    "largest_scores",
    "lightning_indexer",
    "lightning_indexer_flops",
    "lightning_indexer_keys",
    "lightning_indexer_loss",
    "lightning_indexer_loss_flops",
    "linear_cross_entropy",
    "linear_cross_entropy_flops",
    "sparse_attention",
    "sparse_attention_flops",
    "ssd",
    "ssd_flops",
]
