"""A language small enough to know everything about, a joint distribution over V^L sequences, in place of a
LanguageModel."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import one_hot, pad

from archs.contracts import State
from archs.visibility import Kind
from objectives.contracts import Batch, Request

V = L = 3
P = torch.from_numpy(np.random.default_rng(0).dirichlet(np.full(V**L, 0.5))).view([V] * L)
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=L)))
NATS = -P.flatten().log()
ENTROPY = float((P.flatten() * NATS).sum())


def leave_one_out(joint, evidence_BLV):
    """p(x_l = v | evidence about the other positions), [B, L, V], by summing over all sequences."""
    found, n = [], joint.dim()
    for kept in range(n):
        product = joint[None]
        for i in range(n):
            if i != kept:
                shape = [len(evidence_BLV)] + [-1 if d == i else 1 for d in range(n)]
                product = product * evidence_BLV[:, i].reshape(shape)
        marginal = product.sum([d + 1 for d in range(n) if d != kept])
        found.append(marginal / marginal.sum(-1, keepdim=True))
    return torch.stack(found, 1)


@dataclass(frozen=True, eq=False)
class Past(State):
    """The tokens themselves."""

    tokens: torch.Tensor

    @property
    def length(self):
        return self.tokens.shape[1]

    @property
    def nbytes(self):
        return self.tokens.nbytes

    def repeat(self, copies):
        return Past(self.tokens.repeat_interleave(copies, dim=0))


class Oracle:
    """The exact conditionals of a joint distribution. Ids from V on are unknown (masks, the start). For uniform noise
    `kernel(p)` [V, V] gives q(noised | clean)."""

    def __init__(self, joint=P, extra_columns=0, kernel=None):
        self.joint, self.L, self.V = joint, joint.dim(), joint.shape[0]
        self.extra, self.kernel = extra_columns, kernel

    def empty_states(self, batch):
        return [Past(torch.zeros(batch, 0, dtype=torch.long))]

    def extend(self, tokens_BT, states, visibility, time=None):
        """Causal tokens begin with the start; a block to be denoised does not."""
        seen, before = torch.cat([states[0].tokens, tokens_BT], 1), states[0].length
        if visibility.kind is Kind.CAUSAL:
            T = seen.shape[1]
            hidden = self.hidden(pad(seen, (0, max(0, self.L - T)), value=self.V), visibility)
        else:
            hidden, T = self.conditionals(self.known(seen)), seen.shape[1]
        return hidden[:, before:T], [Past(seen)]

    def known(self, tokens_BT):
        rows = pad(one_hot(tokens_BT.clamp(max=self.V), self.V + 1), (0, 0, 0, self.L - tokens_BT.shape[1]))
        rows[:, tokens_BT.shape[1] :, self.V] = 1
        return rows[..., : self.V].double() + rows[..., self.V :]

    def hidden(self, tokens_BT, visibility, time=None):
        if visibility.kind is Kind.CAUSAL:  # inputs are shifted by the start
            known = self.known(tokens_BT[:, 1:])
            return torch.stack([self.conditionals(self.up_to(known, t))[:, t] for t in range(tokens_BT.shape[1])], 1)
        if visibility.kind is Kind.BLOCK_CAUSAL:
            noised, clean = self.known(tokens_BT[:, : self.L]), self.known(tokens_BT[:, self.L :])
            out = []
            for t in range(self.L):
                start = t // visibility.block_size * visibility.block_size
                seen = torch.cat([clean[:, :start], noised[:, start : start + visibility.block_size]], 1)
                whole = pad(seen, (0, 0, 0, self.L - seen.shape[1]))
                out.append(self.conditionals(self.up_to(whole, seen.shape[1]))[:, t])
            return torch.cat([torch.stack(out, 1), torch.zeros(len(clean), self.L, self.V).double()], 1)
        if self.kernel is not None:
            evidence = torch.stack(
                [self.kernel(p)[:, z].mT for p, z in zip(time[:, 0].double(), tokens_BT, strict=True)]
            )
            return self.conditionals(evidence)
        return self.conditionals(self.known(tokens_BT))

    def up_to(self, known, t):
        return torch.cat([known[:, :t], torch.ones_like(known[:, t:])], 1)

    def conditionals(self, evidence):
        return leave_one_out(self.joint, evidence).log()

    def logits(self, hidden):
        return pad(hidden, (0, self.extra), value=5.0)  # a mask's column that wants to be chosen


def uniform_kernel(p, V=V):
    return (1 - p) * torch.eye(V).double() + p / V


def batch_of(tokens_BT, answers_BT):
    """A batch in which only the answers count."""
    return Batch(tokens_BT, answers_BT.float())


def request(prompts, length, seed=0, **options):
    """Prompts [P, any] as a request."""
    return Request(list(prompts), length, torch.Generator().manual_seed(seed), **options)
