"""The teacher's most likely tokens at each place of a stage's text, computed once and kept on disk."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from dijiang.common.progress import TokenProgress
from dijiang.modeling import DiJiangForCausalLM

from ..data.blocks import collate
from .base import next_token_labels

SHARD_BYTES = 1 << 26  # of a file, or one place if that is more
META = "meta.json"
LOWEST = -60_000.0  # log-probability that float16 still holds


@dataclass(frozen=True, kw_only=True)
class Layout:
    """
    What a folder of teacher logits holds, and where: `places` records of (block_size, top_k) token ids and float16
    log-probabilities, in files of `places_per_shard` records.

    Attributes:
        fingerprint: of whatever the records depend on: the teacher and the text.
        temperature: that the log-probabilities are at.
    """

    fingerprint: str
    places: int
    block_size: int
    vocab_size: int
    top_k: int
    temperature: float
    places_per_shard: int

    @property
    def record(self) -> np.dtype:
        """The bytes of one place."""
        ids, shape = "<u2" if self.vocab_size <= 1 << 16 else "<u4", (self.block_size, self.top_k)
        return np.dtype([("ids", ids, shape), ("logprobs", "<f2", shape)])

    @property
    def shards(self) -> int:
        return -(-self.places // self.places_per_shard)

    def places_of(self, shard: int) -> range:
        first = shard * self.places_per_shard
        return range(first, min(first + self.places_per_shard, self.places))

    def missing(self, folder: Path) -> list[int]:
        """Shards that are still to be written. One that exists in full size is complete."""
        sizes = {path.name: path.stat().st_size for path in folder.glob("*.bin")}
        whole = lambda shard: len(self.places_of(shard)) * self.record.itemsize  # noqa: E731
        return [shard for shard in range(self.shards) if sizes.get(shard_name(shard)) != whole(shard)]


def shard_name(shard: int) -> str:
    return f"logits-{shard:06d}.bin"


def bytes_needed(places: int, block_size: int, k: int, vocab: int) -> int:
    """Bytes on disk of the `k` most likely of `vocab` tokens at each token of `places` blocks."""
    return places * block_size * min(k, vocab) * (4 if vocab <= 1 << 16 else 6)


def layout_of(blocks: Sequence, *, top_k: int, vocab_size: int, temperature: float, fingerprint: str) -> Layout:
    """The layout for `blocks`, a dataset as `TrainingBlocks`."""
    block_size = blocks[0]["input_ids"].numel()
    return Layout(
        fingerprint=fingerprint,
        places=len(blocks),
        block_size=block_size,
        vocab_size=vocab_size,
        top_k=min(top_k, vocab_size),
        temperature=temperature,
        places_per_shard=max(1, SHARD_BYTES // bytes_needed(1, block_size, top_k, vocab_size)),
    )


def is_complete(blocks: Sequence, folder: str | Path, **settings) -> bool:
    """
    Whether `folder` holds every place of `blocks`; `settings` as for `layout_of`.

    Raises:
        ValueError: if it holds something else.
    """
    layout, folder = layout_of(blocks, **settings), Path(folder)
    return read_layout(folder, layout) and not layout.missing(folder)


def read_layout(folder: Path, expected: Layout) -> bool:
    """Whether `folder` has been begun; ValueError if it was for another layout than `expected`."""
    path = folder / META
    if not path.exists():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key, value in asdict(expected).items() if found[key] != value]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged; delete the folder, and the teacher is run again") from None
    if differing:
        values = ", ".join(f"{key} {found[key]} where {getattr(expected, key)} is expected" for key in differing)
        raise ValueError(f"{folder} holds other teacher logits ({values}); delete it, and the teacher is run again")
    return True


@torch.no_grad()
def write_teacher_logits(
    teacher: DiJiangForCausalLM,
    blocks: Dataset,
    folder: str | Path,
    *,
    top_k: int,
    fingerprint: str,
    temperature: float = 1.0,
    batch_size: int = 1,
    chunk_tokens: int = 256,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> None:
    """
    Write what `folder` still lacks of the teacher's `top_k` most likely tokens at every place. It may be stopped at any moment
    and started again: a shard appears only when it is complete.

    Args:
        teacher: on its device, in the dtype in which it is to run.
        blocks: as `TrainingBlocks`.
        fingerprint: of the teacher and the text.
        temperature: the log-probabilities are those of logits / temperature.
        batch_size: blocks per forward pass.
        chunk_tokens: tokens whose logits are in memory at a time.
        rank, world_size: of this process, among those that share the shards and see one folder.

    Raises:
        ValueError: if the folder holds logits of something else, or the disk is too small.
    """
    settings = {"top_k": top_k, "temperature": temperature, "fingerprint": fingerprint}
    layout, folder = layout_of(blocks, vocab_size=teacher.config.vocab_size, **settings), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    begun = read_layout(folder, layout)
    missing = layout.missing(folder)
    needed = sum(len(layout.places_of(shard)) for shard in missing) * layout.record.itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{folder}: the teacher's logits need {needed:,} bytes and {free:,} are free; lower teacher_top_k={layout.top_k}, "
            "or leave it out to run the teacher beside the student"
        )
    if not begun:
        write_atomically(folder / META, (json.dumps(asdict(layout), indent=2) + "\n").encode(), tag=f".{rank}")
    mine = [shard for shard in missing if shard % world_size == rank]  # whatever the others have done by now
    tokens = sum(len(layout.places_of(shard)) for shard in mine) * layout.block_size
    with TokenProgress("Teacher", tokens, shown=progress and bool(mine)) as bar:
        for shard in mine:
            places = layout.places_of(shard)
            records = np.empty(len(places), layout.record)
            for items in batches((blocks[place] for place in places), batch_size):
                ids, logprobs, loss = most_likely(teacher, collate(items), layout.top_k, temperature, chunk_tokens)
                for i, item in enumerate(items):
                    row = slice(i * layout.block_size, (i + 1) * layout.block_size)
                    record = records[int(item["place"]) - places.start]
                    record["ids"], record["logprobs"] = ids[row].cpu().numpy(), logprobs[row].cpu().numpy()
                bar.advance(len(items) * layout.block_size, loss=loss)
            write_atomically(folder / shard_name(shard), records.data)


def batches(items, size: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Up to `size` neighbours of one row length at a time."""
    for _, alike in groupby(items, key=lambda item: item["input_ids"].shape):
        batch = []
        for item in alike:
            batch.append(item)
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch


def most_likely(teacher, batch: dict, k: int, temperature: float, chunk_tokens: int):
    """Ids and log-probabilities (tokens, k) of the next token after each one, the most likely first; and the mean loss."""
    device = teacher.lm_head.weight.device
    input_ids, position_ids = (batch[key].to(device) if key in batch else None for key in ("input_ids", "position_ids"))
    hidden = teacher.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state.flatten(0, 1)
    labels = next_token_labels(input_ids, position_ids).flatten()
    ids, logprobs, losses = [], [], []
    for h, label in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True):
        logits = (h @ teacher.lm_head.weight.T).float()
        losses.append(torch.nn.functional.cross_entropy(logits, label, ignore_index=-100, reduction="sum"))
        logits = logits.div_(temperature)
        top = logits.topk(k)
        ids.append(top.indices)
        logprobs.append((top.values - logits.logsumexp(-1, keepdim=True)).clamp_min(LOWEST).half())
    return torch.cat(ids), torch.cat(logprobs), float(sum(losses) / (labels != -100).sum().clamp_min(1))


def write_atomically(path: Path, content, tag: str = "") -> None:
    """The file at `path` appears complete and on disk, or not at all; `tag` sets writers of one file apart."""
    draft = path.with_name(f"{path.name}{tag}.partial")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


class WithTeacherLogits(Dataset):
    """
    `blocks` with `teacher_ids` int64 and `teacher_logprobs` float16, both (rows, L, k), in each item; `settings` as for
    `layout_of`. Batches are made by `collate_with_teacher`.

    Raises:
        ValueError: if `folder` holds something else, or not all of it.
    """

    def __init__(self, blocks: Dataset, folder: str | Path, **settings):
        self.blocks, self.folder, self.layout = blocks, Path(folder), layout_of(blocks, **settings)
        read_layout(self.folder, self.layout)
        if missing := self.layout.missing(self.folder):
            lacks = f"{len(missing)} of {self.layout.shards} files of teacher logits"
            raise ValueError(f"{self.folder} lacks {lacks}; run write_teacher_logits first")
        self.shard, self.records = -1, None  # the one last read

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        item = self.blocks[place]
        shard, row = divmod(place, self.layout.places_per_shard)
        if shard != self.shard:
            self.shard, self.records = shard, np.memmap(self.folder / shard_name(shard), self.layout.record, mode="r")
        record, shape = self.records[row], (*item["input_ids"].shape, self.layout.top_k)
        ids = torch.from_numpy(record["ids"].astype(np.int64)).view(shape)
        return item | {"teacher_ids": ids, "teacher_logprobs": torch.from_numpy(record["logprobs"].copy()).view(shape)}


def collate_with_teacher(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """`collate`, with the teacher's part of the items where they have one, (rows of all items, L, k)."""
    keys = [key for key in ("teacher_ids", "teacher_logprobs") if key in items[0]]
    return collate(items) | {key: torch.cat([item[key] for item in items]) for key in keys}
