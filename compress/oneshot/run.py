"""
One-shot pruning of a language model, decoder layer by decoder layer: sensitivities, plan, OBS update, checkpoint
(arXiv 2310.09499; SparseGPT, Wanda and magnitude are special cases).
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dijiang.checkpoint.provenance import hash_files, public_name, versions
from dijiang.checkpoint.source import Source, load_tokenizer, open_source
from dijiang.checkpoint.weights import SafetensorsFile, open_weights
from dijiang.common.device import device_named
from dijiang.common.memory import peak_bytes
from dijiang.common.outputs import new_folder, refuse_occupied
from dijiang.common.perplexity import perplexity_of
from dijiang.common.progress import progress_bar
from dijiang.common.result_cache import ResultCache, cache_folder, hash_of

from ..bitmask import container_facts, write_bitmask
from ..calibration import calibration_blocks, hash_of_blocks, held_out_windows
from ..resume import WorkFolder
from ..sparse_checkpoint import write_sparse_checkpoint, zeros_on_disk
from ..streamed_decoder import StreamedDecoder
from .config import PruneConfig
from .plan import PruningPlan, draw_plan, make_plan
from .prune_layer import prune_layer
from .sensitivity.gradients import Gradients, measure_gradients
from .sensitivity.measure import base_facts, measure

LENGTH = 2048  # tokens of calibration sequences, if the model takes as many
PLAN = "pruning_plan.json"
METRICS = "pruning_metrics.json"
FIGURE = "pruning_plan.png"
CONTAINER = "sparse-bitmask"


def prune(
    model: str | Path, output: str | Path, config: PruneConfig, *, cache: str | Path | None = None, progress: bool = True
) -> Path:
    """
    Prune a causal language model once, without training. One decoder layer is in memory at a time. The same call continues an
    interrupted one.

    Args:
        model: hub id, folder or GGUF file of a plain decoder of transformers, or a DiJiang checkpoint.
        output: new folder for the model, `pruning_plan.json`, `pruning_metrics.json` and, with matplotlib, `pruning_plan.png`;
            with `config.bitmask` also `sparse-bitmask/`, the compressed container.
        config: settings.
        cache: folder where sensitivities are kept for other runs; default `~/.cache/dijiang/sensitivities`.
        progress: show a bar on stderr.

    Returns:
        The output folder.

    Raises:
        ValueError: if model, text, settings or output do not allow it; the output does not exist then.
    """
    output = Path(output).expanduser().absolute()
    refuse_occupied(output)
    job = prepare(model, config, cache=cache, progress=progress)
    started = time.perf_counter()
    work = WorkFolder(output, facts_of(job), renamed=PruneConfig.RENAMED)
    gradients = gradients_of(job) if config.ranked_by_gradients or config.by_row else None
    pruning_plan = plan_of(job, gradients)
    row_weights = gradients.row_weights(config.row_weights, config.seed) if gradients else {}
    work.begin()
    try:
        layers, perplexity = prune_layers(job, pruning_plan, row_weights, work)
    except ValueError:  # the next call would end with the same error
        work.remove()
        raise
    with new_folder(output) as folder:
        matrices = {name: facts for layer in layers for name, facts in layer["matrices"].items()}
        write_model(folder, job, work, matrices)
        seconds = {"layers": sum(layer["seconds"] for layer in layers), "this_call": time.perf_counter() - started}
        metrics = metrics_of(job, matrices, perplexity) | {"seconds": seconds}
        write_json(folder / PLAN, facts_of(job) | pruning_plan.as_json() | {"realised": realized(pruning_plan, matrices)})
        write_json(folder / METRICS, metrics)
        if find_spec("matplotlib"):
            draw_plan(pruning_plan, folder / FIGURE)
        if config.bitmask:
            names = [job.decoder.dense_places[f"{name}.weight"][1] for name in matrices]
            write_bitmask(folder, folder / CONTAINER, names, config.pattern or "unstructured", progress)
            write_json(folder / METRICS, metrics | {"container": container_facts(folder / CONTAINER)})
    work.remove()
    return output


def plan(model: str | Path, config: PruneConfig, *, cache: str | Path | None = None, progress: bool = True) -> PruningPlan:
    """Plan what `prune` would remove; writes nothing but the cache of sensitivities. Takes and raises what `prune` does."""
    job = prepare(model, config, cache=cache, progress=progress)
    return plan_of(job, gradients_of(job) if config.ranked_by_gradients else None)


# --- before any work ---


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """
    What a run works with.

    Attributes:
        config: settings.
        source: the model's folder or file.
        tokenizer: of the model.
        decoder: the dense model.
        shapes: (R, C) of each matrix that is pruned, by name.
        length: tokens of a calibration sequence.
        blocks: calibration sequences (N, T); None if no text is needed.
        windows: windows of the held-out text; None if nothing is measured.
        hashes: SHA-256 of each weight file, by its name.
        cache: where sensitivities are kept.
        progress: show bars on stderr.
    """

    config: PruneConfig
    source: Source
    tokenizer: Any
    decoder: StreamedDecoder
    shapes: dict[str, tuple[int, int]]
    length: int
    blocks: torch.Tensor | None
    windows: list[torch.Tensor] | None
    hashes: dict[str, str]
    cache: ResultCache
    progress: bool

    @property
    def identity(self) -> str:
        """Hash of the model."""
        description = json.dumps([self.hashes, self.source.config.to_diff_dict()], sort_keys=True, default=str)
        return hash_of(description.encode())


def prepare(model: str | Path, config: PruneConfig, *, cache: str | Path | None, progress: bool) -> Job:
    """Read all but the layers' weights, and refuse what can be refused before any work."""
    source = open_source(model)
    tokenizer = load_tokenizer(source)
    files = open_weights(source, progress=progress)
    decoder = StreamedDecoder(source.config, files, str(model), device_named(config.device))
    modules = {name: decoder.model.get_submodule(name) for layer in decoder.targets for name in layer}
    shapes = {name: (module.out_features, module.in_features) for name, module in modules.items()}
    refuse_ragged(shapes, config)
    context = getattr(source.config.get_text_config(), "max_position_embeddings", None) or LENGTH
    length = min(LENGTH, context) if config.length is None else config.length
    if length > context:
        raise ValueError(f"length={length} is more than the {context} tokens that the model was made for")
    blocks = windows = None
    if config.needs_text:
        sizes = {"samples": config.samples, "length": length, "seed": config.seed}
        blocks = calibration_blocks(tokenizer, config.calibration, **sizes)
    if config.held_out:
        windows = held_out_windows(tokenizer, config.held_out, tokens=config.held_out_tokens, length=length)
    size = sum(file.path.stat().st_size for file in files)
    with progress_bar("Hashing the source", size, shown=progress, unit="bytes") as advance:
        hashes = hash_files([file.path for file in files], advance)
    return Job(
        config=config,
        source=source,
        tokenizer=tokenizer,
        decoder=decoder,
        shapes=shapes,
        length=length,
        blocks=blocks,
        windows=windows,
        hashes=hashes,
        cache=ResultCache(Path(cache) if cache else cache_folder("sensitivities")),
        progress=progress,
    )


def refuse_ragged(shapes: dict[str, tuple[int, int]], config: PruneConfig) -> None:
    """Raise ValueError if a matrix's columns are no multiple of the pattern's group."""
    group = config.zeros_of[1] if config.zeros_of else 1
    for name, (_, columns) in shapes.items():
        if columns % group:
            raise ValueError(f"pattern {config.pattern} does not fit {name}: its {columns} columns are no multiple of {group}")


def facts_of(job: Job) -> dict:
    """All that the result depends on, and where the model comes from, without paths; for records, and to resume."""
    config = job.config
    settings = {name: value for name, value in asdict(config).items() if name != "bitmask"}
    settings |= {"calibration": [path.name for path in config.calibration], "length": job.length}
    settings["held_out"] = config.held_out and config.held_out.name
    return {
        "settings": settings,
        "source": public_name(job.source.name),
        "source_files": job.hashes,
        "calibration_hash": None if job.blocks is None else hash_of_blocks(job.blocks),
        "held_out_hash": None if job.windows is None else hash_of_blocks(job.windows),
        "versions": versions(),
    }


# --- sensitivities and layers ---


def gradients_of(job: Job) -> Gradients:
    """Gradients of the dense model's loss on the first calibration sequences."""
    blocks = job.blocks[: job.config.sensitivity_samples]
    settings = {"by_row": job.config.by_row, "cache": job.cache}
    with progress_bar("Gradients", 1.0, shown=job.progress) as advance:
        return measure_gradients(job.decoder, blocks, base_facts(job.identity), **settings, advance=advance)


def plan_of(job: Job, gradients: Gradients | None) -> PruningPlan:
    """Measure sensitivities, unless they are cached, and allocate; `gradients` if `config.ranked_by_gradients`."""
    config = job.config
    sensitivities = None
    if config.ranked:
        sizes = {name: rows * columns for name, (rows, columns) in job.shapes.items()}
        settings = {"gradients": gradients, "identity": job.identity, "cache": job.cache}
        title = "Costs" if config.allocation == "loss" else f"Sensitivity ({config.sensitivity})"
        with progress_bar(title, 1.0, shown=job.progress) as advance:
            sensitivities = measure(job.decoder, job.blocks, sizes, config, **settings, advance=advance)
        for line in sensitivities.warnings():
            print(f"dijiang: {line}", file=sys.stderr)
    layers = {name: index for index, names in enumerate(job.decoder.targets) for name in names}
    return make_plan(job.shapes, layers, sensitivities, config)


@torch.no_grad()
def prune_layers(
    job: Job, pruning_plan: PruningPlan, row_weights: dict[str, torch.Tensor], work: WorkFolder
) -> tuple[list[dict], dict | None]:
    """Facts of every layer, pruned now or by an earlier call, and perplexity of the held-out text before and after."""
    decoder, targets = job.decoder, pruning_plan.targets()
    hidden = [decoder.embed(row).cpu() for row in job.blocks[:, None]] if job.config.calibrated else []
    dense = [decoder.embed(window[None]).cpu() for window in job.windows or []]
    pruned = list(dense)

    def pass_on(batches: list[torch.Tensor], layer: torch.nn.Module, index: int) -> None:
        for i, batch in enumerate(batches):
            batches[i] = decoder.run(layer, index, batch.to(decoder.device)).cpu()

    layers = []
    with progress_bar("Pruning", len(decoder.layers), shown=job.progress, unit="items") as advance:
        for index in range(len(decoder.layers)):
            started = time.perf_counter()
            facts = work.read(index)
            with decoder.layer(index) as layer:
                pass_on(dense, layer, index)
                if facts is None:
                    results = prune_layer(decoder, index, layer, hidden, targets, row_weights, job.config)
                    pass_on(hidden, layer, index)
                    pass_on(pruned, layer, index)
            if facts is None:
                facts = {"matrices": {name: result.facts for name, result in results.items()}}
                facts["seconds"] = time.perf_counter() - started
                work.keep(index, {f"{name}.weight": result.weight for name, result in results.items()}, facts)
            else:
                decoder.replace(work.path(index))
                with decoder.layer(index) as layer:
                    pass_on(hidden, layer, index)
                    pass_on(pruned, layer, index)
            layers.append(facts)
            advance(1)
    if job.windows is None:
        return layers, None
    perplexity = {"dense": perplexity_after(job, dense), "pruned": perplexity_after(job, pruned)}
    return layers, perplexity | {"tokens": sum(map(len, job.windows)), "window": job.length}


def perplexity_after(job: Job, hidden: list[torch.Tensor]) -> float:
    """Perplexity of the held-out windows, from the last layer's output for each."""
    decoder = job.decoder
    pairs = zip(hidden, job.windows, strict=True)
    nats = sum(decoder.losses(batch.to(decoder.device), window[None]).item() for batch, window in pairs)
    return perplexity_of(nats / sum(len(window) - 1 for window in job.windows))


# --- results ---


def write_model(folder: Path, job: Job, work: WorkFolder, matrices: dict[str, dict]) -> None:
    """Write the checkpoint with the finished layers' weights; raise RuntimeError unless their zeros are in its files."""
    pruned = {}
    for index in range(len(job.decoder.layers)):
        file = SafetensorsFile(work.path(index))
        pruned |= dict.fromkeys(file.headers, file)
    total = sum(header.nbytes for file in job.decoder.files for header in file.headers.values())
    record = {"config": facts_of(job)["settings"]}
    with progress_bar("Writing", total, shown=job.progress, unit="bytes") as advance:
        write_sparse_checkpoint(folder, job.source, job.tokenizer, job.decoder, pruned, record, advance=advance)
    stored = {job.decoder.dense_places[f"{name}.weight"][1]: name for name in matrices}
    zeros = zeros_on_disk(folder, set(stored))
    for stored_name, name in stored.items():
        if zeros[stored_name] != matrices[name]["zeros"]:
            raise RuntimeError(f"{name} has {zeros[stored_name]} zeros on disk, {matrices[name]['zeros']} were expected")


def metrics_of(job: Job, matrices: dict[str, dict], perplexity: dict | None) -> dict:
    """Numbers of the whole run."""
    weights = sum(x["rows"] * x["columns"] for x in matrices.values())
    sparsity = sum(x["pruned"] for x in matrices.values()) / weights
    zeros = sum(x["zeros"] for x in matrices.values())
    bits = job.config.bits or 16
    return {
        "kind": "pruning",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "perplexity": perplexity,
        "weights": weights,
        "sparsity": sparsity,
        "zeros": zeros / weights,
        "of_all_parameters": zeros / job.decoder.n_parameters,
        # against 16 bits: as papers count it, and with one more bit per weight that says where values are
        "compression": {
            "without_mask": 16 / (bits * (1 - sparsity)),
            "with_mask": 16 / (bits * (1 - sparsity) + 1),
        },
        "matrices": matrices,
        "peak_memory_bytes": peak_bytes(),  # of this process so far
    }


def realized(pruning_plan: PruningPlan, matrices: dict[str, dict]) -> dict:
    """Share of each matrix, and of all weights, that was removed."""
    shares = {x.name: matrices[x.name]["pruned"] / x.weights for x in pruning_plan.matrices}
    whole = sum(facts["pruned"] for facts in matrices.values()) / sum(x.weights for x in pruning_plan.matrices)
    return {"sparsity": whole, "matrices": shares}


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
