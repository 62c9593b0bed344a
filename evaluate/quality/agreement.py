"""Whether a model writes, greedily, what its teacher writes."""

from collections.abc import Callable

import torch


def prompts(tokens: torch.Tensor, *, prompt_length: int, count: int) -> torch.Tensor:
    """
    `count` prompts spread evenly over a text (T,): (count, prompt_length).

    Raises:
        ValueError: if the text is shorter than one prompt.
    """
    if len(tokens) < prompt_length:
        raise ValueError(f"the text has {len(tokens)} tokens and a prompt {prompt_length}; give more text or shorter prompts")
    starts = torch.linspace(0, len(tokens) - prompt_length, count, dtype=torch.float64).long()
    return torch.stack([tokens[start : start + prompt_length] for start in starts.tolist()])


@torch.no_grad()
def greedy(model, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """The new_tokens that `model` writes after prompt (T,), end-of-text or not: (new_tokens,)."""
    prompt = prompt[None].to(next(model.parameters()).device)
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None,
        pad_token_id=0, repetition_penalty=1.0, use_cache=True,
    )  # fmt: skip
    return written[0, prompt.shape[1] :].cpu()


@torch.no_grad()
def agreement_scores(
    model,
    prompt_rows: torch.Tensor,
    *,
    new_tokens: int,
    reference: dict | None = None,
    decode: Callable[[list[int]], str],
    advance: Callable[[int], None] = lambda done: None,
) -> dict:
    """
    Of the tokens that the teacher writes greedily after each prompt, how many `model` would choose there too.

    Args:
        prompt_rows: (prompts, tokens).
        reference: what this returned for the teacher; None for the teacher itself, who writes the continuations.
        decode: of token ids, for the sample.
        advance: is told how many tokens were written or read.

    Returns:
        `totals`: tokens agreed on, by prompt; `weights`: new_tokens; `detail`: `continuations` (the teacher's tokens, in its
        own result alone), `prefix`: tokens before the first difference, which is how far the model's own greedy text is
        the teacher's; `sample`: the first prompt and what the model itself writes after it.
    """
    own = [] if reference is not None else [greedy(model, row, new_tokens).tolist() for row in prompt_rows]
    continuations = own or reference["detail"]["continuations"]
    device = next(model.parameters()).device
    totals, prefix = [], []
    for row, continuation in zip(prompt_rows, continuations, strict=True):
        if own:
            agreed = torch.ones(new_tokens, dtype=torch.bool)
        else:
            ids = torch.cat((row, torch.tensor(continuation)))[None].to(device)
            logits = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=new_tokens).logits
            agreed = logits[0].argmax(-1).cpu() == torch.tensor(continuation)
        totals.append(float(agreed.sum()))
        prefix.append(int(agreed.long().cumprod(0).sum()))
        advance(len(row) + new_tokens)
    written = own[0] if own else greedy(model, prompt_rows[0], new_tokens).tolist()
    sample = {"prompt": decode(prompt_rows[0].tolist()), "continuation": decode(written)}
    detail = {"prefix": prefix, "sample": sample} | ({"continuations": own} if own else {})
    return {"totals": totals, "weights": [float(new_tokens)] * len(totals), "detail": detail}
