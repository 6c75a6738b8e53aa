"""The rollout worker: takes requests from the queue and samples responses with the student's current weights."""
