"""Calibration sequences: from every file, without overlap, by seed."""

from dijiang.compress.calibration import calibration_blocks


def test_calibration_blocks(tokenizer, tmp_path):
    for name, words in (("a", 900), ("b", 300), ("short", 5)):
        (tmp_path / name).write_text(" ".join(f"{name}{i}" for i in range(words)))
    texts = [tmp_path / name for name in ("a", "b", "short")]
    streams = [tokenizer(path.read_text(), add_special_tokens=False)["input_ids"] for path in texts]

    def positions(samples, seed):
        """(file, start) of each block; none occurs twice."""
        starts = []
        for block in calibration_blocks(tokenizer, texts, samples=samples, length=50, seed=seed).tolist():
            hits = [(f, i) for f, ids in enumerate(streams) for i in range(len(ids) - 49) if ids[i : i + 50] == block]
            assert len(hits) == 1
            starts += hits
        return starts

    enough = positions(20, 0)
    assert all(abs(i - j) >= 50 for n, (f, i) in enumerate(enough) for g, j in enough[:n] if f == g)
    assert {file for file, _ in enough} == {0, 1} and positions(20, 0) == enough != positions(20, 1)
    assert len(set(positions(300, 0))) > 200  # more than fit without overlap
