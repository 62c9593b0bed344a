"""
The approximation study: the error of untrained and of fitted feature maps for exp(q.k) against the number of features m
(claims of arXiv 2403.19928, section 3), on Gaussian inputs and on a real model's queries and keys.
"""

import json
import platform
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dijiang.checkpoint.provenance import public_name, versions
from dijiang.common.machine import own_command
from dijiang.common.outputs import refuse_taken_file, write_whole

from ..report.style import refuse_missing_packages
from . import report as kernel_report
from .inputs import Case, InputSet, gaussian_inputs, normal_radius_limit, real_inputs
from .maps import FITS, MAPS, WEIGHTED, estimate, features, normal_equations, squared_error

GAUSSIANS = ((0.5, 4), (0.5, 64), (1.0, 64), (2.0, 64), (4.0, 64))  # norm of q and k, head size
RESAMPLES = 2000
TAIL = 4  # sizes that the slope at the large end is fitted to


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelStudyConfig:
    """
    Settings of the study.

    Attributes:
        features: numbers of features m.
        most_weighted: weights are fitted for m up to this.
        seeds: random states of each map, 0 to seeds - 1.
        pairs: Gaussian queries, and as many keys.
        tokens: of the block of text that real queries and keys are measured on, and of the one before it, for calibration.
        query_every: of the real queries, each so-manieth is taken.
        heads: real heads, each of another layer.
    """

    features: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    most_weighted: int = 512
    seeds: int = 8
    pairs: int = 256
    tokens: int = 512
    query_every: int = 4
    heads: int = 6

    def __post_init__(self) -> None:
        if wrong := [m for m in self.features if m < 1]:
            raise ValueError(f"features={wrong[0]} must be at least 1")
        if list(self.features) != sorted(set(self.features)) or len(self.features) < 2:
            raise ValueError("a slope needs at least two numbers of features, each once and in rising order; mend features")
        if self.seeds < 2:
            raise ValueError(f"seeds={self.seeds} must be at least 2, or no band can be given")


QUICK = KernelStudyConfig(features=(16, 32, 64), most_weighted=32, seeds=2, pairs=32, tokens=64, heads=2)


def run_kernel_study(
    source: str | Path,
    text: Path,
    *,
    output: Path | None = None,
    plot: Path | None = None,
    config: KernelStudyConfig | None = None,
    progress: bool = True,
) -> dict:
    """
    Run the study.

    Args:
        source: the softmax model whose queries and keys are taken, as for `convert_model`.
        text: UTF-8 text to run it on.
        output, plot: new files for the results (JSON) and for their plot (PNG); default none.
        config: default `KernelStudyConfig()`.
        progress: show a progress bar on stderr and the slopes on stdout.

    Returns:
        What `output` holds.

    Raises:
        ValueError: if a file exists already, or source or text do not allow it.
    """
    started = time.perf_counter()
    config = config or KernelStudyConfig()
    for path in filter(None, (output, plot)):
        refuse_taken_file(path)
    if plot:
        refuse_missing_packages("matplotlib")
    sets = [gaussian_inputs(norm, d, config.pairs) for norm, d in GAUSSIANS]
    sets += real_inputs(source, text, tokens=config.tokens, query_every=config.query_every, heads=config.heads)
    errors = measure(sets, config, progress=progress)
    result = {
        "command": own_command(),
        "source": public_name(source),
        "text": text.name,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": versions() | {name: version(name) for name in ("numpy", "scipy")},
        "settings": asdict(config),
        "limits": {inputs.name: limits(inputs) for inputs in sets},
        **summary(config, errors),
        "seconds": round(time.perf_counter() - started, 1),
    }
    if progress:
        kernel_report.show(result)
    if plot:
        write_whole(plot, lambda draft: kernel_report.plot(result, draft))
    if output:
        write_whole(output, lambda draft: draft.write_text(json_text(result), encoding="utf-8"))
    return result


def measure(sets: list[InputSet], config: KernelStudyConfig, *, progress: bool = True) -> dict[tuple, np.ndarray]:
    """
    Errors by (inputs, map, weights, metric), (seeds, sizes), the geometric mean over an input set's cases. The metrics are
    those of `Case.errors` and, for m up to `most_weighted`, `calibration`: the rmse on the pairs that weights are fitted to.
    """
    found = defaultdict(lambda: [[] for _ in range(config.seeds)])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("Features", total=len(MAPS) * config.seeds * sum(config.features))
        for name, frequencies in MAPS.items():
            for seed in range(config.seeds):
                for m in config.features:
                    fits = FITS if name in WEIGHTED and m <= config.most_weighted else {}
                    omegas = {d: frequencies(m, d, seed) for d in {inputs.head_dim for inputs in sets}}
                    for inputs in sets:
                        for (weights, metric), error in set_errors(inputs, omegas[inputs.head_dim], fits).items():
                            found[inputs.name, name, weights, metric][seed].append(error)
                    bar.advance(task, m)
    return {key: np.array(values) for key, values in found.items()}


def set_errors(inputs: InputSet, omega: np.ndarray, fits: dict) -> dict[tuple[str, str], float]:
    """Errors of omega (m, d) by (weights, metric), the geometric mean over the cases."""
    found = defaultdict(list)
    for case, calibration in zip(inputs.cases, inputs.calibration, strict=True):
        for weights, errors in case_errors(case, calibration, omega, fits).items():
            for metric, error in errors.items():
                found[weights, metric].append(error)
    return {key: geometric_mean(values) for key, values in found.items()}


def case_errors(case: Case, calibration: Case, omega: np.ndarray, fits: dict) -> dict[str, dict[str, float]]:
    """Errors of omega (m, d) on `case` by weights: equal ones and those that each of `fits` finds on `calibration`."""
    candidates = {"equal": np.full(len(omega), 1 / len(omega))}
    if fits:
        phi_q, phi_k = features(calibration.q, omega, -calibration.log_sum), features(calibration.k, omega)
        equations = normal_equations(phi_q, phi_k, calibration.kernel)
        candidates |= {weights: fit(*equations) for weights, fit in fits.items()}
    found = {}
    for weights, values in candidates.items():
        found[weights] = case.errors(estimate(case.q, case.k, omega, values, -case.log_sum))
        if fits:
            found[weights]["calibration"] = squared_error(*equations, values) ** 0.5
    return found


def limits(inputs: InputSet) -> dict[str, float]:
    """What no number of features mends: errors of the maps' limits, of the plain mean over keys, and facts on the inputs."""
    cases = inputs.cases
    found = {
        "query_norm": np.mean([np.linalg.norm(case.q, axis=1).mean() for case in cases]),
        "key_norm": np.mean([np.linalg.norm(case.k, axis=1).mean() for case in cases]),
        "largest_score": max((case.q @ case.k.T).max() for case in cases),
    }
    normal = [case.errors(normal_radius_limit(case)) for case in cases]
    found |= {f"normal_{metric}": geometric_mean(errors[metric] for errors in normal) for metric in normal[0]}
    if cases[0].v is not None:
        found["exact_attention_dropped"] = geometric_mean(case.errors(case.kernel)["attention_dropped"] for case in cases)
        found["plain_mean_attention"] = geometric_mean(case.plain_mean() for case in cases)
        found["key_weights_attention"] = geometric_mean(case.key_weights_alone() for case in cases)
    return {name: significant(value) for name, value in found.items()}


def fit_slopes(features: Iterable[int], errors: np.ndarray) -> np.ndarray:
    """Least-squares slopes of log(error) against log(m), (seeds,), for errors (seeds, sizes)."""
    x = np.log(np.array(features, dtype=float))
    x = x - x.mean()
    return np.log(errors) @ x / (x @ x)


def band(values: np.ndarray) -> list[float]:
    """Mean over seeds of values (seeds,) and the 95 % band of that mean, by the bootstrap."""
    picks = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    return [float(values.mean()), *np.percentile(values[picks].mean(1), (2.5, 97.5)).tolist()]


def log_band(values: np.ndarray) -> list[float]:
    """Geometric mean of positive values (seeds,) and its band."""
    return [float(f"{x:.3g}") for x in np.exp(band(np.log(values)))]


def geometric_mean(values: Iterable[float]) -> float:
    return float(np.exp(np.mean(np.log(list(values)))))


def significant(value: float) -> float:
    return float(f"{value:.4g}")


def summary(config: KernelStudyConfig, errors: dict[tuple, np.ndarray]) -> dict[str, list[dict]]:
    """
    Of what `measure` found, each as [mean, low, high] over seeds: `rows`, the errors at each m; `slopes` of log(error) against
    log(m), over all sizes and over the largest four; `ratios` of the errors of two maps with the same seeds, at one m.
    """
    rows, slopes, ratios = [], [], []
    for inputs, name, weights in dict.fromkeys(key[:3] for key in errors):
        label = {"inputs": inputs, "map": name, "weights": weights}
        found = {key[3]: values for key, values in errors.items() if key[:3] == (inputs, name, weights)}
        for i in range(found["rmse"].shape[1]):
            values = {metric: log_band(x[:, i]) for metric, x in found.items() if i < x.shape[1]}
            rows.append(label | {"m": config.features[i]} | values)
        for metric in ("rmse", "attention"):
            sizes = config.features[: found["rmse"].shape[1]] if metric in found else ()
            for first in sorted({0, max(len(sizes) - TAIL, 0)}):
                if len(sizes) - first > 1:
                    slope = [round(x, 3) for x in band(fit_slopes(sizes[first:], found[metric][:, first:]))]
                    slopes.append(label | {"metric": metric, "from": sizes[first], "to": sizes[-1], "slope": slope})
    for (inputs, name, weights, metric), over in errors.items():
        if metric not in ("rmse", "attention", "calibration"):
            continue
        for other, other_weights in rivals(name, weights):
            if metric == "calibration" and name != other:
                continue
            under = errors[inputs, other, other_weights, metric][:, : over.shape[1]]
            i = under.shape[1] - 1
            pair = {"over": [name, weights], "under": [other, other_weights]}
            ratio = {"ratio": log_band(over[:, i] / under[:, i]), "largest": significant((over / under).max())}
            ratios.append({"inputs": inputs, "metric": metric, "m": config.features[i]} | pair | ratio)
    return {"rows": rows, "slopes": slopes, "ratios": ratios}


def rivals(name: str, weights: str) -> list[tuple[str, str]]:
    """(map, weights) to set a map against: fitted weights against equal ones, WDCF against WPFF, the others against PRF."""
    found = [] if weights == "equal" else [(name, "equal")]
    if name.startswith("wdcf"):
        found.append((name.replace("wdcf", "pff-sobol"), weights))
    elif weights == "equal" and name != "prf":
        found.append(("prf", "equal"))
    return found


def json_text(result: dict) -> str:
    """JSON with one line for each entry, and for each record of a list."""
    parts = []
    for key, value in result.items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join(f"    {json.dumps(item)}" for item in value) + "\n  ]"
        else:
            text = json.dumps(value)
        parts.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
