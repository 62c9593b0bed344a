"""Perplexity by source and length, and recall, of the models of a recovery run."""

import gc
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dijiang.common.perplexity import perplexity_of
from dijiang.convert import load_source
from dijiang.evaluate.quality.recall import chance, recall_scores
from dijiang.evaluate.quality.recall_samples import associative_samples, needle_samples
from dijiang.train.data.token_cache import TokenFile

BLOCKS = {1024: 16, 4096: 4}  # of each held-out source, by length
SMALL_BLOCKS = {64: 2, 128: 1}
RECALL_LENGTHS, RECALL_SAMPLES = (256, 512, 1024), 16
SMALL_RECALL_LENGTHS, SMALL_RECALL_SAMPLES = (160, 256), 2
BATCH_TOKENS, LOGIT_ROWS = 32_768, 4_096
FILLER_TOKENS = 20_000


class Judge:
    """Measures models into the record's entry `quality`, and ratios to the teacher into `perplexity_ratio`."""

    def __init__(self, inputs, device: torch.device, dtype: torch.dtype, record, small: bool):
        self.device = device
        self.dtype = dtype
        self.record = record
        self.tokenizer = inputs.tokenizer
        paths = [Path(source.path) for source in inputs.held]
        files = {f"source {i}" if small else path.name: TokenFile(path) for i, path in enumerate(paths)}
        self.blocks = {
            length: {name: blocks for name, file in files.items() if (blocks := spread(file, length, count)) is not None}
            for length, count in (SMALL_BLOCKS if small else BLOCKS).items()
        }
        self.filler = np.asarray(next(iter(files.values())).tokens[:FILLER_TOKENS], dtype=np.int64)
        self.lengths = SMALL_RECALL_LENGTHS if small else RECALL_LENGTHS
        self.samples = SMALL_RECALL_SAMPLES if small else RECALL_SAMPLES

    @torch.no_grad()
    def measure(self, name: str, source: str, *, recall: bool = True, weights: Path | None = None) -> None:
        """Measure the model at `source`, unless an earlier call did; `weights` is a checkpoint's file with other weights."""
        quality = self.record.data.setdefault("quality", {})
        if name != "student" and quality.get(name, {}).get("measured"):
            return
        model, _ = load_source(source, dtype=self.dtype)
        if weights is not None:
            own = dict(model.named_parameters())
            for key, value in load_file(weights).items():
                own[key.removeprefix("student.")].copy_(value)
        model = model.to(self.device).eval()
        scores = quality[name] = {"perplexity": {}, "measured": False}
        for length, sources in self.blocks.items():
            losses = {source: self.loss(model, blocks) for source, blocks in sources.items()}
            if losses:
                losses["all"] = sum(losses.values()) / len(losses)
                scores["perplexity"][str(length)] = {key: perplexity_of(loss) for key, loss in losses.items()}
                self.ratios()
        if recall:
            self.recall(model, scores)
        scores["measured"] = True
        self.record.save()
        del model
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def loss(self, model, blocks: torch.Tensor) -> float:
        """Mean nats per predicted token of independent blocks (N, T)."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for rows in blocks.split(max(1, BATCH_TOKENS // blocks.shape[1])):
            rows = rows.to(self.device)
            hidden = model.base_model(input_ids=rows, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            for part, targets in zip(hidden.split(LOGIT_ROWS), rows[:, 1:].flatten().split(LOGIT_ROWS), strict=True):
                logits = model.get_output_embeddings()(part).float()
                total += F.cross_entropy(logits, targets, reduction="sum").double()
        return total.item() / (blocks.shape[0] * (blocks.shape[1] - 1))

    def ratios(self) -> None:
        """Write every model's perplexity over the teacher's into the record."""
        quality = self.record.data["quality"]
        teacher = quality.get("teacher", {}).get("perplexity", {})
        self.record.data["perplexity_ratio"] = {
            name: {
                length: {key: value / teacher[length][key] for key, value in values.items()}
                for length, values in scores["perplexity"].items()
                if length in teacher
            }
            for name, scores in quality.items()
            if name != "teacher"
        }
        self.record.save()

    def recall(self, model, scores: dict) -> None:
        """Measure shares of right answers by task and length, as far as the time allows."""
        recall = scores["recall"] = {}
        for length in self.lengths:
            for task in ("needle", "associative"):
                if self.record.left() < 1.0:
                    scores["recall_cut_short"] = True
                    return
                try:
                    options = {"length": length, "samples": self.samples, "seed": 0}
                    if task == "needle":
                        samples = needle_samples(self.tokenizer, self.filler, **options)
                    else:
                        samples = associative_samples(self.tokenizer, **options)
                except ValueError as error:  # a length or vocabulary that is too small
                    recall.setdefault(task, {})[str(length)] = {"left_out": str(error)}
                    continue
                answers = recall_scores(model, samples)
                share = sum(answers["totals"]) / sum(answers["weights"])
                row = {"share": share, "answers": int(sum(answers["weights"])), "chance": chance(samples)}
                recall.setdefault(task, {})[str(length)] = row
            self.record.save()


def spread(file: TokenFile, length: int, count: int) -> torch.Tensor | None:
    """At most `count` blocks of `length` tokens, (n, length), spread evenly over the text; None if it does not fill one."""
    available = len(file) // length
    if not available:
        return None
    taken = min(count, available)
    starts = [i * available // taken * length for i in range(taken)]
    return torch.from_numpy(np.stack([np.asarray(file.tokens[start : start + length], dtype=np.int64) for start in starts]))
