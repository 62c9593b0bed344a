"""The teacher's most likely tokens at each token of a stage's text, computed once and stored on disk."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from dijiang.common.outputs import write_text_whole, write_whole
from dijiang.common.progress import TokenProgress
from dijiang.modeling import DiJiangForCausalLM

from ..data.blocks import collate
from ..trainer.distributed import rank, world_size
from .base import next_token_labels

SHARD_BYTES = 1 << 26  # of a file, or one sample if that is more
META = "meta.json"
LOWEST = -60_000.0  # a log-probability near the lowest that float16 holds
KEYS = {"samples": "places", "samples_per_shard": "places_per_shard"}  # names of fields in meta.json


@dataclass(frozen=True, kw_only=True)
class Layout:
    """
    The content of a folder of teacher logits: a record of (block_size, top_k) token ids and float16 log-probabilities for
    each sample, in files of `samples_per_shard` records.

    Attributes:
        fingerprint: of everything that the records depend on: the teacher and the text.
        samples: number of samples.
        block_size: tokens of a sample.
        vocab_size: the teacher's.
        top_k: number of tokens that are stored for each token of a sample.
        temperature: the log-probabilities are those of logits / temperature.
        samples_per_shard: records of a file.
    """

    fingerprint: str
    samples: int
    block_size: int
    vocab_size: int
    top_k: int
    temperature: float
    samples_per_shard: int

    def to_json(self) -> dict:
        """The content of meta.json."""
        return {KEYS.get(name, name): value for name, value in asdict(self).items()}

    @property
    def record(self) -> np.dtype:
        """The bytes of one sample."""
        ids, shape = "<u2" if self.vocab_size <= 1 << 16 else "<u4", (self.block_size, self.top_k)
        return np.dtype([("ids", ids, shape), ("logprobs", "<f2", shape)])

    @property
    def shards(self) -> int:
        """Number of files."""
        return -(-self.samples // self.samples_per_shard)

    def samples_of(self, shard: int) -> range:
        """Indices of the samples in a file."""
        first = shard * self.samples_per_shard
        return range(first, min(first + self.samples_per_shard, self.samples))

    def missing(self, folder: Path) -> list[int]:
        """Shards that are still to be written. One that exists in full size is complete."""
        sizes = {path.name: path.stat().st_size for path in folder.glob("*.bin")}
        full = lambda shard: len(self.samples_of(shard)) * self.record.itemsize  # noqa: E731
        return [shard for shard in range(self.shards) if sizes.get(shard_name(shard)) != full(shard)]


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"logits-{shard:06d}.bin"


def bytes_needed(samples: int, block_size: int, k: int, vocab: int) -> int:
    """Bytes on disk of the `k` most likely of `vocab` tokens at each token of `samples` blocks."""
    return samples * block_size * min(k, vocab) * (4 if vocab <= 1 << 16 else 6)


def layout_of(blocks: Sequence, *, top_k: int, vocab_size: int, temperature: float, fingerprint: str) -> Layout:
    """The layout for `blocks`, a dataset as `TrainingBlocks`; the rest as in `Layout`."""
    block_size = blocks[0]["input_ids"].numel()
    return Layout(
        fingerprint=fingerprint,
        samples=len(blocks),
        block_size=block_size,
        vocab_size=vocab_size,
        top_k=min(top_k, vocab_size),
        temperature=temperature,
        samples_per_shard=max(1, SHARD_BYTES // bytes_needed(1, block_size, top_k, vocab_size)),
    )


def is_complete(folder: Path, layout: Layout) -> bool:
    """
    Return whether `folder` holds all records of `layout`.

    Raises:
        ValueError: if it holds others.
    """
    return read_layout(folder, layout) and not layout.missing(folder)


def read_layout(folder: Path, layout: Layout) -> bool:
    """Return whether `folder` has been begun; ValueError if its layout is not `layout`."""
    path = folder / META
    if not path.exists():
        return False
    expected = layout.to_json()
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key, value in expected.items() if stored[key] != value]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged; delete the folder, and the teacher is run again") from None
    if differing:
        values = ", ".join(f"{key} {stored[key]} where {expected[key]} is expected" for key in differing)
        raise ValueError(f"{folder} holds other teacher logits ({values}); delete it, and the teacher is run again")
    return True


@torch.no_grad()
def write_teacher_logits(
    teacher: DiJiangForCausalLM,
    blocks: Dataset,
    folder: Path,
    layout: Layout,
    *,
    batch_size: int = 1,
    chunk_tokens: int = 256,
    progress: bool = True,
) -> None:
    """
    Write this process's share of the records that `folder` lacks. It may be stopped at any moment and started again: a shard
    appears only when it is complete.

    Args:
        teacher: on its device, in the dtype in which it is to run.
        blocks: as `TrainingBlocks`.
        folder: all processes see the same.
        layout: of the folder.
        batch_size: blocks per forward pass.
        chunk_tokens: tokens whose logits are in memory at a time.
        progress: show progress on stderr.

    Raises:
        ValueError: if the folder holds other records, or the disk is too small.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begun = read_layout(folder, layout)
    missing = layout.missing(folder)
    needed = sum(len(layout.samples_of(shard)) for shard in missing) * layout.record.itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{folder}: the teacher's logits need {needed:,} bytes and {free:,} are free; lower teacher_top_k={layout.top_k}, "
            "or leave it out to run the teacher in memory"
        )
    if not begun:
        write_text_whole(folder / META, json.dumps(layout.to_json(), indent=2) + "\n")
    own = [shard for shard in missing if shard % world_size() == rank()]
    tokens = sum(len(layout.samples_of(shard)) for shard in own) * layout.block_size
    with TokenProgress("Teacher", tokens, shown=progress and bool(own)) as bar:
        for shard in own:
            samples = layout.samples_of(shard)
            records = np.empty(len(samples), layout.record)
            for items in batches((blocks[index] for index in samples), batch_size):
                ids, logprobs, loss = most_likely(teacher, collate(items), layout.top_k, layout.temperature, chunk_tokens)
                for i, item in enumerate(items):
                    rows = slice(i * layout.block_size, (i + 1) * layout.block_size)
                    record = records[int(item["sample_index"]) - samples.start]
                    record["ids"], record["logprobs"] = ids[rows].cpu().numpy(), logprobs[rows].cpu().numpy()
                bar.advance(len(items) * layout.block_size, loss=loss)
            write_whole(folder / shard_name(shard), records.tofile, durable=True)


def batches(items, size: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Up to `size` neighbors of one row length at a time."""
    for _, group in groupby(items, key=lambda item: item["input_ids"].shape):
        while batch := list(islice(group, size)):
            yield batch


def most_likely(teacher, batch: dict, k: int, temperature: float, chunk_tokens: int):
    """Ids and log-probabilities (tokens, k) of the most likely next tokens, the likeliest first; and the mean loss."""
    device = teacher.lm_head.weight.device
    input_ids, position_ids = (batch[key].to(device) if key in batch else None for key in ("input_ids", "position_ids"))
    hidden = teacher.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state.flatten(0, 1)
    labels = next_token_labels(input_ids, position_ids).flatten()
    ids = []
    logprobs = []
    losses = []
    for h, label in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True):
        logits = (h @ teacher.lm_head.weight.T).float()
        losses.append(torch.nn.functional.cross_entropy(logits, label, ignore_index=-100, reduction="sum"))
        logits = logits.div_(temperature)
        top = logits.topk(k)
        ids.append(top.indices)
        logprobs.append((top.values - logits.logsumexp(-1, keepdim=True)).clamp_min(LOWEST).half())
    return torch.cat(ids), torch.cat(logprobs), float(sum(losses) / (labels != -100).sum().clamp_min(1))


class WithTeacherLogits(Dataset):
    """
    `blocks` with `teacher_ids` int64 and `teacher_logprobs` float16, both (rows, L, k), in each item. `collate_with_teacher`
    makes batches of them.

    Raises:
        ValueError: if `folder` holds other records, or not all of them.
    """

    def __init__(self, blocks: Dataset, folder: Path, layout: Layout):
        self.blocks = blocks
        self.folder = folder
        self.layout = layout
        read_layout(folder, layout)
        if missing := layout.missing(folder):
            files = f"{len(missing)} of {layout.shards} files of teacher logits"
            raise ValueError(f"{folder} lacks {files}; run write_teacher_logits first")
        self.shard = -1  # the one in `records`
        self.records = None

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = self.blocks[index]
        shard, row = divmod(index, self.layout.samples_per_shard)
        if shard != self.shard:
            self.shard = shard
            self.records = np.memmap(self.folder / shard_name(shard), self.layout.record, mode="r")
        record = self.records[row]
        shape = (*item["input_ids"].shape, self.layout.top_k)
        ids = torch.from_numpy(record["ids"].astype(np.int64)).view(shape)
        return item | {"teacher_ids": ids, "teacher_logprobs": torch.from_numpy(record["logprobs"].copy()).view(shape)}


def collate_with_teacher(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """`collate`, with the teacher's entries of the items where they have them, (rows of all items, L, k)."""
    keys = [key for key in ("teacher_ids", "teacher_logprobs") if key in items[0]]
    return collate(items) | {key: torch.cat([item[key] for item in items]) for key in keys}
