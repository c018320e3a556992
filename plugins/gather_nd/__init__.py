"""The room of `gather_nd`: picks the positions whose logits are wanted."""
