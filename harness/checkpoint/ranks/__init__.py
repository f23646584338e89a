"""The parts of the ranks in a checkpoint: agreed on by all ranks, opened when needed."""
