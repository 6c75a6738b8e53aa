"""Vision-language models for teacher, trainer and engines. Imports nothing by itself: name the file that you need."""
