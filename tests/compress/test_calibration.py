"""Calibration sequences: from every file, side by side, by seed."""

from dijiang.compress.calibration import calibration_blocks


def test_calibration_blocks(tokenizer, tmp_path):
    for name, words in (("a", 900), ("b", 300), ("short", 5)):
        (tmp_path / name).write_text(" ".join(f"{name}{i}" for i in range(words)))
    texts = [tmp_path / name for name in ("a", "b", "short")]
    streams = [tokenizer(path.read_text(), add_special_tokens=False)["input_ids"] for path in texts]

    def places(samples, seed):
        """(file, start) of each block; none is in two places."""
        found = []
        for block in calibration_blocks(tokenizer, texts, samples=samples, length=50, seed=seed).tolist():
            hits = [(f, i) for f, ids in enumerate(streams) for i in range(len(ids) - 49) if ids[i : i + 50] == block]
            assert len(hits) == 1
            found += hits
        return found

    enough = places(20, 0)
    assert all(abs(i - j) >= 50 for n, (f, i) in enumerate(enough) for g, j in enough[:n] if f == g)
    assert {file for file, _ in enough} == {0, 1} and places(20, 0) == enough != places(20, 1)
    assert len(set(places(300, 0))) > 200  # more than there is side by side
