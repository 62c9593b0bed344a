"""
One-shot pruning of a language model, decoder layer by decoder layer: sensitivities, plan, sweep, checkpoint
(arXiv 2310.09499; SparseGPT, Wanda and magnitude are special cases).
"""

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dijiang.checkpoint.provenance import hash_files, public_name, versions
from dijiang.checkpoint.source import load_tokenizer, open_source
from dijiang.checkpoint.weights import SafetensorsFile, open_weights
from dijiang.common.device import device_named
from dijiang.common.outputs import new_folder, refuse_occupied
from dijiang.common.perplexity import perplexity_of
from dijiang.common.result_cache import ResultCache, cache_folder, hash_of

from ..bitmask import container_facts, write_bitmask
from ..calibration import calibration_blocks, hash_of_blocks, held_out_windows
from ..resume import WorkFolder
from ..sparse_checkpoint import write_sparse_checkpoint, zeros_on_disk
from ..streamed_decoder import StreamedDecoder
from .config import PruneConfig
from .plan import PruningPlan, make_plan
from .plan_figure import draw_plan
from .prune_layer import prune_layer
from .sensitivity.gradients import Gradients, measure_gradients
from .sensitivity.measure import base_facts, measure

LENGTH = 2048  # of calibration sequences, where the model takes so many tokens
PLAN, METRICS, FIGURE, CONTAINER = "pruning_plan.json", "pruning_metrics.json", "pruning_plan.png", "sparse-bitmask"


def prune(
    model: str | Path, output: str | Path, config: PruneConfig, *, cache: str | Path | None = None, progress: bool = True
) -> Path:
    """
    Prune a causal language model once, without training. One decoder layer is in memory at a time. The same call goes on where
    an interrupted one stopped.

    Args:
        model: hub id, folder or GGUF file of a plain decoder of transformers, or a DiJiang checkpoint.
        output: new folder for the model, `pruning_plan.json`, `pruning_metrics.json` and, with matplotlib, `pruning_plan.png`;
            with `config.bitmask` also `sparse-bitmask/`, the compressed container.
        cache: folder where sensitivities are kept for other runs; default `~/.cache/dijiang/sensitivities`.
        progress: show a bar on stderr.

    Returns:
        The output folder.

    Raises:
        ValueError: if model, text, settings or output do not allow it; the output does not exist then.
    """
    return PruningRun(model, output, config, cache=cache, progress=progress).run()


def plan(model: str | Path, config: PruneConfig, *, cache: str | Path | None = None, progress: bool = True) -> PruningPlan:
    """What `prune` would remove from each matrix; writes nothing but the cache of sensitivities. Raises what `prune` does."""
    return PruningRun(model, None, config, cache=cache, progress=progress).plan()


class PruningRun:
    """`prune`, step by step; what can be refused beforehand is refused when it is made."""

    def __init__(self, model: str | Path, output: str | Path | None, config: PruneConfig, *, cache, progress: bool):
        self.config, self.progress = config, progress
        self.output = None if output is None else Path(output).expanduser().absolute()
        if self.output:
            refuse_occupied(self.output)
        self.source = open_source(model)
        self.tokenizer = load_tokenizer(self.source)
        files = open_weights(self.source, progress=progress)
        self.decoder = StreamedDecoder(self.source.config, files, str(model), device_named(config.device))
        modules = {name: self.decoder.model.get_submodule(name) for layer in self.decoder.targets for name in layer}
        self.shapes = {name: (module.out_features, module.in_features) for name, module in modules.items()}
        refuse_ragged(self.shapes, config)
        self.length = self.checked_length()
        self.blocks = self.windows = None
        if config.needs_text:
            sizes = {"samples": config.samples, "length": self.length, "seed": config.seed}
            self.blocks = calibration_blocks(self.tokenizer, config.calibration, **sizes)
        if config.held_out:
            sizes = {"tokens": config.held_out_tokens, "length": self.length}
            self.windows = held_out_windows(self.tokenizer, config.held_out, **sizes)
        with self.bar("Hashing the source", sum(file.path.stat().st_size for file in files)) as advance:
            self.hashes = hash_files([file.path for file in files], advance)
        description = json.dumps([self.hashes, self.source.config.to_diff_dict()], sort_keys=True, default=str)
        self.identity = hash_of(description.encode())
        self.cache = ResultCache(Path(cache) if cache else cache_folder("sensitivities"))

    def checked_length(self) -> int:
        """Tokens of a calibration sequence, or ValueError if the model was made for less."""
        context = getattr(self.source.config.get_text_config(), "max_position_embeddings", None) or LENGTH
        length = min(LENGTH, context) if self.config.length is None else self.config.length
        if length > context:
            raise ValueError(f"length={length} is more than the {context} tokens that the model was made for")
        return length

    @contextmanager
    def bar(self, title: str, total: float) -> Iterator:
        """A bar on stderr; yields a function that is told how much was done since."""
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), disable=not self.progress) as bar:
            task = bar.add_task(title, total=total)
            yield lambda done: bar.advance(task, done)
            bar.update(task, completed=total)  # what the cache knew was not told

    def facts(self) -> dict:
        """All that the result depends on, and where the model comes from; no paths."""
        settings = {key: value for key, value in asdict(self.config).items() if key != "bitmask"}
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

    @cached_property
    def gradients(self) -> Gradients:
        """Of the dense model on the first calibration sequences."""
        blocks, facts = self.blocks[: self.config.sensitivity_samples], base_facts(self.identity)
        with self.bar("Gradients", 1.0) as advance:
            return measure_gradients(self.decoder, blocks, facts, by_row=self.config.by_row, cache=self.cache, advance=advance)

    def plan(self) -> PruningPlan:
        """Measure sensitivities, unless they are cached, and allocate."""
        found, config = None, self.config
        if config.ranked:
            sizes = {name: rows * columns for name, (rows, columns) in self.shapes.items()}
            settings = {"identity": self.identity, "cache": self.cache}
            settings["gradients"] = self.gradients if config.ranked_by_gradients else None
            title = "Costs" if config.allocation == "loss" else f"Sensitivity ({config.sensitivity})"
            with self.bar(title, 1.0) as advance:
                found = measure(self.decoder, self.blocks, sizes, config, **settings, advance=advance)
            for line in found.warnings():
                print(f"dijiang: {line}", file=sys.stderr)
        layers = {name: index for index, names in enumerate(self.decoder.targets) for name in names}
        return make_plan(self.shapes, layers, found, self.config)

    def run(self) -> Path:
        started = time.perf_counter()
        work = WorkFolder(self.output, self.facts())
        plan, rows = self.plan(), self.config.row_weights
        row_weights = {} if rows == "alike" else self.gradients.row_weights(rows, self.config.seed)
        work.begin()
        try:
            layers, perplexity = self.prune_layers(plan, row_weights, work)
        except ValueError:  # the next call would end so too
            work.remove()
            raise
        pruned = {}
        for index in range(len(self.decoder.layers)):
            file = SafetensorsFile(work.path(index))
            pruned |= dict.fromkeys(file.headers, file)
        with new_folder(self.output) as folder:
            total = sum(header.nbytes for file in self.decoder.files for header in file.headers.values())
            with self.bar("Writing", total) as advance:
                write_sparse_checkpoint(
                    folder, self.source, self.tokenizer, self.decoder, pruned, {"config": self.facts()["settings"]},
                    advance=advance,
                )  # fmt: skip
            matrices = {name: facts for layer in layers for name, facts in layer["matrices"].items()}
            self.verify(folder, matrices)
            result = self.metrics(matrices, perplexity) | {
                "seconds": {"layers": sum(layer["seconds"] for layer in layers), "this_call": time.perf_counter() - started}
            }
            write_json(folder / PLAN, self.facts() | plan.as_json() | {"realised": realised(plan, matrices)})
            write_json(folder / METRICS, result)
            if find_spec("matplotlib"):
                draw_plan(plan, folder / FIGURE)
            if self.config.bitmask:
                names = [self.decoder.dense_places[f"{name}.weight"][1] for name in matrices]
                write_bitmask(folder, folder / CONTAINER, names, self.config.pattern or "unstructured", self.progress)
                write_json(folder / METRICS, result | {"container": container_facts(folder / CONTAINER)})
        work.remove()
        return self.output

    @torch.no_grad()
    def prune_layers(
        self, plan: PruningPlan, row_weights: dict[str, torch.Tensor], work: WorkFolder
    ) -> tuple[list[dict], dict | None]:
        """Facts of every layer, pruned now or before, and perplexity of the held-out text before and after."""
        decoder, targets, found = self.decoder, plan.targets(), []
        hidden = [] if not self.config.calibrated else [decoder.embed(row).cpu() for row in self.blocks[:, None]]
        before = [] if self.windows is None else [decoder.embed(window[None]).cpu() for window in self.windows]
        after = list(before)

        def pass_on(batches: list[torch.Tensor], layer: torch.nn.Module, index: int) -> None:
            for place, batch in enumerate(batches):
                batches[place] = decoder.run(layer, index, batch.to(decoder.device)).cpu()

        with self.bar("Pruning", len(decoder.layers)) as advance:
            for index, names in enumerate(decoder.targets):
                started = time.perf_counter()
                if (facts := work.read(index)) is None:
                    dtypes = {name: decoder.stored_dtype(f"{name}.weight") for name in names}
                    with decoder.layer(index) as layer:
                        pass_on(before, layer, index)
                        results = prune_layer(decoder, index, layer, hidden, targets, dtypes, row_weights, self.config)
                        pass_on(hidden, layer, index)
                        pass_on(after, layer, index)
                    facts = {"matrices": {name: result.facts for name, result in results.items()}}
                    facts["seconds"] = time.perf_counter() - started
                    work.keep(index, {f"{name}.weight": result.weight for name, result in results.items()}, facts)
                else:
                    with decoder.layer(index) as layer:
                        pass_on(before, layer, index)
                    decoder.replace(work.path(index))
                    with decoder.layer(index) as layer:
                        pass_on(hidden, layer, index)
                        pass_on(after, layer, index)
                found.append(facts)
                advance(1)
        perplexity = None
        if self.windows is not None:
            perplexity = {"dense": self.perplexity(before), "pruned": self.perplexity(after)}
            perplexity |= {"tokens": sum(map(len, self.windows)), "window": self.length}
        return found, perplexity

    def perplexity(self, hidden: list[torch.Tensor]) -> float:
        """Of the held-out windows, from what the last layer gave for each."""
        pairs = zip(hidden, self.windows, strict=True)
        nats = sum(self.decoder.losses(batch.to(self.decoder.device), window[None]).item() for batch, window in pairs)
        return perplexity_of(nats / sum(len(window) - 1 for window in self.windows))

    def verify(self, folder: Path, matrices: dict[str, dict]) -> None:
        """Raise RuntimeError unless the zeros are in the files."""
        stored = {self.decoder.dense_places[f"{name}.weight"][1]: name for name in matrices}
        for place, zeros in zeros_on_disk(folder, set(stored)).items():
            name = stored.pop(place)
            if zeros != matrices[name]["zeros"]:
                raise RuntimeError(f"{name} has {zeros} zeros on disk, {matrices[name]['zeros']} were made")
        assert not stored, stored

    def metrics(self, matrices: dict[str, dict], perplexity: dict | None) -> dict:
        """The numbers of the whole run."""
        weights = sum(x["rows"] * x["columns"] for x in matrices.values())
        sparsity = sum(x["pruned"] for x in matrices.values()) / weights
        bits = self.config.bits or 16
        return {
            "kind": "pruning",
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "perplexity": perplexity,
            "weights": weights,
            "sparsity": sparsity,
            "zeros": sum(x["zeros"] for x in matrices.values()) / weights,
            "of_all_parameters": sum(x["zeros"] for x in matrices.values()) / self.decoder.n_parameters,
            # against 16 bits; first as papers count it, then with the bit that says where values are
            "compression": {
                "without_mask": 16 / (bits * (1 - sparsity)),
                "with_mask": 16 / (bits * (1 - sparsity) + 1),
            },
            "matrices": matrices,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # of this process so far
        }


def refuse_ragged(shapes: dict[str, tuple[int, int]], config: PruneConfig) -> None:
    """Raise ValueError if a matrix's columns are no multiple of the pattern's group."""
    group = config.zeros_of[1] if config.zeros_of else 1
    for name, (_, columns) in shapes.items():
        if columns % group:
            raise ValueError(f"pattern {config.pattern} does not fit {name}: its {columns} columns are no multiple of {group}")


def realised(plan: PruningPlan, matrices: dict[str, dict]) -> dict:
    """What share of each matrix, and of all, was removed."""
    shares = {x.name: matrices[x.name]["pruned"] / x.weights for x in plan.matrices}
    whole = sum(facts["pruned"] for facts in matrices.values()) / sum(x.weights for x in plan.matrices)
    return {"sparsity": whole, "matrices": shares}


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
