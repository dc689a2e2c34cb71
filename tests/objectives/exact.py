"""A language small enough to know everything about, a joint law over V^L sequences, in place of a LanguageModel."""

import itertools

import numpy as np
import torch
from torch.nn.functional import one_hot, pad

from archs.visibility import CAUSAL, Visibility

V = L = 3
P = torch.from_numpy(np.random.default_rng(0).dirichlet(np.full(V**L, 0.5))).view([V] * L)
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=L)))
NATS = -P.flatten().log()
ENTROPY = float((P.flatten() * NATS).sum())


def leave_one_out(joint, evidence_BLV):
    """p(x_l = v | evidence about the other positions), [B, L, V], by summing over all sequences."""
    laws, n = [], joint.dim()
    for kept in range(n):
        product = joint[None]
        for i in range(n):
            if i != kept:
                shape = [len(evidence_BLV)] + [-1 if d == i else 1 for d in range(n)]
                product = product * evidence_BLV[:, i].reshape(shape)
        law = product.sum([d + 1 for d in range(n) if d != kept])
        laws.append(law / law.sum(-1, keepdim=True))
    return torch.stack(laws, 1)


class Cache:
    """A mixer's state: the tokens themselves."""

    def __init__(self, batch):
        self.tokens = torch.zeros(batch, 0, dtype=torch.long)

    def rewind(self, tokens):
        self.tokens = self.tokens[:, : self.tokens.shape[1] - tokens]


class Oracle:
    """The exact conditionals of a joint law. Ids from V on are unknown (masks, the start). For uniform noise `kernel(p)`
    [V, V] gives q(noised | clean)."""

    def __init__(self, joint=P, extra_columns=0, kernel=None):
        self.joint, self.L, self.V = joint, joint.dim(), joint.shape[0]
        self.extra, self.kernel = extra_columns, kernel
        self.blocks = [self]
        self.mixer, self.empty_state = self, Cache

    def known(self, tokens_BT):
        rows = pad(one_hot(tokens_BT.clamp(max=self.V), self.V + 1), (0, 0, 0, self.L - tokens_BT.shape[1]))
        rows[:, tokens_BT.shape[1] :, self.V] = 1
        return rows[..., : self.V].double() + rows[..., self.V :]

    def hidden(self, tokens_BT, visibility, states=None, time=None):
        if states is not None:
            before = states[0].tokens
            states[0].tokens = torch.cat([before, tokens_BT], 1)
            return self.law(self.known(states[0].tokens))[:, before.shape[1] : states[0].tokens.shape[1]]
        if visibility is CAUSAL:  # inputs are shifted by the start
            known = self.known(tokens_BT[:, 1:])
            return torch.stack([self.law(self.up_to(known, t))[:, t] for t in range(tokens_BT.shape[1])], 1)
        if visibility.kind is Visibility.BLOCK_CAUSAL:
            noised, clean = self.known(tokens_BT[:, : self.L]), self.known(tokens_BT[:, self.L :])
            out = []
            for t in range(self.L):
                start = t // visibility.size * visibility.size
                seen = torch.cat([clean[:, :start], noised[:, start : start + visibility.size]], 1)
                out.append(self.law(self.up_to(pad(seen, (0, 0, 0, self.L - seen.shape[1])), seen.shape[1]))[:, t])
            return torch.cat([torch.stack(out, 1), torch.zeros(len(clean), self.L, self.V).double()], 1)
        if self.kernel is not None:
            evidence = torch.stack([self.kernel(p)[:, z].mT for p, z in zip(time[:, 0].double(), tokens_BT)])
            return self.law(evidence)
        return self.law(self.known(tokens_BT))

    def up_to(self, known, t):
        return torch.cat([known[:, :t], torch.ones_like(known[:, t:])], 1)

    def law(self, evidence):
        return leave_one_out(self.joint, evidence).log()

    def logits(self, hidden):
        return pad(hidden, (0, self.extra), value=5.0)  # a mask's column that wants to be chosen

    def prefill(self, tokens_BT, states=None):
        self.so_far = tokens_BT if states is None else torch.cat([self.so_far, tokens_BT], 1)
        T = self.so_far.shape[1]
        return self.hidden(pad(self.so_far, (0, max(0, self.L - T)), value=self.V), CAUSAL)[:, :T], []

    def step(self, tokens_B, states):
        logits, _ = self.prefill(tokens_B[:, None], states)
        return logits[:, -1], states


def uniform_kernel(p, V=V):
    return (1 - p) * torch.eye(V).double() + p / V
