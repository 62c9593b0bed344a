"""
The model card of a checkpoint: what it is, where it comes from, its scores next to those of teacher, baseline and ablations,
its limits. All of it comes from the checkpoint's own files and from earlier results.
"""

import json
import math
import re
import shlex
from itertools import groupby
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError
from jinja2 import Environment, StrictUndefined

from dijiang.checkpoint.provenance import read_provenance
from dijiang.checkpoint.source import open_source
from dijiang.common.device import dtype_name
from dijiang.common.errors import one_line
from dijiang.common.outputs import write_whole
from dijiang.convert.mapping import build_on_meta, new_modules
from dijiang.modeling import FEATURE_MAPS
from dijiang.modeling.configuration_dijiang import LAYER_TYPES

from ..quality.memory_use import memory_use
from ..quality.variants import file_hashes
from .tables import NOTHING, heading, markdown_table, memory_rows, mib, number, percent, with_interval

FILE_NAME = "README.md"
TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.jinja"
MARKER = "<!-- Written by dijiang, which may replace this file by a newer card; take out this line to keep your own words. -->"
HUB_METRICS = {"acc": "accuracy"}  # where the hub has another name
SHARED_SETTINGS = ("key_scale", "scale_features", "normalize", "output_norm", "output_gate", "decay")
ARROWS = {"lower": "↓", "higher": "↑"}
SHARES = {"recovered": "recovered", "over_training_free": "of the training-free loss"}
# a path that is absolute or starts from the home, working or parent folder; its last part
LOCAL_PATH = re.compile(
    r"(?<![^\s'\"`(\[=,;:|])(?:file:/*|[A-Za-z]:|~\w*|\.{1,2})?[\\/](?=\w)(?:[^\s'\"`|,;:()\[\]\\/]+[\\/]+)*([^\s'\"`|,;:()\[\]\\/]+)"
)


def model_card(checkpoint: str | Path, evaluation: dict | None = None, latency: dict | None = None) -> ModelCard:
    """
    The card of the DiJiang checkpoint in a folder; nothing is written.

    Args:
        checkpoint: the folder.
        evaluation: this checkpoint's result of `dijiang evaluate`. A user's baselines in it are left out.
        latency: this checkpoint's result of `dijiang benchmark latency`.

    Raises:
        ValueError: if it is no DiJiang checkpoint, or a result is of another kind or of other weights.
    """
    folder = Path(checkpoint).expanduser().resolve()
    provenance = read_provenance(folder)
    student = open_source(folder)
    config = student.config
    if config.model_type != "dijiang":
        raise ValueError(f"{checkpoint} holds a {config.model_type} model; give the folder of a DiJiang checkpoint")
    for kind, result in (("evaluation", evaluation), ("latency", latency)):
        if result is not None and result.get("kind") != kind:
            raise ValueError(f"the {kind} given is of kind {result.get('kind')!r}; give the JSON file of the {kind}")
    if evaluation and evaluation["student"]["weights"] != file_hashes(student):
        raise ValueError(f"the evaluation is of other weights than those in {checkpoint}; evaluate this checkpoint")
    if latency and latency["models"].get("files") != file_hashes(student):
        raise ValueError(f"the latency is of another model than that in {checkpoint}; measure this checkpoint")

    source = plain(provenance["source"])
    on_hub = bool(provenance.get("commit"))  # only sources on the hub have one
    name = source.rpartition("/")[2].removesuffix(".gguf") + "-dijiang"
    own_scores = eval_results(evaluation) if evaluation else []
    data = ModelCardData(
        base_model=source if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["dijiang", "linear-attention", "arxiv:2403.19928"],
        metrics=sorted({score.metric_type for score in own_scores}) or None,
        model_name=name if own_scores else None,
        eval_results=own_scores or None,
    )
    text = render(
        marker=MARKER,
        name=name,
        folder=folder.name,
        tokens=sum(stage.get("tokens", 0) for stage in provenance["stages"]),
        config=config,
        source=source,
        source_shown=f"[{escaped(source)}](https://huggingface.co/{source})" if on_hub else code(source),
        on_hub=on_hub,
        **model_facts(config),
        **origin_facts(provenance),
        **evaluation_facts(evaluation, provenance["source"]),
        **latency_facts(latency),
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
    assert card.data.to_dict() == data.to_dict(), "the metadata must survive being read"
    return card


def write_model_card(
    checkpoint: str | Path,
    evaluation: dict | None = None,
    latency: dict | None = None,
    *,
    replace: bool = False,
    validate_online: bool = False,
) -> Path:
    """
    Write the card of a checkpoint into its folder, as README.md.

    Args:
        checkpoint: as for `model_card`.
        evaluation: as for `model_card`.
        latency: as for `model_card`.
        replace: replace even a README.md that dijiang did not write.
        validate_online: have the hub check the card before it is written.

    Raises:
        ValueError: whatever `model_card` refuses; a README.md that dijiang did not write; a card that the hub refuses, or that
            it does not check because it cannot be reached.
    """
    path = Path(checkpoint).expanduser() / FILE_NAME
    if path.is_file() and not replace and MARKER not in path.read_text(encoding="utf-8", errors="replace").splitlines():
        raise ValueError(f"{path} was not written by dijiang; move it away, or ask for it to be replaced")
    card = model_card(checkpoint, evaluation, latency)
    if validate_online:
        try:
            card.validate()
        except ValueError as error:
            raise ValueError(f"the hub refuses the card: {one_line(error)}") from None
        except (HTTPError, OSError) as error:
            raise ValueError(f"the hub did not check the card: {one_line(error)}; try again, or do without") from None
    try:
        write_whole(path, card.save)
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror}); make its folder writable") from None
    return path


def render(**facts) -> str:
    """The template filled in with `facts`, which must be complete."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"escaped": escaped, "code": code, "cell": cell, "whole": whole, "number": number, "repr": repr}
    environment.filters |= {"mib": mib, "ranges": ranges, "json": json.dumps, "quote": shlex.quote}
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(facts)
    return re.sub(r"\n{3,}", "\n\n", text)  # parts that were left out leave empty lines


# --- text from outside ---


def plain(text: str) -> str:
    """`text` on one line, without control characters, its local paths cut to their last part, since cards get shared."""
    text = "".join(c if c.isprintable() else " " for c in str(text))
    return LOCAL_PATH.sub(r"\1", " ".join(text.split()))


def escaped(text: str | None) -> str:
    """`text` in a form that Markdown shows literally, in tables too."""
    return NOTHING if text is None else re.sub(r"([\\`*_{}\[\]<>~$&#|])", r"\\\1", plain(text))


def code(text: str) -> str:
    """`text` as a code span, also with backticks in it."""
    text = plain(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def cell(text: str | None) -> str:
    """`code` for a table, in which a pipe would end the cell."""
    return NOTHING if text is None else code(text).replace("|", r"\|")


def shareable(command: str, names: set[str]) -> str:
    """`command` with each path cut to its last part; `names` stay, since those with several parts are hub ids."""
    words = (plain(word) if word in names else re.sub(r"[^=,\[\]'\"]*[\\/]", "", word) for word in shlex.split(command))
    return shlex.join(words)


# --- facts for the template ---


def model_facts(config) -> dict:
    """Facts of the config; bytes are those of one sequence, tensors in the stored dtype."""
    head_bytes = 2 * config.head_dim * config.dtype.itemsize  # of a key and a value
    kept = sum(map(len, config.full_heads))
    slots = [config.memory_slots(i)[head] for i in range(config.num_hidden_layers) for head in config.linear_heads(i)]
    model = build_on_meta(config)
    new = sum(parameter.numel() for module in new_modules(model).values() for parameter in module.parameters())
    exact = [*(["full_heads"] if kept else []), *(["attention_memory", "memory_score"] if any(slots) else [])]
    names = ["attention_window", "attention_sinks", *exact, "feature_map", *FEATURE_MAPS[config.feature_map].settings]
    return {
        "parameters": (sum(parameter.numel() for parameter in model.parameters()), new),
        "layers": {kind: [i for i, layer in enumerate(config.layer_types) if layer == kind] for kind in LAYER_TYPES},
        "settings": [*names, *SHARED_SETTINGS, *(["decay_spans"] if config.decay != "none" else [])],
        "dtype": dtype_name(config.dtype),
        "state_bytes": memory_use(config, (0,), config.dtype)["bytes_per_sequence"]["0"],
        "token_bytes": head_bytes * config.num_key_value_heads,  # of a softmax layer
        "kept_heads": kept,
        "head_bytes": head_bytes,
        "slots": max(slots, default=0),
    }


def ranges(numbers: list[int]) -> str:
    """Ascending numbers in short: "0-2, 5" for [0, 1, 2, 5]."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def origin_facts(provenance: dict) -> dict:
    """Facts of the checkpoint's record."""
    stages = provenance["stages"]
    texts = [(stage, text) for stage in stages for text in stage.get("data", {}).get("sources", [])]
    by_versions = {}
    for stage in stages:
        versions = ", ".join(f"{name} {version}" for name, version in stage["versions"].items())
        by_versions.setdefault(versions, []).append(stage["stage"])
    return {
        "provenance": provenance,
        # the card names the layers elsewhere
        "overrides": {key: value for key, value in provenance["overrides"].items() if key != "layer_types"},
        "texts": texts,
        "text_names": ", ".join(dict.fromkeys(code(text["source"]) for _, text in texts)),
        "versions": "; ".join(f"{versions} ({', '.join(names)})" for versions, names in by_versions.items()),
        "longest": max((stage["config"].get("block_size", 0) for stage, _ in texts), default=None),
        "farthest": max((stage["config"].get("position_range") or 0 for stage, _ in texts), default=None),
    }


def whole(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def score(task: dict, variant: str) -> float | None:
    """A variant's value; None if it was left out or is not finite."""
    return (task["values"].get(variant) or {}).get("value")


def eval_results(evaluation: dict) -> list[EvalResult]:
    """The student's finite scores, in the form of the hub's metadata."""
    results = []
    for task in evaluation["tasks"]:
        value = score(task, "student")
        if value is not None and math.isfinite(value):
            name, metric = plain(task["name"]), plain(task["metric"])
            results.append(EvalResult("text-generation", name, name, HUB_METRICS.get(metric, metric), value))
    return results


def evaluation_facts(evaluation: dict | None, source: str) -> dict:
    """Facts of an evaluation."""
    if evaluation is None:
        return dict.fromkeys(("evaluation", "results", "left_out", "command", "recall", "parts", "near_alone"))
    tasks = evaluation["tasks"]
    baselines = evaluation.get("beside", {})  # those of a user do not belong on the student's card
    variants = {key: title for key, title in evaluation["subjects"].items() if key not in baselines}
    rows = [
        [
            escaped(task["name"]),
            f"{escaped(task['metric'])} {ARROWS[task['better']]}",
            f"{task['units']:,}",
            number(task["chance"]),
            *(with_interval(task["values"].get(key)) for key in variants),
            *(with_interval(task.get(key), percent) for key in SHARES),
        ]
        for task in tasks
    ]
    own = evaluation | {"subjects": variants}
    rows += [[title, "memory", NOTHING, NOTHING, *cells, NOTHING, NOTHING] for title, cells in memory_rows(own).items()]

    def measured(kind: str, *keys: str) -> list[dict]:
        return [task for task in tasks if task["kind"] == kind and None not in [score(task, key) for key in keys]]

    recalls = measured("recall", "student", "teacher")
    perplexities = measured("perplexity", "student", "teacher", "window_only", "linear_only")
    title = variants.get("window_only", "")
    return {
        "evaluation": evaluation,
        "results": markdown_table(
            ("task", "metric", "units", "chance", *map(escaped, variants.values()), *SHARES.values()), rows
        ),
        "left_out": [
            f"{escaped(task['name'])}, {escaped(title)}: left out, {escaped(task['values'][key]['left_out'])}"
            for task in tasks
            for key, title in variants.items()
            if "left_out" in (task["values"].get(key) or {})
        ],
        "command": evaluation["command"]
        and shareable(evaluation["command"], {source, *(model["name"] for model in baselines.values())}),
        "recall": max(recalls, key=lambda task: score(task, "teacher") - score(task, "student"), default=None),
        "parts": perplexities[0] if perplexities else None,
        "near_alone": "window and sinks" if heading("window_only", title) == heading("window_only") else "no linear branch",
    }


def latency_facts(latency: dict | None) -> dict:
    """Facts of a latency benchmark."""
    if latency is None:
        return dict.fromkeys(("latency", "speeds", "not_timed"))
    rows, left_out = [], []
    contenders = list(dict.fromkeys(name for row in latency["rows"] for name in row.get("tokens_per_s", ())))
    for row in latency["rows"]:
        phase = escaped(row["phase"])
        batch = f"{row['batch']:,}"
        context = f"{row['context']:,}"
        if "left_out" in row:
            left_out.append(f"{phase}, batch {batch}, context {context}: left out, {escaped(row['left_out'])}")
            continue
        speeds, sizes = row["tokens_per_s"], row["cache_bytes"]
        rows.append([phase, batch, context, *(number(speeds.get(name)) for name in contenders)])
        rows[-1] += [mib(sizes[name]) if name in sizes else NOTHING for name in contenders]
    header = ("phase", "batch", "context", *(f"{escaped(name)}, {x}" for x in ("tokens/s", "cache") for name in contenders))
    return {"latency": latency, "speeds": markdown_table(header, rows), "not_timed": left_out}
