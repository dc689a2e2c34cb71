"""Sparse attention against its definition, which is held to dense attention with a mask; what it reads, refuses and
counts."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kernels import sparse, sparse_attention, sparse_attention_flops
from kernels.common.trial import TOLERANCE, error_against_reference
from kernels.sparse import LATENT_OPERATION, OPERATION, gathered, masked
from kernels.sparse.rows import where_they_lie
from kernels.sparse.ways import names_many, names_most
from tests.kernels.cases import assert_equal, assert_within_twice

thorough = pytest.mark.thorough
on_triton = pytest.mark.usefixtures("triton_device", "poisoned")
GROUPED = OPERATION, {"heads": 6, "kv_heads": 2, "head_dim": 20, "value_dim": 12}
LATENT = LATENT_OPERATION, {"heads": 5, "head_dim": 40, "value_dim": 32}
forms = pytest.mark.parametrize("form", [GROUPED, LATENT], ids=["grouped", "latent"])


@pytest.fixture
def backward(request, monkeypatch):
    """Gradients of keys and values by rows of pairs that are named, or by tiles of keys, which latents never take."""
    from kernels.sparse import triton_operators

    monkeypatch.setattr(triton_operators, "names_many", lambda *inputs: request.param == "tiles")


ways = [(GROUPED, "pairs"), (GROUPED, "tiles"), (LATENT, "pairs")]
by_both_ways = pytest.mark.parametrize(
    ("form", "backward"), ways, ids=["grouped by pairs", "grouped by tiles", "latent"], indirect=["backward"]
)
backends = pytest.mark.parametrize("backend", ["reference", "torch"])


def problem(form, T, *, batch=2, seed=0, **sizes):
    operation, usual = form
    return operation.random_problem(T, batch=batch, **usual | sizes, generator=torch.Generator().manual_seed(seed))


def run(form, inputs, backend, device="cpu", dtype=None, to_lse=True):
    """Output, lse and every gradient of a random projection of both, of inputs in `dtype` or as they are."""
    floats = {
        name: x.detach().to(device, dtype or x.dtype).requires_grad_() for name, x in inputs.items() if x.dim() > 3
    }
    out, lse = form[0].run(**floats, indices=inputs["indices"].to(device), backend=backend)
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x) for x in (out, lse)]
    loss = (out * weights[0]).sum() + ((lse * weights[1]).sum() if to_lse else 0.0)
    gradients = zip(floats, torch.autograd.grad(loss, floats.values()), strict=True)
    found = {"out": out, "lse": lse} | {f"d{name}": x for name, x in gradients}
    return {name: x for name, x in found.items() if x.numel()}


def assert_triton_is_right(form, device, inputs, dtype=torch.float32):
    truth = run(form, inputs, "reference", dtype=torch.float64)
    plain = [run(form, inputs, backend, dtype=dtype) for backend in ("reference", "torch")]
    factor = 8 if dtype == torch.float32 else 2  # products of float32 are three of TF32 parts, as in the other kernels
    assert_within_twice(run(form, inputs, "triton", device, dtype), plain, truth, factor)


def with_indices(inputs, rows):
    """The first queries of the first sequence name these keys."""
    indices = inputs["indices"].clone()
    for t, row in enumerate(rows):
        indices[0, t] = torch.tensor(row + [-1] * (indices.shape[2] - len(row)))
    return inputs | {"indices": indices}


def test_the_definition_is_dense_attention_with_a_mask():
    inputs = problem(GROUPED, 33)
    q, k, v, indices = (inputs[name] for name in ("q", "k", "v", "indices"))
    seen = torch.zeros(2, 33, 34, dtype=torch.bool).scatter_(2, indices.long() % 34, True)[..., :33]
    dense = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen[:, None], enable_gqa=True, scale=0.3
    )
    out, lse = sparse_attention(q, k, v, indices, scale=0.3, backend="reference")
    torch.testing.assert_close(out, dense.transpose(1, 2))
    scores = 0.3 * torch.einsum("bthd,bshd->bths", q, k.repeat_interleave(3, dim=2))
    torch.testing.assert_close(lse, scores.masked_fill(~seen[:, :, None], -torch.inf).logsumexp(-1))


@forms
@pytest.mark.parametrize("T", [1, 2, 17, 40])
@pytest.mark.parametrize("picked", [1, 7, 50])
def test_torch_equals_the_definition(form, T, picked, monkeypatch):
    monkeypatch.setattr(gathered, "GATHERED", 5000)  # several blocks, the last one smaller
    inputs = problem(form, T, picked=picked)
    assert_equal(run(form, inputs, "torch"), run(form, inputs, "reference"))


@forms
@pytest.mark.parametrize("bytes", [1, 3000, 1 << 21])
def test_where_most_are_named_a_mask_gives_what_gathering_gives(form, bytes, monkeypatch):
    """In blocks of one query, of a few, of all; with keys named twice, and a sequence in which nobody names any."""
    monkeypatch.setattr(masked, "SCORE_BYTES", bytes)
    inputs = problem(form, 20, picked=12)
    inputs["indices"][0, 3:9] = -1
    inputs["indices"][1, :, 1] = inputs["indices"][1, :, 0]
    expected = run(form, inputs, "reference")
    for most in (True, False):
        monkeypatch.setattr(sparse, "names_most", lambda *inputs, most=most: most)
        assert_equal(run(form, inputs, "torch"), expected)
    inputs["indices"][0] = -1
    monkeypatch.setattr(sparse, "names_most", lambda *inputs: True)
    found = run(form, inputs, "torch", to_lse=False)
    assert (found["out"][0] == 0).all() and (found["dq"][0] == 0).all() and found["lse"][0].isneginf().all()


@pytest.mark.parametrize(("T", "picked", "most"), [(16, 32, True), (64, 31, False), (15, 64, False)])
def test_a_mask_is_taken_from_half_of_the_keys_on_and_not_for_few_queries(T, picked, most):
    assert names_most(torch.empty(1, T, picked), 64) is most
    assert not names_most(torch.empty(1, T, picked, device="meta"), 64)


@forms
@backends
def test_a_query_of_no_key_finds_nothing_and_has_no_gradient(form, backend):
    inputs = with_indices(problem(form, 9), [[], [1]])
    found = run(form, inputs, backend, to_lse=False)
    assert all(not x.isnan().any() for x in found.values())
    assert (found["out"][0, 0] == 0).all() and found["lse"][0, 0].isneginf().all() and (found["dq"][0, 0] == 0).all()
    assert found["out"][0, 1].abs().min() > 0


@backends
def test_what_is_not_named_is_not_read_and_gets_no_gradient(backend):
    inputs = problem(GROUPED, 12, batch=1, picked=4)
    inputs["indices"].masked_fill_(inputs["indices"] == 5, -1)
    truth = run(GROUPED, inputs, backend)
    for name in ("k", "v"):
        inputs[name][:, 5] = torch.nan
    assert_equal(run(GROUPED, inputs, backend), truth)
    assert (truth["dk"][:, 5] == 0).all() and (truth["dv"][:, 5] == 0).all()


@backends
def test_a_key_named_twice_counts_twice_and_the_order_of_indices_does_not(backend):
    inputs = problem(GROUPED, 9, batch=1)
    first, second = (with_indices(inputs, [[3, 3, 5], row]) for row in ([2, 7, 1], [7, 1, 2]))
    a, b = (run(GROUPED, x, backend) for x in (first, second))
    torch.testing.assert_close(a["out"], b["out"])
    v, weights = inputs["v"][0, :, :1].repeat(1, 3, 1), run(GROUPED, first, backend)
    scores = torch.einsum("hd,shd->hs", inputs["q"][0, 0, :3], inputs["k"][0, [3, 3, 5], :1].repeat(1, 3, 1)) * 20**-0.5
    torch.testing.assert_close(weights["out"][0, 0, :3], torch.einsum("hs,shv->hv", scores.softmax(-1), v[[3, 3, 5]]))


def test_a_slice_of_the_keys_is_told_from_a_copy_and_from_numbers_of_its_own():
    k = torch.randn(1, 5, 1, 8, requires_grad=True)
    assert sparse.is_slice(k, k[..., :6]) and sparse.is_slice(k * 1, (k * 1)[..., :6]) is False
    made = torch.cat([k, k], dim=-1)
    assert sparse.is_slice(made, made[..., :6]) and sparse.is_slice(made, made.split([4, 12], dim=-1)[0])
    assert not sparse.is_slice(k, k[..., :6].clone()) and not sparse.is_slice(k, k[..., 1:6])
    assert not sparse.is_slice(k, k.detach()[..., :6])
    assert not sparse.is_slice(k, k.detach()[..., :6].requires_grad_())
    assert not sparse.is_slice(k, 2 * k[..., :6]) and not sparse.is_slice(made, made[:, :3, :, :6])


@forms
@backends
@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_extreme_values_stay_finite_and_right(form, backend, size):
    inputs = {name: size * x if x.dim() > 3 else x for name, x in problem(form, 20).items()}
    got, truth = (run(form, inputs, backend, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert all(x.isfinite().all() for x in got.values())
    torch.testing.assert_close(got["out"], truth["out"].float(), rtol=1e-2, atol=1e-2 * size)


@pytest.mark.parametrize(("B", "T", "S", "K"), [(0, 3, 3, 2), (2, 0, 3, 2), (2, 3, 3, 0), (2, 3, 0, 0), (1, 1, 90, 4)])
@backends
def test_nothing_to_do_and_other_lengths_of_keys(B, T, S, K, backend):
    q, k, v = (torch.randn(B, n, 2, 8, requires_grad=True) for n in (T, S, S))
    out, lse = sparse_attention(q, k, v, torch.full((B, T, K), 0 if S else -1), backend=backend)
    out.sum().backward()
    assert out.shape == (B, T, 2, 8) and lse.shape == (B, T, 2) and k.grad.shape == k.shape
    assert K * S > 0 or (out == 0).all()


def test_autocast_changes_nothing():
    inputs = {name: x.float() if x.dim() > 3 else x for name, x in problem(GROUPED, 9).items()}
    plain = run(GROUPED, inputs, "torch")
    with torch.autocast("cpu", torch.bfloat16):
        got = run(GROUPED, inputs, "torch")
    torch.testing.assert_close(got, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": torch.zeros(1, 5, 6)}, r"takes q \[B, T, H, D\]"),
        ({"q": torch.zeros(1, 5, 3, 20)}, "3 query heads are not a multiple of 2 key-value heads"),
        ({"q": torch.zeros(1, 5, 6, 20).bfloat16()}, "must have one floating dtype, not torch.bfloat16, torch.float32"),
        ({"indices": torch.zeros(1, 5, 3)}, "indices must be int32 or int64, not torch.float32"),
        ({"indices": torch.full((1, 5, 3), 5)}, "index 5 is no key: indices go from 0 to 4"),
        ({"indices": torch.full((1, 5, 3), -2)}, "index -2 is no key"),
        ({"backend": "cuda"}, "unknown backend 'cuda' for sparse_attention: choose from auto, reference"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    inputs = {name: x.float() if x.dim() > 3 else x for name, x in problem(GROUPED, 5, batch=1, picked=3).items()}
    with pytest.raises(ValueError, match=words):
        sparse_attention(**inputs | changes)


def test_transforms_that_it_does_not_know_are_refused():
    inputs = {name: x.float() if x.dim() > 3 else x for name, x in problem(GROUPED, 5, batch=1).items()}
    q, rest = inputs.pop("q"), inputs

    def loss(q):
        return sparse_attention(q, **rest, backend="torch")[0].square().sum()

    for transform in (torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))):
        with pytest.raises((RuntimeError, NotImplementedError)):
            transform(loss)(q)
    leaf = q.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(first.sum(), leaf)


def test_flops_are_counted_forward_and_backward():
    inputs = {name: x.float().requires_grad_() if x.dim() > 3 else x for name, x in problem(GROUPED, 9).items()}
    forward = sparse_attention_flops(18, 6, 20, 12, 16)
    assert forward == 2 * 2 * 9 * 6 * 16 * (20 + 12)
    with FlopCounterMode(display=False) as counter:
        out, _ = sparse_attention(**inputs)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 9 * 6 * 16 * (3 * 20 + 2 * 12)


def test_torch_compile_sees_one_operator():
    inputs = {name: x.float().requires_grad_() if x.dim() > 3 else x for name, x in problem(LATENT, 9).items()}

    def loss(inputs):
        return LATENT_OPERATION.run(**inputs)[0].square().sum()

    leaves = [x for x in inputs.values() if x.requires_grad]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(inputs), leaves) for f in (compiled, loss)))


@thorough
@on_triton
@by_both_ways
@pytest.mark.parametrize(("T", "picked"), [(1, 1), (5, 3), (33, 16), (70, 40)])
def test_triton_is_right_at_every_length(form, backward, triton_device, T, picked):
    assert_triton_is_right(form, triton_device, problem(form, T, batch=1, picked=picked))


@thorough
@on_triton
@pytest.mark.parametrize(
    ("form", "sizes", "backward"),
    [
        (GROUPED, {"heads": 2}, "pairs"),
        (GROUPED, {"heads": 2}, "tiles"),
        (GROUPED, {"heads": 40}, "pairs"),
        (GROUPED, {"heads": 40}, "tiles"),
        (GROUPED, {"head_dim": 16, "value_dim": 40}, "pairs"),
        (GROUPED, {"head_dim": 16, "value_dim": 40}, "tiles"),
        (GROUPED, {"head_dim": 48, "value_dim": 16}, "pairs"),
        (GROUPED, {"head_dim": 48, "value_dim": 16}, "tiles"),
        (GROUPED, {"head_dim": 7, "value_dim": 3}, "pairs"),
        (GROUPED, {"head_dim": 7, "value_dim": 3}, "tiles"),
        (LATENT, {"heads": 70}, "pairs"),
        (LATENT, {"head_dim": 33, "value_dim": 20}, "pairs"),
        (LATENT, {"head_dim": 16, "value_dim": 16}, "pairs"),
    ],
    indirect=["backward"],
)
def test_triton_takes_heads_of_any_number_and_size(form, sizes, backward, triton_device):
    assert_triton_is_right(form, triton_device, problem(form, 20, batch=1, **sizes))


@thorough
@on_triton
@pytest.mark.parametrize(("head_dim", "value_dim"), [(40, 32), (27, 20), (17, 17)])
def test_triton_takes_latents_in_two_parts(head_dim, value_dim, triton_device, monkeypatch):
    from kernels.sparse import triton_operators

    monkeypatch.setattr(triton_operators, "LARGEST_PART", 16)
    assert_triton_is_right(LATENT, triton_device, problem(LATENT, 20, batch=1, head_dim=head_dim, value_dim=value_dim))


@thorough
@on_triton
@by_both_ways
def test_triton_in_half_precision_errs_no_more_than_twice_as_much(form, backward, triton_device):
    """float16: the interpreter is wrong for bfloat16."""
    dtype = torch.bfloat16 if triton_device == "cuda" else torch.float16
    low = {name: x.to(dtype) if x.dim() > 3 else x for name, x in problem(form, 40).items()}
    assert_triton_is_right(form, triton_device, low, dtype)


@thorough
@on_triton
@by_both_ways
def test_triton_goes_through_the_queries_in_parts_and_two_runs_are_equal_bit_for_bit(
    form, backward, triton_device, monkeypatch
):
    from kernels.sparse import triton_operators

    inputs = problem(form, 13)
    whole = run(form, inputs, "triton", triton_device, torch.float32)
    monkeypatch.setattr(triton_operators, "WORKSPACE", 5 * 16 * (2 * 32 + 2 * 6) * 4)  # five queries or so
    monkeypatch.setattr(triton_operators, "queries_of_part", lambda T: 5)
    assert_triton_is_right(form, triton_device, inputs)
    first, second = (run(form, inputs, "triton", triton_device, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(first["dq"], whole["dq"])


@thorough
@on_triton
@by_both_ways
def test_triton_takes_queries_of_no_key_and_indices_in_any_place(form, backward, triton_device):
    inputs = with_indices(problem(form, 9, batch=1), [[], [-1, -1, 1, -1, 0], [2]])
    found = run(form, inputs, "triton", triton_device, torch.float32, to_lse=False)
    truth = run(form, inputs, "reference", to_lse=False)
    for name, x in found.items():
        torch.testing.assert_close(x.cpu().double(), truth[name], rtol=1e-4, atol=1e-5, msg=name)


@thorough
@on_triton
@pytest.mark.parametrize("backward", ["pairs", "tiles"], indirect=True)
def test_triton_counts_a_key_named_twice_twice_and_reads_none_that_is_not_named(backward, triton_device):
    inputs = with_indices(problem(GROUPED, 9, batch=1), [[3, 3, 3, 5], [3, 5, 3]])
    inputs["indices"][inputs["indices"] == 7] = -1
    inputs["k"][:, 7], inputs["v"][:, 7] = torch.nan, torch.inf
    found = run(GROUPED, inputs, "triton", triton_device, torch.float32, to_lse=False)
    truth = run(GROUPED, inputs, "reference", to_lse=False)
    for name, x in found.items():
        torch.testing.assert_close(x.cpu().double(), truth[name], rtol=1e-4, atol=1e-5, msg=name)
    assert (found["dk"][:, 7] == 0).all() and (found["dv"][:, 7] == 0).all()


@pytest.mark.parametrize(
    ("heads", "picked", "S", "many"),
    [(16, 1024, 4096, True), (16, 512, 4096, True), (16, 256, 4096, False), (128, 2048, 4096, False)],
)
def test_tiles_are_taken_where_queries_name_many_of_the_keys(heads, picked, S, many):
    q, k = (torch.empty(1, n, h, 64, device="meta", dtype=torch.bfloat16) for n, h in ((4096, heads), (S, 1)))
    assert names_many(q, k, torch.empty(1, 4096, picked, device="meta")) is many
    assert not names_many(q.float(), k.float(), torch.empty(1, 4096, picked, device="meta"))
    assert not names_many(*(x.expand(100, -1, -1, -1) for x in (q, k)), torch.empty(100, 4096, picked, device="meta"))


@thorough
@on_triton
@pytest.mark.parametrize("way", ["tiles", "pairs"])
def test_a_trial_takes_the_way_that_the_call_would_take(way, triton_device, monkeypatch):
    from kernels.sparse import triton_operators

    other = "_backward_by_pairs" if way == "tiles" else "_backward_by_tiles"
    monkeypatch.setattr(triton_operators, other, lambda *args: pytest.fail("the other way"))
    operation = sparse.OPERATION if way == "tiles" else sparse.FEW_OPERATION
    inputs = problem(GROUPED, 9, batch=1, picked=4)
    side = operation.on_backend("triton")
    assert (
        error_against_reference(side, operation, inputs, triton_device, torch.float16, gradients=True)
        < TOLERANCE[torch.float16]
    )


@thorough
@on_triton
def test_triton_refuses_what_it_cannot_hold(triton_device):
    big = torch.zeros(1, 2, 1, 600, device=triton_device)
    indices = torch.zeros(1, 2, 1, dtype=torch.int32, device=triton_device)
    with pytest.raises(ValueError, match="heads of 600 and 600 dimensions: the Triton kernels take up to 256"):
        sparse_attention(big, big, big.clone(), indices, backend="triton")
    with pytest.raises(ValueError, match="hold values of 580: the Triton kernels take up to 576 and 512"):
        sparse_attention(big, big, big[..., :580], indices, backend="triton")
    with pytest.raises(ValueError, match="take float32, bfloat16 and float16, not torch.float64"):
        sparse_attention(*(big.double(),) * 3, indices, backend="triton")


class CopiedBytes(TorchDispatchMode):
    """Keeps the bytes of the largest copy that is made, but for those inside of operators."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten._to_copy, torch.ops.aten.copy_):
            self.most = max(self.most, found.nbytes)
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lies", ["by token", "by head", "among other heads"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_cache_is_read_where_it_lies(backend, lies, dtype, triton_device, poisoned):
    """What stands beside it in memory is NaN, and nothing of its size is copied."""
    B, S, room, G, D, K = 2, 200, 256, 2, 16, 8
    device = triton_device if backend == "triton" else "cpu"
    rng = torch.Generator().manual_seed(0)
    shape = {"by token": (B, room, G, D), "by head": (B, G, room, D), "among other heads": (B, room, 3 * G, D)}[lies]
    caches = [torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2)]
    k, v = (x.transpose(1, 2)[:, :S] if lies == "by head" else x[:, :S, -G:] for x in caches)
    for x in (k, v):
        x.copy_(torch.randn(B, S, G, D, generator=rng))
    q = torch.randn(B, 1, 4, D, generator=rng).to(device, dtype)
    picked = torch.randint(S, (B, 1, K), generator=rng, dtype=torch.int32).to(device)
    together = [x.contiguous() for x in (k, v)]
    expected = sparse_attention(q, *together, picked, backend=backend)
    with torch.no_grad(), CopiedBytes() as copied:
        found = sparse_attention(q, k, v, picked, backend=backend)
        if backend == "torch":  # Triton's interpreter copies what it is given
            gathered.forward(q, k, v, picked, D**-0.5, D)
    assert all(x is y for x, y in zip(where_they_lie(k, v), (k, v), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert copied.most < k[:, :, 0].nbytes
