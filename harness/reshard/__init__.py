"""Resume a checkpoint on other ranks, ZeRO stages or precisions."""
