"""Linear layers whose products read narrow numbers, in training and after it.

    LowPrecision(format="nvfp4").convert(model)

Shape letters: N rows (tokens), D and F width of a layer's input and output, P pairs of a token and an expert, sorted by
expert, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from archs.channels.experts import ExpertLinear
from archs.language_model import LanguageModel
from archs.number_formats import FORMATS, Format
from archs.parameters import Linear, block_layers


class _Product(torch.autograd.Function):
    """x [N, D] times a weight [F, D]. Each of the three products of a step, forward and of either gradient, reads both
    factors quantised in blocks along what it sums over, from the float32 that they have, and sums in float32."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_FD: Tensor, format: Format) -> Tensor:
        ctx.save_for_backward(x_ND, weight_FD)
        ctx.format = format
        return format.quantised(x_ND, format.activations) @ format.quantised(weight_FD, format.weights).mT

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_NF: Tensor) -> tuple[Tensor, Tensor, None]:  # pyrefly: ignore[bad-override]
        (x_ND, weight_FD), format, along = ctx.saved_tensors, ctx.format, ctx.format.activations
        of_x = format.quantised(gradient_NF, along) @ format.quantised(weight_FD.mT, format.weights).mT
        of_weight = format.quantised(gradient_NF.mT, along) @ format.quantised(x_ND.mT, along).mT
        return of_x, of_weight, None


def product(x: Tensor, weight_FD: Tensor, format: Format) -> Tensor:
    """x [..., D] times a weight, [..., F] of the dtype of x."""
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        y_NF = _Product.apply(x.flatten(0, -2).float(), weight_FD.float(), format)
    return y_NF.view(*x.shape[:-1], len(weight_FD)).to(x.dtype)


class LowPrecisionLinear(nn.Linear):
    """A linear layer in a narrow format."""

    format: Format

    def forward(self, input: Tensor) -> Tensor:
        y = product(input, self.weight, self.format)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class LowPrecisionExperts(ExpertLinear):
    """The linear layers of experts in a narrow format: the tokens of each are quantised by themselves."""

    format: Format

    def product(self, x_PD: Tensor, counts_E: Tensor) -> Tensor:
        if x_PD.is_meta:  # counts without values
            return super().product(x_PD, counts_E)
        rows = x_PD.split(counts_E.tolist())
        return torch.cat([product(x, weight, self.format) for x, weight in zip(rows, self.weight, strict=True)])


@dataclass(frozen=True)
class LowPrecision:
    """Training in a narrow number format, emulated: what goes into the products of every linear layer of the blocks,
    forward and backward, is quantised and read again (see `number_formats`), and weights, gradients and optimiser stay
    in float32. The embedding, the head, norms, biases, routers, attention, scans and short convolutions stay as they
    are; so does the weight by which latent attention decodes. FLOPs are counted as ever.

    These are the plain formats, with rounding to nearest everywhere. Of the published recipes are left out:
    DeepSeek-V3's second rounding of activations, kept in tiles 1x128 and read in tiles 128x1 for the gradient of the
    weight, and its powers of two for some of them; for MXFP8, scales that are rounded up (arXiv 2506.08027); for NVFP4,
    stochastic rounding of gradients, random Hadamard transforms, and a share of layers kept in bfloat16.

    NVFP4 has a scale for a whole tensor, so a token's numbers are rounded by the largest of all tokens of a pass, those
    after it included.

    Args:
        format: a name in `FORMATS`.

    Raises:
        ValueError: for another.
    """

    format: str

    def __post_init__(self):
        if self.format not in FORMATS:
            raise ValueError(f"low_precision.format={self.format!r} must be one of {', '.join(FORMATS)}")

    def convert(self, model: LanguageModel) -> LanguageModel:
        """Have the layers of a model compute in the format, in place; names and weights stay as they are."""
        for name, layer in block_layers(model).items():
            model.set_submodule(name, self._converted(layer))
        return model

    def _converted(self, layer: Linear) -> LowPrecisionLinear | LowPrecisionExperts:
        sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
        with torch.device("meta"):
            if isinstance(layer, ExpertLinear):
                converted = LowPrecisionExperts(len(layer.weight), *sizes, bias, layer.top_k)
            else:
                converted = LowPrecisionLinear(*sizes, bias)
        for name, parameter in layer.named_parameters(recurse=False):
            converted.register_parameter(name, parameter)
        converted.format = FORMATS[self.format]
        return converted.train(layer.training)
