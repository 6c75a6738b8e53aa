"""Ad-hoc scores: the part that the API and `vaopd score` share. Torch-free."""
