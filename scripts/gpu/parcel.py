"""
Split a folder into parts that can be carried one at a time, and join them again where they arrive.

    python scripts/gpu/parcel.py split FOLDER OUTPUT [--first wheels corpus/held weights]
    python scripts/gpu/parcel.py join PARTS_FOLDER... TARGET

`split` writes OUTPUT/part-01.bin and so on, each of at most 45 MB, and OUTPUT/manifest.json with the SHA-256 of every part and
every file. What compresses is compressed. Same files, same bytes.

`join` may be called as often as parts arrive, the first time with manifest.json in one of the folders. It checks each part,
keeps it in TARGET/.parts, writes each file whose parts are all there, and says what is missing. It exits with 0 when parts are
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
PIECE = 8_000_000  # bytes of a file compressed at a time: pieces are packed and unpacked in parallel
WORTH = 0.98  # a piece is stored compressed if it comes to less than this share
MANIFEST = "manifest.json"
# positions in a word of four bytes tell most in tokens (2 bytes) and in quantized weights (blocks of 20 or 34 bytes)
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": PIECE, "lc": 2, "lp": 2, "pb": 2}]


class Damaged(Exception):
    """What arrived is not what was sent."""


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def ordered(folder: Path, first: list[str]) -> list[Path]:
    """Files of a folder: those below the first of `first`, then those below the second and so on, then the others by path."""

    def rank(path: Path) -> tuple[int, int, str]:
        name = path.relative_to(folder).as_posix()
        places = [place for place, prefix in enumerate(first) if name == prefix or name.startswith(f"{prefix}/")]
        return (min(places, default=len(first)), path.stat().st_size > PIECE, name)

    return sorted((path for path in folder.rglob("*") if path.is_file()), key=rank)


def packed(path: Path, offset: int, cache: Path | None) -> tuple[str, bytes]:
    """A piece of a file as it is stored, and how: xz, or plain where that is hardly longer."""
    with open(path, "rb") as file:
        file.seek(offset)
        piece = file.read(PIECE)
    known = cache / f"{sha256(piece + repr(XZ).encode())}.xz" if cache else None
    if known and known.is_file():
        compressed = known.read_bytes()
    else:
        compressed = lzma.compress(piece, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=XZ)
        if known:
            write_whole(known, compressed)
    return ("xz", compressed) if len(compressed) < WORTH * len(piece) else ("plain", piece)


def split(folder: Path, output: Path, first: list[str], *, limit: int = LIMIT, cache: Path | None = None) -> dict:
    """
    Write the parts and the manifest; parts of an earlier parcel in `output` are removed.

    Returns:
        The manifest.
    """
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
                slices, done = [], 0
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
    """
    The manifest in the folders.

    Raises:
        Damaged: if none is there, two differ, or it is not one of ours.
    """
    found = {path.read_bytes() for folder in folders if (path := folder / MANIFEST).is_file()}
    if not found:
        raise Damaged(f"no {MANIFEST} in {' or '.join(map(str, folders))}; bring it along with the first part")
    if len(found) > 1:
        raise Damaged(f"the folders hold different files {MANIFEST}; they are of different parcels, so bring all parts of one")
    try:
        manifest = json.loads(found.pop())
        assert manifest["format"] == FORMAT and manifest["parts"] and manifest["files"]
        for file in manifest["files"]:
            path = Path(file["path"])
            assert not path.is_absolute() and ".." not in path.parts and path.parts[0] != ".parts"
    except (ValueError, KeyError, TypeError, AssertionError):
        raise Damaged(f"{MANIFEST} is damaged or of another version of this script; bring it again") from None
    return manifest


def take_parts(manifest: dict, needed: set[int], folders: list[Path], store: Path) -> dict[int, Path]:
    """
    By number, the needed parts that are here; new ones are checked and put into `store`.

    Raises:
        Damaged: if a part's hash is not the manifest's.
    """
    here = {}
    for number in sorted(needed):
        part = manifest["parts"][number]
        kept = store / part["sha256"]
        if kept.is_file() and file_sha256(kept) == part["sha256"]:
            here[number] = kept
            continue
        for path in (folder / part["name"] for folder in folders):
            if not path.is_file():
                continue
            found = path.read_bytes()
            if sha256(found) != part["sha256"]:
                raise Damaged(
                    f"{path} is damaged: {len(found):,} bytes with SHA-256 {sha256(found)[:16]}..., expected "
                    f"{part['bytes']:,} bytes with {part['sha256'][:16]}...; bring it again"
                )
            write_whole(kept, found)
            here[number] = kept
            break
    return here


def unpacked(piece: dict, here: dict[int, Path]) -> bytes:
    stored = b""
    for part in piece["slices"]:
        with open(here[part["part"]], "rb") as file:
            file.seek(part["offset"])
            stored += file.read(part["bytes"])
    return lzma.decompress(stored) if piece["codec"] == "xz" else stored


def join(folders: list[Path], target: Path) -> list[str]:
    """
    Join what has arrived.

    Returns:
        Names of the parts that are missing.

    Raises:
        Damaged: if a part or a file is not what the manifest says.
    """
    store = target / ".parts"
    manifest = read_manifest(folders if any((folder / MANIFEST).is_file() for folder in folders) else [*folders, store])
    write_whole(store / MANIFEST, manifest_bytes(manifest))
    done = [file for file in manifest["files"] if is_joined(file, target)]
    rest = [file for file in manifest["files"] if file not in done]
    needed = {part["part"] for file in rest for piece in file["pieces"] for part in piece["slices"]}
    here = take_parts(manifest, needed, folders, store)
    with ProcessPoolExecutor() as pool:
        for file in rest:
            if all(part["part"] in here for piece in file["pieces"] for part in piece["slices"]):
                pieces = list(pool.map(unpacked, file["pieces"], [here] * len(file["pieces"])))
                content = b"".join(pieces)
                if sha256(content) != file["sha256"]:
                    raise Damaged(
                        f"{file['path']} came out with a wrong SHA-256 though its parts are right; make the parcel again"
                    )
                write_whole(target / file["path"], content)
                done.append(file)
    missing = [manifest["parts"][number]["name"] for number in sorted(needed - here.keys())]
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
    """Print what each part holds, by folder."""
    for number, part in enumerate(manifest["parts"]):
        folders: dict[str, int] = {}
        for file in manifest["files"]:
            if any(where["part"] == number for piece in file["pieces"] for where in piece["slices"]):
                folder = Path(file["path"]).parent.as_posix()
                folders[folder] = folders.get(folder, 0) + 1
        held = ", ".join(f"{folder} ({count})" for folder, count in folders.items())
        print(f"{part['name']}  {part['bytes'] / 1e6:5.1f} MB  {part['sha256'][:16]}  {held}")


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
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "split":
            report(split(chosen.folder, chosen.output, chosen.first))
        else:
            join(chosen.folders, chosen.target)
    except (Damaged, ValueError, OSError) as error:
        print(f"parcel: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
