"""A checkpoint computes the same in a process that cannot import the package, and says so if it cannot be loaded at all."""

import shutil

import pytest
import torch

from dijiang.convert import load_source
from dijiang.evaluate import logits_without_package


def test_a_fresh_process_without_the_package_computes_the_same(pair, tokens):
    ids = tokens(30)
    found = logits_without_package(pair.checkpoint, ids)
    with torch.no_grad():
        expected = load_source(pair.checkpoint)[0](ids, use_cache=False).logits
    assert found.dtype == torch.float32 and found.shape == (2, 30, 320)
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("line", "said"),
    [("raise RuntimeError('made to fail')", "made to fail"), ("import dijiang", "No module named|halted|dijiang")],
)
def test_the_code_inside_the_checkpoint_is_what_runs(pair, tokens, tmp_path, line, said):
    """What is broken in the checkpoint's own code shows, though the installed one is sound; and so does a use of that one."""
    folder = tmp_path / "broken"
    shutil.copytree(pair.checkpoint, folder)
    code = folder / "modeling_dijiang.py"
    code.write_text(f"{code.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match=rf"(?s)^{folder} does not load without dijiang: .*({said})"):
        logits_without_package(folder, tokens(4))
