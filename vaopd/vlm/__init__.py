"""A vision-language model as teacher, trainer and engines read it. Imports nothing by itself."""
