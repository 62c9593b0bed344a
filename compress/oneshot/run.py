"""
One-shot pruning of a language model, decoder layer by decoder layer: sensitivities, plan, OBS update, checkpoint
(arXiv 2310.09499; SparseGPT, Wanda and magnitude are special cases).
"""

import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import torch

from dijiang.checkpoint.provenance import hash_files, public_name, versions
from dijiang.checkpoint.source import load_tokenizer, open_source
from dijiang.checkpoint.weights import SafetensorsFile, open_weights
from dijiang.common.device import device_named
from dijiang.common.errors import print_line
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
    inputs = RunInputs(model, config, cache=cache, progress=progress)
    started = time.perf_counter()
    facts = inputs.facts()
    work = WorkFolder(output, facts, renamed=PruneConfig.RENAMED)
    gradients = gradients_of(inputs) if config.ranked_by_gradients or config.by_row else None
    pruning_plan = plan_of(inputs, gradients)
    row_weights = gradients.row_weights(config.row_weights, config.seed) if gradients else {}
    work.begin()
    try:
        layers, perplexity = prune_layers(inputs, pruning_plan, row_weights, work)
    except ValueError:  # the next call would end with the same error
        work.remove()
        raise
    with new_folder(output) as folder:
        matrices = {name: numbers for layer in layers for name, numbers in layer["matrices"].items()}
        write_model(folder, inputs, work, matrices)
        seconds = {"layers": sum(layer["seconds"] for layer in layers), "this_call": time.perf_counter() - started}
        metrics = metrics_of(inputs, matrices, perplexity) | {"seconds": seconds}
        write_json(folder / PLAN, facts | pruning_plan.as_json() | {"realised": realized(pruning_plan, matrices)})
        write_json(folder / METRICS, metrics)
        if find_spec("matplotlib"):
            draw_plan(pruning_plan, folder / FIGURE)
        if config.bitmask:
            names = [inputs.decoder.dense_places[f"{name}.weight"][1] for name in matrices]
            write_bitmask(folder, folder / CONTAINER, names, config.pattern or "unstructured", progress)
            write_json(folder / METRICS, metrics | {"container": container_facts(folder / CONTAINER)})
    work.remove()
    return output


def plan(model: str | Path, config: PruneConfig, *, cache: str | Path | None = None, progress: bool = True) -> PruningPlan:
    """Plan what `prune` would remove; writes nothing but the cache of sensitivities. Takes and raises what `prune` does."""
    inputs = RunInputs(model, config, cache=cache, progress=progress)
    return plan_of(inputs, gradients_of(inputs) if config.ranked_by_gradients else None)


class RunInputs:
    """
    Model, texts and settings of a run; what can be refused before any work is refused by the constructor.

    Attributes:
        decoder: the dense model.
        shapes: (R, C) of each matrix that is pruned, by name.
        blocks: calibration sequences (N, T); None if no text is needed.
        windows: windows of the held-out text; None if nothing is measured.
        hashes: SHA-256 of each weight file, by its name.
        identity: hash of the model.
    """

    def __init__(self, model: str | Path, config: PruneConfig, *, cache: str | Path | None, progress: bool):
        self.config = config
        self.progress = progress
        self.source = open_source(model)
        self.tokenizer = load_tokenizer(self.source)
        files = open_weights(self.source, progress=progress)
        self.decoder = StreamedDecoder(self.source.config, files, str(model), device_named(config.device))
        modules = {name: self.decoder.model.get_submodule(name) for layer in self.decoder.targets for name in layer}
        self.shapes = {name: (module.out_features, module.in_features) for name, module in modules.items()}
        refuse_ragged(self.shapes, config)
        context = getattr(self.source.config.get_text_config(), "max_position_embeddings", None) or LENGTH
        self.length = min(LENGTH, context) if config.length is None else config.length
        if self.length > context:
            raise ValueError(f"length={self.length} is more than the {context} tokens that the model was made for")
        self.blocks = self.windows = None
        if config.needs_text:
            sizes = {"samples": config.samples, "length": self.length, "seed": config.seed}
            self.blocks = calibration_blocks(self.tokenizer, config.calibration, **sizes)
        if config.held_out:
            sizes = {"tokens": config.held_out_tokens, "length": self.length}
            self.windows = held_out_windows(self.tokenizer, config.held_out, **sizes)
        size = sum(file.path.stat().st_size for file in files)
        with progress_bar("Hashing the source", size, shown=progress, unit="bytes") as advance:
            self.hashes = hash_files([file.path for file in files], advance)
        description = json.dumps([self.hashes, self.source.config.to_diff_dict()], sort_keys=True, default=str)
        self.identity = hash_of(description.encode())
        self.cache = ResultCache(Path(cache) if cache else cache_folder("sensitivities"))

    def facts(self) -> dict:
        """All that the result depends on, and where the model comes from, without paths."""
        settings = {name: value for name, value in asdict(self.config).items() if name != "bitmask"}
        settings |= {"calibration": [path.name for path in self.config.calibration], "length": self.length}
        settings["held_out"] = self.config.held_out and self.config.held_out.name
        return {
            "settings": settings,
            "source": public_name(self.source.name),
            "source_files": self.hashes,
            "calibration_hash": None if self.blocks is None else hash_of_blocks(self.blocks),
            "held_out_hash": None if self.windows is None else hash_of_blocks(self.windows),
            "versions": versions(),
        }


def refuse_ragged(shapes: dict[str, tuple[int, int]], config: PruneConfig) -> None:
    """Raise ValueError if a matrix's columns are no multiple of the pattern's group."""
    group = config.zeros_of[1] if config.zeros_of else 1
    for name, (_, columns) in shapes.items():
        if columns % group:
            raise ValueError(f"pattern {config.pattern} does not fit {name}: its {columns} columns are no multiple of {group}")


# --- sensitivities and layers ---


def gradients_of(inputs: RunInputs) -> Gradients:
    """Gradients of the dense model's loss on the first calibration sequences."""
    blocks = inputs.blocks[: inputs.config.sensitivity_samples]
    settings = {"by_row": inputs.config.by_row, "cache": inputs.cache}
    with progress_bar("Gradients", 1.0, shown=inputs.progress) as advance:
        return measure_gradients(inputs.decoder, blocks, base_facts(inputs.identity), **settings, advance=advance)


def plan_of(inputs: RunInputs, gradients: Gradients | None) -> PruningPlan:
    """Measure sensitivities, unless they are cached, and allocate; `gradients` if `config.ranked_by_gradients`."""
    config = inputs.config
    sensitivities = None
    if config.ranked:
        sizes = {name: rows * columns for name, (rows, columns) in inputs.shapes.items()}
        settings = {"gradients": gradients, "identity": inputs.identity, "cache": inputs.cache}
        title = "Costs" if config.allocation == "loss" else f"Sensitivity ({config.sensitivity})"
        with progress_bar(title, 1.0, shown=inputs.progress) as advance:
            sensitivities = measure(inputs.decoder, inputs.blocks, sizes, config, **settings, advance=advance)
        for line in sensitivities.warnings():
            print_line(line)
    layers = {name: index for index, names in enumerate(inputs.decoder.targets) for name in names}
    return make_plan(inputs.shapes, layers, sensitivities, config)


@torch.no_grad()
def prune_layers(
    inputs: RunInputs, pruning_plan: PruningPlan, row_weights: dict[str, torch.Tensor], work: WorkFolder
) -> tuple[list[dict], dict | None]:
    """Facts of every layer, pruned now or by an earlier call, and perplexity of the held-out text before and after."""
    decoder, targets = inputs.decoder, pruning_plan.targets()
    hidden = [decoder.embed(row).cpu() for row in inputs.blocks[:, None]] if inputs.config.calibrated else []
    dense = [decoder.embed(window[None]).cpu() for window in inputs.windows or []]
    pruned = list(dense)

    def pass_on(batches: list[torch.Tensor], layer: torch.nn.Module, index: int) -> None:
        batches[:] = [decoder.run(layer, index, batch.to(decoder.device)).cpu() for batch in batches]

    layers = []
    with progress_bar("Pruning", len(decoder.layers), shown=inputs.progress, unit="items") as advance:
        for index in range(len(decoder.layers)):
            started = time.perf_counter()
            facts = work.read(index)
            with decoder.layer(index) as layer:
                pass_on(dense, layer, index)
                if facts is None:
                    results = prune_layer(decoder, index, layer, hidden, targets, row_weights, inputs.config)
                    pass_on(hidden, layer, index)
                    pass_on(pruned, layer, index)
            if facts is None:
                facts = {"matrices": {name: numbers for name, (_, numbers) in results.items()}}
                facts["seconds"] = time.perf_counter() - started
                work.keep(index, {f"{name}.weight": weight for name, (weight, _) in results.items()}, facts)
            else:
                decoder.replace(work.path(index))
                with decoder.layer(index) as layer:
                    pass_on(hidden, layer, index)
                    pass_on(pruned, layer, index)
            layers.append(facts)
            advance(1)
    if inputs.windows is None:
        return layers, None
    perplexity = {"dense": perplexity_after(inputs, dense), "pruned": perplexity_after(inputs, pruned)}
    return layers, perplexity | {"tokens": sum(map(len, inputs.windows)), "window": inputs.length}


def perplexity_after(inputs: RunInputs, hidden: list[torch.Tensor]) -> float:
    """Perplexity of the held-out windows, from the last layer's output for each."""
    decoder = inputs.decoder
    pairs = zip(hidden, inputs.windows, strict=True)
    nats = sum(decoder.losses(batch.to(decoder.device), window[None]).item() for batch, window in pairs)
    return perplexity_of(nats / sum(len(window) - 1 for window in inputs.windows))


# --- results ---


def write_model(folder: Path, inputs: RunInputs, work: WorkFolder, matrices: dict[str, dict]) -> None:
    """Write the checkpoint with the finished layers' weights; raise RuntimeError unless their zeros are in its files."""
    decoder = inputs.decoder
    pruned = {}
    for index in range(len(decoder.layers)):
        file = SafetensorsFile(work.path(index))
        pruned |= dict.fromkeys(file.headers, file)
    total = sum(header.nbytes for file in decoder.files for header in file.headers.values())
    record = {"config": inputs.facts()["settings"]}
    with progress_bar("Writing", total, shown=inputs.progress, unit="bytes") as advance:
        write_sparse_checkpoint(folder, inputs.source, inputs.tokenizer, decoder, pruned, record, advance=advance)
    stored = {decoder.dense_places[f"{name}.weight"][1]: numbers for name, numbers in matrices.items()}
    zeros = zeros_on_disk(folder, set(stored))
    for name, numbers in stored.items():
        if zeros[name] != numbers["zeros"]:
            raise RuntimeError(f"{name} has {zeros[name]} zeros on disk, {numbers['zeros']} were expected")


def metrics_of(inputs: RunInputs, matrices: dict[str, dict], perplexity: dict | None) -> dict:
    """Numbers of the whole run."""
    weights = sum(x["rows"] * x["columns"] for x in matrices.values())
    sparsity = sum(x["pruned"] for x in matrices.values()) / weights
    zeros = sum(x["zeros"] for x in matrices.values())
    bits = inputs.config.bits or 16
    return {
        "kind": "pruning",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "perplexity": perplexity,
        "weights": weights,
        "sparsity": sparsity,
        "zeros": zeros / weights,
        "of_all_parameters": zeros / inputs.decoder.n_parameters,
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
    whole = sum(x["pruned"] for x in matrices.values()) / sum(x.weights for x in pruning_plan.matrices)
    return {"sparsity": whole, "matrices": shares}


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
