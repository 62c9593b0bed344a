"""The report is drawn from its JSON: every cell of the tables, and plots that are pictures."""

import json

import pytest
from matplotlib.image import imread

from dijiang.evaluate import report

MADE_UP = {
    "source": "Tiny-1M",
    "command": "dijiang demo --output out",
    "perplexity": {
        "teacher": 20.0,
        "window_sinks": 30.0,
        "linear_only_converted": 123456.789,
        "converted": 30.004,
        "linear_only_distilled": 1234.5,
        "window_only_distilled": 29.125,
        "aligned": 28.25,
        "distilled": 27.5,
    },
    "tokens": 147456,
    "held_out": {"tokens": 16384, "block_size": 1024},
    "align": {"tokens": 98304, "seconds": 200.4},
    "distill": {"tokens": 49152, "seconds": 99.5001},
    "decode": {
        "1024": {
            "teacher": {"tokens_per_second": 30.04, "cache_bytes": 23 * 2**20},
            "student": {"tokens_per_second": 25.96, "cache_bytes": 3.25 * 2**20},
        },
        "16384": {
            "teacher": {"tokens_per_second": 9.95, "cache_bytes": 2**31},
            "student": {"tokens_per_second": 26.0, "cache_bytes": 3.25 * 2**20},
        },
    },
    "sample": {"prompt": "Once\nupon", "teacher": " a time", "student": " a 'mouse'"},
    "reload_max_abs_diff": 3.05e-06,
    "dtype": "float32",
    "threads": 2,
    "peak_memory_bytes": 3.5 * 2**30,
    "seconds": 431.6,
    "versions": {"python": "3.11.9", "torch": "2.13.0"},
}
QUALITY = [
    ("teacher (softmax attention)", "20.00", "0"),
    ("window + sinks only, no training", "30.00", "0"),
    ("DiJiang, converted", "30.00", "0"),
    ("DiJiang, aligned", "28.25", "98,304"),
    ("DiJiang, aligned and distilled", "27.50", "147,456"),
    ("window + sinks only, distilled", "29.12", "147,456"),
    ("linear branch alone, converted", "123,456.79", "0"),
    ("linear branch alone, distilled", "1,234.50", "147,456"),
]
DECODE = [
    ("1,024", "30.0", "26.0", "23.0 MiB", "3.2 MiB"),
    ("16,384", "9.9", "26.0", "2,048.0 MiB", "3.2 MiB"),
]
PAGE = """\
# Tiny-1M: DiJiang beside its teacher

Perplexity on 16,384 held-out tokens in blocks of 1024. Attention transfer on 98,304 tokens (200 s) and \
distillation on 49,152 tokens (100 s) win back 25% of what window + sinks loses against the teacher. Window + sinks of the \
distilled model without its linear branch shows how much of that the branch carries.

| | perplexity | tokens trained on |
| --- | ---: | ---: |
| teacher (softmax attention) | 20.00 | 0 |
| window + sinks only, no training | 30.00 | 0 |
| DiJiang, converted | 30.00 | 0 |
| DiJiang, aligned | 28.25 | 98,304 |
| DiJiang, aligned and distilled | 27.50 | 147,456 |
| window + sinks only, distilled | 29.12 | 147,456 |
| linear branch alone, converted | 123,456.79 | 0 |
| linear branch alone, distilled | 1,234.50 | 147,456 |

Decoding one sequence, one token a step, after a context of so many tokens; cache and state in bytes of all layers.

| context | teacher tokens/s | DiJiang tokens/s | teacher cache | DiJiang state |
| --- | ---: | ---: | ---: | ---: |
| 1,024 | 30.0 | 26.0 | 23.0 MiB | 3.2 MiB |
| 16,384 | 9.9 | 26.0 | 2,048.0 MiB | 3.2 MiB |

![Perplexity](perplexity.png) ![Decoding](decode.png)

The checkpoint in `model/` was loaded by a fresh process that cannot import `dijiang`; its logits differ from this \
process's by at most 3.1e-06.

Sample, greedy. Prompt: 'Once\\nupon'

* teacher: ' a time' * DiJiang: " a 'mouse'"

Made by `dijiang demo --output out` in 432 s with 2 CPU threads, float32, peak memory 3.5 GiB; python 3.11.9, torch 2.13.0.
"""


def unwrapped(text: str) -> str:
    """Paragraphs on one line each, tables as they are: where prose breaks is no matter."""
    paragraphs = text.replace("|  |", "| |").strip().split("\n\n")
    return "\n\n".join(p if p.startswith("|") else " ".join(p.split()) for p in paragraphs)


def test_rows_are_the_numbers_of_the_json():
    assert report.quality_rows(MADE_UP) == QUALITY
    assert report.decode_rows(MADE_UP) == DECODE
    assert {len(row) for row in QUALITY} == {len(report.QUALITY_HEADER)}
    assert {len(row) for row in DECODE} == {len(report.DECODE_HEADER)}


def test_the_page_word_by_word():
    assert unwrapped(report.markdown(json.loads(json.dumps(MADE_UP)))) == unwrapped(PAGE)
    assert max(map(len, report.markdown(MADE_UP).splitlines())) < 140


@pytest.mark.parametrize(("distilled", "share"), [(20.0, 1.0), (30.0, 0.0), (27.5, 0.25), (19.0, 1.1), (35.0, -0.5)])
def test_recovered_share_is_of_what_the_window_loses(distilled, share):
    perplexity = MADE_UP["perplexity"] | {"distilled": distilled}
    assert report.recovered_share(perplexity) == pytest.approx(share)


def test_markdown_tables_align_numbers_to_the_right():
    table = report.markdown_table(("what", "n"), [("a", "1"), ("b", "2")])
    assert table == "| what | n |\n| --- | ---: |\n| a | 1 |\n| b | 2 |"


def test_plots_are_pictures_that_follow_the_numbers(tmp_path):
    paths = report.plot(MADE_UP, tmp_path)
    assert paths == [tmp_path / "perplexity.png", tmp_path / "decode.png"] and sorted(paths, key=str) == sorted(
        tmp_path.iterdir()
    )
    pictures = [imread(path) for path in paths]
    assert [picture.shape[:2] for picture in pictures] == [(540, 1050), (450, 1200)]  # inches times 150 dots
    assert all(picture.std() > 0.05 and path.stat().st_size > 5_000 for picture, path in zip(pictures, paths, strict=True))

    (tmp_path / "other").mkdir()
    changed = MADE_UP | {"perplexity": MADE_UP["perplexity"] | {"window_only_distilled": 21.0}}
    same_decode, moved = (imread(path) for path in reversed(report.plot(changed, tmp_path / "other")))
    assert (same_decode == pictures[1]).all() and (moved != pictures[0]).any()


def test_plots_need_no_display_and_leave_no_figure_open(tmp_path, monkeypatch):
    from matplotlib import pyplot

    monkeypatch.delenv("DISPLAY", raising=False)
    report.plot(MADE_UP, tmp_path)
    assert pyplot.get_fignums() == []
