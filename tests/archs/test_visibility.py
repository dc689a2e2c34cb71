"""The pairs that are seen, by their definition, whatever the kind, the window and the packed documents."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archs.visibility import BIDIRECTIONAL, CAUSAL, Kind, Visibility, block_causal

settings.register_profile("visibility", max_examples=100, deadline=None)
settings.load_profile("visibility")

lengths = st.integers(1, 14)
starts_of = st.lists(st.booleans(), min_size=14, max_size=14)


def defined(visibility: Visibility, documents: list[int], window: int | None) -> torch.Tensor:
    """True [T, T] at the pairs of query and key that the docstring of `Visibility` names."""
    L = len(documents)
    place = [t - documents.index(documents[t]) for t in range(L)]
    T = L * visibility.copies
    seen = torch.zeros(T, T, dtype=torch.bool)
    for query in range(T):
        for key in range(T):
            q, k = query % L, key % L
            match visibility.kind:
                case Kind.CAUSAL:
                    sees = k <= q
                case Kind.BIDIRECTIONAL:
                    sees = True
                case Kind.BLOCK_CAUSAL:
                    own, other = place[q] // visibility.block_size, place[k] // visibility.block_size
                    copies = query < L, key < L
                    sees = {
                        (True, True): own == other,
                        (True, False): own > other,
                        (False, True): False,
                        (False, False): own >= other,
                    }[copies]
            near = window is None or abs(q - k) < window
            seen[query, key] = sees and near and documents[q] == documents[k]
    return seen


@given(kind=st.sampled_from(Kind), size=st.integers(1, 6), L=lengths, marks=starts_of, window=st.integers(1, 15))
def test_the_pairs_of_packed_documents_are_those_of_the_definition(kind, size, L, marks, window):
    visibility = Visibility(kind, size if kind is Kind.BLOCK_CAUSAL else 0)
    window = None if kind is Kind.BLOCK_CAUSAL or window > 12 else window
    starts = torch.tensor([marks[:L]])
    documents = torch.cat([torch.ones(1, dtype=torch.long), starts[0, 1:].long()]).cumsum(0).tolist()
    packed, T = visibility.packed(starts), L * visibility.copies
    expected = defined(visibility, documents, window)
    assert torch.equal(packed.visible(T, T, window)[0, 0], expected)
    assert packed.documents()[0].tolist() == documents
    ends = [i for i in range(L) if i == 0 or documents[i] != documents[i - 1]] + [L]
    assert packed.cu_seqlens().tolist() == ends
    place = [t - documents.index(documents[t]) for t in range(L)] * visibility.copies
    assert packed.positions(T)[0].tolist() == place
    # A document by itself has the pairs that it has in the pack.
    alone = sum(visibility.pairs((b - a) * visibility.copies, window) for a, b in zip(ends, ends[1:], strict=False))
    assert alone == int(expected.sum())


@given(kind=st.sampled_from([Kind.CAUSAL, Kind.BIDIRECTIONAL]), S=lengths, T=lengths, window=st.integers(1, 15))
def test_what_continues_a_state_sees_the_end_of_the_whole(kind, S, T, window):
    T, window = min(T, S), None if window > 12 else window
    whole = defined(Visibility(kind), [1] * S, window)
    seen = Visibility(kind).visible(T, S, window)
    assert torch.equal(whole[S - T :], torch.ones(T, S, dtype=torch.bool) if seen is None else seen)


@given(L=lengths, size=st.integers(1, 6))
def test_two_copies_of_whole_blocks_have_as_many_pairs_as_the_paper_says(L, size):
    L *= size
    assert block_causal(size).pairs(2 * L) == L**2 + L * size


def test_positions_continue_where_a_state_ends():
    assert CAUSAL.positions(3, offset=5).tolist() == [5, 6, 7]
    assert block_causal(2).positions(6).tolist() == [0, 1, 2, 0, 1, 2]


def test_a_batch_that_is_not_packed_is_left_as_it_is():
    assert BIDIRECTIONAL.packed(None) is BIDIRECTIONAL and BIDIRECTIONAL.visible(3, 3) is None


@pytest.mark.parametrize("kind", Kind)
def test_marking_the_first_token_or_not_makes_no_difference(kind):
    marks = torch.tensor([[False, False, True, False]])
    first = marks.clone()
    first[0, 0] = True
    one, two = (Visibility(kind, 2).packed(m).starts_BL for m in (marks, first))
    assert torch.equal(one, two) and not marks[0, 0]
