"""What becomes of the settings for several GPUs, of whichever tool."""

SEVERAL = (
    "distributed.strategy auto shares an update among the GPUs that are there, and shards the base where it must; for "
    "as many rows, multiply train.gradient_accumulation_steps by the number of GPUs"
)
