"""Convert checkpoints between numbers of ranks, ZeRO stages and precisions."""
