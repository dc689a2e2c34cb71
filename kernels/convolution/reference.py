"""The short convolution token by token: the definition.

Shape letters: B rows of the batch, W - 1 tokens of the window (W with the current one), C channels.
"""

import torch
from torch import Tensor


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return y and the final state, shapes as in `causal_conv1d`, without the activation."""
    window_BWC, outputs = initial_state, []
    for x_BC in x.unbind(1):
        window_BWC = torch.cat([window_BWC, x_BC[:, None]], dim=1)
        y_BC = (window_BWC * weight.T).sum(1)
        outputs.append(y_BC if bias is None else y_BC + bias)
        window_BWC = window_BWC[:, 1:]
    return torch.stack(outputs, dim=1), window_BWC
