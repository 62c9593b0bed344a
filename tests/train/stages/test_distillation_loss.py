"""The chunked loss against plain autograd on all logits at once."""

import pytest
import torch
import torch.nn.functional as F

from dijiang.train.stages import distillation_loss as module
from dijiang.train.stages.distillation_loss import LossWeights, distillation_loss

WEIGHTS = {"kl": (1.0, 0.0), "both": (0.7, 0.4), "ce": (0.0, 1.3)}


def loss_of(hidden, head, labels, teacher_hidden=None, teacher_head=None, *, top_k=None, chunk_tokens=256, **weights):
    """`distillation_loss` with the arguments of `oracle`."""
    teacher = None if teacher_hidden is None else (teacher_hidden, teacher_head)
    chosen = LossWeights(**{name.removesuffix("_weight"): value for name, value in weights.items()})
    return distillation_loss(hidden, head, labels, teacher=teacher, top_k=top_k, weights=chosen, chunk_tokens=chunk_tokens)


def oracle(hidden, head, labels, teacher_logits, *, kl_weight, ce_weight, temperature, top_k=None):
    """Loss, kl and ce by the book; with `top_k` ids (N, k) all other tokens are lumped into one outcome."""
    s = hidden @ head.T
    log_p, log_q = (teacher_logits / temperature).log_softmax(-1), (s / temperature).log_softmax(-1)
    if top_k is not None and top_k.shape[1] < len(head):
        kept = torch.zeros_like(log_p, dtype=torch.bool).scatter_(1, top_k, True)
        lump = lambda x: torch.cat((x.gather(1, top_k), x.masked_fill(kept, -torch.inf).logsumexp(-1, keepdim=True)), 1)  # noqa: E731
        log_p, log_q = lump(log_p), lump(log_q)
    kl = temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="sum") / len(hidden)
    ce = F.cross_entropy(s, labels, ignore_index=-100, reduction="sum")
    return kl_weight * kl + ce_weight * ce / len(hidden), kl, ce / (labels != -100).sum()


def problem(seed, N=23, C=7, teacher_C=5, V=61, dtype=torch.float64, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: (torch.randn(*shape, generator=generator) * scale).to(dtype)  # noqa: E731
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[torch.rand(N, generator=generator) < 0.3] = -100
    tensors = {"hidden": draw(N, C).requires_grad_(), "head": draw(V, C).requires_grad_(), "labels": labels}
    return tensors | {"teacher_hidden": draw(N, teacher_C), "teacher_head": draw(V, teacher_C)}


def teacher_logits(p):
    return p["teacher_hidden"] @ p["teacher_head"].T


def top_k_of(p, k, temperature):
    log_p, ids = (teacher_logits(p) / temperature).log_softmax(-1).topk(k)
    return ids, log_p


def check(p, arguments, expected, tolerance):
    """Values, and the gradients of a multiple of the loss, against the oracle's."""
    loss, measures = loss_of(**arguments)
    for name, found, right in zip(("loss", "kl", "ce"), (loss, measures["kl"], measures["ce"]), expected, strict=True):
        assert abs(found.double() - right.double()) <= tolerance * max(1, abs(right)), name
        assert found.requires_grad == (name == "loss")
    inputs = p["hidden"], p["head"]
    found, right = (torch.autograd.grad(1.7 * x, inputs, retain_graph=True) for x in (loss, expected[0]))
    for name, a, b, x in zip(("hidden", "head"), found, right, inputs, strict=True):
        assert a.dtype == x.dtype and (a - b).abs().max() <= tolerance * b.abs().max(), name


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("k", [None, 1, 9, 61])
@pytest.mark.parametrize("chunk", [1, 5, 23, 100])
def test_values_and_gradients_are_autograds(monkeypatch, temperature, weights, k, chunk):
    kl_weight, ce_weight = WEIGHTS[weights]
    options = {"kl_weight": kl_weight, "ce_weight": ce_weight, "temperature": temperature}
    for seed in range(3):
        monkeypatch.setattr(module, "IN_CACHE", (1, 200, 2**16)[seed])  # one row, some rows, all rows
        p = problem(seed)
        top_k = None if k is None else top_k_of(p, k, temperature)
        expected = oracle(
            p["hidden"], p["head"], p["labels"], teacher_logits(p), top_k=None if k is None else top_k[0], **options
        )
        arguments = p | options | {"chunk_tokens": chunk}
        if k is not None:
            del arguments["teacher_hidden"], arguments["teacher_head"]
            arguments["top_k"] = top_k
        check(p, arguments, expected, 1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("k", [None, 12])
def test_lower_precision_stays_near_the_oracle_on_the_same_numbers(dtype, tolerance, k):
    options = {"kl_weight": 1.0, "ce_weight": 0.5, "temperature": 1.5}
    for seed in range(3):
        p = problem(seed, N=37, V=131, dtype=dtype, scale=0.8)
        exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in p.items() if name != "labels"}
        exact["labels"] = p["labels"]
        top_k = None if k is None else top_k_of(exact, k, 1.5)
        arguments = p | options | {"chunk_tokens": 8}
        if k is not None:
            del arguments["teacher_hidden"], arguments["teacher_head"]
            arguments["top_k"] = top_k[0].int(), top_k[1].half()  # as they are stored
            tolerance = max(tolerance, 2e-3)
        right = oracle(
            *(exact[name] for name in ("hidden", "head", "labels")),
            teacher_logits(exact),
            top_k=None if k is None else top_k[0],
            **options,
        )
        loss, measures = loss_of(**arguments)
        assert loss.dtype == measures["kl"].dtype == torch.float32
        for found, value in zip((loss, measures["kl"], measures["ce"]), right, strict=True):
            assert abs(found - value) < tolerance * max(1, value)
        found = torch.autograd.grad(loss, (p["hidden"], p["head"]))
        for a, b in zip(found, torch.autograd.grad(right[0], (exact["hidden"], exact["head"])), strict=True):
            assert a.dtype == dtype and (a.double() - b).norm() < tolerance * b.norm()


def test_full_and_top_k_forms_agree_when_k_is_the_vocabulary():
    for seed in range(3):
        p = problem(seed, dtype=torch.float32)
        full, _ = loss_of(**p)
        ids, log_p = top_k_of(p, 61, 1.0)
        student = {name: p[name] for name in ("hidden", "head", "labels")}
        sparse, _ = loss_of(**student, top_k=(ids, log_p))
        rounded, _ = loss_of(**student, top_k=(ids.to(torch.uint16), log_p.half()))
        assert abs(full - sparse) < 1e-5 * full and abs(full - rounded) < 2e-3 * full


@pytest.mark.parametrize("k", [None, 3, 50])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_extreme_logits_stay_finite_and_right(k, temperature):
    """Logits of +-1e4: one student row is certain of what the teacher excludes."""
    V = 50
    for seed in range(3):
        p = problem(seed, N=6, C=3, teacher_C=3, V=V, dtype=torch.float32)
        p["teacher_head"] = p["head"].detach().clone()
        scale = torch.tensor([1e4, 1e-4, 1e4, 3e3, 1.0, 0.0])[:, None]
        p["hidden"] = (p["hidden"].detach().sign() * scale).requires_grad_()
        p["teacher_hidden"] = torch.cat((-p["hidden"][:1], p["hidden"][1:3], p["teacher_hidden"][3:])).detach()
        options = {"kl_weight": 1.0, "ce_weight": 0.5, "temperature": temperature}
        exact = {name: x.detach().double().requires_grad_() for name, x in p.items() if name != "labels"}
        top_k = None if k is None else top_k_of(p, k, temperature)
        arguments = p | options
        if k is not None:
            del arguments["teacher_hidden"], arguments["teacher_head"]
            arguments["top_k"] = top_k
        loss, _ = loss_of(**arguments)
        gradients = torch.autograd.grad(loss, (p["hidden"], p["head"]))
        assert loss.isfinite() and all(x.isfinite().all() for x in gradients)
        if k is None:
            right, _, _ = oracle(exact["hidden"], exact["head"], p["labels"], teacher_logits(exact), **options)
            assert abs(loss - right) < 1e-4 * right


def test_equal_models_have_no_divergence_and_no_gradient():
    p = problem(0, dtype=torch.float32)
    p |= {"teacher_hidden": p["hidden"].detach(), "teacher_head": p["head"].detach()}
    loss, measures = loss_of(**p)
    gradients = torch.autograd.grad(loss, (p["hidden"], p["head"]))
    assert abs(loss) < 1e-6 and all(x.abs().max() < 1e-6 for x in gradients)
    assert measures["ce"] > 0


def test_without_gradients_nothing_is_recorded_and_values_are_the_same():
    p = problem(1, dtype=torch.float32)
    loss, measures = loss_of(**p, ce_weight=0.3)
    with torch.no_grad():
        plain, again = loss_of(**p, ce_weight=0.3)
    frozen, _ = loss_of(**{name: x.detach() for name, x in p.items()}, ce_weight=0.3)
    assert not plain.requires_grad and not frozen.requires_grad
    assert loss.detach() == plain == frozen and measures == again


def test_only_what_requires_gradients_gets_them():
    p = problem(2)
    both = torch.autograd.grad(loss_of(**p)[0], (p["hidden"], p["head"]))
    for i, name in enumerate(("hidden", "head")):
        other = ("head", "hidden")[i]
        loss, _ = loss_of(**p | {other: p[other].detach()})
        assert torch.equal(torch.autograd.grad(loss, p[name])[0], both[i])


def test_without_a_teacher_cross_entropy_is_all_there_is():
    p = problem(3)
    student = {name: p[name] for name in ("hidden", "head", "labels")}
    loss, measures = loss_of(**student, kl_weight=0.0, ce_weight=1.0, chunk_tokens=4)
    right = F.cross_entropy(p["hidden"] @ p["head"].T, p["labels"], reduction="sum") / 23
    assert measures.keys() == {"ce"} and abs(loss - right) < 1e-12
    for a, b in zip(*(torch.autograd.grad(x, (p["hidden"], p["head"])) for x in (loss, right)), strict=True):
        assert (a - b).abs().max() < 1e-12
    no_labels = student | {"labels": torch.full((23,), -100)}
    loss, measures = loss_of(**no_labels, kl_weight=0.0, ce_weight=1.0)
    assert loss == measures["ce"] == 0
    with pytest.raises(ValueError, match="needs a teacher"):
        loss_of(**student)


def test_autocast_computes_in_its_dtype_and_gives_each_tensor_its_own():
    """A float32 hidden state and head under bfloat16 autocast: what the same numbers in bfloat16 give."""
    p = problem(4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = loss_of(**p, ce_weight=0.2)
    found = torch.autograd.grad(loss, (p["hidden"], p["head"]))
    half = {name: p[name].detach().bfloat16().requires_grad_() for name in ("hidden", "head")}
    right, _ = loss_of(**p | half, ce_weight=0.2)
    expected = torch.autograd.grad(right, tuple(half.values()))
    assert loss == right
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and (a - b).abs().max() < 1e-2 * b.abs().max()


def test_memory_is_a_chunks_not_the_texts(monkeypatch):
    """No tensor of more than chunk_tokens rows of logits is made."""
    largest, N, V = 0, 40, 500
    p = problem(5, N=N, C=3, V=V, dtype=torch.float32)

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **kwargs or {})
            if torch.is_tensor(result) and result.shape[-1:] == (V,) and result.dim() == 2:
                largest = max(largest, len(result))
            return result

    with Watch():
        loss_of(**p, ce_weight=0.2, chunk_tokens=6)
    assert largest == 6


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("k", [None, 9])
def test_answers_count_as_many_times_as_asked_and_are_measured_apart(k, compiled):
    """A token that counts three times is a token that is there three times, but for what the sum is divided by."""
    weights, p = LossWeights(kl=0.7, ce=0.4, temperature=1.5), problem(4)
    N = len(p["labels"])
    answers = torch.rand(N, generator=torch.Generator().manual_seed(1)) < 0.3
    copies = torch.cat((torch.arange(N), answers.nonzero().flatten().repeat(2)))
    top = top_k_of(p, k, 1.5) if k else None

    def run(rows, **settings):
        of_teacher = {"teacher": (p["teacher_hidden"][rows], p["teacher_head"])}
        if top:
            of_teacher = {"top_k": tuple(x[rows] for x in top)}
        settings |= {"chunk_tokens": 5, "rows_of": module.dense_rows if compiled and not k else None}
        return distillation_loss(p["hidden"][rows], p["head"], p["labels"][rows], weights=weights, **of_teacher, **settings)

    loss, metrics = run(torch.arange(N), answers=(answers, 3.0))
    repeated, _ = run(copies)
    torch.testing.assert_close(loss * N, repeated * len(copies))
    inputs = p["hidden"], p["head"]
    found = torch.autograd.grad(loss * N, inputs)
    for a, b in zip(found, torch.autograd.grad(repeated * len(copies), inputs), strict=True):
        torch.testing.assert_close(a, b)
    once, plain = run(torch.arange(N), answers=(answers, 1.0)), run(torch.arange(N))
    torch.testing.assert_close(once[0], plain[0])
    assert metrics["kl"] == plain[1]["kl"] and metrics["ce"] == plain[1]["ce"]
    _, alone = run(answers.nonzero().flatten())
    assert metrics["answer_share"] == answers.double().mean()
    torch.testing.assert_close(metrics["answer_kl"] / metrics["answer_share"], alone["kl"])
    labeled = (p["labels"][answers] != -100).sum() / answers.sum()
    torch.testing.assert_close(metrics["answer_ce"] / metrics["answer_share"], alone["ce"] * labeled)
