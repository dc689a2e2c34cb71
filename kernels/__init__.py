"""Operations of the recurrent mixers: one folder an operation, one public function each.

`reference.py` in a folder is the definition, `torch.py` the fast path on any device, `triton.py` the kernels for GPUs, which
`operator.py` makes known to PyTorch. Every backend is tested against the reference in float64.
"""

from kernels.causal_conv1d import causal_conv1d
from kernels.gated_delta_rule import gated_delta_rule
from kernels.ssd import ssd

__all__ = ["causal_conv1d", "gated_delta_rule", "ssd"]
