"""How new weights reach the rollout workers: a folder that both see, or HTTP, whole or as what changed."""
