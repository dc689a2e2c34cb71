"""Distillation: its divergences and gradients by enumeration, and which teacher teaches what."""

import pytest
import torch

from experiments.enumeration import SEQUENCES, START, Table, V, cosine, generator, gradient
from objectives.contracts import Batch
from objectives.masked_diffusion import MaskedDiffusion
from objectives.next_token import NextToken
from objectives.post_training.distillation import Distillation
from objectives.post_training.divergences import kl, mixed_kl
from objectives.post_training.tuning import Trained

BASE, MASKED = NextToken(vocab_size=V, eot=START), MaskedDiffusion(vocab_size=V, eot=0)


def distribution(seed, n=5):
    return torch.randn(7, n, generator=generator(seed), dtype=torch.float64).log_softmax(-1)


def test_the_mixed_divergence_runs_from_the_forward_to_the_reverse_and_is_nought_where_both_agree():
    student, teacher = distribution(0), distribution(1)
    assert torch.equal(mixed_kl(student, teacher, 0.0), kl(teacher, student))
    assert torch.equal(mixed_kl(student, teacher, 1.0), kl(student, teacher))
    for near, end in ((1e-5, 0.0), (1 - 1e-5, 1.0)):
        scaled = mixed_kl(student, teacher, near) / (near if end == 0 else 1 - near)
        torch.testing.assert_close(scaled, mixed_kl(student, teacher, end), rtol=1e-3, atol=1e-4)
    for mixture in (0.0, 0.3, 1.0):
        assert (mixed_kl(student, teacher, mixture) > 0).all()
        assert mixed_kl(student, student, mixture).abs().max() < 1e-12
    half = mixed_kl(student, teacher, 0.5)
    torch.testing.assert_close(half, mixed_kl(teacher, student, 0.5))
    assert (half <= torch.tensor(2.0).log()).all()


def test_a_token_that_never_comes_adds_nothing():
    never = torch.tensor([[0.5, 0.5, 0.0]]).double().log()
    assert kl(never, never.exp().log()).item() == 0 and kl(never, torch.zeros(1, 3).double().log_softmax(-1)).isfinite()


def test_over_its_own_text_the_reverse_divergence_of_tokens_adds_up_to_that_of_sequences():
    """In value; the gradient with standing text is that of each next token given the text so far."""
    student, teacher = Table(causal=True), Table(causal=True, seed=5)
    objective = Distillation(BASE, START, Trained(teacher, BASE), mixture=1.0)
    log_p, log_t = (-BASE.nats(m, Batch.of(SEQUENCES), generator()).sum(1) for m in (student, teacher))
    p = log_p.exp().detach()
    many = torch.multinomial(p, 60_000, replacement=True, generator=generator())
    loss = objective.loss(student, Batch.of(SEQUENCES[many]), generator()) * SEQUENCES.shape[1]
    truth = (log_p.exp() * (log_p - log_t)).sum()
    assert loss.item() == pytest.approx(truth.item(), rel=0.02)


def test_over_the_teachers_text_the_forward_divergence_has_the_gradient_of_learning_the_text():
    """Soft targets are the hard ones without their noise."""
    student, teacher = Table(causal=True), Table(causal=True, seed=5)
    p = (-BASE.nats(teacher, Batch.of(SEQUENCES), generator()).sum(1)).exp().detach()
    many = torch.multinomial(p, 60_000, replacement=True, generator=generator())
    batch = Batch.of(SEQUENCES[many])
    soft = Distillation(BASE, START, Trained(teacher, BASE)).loss(student, batch, generator())
    assert cosine(gradient(soft, student, keep=True), gradient(BASE.loss(student, batch, generator()), student)) > 0.999


def test_two_denoisers_are_compared_on_the_same_noised_text():
    student = Table(causal=False)
    objective = Distillation(MASKED, START, Trained(student, MASKED))
    assert objective.loss(student, Batch.of(SEQUENCES), generator()).abs() < 1e-12
    other = Distillation(MASKED, START, Trained(Table(causal=False, seed=5), MASKED))
    assert other.loss(student, Batch.of(SEQUENCES), generator()) > 0.1 and other.telemetry()["divergence"] > 0


def test_tokens_that_are_given_are_not_learnt():
    student = Table(causal=True)
    objective = Distillation(BASE, START, Trained(Table(causal=True, seed=5), BASE))
    weights = torch.tensor([[0.0, 1.0, 1.0]]).expand(27, 3)
    loss = objective.loss(student, Batch(SEQUENCES, weights), generator())
    assert torch.autograd.grad(loss, student.table)[0][:, 0].abs().max() == 0


@pytest.mark.parametrize(
    ("options", "teacher", "message"),
    [
        ({"mixture": 1.5}, BASE, "mixture=1.5 must be from 0"),
        ({}, NextToken(vocab_size=V + 1, eot=V), "the teacher has 4 token ids and the student 3"),
        ({"hard": True}, BASE, "hard=true learns text as it stands"),
        ({}, MASKED, "a teacher of MaskedDiffusion and a student of NextToken do not predict from the same tokens"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(options, teacher, message):
    with pytest.raises(ValueError, match=message):
        Distillation(BASE, START, Trained(Table(causal=True), teacher), **options)


def test_teachers_that_noise_other_tokens_are_refused():
    other = MaskedDiffusion(vocab_size=V, eot=0, times="independent")
    objective = Distillation(MASKED, START, Trained(Table(causal=False), other))
    with pytest.raises(ValueError, match="teacher and student noise other tokens"):
        objective.loss(Table(causal=False), Batch.of(SEQUENCES), generator())
