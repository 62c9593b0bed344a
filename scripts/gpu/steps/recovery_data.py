"""Inputs of the recovery step: the teacher as a plain checkpoint and the tokenized corpus, or synthetic ones."""

import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dijiang.checkpoint.source import load_tokenizer, open_source
from dijiang.common.outputs import new_folder
from dijiang.common.text import tokenizer_fingerprint
from dijiang.convert import load_source
from dijiang.modeling import DiJiangForCausalLM
from dijiang.train import DataConfig, SourceConfig
from dijiang.train.data.token_cache import TokenFile, tokenize

SAME_NAMES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "max_position_embeddings", "rope_parameters", "tie_word_embeddings", "attention_bias"),
    *("mlp_bias", "bos_token_id", "eos_token_id", "pad_token_id"),
)
CHECKED_TOKENS = 500  # per document of a folder that another version of the tokenizer's library wrote


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """
    Inputs of a recovery.

    Attributes:
        teacher: folder of the softmax model.
        tokenizer: of the teacher.
        train: sources of training text, folders of tokens.
        held: sources of held-out text, folders of tokens.
        runs: folder that recipes write to.
        facts: description of the text in the JSON.
    """

    teacher: Path
    tokenizer: object
    train: list[SourceConfig]
    held: list[SourceConfig]
    runs: Path
    facts: dict


def prepare_inputs(data: Path, record, fresh: str | None = None) -> Inputs:
    """The inputs in the folder DATA; SystemExit with one line if something is missing. `fresh` names a run to delete."""
    runs = data / "runs"
    if fresh:
        shutil.rmtree(runs / fresh, ignore_errors=True)
    runs.mkdir(parents=True, exist_ok=True)
    teacher = plain_teacher(data / "weights", runs / "teacher", record)
    tokenizer = load_tokenizer(open_source(teacher))
    folders = {"train": data / "corpus" / "train"}
    folders |= {f"held/{folder.name}": folder for folder in sorted((data / "corpus" / "held").iterdir()) if folder.is_dir()}
    tokens = {name: own_tokens(folder, tokenizer, runs / "corpus" / name) for name, folder in folders.items()}
    facts = {name: {"documents": len(file.starts), "tokens": len(file)} for name, (_, file) in tokens.items()}
    adopted = [name for name, (folder, _) in tokens.items() if folder != folders[name]]
    if adopted:
        facts["checked_by_encoding_again"] = adopted
    sources = {name: SourceConfig(path=str(folder)) for name, (folder, _) in tokens.items()}
    held = [source for name, source in sources.items() if name != "train"]
    return Inputs(teacher=teacher, tokenizer=tokenizer, train=[sources["train"]], held=held, runs=runs, facts=facts)


def plain_teacher(weights: Path, folder: Path, record) -> Path:
    """The softmax model in a folder of its own, dequantized once: reading a GGUF file takes tens of seconds each time."""
    if (folder / "config.json").is_file():
        return folder
    files = sorted(weights.rglob("*.gguf"))
    if not files:
        if (weights / "config.json").is_file():
            return weights
        raise SystemExit(f"{weights} holds no GGUF file; bring the part that has it")
    print(f"recovery: dequantizing {files[0].name}, {record.left():.0f} s left", flush=True)
    model, tokenizer = load_source(files[0], dtype=torch.float32)
    with new_folder(folder) as draft:
        as_llama(model).save_pretrained(draft)
        tokenizer.save_pretrained(draft)
    return folder


def as_llama(model: DiJiangForCausalLM) -> LlamaForCausalLM:
    """Our decoder with softmax attention in every layer as transformers' own class; their weights have the same names."""
    config = LlamaConfig(**{name: getattr(model.config, name) for name in SAME_NAMES}, rms_norm_eps=model.config.norm_eps)
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(model.state_dict())
    return plain


def own_tokens(folder: Path, tokenizer, copy: Path) -> tuple[Path, TokenFile]:
    """
    A folder of tokens with this tokenizer's fingerprint. Another version of the tokenizers library may serialize the same
    tokenizer differently; then some text is encoded again for comparison, and a copy with the new fingerprint is used.

    Raises:
        SystemExit: if the tokens are not this tokenizer's.
    """
    try:
        file = TokenFile(folder)
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{folder} is not a whole folder of tokens ({error}); bring its parts again") from None
    if file.tokenizer == tokenizer_fingerprint(tokenizer):
        return folder, file
    if not encodes_the_same(file, tokenizer):
        raise SystemExit(f"{folder} holds tokens of another tokenizer than the teacher's; make the corpus again")
    copy.mkdir(parents=True, exist_ok=True)
    for name in ("tokens.bin", "starts.bin"):
        (copy / name).unlink(missing_ok=True)
        os.symlink((folder / name).resolve(), copy / name)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8")) | {"tokenizer": tokenizer_fingerprint(tokenizer)}
    (copy / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return copy, TokenFile(copy)


def encodes_the_same(file: TokenFile, tokenizer) -> bool:
    """Whether the text of a sample of documents is encoded to the tokens in the file, for more than nine in ten of them."""
    same = checked = 0
    for start in file.starts[:: max(1, len(file.starts) // 20)].tolist():
        ids = np.asarray(file.tokens[start : start + CHECKED_TOKENS]).tolist()
        ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
        compared = max(len(ids) - 8, 0)  # a cut within a word gives other tokens at the end
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        same += tokenizer(text, add_special_tokens=False)["input_ids"][:compared] == ids[:compared] and compared > 0
        checked += compared > 0
    return same > 0.9 * checked


def synthetic_inputs(folder: Path) -> Inputs:
    """A tiny random Llama, a tokenizer of synthetic words, and text in which each word has three possible successors."""
    rng = random.Random(0)
    words = sorted({"".join(rng.choices("bdfgklmnprst", k=1)[0] + rng.choice("aeiou") for _ in range(3)) for _ in range(120)})
    follows = {word: rng.sample(words, 3) for word in words}

    def text(count: int) -> str:
        sequence = [rng.choice(words)]
        while len(sequence) < count:
            sequence.append(rng.choice(follows[sequence[-1]]))
        return " ".join(sequence) + ".\n"

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([text(200) for _ in range(60)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    sources = {}
    for name, documents in (("train", 40), ("held/one", 6), ("held/two", 6)):
        file = folder / "text" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps({"text": text(100)}) + "\n" for _ in range(documents)), encoding="utf-8")
        source = SourceConfig(path=str(file))
        data = DataConfig(train=[source], cache=str(folder / "cache"))
        sources[name] = SourceConfig(path=str(tokenize(source, data, tokenizer, tokens_needed=None, progress=False).folder))
    held = [source for name, source in sources.items() if name != "train"]
    runs = folder / "runs"
    runs.mkdir()
    return Inputs(
        teacher=folder / "teacher",
        tokenizer=tokenizer,
        train=[sources["train"]],
        held=held,
        runs=runs,
        facts={"made_up": True},
    )
