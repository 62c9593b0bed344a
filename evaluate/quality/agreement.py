"""Agreement: how much of the teacher's greedy text a model would write too."""

from collections.abc import Callable

import torch

from .task_base import Task, TaskInputs, hash_tokens


def agreement_tasks(inputs: TaskInputs) -> list[Task]:
    """Agreement on continuations of pieces of the first text."""
    name, tokens = inputs.first_text
    config = inputs.config
    rows = prompts(tokens, prompt_length=config.prompt_length, count=config.prompts)
    sizes = {"prompts": config.prompts, "prompt_length": config.prompt_length, "new_tokens": config.new_tokens}

    def run(model, reference, advance) -> dict:
        decode = inputs.tokenizer.decode
        return agreement_scores(model, rows, new_tokens=config.new_tokens, reference=reference, decode=decode, advance=advance)

    return [
        Task(
            kind="agreement",
            name=f"{name}, {config.new_tokens} tokens after {config.prompt_length}",
            metric="agreement",
            floor="no_attention",
            settings={"hash": hash_tokens(rows), **sizes},
            cost=rows.numel() + config.prompts * config.new_tokens,
            run=run,
            asks_teacher=True,
        )
    ]


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
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None,
        pad_token_id=0, repetition_penalty=1.0, use_cache=True,
    )  # fmt: skip
    return output[0, prompt.shape[1] :].cpu()


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
    Count the tokens of the teacher's greedy continuations that `model` would choose too, each after the teacher's own text.

    Args:
        model: a causal language model that takes `logits_to_keep`.
        prompt_rows: (prompts, tokens).
        new_tokens: tokens of a continuation.
        reference: what this function returned for the teacher; None for the teacher itself, which writes the continuations.
        decode: turns token ids into text, for the sample.
        advance: called with the number of tokens written or read since the last call.

    Returns:
        `totals`: tokens agreed on, by prompt; `weights`: new_tokens; `detail`: `prefix`, by prompt the tokens before the first
        difference; `sample`, the first prompt and what the model itself writes after it; for the teacher also
        `continuations`, its tokens.
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
    first = own[0] if own else greedy(model, prompt_rows[0], new_tokens).tolist()
    sample = {"prompt": decode(prompt_rows[0].tolist()), "continuation": decode(first)}
    detail = {"prefix": prefix, "sample": sample} | ({"continuations": own} if own else {})
    return {"totals": totals, "weights": [float(new_tokens)] * len(totals), "detail": detail}
