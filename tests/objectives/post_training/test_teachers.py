"""Distillation: what student and teacher cost, and text without prompts."""

from functools import partial

import pytest
import torch

from archs.language_model import LanguageModel
from archs.mixers.attention import Attention
from objectives.contracts import Batch
from objectives.next_token import NextToken
from objectives.post_training.distillation import Distillation
from objectives.post_training.tuning import Trained

V, EOT, T = 7, 6, 12


def model_of(width):
    attention = partial(Attention, head_dim=8, queries_per_kv=1, position=None)
    torch.manual_seed(width)
    return LanguageModel(V, width, pattern=["attention"], mixers={"attention": attention}, depth=1)


STUDENT, TEACHER = model_of(8), model_of(16)


def distillation(**settings):
    objective = NextToken(V, EOT)
    return Distillation(objective, EOT, Trained(TEACHER, objective), **settings)


@pytest.mark.parametrize(
    ("settings", "students", "teachers"),
    [
        ({}, 3, 1),
        ({"text": "student"}, 4, 1),
        ({"text": "teacher"}, 3, 2),
        ({"text": "teacher", "hard": True}, 3, 1),
    ],
)
def test_a_run_costs_the_students_training_and_writing_and_the_teachers_passes(settings, students, teachers):
    objective = distillation(**settings)
    student, teacher = (objective.base.flops(model, T) for model in (STUDENT, TEACHER))
    assert objective.teaching_flops(T) == pytest.approx(teachers * teacher)
    assert objective.training_flops(STUDENT, T) == pytest.approx(students * student + teachers * teacher)


@pytest.mark.parametrize("text", ["student", "teacher"])
def test_where_data_have_no_prompts_whole_windows_are_written(text):
    objective, generator = distillation(text=text), torch.Generator().manual_seed(0)
    batch = Batch.of(torch.zeros(64, T, dtype=torch.long))
    written = objective.experience(STUDENT, batch, generator)
    ends_BT = written.tokens_BT == EOT
    behind_BT = (ends_BT.cumsum(1) - ends_BT.long()) > 0
    assert torch.equal(written.counted_BT, ~behind_BT) and ends_BT.any()
    assert written.tokens_BT.unique().tolist() == list(range(V))
    objective.loss(STUDENT, written, generator).backward()
