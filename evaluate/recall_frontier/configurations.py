"""The configurations of the frontier: students of one teacher that remember more or less."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product

from .config import FrontierConfig

RECALL = "recall"  # heads that were chosen by recall


@dataclass(frozen=True, kw_only=True, slots=True)
class Configuration:
    """
    One student, told apart by its name.

    Attributes:
        name: for readers.
        full_heads: number of key/value heads that keep every token.
        selection: how they are chosen: `recall`, or one of the controls.
        draw: number of the choice, for random ones.
        attention_memory: slots of exact memory of the other key/value heads, the mean over them.
        large_slots: slots that the heads in `full_heads` get in place of every token, which makes memory constant; 0: they
            keep every token.
        spread: give more slots to the heads that gain by them; False: all heads get as many.
        memory_score: what tokens keep their slots by.
        attention_window: tokens of the window.
        attention_sinks: number of sinks.
        linear_branch: False to take the linear branch away while it is measured.
        control: whether it is there to compare with, and no proposal.
    """

    name: str
    full_heads: int = 0
    selection: str = RECALL
    draw: int = 0
    attention_memory: int = 0
    large_slots: int = 0
    spread: bool = True
    memory_score: str = "learned"
    attention_window: int = 64
    attention_sinks: int = 4
    linear_branch: bool = True
    control: bool = False

    @property
    def settings(self) -> dict:
        """Settings for the converter but `full_heads`, whose places are found by `selection`, `draw` and its number."""
        names = ["attention_window", "attention_sinks", "attention_memory"]
        names += ["memory_score"] if self.attention_memory else []
        return {name: getattr(self, name) for name in names}

    @property
    def ablation(self) -> str | None:
        """Key of the ablation that it is measured under."""
        return None if self.linear_branch else "window_only"

    def facts(self) -> dict:
        """All that tells it from others, the name apart; the student to be built is the same for equal facts."""
        return {key: value for key, value in asdict(self).items() if key not in ("name", "control")}


def configurations(config: FrontierConfig) -> list[Configuration]:
    """
    All configurations of the settings: every number of heads with every number of slots, with and without the linear branch;
    the other scores; windows with as many exact tokens; and heads chosen in other ways.
    """
    found = [*grid(config), *other_scores(config), *wider_windows(config), *control_heads(config)]
    return list({configuration.name: configuration for configuration in found}.values())


def grid(config: FrontierConfig) -> Iterator[Configuration]:
    for heads, slots, linear in product(config.heads, config.slots, (True, False) if config.without_linear else (True,)):
        parts = [f"{heads} heads" if heads else "", f"{slots} slots" if slots else ""]
        name = " + ".join(filter(None, parts)) or f"window {config.attention_window}"
        name += "" if linear else ", no linear branch"
        yield configuration(config, name, full_heads=heads, attention_memory=slots, linear_branch=linear)
    for heads, slots, large in product(config.large_heads, config.slots, config.large_slots):
        if heads and slots:
            name = f"{heads} heads of {large} slots + {slots} slots"
            yield configuration(config, name, full_heads=heads, attention_memory=slots, large_slots=large)


def other_scores(config: FrontierConfig) -> Iterator[Configuration]:
    for score, heads, slots in product(config.scores, config.score_heads, config.score_slots):
        name = f"{f'{heads} heads + ' if heads else ''}{slots} slots in every head by {score}"
        settings = {"attention_memory": slots, "memory_score": score, "spread": False, "control": True}
        yield configuration(config, name, full_heads=heads, **settings)


def wider_windows(config: FrontierConfig) -> Iterator[Configuration]:
    for slots in sorted(filter(None, config.slots)) if config.windows else ():
        window = config.attention_window + slots
        yield configuration(config, f"window {window}", attention_window=window, control=True)


def control_heads(config: FrontierConfig) -> Iterator[Configuration]:
    for selection, heads in product(config.controls, config.control_heads):
        for draw in range(config.random_draws if selection == "random" else 1):
            name = f"{heads} heads by {selection}{f', draw {draw + 1}' if selection == 'random' else ''}"
            yield configuration(config, name, full_heads=heads, selection=selection, draw=draw, control=True)


def configuration(config: FrontierConfig, name: str, **facts) -> Configuration:
    shared = {"attention_window": config.attention_window, "attention_sinks": config.attention_sinks}
    return Configuration(**shared | {"name": name, "memory_score": config.scores[0]} | facts)
