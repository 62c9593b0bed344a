"""The machines that cost estimates know by name."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """
    One device.

    Attributes:
        memory: GiB that a program can use.
        speed: peak of dense matrix products in the float type it trains in, TFLOP/s.
        bfloat16: whether it has that type in hardware; else it computes in float32.
    """

    memory: float
    speed: float
    bfloat16: bool = True


# memory as the driver shows it, speeds from the makers' data sheets, without sparsity
DEVICES = {
    "h200": Device(memory=140, speed=989),
    "h100": Device(memory=79, speed=989),
    "a100-80gb": Device(memory=79, speed=312),
    "a100-40gb": Device(memory=39, speed=312),
    "l40s": Device(memory=44, speed=362),
    "rtx4090": Device(memory=23.5, speed=165),
    "v100": Device(memory=31.5, speed=15.7, bfloat16=False),
    # two cores of a server processor with matrix units (AMX), as far as small products use them
    "cpu": Device(memory=16, speed=0.6),
}
