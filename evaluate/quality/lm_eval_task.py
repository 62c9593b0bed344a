"""One of lm-eval's tasks with its prompts made and counted; see `harness.py`."""

import inspect
import json
from dataclasses import dataclass, field
from importlib.metadata import version

from transformers import set_seed

from dijiang.checkpoint.provenance import public_name
from dijiang.common.result_cache import hash_of

TOKENISED_AT_A_TIME = 1000  # prompts


@dataclass(frozen=True, kw_only=True)
class HarnessTask:
    """
    A task with its documents, or a group of tasks that has a mean of its own, such as mmlu.

    Attributes:
        metric, better: which of its metrics is told, and whether "lower" or "higher" values are better.
        chance: accuracy of guessing, 0 where there are no choices to guess among.
        documents: how many are asked; truncated: how many of them do not fit into the context and lose their beginning.
        tokens: what one model reads and at most writes for it.
        settings: all that the scores depend on besides the model, as JSON.
        context: tokens a model is given at most; limit: documents of each task (None: all); seed: of examples in prompts.
        leaf_weights: weight of a document, by task of the group.
        lengths: tokens of each request, by its strings.
        loaded: the tasks and groups as lm-eval wants them.
    """

    name: str
    metric: str
    better: str
    chance: float
    documents: int
    truncated: int
    tokens: int
    settings: dict
    context: int
    limit: int | None
    seed: int
    leaf_weights: dict[str, float] = field(repr=False)
    lengths: dict[tuple[str, str], int] = field(repr=False)
    loaded: dict = field(repr=False)


def prepare(part: dict, tokenizer, *, context: int, limit: int | None, num_fewshot: int | None, seed: int) -> HarnessTask:
    """
    Make the prompts of one task or group; `part` is what lm-eval's manager gives for it, the rest as for `load_tasks`.

    Raises:
        ValueError: if it cannot be run, or has no metric that is a mean over documents.
    """
    leaves = part["tasks"]
    group = next(iter(part["groups"].values()), None)  # the outermost comes first
    name = group.name if group else next(iter(leaves))
    metric, by_size = main_metric(name, list(leaves.values()), group)
    lengths, hashed, described, leaf_weights = {}, [], {}, {}
    tokens = documents = truncated = 0
    guessed = total_weight = 0.0
    for leaf, task in leaves.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise ValueError(f"the task {leaf} runs code that a model wrote, or shows it pictures; leave it out")
        own = task.get_config("num_fewshot")
        shots = own if num_fewshot is None or own == 0 else num_fewshot
        task.set_config(key="num_fewshot", value=shots or 0)
        make_requests(task, limit=limit, seed=seed)
        room = context if task.OUTPUT_TYPE == "generate_until" else context + 1  # a last token that is only predicted
        too_long, asked = set(), {}
        for request, length in zip(task.instances, request_lengths(task.instances, tokenizer), strict=True):
            if (new := new_tokens(request)) >= context:
                raise ValueError(f"the task {leaf} asks for {new} new tokens and the context is {context}; leave it out")
            lengths[strings(request.args)] = length + new
            tokens += (length + new) * request.repeats
            asked.setdefault(request.doc_id, []).append(request)
            if length + new > room:
                too_long.add(request.doc_id)
        leaf_weights[leaf] = 1.0 if by_size else 1.0 / len(asked)
        for requests in asked.values():
            target = task.doc_to_target(requests[0].doc)
            guessed += leaf_weights[leaf] * guessing(task, len(requests), target, metric)
            total_weight += leaf_weights[leaf]
            hashed.append(json.dumps([str(target), *(strings(x.args) for x in requests)]).encode())
        scoring = {key: task.get_config(key) for key in ("metric_list", "filter_list", "process_results", "output_type")}
        hashed.append(json.dumps([scoring, leaf_weights[leaf]], sort_keys=True, default=source_of).encode())
        documents += len(asked)
        truncated += len(too_long)
        described[leaf] = {"version": str(task.VERSION), "num_fewshot": shots or 0, "documents": len(asked)}
        described[leaf] |= {"dataset": task.DATASET_PATH and public_name(task.DATASET_PATH), "dataset_name": task.DATASET_NAME}
    settings = {"lm_eval": version("lm_eval"), "limit": limit, "seed": seed, "context": context, "metric": metric}
    return HarnessTask(
        name=name,
        metric=metric,
        better="higher" if all(task.higher_is_better()[metric] for task in leaves.values()) else "lower",
        chance=guessed / total_weight,
        documents=documents,
        truncated=truncated,
        tokens=tokens,
        settings=settings | {"tasks": described, "hash": hash_of(*hashed)},
        context=context,
        limit=limit,
        seed=seed,
        leaf_weights=leaf_weights,
        lengths=lengths,
        loaded=part,
    )


def source_of(value) -> str:
    """What a function or another thing of Python in a task's settings is known by."""
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return getattr(value, "__qualname__", type(value).__qualname__)


def main_metric(name: str, leaves: list, group) -> tuple[str, bool]:
    """
    The metric that is told: `acc` where there is one, else the first, among those that are means over documents; and, for a
    group, whether its mean weighs every document alike, or every task.
    """
    from lm_eval.api.metrics import mean

    means = [[metric for metric, aggregation in task.aggregation().items() if aggregation is mean] for task in leaves]
    offered = {x.metric: x.weight_by_size for x in group.aggregate_metric_list} if group else dict.fromkeys(means[0], True)
    usable = [metric for metric in offered if all(metric in of_leaf for of_leaf in means)]
    if not usable:
        others = ", ".join(offered or leaves[0].aggregation())
        raise ValueError(f"the task {name} has no metric that is a mean over documents (it has {others}); leave it out")
    metric = "acc" if "acc" in usable else usable[0]
    return metric, offered[metric]


def make_requests(task, *, limit: int | None, seed: int) -> None:
    """Fill `task.instances`, with the same examples in the prompts whenever it is called."""
    set_seed(seed)  # some tasks shuffle their documents or choices by the global generators
    task.set_fewshot_seed(seed=seed)
    task.build_all_requests(limit=limit)


def guessing(task, requests: int, target, metric: str) -> float:
    """Chance to be right on a document with so many requests, one for each choice."""
    if task.OUTPUT_TYPE != "multiple_choice" or not metric.startswith("acc"):
        return 0.0
    choices = requests / 2 if "acc_mutual_info" in task.aggregation() else requests  # which asks for each without the question
    return (len(set(target)) if isinstance(target, list) else 1) / choices


def strings(request: tuple) -> tuple[str, str]:
    """What a request is known by: its context, and its continuation or its settings of generation."""
    context, rest = request[:2]
    return context, rest if isinstance(rest, str) else json.dumps(rest, sort_keys=True, default=str)


def request_lengths(requests: list, tokenizer) -> list[int]:
    """Tokens of each request as far as it is given."""
    texts = [context + rest if isinstance(rest, str) else context for context, rest in (x.args[:2] for x in requests)]
    found = []
    for start in range(0, len(texts), TOKENISED_AT_A_TIME):
        encoded = tokenizer(texts[start : start + TOKENISED_AT_A_TIME], verbose=False)["input_ids"]
        found += [len(ids) for ids in encoded]
    return [length + (x.args[0] == "") for length, x in zip(found, requests, strict=True)]  # it gets a token to begin with


def new_tokens(request) -> int:
    """How many tokens a request asks for at most."""
    from lm_eval.models.utils import normalize_gen_kwargs

    return normalize_gen_kwargs(request.args[1])["max_gen_toks"] if request.request_type == "generate_until" else 0
