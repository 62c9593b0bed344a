"""Where and how C code is compiled, and the reason that is given where it cannot be."""

import os
import subprocess
import sys

import pytest
import torch

from dijiang.modeling import native_build
from dijiang.modeling.decode_step_native_source import SOURCE as STEP_SOURCE
from dijiang.modeling.linear_attention_native import native_is_usable

needs_compiler = pytest.mark.skipif(native_build.find_compiler() is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("DIJIANG_NATIVE", raising=False)
    yield
    native_build.find_or_build.cache_clear()


def test_off_by_environment(monkeypatch):
    monkeypatch.setenv("DIJIANG_NATIVE", "0")
    usable, reason = native_is_usable()
    assert not usable and "DIJIANG_NATIVE=0" in reason


def test_without_a_compiler(monkeypatch, tmp_path):
    native_build.find_or_build.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    usable, reason = native_is_usable()
    assert not usable and "no C compiler" in reason and "\n" not in reason


def test_a_compiler_that_fails(monkeypatch, tmp_path):
    native_build.find_or_build.cache_clear()
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'error: out of order' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    usable, reason = native_is_usable()
    assert not usable and "out of order" in reason and "\n" not in reason
    assert not list((tmp_path / "dijiang").iterdir())


@needs_compiler
def test_a_cache_that_is_not_writable(monkeypatch, tmp_path):
    native_build.find_or_build.cache_clear()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(native_build.tempfile, "tempdir", str(tmp_path))
    assert native_is_usable() == (True, "")


@needs_compiler
def test_two_processes_may_compile_at_once(tmp_path):
    code = (
        "from dijiang.modeling.linear_attention_native import native_is_usable\n"
        "assert native_is_usable() == (True, ''), native_is_usable()\n"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=tmp_path) for _ in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert [path.suffix for path in (tmp_path / "dijiang").iterdir()] == [".so"]


@needs_compiler
def test_a_library_is_built_once_per_source_and_processor(monkeypatch, tmp_path):
    compiler, source = native_build.find_compiler(), "int answer(void) { return 42; }"
    for flags in (native_build.FLAGS, native_build.FLAGS + native_build.REORDERED_SUMS):
        assert native_build.build(source, compiler, flags, tmp_path).answer() == 42
    built = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    native_build.build(source, compiler, native_build.FLAGS, tmp_path)
    assert len(built) == 2 and built == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    monkeypatch.setattr(native_build, "describe_processor", lambda: "another")
    native_build.build(source, compiler, native_build.FLAGS, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@needs_compiler
def test_native_code_leaves_the_rounding_of_tiny_numbers_alone():
    assert native_is_usable()[0] and native_build.load_library(STEP_SOURCE, reordered_sums=True)[0]
    tiny = torch.tensor([1e-39])  # a subnormal number, which -ffast-math would flush to zero in the whole process
    assert (tiny * 1.0).item() > 0
