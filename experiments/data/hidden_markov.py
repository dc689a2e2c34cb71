"""A synthetic language whose likelihood, optimal predictor, optimal denoiser and entropy are known.

Formulas: L. R. Rabiner, "A tutorial on hidden Markov models", Proc. IEEE 77 (1989), section III (scaled
forward-backward); Cover & Thomas, Elements of Information Theory, section 4.5 (bounds on the entropy rate).
Tokens are int64 on the CPU, all numbers float64.

Shape letters: B sequences, T tokens, V symbols, S states, N possible sequences, R rows of K probabilities.
"""

import hashlib

import numpy as np
import torch
from torch import Generator, Tensor

from experiments.data.token_data import TokenData, token_dtype
from experiments.data.windows import heldout_windows

FLOOR = 1e-6  # least probability of any transition and emission
AT_ONCE = 4096  # sequences sampled together: few enough for the processor's cache


class HiddenMarkovLanguage:
    """A stationary process: s_1 ~ its stationary distribution, x_t ~ emission[s_t], s_{t+1} ~ transition[s_t].

    The rows of both matrices are drawn from a symmetric Dirichlet distribution, raised to at least 1e-6 and
    normalised again, so that the stationary distribution is unique and no sequence is impossible.

    Args:
        states: S >= 1.
        symbols: V >= 2.
        concentration: > 0, of the Dirichlet distribution; small values give rows with few likely entries.
        seed: of the matrices.
    """

    def __init__(self, states: int, symbols: int, concentration: float = 0.1, seed: int = 0):
        if states < 1 or symbols < 2 or not concentration > 0:
            raise ValueError(
                f"states={states}, symbols={symbols}, concentration={concentration}: there must be at "
                "least 1 state and 2 symbols, and a concentration above 0"
            )
        random = np.random.default_rng(seed)

        def rows(width: int) -> Tensor:
            drawn = np.maximum(random.dirichlet(np.full(width, concentration), size=states), FLOOR)
            return torch.from_numpy(drawn / drawn.sum(1, keepdims=True))

        self.states, self.symbols = states, symbols
        self.transition_SS, self.emission_SV = rows(states), rows(symbols)
        # pi P = pi and sum(pi) = 1, as one least-squares system of full rank
        identity_SS, ones_1S = torch.eye(states).double(), torch.ones(1, states).double()
        equations = torch.cat([self.transition_SS.T - identity_SS, ones_1S])
        right = torch.zeros(states + 1, 1).double()
        right[-1] = 1
        self.initial_S = torch.linalg.lstsq(equations, right, driver="gelsd").solution[:, 0]

    def sample(self, batch: int, length: int, generator: Generator) -> Tensor:
        """tokens_BT: independent sequences, each from the stationary distribution.

        Raises:
            ValueError: batch or length below 1.
        """
        if batch < 1 or length < 1:
            raise ValueError(f"cannot sample batch={batch} sequences of length={length}: both must be at least 1")
        distributions = self.initial_S[None], self.transition_SS, self.emission_SV
        initial_1K, transition_SK, emission_SK = map(bounds, distributions)
        tokens_TB = torch.empty(length, batch, dtype=torch.int64)
        state_B = torch.zeros(batch, dtype=torch.int64)
        for t in range(length):
            state_B = draw(initial_1K if t == 0 else transition_SK, state_B, generator)
            tokens_TB[t] = draw(emission_SK, state_B, generator)
        return tokens_TB.T.contiguous()

    def log_likelihood(self, tokens_BT: Tensor) -> Tensor:
        """log p(x_1 .. x_T) of each sequence in nats, [B] float64, exact.

        Raises:
            ValueError: tokens are not int64 [B, T >= 1] in [0, symbols); so too in the methods below.
        """
        self._check(tokens_BT)
        predicted_BTS, _ = self._filter(self.emission_SV.T[tokens_BT], self.initial_S)
        return self._next_symbol(predicted_BTS).gather(2, tokens_BT[..., None]).sum((1, 2))

    def conditionals(self, tokens_BT: Tensor) -> Tensor:
        """log p(x_t = v | x_<t), [B, T, V] float64: the optimal next-token predictor."""
        self._check(tokens_BT)
        predicted_BTS, _ = self._filter(self.emission_SV.T[tokens_BT], self.initial_S)
        return self._next_symbol(predicted_BTS)

    def posterior(self, tokens_BT: Tensor, masked_BT: Tensor) -> Tensor:
        """p(x_t = v | the unmasked positions), [B, T, V] float64: the optimal denoiser of masked diffusion.
        One-hot at unmasked positions.

        Args:
            tokens_BT: int64; where masked, any value.
            masked_BT: bool.
        """
        if masked_BT.shape != tokens_BT.shape or masked_BT.dtype != torch.bool:
            raise ValueError(
                f"masked_BT must be bool of the tokens' shape {tuple(tokens_BT.shape)}, and is "
                f"{masked_BT.dtype} of {tuple(masked_BT.shape)}"
            )
        tokens_BT = tokens_BT.masked_fill(masked_BT, 0)
        self._check(tokens_BT)
        known_BTV = torch.nn.functional.one_hot(tokens_BT, self.symbols).double()
        symbol_BTV = self.leave_one_out(known_BTV.masked_fill(masked_BT[..., None], 1.0))
        return torch.where(masked_BT[..., None], symbol_BTV, known_BTV)

    def leave_one_out(self, evidence_BTV: Tensor) -> Tensor:
        """p(x_t = v | what is known of all other positions), [B, T, V] float64: the optimal denoiser of any noise that
        falls on each token by itself.

        Args:
            evidence_BTV: float64, the probability of what was observed at t were x_t = v, up to a factor.
        """
        evidence_BTS = evidence_BTV @ self.emission_SV.T
        predicted_BTS, _ = self._filter(evidence_BTS, self.initial_S)
        state_BTS = predicted_BTS * self._backward(evidence_BTS)
        return state_BTS / state_BTS.sum(-1, keepdim=True) @ self.emission_SV

    def entropy_per_token(self, length: int, samples: int, generator: Generator) -> tuple[float, float]:
        """H(x_1 .. x_T) / T for T = length, in nats, and its standard error: the lowest loss that a model of
        windows of this length can have. Unbiased: the mean over sampled sequences of the entropy of each
        prediction."""
        return self._mean_entropy(length, 0, samples, generator)

    def entropy_rate(self, length: int, burn_in: int, samples: int, generator: Generator) -> tuple[float, float]:
        """The entropy rate h = lim H(x_t | x_<t) in nats a symbol, and its standard error.

        The mean over `samples` sequences and the positions burn_in < t <= length of the entropy of the
        prediction of x_t: an unbiased estimate of the mean of H(x_t | x_<t) there, which lies above h by what
        the first burn_in symbols do not yet tell of the state; `entropy_bounds` says how fast that falls.
        """
        return self._mean_entropy(length, burn_in, samples, generator)

    def entropy_bounds(self, length: int) -> tuple[float, float]:
        """H(x_n | x_<n, s_1) <= h <= H(x_n | x_<n) for n = length in nats, exact: a sum over all sequences.

        Raises:
            ValueError: length below 1, or more than 2**20 sequences.
        """
        if length < 1 or self.symbols**length > 1 << 20:
            raise ValueError(f"length={length}: must be at least 1, and symbols**length at most {1 << 20}")
        tokens_NT = torch.cartesian_prod(*[torch.arange(self.symbols)] * length).view(-1, length)
        evidence_NTS = self.emission_SV.T[tokens_NT]

        def last_entropy(initial_S: Tensor) -> Tensor:
            predicted_NTS, _ = self._filter(evidence_NTS, initial_S)
            logp_NT = self._next_symbol(predicted_NTS).gather(2, tokens_NT[..., None])[..., 0]
            return -(logp_NT.sum(1).exp() * logp_NT[:, -1]).sum()

        given_first_S = torch.stack([last_entropy(state) for state in torch.eye(self.states).double()])
        return float(self.initial_S @ given_first_S), float(last_entropy(self.initial_S))

    def _mean_entropy(self, length: int, burn_in: int, samples: int, generator: Generator) -> tuple[float, float]:
        if not 0 <= burn_in < length or samples < 2:
            raise ValueError(
                f"burn_in={burn_in}, length={length}, samples={samples}: needs 0 <= burn_in < length, "
                "and at least 2 samples for a standard error"
            )
        logp_BTV = self.conditionals(self.sample(samples, length, generator))[:, burn_in:]
        entropy_B = -(logp_BTV.exp() * logp_BTV).sum(-1).mean(1)
        return float(entropy_B.mean()), float(entropy_B.std() / samples**0.5)

    def _filter(self, evidence_BTS: Tensor, initial_S: Tensor) -> tuple[Tensor, Tensor]:
        """p(s_t | evidence before t) and p(s_t | evidence up to t), [B, T, S] each."""
        predicted_BS = initial_S.expand(len(evidence_BTS), -1)
        predicted, filtered = [], []
        for evidence_BS in evidence_BTS.unbind(1):
            joint_BS = predicted_BS * evidence_BS
            filtered_BS = joint_BS / joint_BS.sum(1, keepdim=True)
            predicted.append(predicted_BS)
            filtered.append(filtered_BS)
            predicted_BS = filtered_BS @ self.transition_SS
        return torch.stack(predicted, 1), torch.stack(filtered, 1)

    def _backward(self, evidence_BTS: Tensor) -> Tensor:
        """p(evidence after t | s_t) up to a factor that does not depend on s_t, [B, T, S]."""
        beta_BS = torch.ones_like(evidence_BTS[:, 0])
        betas = [beta_BS]
        for evidence_BS in evidence_BTS[:, 1:].flip(1).unbind(1):
            beta_BS = (evidence_BS * beta_BS) @ self.transition_SS.T
            beta_BS = beta_BS / beta_BS.sum(1, keepdim=True)
            betas.append(beta_BS)
        return torch.stack(betas[::-1], 1)

    def _next_symbol(self, predicted_BTS: Tensor) -> Tensor:
        return (predicted_BTS @ self.emission_SV).log()

    def _check(self, tokens_BT: Tensor) -> None:
        if tokens_BT.ndim != 2 or 0 in tokens_BT.shape or tokens_BT.dtype != torch.int64:
            raise ValueError(
                f"tokens must be int64 [B, T] with B >= 1 and T >= 1, and are {tokens_BT.dtype} {list(tokens_BT.shape)}"
            )
        if tokens_BT.min() < 0 or tokens_BT.max() >= self.symbols:
            raise ValueError(
                f"tokens lie in {int(tokens_BT.min())} .. {int(tokens_BT.max())}, and the language has "
                f"symbols 0 .. {self.symbols - 1}"
            )


def bounds(p_RK: Tensor) -> Tensor:
    """The inner steps of each row's distribution function, [R, K - 1]."""
    return p_RK.cumsum(1)[:, :-1].contiguous()


def draw(bounds_RK: Tensor, row_B: Tensor, generator: Generator) -> Tensor:
    """One index from the distribution in each of these rows, by inversion of its distribution function, [B] int64."""
    uniform_B1 = torch.rand(len(row_B), 1, dtype=torch.float64, generator=generator)
    return (bounds_RK[row_B] <= uniform_B1).sum(1)


def hidden_markov(
    language: HiddenMarkovLanguage, sequence_length: int, train_tokens: int, heldout_tokens: int, seed: int
) -> TokenData:
    """Samples of the language as data: independent sequences of sequence_length symbols, end to end.

    A window of that length is then one sequence, and its exact negative log-likelihood under `language` is
    the least that a model can reach in expectation. One symbol counts as one byte, so bits per byte are bits
    per symbol. The id after the symbols is eot, which does not occur.

    Raises:
        ValueError: a number of tokens or the length is below 1.
    """
    for name, value in (("train_tokens", train_tokens), ("heldout_tokens", heldout_tokens)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if sequence_length < 1:
        raise ValueError(f"sequence_length={sequence_length} must be at least 1")
    dtype, generator = token_dtype(language.symbols + 1), torch.Generator().manual_seed(seed)

    def stream(tokens: int) -> np.ndarray:
        sequences, parts = -(-tokens // sequence_length), []
        for start in range(0, sequences, AT_ONCE):
            sample = language.sample(min(AT_ONCE, sequences - start), sequence_length, generator)
            parts.append(sample.flatten().numpy().astype(dtype))
        return np.concatenate(parts)[:tokens]

    # The held-out part first, so that it stays the same when train_tokens is changed.
    heldout, train = stream(heldout_tokens), stream(train_tokens)
    windows, tail = heldout_windows(heldout, sequence_length)
    entropy = -sum(
        float(language.log_likelihood(part).sum())
        for part in (*windows.split(AT_ONCE), tail)
        if part is not None and len(part)
    )
    digest = hashlib.sha256(f"{language.symbols} ".encode() + heldout.tobytes() + b" " + train.tobytes())
    return TokenData(
        train=train,
        heldout=heldout,
        heldout_bytes=heldout_tokens,
        vocab_size=language.symbols + 1,
        eot=language.symbols,
        digest=digest.hexdigest(),
        name=f"hidden_markov/{language.states}x{language.symbols}",
        pieces=[f"{symbol} ".encode() for symbol in range(language.symbols)] + [b""],
        heldout_entropy=entropy,
    )
