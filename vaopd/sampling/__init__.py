"""Samples responses from a student, in any process. In: rollout requests. Out: groups of rollouts."""
