"""What travels beside the weights when a checkpoint is written anew."""

import copy

from transformers import AutoTokenizer

from dijiang.checkpoint.files import copy_companions


def test_small_files_and_chat_templates_travel_and_weights_do_not(tokenizer, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    out.mkdir()
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(source)
    for name in ("model.safetensors", "model.safetensors.index.json", "README.md", "notes.txt", "logs/run.txt"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name, encoding="utf-8")
    copy_companions(source, out, leave_out=["README.md"])
    names = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    left = {"model.safetensors", "model.safetensors.index.json", "README.md", "logs/run.txt"}
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == names - left
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
