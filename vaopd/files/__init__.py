"""Files on disk and how they get there whole. Imports nothing by itself: name the file that you need."""
