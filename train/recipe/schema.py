"""The dataclasses of a recipe, one for each section. `load.py` builds them from YAML."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dijiang.common.conditions import require, require_at_least, require_between, require_not_negative, require_positive
from dijiang.common.settings import accepts_former_names

from ..memories.config import FitConfig, SelectConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """
    Conversion of the source model, which happens once, before the first stage.

    Attributes:
        preset: `recommended`, `linear` or `paper`.
        settings: layer settings on top of the preset, as `dijiang convert --set` takes them.
        dtype: float type of the stored weights: `auto` (as in the source), `float32`, `bfloat16` or `float16`.
    """

    preset: str = "recommended"
    settings: dict = field(default_factory=dict)
    dtype: str = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """
    One source of text.

    Attributes:
        path: file, folder, glob (`books/**/*.txt`) or hub name. Files are text (.txt, .md), JSONL (.jsonl, .json) or Parquet;
            the first two may be gzipped (.gz). A folder may also hold tokens (tokens.bin, starts.bin, meta.json), as the token
            cache writes them. A path that does not exist on disk is looked up on the hub.
        weight: share of the training tokens, relative to the weights of the other sources.
        column: column of JSONL, Parquet and hub rows that holds the text.
        subset: configuration of a hub data set.
        split: split of a hub data set.
    """

    SHORTHAND: ClassVar[str] = "path"  # a bare string in YAML is the path of a source

    path: str
    weight: float = 1.0
    column: str = "text"
    subset: str | None = None
    split: str = "train"

    def __post_init__(self):
        require(bool(self.path), "path must not be empty")
        require_positive(self, "weight")
        require(math.isfinite(self.weight), f"weight={self.weight} must be finite")


RecallKind = Literal["passkey", "records", "table", "positions", "span", "repeats", "codes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallConfig:
    """
    Made-up samples of recall in place of a share of the text. Text rarely asks for what it said a thousand tokens before, so a
    model that sees nothing else learns to do without it. No word or phrase of the samples is in the evaluation.

    Attributes:
        share: of the training sequences.
        kinds: of samples, in turn: passkey, records, table, positions, span, repeats, codes; empty: all.
        lengths: tokens of a sample, drawn at random; several fill a longer sequence, as documents that see each other only
            where `respect_documents` is false. Empty: a sample is as long as the sequence.
        answer_weight: how many times the tokens of answers count in the loss of distill.
        held_out_samples: samples with held-out text as filler, on which recall is measured where perplexity is.
        seed: of the samples, added to that of the stage.
    """

    share: float = 0.15
    kinds: tuple[RecallKind, ...] = ()
    lengths: tuple[int, ...] = ()
    answer_weight: float = 1.0
    held_out_samples: int = 14
    seed: int = 0

    def __post_init__(self):
        require_between(0, 1, self, "share")
        require_positive(self, "answer_weight")
        require_not_negative(self, "held_out_samples")
        require(not self.lengths or min(self.lengths) >= 128, f"lengths={self.lengths} must be 128 tokens or more each")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """
    The text of all stages.

    Attributes:
        train: sources of training text, mixed by weight.
        held_out: sources of the text on which perplexity is measured during training. Without them nothing is measured.
        held_out_tokens: number of held-out tokens to measure on, the same from each source.
        recall: samples of recall in place of a share of the training text; null: none.
        respect_documents: positions, attention and state start again at each document within a block.
        bad_records: `error` stops at the first record that cannot be read; `skip` counts it and continues.
        streaming: read only as much of each training source as the token budget needs.
        cache: folder of tokenized text; default `dijiang` in the user's cache folder.
    """

    train: list[SourceConfig]
    held_out: list[SourceConfig] = field(default_factory=list)
    held_out_tokens: int = 32_768
    recall: RecallConfig | None = None
    respect_documents: bool = True
    bad_records: Literal["error", "skip"] = "error"
    streaming: bool = False
    cache: str | None = None

    def __post_init__(self):
        require(bool(self.train), "train must name at least one source of text")
        require_positive(self, "held_out_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """
    How a stage runs. None of it changes what the stage learns, except for rounding and for how many sequences align's relative
    errors are averaged over.

    Attributes:
        device: `auto`, `cpu` or `cuda`.
        dtype: float type of computations and frozen weights: `auto` (the faster one on this device), `bfloat16` or `float32`.
            Weights that train are float32.
        deepspeed: DeepSpeed settings: a JSON file, or `zero0`, `zero1`, `zero2`, `zero3`, `zero2_offload`, `zero3_offload` of
            configs/deepspeed. None: plain PyTorch, data-parallel if a launcher started several processes.
        micro_batch_size: largest number of sequences per device and forward pass; gradients of the rest of a batch accumulate.
        gradient_checkpointing: recompute activations instead of keeping them.
        save_every: steps between checkpoints; 0: only at the end.
        keep_checkpoints: number of checkpoints to keep, at least 2.
        log_every: steps between log lines.
        evaluate_every: steps between measurements of held-out perplexity; 0: only at the end. The teacher's is measured too,
            unless distill.teacher_top_k or distill.kl_weight 0 leaves no teacher in memory.
        report_to: experiment trackers: tensorboard, wandb, trackio.
        compile: run the layers and the loss of the distill stage through torch.compile; null: only on a GPU. If a trial step
            fails, the run continues uncompiled and reports it.
        max_minutes: minutes of training after which a stage saves a checkpoint and stops; the same command continues it. 0: no
            limit.
    """

    device: str = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    deepspeed: str | None = None
    micro_batch_size: int = 1
    gradient_checkpointing: bool = False
    save_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 10
    evaluate_every: int = 0
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    compile: bool | None = None
    max_minutes: float = 0.0

    def __post_init__(self):
        require_positive(self, "micro_batch_size", "log_every")
        require_not_negative(self, "save_every", "evaluate_every", "max_minutes")
        require_at_least(2, self, "keep_checkpoints")
        known = self.device in ("auto", "cpu") or self.device.startswith("cuda")
        require(known, f"device={self.device!r} is unknown; choose auto, cpu or cuda")


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """
    Settings that both stages have.

    Attributes:
        tokens: budget of training tokens, rounded down to whole steps; a shorter text is read more than once.
        block_size: tokens per sequence.
        start_block_size: sequence length at the beginning; it doubles at equal shares of the budget until it is `block_size`,
            of which it must be a power-of-two fraction. None: `block_size` throughout.
        position_range: each sequence starts at a random position such that it ends below this one. A linear layer sees
            absolute positions in its rotated keys, where softmax sees only distances, so a student trained only on positions
            below `block_size` fails beyond them. None: positions start at 0.
        batch_size: sequences per step, over all devices, whatever their length.
        schedule: course of the learning rates after the warm-up: `cosine` down to `final_share` of the peak, or `flat`.
        warmup_share: share of the steps during which the learning rates rise from 0.
        final_share: learning rates at the end of `cosine`, as a share of their peak.
        clip: largest norm of the gradient; 0: no clipping.
        weight_decay: weight decay of AdamW.
        betas: betas of AdamW.
        seed: seed of the order of the text and of everything random.
    """

    tokens: int
    block_size: int = 1024
    start_block_size: int | None = None
    position_range: int | None = None
    batch_size: int = 1
    schedule: Literal["cosine", "flat"] = "cosine"
    warmup_share: float = 0.05
    final_share: float = 0.05
    clip: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    seed: int = 0

    def __post_init__(self):
        require_positive(self, "tokens", "block_size", "batch_size")
        require_not_negative(self, "clip", "weight_decay")
        require_between(0, 1, self, "warmup_share", "final_share")
        require_positive(self, "start_block_size")
        if self.start_block_size is not None:
            doublings = math.log2(self.block_size / self.start_block_size)
            sizes = f"start_block_size={self.start_block_size} must be block_size={self.block_size}"
            require(doublings == int(doublings) and doublings > 0, f"{sizes} halved once or more")
        if self.position_range is not None and self.position_range < self.block_size:
            raise ValueError(f"position_range={self.position_range} must be at least block_size={self.block_size}")
        least = self.batch_size * self.block_size * len(self.sequence_lengths)
        require(self.tokens >= least, f"tokens={self.tokens} is less than one step of each sequence length, {least} in all")

    @property
    def sequence_lengths(self) -> list[int]:
        """Length of the sequences in each equal share of the budget."""
        lengths = [self.start_block_size or self.block_size]
        while lengths[-1] < self.block_size:
            lengths.append(2 * lengths[-1])
        return lengths

    @property
    def phases(self) -> list[tuple[int, int]]:
        """(steps, tokens per sequence) of each share of the budget."""
        share = self.tokens // len(self.sequence_lengths)
        return [(share // (length * self.batch_size), length) for length in self.sequence_lengths]

    @property
    def steps(self) -> int:
        return sum(steps for steps, _ in self.phases)

    def tokens_after(self, step: int) -> int:
        """Training tokens seen when `step` steps are done."""
        seen = 0
        for steps, length in self.phases:
            seen += min(step, steps) * length * self.batch_size
            step -= min(step, steps)
        return seen

    @property
    def total_tokens(self) -> int:
        """The budget in whole steps."""
        return self.tokens_after(self.steps)


SHRINKS_KEPT_HEADS = (
    "would shrink the queries and keys of heads that keep every token, which do not train; set weight_decay=0 or "
    "train_kept_heads=true"
)


@accepts_former_names
@dataclass(frozen=True, kw_only=True, slots=True)
class AlignConfig(StageConfig):
    """
    Attention transfer: each layer learns to output what the teacher's attention outputs for the teacher's hidden states.

    Attributes:
        trains: `kernel`, the parameters that conversion added, or `attention`, the layer's projections as well.
        kernel_learning_rate: peak learning rate of the added parameters.
        attention_learning_rate: peak learning rate of the projections.
        combined_weight: weight of the loss between the layer's output (window, sinks and linear branch) and the teacher's.
        linear_weight: weight of the loss between the linear branch's output, over all keys, and the teacher's.
        window_dropout: share of the steps in which the layers use only their linear branch.
        calibrate_blocks: blocks that the closed-form start is fitted to; 0: no closed-form start.
        branch_scale_offset: number that the closed-form start subtracts from the fitted log-scale of the linear branch.
    """

    RENAMED: ClassVar[dict[str, str]] = {"quiet": "branch_scale_offset"}

    tokens: int = 100_000
    clip: float = 0.0
    trains: Literal["kernel", "attention"] = "kernel"
    kernel_learning_rate: float = 5e-2
    attention_learning_rate: float = 1e-3
    combined_weight: float = 1.0
    linear_weight: float = 0.0
    window_dropout: float = 0.0
    calibrate_blocks: int = 2
    branch_scale_offset: float = 0.5

    def __post_init__(self):
        StageConfig.__post_init__(self)
        require_positive(self, "kernel_learning_rate", "attention_learning_rate")
        require_not_negative(self, "combined_weight", "linear_weight", "calibrate_blocks", "branch_scale_offset")
        require(self.combined_weight + self.linear_weight > 0, "combined_weight and linear_weight are both 0: no loss is left")
        require_between(0, 1, self, "window_dropout")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig(StageConfig):
    """
    Distillation: the whole student learns the next-token distribution of the frozen teacher.

    Attributes:
        trains: `all` weights, `attention` (projections and added parameters of the linear layers), or `kernel` (the added
            parameters alone).
        lora_rank: rank of the low-rank adapters through which `trains` is trained, merged in the result; 0: train the weights
            directly. Added parameters always train directly.
        lora_alpha: adapters are scaled by lora_alpha / lora_rank; None: 2 * lora_rank.
        train_embeddings: whether `all` includes the embeddings and the language-model head.
        kernel_learning_rate: peak learning rate of the added parameters.
        attention_learning_rate: peak learning rate of the attention projections.
        learning_rate: peak learning rate of everything else.
        kl_weight: weight of the Kullback-Leibler divergence from the teacher's next-token distribution.
        ce_weight: weight of the cross-entropy with the text.
        temperature: temperature of both distributions in the divergence, which is multiplied by its square.
        teacher_top_k: number of the teacher's most likely tokens at each position that are written to disk before training, so
            that the teacher need not be in memory; 0: the teacher runs next to the student.
        chunk_tokens: tokens whose logits are in memory at a time.
        least_memory: each step draws a share between this one and 1, and the layers have that share of their window and slots
            alone, so that what lies beyond learns to do without; 1: they always have all. Below 1 nothing is compiled.
        train_kept_heads: also train the queries and keys of heads that keep every token. They are the teacher's own, and
            training them was seen to cost recall (arXiv 2606.11052).
        memory_temperature: train the learned scores of the exact memory too, through a soft gate of this temperature, in units
            of the score; null: they stay as they were fitted.
    """

    tokens: int = 200_000
    trains: Literal["all", "attention", "kernel"] = "all"
    lora_rank: int = 0
    lora_alpha: float | None = None
    train_embeddings: bool = False
    kernel_learning_rate: float = 5e-3
    attention_learning_rate: float = 2e-4
    learning_rate: float = 2e-4
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    temperature: float = 1.0
    teacher_top_k: int = 0
    chunk_tokens: int = 256
    memory_temperature: float | None = None
    least_memory: float = 1.0
    train_kept_heads: bool = False

    def __post_init__(self):
        StageConfig.__post_init__(self)
        require_between(0, 1, self, "least_memory")
        rates = ("kernel_learning_rate", "attention_learning_rate", "learning_rate")
        require_positive(self, *rates, "temperature", "chunk_tokens", "memory_temperature")
        require_not_negative(self, "lora_rank", "kl_weight", "ce_weight", "teacher_top_k")
        require(self.kl_weight + self.ce_weight > 0, "kl_weight and ce_weight are both 0: no loss is left")
        one_length = not (self.teacher_top_k and self.start_block_size)
        require(one_length, "teacher_top_k is kept for one length of sequences; leave start_block_size out")
        adaptable = self.trains != "kernel"
        require(adaptable or not self.lora_rank, f"lora_rank={self.lora_rank} needs trains=attention or all, not kernel")
        require(self.lora_alpha is None or self.lora_rank > 0, f"lora_alpha={self.lora_alpha} needs lora_rank of at least 1")
        require_positive(self, "lora_alpha")
        require(self.trains == "all" or not self.train_embeddings, f"train_embeddings needs trains=all, not {self.trains}")
        require(self.kl_weight > 0 or not self.teacher_top_k, f"teacher_top_k={self.teacher_top_k} needs kl_weight above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """
    One job: a source model, its conversion to a student, and the stages that recover the student's quality.

    Attributes:
        source: hub id, folder or GGUF file of the softmax model, which is also the teacher.
        output: folder of everything the job writes: `converted`, `memories`, and for each stage its `checkpoints`, its logs
            and, once it is complete, `model`.
        data: text of all stages.
        convert: settings of the conversion.
        select: which heads keep every token; None: none.
        fit: the exact memory of the others; None: there is none, or an unfitted one that `convert` asks for.
        align: settings of the first stage; None: no such stage.
        distill: settings of the second stage; None: no such stage.
        run: device, memory, checkpoints and logs of both stages.
    """

    source: str
    output: str
    data: DataConfig
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    select: SelectConfig | None = None
    fit: FitConfig | None = None
    align: AlignConfig | None = None
    distill: DistillConfig | None = None
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def stages(self) -> list[str]:
        """The stages of this recipe, in order."""
        return [name for name in ("align", "distill") if getattr(self, name) is not None]
