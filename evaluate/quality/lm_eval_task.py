"""One of lm-eval's tasks with its prompts made and counted; see `lm_eval_runner.py`."""

import inspect
import json
from dataclasses import dataclass, field
from importlib.metadata import version

from transformers import set_seed

from dijiang.checkpoint.provenance import public_name
from dijiang.common.result_cache import hash_of

TOKENIZED_AT_A_TIME = 1000  # prompts


@dataclass(frozen=True, kw_only=True)
class LmEvalTask:
    """
    A task with its documents, or a group of tasks that has a mean of its own, such as mmlu.

    Attributes:
        name: lm-eval's name of the task or group.
        metric: which of its metrics is reported.
        better: whether "lower" or "higher" values are better.
        chance: accuracy of guessing, 0 where there are no choices to guess among.
        documents: number of documents.
        truncated: how many documents do not fit into the context and lose their beginning.
        tokens: tokens that one model reads and at most writes.
        settings: all that the scores depend on besides the model, as JSON.
        context: tokens a model is given at most.
        limit: documents of each task, at most (None: all).
        seed: seed of the examples in prompts.
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


def prepare(part: dict, tokenizer, *, context: int, limit: int | None, num_fewshot: int | None, seed: int) -> LmEvalTask:
    """
    Make the prompts of one task or group.

    Args:
        part: what lm-eval's manager returns for it.
        tokenizer: as for `load_tasks`, like all that follows.

    Raises:
        ValueError: if it cannot be run, or has no metric that is a mean over documents.
    """
    leaves = part["tasks"]
    group = next(iter(part["groups"].values()), None)  # the outermost comes first
    name = group.name if group else next(iter(leaves))
    metric, by_size = main_metric(name, list(leaves.values()), group)
    lengths: dict[tuple[str, str], int] = {}
    hashed: list[bytes] = []
    descriptions: dict[str, dict] = {}
    leaf_weights: dict[str, float] = {}
    tokens = documents = truncated = 0
    guessed = total_weight = 0.0
    for leaf, task in leaves.items():
        shots = set_shots(leaf, task, num_fewshot)
        make_requests(task, limit=limit, seed=seed)
        by_document = requests_by_document(leaf, task, tokenizer, context)
        room = context if task.OUTPUT_TYPE == "generate_until" else context + 1  # the last token is only predicted
        leaf_weights[leaf] = weight = 1.0 if by_size else 1.0 / len(by_document)
        for requests in by_document.values():
            target = task.doc_to_target(requests[0][0].doc)
            guessed += weight * guessing(task, len(requests), target, metric)
            total_weight += weight
            tokens += sum(length * request.repeats for request, length in requests)
            truncated += any(length > room for _, length in requests)
            lengths |= {strings(request.args): length for request, length in requests}
            hashed.append(json.dumps([str(target), *(strings(request.args) for request, _ in requests)]).encode())
        scoring = {key: task.get_config(key) for key in ("metric_list", "filter_list", "process_results", "output_type")}
        hashed.append(json.dumps([scoring, weight], sort_keys=True, default=source_of).encode())
        documents += len(by_document)
        descriptions[leaf] = {"version": str(task.VERSION), "num_fewshot": shots, "documents": len(by_document)}
        descriptions[leaf] |= {"dataset": task.DATASET_PATH and public_name(task.DATASET_PATH)}
        descriptions[leaf] |= {"dataset_name": task.DATASET_NAME}
    settings = {"lm_eval": version("lm_eval"), "limit": limit, "seed": seed, "context": context, "metric": metric}
    return LmEvalTask(
        name=name,
        metric=metric,
        better="higher" if all(task.higher_is_better()[metric] for task in leaves.values()) else "lower",
        chance=guessed / total_weight,
        documents=documents,
        truncated=truncated,
        tokens=tokens,
        settings=settings | {"tasks": descriptions, "hash": hash_of(*hashed)},
        context=context,
        limit=limit,
        seed=seed,
        leaf_weights=leaf_weights,
        lengths=lengths,
        loaded=part,
    )


def set_shots(leaf: str, task, num_fewshot: int | None) -> int:
    """Set and return the number of examples in a task's prompts; ValueError on a task that dijiang does not run."""
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise ValueError(f"the task {leaf} runs code that a model wrote, or shows it pictures; leave it out")
    own = task.get_config("num_fewshot")
    shots = (own if num_fewshot is None or own == 0 else num_fewshot) or 0
    task.set_config(key="num_fewshot", value=shots)
    return shots


def requests_by_document(leaf: str, task, tokenizer, context: int) -> dict[int, list[tuple]]:
    """
    Requests of each document of a task, each with its tokens, those to be written included.

    Raises:
        ValueError: if the task asks for more new tokens than the context holds.
    """
    by_document: dict[int, list[tuple]] = {}
    for request, length in zip(task.instances, request_lengths(task.instances, tokenizer), strict=True):
        if (new := new_tokens(request)) >= context:
            raise ValueError(f"the task {leaf} asks for {new} new tokens and the context is {context}; leave it out")
        by_document.setdefault(request.doc_id, []).append((request, length + new))
    return by_document


def source_of(value) -> str:
    """Source of a function in a task's settings, or the name of another Python object, to be hashed."""
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return getattr(value, "__qualname__", type(value).__qualname__)


def main_metric(name: str, leaves: list, group) -> tuple[str, bool]:
    """
    The metric to report: of those that are means over documents `acc`, or else the first; and, for a group, whether its mean
    gives every document the same weight, rather than every task.
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
    """Fill `task.instances`, with the same examples in the prompts at every call."""
    set_seed(seed)  # some tasks shuffle their documents or choices by the global generators
    task.set_fewshot_seed(seed=seed)
    task.build_all_requests(limit=limit)


def guessing(task, requests: int, target, metric: str) -> float:
    """Chance to guess a document right that has `requests` requests, one for each choice."""
    if task.OUTPUT_TYPE != "multiple_choice" or not metric.startswith("acc"):
        return 0.0
    # acc_mutual_info asks for each choice a second time, without the question
    choices = requests / 2 if "acc_mutual_info" in task.aggregation() else requests
    return (len(set(target)) if isinstance(target, list) else 1) / choices


def strings(request: tuple) -> tuple[str, str]:
    """Key of a request: its context, and its continuation or its generation settings."""
    context, rest = request[:2]
    return context, rest if isinstance(rest, str) else json.dumps(rest, sort_keys=True, default=str)


def request_lengths(requests: list, tokenizer) -> list[int]:
    """Tokens of each request before anything is written; an empty context gets a token to begin with."""
    texts = [context + rest if isinstance(rest, str) else context for context, rest in (x.args[:2] for x in requests)]
    lengths = []
    for start in range(0, len(texts), TOKENIZED_AT_A_TIME):
        encoded = tokenizer(texts[start : start + TOKENIZED_AT_A_TIME], verbose=False)["input_ids"]
        lengths += [len(ids) for ids in encoded]
    return [length + (request.args[0] == "") for length, request in zip(lengths, requests, strict=True)]


def new_tokens(request) -> int:
    """Tokens that a request lets the model write, at most."""
    from lm_eval.models.utils import normalize_gen_kwargs

    return normalize_gen_kwargs(request.args[1])["max_gen_toks"] if request.request_type == "generate_until" else 0
