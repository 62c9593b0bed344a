"""
Split a folder into parts that can be carried one at a time, and join them again where they arrive.

    python scripts/gpu/parcel.py split FOLDER OUTPUT [--first wheels corpus/held weights]
    python scripts/gpu/parcel.py join PARTS_FOLDER... TARGET

`split` writes OUTPUT/part-01.bin and so on, each of at most 45 MB, and OUTPUT/manifest.json with the SHA-256 of every part and
every file. Pieces of files are compressed where that makes them smaller. Same files, same bytes.

`join` can be called whenever parts arrive, the first time with manifest.json in one of the folders. It checks each part, keeps
it in TARGET/.parts, writes each file all of whose parts are there, and prints what is missing. It exits with 0 if parts are
missing and with 1 on damage.
"""

import argparse
import hashlib
import json
import lzma
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

FORMAT = 1
LIMIT = 45_000_000  # bytes of a part
PIECE = 8_000_000  # bytes of a file compressed at a time; pieces are packed and unpacked in parallel
WORTH = 0.98  # a piece is stored compressed if it shrinks below this share
MANIFEST = "manifest.json"
# lc, lp, pb: bytes depend on their position modulo four, in tokens (2 bytes) and quantized weights (blocks of 20 or 34 bytes)
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": PIECE, "lc": 2, "lp": 2, "pb": 2}]


class Damaged(Exception):
    """A part or file that is not the one in the manifest."""


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all; with the standard library, since dijiang may not be installed yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def ordered(folder: Path, first: list[str]) -> list[Path]:
    """Files of a folder: those below the first entry of `first`, then those below the second and so on, then the others."""

    def rank(path: Path) -> tuple[int, int, str]:
        name = path.relative_to(folder).as_posix()
        ranks = [rank for rank, prefix in enumerate(first) if name == prefix or name.startswith(f"{prefix}/")]
        return (min(ranks, default=len(first)), path.stat().st_size > PIECE, name)

    return sorted((path for path in folder.rglob("*") if path.is_file()), key=rank)


def packed(path: Path, offset: int, cache: Path | None) -> tuple[str, bytes]:
    """How a piece of a file is stored, `xz`, or `plain` if that is hardly longer, and its stored bytes."""
    with open(path, "rb") as file:
        file.seek(offset)
        piece = file.read(PIECE)
    cached = cache / f"{sha256(piece + repr(XZ).encode())}.xz" if cache else None
    if cached and cached.is_file():
        compressed = cached.read_bytes()
    else:
        compressed = lzma.compress(piece, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=XZ)
        if cached:
            write_whole(cached, compressed)
    return ("xz", compressed) if len(compressed) < WORTH * len(piece) else ("plain", piece)


def split(folder: Path, output: Path, first: list[str], *, limit: int = LIMIT, cache: Path | None = None) -> dict:
    """Write the parts, in the order of `first`, and the manifest, which is returned; an earlier parcel is removed."""
    paths = ordered(folder, first)
    if not paths:
        raise ValueError(f"{folder} holds no files; name the folder to split")
    output.mkdir(parents=True, exist_ok=True)
    for old in (*output.glob("part-*.bin"), *output.glob(MANIFEST)):
        old.unlink()
    parts: list[dict] = []
    buffer = bytearray()

    def close_part() -> None:
        name = f"part-{len(parts) + 1:02d}.bin"
        (output / name).write_bytes(buffer)
        parts.append({"name": name, "bytes": len(buffer), "sha256": sha256(buffer)})
        buffer.clear()

    files = []
    tasks = [(path, offset) for path in paths for offset in range(0, max(path.stat().st_size, 1), PIECE)]
    with ProcessPoolExecutor() as pool:
        stored = pool.map(packed, *zip(*tasks, strict=True), [cache] * len(tasks))
        for path in paths:
            pieces = []
            for _ in range(0, max(path.stat().st_size, 1), PIECE):
                codec, content = next(stored)
                slices = []
                done = 0
                while done < len(content) or not slices:
                    if len(buffer) == limit:
                        close_part()
                    size = min(limit - len(buffer), len(content) - done)
                    slices.append({"part": len(parts), "offset": len(buffer), "bytes": size})
                    buffer += content[done : done + size]
                    done += size
                pieces.append({"codec": codec, "slices": slices})
            name = path.relative_to(folder).as_posix()
            files.append({"path": name, "bytes": path.stat().st_size, "sha256": file_sha256(path), "pieces": pieces})
    close_part()
    manifest = {"format": FORMAT, "parts": parts, "files": files}
    write_whole(output / MANIFEST, manifest_bytes(manifest))
    return manifest


def manifest_bytes(manifest: dict) -> bytes:
    return (json.dumps(manifest, indent=1) + "\n").encode()


def read_manifest(folders: list[Path]) -> dict:
    """The manifest in the folders; Damaged if there is none, two differ, or it has another format."""
    contents = {path.read_bytes() for folder in folders if (path := folder / MANIFEST).is_file()}
    if not contents:
        raise Damaged(f"no {MANIFEST} in {' or '.join(map(str, folders))}; bring it along with the first part")
    if len(contents) > 1:
        raise Damaged(f"the folders hold different files {MANIFEST}; they are of different parcels, so bring all parts of one")
    try:
        manifest = json.loads(contents.pop())
        assert manifest["format"] == FORMAT and manifest["parts"] and manifest["files"]
        for file in manifest["files"]:
            path = Path(file["path"])
            assert not path.is_absolute() and ".." not in path.parts and path.parts[0] != ".parts"
    except (ValueError, KeyError, TypeError, AssertionError):
        raise Damaged(f"{MANIFEST} is damaged or of another version of this script; bring it again") from None
    return manifest


def take_parts(manifest: dict, needed: set[int], folders: list[Path], store: Path) -> dict[int, Path]:
    """
    Paths, by number, of the needed parts that have arrived. New ones are checked and copied into `store`.

    Raises:
        Damaged: if a part's hash is not that in the manifest.
    """
    arrived = {}
    for number in sorted(needed):
        part = manifest["parts"][number]
        stored = store / part["sha256"]
        if stored.is_file() and file_sha256(stored) == part["sha256"]:
            arrived[number] = stored
            continue
        for path in (folder / part["name"] for folder in folders):
            if not path.is_file():
                continue
            content = path.read_bytes()
            if sha256(content) != part["sha256"]:
                raise Damaged(
                    f"{path} is damaged: {len(content):,} bytes with SHA-256 {sha256(content)[:16]}..., expected "
                    f"{part['bytes']:,} bytes with {part['sha256'][:16]}...; bring it again"
                )
            write_whole(stored, content)
            arrived[number] = stored
            break
    return arrived


def unpacked(piece: dict, arrived: dict[int, Path]) -> bytes:
    """The bytes of a piece, from its slices in the parts that have arrived."""
    stored = b""
    for part in piece["slices"]:
        with open(arrived[part["part"]], "rb") as file:
            file.seek(part["offset"])
            stored += file.read(part["bytes"])
    return lzma.decompress(stored) if piece["codec"] == "xz" else stored


def join(folders: list[Path], target: Path) -> list[str]:
    """Write the files whose parts have arrived, and return the names of the missing parts; Damaged if a hash is wrong."""
    store = target / ".parts"
    manifest = read_manifest(folders if any((folder / MANIFEST).is_file() for folder in folders) else [*folders, store])
    write_whole(store / MANIFEST, manifest_bytes(manifest))
    done = [file for file in manifest["files"] if is_joined(file, target)]
    rest = [file for file in manifest["files"] if file not in done]
    needed = {part["part"] for file in rest for piece in file["pieces"] for part in piece["slices"]}
    arrived = take_parts(manifest, needed, folders, store)
    with ProcessPoolExecutor() as pool:
        for file in rest:
            if all(part["part"] in arrived for piece in file["pieces"] for part in piece["slices"]):
                pieces = list(pool.map(unpacked, file["pieces"], [arrived] * len(file["pieces"])))
                content = b"".join(pieces)
                if sha256(content) != file["sha256"]:
                    raise Damaged(
                        f"{file['path']} came out with a wrong SHA-256 though its parts are right; make the parcel again"
                    )
                write_whole(target / file["path"], content)
                done.append(file)
    missing = [manifest["parts"][number]["name"] for number in sorted(needed - arrived.keys())]
    if not missing:
        for part in store.iterdir():
            if part.name != MANIFEST:
                part.unlink()
    print(f"joined {len(done)} of {len(manifest['files'])} files in {target}")
    if missing:
        waiting = sorted({file["path"] for file in manifest["files"] if file not in done})
        print(f"missing: {' '.join(missing)} (for {', '.join(waiting)})")
    return missing


def is_joined(file: dict, target: Path) -> bool:
    path = target / file["path"]
    return path.is_file() and path.stat().st_size == file["bytes"] and file_sha256(path) == file["sha256"]


def report(manifest: dict) -> None:
    """Print the content of each part, by folder."""
    for number, part in enumerate(manifest["parts"]):
        folders: dict[str, int] = {}
        for file in manifest["files"]:
            if number in {piece_slice["part"] for piece in file["pieces"] for piece_slice in piece["slices"]}:
                folder = Path(file["path"]).parent.as_posix()
                folders[folder] = folders.get(folder, 0) + 1
        content = ", ".join(f"{folder} ({count})" for folder, count in folders.items())
        print(f"{part['name']}  {part['bytes'] / 1e6:5.1f} MB  {part['sha256'][:16]}  {content}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("split")
    command.add_argument("folder", type=Path)
    command.add_argument("output", type=Path)
    command.add_argument("--first", nargs="*", default=[], help="what comes first, in this order")
    command = commands.add_parser("join")
    command.add_argument("folders", type=Path, nargs="+")
    command.add_argument("target", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.command == "split":
            report(split(options.folder, options.output, options.first))
        else:
            join(options.folders, options.target)
    except (Damaged, ValueError, OSError) as error:
        print(f"parcel: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
