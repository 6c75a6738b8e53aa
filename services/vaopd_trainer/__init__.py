"""The trainer: one process for each rank of a job. `loop` has a rank's steps, `coordinator` what rank 0 alone does."""
