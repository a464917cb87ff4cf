"""What the environment of a run may decide, and what it may not: settings are those of the configuration.

`accelerate launch`, and clusters that export its variables, tell Accelerate things that would change the numbers of a
run behind its configuration's back. Those are passed over with a line, or refused where nothing else can be done.
"""

from __future__ import annotations

import os

# Ways to divide a model that the codec and its discriminator together cannot be trained in.
REFUSED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
# Accelerate would divide gradients, clip them or round them once more; value -> what it means that changes nothing.
PASSED_OVER = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "train.accumulation"),
    "ACCELERATE_GRADIENT_CLIPPING": ("", "train.clip_norm"),
    "ACCELERATE_DOWNCAST_BF16": ("no", "train.mixed_precision"),
}
# How many processes there are, as torchrun and srun say it; which of them this one is, as Accelerate reads it.
COUNTS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
FALSE = {"", "0", "false", "no", "off", "n", "f"}
FORMATS = {"no", "bf16", "fp16"}


def take_environment() -> list[str]:
    """Remove what is passed over from the environment of this process; a line for each. Before Accelerate begins.

    Raises ValueError naming the variable that asks for something that cannot be.
    """
    for key, what in REFUSED.items():
        if os.environ.get(key, "").lower() not in FALSE:
            raise ValueError(
                f"{key} is set: {what} cannot train the codec and its discriminator together; start with plain data "
                "parallelism (torchrun, or accelerate launch --multi_gpu)"
            )
    for count in COUNTS:
        if os.environ.get(count, "1").strip() not in ("", "0", "1") and not any(map(os.environ.get, RANKS)):
            raise ValueError(
                f"{count} is {os.environ[count]} and RANK is not set, so each process would train alone: start with "
                f"torchrun or accelerate launch, once on each machine, or unset {count}"
            )
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if told not in FORMATS | FALSE:
        raise ValueError(
            f"ACCELERATE_MIXED_PRECISION is {told}: set train.mixed_precision to no, bf16 or fp16"
        )
    lines = []
    for key, (harmless, setting) in PASSED_OVER.items():
        value = os.environ.pop(key, harmless)
        if value.lower() not in {harmless, *FALSE}:
            lines.append(f"{key}={value} in the environment is passed over: {setting} decides")
    return lines
