"""AdamW and its transfer across width and length.

One learning rate, tuned at `base_width`, serves every width by muP's rule for Adam (Yang et al., arXiv 2203.03466,
table 8) in its simplest form: matrices inside the model and the head, whose updates sum over the width, take
learning_rate * base_width / width; the embedding and all vectors take learning_rate. Together with the
1 / sqrt(fan-in) initialisation and a head that starts at zero this keeps the size of every update's effect
independent of the width. Only matrices inside the blocks are decayed.
"""

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def adamw(model: nn.Module, *, learning_rate: float, base_width: int, betas, weight_decay: float) -> AdamW:
    """AdamW over the parameters of a LanguageModel in three groups: block matrices, head, and the rest."""
    transfer = base_width / model.width
    matrices = [layer.weight for _, layer in model.linear_layers()]
    head = [] if model.tied else [model.head.weight]
    taken = {id(p) for p in (*matrices, *head)}
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups = [
        {"params": matrices, "lr": learning_rate * transfer, "weight_decay": weight_decay},
        {"params": head, "lr": learning_rate * transfer, "weight_decay": 0.0},
        {"params": rest, "lr": learning_rate, "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], betas=tuple(betas), fused=True)


def warmup_then_linear(optimizer: AdamW, steps: int, warmup: float) -> LambdaLR:
    """Linear rise over the share `warmup` of the steps, then a straight line to zero at the run's own end
    (Bergsma et al., arXiv 2502.15938)."""

    def factor(step: int) -> float:
        done = (step + 0.5) / steps
        return done / warmup if done < warmup else (1 - done) / (1 - warmup)

    return LambdaLR(optimizer, factor)
