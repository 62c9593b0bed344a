"""Sparse checkpoints as bitmask containers: every bit comes back, sizes are the closed form, damage is refused."""

import json
import math
import random
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dijiang.compress import bitmask
from dijiang.compress.bitmask import compress_tensor, container_facts, decompress_tensor, read_bitmask, write_bitmask

WEIGHTS, PACKED = "model.safetensors", "sparse-bitmask.safetensors"
UP = "model.layers.0.mlp.up_proj.weight"
SHAPES = [(1, 1), (7, 13), (16, 8), (5, 64), (33, 129), (3, 0), (0, 9), (0, 0)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn]
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sparse(shape, share, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 3
    return weight.masked_fill(torch.rand(shape, generator=generator) < share, 0).to(dtype)


def same_bits(a, b):
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(INTEGERS[a.itemsize]), b.contiguous().view(INTEGERS[b.itemsize]))


def smallest_two_of_four(scores):
    return (scores.unflatten(1, (-1, 4)).argsort(2).argsort(2) < 2).flatten(1)


def prune(folder, share=0.5, keep=(), pattern=None):
    """Zero a random share, or two of every four, of a checkpoint's matrices, but for names that hold a word of `keep`."""
    generator = torch.Generator().manual_seed(1)
    for path in sorted(folder.glob("*.safetensors")):
        weights = load_file(path)
        for name, weight in weights.items():
            if weight.dim() == 2 and not any(word in name for word in keep):
                scores = torch.rand(weight.shape, generator=generator)
                weight[smallest_two_of_four(scores) if pattern else scores < share] = 0
        save_file(weights, path, metadata={"format": "pt"})


def stored(folder):
    """All tensors of a folder, by name."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_folder(output, source):
    """The same tensors bit by bit, and the same files but for how the weights are cut into shards."""
    mine, theirs = stored(output), stored(source)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not same_bits(mine[name], theirs[name])] == []
    others = [
        {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and ".safetensors" not in path.name}
        for folder in (output, source)
    ]
    assert others[0] == others[1]


def logits(folder, tokens, **settings):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(tokens).logits


# --- one matrix ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit_comes_back(shape, dtype):
    for seed, share in enumerate((0.0, 0.3, 0.9, 1.0)):
        weight = sparse(shape, share, seed, dtype)
        assert same_bits(decompress_tensor(compress_tensor(weight)), weight)


def test_every_half_precision_number_comes_back():
    """Negative zero, subnormals, infinities and all kinds of NaN among them."""
    everything = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(1024, 64)
    for dtype in (torch.bfloat16, torch.float16):
        weight = everything.view(dtype)
        parts = compress_tensor(weight)
        assert same_bits(decompress_tensor(parts), weight)
        assert len(parts["compressed"]) == (1 << 16) - 1  # only +0 is left out
    for dtype in (torch.float32, torch.float64):
        weight = torch.tensor([[0.0, -0.0, float("nan"), -float("nan"), float("inf"), 5e-324, 1e-45]], dtype=dtype)
        assert same_bits(decompress_tensor(compress_tensor(weight)), weight)


@pytest.mark.parametrize("shape", [(6, 24), (9, 29), (4, 3)], ids=str)
def test_the_layout_read_bit_by_bit(shape):
    weight = sparse(shape, 0.6, seed=3)
    weight[1] = 0
    parts = compress_tensor(weight)
    rows, columns = parts["shape"].tolist()
    values, packed, offsets = (parts[part].tolist() for part in ("compressed", "bitmask", "row_offsets"))
    assert (rows, columns) == shape and [len(row) for row in packed] == [math.ceil(columns / 8)] * rows
    used, slow = 0, []
    for r in range(rows):
        assert offsets[r] == used
        row = []
        for c in range(columns):
            if packed[r][c // 8] & (1 << (c % 8)):
                row.append(values[used])
                used += 1
            else:
                row.append(0.0)
        assert packed[r][-1] >> ((columns - 1) % 8 + 1) == 0  # nothing beyond the last column
        slow.append(row)
    assert used == len(values) and slow == weight.tolist()


def test_a_matrix_worked_by_hand():
    weight = torch.zeros(2, 10)
    weight[0, 1], weight[0, 8], weight[1, 0], weight[1, 7] = 5, 6, 7, 8
    parts = compress_tensor(weight)
    assert parts["shape"].tolist() == [2, 10] and parts["shape"].dtype == torch.int64
    assert parts["compressed"].tolist() == [5, 6, 7, 8] and parts["compressed"].dtype == torch.float32
    assert parts["bitmask"].tolist() == [[2, 1], [129, 0]] and parts["bitmask"].dtype == torch.uint8
    assert parts["row_offsets"].tolist() == [0, 2] and parts["row_offsets"].dtype == torch.int64


def test_views_and_gradients_do_no_harm():
    weight = sparse((31, 17), 0.5)
    for view in (weight.T, weight[::2, 3:], weight[:, ::2], torch.nn.Parameter(weight)):
        assert same_bits(decompress_tensor(compress_tensor(view)), view.detach())
    parts = compress_tensor(weight)
    parts["bitmask"] = parts["bitmask"].T.contiguous().T
    parts["compressed"] = torch.stack([parts["compressed"]] * 2, dim=1)[:, 0]
    assert same_bits(decompress_tensor(parts), weight)


def test_what_has_no_bitmask_is_refused():
    for tensor in (torch.ones(3), torch.ones(2, 2, 2), torch.ones(2, 2, dtype=torch.complex128)):
        with pytest.raises(ValueError, match="cannot have a bitmask"):
            compress_tensor(tensor)


def flip(parts, name, index, value):
    parts[name] = parts[name].clone()
    parts[name].view(-1)[index] = value


# what is done to the parts of a sound matrix (7, 13), and what the refusal says
DAMAGE = {
    "bitmask missing": (lambda p: p.pop("bitmask"), r"bitmask missing"),
    "shape of floats": (lambda p: p.update(shape=p["shape"].float()), r"shape is torch\.float32 .*expected two int64"),
    "one size": (lambda p: p.update(shape=p["shape"][:1]), r"shape is .*\[7\], expected two"),
    "negative size": (lambda p: flip(p, "shape", 0, -7), r"shape is .*-7"),
    "more rows": (lambda p: flip(p, "shape", 0, 8), r"bitmask is torch\.uint8 \[7, 2\], expected torch\.uint8 \[8, 2\]"),
    "more columns": (lambda p: flip(p, "shape", 1, 17), r"bitmask is .*expected torch\.uint8 \[7, 3\]"),
    "fewer columns": (lambda p: flip(p, "shape", 1, 12), r"bits beyond the 12 columns"),
    "wide bitmask": (lambda p: p.update(bitmask=p["bitmask"].long()), r"bitmask is torch\.int64"),
    "bit set": (lambda p: flip(p, "bitmask", 0, p["bitmask"][0, 0] ^ 4), r"compressed is .*bitmask has \d+ bits set"),
    "bit in the padding": (lambda p: flip(p, "bitmask", 1, p["bitmask"][0, 1] | 128), r"bits beyond the 13 columns"),
    "bits of two rows": (
        lambda p: p.update(bitmask=p["bitmask"].roll(1, 0)),
        r"row_offsets do not fit",
    ),
    "value lost": (lambda p: p.update(compressed=p["compressed"][:-1]), r"compressed is .*bits set"),
    "values folded": (lambda p: p.update(compressed=p["compressed"][None]), r"compressed is .*bits set"),
    "offset wrong": (lambda p: flip(p, "row_offsets", 3, 0), r"row_offsets do not fit"),
    "offset lost": (lambda p: p.update(row_offsets=p["row_offsets"][1:]), r"row_offsets is .*\[6\], expected .*\[7\]"),
    "short offsets": (lambda p: p.update(row_offsets=p["row_offsets"].int()), r"row_offsets is torch\.int32"),
}


@pytest.fixture
def parts():
    weight = sparse((7, 13), 0.5, seed=2)
    weight[:, -1], weight[0, 0], weight[3] = 1, 2, 3
    return compress_tensor(weight)


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_parts_are_refused(parts, case):
    damage, message = DAMAGE[case]
    damage(parts)
    with pytest.raises(ValueError, match=message) as caught:
        decompress_tensor(parts, UP)
    assert UP in str(caught.value) and "\n" not in str(caught.value)


# --- whole checkpoints ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_checkpoint_comes_back(make_source, tmp_path, dtype):
    source, _ = make_source(dtype=dtype, intermediate_size=51, seed=4)
    prune(source, 0.55, keep=("norm",))
    box = write_bitmask(source, tmp_path / "box", progress=False)
    back = read_bitmask(box, tmp_path / "back", progress=False)
    assert box == tmp_path / "box" and back == tmp_path / "back"
    assert_same_folder(back, source)
    assert {path.name for path in box.iterdir()} ^ {path.name for path in source.iterdir()} == {WEIGHTS, PACKED}
    with pytest.raises(OSError, match=r"model\.safetensors"):  # and not noise in place of weights
        AutoModelForCausalLM.from_pretrained(box)

    dense, held = stored(source), stored(box)
    matrices = {name for name, tensor in dense.items() if tensor.dim() == 2}
    assert held.keys() == {f"{name}.{part}" for name in matrices for part in bitmask.PARTS} | (dense.keys() - matrices)
    zeros = sum(int((dense[name] == 0).sum()) for name in matrices)
    share = zeros / sum(dense[name].numel() for name in matrices)
    config = json.loads((box / "config.json").read_text())
    assert config.pop("dijiang_compression") == {
        "format": "sparse-bitmask",
        "global_sparsity": share,
        "sparsity_structure": "unstructured",
    }
    assert config == json.loads((source / "config.json").read_text())
    assert not {"quantization_config", "compression_config"} & config.keys()


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_shards_come_back_with_their_logits(make_source, tmp_path, tokens, monkeypatch, family):
    source, _ = make_source(family, max_shard_size="20KB", dtype=torch.bfloat16)
    assert len(list(source.glob("*.safetensors"))) > 3
    prune(source, 0.7, keep=("embed",))
    (source / "plan").mkdir()
    (source / "plan" / "inner.json").write_text("{}")
    (source / "sparsities.json").write_text('{"kept": 1}')
    (source / "pytorch_model.bin").write_bytes(b"stale")
    # cuts between the parts of one weight, too
    monkeypatch.setattr("dijiang.checkpoint.shard_writer.SHARD_BYTES", 3000)
    box = write_bitmask(source, tmp_path / "box", progress=False)
    monkeypatch.setattr("dijiang.checkpoint.shard_writer.SHARD_BYTES", 9000)
    back = read_bitmask(box, tmp_path / "back", progress=False)
    files = json.loads((box / f"{PACKED}.index.json").read_text())["weight_map"]
    split = {name.rpartition(".")[0] for name in files if name.endswith(".bitmask")}
    assert any(len({files[f"{name}.{part}"] for part in bitmask.PARTS}) > 1 for name in split)
    assert len(list(back.glob("*.safetensors"))) > 3
    for folder in (box, back):
        names = {path.name for path in folder.iterdir()}
        assert "sparsities.json" in names and not names & {"plan", "pytorch_model.bin"}
    (source / "pytorch_model.bin").unlink()
    assert_same_folder(back, source)
    assert torch.equal(logits(back, tokens(12)), logits(source, tokens(12)))


def test_a_dijiang_checkpoint_comes_back(pair, tmp_path, tokens):
    source = tmp_path / "source"
    source.mkdir()
    for path in pair.checkpoint.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    prune(source, 0.5, keep=("embed", "lm_head", "feature_map"))
    box = write_bitmask(source, tmp_path / "box", progress=False)
    assert {"provenance.json", "modeling_dijiang.py", "tokenizer.json"} <= {path.name for path in box.iterdir()}
    back = read_bitmask(box, tmp_path / "back", progress=False)
    assert_same_folder(back, source)
    assert torch.equal(logits(back, tokens(30)), logits(source, tokens(30)))
    # what is dense stays under its own name; a new kernel's log_D is all zeros
    dense = {name for name in stored(source) if "embed" in name or ("feature_map" in name and not name.endswith("log_D"))}
    assert len(dense) > 4 and dense <= stored(box).keys()


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 16), (torch.float32, 32), (torch.float64, 64)], ids=str)
def test_it_compresses_from_where_it_gains(make_source, tmp_path, dtype, bits):
    """Break-even: as many bytes of zeros as bitmask, offsets and shape have."""
    rows, columns = 48, 32
    cost = rows * columns // 8 + 8 * rows + 16
    zeros = cost // (bits // 8)
    for count, gains in ((zeros, False), (zeros + 1, True)):
        source, _ = make_source(name=f"source-{bits}-{count}", dtype=dtype)
        weights = load_file(source / WEIGHTS)
        weights[UP].view(-1)[random.Random(0).sample(range(rows * columns), count)] = 0
        weights["model.layers.1.mlp.up_proj.weight"].zero_()
        save_file(weights, source / WEIGHTS, metadata={"format": "pt"})
        box = write_bitmask(source, tmp_path / f"box-{bits}-{count}", progress=False)
        assert (f"{UP}.bitmask" in stored(box)) == gains and (UP in stored(box)) != gains


def test_names_decide_and_others_stay(make_source, tmp_path):
    source, _ = make_source()
    prune(source, 0.5, keep=("down_proj",))
    dense = "model.layers.1.mlp.down_proj.weight"
    box = write_bitmask(source, tmp_path / "box", [UP, dense], progress=False)
    parts = {name for name in stored(box) if name.endswith(".bitmask")}
    assert parts == {f"{UP}.bitmask", f"{dense}.bitmask"}
    assert_same_folder(read_bitmask(box, tmp_path / "back", progress=False), source)


def test_sizes_are_the_closed_form(make_source, tmp_path):
    source, _ = make_source(hidden_size=128, intermediate_size=512, dtype=torch.bfloat16)
    prune(source, pattern=True, keep=("embed", "lm_head"))  # exactly a half
    box = write_bitmask(source, tmp_path / "box", structure="2:4", progress=False)
    assert json.loads((box / "config.json").read_text())["dijiang_compression"]["sparsity_structure"] == "2:4"
    shapes = [(128, 128)] * 8 + [(512, 128)] * 4 + [(128, 512)] * 2
    weights = sum(r * c for r, c in shapes)
    size = sum(r * c // 2 * 2 + r * c // 8 + 8 * r + 16 for r, c in shapes)
    facts = container_facts(box)
    assert facts == {
        "weights": weights,
        "zeros": weights // 2,
        "bytes_dense": 2 * weights,
        "bytes_compressed": size,
        "bits_per_weight": 8 * size / weights,
    }
    offsets = 64 * sum(r for r, _ in shapes) / weights
    assert 0 < facts["bits_per_weight"] - (9 + offsets) < 0.01
    # and the file shrinks by as much, but for its header, 8 + n bytes of JSON
    sizes, heads = [], []
    for folder in (source, box):
        content = next(folder.glob("*.safetensors")).read_bytes()
        sizes.append(len(content))
        heads.append(8 + struct.unpack("<Q", content[:8])[0])
    assert (sizes[0] - heads[0]) - (sizes[1] - heads[1]) == facts["bytes_dense"] - facts["bytes_compressed"]


def test_an_all_zero_matrix_comes_back(make_source, tmp_path):
    source, _ = make_source(dtype=torch.bfloat16)
    weights = load_file(source / WEIGHTS)
    weights[UP].zero_()
    weights["shape"] = torch.ones(3)  # no weight's part
    weights["model.layers.0.mlp.gate_proj.weight"].view(torch.int16).fill_(-(1 << 15))  # -0 everywhere: stays as it is
    save_file(weights, source / WEIGHTS, metadata={"format": "pt"})
    box = write_bitmask(source, tmp_path / "box", progress=False)
    assert stored(box)[f"{UP}.compressed"].shape == (0,)
    assert json.loads((box / "config.json").read_text())["dijiang_compression"]["global_sparsity"] == 1
    assert_same_folder(read_bitmask(box, tmp_path / "back", progress=False), source)


# --- refusals ---


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, edit):
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def cut(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


# what is done to a sparse LLaMA, the arguments of the call, and what the refusal says
NOT_WRITTEN = {
    "no folder": (lambda f: f.rename(f.with_name("moved")), {}, r"source has no config\.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), {}, r"holds no model\.safetensors"),
    "pickles": (
        lambda f: (torch.save(load_file(f / WEIGHTS), f / "pytorch_model.bin"), (f / WEIGHTS).unlink()),
        {},
        r"holds no model\.safetensors; save the model again",
    ),
    "cut weights": (lambda f: cut(f / WEIGHTS, 0.6), {}, r"corrupt or cut short"),
    "dense": (lambda f: edit_weights(f, lambda w: [x.fill_(1) for x in w.values()]), {}, r"no matrix with enough zeros"),
    "compressed": (lambda f: edit_config(f, dijiang_compression={}), {}, r"is compressed already"),
    "name of a part": (
        lambda f: edit_weights(f, lambda w: w.update({"a.shape": torch.ones(2)})),
        {},
        r"holds a\.shape, a name that a compressed",
    ),
    "unknown name": (lambda f: None, {"names": [UP, "model.up"]}, r"holds no float matrix model\.up"),
    "vector": (lambda f: None, {"names": ["model.norm.weight"]}, r"holds no float matrix model\.norm\.weight"),
    "integers": (lambda f: edit_weights(f, lambda w: w.update({UP: w[UP].char()})), {"names": [UP]}, rf"no float matrix {UP}"),
    "no names": (lambda f: None, {"names": []}, r"no matrix with enough zeros"),
    "structure unknown": (lambda f: None, {"structure": "blocks"}, r"pattern 'blocks'"),
    "not that structure": (lambda f: None, {"structure": "2:4"}, r"does not have 2:4 zeros"),
    "columns left over": (lambda f: None, {"structure": "1:7"}, r"does not have 1:7 zeros"),
}


@pytest.mark.parametrize("case", NOT_WRITTEN)
def test_what_cannot_be_written_is_refused(make_source, tmp_path, refused, case):
    damage, settings, message = NOT_WRITTEN[case]
    source, _ = make_source()
    prune(source)
    damage(source)
    refused(tmp_path, lambda: write_bitmask(source, tmp_path / "deep" / "box", progress=False, **settings), message)


# what is done to a sound container, and what the refusal says
NOT_READ = {
    "no config": (lambda f: (f / "config.json").unlink(), r"no config\.json"),
    "no key": (lambda f: (f / "config.json").write_text("{}"), r"is not compressed \(no dijiang_compression"),
    "key of text": (lambda f: edit_config(f, dijiang_compression="yes"), r"is not compressed"),
    "no format": (lambda f: edit_config(f, dijiang_compression={}), r"compressed as None, only sparse-bitmask"),
    "other format": (lambda f: edit_config(f, dijiang_compression={"format": "marlin-24"}), r"as 'marlin-24', only"),
    "part missing": (lambda f: edit_weights(f, lambda w: w.pop(f"{UP}.row_offsets")), rf"{UP} in .*row_offsets missing"),
    "values missing": (lambda f: edit_weights(f, lambda w: w.pop(f"{UP}.compressed")), rf"{UP} in .*compressed missing"),
    "bits flipped": (lambda f: edit_weights(f, lambda w: w[f"{UP}.bitmask"].bitwise_not_()), rf"{UP} in .*bits"),
    "offset wrong": (lambda f: edit_weights(f, lambda w: w[f"{UP}.row_offsets"][2].add_(1)), rf"{UP} in .*row_offsets do"),
    "shape wrong": (lambda f: edit_weights(f, lambda w: w[f"{UP}.shape"][0].add_(1)), rf"{UP} in .*bitmask is"),
    "dense as well": (lambda f: edit_weights(f, lambda w: w.update({UP: torch.ones(2, 2)})), rf"{UP} in .*dense as well"),
    "weight lost": (
        lambda f: edit_weights(f, lambda w: [w.pop(f"{UP}.{part}") for part in bitmask.PARTS]),
        r"are zero, but its config\.json says a share of 0\.\d+; files are missing",
    ),
    "no weights": (lambda f: (f / PACKED).rename(f / WEIGHTS), r"holds no sparse-bitmask\.safetensors"),
    "cut weights": (lambda f: cut(f / PACKED, 0.6), r"corrupt or cut short"),
}


@pytest.mark.parametrize("case", NOT_READ)
def test_what_cannot_be_read_is_refused(make_source, tmp_path, refused, case):
    damage, message = NOT_READ[case]
    source, _ = make_source()
    prune(source)
    box = write_bitmask(source, tmp_path / "box", progress=False)
    damage(box)
    refused(tmp_path, lambda: read_bitmask(box, tmp_path / "deep" / "back", progress=False), message)
    if case in ("no config", "no key", "other format", "part missing", "cut weights"):
        refused(tmp_path, lambda: container_facts(box), message)


def test_an_output_in_use_is_refused(make_source, tmp_path, refused):
    source, _ = make_source()
    prune(source)
    refused(tmp_path, lambda: write_bitmask(source, source, progress=False), "is not empty")
    box = write_bitmask(source, tmp_path / "box", progress=False)
    refused(tmp_path, lambda: read_bitmask(box, source, progress=False), "is not empty")


def test_nothing_stays_when_it_is_interrupted(make_source, tmp_path, monkeypatch):
    source, _ = make_source()
    prune(source)
    before = sorted(tmp_path.rglob("*"))

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(bitmask, "write_companions", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bitmask(source, tmp_path / "box", progress=False)
    assert sorted(tmp_path.rglob("*")) == before
