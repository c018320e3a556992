"""The room of `AttentionPlugin`: RoPE, KV-cache write and causal grouped-query attention in one operator."""
