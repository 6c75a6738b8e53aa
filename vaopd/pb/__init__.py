"""Generated from proto/ by `make proto`; nobody edits these files."""
