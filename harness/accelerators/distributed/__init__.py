"""Several ranks: who they are, how they start, talk and end."""
