"""Tables of docs/gpu.md on recovery, from benchmarks/results/gpu/<card>/recovery_*.json; empty where there are none."""

from measure import target
from recovery_report import table

LENGTHS = ("1024", "4096")
GOAL = 1.15  # perplexity of the pure linear model over its teacher's


def runs(results: dict[str, dict[str, dict]]) -> list[tuple[str, dict]]:
    """Cards and what a recovery step found there."""
    return [(card, found) for card, steps in results.items() for step, found in steps.items() if step.startswith("recovery")]


def ratio_at(found: dict, model: str, length: str) -> float | None:
    """Perplexity of a model over the teacher's, all held-out sources together."""
    return found.get("perplexity_ratio", {}).get(model, {}).get(length, {}).get("all")


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def recovery_table(results: dict[str, dict[str, dict]]) -> str:
    """Every run: tokens, speed, perplexity over the teacher's before and after."""
    rows = []
    for card, found in runs(results):
        speed = [shown(found.get("tokens"), ",.0f"), shown(found.get("tokens_per_s"), ",.0f")]
        speed.append(shown(found.get("share_of_measured_peak"), ".1%"))
        ratios = [shown(ratio_at(found, model, x), ",.3f") for model in ("baseline", "student") for x in LENGTHS]
        state = found.get("error") or ("yes" if found["complete"] else "no")
        rows.append([found.get("recipe", "-"), card, *speed, *ratios, state.replace("|", " ")])
    header = ["recipe", "card", "tokens of distillation", "tokens/s", "of the card's peak"]
    header += ["converted, 1,024", "converted, 4,096", "recovered, 1,024", "recovered, 4,096", "finished"]
    return table(header, rows) if rows else ""


def recall_table(results: dict[str, dict[str, dict]]) -> str:
    """Share of right answers by task and length, teacher and student."""
    rows = []
    for card, found in runs(results):
        quality = found.get("quality", {})
        for task, lengths in quality.get("teacher", {}).get("recall", {}).items():
            for length, teacher in lengths.items():
                student = quality.get("student", {}).get("recall", {}).get(task, {}).get(length, {})
                shares = [shown(x, ".2f") for x in (teacher["share"], student.get("share"), teacher["chance"])]
                rows.append([found["recipe"], card, task, f"{int(length):,}", *shares])
    return table(["recipe", "card", "task", "tokens", "teacher", "recovered", "chance"], rows) if rows else ""


def speed_table(results: dict[str, dict[str, dict]]) -> str:
    """Ways to compute a training step that were timed before the run."""
    rows = []
    for card, found in runs(results):
        for way in found.get("training_step", []):
            numbers = [str(way.get("micro_batch", "-")), shown(way.get("step_s") and way["step_s"] * 1e3, ",.1f")]
            note = str(way.get("error") or way.get("left_out") or "").replace("|", " ")
            rows.append(
                [found["recipe"], card, way["stage"], way["name"], *numbers, shown(way.get("tokens_per_s"), ",.0f"), note]
            )
    header = ["recipe", "card", "stage", "computed", "sequences at a time", "ms a step", "tokens/s", "note"]
    return table(header, rows) if rows else ""


def recovery_targets(step: str, found: dict) -> list[dict]:
    """What the pure linear model is to reach."""
    if step != "recovery_linear":
        return []
    ratios = {length: ratio_at(found, "student", length) for length in LENGTHS}
    name = "pure linear SmolLM2-135M: perplexity over the teacher's at {:,} tokens"
    return [target(name.format(int(x)), GOAL, value, at_most=True) for x, value in ratios.items() if value is not None]
