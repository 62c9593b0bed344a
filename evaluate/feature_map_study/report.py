"""Tables and the plot of the feature map study, from its JSON."""

from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from ..report.tables import markdown_table

Cells = tuple[tuple[str, ...], list[tuple[str, ...]]]  # header and rows


INPUTS = {
    "gaussian-0.5-d4": "d = 4, norm 0.5",
    "gaussian-0.5-d64": "d = 64, norm 0.5",
    "gaussian-1-d64": "d = 64, norm 1",
    "gaussian-2-d64": "d = 64, norm 2",
    "gaussian-4-d64": "d = 64, norm 4",
    "real": "real",
    "centred": "real, centred",
}
MAPS = {
    "prf": "PRF",
    "orf": "orthogonal random",
    "pff-sobol-chi": "PFF Sobol, chi",
    "pff-halton-chi": "PFF Halton, chi",
    "pff-lattice-chi": "PFF lattice, chi",
    "wdcf-chi": "WDCF, chi",
    "pff-sobol-normal": "PFF Sobol, normal",
    "pff-halton-normal": "PFF Halton, normal",
    "pff-lattice-normal": "PFF lattice, normal",
    "wdcf-normal": "WDCF, normal",
}
UNBIASED = [name for name in MAPS if not name.endswith("normal")]
FITTED = {
    "pff-sobol-chi": "WPFF, chi",
    "wdcf-chi": "WDCF, chi",
    "pff-sobol-normal": "WPFF, normal",
    "wdcf-normal": "WDCF, normal",
}
METRIC = {"real": "attention", "centred": "attention"}  # `rmse` for the other inputs
METRIC_TITLES = {"rmse": "relative RMSE of exp(q.k)", "attention": "relative error of attention output"}


def pick(records: list[dict], **wanted) -> dict:
    """The only record with these values."""
    (match,) = (record for record in records if all(record[key] == value for key, value in wanted.items()))
    return match


def with_band(values: list[float], form: str = ".2f") -> str:
    mean, low, high = (format(value, form).replace("-0.00", "0.00") for value in values)
    return f"{mean} ({low} to {high})"


def slopes(result: dict, first: int) -> dict[str, list[list[float]]]:
    """Slopes of equal weights from m = first upwards with their bands, by map and in the order of INPUTS."""
    by_map = {}
    for name in MAPS:
        wanted = {"map": name, "weights": "equal", "from": first}
        by_map[name] = [
            pick(result["slopes"], inputs=inputs, metric=METRIC.get(inputs, "rmse"), **wanted)["slope"] for inputs in INPUTS
        ]
    return by_map


def slope_table(result: dict, first: int) -> Cells:
    """Slopes of equal weights from m = first upwards; for the largest m only of maps whose error still falls."""
    shown = MAPS if first == result["settings"]["features"][0] else UNBIASED
    rows = [(MAPS[name], *map(with_band, values)) for name, values in slopes(result, first).items() if name in shown]
    return (f"slope, m = {first} to {result['settings']['features'][-1]}", *INPUTS.values()), rows


def weight_table(result: dict) -> Cells:
    """Error with fitted weights over that with equal ones, on pairs that the weights were not fitted to."""
    rows = []
    for inputs, title in INPUTS.items():
        for fit in ("nnls", "learnt"):
            pairs = [{"over": [name, fit], "under": [name, "equal"], "metric": "rmse"} for name in FITTED]
            cells = [with_band(pick(result["ratios"], inputs=inputs, **pair)["ratio"]) for pair in pairs]
            rows.append((f"{title}, {fit}", *cells))
    return (f"fitted over equal, m = {result['settings']['most_weighted']}", *FITTED.values()), rows


def radius_table(result: dict) -> Cells:
    """Errors of the kernel at the largest m by radius, and the limit of the normal one."""
    most = result["settings"]["features"][-1]
    rows = []
    for inputs, title in INPUTS.items():
        wanted = {"inputs": inputs, "weights": "equal", "m": most}
        errors = (pick(result["rows"], map=f"pff-sobol-{law}", **wanted)["rmse"] for law in ("normal", "chi"))
        limit = result["limits"][inputs]["normal_rmse"]
        rows.append((title, f"{limit:.3g}", *(with_band(values, ".3g") for values in errors)))
    return (f"relative RMSE at m = {most}", "limit of normal", "PFF Sobol, normal", "PFF Sobol, chi"), rows


def cosine_table(result: dict) -> Cells:
    """Error of WDCF over that of PFF or WPFF with the same radius and weights, held-out pairs."""
    columns = [(law, weights) for law in ("chi", "normal") for weights in ("equal", "nnls")]
    rows = []
    for inputs, title in INPUTS.items():
        cells = []
        for law, weights in columns:
            pair = {"over": [f"wdcf-{law}", weights], "under": [f"pff-sobol-{law}", weights]}
            cells.append(with_band(pick(result["ratios"], inputs=inputs, metric=METRIC.get(inputs, "rmse"), **pair)["ratio"]))
        rows.append((title, *cells))
    return ("WDCF over PFF / WPFF", *(f"{law}, {weights}" for law, weights in columns)), rows


def attention_table(result: dict) -> Cells:
    """Errors of the causal attention output on real inputs, with each key's norm factor and without it."""
    most = {"equal": result["settings"]["features"][-1], "nnls": result["settings"]["most_weighted"]}
    columns = [(inputs, metric) for inputs in METRIC for metric in ("attention", "attention_dropped")]
    rows = []
    for weights, names in (("equal", ["prf", "orf", *FITTED]), ("nnls", FITTED)):
        for name in names:
            title = FITTED[name] if weights == "nnls" else MAPS[name]
            wanted = {"map": name, "weights": weights, "m": most[weights]}
            cells = (with_band(pick(result["rows"], inputs=inputs, **wanted)[metric]) for inputs, metric in columns)
            rows.append((f"{title}, {weights} weights, m = {most[weights]}", *cells))
    limits = {  # keys of the errors with the keys' norm kept and dropped; None is 0
        "limit of every normal map": ("normal_attention", "normal_attention_dropped"),
        "limit of every unbiased map": (None, "exact_attention_dropped"),
        "plain mean over keys": ("plain_mean_attention", "plain_mean_attention"),
        "key weights exp(m_q.k) alone": ("key_weights_attention", "key_weights_attention"),
    }
    for title, keys in limits.items():
        errors = [result["limits"][inputs][key] if key else 0.0 for inputs in METRIC for key in keys]
        rows.append((title, *(f"{error:.2f}" for error in errors)))
    header = [f"{INPUTS[inputs]}, norm {'kept' if metric == 'attention' else 'dropped'}" for inputs, metric in columns]
    return ("relative error of attention output", *header), rows


def tables(result: dict) -> list[str]:
    """All tables as Markdown, in the order of the page that shows them."""
    first, tail = (sorted({slope["from"] for slope in result["slopes"] if slope["weights"] == "equal"}) * 2)[:2]
    others = (draw(result) for draw in (weight_table, radius_table, cosine_table, attention_table))
    return [markdown_table(*cells) for cells in (slope_table(result, first), slope_table(result, tail), *others)]


def show(result: dict) -> None:
    """Print the slopes over all m."""
    title = "slope of log(error) against log(m), ± half the 95 % band"
    table = Table(Column("", no_wrap=True), *INPUTS.values(), title=title)
    for name, values in slopes(result, result["settings"]["features"][0]).items():
        table.add_row(MAPS[name], *(f"{mean:.2f} ± {(high - low) / 2:.2f}" for mean, low, high in values))
    Console().print(table)


# (map, weights, whether the keys' norm is dropped in attention): color, line style, label
LINES = {
    ("prf", "equal", False): ("#4c566a", "-", "PRF"),
    ("orf", "equal", False): ("#a3adbd", "-", "orthogonal random"),
    ("pff-sobol-chi", "equal", False): ("#1f77b4", "-", "PFF Sobol, chi radius"),
    ("pff-halton-chi", "equal", False): ("#7fb8dd", "-", "PFF Halton, chi radius"),
    ("pff-lattice-chi", "equal", False): ("#17a2a2", "-", "PFF lattice, chi radius"),
    ("wdcf-chi", "equal", False): ("#2e8b57", "-", "WDCF, chi radius"),
    ("pff-sobol-chi", "nnls", False): ("#1f77b4", "--", "WPFF, chi radius, fitted weights"),
    ("wdcf-chi", "nnls", False): ("#2e8b57", "--", "WDCF, chi radius, fitted weights"),
    ("wdcf-normal", "equal", False): ("#c8553d", "-", "WDCF, normal radius"),
    ("wdcf-normal", "nnls", False): ("#c8553d", "--", "WDCF, normal radius, fitted weights"),
    ("wdcf-normal", "equal", True): ("#c8553d", ":", "WDCF, normal radius, keys' norm dropped"),
}
GUIDES = {0.5: ("--", "slope -1/2"), 1.0: ("-", "slope -1")}
BASELINES = {"plain_mean_attention": "plain mean over keys", "key_weights_attention": "key weights alone"}


def plot(result: dict, path: Path) -> None:
    """Draw the error against m, one panel per input set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 4, figsize=(15, 7.5), layout="constrained")
    sizes = result["settings"]["features"]
    for axes, (inputs, title) in zip(panels.flat, INPUTS.items(), strict=False):
        metric = METRIC.get(inputs, "rmse")
        for (name, weights, dropped), (color, style, label) in LINES.items():
            shown = [] if dropped and metric == "rmse" else result["rows"]
            rows = [row for row in shown if (row["inputs"], row["map"], row["weights"]) == (inputs, name, weights)]
            values = [row[f"{metric}_dropped" if dropped else metric] for row in rows]
            x = [row["m"] for row in rows]
            axes.plot(x, [value[0] for value in values], style, color=color, label=label, linewidth=1.6)
            axes.fill_between(x, [v[1] for v in values], [v[2] for v in values], color=color, alpha=0.1, linewidth=0)
        if metric == "rmse":
            axes.set_yscale("log")
            start = pick(result["rows"], inputs=inputs, map="prf", weights="equal", m=sizes[0])[metric][0]
            for power, (style, label) in GUIDES.items():
                guide = [start * (sizes[0] / m) ** power for m in sizes]
                axes.plot(sizes, guide, style, color="black", alpha=0.6, linewidth=0.7, label=label)
        else:
            axes.set_ylim(bottom=0.0)
            for i, (baseline, label) in enumerate(BASELINES.items()):
                value = result["limits"][inputs][baseline]
                if i == 0 or abs(value - result["limits"][inputs]["plain_mean_attention"]) > 0.01:
                    axes.axhline(value, color="black", linewidth=0.7)
                    axes.annotate(label, (sizes[0], value), (0, -10), textcoords="offset points", fontsize=9)
        axes.set_title(title)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("features m")
        axes.set_ylabel(METRIC_TITLES[metric])
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1, -1].axis("off")
    panels[-1, -1].legend(*panels[0, 0].get_legend_handles_labels(), loc="center", frameon=False, fontsize=10)
    figure.savefig(path, dpi=100, format="png")
    pyplot.close(figure)
