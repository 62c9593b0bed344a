"""The devices that estimates know by name."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """
    One kind of device.

    Attributes:
        memory: memory that a program can use, in GiB.
        speed: peak of dense matrix products in the float type that training uses, in TFLOP/s.
        bfloat16: whether the hardware has bfloat16; without it, training computes in float32.
    """

    memory: float
    speed: float
    bfloat16: bool = True


# memory as the driver reports it, speeds without sparsity from the manufacturers' data sheets
DEVICES = {
    "h200": Device(memory=140, speed=989),
    "h100": Device(memory=79, speed=989),
    "a100-80gb": Device(memory=79, speed=312),
    "a100-40gb": Device(memory=39, speed=312),
    "l40s": Device(memory=44, speed=362),
    "rtx4090": Device(memory=23.5, speed=165),
    "v100": Device(memory=31.5, speed=15.7, bfloat16=False),
    # two cores of a server processor with matrix units (AMX), at the speed that small products reach
    "cpu": Device(memory=16, speed=0.6),
}
