"""Measurements of speed: turns and rounds by a clock that stands still unless told, ratios, floors, peak memory."""

from dijiang.evaluate.latency import timing


class Clock:
    """A clock that `passes(seconds)` moves."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self) -> float:
        return self.now

    def passes(self, name: str, *seconds: float):
        left = list(seconds)

        def call():
            self.order.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_calls_take_turns_and_warm_up_does_not_count():
    clock = Clock()
    calls = {"a": clock.passes("a", 100.0, 1.0, 5.0, 3.0), "b": clock.passes("b", 2.0)}
    timings = timing.alternate(calls, rounds=3, after={"b": clock.passes("after b", 50.0)}, clock=clock)
    assert clock.order == ["b", "after b", "a", "a", "b", "after b"] * 2  # every second round from the end
    assert timings["a"] == {"median_s": 3.0, "min_s": 1.0, "q1_s": 2.0, "q3_s": 4.0, "rounds": 3}
    assert timings["b"]["median_s"] == 2.0


def test_rounds_go_on_until_the_time_is_spent():
    clock = Clock()
    assert timing.alternate({"a": clock.passes("a", 1.0)}, rounds=3, seconds=10.0, clock=clock)["a"]["rounds"] == 10
    assert timing.alternate({"a": clock.passes("a", 1.0)}, rounds=3, seconds=0.0, clock=clock)["a"]["rounds"] == 3


def test_ratios_say_how_many_times_faster_than_the_peer():
    timings = {name: timing.summary(times) for name, times in {"peer": [6, 5, 7], "fast": [3, 2, 9], "slow": [12] * 3}.items()}
    assert timing.ratios(timings, "peer") == {"fast": 2.0, "slow": 0.5}


def test_floor_is_the_slower_of_computing_and_moving():
    limits = {"product_gflops": {"float32": 2.0}, "copy_bytes_per_s": 100.0}
    assert timing.floor_seconds(4e9, 100, limits, "float32") == 2.0
    assert timing.floor_seconds(4e9, 500, limits, "float32") == 5.0
    assert timing.floor_seconds(4e9, 500, limits | {"read_bytes_per_s": 125.0}, "float32") == 4.0
    assert timing.floor_seconds(4e9, 500, limits | {"read_bytes_per_s": 50.0}, "float32") == 5.0


def test_the_device_is_waited_for_before_each_look_at_the_clock():
    """As if a GPU worked on after the call has come back: the wait, not the call, takes the time."""
    clock, queued = Clock(), []

    def wait():
        clock.now += sum(queued)
        queued.clear()

    after = {"a": lambda: queued.append(50.0)}
    timings = timing.alternate({"a": lambda: queued.append(3.0)}, rounds=2, after=after, wait=wait, clock=clock)
    assert timings["a"]["min_s"] == timings["a"]["median_s"] == 3.0


def test_a_result_lives_until_its_time_is_taken():
    """What a call returns is freed outside its time."""
    clock = Clock()

    class Heavy:
        def __del__(self):
            clock.now += 50.0

    assert timing.alternate({"a": Heavy}, rounds=3, clock=clock)["a"]["median_s"] == 0.0


def test_limits_are_rates_of_products_and_copies(monkeypatch):
    """With calls that take half a second by the clock."""
    monkeypatch.setattr(timing, "best_seconds", lambda call, wait: call() is None or 0.5)
    assert timing.machine_limits(["float32", "bfloat16"], quick=True) == {
        "product_gflops": dict.fromkeys(("float32", "bfloat16"), 2 * 128**3 / 0.5 / 1000000000.0),
        "copy_bytes_per_s": 2 * (1 << 20) / 0.5,
        "read_bytes_per_s": (1 << 20) / 0.5,
    }
