"""
The distillation loss on hidden states. Logits exist for a few tokens at a time, and their gradient is computed in closed form,
not by autograd, so that no (tokens, vocabulary) array is ever stored.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

IN_CACHE = 2**16  # float32 numbers per thread; a core's cache holds several such arrays


class LossWeights(NamedTuple):
    """
    What the loss adds up.

    Attributes:
        kl: weight of temperature^2 times the divergence.
        ce: weight of the cross-entropy.
        temperature: of both distributions in the divergence.
    """

    kl: float = 1.0
    ce: float = 0.0
    temperature: float = 1.0


DIVERGENCE = LossWeights()


def distillation_loss(  # noqa: PLR0913
    hidden: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    *,
    teacher: tuple[torch.Tensor, torch.Tensor] | None = None,
    top_k: tuple[torch.Tensor, torch.Tensor] | None = None,
    weights: LossWeights = DIVERGENCE,
    answers: tuple[torch.Tensor, float] | None = None,
    chunk_tokens: int = 256,
    rows_of: Callable | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    Weighted sum of T^2 * KL(teacher || student), both at temperature T, and the cross-entropy, each summed over the tokens and
    divided by N. Logits are computed in hidden's dtype (autocast's, where it is on), probabilities in float32.

    Args:
        hidden: (N, C), the student's last hidden states.
        head: (V, C), weight of its language-model head.
        labels: (N,) int64, the tokens to predict; -100 where there is no cross-entropy. The divergence counts everywhere.
        teacher: its last hidden states (N, C') and its head (V, C'), of one dtype.
        top_k: instead of `teacher`, the ids (N, k), all different, and log-probabilities (N, k) of the k tokens that it finds
            most likely at temperature T. All other tokens count as one more outcome, in both models.
        weights: of the two losses, and T.
        answers: (N,) bool, the tokens that predict a part of an answer, and how many times these count in the loss.
        chunk_tokens: number of tokens whose logits are in memory at a time.
        rows_of: compiled form of `dense_rows`, for `teacher`.

    Returns:
        The loss, a float32 scalar (float64 for such inputs), with gradients in hidden and head; and detached scalars: `ce`,
        the mean cross-entropy of the tokens that have a label, and `kl`, the mean of T^2 * KL, if there is a teacher, each
        token counted once. With `answers` also `answer_share`, that of these tokens among N, and `answer_ce` and `answer_kl`,
        their sums divided by N.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    sparse = teacher is None and top_k is not None
    target = top_k if sparse else teacher and tuple(x.detach() for x in teacher)
    if target is None and weights.kl:
        raise ValueError(f"kl_weight={weights.kl} needs a teacher: give teacher or top_k")
    counts = None if answers is None else torch.where(answers[0], answers[1], 1.0)
    settings = (sparse, weights, chunk_tokens, rows_of)
    with torch.autocast(device, enabled=False):
        loss, kl, ce = ChunkedLoss.apply(hidden, head, labels, target, counts, settings, torch.is_grad_enabled())
    metrics = {} if target is None else {"kl": kl.mean()}
    metrics["ce"] = ce.sum() / (labels != -100).sum().clamp_min(1)
    if answers is not None:
        of_answers = {name: rows * answers[0] for name, rows in (("kl", kl), ("ce", ce)) if name in metrics}
        metrics |= {f"answer_{name}": rows.mean() for name, rows in of_answers.items()}
        metrics["answer_share"] = answers[0].to(ce.dtype).mean()
    return loss, metrics


class ChunkedLoss(torch.autograd.Function):
    """
    Loss, and divergence and cross-entropy of each token, (N,); the gradients are ready before `backward`, which scales them.
    `counts` (N,), or None, says how many times each token counts in the loss.
    """

    @staticmethod
    def forward(ctx, hidden, head, labels, teacher, counts, settings, recording: bool):
        sparse, weights, chunk_tokens, rows_of = settings
        N, V = len(hidden), len(head)
        wants_hidden, wants_head = (recording and wanted for wanted in ctx.needs_input_grad[:2])
        head_weight = head.to(hidden.dtype)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        kl, ce = (torch.zeros(N, dtype=exact, device=hidden.device) for _ in range(2))
        hidden_gradient = torch.empty_like(hidden) if wants_hidden else None
        head_gradient = torch.zeros_like(head_weight, dtype=exact) if wants_head else None
        # one array for all chunks, because new pages from the system cost as much as a product
        student_logits = hidden.new_empty(min(chunk_tokens, N), V)
        dense = teacher is not None and not sparse
        teacher_logits = teacher[0].new_empty(student_logits.shape) if dense else None
        for start in range(0, N, chunk_tokens):
            chunk = slice(start, min(start + chunk_tokens, N))
            logits = torch.mm(hidden[chunk], head_weight.T, out=student_logits[: chunk.stop - start])
            if dense:
                torch.mm(teacher[0][chunk], teacher[1].T, out=teacher_logits[: len(logits)])
            wanted = wants_hidden or wants_head
            if dense and rows_of is not None:
                targets = teacher_logits[: len(logits)]
                kl[chunk], ce[chunk], logits = rows_of(logits, targets, labels[chunk], *weights, wanted)
                parts = []
            else:
                # the many small passes of a softmax go over rows that stay in the cache, and replace them by the gradient
                parts = slices(len(logits), rows_at_once(V, logits))
            for part in parts:
                rows = slice(start + part.start, start + part.stop)
                s = logits[part].to(exact, copy=True)
                if teacher is None:
                    target = None
                else:
                    target = tuple(x[rows] for x in teacher) if sparse else (teacher_logits[part].to(exact, copy=True),)
                kl[rows], ce[rows], gradient = loss_of_rows(s, labels[rows], target, *weights, wanted)
                if gradient is not None:
                    logits[part] = gradient
            if wanted and counts is not None:
                logits.mul_(counts[chunk].to(logits.dtype).unsqueeze(1))
            if wants_hidden:
                torch.mm(logits, head_weight, out=hidden_gradient[chunk])
            if wants_head:
                add_product(head_gradient, logits.T, hidden[chunk])
        counted = [x if counts is None else x * counts for x in (kl, ce)]
        loss = weights.kl * counted[0].mean() + weights.ce * counted[1].sum() / N
        ctx.save_for_backward(hidden_gradient, head_gradient)
        ctx.scale, ctx.head_dtype = 1 / N, head.dtype
        ctx.mark_non_differentiable(kl, ce)
        return loss, kl, ce

    @staticmethod
    def backward(ctx, loss_gradient, *_):
        hidden_gradient, head_gradient = ctx.saved_tensors
        scale = loss_gradient * ctx.scale
        if hidden_gradient is not None:  # bfloat16 would round 1 / N
            hidden_gradient = (hidden_gradient.to(scale.dtype) * scale).to(hidden_gradient.dtype)
        if head_gradient is not None:
            head_gradient = (head_gradient * scale).to(ctx.head_dtype)
        return hidden_gradient, head_gradient, None, None, None, None, None


def slices(size: int, step: int) -> list[slice]:
    """Slices of `step` that cover 0 .. size - 1."""
    return [slice(first, min(first + step, size)) for first in range(0, size, step)]


def rows_at_once(vocabulary: int, logits: torch.Tensor) -> int:
    """Number of rows of `logits` to handle at a time: as many as a CPU's caches hold; all on other devices."""
    if not logits.is_cpu:
        return len(logits)
    return max(1, IN_CACHE * torch.get_num_threads() // vocabulary)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a @ b to `total`, summing in total's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def loss_of_rows(s, labels, target, kl_weight: float, ce_weight: float, T: float, wanted: bool):
    """
    Compute T^2 times the divergence and the cross-entropy of each row, (r,), and the gradient of their weighted sum in the
    logits, (r, V), or None if not `wanted`.

    Args:
        s: (r, V), the student's logits, which are overwritten.
        labels: (r,).
        target: None, (teacher's logits (r, V),), which are overwritten, or (ids (r, k), log-probabilities (r, k)).
    """
    chosen = (labels != -100).to(s.dtype).unsqueeze(1)
    index = labels.clamp_min(0).unsqueeze(1)
    picked = s.gather(1, index)
    shared = T == 1 and target is not None  # one softmax of the student serves both losses
    if shared:
        ce_gradient = None
    else:
        log_z, p = normalize(s)
        ce = log_z - picked
        ce_gradient = p if wanted and ce_weight else None
    if target is None:
        kl, gradient = ce.new_zeros(len(s)), ce_gradient.mul_(ce_weight * chosen) if ce_gradient is not None else None
    else:
        if T != 1:
            s.div_(T)
        if T != 1 and len(target) == 1:  # k log-probabilities are at T already
            target[0].div_(T)
        # gradient = p_weight * softmax(s / T) - kl_share * teacher
        kl_share = T * kl_weight
        p_weight = kl_share + ce_weight * chosen if shared and ce_weight else kl_share
        divergence = full_divergence if len(target) == 1 else top_k_divergence
        kl, log_z, gradient = divergence(s, *target, p_weight, kl_share, wanted)
        kl = T * T * kl
        if shared:
            ce = log_z - picked
        elif ce_gradient is not None:
            gradient.addcmul_(ce_gradient, ce_weight * chosen)
    if gradient is not None and ce_weight:
        gradient.scatter_add_(1, index, -ce_weight * chosen)
    return kl, (ce * chosen).squeeze(1), gradient


def dense_rows(logits, teacher_logits, labels, kl_weight: float, ce_weight: float, T: float, wanted: bool):
    """
    Compute what `loss_of_rows` does for the student's logits (r, V) and the teacher's (r, V), with the gradient in the logits'
    dtype. Nothing is overwritten, and passes are not avoided, because torch.compile merges them.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    s, t = logits.to(exact), teacher_logits.to(exact)
    chosen, index = labels != -100, labels.clamp_min(0).unsqueeze(1)
    log_q = s.log_softmax(-1)
    ce = torch.where(chosen, -log_q.gather(1, index).squeeze(1), 0.0)
    log_q_at_T = log_q if T == 1 else (s / T).log_softmax(-1)
    log_p = (t / T).log_softmax(-1)
    p = log_p.exp()
    kl = T * T * (p * (log_p - log_q_at_T)).sum(-1)
    if not wanted:
        return kl, ce, None
    gradient = T * kl_weight * (log_q_at_T.exp() - p)
    if ce_weight:
        one_hot = torch.arange(s.shape[1], device=s.device) == index
        gradient = gradient + ce_weight * chosen.unsqueeze(1) * (log_q.exp() - one_hot.to(exact))
    return kl, ce, gradient.to(logits.dtype)


def normalize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log(sum(exp(x))), (r, 1), and the softmax of x, (r, V); x is not changed."""
    p = x.softmax(-1)
    return x.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log(), p


def full_divergence(s, t, p_weight, kl_share: float, wanted: bool):
    """
    Compute, for logits s and t (r, V) at temperature 1: KL(t || s) (r,), the log-normalizer of s (r, 1), and p_weight *
    softmax(s) - kl_share * softmax(t), or None if not `wanted`. t is overwritten.
    """
    top_s, top_t = s.amax(-1, keepdim=True), t.amax(-1, keepdim=True)
    p_s, p_t = s.softmax(-1), t.softmax(-1)
    # the largest logit has the probability 1 / sum(exp(x - top))
    rest_s, rest_t = -p_s.amax(-1, keepdim=True).log(), -p_t.amax(-1, keepdim=True).log()
    difference = t.sub_(s).sub_(top_t - top_s)
    kl = torch.linalg.vecdot(p_t, difference) + (rest_s - rest_t).squeeze(1)
    gradient = None
    if wanted and torch.is_tensor(p_weight):
        gradient = p_s.mul_(p_weight).sub_(p_t, alpha=kl_share)
    elif wanted:
        gradient = p_s.sub_(p_t)
        gradient = gradient if kl_share == 1 else gradient.mul_(kl_share)
    return kl, top_s + rest_s, gradient


def top_k_divergence(s, ids, log_p, p_weight, kl_share: float, wanted: bool):
    """Compute what `full_divergence` does for k + 1 outcomes: the tokens `ids` (r, k), and any other. s is overwritten."""
    ids, log_p = ids.long(), log_p.to(s.dtype)
    t = log_p.exp()
    mass = t.sum(-1, keepdim=True)
    # rounded probabilities may add up to a little more than 1
    t_other = torch.zeros_like(mass) if ids.shape[1] == s.shape[1] else (1 - mass).clamp_min(0)
    total = mass + t_other
    t = t / total
    t_other = t_other / total
    log_p = log_p - total.log()

    top = s.gather(1, ids)
    s.scatter_(1, ids, -torch.inf)
    lowest = torch.finfo(s.dtype).min
    log_other = s.logsumexp(-1, keepdim=True).clamp_min(lowest)  # without other tokens it is -inf
    log_z = torch.cat((top, log_other), dim=1).logsumexp(-1, keepdim=True)
    log_q, log_q_other = top - log_z, log_other - log_z
    kl = (t * (log_p - log_q)).sum(-1, keepdim=True) + torch.xlogy(t_other, t_other) - t_other * log_q_other
    gradient = None
    if wanted:
        # the other tokens share their mass in the student's proportions
        share = p_weight * log_q_other.exp() - kl_share * t_other
        gradient = s.sub_(log_other).exp_().mul_(share)
        gradient.scatter_(1, ids, p_weight * log_q.exp() - kl_share * t)
    return kl.squeeze(1), log_z, gradient
