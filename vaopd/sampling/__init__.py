"""A student that answers, in any process: rollout requests come in, groups of responses leave."""
