"""
The feature map study: the error of untrained and of fitted feature maps for exp(q.k) against the number of features m
(claims of arXiv 2403.19928, section 3), on Gaussian inputs and on a real model's queries and keys.
"""

import json
import platform
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from dijiang.checkpoint.provenance import public_name, versions
from dijiang.common.machine import own_command
from dijiang.common.outputs import refuse_taken_file, write_text_whole, write_whole
from dijiang.common.progress import progress_bar

from ..report.style import refuse_missing_packages
from . import report
from .config import FeatureMapStudyConfig
from .inputs import Case, InputSet, gaussian_inputs, normal_radius_limit, real_inputs
from .maps import FITS, MAPS, WEIGHTED, estimate, features, normal_equations, squared_error

GAUSSIANS = ((0.5, 4), (0.5, 64), (1.0, 64), (2.0, 64), (4.0, 64))  # norm of q and k, head size
RESAMPLES = 2000
TAIL = 4  # number of sizes at the large end that a second slope is fitted to


def run_feature_map_study(
    source: str | Path,
    text: Path,
    *,
    output: Path | None = None,
    plot: Path | None = None,
    config: FeatureMapStudyConfig | None = None,
    progress: bool = True,
) -> dict:
    """
    Run the study.

    Args:
        source: the softmax model whose queries and keys are used, as for `convert_model`.
        text: UTF-8 text to run it on.
        output: new JSON file for the result.
        plot: new PNG file for its plot.
        config: default `FeatureMapStudyConfig()`.
        progress: show a progress bar on stderr and the slopes on stdout.

    Returns:
        The content of `output`.

    Raises:
        ValueError: if a file exists already, the source cannot be loaded, or the text is too short.
    """
    started = time.perf_counter()
    config = config or FeatureMapStudyConfig()
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
        report.show(result)
    if plot:
        write_whole(plot, lambda draft: report.plot(result, draft))
    if output:
        write_text_whole(output, json_text(result))
    return result


def measure(sets: list[InputSet], config: FeatureMapStudyConfig, *, progress: bool = True) -> dict[tuple, np.ndarray]:
    """
    Errors (seeds, sizes) by (inputs, map, weights, metric), geometric means over an input set's cases. The metrics are those
    of `Case.errors` and, for m up to `most_weighted`, `calibration`: the rmse on the pairs that weights are fitted to.
    """
    errors = defaultdict(lambda: [[] for _ in range(config.seeds)])
    with progress_bar("Features", len(MAPS) * config.seeds * sum(config.features), shown=progress, unit="items") as advance:
        for name, frequencies in MAPS.items():
            for seed in range(config.seeds):
                for m in config.features:
                    fits = FITS if name in WEIGHTED and m <= config.most_weighted else {}
                    omegas = {d: frequencies(m, d, seed) for d in {inputs.head_dim for inputs in sets}}
                    for inputs in sets:
                        for (weights, metric), error in set_errors(inputs, omegas[inputs.head_dim], fits).items():
                            errors[inputs.name, name, weights, metric][seed].append(error)
                    advance(m)
    return {key: np.array(values) for key, values in errors.items()}


def set_errors(inputs: InputSet, omega: np.ndarray, fits: dict) -> dict[tuple[str, str], float]:
    """Errors of omega (m, d) by (weights, metric), geometric means over the cases."""
    by_case = defaultdict(list)
    for case, calibration in zip(inputs.cases, inputs.calibration, strict=True):
        for weights, errors in case_errors(case, calibration, omega, fits).items():
            for metric, error in errors.items():
                by_case[weights, metric].append(error)
    return {key: geometric_mean(values) for key, values in by_case.items()}


def case_errors(case: Case, calibration: Case, omega: np.ndarray, fits: dict) -> dict[str, dict[str, float]]:
    """Errors of omega (m, d) on `case`, by weights: equal ones and those that each of `fits` fits to `calibration`."""
    candidates = {"equal": np.full(len(omega), 1 / len(omega))}
    if fits:
        phi_q, phi_k = features(calibration.q, omega, -calibration.log_sum), features(calibration.k, omega)
        equations = normal_equations(phi_q, phi_k, calibration.kernel)
        candidates |= {weights: fit(*equations) for weights, fit in fits.items()}
    by_weights = {}
    for weights, values in candidates.items():
        by_weights[weights] = case.errors(estimate(case.q, case.k, omega, values, -case.log_sum))
        if fits:
            by_weights[weights]["calibration"] = squared_error(*equations, values) ** 0.5
    return by_weights


def limits(inputs: InputSet) -> dict[str, float]:
    """Errors that remain with any number of features, of the maps' limits and of simple baselines, and facts on the inputs."""
    cases = inputs.cases
    values = {
        "query_norm": np.mean([np.linalg.norm(case.q, axis=1).mean() for case in cases]),
        "key_norm": np.mean([np.linalg.norm(case.k, axis=1).mean() for case in cases]),
        "largest_score": max((case.q @ case.k.T).max() for case in cases),
    }
    normal = [case.errors(normal_radius_limit(case)) for case in cases]
    values |= {f"normal_{metric}": geometric_mean(errors[metric] for errors in normal) for metric in normal[0]}
    if cases[0].v is not None:
        values["exact_attention_dropped"] = geometric_mean(case.errors(case.kernel)["attention_dropped"] for case in cases)
        values["plain_mean_attention"] = geometric_mean(case.plain_mean() for case in cases)
        values["key_weights_attention"] = geometric_mean(case.key_weights_alone() for case in cases)
    return {name: significant(value) for name, value in values.items()}


def fit_slopes(features: Iterable[int], errors: np.ndarray) -> np.ndarray:
    """Least-squares slopes of log(error) against log(m), (seeds,), for errors (seeds, sizes)."""
    x = np.log(np.array(features, dtype=float))
    x = x - x.mean()
    return np.log(errors) @ x / (x @ x)


def band(values: np.ndarray) -> list[float]:
    """Mean of values (seeds,) and the 95 % band of that mean, by the bootstrap."""
    picks = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    return [float(values.mean()), *np.percentile(values[picks].mean(1), (2.5, 97.5)).tolist()]


def log_band(values: np.ndarray) -> list[float]:
    """Geometric mean of positive values (seeds,) and its band."""
    return [float(f"{x:.3g}") for x in np.exp(band(np.log(values)))]


def geometric_mean(values: Iterable[float]) -> float:
    return float(np.exp(np.mean(np.log(list(values)))))


def significant(value: float) -> float:
    return float(f"{value:.4g}")


def summary(config: FeatureMapStudyConfig, errors: dict[tuple, np.ndarray]) -> dict[str, list[dict]]:
    """
    Means over seeds of what `measure` returns, as [mean, low, high]: `rows`, the errors at each m; `slopes` of log(error)
    against log(m), over all sizes and over the largest four; `ratios` of the errors of two maps with the same seeds at one m.
    """
    rows = []
    slopes = []
    ratios = []
    for inputs, name, weights in dict.fromkeys(key[:3] for key in errors):
        label = {"inputs": inputs, "map": name, "weights": weights}
        by_metric = {key[3]: values for key, values in errors.items() if key[:3] == (inputs, name, weights)}
        for i in range(by_metric["rmse"].shape[1]):
            bands = {metric: log_band(x[:, i]) for metric, x in by_metric.items() if i < x.shape[1]}
            rows.append(label | {"m": config.features[i]} | bands)
        for metric in ("rmse", "attention"):
            sizes = config.features[: by_metric["rmse"].shape[1]] if metric in by_metric else ()
            for first in sorted({0, max(len(sizes) - TAIL, 0)}):
                if len(sizes) - first > 1:
                    slope = [round(x, 3) for x in band(fit_slopes(sizes[first:], by_metric[metric][:, first:]))]
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
    """The (map, weights) to compare a map with: equal weights for fitted ones, WPFF for WDCF, PRF for the others."""
    others = [] if weights == "equal" else [(name, "equal")]
    if name.startswith("wdcf"):
        others.append((name.replace("wdcf", "pff-sobol"), weights))
    elif weights == "equal" and name != "prf":
        others.append(("prf", "equal"))
    return others


def json_text(result: dict) -> str:
    """JSON with one line per entry and per record of a list."""
    parts = []
    for key, value in result.items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join(f"    {json.dumps(item)}" for item in value) + "\n  ]"
        else:
            text = json.dumps(value)
        parts.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
