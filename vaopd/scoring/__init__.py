"""An ad-hoc score: the part that the API and `vaopd score` share. Torch-free."""
